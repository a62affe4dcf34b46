"""What models answered to lm-eval's requests, on record; a model is loaded only for what is not.

A line is found again by the model's content, dtype, tokenizer and window, and by the request's own text and settings,
so the same prompt in another task is not computed twice.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from branchmix.checkpoint.text import whole_characters
from branchmix.errors import CheckpointError, RecipeError
from branchmix.evaluate.candidate import Candidate
from branchmix.evaluate.perplexity import Progress
from branchmix.evaluate.tasks.live import LiveModel
from branchmix.likelihood.records import Journal, key_of

FILE = "requests.jsonl"


class Answers(Journal):
    """The answers to all requests so far."""

    def __init__(self, folder: Path | None):
        super().__init__(folder, FILE, "request")

    def add(self, model: str, request: str, kind: str, task: str | None, result: Any, **facts: bool) -> None:
        """Keep an answer, on disk at once, with what is true of the request: ``shortened``, ``merged``."""
        true = {name: True for name, value in facts.items() if value}
        self.add_line({"model": model, "request": request, "kind": kind, "task": task, "result": result, **true})


class RecordedModel(LM):
    """A candidate, as lm-eval asks it."""

    def __init__(
        self,
        candidate: Candidate,
        answers: Answers,
        *,
        max_length: int,
        batch_tokens: int,
        progress: Progress | None = None,
    ):
        super().__init__()
        self._candidate, self._answers = candidate, answers
        self._max_length, self._batch_tokens, self._progress = max_length, batch_tokens, progress
        self._facts = {**candidate.facts, "max_length": max_length, "lm_eval": version("lm_eval")}
        self._key = key_of(self._facts)
        self._live: LiveModel | None = None
        self.known = self.asked = 0
        """Requests that were on record before this run, and all of them."""
        self.shortened = self.merged = self.replaced = 0
        """Requests, of this run or on record: that lost their beginning because the window is shorter; whose
        continuation merges with the last token of the context; in which something was not a character (see
        ``whole_characters``)."""

    @property
    def name(self) -> str:
        """Short, and different for models of different content."""
        return self._key[:8]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation in nats, and whether it is the greedy one."""
        return [(float(logp), bool(greedy)) for logp, greedy in self._results("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text in nats."""
        texts = {(request.task_name, request.args[0]) for request in requests}
        for task in {name for name, _ in texts} - {name for name, text in texts if text}:
            raise RecipeError(f"tasks: {task}: all its texts are empty: there is nothing to evaluate")
        return [float(logp) for logp in self._results("loglikelihood_rolling", requests)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that the model writes after each prompt."""
        return [str(text) for text in self._results("generate_until", requests)]

    def _results(self, kind: str, requests: list[Any]) -> list[Any]:
        arguments = [_whole(request.args) for request in requests]
        self.replaced += sum(given != request.args for given, request in zip(arguments, requests, strict=True))
        keys = _keys(kind, arguments)
        self.asked += len(requests)
        self.known += sum(self._answers.was_there(self._key, key) for key in keys)
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        known = {key for key in first if self._answers.find(self._key, key) is not None}
        for together in self._answers.rounds.of(self._key, self._batch_tokens, keys, known):
            chosen = [first[key] for key in together]
            self._ask(kind, together, [arguments[n] for n in chosen], [requests[n] for n in chosen])
        lines = [line for key in keys if (line := self._answers.find(self._key, key)) is not None]
        self.shortened += sum(line.get("shortened", False) for line in lines)
        self.merged += sum(line.get("merged", False) for line in lines)
        return [line["result"] for line in lines]

    def _ask(self, kind: str, keys: list[str], arguments: list[Any], requests: list[Any]) -> None:
        progress = self._candidate.named(self._progress, {"generate_until": "writing"}.get(kind, "reading"))
        try:
            live = self._live = self._live or self._load()
            answers = live.answers(
                kind,
                arguments,
                [int(key[:15], 16) for key in keys],
                progress,
                names=[f"tasks: {request.task_name}, document {request.doc_id}" for request in requests],
                known={n for n, key in enumerate(keys) if self._answers.find(self._key, key) is not None},
            )
            for number, result in answers:
                facts = {"shortened": number in live.shortened, "merged": number in live.merged}
                self._answers.add(self._key, keys[number], kind, requests[number].task_name, result, **facts)
        except CheckpointError as error:
            if str(error).startswith(self._candidate.given):
                raise
            raise CheckpointError(f"{self._candidate.given}: {error}") from error

    def _load(self) -> LiveModel:
        candidate = self._candidate
        self._answers.describe(self._key, {**candidate.source, **self._facts})
        lengths = {"max_length": self._max_length, "batch_tokens": self._batch_tokens}
        return LiveModel(candidate.model(), candidate.tokenizer, prefix=candidate.prefix, **lengths)


def _whole(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(whole_characters(value) if isinstance(value, str) else value for value in arguments)


def _keys(kind: str, requests: list[tuple[Any, ...]]) -> list[str]:
    """A key for each request: its content, and for one that samples its number among the equal ones."""
    counts: dict[str, int] = {}
    keys = []
    for arguments in requests:
        facts: dict[str, Any] = {"kind": kind, "arguments": list(arguments)}
        key = key_of(facts)
        if kind == "generate_until" and arguments[1].get("do_sample"):
            counts[key] = counts.get(key, -1) + 1
            key = key_of({**facts, "sample": counts[key]})
        keys.append(key)
    return keys

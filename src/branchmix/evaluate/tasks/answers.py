"""A model as lm-eval asks it: answers that are on record, and for the others a live model with our forward passes.

Tokens, prompts and stops are lm-eval's. Batch size and order change a result by rounding only: inputs are padded on the
right without a mask where causal attention never sees it, prompts of generation on the left with one, and sampled text
draws from a seed of its own.
Shapes: N predicted tokens of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from branchmix.checkpoint.json_text import key_of
from branchmix.checkpoint.text import whole_characters
from branchmix.errors import CheckpointError, RecipeError
from branchmix.evaluate.perplexity import TokenWindow, batches, token_log_probs
from branchmix.likelihood.forward import check_tokens, evaluating, length_dependent, log_probs, logits_at
from branchmix.likelihood.models import Progress, TextModel
from branchmix.likelihood.records import Journal

FILE = "requests.jsonl"
Pair = tuple[list[int], list[int]]
"""The tokens of a request's context and of its continuation."""


class RecordedModel(LM):
    """A model that is asked only what is not on record, and loaded only then.

    A line is found again by the model's content, dtype, tokenizer and window, and by the request's own text and
    settings, so the same prompt in another task is not computed twice.
    """

    def __init__(
        self,
        candidate: TextModel,
        answers: Journal,
        *,
        max_length: int,
        batch_tokens: int,
        progress: Progress | None = None,
    ):
        super().__init__()
        self._candidate, self._progress = candidate, progress
        self._lengths = {"max_length": max_length, "batch_tokens": batch_tokens}
        facts = {"prefix": candidate.prefix, "max_length": max_length, "lm_eval": version("lm_eval")}
        self._answers = answers.of({**candidate.facts, **facts}, **candidate.source)
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
        return self._answers.key[:8]

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
        arguments = [
            tuple(whole_characters(value) if isinstance(value, str) else value for value in request.args)
            for request in requests
        ]
        self.replaced += sum(given != request.args for given, request in zip(arguments, requests, strict=True))
        keys = _keys(kind, arguments)
        self.asked += len(requests)
        self.known += self._answers.num_earlier(keys)
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        for together, known in self._answers.missing(keys, self._lengths["batch_tokens"]):
            chosen = [first[key] for key in together]
            self._ask(kind, together, known, [arguments[n] for n in chosen], [requests[n] for n in chosen])
        lines = [self._answers[key] for key in keys]
        self.shortened += sum(line.get("shortened", False) for line in lines)
        self.merged += sum(line.get("merged", False) for line in lines)
        return [line["result"] for line in lines]

    def _ask(self, kind: str, keys: list[str], known: set[int], arguments: list[Any], requests: list[Any]) -> None:
        candidate = self._candidate
        try:
            if self._live is None:
                self._live = LiveModel(candidate.model(), candidate.tokenizer, prefix=candidate.prefix, **self._lengths)
            answers = self._live.answers(
                kind,
                arguments,
                [int(key[:15], 16) for key in keys],
                candidate.named(self._progress, "writing" if kind == "generate_until" else "reading"),
                names=[f"tasks: {request.task_name}, document {request.doc_id}" for request in requests],
                known=known,
            )
            for number, result in answers:
                places = {"shortened": self._live.shortened, "merged": self._live.merged}
                true = {name: True for name, numbers in places.items() if number in numbers}
                task = requests[number].task_name
                self._answers.add(keys[number], kind=kind, task=task, result=result, **true)
        except CheckpointError as error:
            if str(error).startswith(candidate.given):
                raise
            raise CheckpointError(f"{candidate.given}: {error}") from error


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


class LiveModel(HFLM):
    """A causal LM of transformers, dense or a mixture, in evaluation mode.

    Requests longer than ``max_length`` lose their beginning, as in lm-eval. ``prefix`` is what a text's first token is
    predicted from; a CheckpointError is raised if tokenizer and config know none.
    """

    def __init__(self, model: Any, tokenizer: Any, *, prefix: int | None, max_length: int, batch_tokens: int):
        if prefix is None:
            raise CheckpointError("its tokenizer and config name neither BOS nor EOS, which lm-eval starts a text from")
        tokenizer = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token
        if tokenizer.pad_token_id is None:  # lm-eval would add a token that the model has no embedding for
            tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else prefix
        super().__init__(
            pretrained=model, tokenizer=tokenizer, prefix_token_id=prefix, max_length=max_length, batch_size=1
        )
        self._budget = batch_tokens
        self._equal_lengths = length_dependent(model.config)
        self.shortened: set[int] = set()
        """Numbers of the last call's requests that were longer than ``max_length`` and lost their beginning."""
        self.merged: set[int] = set()
        """Numbers of the last call's requests whose continuation merges with the last token of the context."""

    def answers(
        self,
        kind: str,
        arguments: Sequence[tuple[Any, ...]],
        seeds: Sequence[int],
        progress: Progress | None,
        *,
        names: Sequence[str],
        known: Collection[int] = (),
    ) -> Iterator[tuple[int, Any]]:
        """The result of each request that is not known, as (its number, result), as soon as there is one.

        ``kind`` is the method of lm-eval's models that requests are for. Each has ``arguments``, a seed in case that it
        samples, and a name for errors: task and document. Batches are made of all, those that are ``known`` too.

        Raises:
            RecipeError: a request leaves nothing to predict, or is longer than the window.
            CheckpointError: the tokenizer is not the model's, or the logits are not finite.
        """
        self.shortened.clear()
        self.merged.clear()
        self._names, self._known = names, known
        done, total = 0, len(arguments) - len(known)
        results: Iterator[tuple[int, Any]]
        if kind == "generate_until":
            results = self._generations(arguments, seeds)
        elif kind == "loglikelihood":
            results = self._scored([self._pair(number, *texts) for number, texts in enumerate(arguments)])
        else:
            results = self._texts([text for (text,) in arguments])
        with evaluating(self.model):
            for number, result in results:
                if number not in known:
                    yield number, result
                    done += 1
                    if progress is not None:
                        progress(kind, done, total)

    # ---- log-likelihoods ----

    def _pair(self, number: int, context: str, continuation: str) -> Pair:
        """A request's tokens, split as lm-eval and ``scaling`` split them: spaces at the context's end move to the
        continuation, whose tokens are those that both texts have beyond as many as the context has."""
        if context == "":
            start, after = [], self.tok_encode(continuation, add_special_tokens=False)
            if after[:1] == [self.prefix_token_id] and len(after) > 1:  # the text begins with BOS already
                start, after = after[:1], after[1:]
        else:
            start, whole = self.tok_encode(context.rstrip()), self.tok_encode(context + continuation)
            after = whole[len(start) :]
            if whole[: len(start)] != start:
                self.merged.add(number)
        if not after:
            raise RecipeError(
                f"{self._names[number]}: the answer {continuation[:40]!r} has no token of its own after the prompt: it "
                "is empty, or the tokenizer merges it with the prompt's end: change target_delimiter or the answers"
            )
        return start or [self.prefix_token_id], after

    def _texts(self, texts: Sequence[str]) -> Iterator[tuple[int, float]]:
        rows = [np.asarray(self.tok_encode(text), dtype=np.int64) for text in texts]
        for number, row in enumerate(rows):
            if texts[number] and not len(row):
                raise RecipeError(f"{self._names[number]}: the tokenizer makes no tokens of its text: leave it out")
        options: dict[str, Any] = {"max_length": self.max_length, "batch_tokens": self._budget, "known": self._known}
        for number, logp_T in token_log_probs(self.model, rows, prefix=self.prefix_token_id, **options):
            yield number, float(logp_T.sum(dtype=np.float64))

    def _scored(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Log-probability of each request's continuation, and whether it is what the model would write.

        Requests with the same inputs, such as the one-letter answers of one question, share a row of the forward pass.
        """
        inputs: list[np.ndarray] = []
        users: dict[bytes, tuple[int, list[int]]] = {}
        for number, (context, continuation) in enumerate(pairs):
            if len(continuation) > self.max_length:
                raise RecipeError(
                    f"max_length: {self.max_length} is less than the {len(continuation)} tokens of a continuation"
                )
            whole = np.asarray(context + continuation, dtype=np.int64)
            if len(whole) > self.max_length + 1:
                self.shortened.add(number)
            tokens = whole[-(self.max_length + 1) :][:-1]
            row, numbers = users.setdefault(tokens.tobytes(), (len(inputs), []))
            if row == len(inputs):
                inputs.append(tokens)
            numbers.append(number)
        check_tokens(self.model, [*(continuation for _, continuation in pairs), *inputs])
        of_row = [numbers for _, numbers in users.values()]
        windows = [TokenWindow(row, 0, 0, len(tokens)) for row, tokens in enumerate(inputs)]
        windows.sort(key=lambda window: (-window.end, window.document))
        for batch in batches(windows, self._budget, equal_lengths=self._equal_lengths):
            asked = [(place, number) for place, window in enumerate(batch) for number in of_row[window.document]]
            if all(number in self._known for _, number in asked):
                continue
            targets = [np.asarray(pairs[number][1], dtype=np.int64) for _, number in asked]
            counts, ends = [len(target) for target in targets], [batch[row].end for row, _ in asked]
            rows_N = np.repeat([row for row, _ in asked], counts)
            places_N = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, counts, strict=True)])
            rows = [inputs[window.document] for window in batch]
            logits_NV, targets_N = logits_at(self.model, rows, rows_N, places_N, np.concatenate(targets))
            cuts = np.cumsum(counts)[:-1]
            logps = np.split(log_probs(logits_NV, targets_N), cuts)
            greedy = np.split((logits_NV.argmax(-1) == targets_N).cpu().numpy(), cuts)
            for (_, number), logp, is_greedy in zip(asked, logps, greedy, strict=True):
                yield number, (float(logp.sum(dtype=np.float64)), bool(is_greedy.all()))

    # ---- generation ----

    def _generations(self, arguments: Sequence[Any], seeds: Sequence[int]) -> Iterator[tuple[int, str]]:
        """lm-eval's greedy or sampled text, in batches of prompts of about one length and the same settings."""
        if self.tokenizer.eos_token_id is None:
            raise CheckpointError("its tokenizer has no EOS, which ends what the model writes")
        prompts: list[str] = []
        groups: dict[tuple[str, bool], list[TokenWindow]] = {}
        for number, (prompt, settings) in enumerate(arguments):
            room = self.max_length - normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            if room <= 0:
                raise RecipeError(
                    f"max_length: {self.max_length} is too short for a task that lets the model write "
                    f"{self.max_length - room} tokens"
                )
            length = len(self.tok_encode(prompt))
            if not length:  # as for a text: BOS or EOS is what the first token is predicted from
                prompt = self.tokenizer.decode([self.prefix_token_id])
                if not (length := len(self.tok_encode(prompt))):
                    raise RecipeError(f"{self._names[number]}: the tokenizer makes no tokens of its prompt")
            if length > room:
                self.shortened.add(number)
            starts = bool(self.tokenizer.bos_token) and prompt.startswith(self.tokenizer.bos_token)
            group = groups.setdefault((repr(sorted(settings.items(), key=str)), starts), [])
            group.append(TokenWindow(number, 0, 0, min(length, room)))
            prompts.append(prompt)
        for _, group in sorted(groups.items()):
            group.sort(key=lambda window: (-window.end, prompts[window.document]))
            samples = arguments[group[0].document][1].get("do_sample")  # these are alone
            for batch in batches(group, 0 if samples else self._budget, equal_lengths=self._equal_lengths):
                numbers = [window.document for window in batch]
                if all(number in self._known for number in numbers):
                    continue
                requests = [Instance("generate_until", {}, (prompts[n], arguments[n][1]), n) for n in numbers]
                self.batch_size_per_gpu = len(requests)
                with torch.random.fork_rng():
                    torch.random.manual_seed(seeds[numbers[0]])
                    texts = self.generate_until(requests, disable_tqdm=True)
                yield from zip(numbers, texts, strict=True)

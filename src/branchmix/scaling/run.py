"""``run(family, ...)``: every model of a family on every task, resumable, and the table that ``scaling trends`` reads.

OUT holds ``records.jsonl`` (every answer, found again by what it was computed from, so a killed run goes on),
``results.csv`` and ``examples/`` for trends, and ``results.json`` with all else that is known of each result.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from branchmix import __version__
from branchmix.errors import CheckpointError, DataError
from branchmix.likelihood.models import TextModel, check_dtype
from branchmix.likelihood.records import Lines, Rounds, key_of, model_hash
from branchmix.scaling.examples import Example
from branchmix.scaling.family import FamilyFile, Subject, subjects
from branchmix.scaling.metrics import Score, Summary, score, summarise
from branchmix.scaling.results import write_results
from branchmix.scaling.scoring.tokens import Bos, Encoded, Question, encode_questions
from branchmix.scaling.selection import Selected, select

BATCH_TOKENS = 2048
_AT_ONCE = 2048
"""Questions that are looked at together for what they share; a killed run loses none that is done."""
_FLUSH_SECONDS = 1.0
"""Answers wait so long at most until they are on disk."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Answer:
    """What a model makes of a question."""

    logprobs: tuple[float, ...]
    """Summed, in nats, of each option; none if it was refused."""
    tokens: tuple[int, ...]
    """Of each option."""
    merged: bool = False
    refused: str | None = None
    seconds: float = 0.0
    """Of computing, its share of a run's time."""


@dataclass
class TaskResult:
    """A model on the examples of one file."""

    subject: Subject
    selected: Selected
    summary: Summary | None
    """None if every example was refused."""
    scored: list[tuple[int, Example, Score, Answer]]
    """Number in the file, example, its numbers, and the answer to its prompt."""
    refused: list[tuple[int, str]]
    """Number of each example that was not scored, and why."""
    merged: int
    """Scored examples in which an option merges with the prompt's last token."""
    facts: dict[str, Any]
    """What the numbers depend on: dtype, tokenizer, BOS policy."""
    seconds: float = 0.0
    """Of computing, whenever that was."""


@dataclass
class ScalingRun:
    """All results of a call."""

    results: list[TaskResult]
    subjects: list[Subject]
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, and ``results.json``."""
        from branchmix.scaling.results import as_dict

        return as_dict(self)


def run(
    family: FamilyFile | str | Path,
    *,
    tasks: str = "all",
    data: Sequence[str | Path] = (),
    fresh: Sequence[str | Path] = (),
    out: str | Path | None = None,
    limit: int | None = None,
    shots: int = 0,
    bos: str = "default",
    dtype: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ScalingRun:
    """Score every model of a family on every task. What is on record in ``out`` is not computed again.

    Args:
        family: the models, or their YAML file.
        tasks: ``all``, or names and YAML files of tasks, with commas.
        data: folders of official or fresh files.
        fresh: folders of fresh files.
        out: folder for records and results; nothing is kept without it.
        limit: examples of a file at most.
        shots: other examples, with answers, before each prompt.
        bos: ``default`` as the tokenizer does it, ``on`` or ``off``.
        dtype: of the weights; ``auto`` as stored. Logits become fp32 before the softmax.
        batch_tokens: of a forward pass; results differ by rounding only.
        trust_remote_code: run code that checkpoints bring along.
        progress: called with step, done, total.

    Raises:
        BranchMixError: one line for what is wrong with the file, a task, the data, a model or ``out``.
    """
    check_dtype(dtype)
    file = family if isinstance(family, FamilyFile) else FamilyFile.load(family)
    selected, notes = select(tasks, [Path(p) for p in data], [Path(p) for p in fresh], shots=shots, limit=limit)
    chosen = subjects(file)
    notes += [note for subject in chosen for note in subject.notes]
    records = _Answers(Path(out) if out is not None else None)
    found = ScalingRun([], chosen, notes, _versions())
    for subject in chosen:
        model = _Model(subject, dtype, bos, trust_remote_code)
        notes += model.text.notes
        for one in selected:
            found.results.append(model.result(one, records, batch_tokens, progress))
        if model.known:
            notes.append(f"{subject.label}: {model.known} of {model.asked} answers were on record")
        model.release()
        if out is not None:
            write_results(Path(out), found)
    for result in found.results:
        notes += _warnings(result)
    return found


def _warnings(result: TaskResult) -> list[str]:
    where = f"{result.subject.label}, {result.selected.label}"
    count = len(result.selected.examples)
    reasons = Counter(reason for _, reason in result.refused)
    lines = [f"{where}: {number} of {count} examples refused: {reason}" for reason, number in reasons.items()]
    if result.merged:
        lines.append(f"{where}: in {result.merged} examples a class merges with the prompt's last token")
    return lines


def _versions() -> dict[str, str]:
    import platform

    names = ("torch", "transformers", "tokenizers")
    return {"branchmix": __version__, "python": platform.python_version()} | {n: metadata.version(n) for n in names}


# ---- one model ----


class _Model:
    """A subject with its tokenizer; its weights are loaded once an answer is not on record."""

    def __init__(self, subject: Subject, dtype: str, bos: str, trust_remote_code: bool):
        self.subject = subject
        self.text = TextModel(subject.found, dtype, trust_remote_code)
        self.bos = Bos.of(self.text.tokenizer, self.text.config, bos)
        self.facts: dict[str, Any] = {
            "weights": model_hash(self.text.folder),
            "dtype": dtype,
            "tokenizer": self.text.tokenizer_hash,
            "bos": self.bos.policy,
            "bos_tokens": list(self.bos.tokens),
        }
        self.key = key_of(self.facts)
        self.known = self.asked = 0
        """Answers that were on record before this run, and all of them."""
        self._weights: Any = None

    def result(self, selected: Selected, records: _Answers, batch_tokens: int, progress: Progress | None) -> TaskResult:
        """Answers of all examples, from the records or computed now."""
        prompts = [Question(example.prompt, example.options) for example in selected.examples]
        others = [
            Question(example.other_prompt, example.options) if example.other_prompt is not None else None
            for example in selected.examples
        ]
        asked = list(dict.fromkeys([*prompts, *(question for question in others if question is not None)]))
        by_hash = {_hash(question): question for question in asked}
        on_record = {key for key, question in by_hash.items() if records.get(self.key, question) is not None}
        self.known += sum(records.was_there(self.key, question) for question in asked)
        self.asked += len(asked)
        if len(on_record) < len(by_hash):
            records.describe(self.key, {"path": self.subject.found.given, **self.facts})
        step = f"{self.subject.label}: {selected.label}"
        told = (lambda done, total: progress(step, done, total)) if progress else None
        for keys in records.rounds.of(self.key, batch_tokens, by_hash, on_record):
            self._answer([by_hash[key] for key in keys], records, batch_tokens, told)
        metric = selected.task.metric
        scored: list[tuple[int, Example, Score, Answer]] = []
        refused: list[tuple[int, str]] = []
        for number, example in enumerate(selected.examples):
            answer = records.get(self.key, prompts[number])
            other_question = others[number]
            other = records.get(self.key, other_question) if other_question is not None else None
            assert answer is not None
            reason = answer.refused or (other.refused if other is not None else None)
            if reason is not None:
                refused.append((number, reason))
                continue
            numbers = score(metric, example, answer.logprobs, other.logprobs if other is not None else None)
            scored.append((number, example, numbers, answer))
        summary = summarise(metric, [one[1] for one in scored], [one[2] for one in scored]) if scored else None
        answers = [records.get(self.key, question) for question in asked]
        return TaskResult(
            subject=self.subject,
            selected=selected,
            summary=summary,
            scored=scored,
            refused=refused,
            merged=sum(answer.merged for *_, answer in scored),
            facts=self.facts,
            seconds=sum(answer.seconds for answer in answers if answer is not None),
        )

    def _answer(
        self,
        questions: Sequence[Question],
        records: _Answers,
        batch_tokens: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        from branchmix.likelihood.forward import max_positions
        from branchmix.scaling.scoring.passes import can_share, score_options

        limit = max_positions(self.text.config)
        encoded = encode_questions(self.text.tokenizer, questions, self.bos, limit)
        with records.writing():
            known = {n for n, question in enumerate(questions) if records.get(self.key, question) is not None}
            for number, (question, tokens) in enumerate(zip(questions, encoded, strict=True)):
                if tokens.refused is not None and number not in known:
                    records.add(self.key, question, Answer((), (), tokens.merged, tokens.refused))
            left = [n for n, tokens in enumerate(encoded) if tokens.refused is None]
            total = len(set(left) - known)
            if not total:
                return
            if self._weights is None:
                self._weights = self.text.load()
            share = can_share(self._weights)
            # Prompts that begin alike stay together, so that what they share is computed once.
            left.sort(key=lambda n: encoded[n].context)
            done = 0
            for start in range(0, len(left), _AT_ONCE):
                part = left[start : start + _AT_ONCE]
                on_record = {place for place, n in enumerate(part) if n in known}
                found = self._scored(score_options, [encoded[n] for n in part], batch_tokens, share, on_record)
                last = time.perf_counter()
                for place, logprobs in found:
                    now = time.perf_counter()
                    tokens = encoded[part[place]]
                    answer = Answer(tuple(logprobs), tuple(map(len, tokens.options)), tokens.merged, seconds=now - last)
                    last = now
                    records.add(self.key, questions[part[place]], answer)
                    done += 1
                    if progress is not None:
                        progress(done, total)

    def _scored(
        self, score_options: Any, tokens: list[Encoded], batch_tokens: int, share: bool, known: set[int]
    ) -> Any:
        try:
            yield from score_options(self._weights, tokens, batch_tokens=batch_tokens, share=share, known=known)
        except CheckpointError as error:
            raise CheckpointError(f"{self.subject.found.given}: {error}") from error

    def release(self) -> None:
        """The next model needs the memory."""
        self._weights = None


# ---- records ----


class _Answers:
    """All answers so far, by the model's key and the question's text."""

    def __init__(self, folder: Path | None):
        self._lines = Lines(folder)
        self._known: dict[tuple[str, str], Answer] = {}
        self._described: set[str] = set()
        self.rounds = Rounds(self._lines)
        self._waiting: list[dict[str, Any]] = []
        self._flushed = 0.0
        for record in self._lines.read():
            self._keep(record)
        self._earlier = set(self._known)

    def _keep(self, record: dict[str, Any]) -> None:
        if self.rounds.keep(record):
            return
        if "question" not in record:
            self._described.add(str(record.get("model")))
            return
        try:
            self._known[record["model"], record["question"]] = Answer(
                tuple(record.get("logprobs", ())),
                tuple(record.get("tokens", ())),
                bool(record.get("merged", False)),
                record.get("refused"),
                float(record.get("seconds", 0.0)),
            )
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{self._lines.file}: has a line that is no answer: choose another --out") from None

    def was_there(self, model: str, question: Question) -> bool:
        """Whether an answer was on the disk before this process began to write."""
        return (model, _hash(question)) in self._earlier

    def get(self, model: str, question: Question) -> Answer | None:
        """What is on record."""
        return self._known.get((model, _hash(question)))

    def describe(self, model: str, facts: dict[str, Any]) -> None:
        """What a model's key stands for, once."""
        if model not in self._described:
            self._described.add(model)
            self._lines.add({"model": model, **facts})

    def add(self, model: str, question: Question, answer: Answer) -> None:
        """Keep an answer; within ``writing`` it is on disk a second later, or at the end."""
        key = _hash(question)
        self._known[model, key] = answer
        record: dict[str, Any] = {"model": model, "question": key}
        if answer.refused is not None:
            record["refused"] = answer.refused
        else:
            record |= {"logprobs": answer.logprobs, "tokens": answer.tokens, "seconds": round(answer.seconds, 6)}
        if answer.merged:
            record["merged"] = True
        self._waiting.append(record)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Everything to disk."""
        waiting, self._waiting = self._waiting, []
        self._flushed = time.monotonic()
        self._lines.add(*waiting)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """All that is added inside is on disk at its end, whatever ends it."""
        self.flush()
        try:
            yield
        finally:
            self.flush()


@lru_cache(maxsize=1 << 16)
def _hash(question: Question) -> str:
    return key_of({"prompt": question.prompt, "options": question.options})

"""``run(family, ...)``: every model of a family on every task, resumable, and the table that ``scaling trends`` reads.

OUT holds ``records.jsonl`` (every answer under a hash of what it depends on, so a rerun computes only what is missing),
``results.csv`` and ``examples/`` for trends, and ``results.json`` with everything else about each result.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from branchmix import __version__
from branchmix.checkpoint.json_text import key_of
from branchmix.errors import CheckpointError
from branchmix.likelihood.models import Progress, TextModel, check_dtype
from branchmix.likelihood.records import FILE, Journal
from branchmix.scaling.family import FamilyFile, Subject, subjects
from branchmix.scaling.metrics import score, summarise
from branchmix.scaling.results import ScalingRun, TaskResult
from branchmix.scaling.scoring.plan import BATCH_TOKENS
from branchmix.scaling.scoring.tokens import Bos, Question, encode_questions
from branchmix.scaling.selection import Selected, select_all
from branchmix.scaling.within import Axes, by_kept_experts, with_top_k

_AT_ONCE = 2048
"""Questions that are searched together for what they share."""


def run(
    family: FamilyFile | str | Path,
    *,
    tasks: str = "all",
    data: Sequence[str | Path] = (),
    fresh: Sequence[str | Path] = (),
    out: str | Path | None = None,
    limit: int | None = None,
    shots: int | Sequence[int] = 0,
    experts: Sequence[int] = (),
    top_k: Sequence[int] = (),
    bos: str = "default",
    dtype: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ScalingRun:
    """Score every model of a family on every task. What is on record in ``out`` is not computed again.

    The arguments are the options of ``branchmix scaling run``. Several ``shots``, and any ``experts`` and ``top_k``,
    are axes within each model: see ``within.Axes``. Nothing is kept without ``out``; ``progress`` is called with step,
    done, total.

    Raises:
        BranchMixError: one line for what is wrong with the file, a task, the data, a model or ``out``.
    """
    dtype = check_dtype(dtype)
    file = FamilyFile.load(family)
    axes = Axes((shots,) if isinstance(shots, int) else tuple(shots), tuple(experts), tuple(top_k))
    folders = [Path(p) for p in data], [Path(p) for p in fresh]
    selected, notes = select_all(tasks, *folders, shots=axes.shots, limit=limit)
    chosen = subjects(file)
    notes += [note for subject in chosen for note in subject.notes]
    journal = Journal(Path(out) if out is not None else None, FILE, "question")
    versions = {"branchmix": __version__, "python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    scaling_run = ScalingRun([], chosen, notes, versions)
    texts = [TextModel(subject.model, dtype, trust_remote_code) for subject in chosen]
    for subject, text in zip(chosen, texts, strict=True):
        axes.refuse_unfit(subject.label, text.config)
    for subject, text in zip(chosen, texts, strict=True):
        bos_tokens = Bos.of(text.tokenizer, text.config, bos)
        notes += text.notes
        for settings in axes.of_models():
            routed = with_top_k(text, settings["top_k"]) if "top_k" in settings else text
            model = _Model(subject, routed, bos_tokens, journal, batch_tokens, progress, settings)
            for one in selected:
                result = model.result(one)
                result.settings |= {"shots": one.shots} if axes.of_prompts else {}
                scaling_run.results.append(result)
            if model.known:
                who = ", ".join([subject.label, *(f"{axis} {value}" for axis, value in settings.items())])
                notes.append(f"{who}: {model.known} of {model.asked} answers were on record")
            if routed is not text:
                routed.release()
            if out is not None:
                scaling_run.write(Path(out))
        text.release()
    for result in scaling_run.results:
        settings_told = [f"{axis} {value}" for axis, value in result.settings.items()]
        where = ", ".join([result.subject.label, result.selected.label, *settings_told])
        count = len(result.selected.examples)
        reasons = Counter(reason for _, reason in result.refused)
        notes += [f"{where}: {number} of {count} examples refused: {reason}" for reason, number in reasons.items()]
        if result.merged:
            notes.append(f"{where}: in {result.merged} examples a class merges with the prompt's last token")
    return scaling_run


@dataclass
class _Model:
    """A subject with its tokenizer; its weights are loaded when an answer is not on record."""

    subject: Subject
    text: TextModel
    bos: Bos
    journal: Journal
    batch_tokens: int
    progress: Progress | None
    settings: dict[str, int]
    """Where the model is on the axes within it that change it."""
    known: int = 0
    """Answers that were on record before this run."""
    asked: int = 0
    """All of them."""

    def __post_init__(self) -> None:
        self.facts = {**self.text.facts, "bos": self.bos.policy, "bos_tokens": list(self.bos.tokens)}
        if "experts" in self.settings:
            self.facts["experts"] = self.settings["experts"]
        self.records = self.journal.of(self.facts, path=self.subject.model.given)

    def result(self, selected: Selected) -> TaskResult:
        """Answers for all examples, from the records or computed now."""
        asked: dict[str, Question] = {}
        keys = []
        for example in selected.examples:
            prompts = [example.prompt] if example.other_prompt is None else [example.prompt, example.other_prompt]
            questions = [Question(prompt, example.options) for prompt in prompts]
            keys.append([key_of({"prompt": one.prompt, "options": one.options}) for one in questions])
            asked |= zip(keys[-1], questions, strict=True)
        self.known += self.records.num_earlier(asked)
        self.asked += len(asked)
        for part, known in self.records.missing(asked, self.batch_tokens):
            on_record = {part[place] for place in known}
            self._compute({key: asked[key] for key in part}, on_record, f"{self.subject.label}: {selected.label}")
        scored, refused = [], []
        for number, (example, own) in enumerate(zip(selected.examples, keys, strict=True)):
            answers = [self.records[key] for key in own]
            reason = next((why for answer in answers if (why := answer.get("refused"))), None)
            if reason is not None:
                refused.append((number, reason))
            else:
                numbers = score(selected.task.metric, example, *(answer["logprobs"] for answer in answers))
                scored.append((number, example, numbers, answers[0]))
        examples, scores = [one[1] for one in scored], [one[2] for one in scored]
        return TaskResult(
            subject=self.subject,
            selected=selected,
            summary=summarise(selected.task.metric, examples, scores) if scored else None,
            scored=scored,
            refused=refused,
            merged=sum(answer.get("merged", False) for *_, answer in scored),
            facts=self.facts,
            settings=dict(self.settings),
            seconds=sum(self.records[key].get("seconds", 0.0) for key in asked),
        )

    def _compute(self, asked: dict[str, Question], known: set[str], step: str) -> None:
        """Put the answers that are not known on record, each as soon as it is there."""
        from branchmix.likelihood.forward import max_positions
        from branchmix.scaling.scoring.passes import score_options

        encoded = encode_questions(self.text.tokenizer, list(asked.values()), self.bos, max_positions(self.text.config))
        tokens = dict(zip(asked, encoded, strict=True))
        for key, question in tokens.items():
            if question.refused is not None and key not in known:
                self._keep(key, question.merged, refused=question.refused)
        # Prompts that begin alike stay together, so that what they share is computed once.
        left = sorted((key for key in asked if tokens[key].refused is None), key=lambda key: tokens[key].context)
        done, total = 0, len(set(left) - known)
        if not total:
            return
        model = self.text.model()
        for start in range(0, len(left), _AT_ONCE):
            part = left[start : start + _AT_ONCE]
            on_record = {place for place, key in enumerate(part) if key in known}
            asked_now = [tokens[key] for key in part]
            last = time.perf_counter()
            try:
                for kept, places in by_kept_experts(model, asked_now, self.settings.get("experts")):
                    known_here = {number for number, place in enumerate(places) if place in on_record}
                    together = [asked_now[place] for place in places]
                    scores = score_options(kept, together, batch_tokens=self.batch_tokens, known=known_here)
                    for number, logprobs in scores:
                        now, key = time.perf_counter(), part[places[number]]
                        question, seconds = tokens[key], round(now - last, 6)
                        lengths = [len(option) for option in question.options]
                        self._keep(key, question.merged, logprobs=logprobs, tokens=lengths, seconds=seconds)
                        last, done = now, done + 1
                        if self.progress is not None:
                            self.progress(step, done, total)
            except CheckpointError as error:
                raise CheckpointError(f"{self.subject.model.given}: {error}") from error

    def _keep(self, key: str, merged: bool, **answer: Any) -> None:
        """Put an answer on record: for each option its ``logprobs`` (summed, in nats) and number of ``tokens``, and its
        share of the ``seconds`` of the run; or why it was ``refused``."""
        self.records.add(key, **answer, **({"merged": True} if merged else {}))

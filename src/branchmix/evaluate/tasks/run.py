"""Models on tasks: lm-eval's own evaluation over answers that are on record, its numbers in our report."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.models.utils import DEFAULT_MAX_LENGTH

from branchmix.checkpoint.folder import writing
from branchmix.checkpoint.text import replaced_note
from branchmix.evaluate.candidate import Candidate
from branchmix.evaluate.perplexity import Progress
from branchmix.evaluate.report import Measured, SuiteScore, TaskScore
from branchmix.evaluate.tasks.answers import Answers, RecordedModel
from branchmix.evaluate.tasks.loading import Loaded, load, seeded
from branchmix.evaluate.tasks.options import TaskOptions
from branchmix.evaluate.tasks.sources import quiet, sources
from branchmix.evaluate.tasks.suites import EVERYTHING, chosen_suites
from branchmix.likelihood.forward import max_positions

EXAMPLES = "examples"
"""Folder of every example's prompt, answer and metrics, below that of the results."""

BOOTSTRAP = 1000
"""Draws for standard errors that have no formula: within 2 %. lm-eval draws 100,000, which takes minutes."""


@dataclass
class Found:
    """What a model makes of all tasks."""

    tasks: dict[str, TaskScore]
    suites: dict[str, SuiteScore] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Tasks:
    """All tasks with their data, ready for any number of models."""

    def __init__(self, options: TaskOptions, loaded: Loaded, folder: Path | None, limit: int | None):
        self._options, self._loaded, self._folder, self._limit = options, loaded, folder, limit
        self._answers = Answers(folder)
        self.notes = loaded.notes

    @classmethod
    @contextmanager
    def open(
        cls, options: TaskOptions, folder: Path | None, *, limit: int | None, progress: Progress | None
    ) -> Iterator[Tasks]:
        """Loads them; data sets, metrics and leave to run code are as ``options`` say until the block ends.

        Raises:
            RecipeError, DataError: see ``load``.
        """
        with quiet(), sources(options.task_data, allow_code_execution=options.allow_code_execution) as failed:
            with seeded():
                loaded = load(options, failed, limit=limit, progress=progress)
            yield cls(options, loaded, folder, limit)

    def evaluate(
        self, candidate: Candidate, *, max_length: int | None, batch_tokens: int, progress: Progress | None
    ) -> Found:
        """A model on all tasks.

        Raises:
            RecipeError: its window is too short for a task.
            CheckpointError: it cannot be loaded, or computes no numbers.
        """
        model = RecordedModel(
            candidate,
            self._answers,
            max_length=max_length or max_positions(candidate.config) or DEFAULT_MAX_LENGTH,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        with seeded():
            results = lm_evaluate(
                lm=model,
                task_dict={"tasks": self._loaded.tasks, "groups": self._loaded.groups},
                limit=self._limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=self._folder is not None,
                confirm_run_unsafe_code=self._options.allow_code_execution,
            )
        found = Found(_scores(results))
        found.suites = _suites(self._options.names, found.tasks)
        if model.known:
            found.notes.append(f"{candidate.given}: {model.known} of {model.asked} requests were on record")
        if model.shortened:
            found.notes.append(
                f"{candidate.given}: {model.shortened} requests were longer than the window and lost their beginning"
            )
        if model.merged:
            found.notes.append(
                f"{candidate.given}: in {model.merged} requests the answer merges with the prompt's last token: it is "
                "scored by what it has beyond as many tokens as the prompt has, as in lm-eval"
            )
        if model.replaced:
            found.notes.append(f"{candidate.given}: {replaced_note(model.replaced, 'requests')}")
        if self._folder is not None:
            folder = self._folder / EXAMPLES / f"{candidate.folder.name}-{model.name}"
            for name, samples in results["samples"].items():
                _write_lines(folder / f"{name.replace('/', '_')}.jsonl", samples)
        return found


def _scores(results: dict[str, Any]) -> dict[str, TaskScore]:
    """lm-eval's results, task by task, each group with an average of its own before the first of its tasks."""
    scores = {}
    members = results["group_subtasks"]
    order: dict[str, None] = {}

    def place(name: str) -> None:
        for group, children in members.items():
            if name in children:
                place(group)
        order.setdefault(name)

    for name in results["results"]:
        if name not in members:
            place(name)
    everything = {**results["results"], **results.get("groups", {})}
    for name in order:
        found = everything.get(name, {})
        metrics = {}
        for key, value in found.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = found.get(f"{metric}_stderr,{filtered}")
            known = isinstance(stderr, (int, float)) and math.isfinite(stderr)
            metrics[metric if filtered == "none" else key] = Measured(float(value), float(stderr) if known else None)
        if not metrics:  # a group without an average
            continue
        below = _leaves(name, members)
        shots = {results["n-shot"][leaf] for leaf in below}
        scores[name] = TaskScore(
            metrics,
            {metric: bool(up) for leaf in below for metric, up in results["higher_is_better"][leaf].items()},
            shots.pop() if len(shots) == 1 else None,
            int(found.get("sample_len", 0)),
            str(results["versions"].get(name, "")),
            tuple(results["group_subtasks"].get(name, ())),
        )
    return scores


def _leaves(name: str, members: dict[str, list[str]]) -> list[str]:
    """The tasks of a group, or the task itself."""
    if name not in members:
        return [name]
    return [leaf for child in members[name] for leaf in _leaves(child, members)]


def _suites(names: tuple[str, ...], tasks: dict[str, TaskScore]) -> dict[str, SuiteScore]:
    """The paper's columns."""
    found = {}
    for name, suite in chosen_suites(names).items():
        members = {member.task: member.metric for member in suite.members}
        found[name] = SuiteScore(
            suite.title, _mean([tasks[task].metrics[metric] for task, metric in members.items()]), members
        )
    if EVERYTHING in names:
        found[EVERYTHING] = SuiteScore("Avg", _mean([suite.score for suite in found.values()]), {})
    return found


def _mean(parts: list[Measured]) -> Measured:
    """Plain mean; its parts are independent."""
    errors = [part.stderr for part in parts]
    known = [error for error in errors if error is not None]
    stderr = math.sqrt(sum(error**2 for error in known)) / len(parts) if len(known) == len(parts) else None
    return Measured(sum(part.value for part in parts) / len(parts), stderr)


def _write_lines(file: Path, samples: list[dict[str, Any]]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as lines:
            for sample in samples:
                lines.write(json.dumps(sample, default=_plain) + "\n")
        temporary.replace(file)


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays as Python's, anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)

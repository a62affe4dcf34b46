"""Models on tasks: lm-eval's own evaluation over answers that are on record, its numbers in our report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.models.utils import DEFAULT_MAX_LENGTH

from branchmix.checkpoint.folder import write_text
from branchmix.checkpoint.text import replaced_note
from branchmix.evaluate.scores import Measured, ModelReport, SuiteScore, TaskScore
from branchmix.evaluate.tasks.answers import FILE, RecordedModel
from branchmix.evaluate.tasks.compare import scores_of_questions
from branchmix.evaluate.tasks.loading import load, quiet, seeded, sources
from branchmix.evaluate.tasks.options import EVERYTHING, TaskOptions
from branchmix.likelihood.forward import max_positions
from branchmix.likelihood.models import Progress, TextModel
from branchmix.likelihood.records import Journal

EXAMPLES = "examples"
"""Folder of every example's prompt, answer and metrics, below that of the results."""
BOOTSTRAP = 1000
"""Draws for standard errors that have no formula: within 2 %. lm-eval draws 100,000, which takes minutes."""


@dataclass(frozen=True)
class TaskEvaluation:
    """All tasks with their data, ready for any number of models."""

    options: TaskOptions
    tasks: dict[str, dict[str, Any]]
    notes: list[str]
    folder: Path | None
    limit: int | None
    answers: Journal
    keep_questions: bool
    """Whether reports get the scores of single questions."""

    @classmethod
    @contextmanager
    def open(
        cls,
        options: TaskOptions,
        folder: Path | None,
        *,
        limit: int | None,
        progress: Progress | None,
        keep_questions: bool = False,
    ) -> Iterator[TaskEvaluation]:
        """Loads them; data sets, metrics and leave to run code are as ``options`` say until the block ends.

        Errors are those of ``load``.
        """
        with quiet(), sources(options.task_data, allow_code_execution=options.allow_code_execution) as failed:
            with seeded():
                tasks, notes = load(options, failed, limit=limit, progress=progress)
            yield cls(options, tasks, notes, folder, limit, Journal(folder, FILE, "request"), keep_questions)

    def evaluate(
        self, candidate: TextModel, report: ModelReport, *, max_length: int | None, **options: Any
    ) -> list[str]:
        """Put what a model makes of all tasks into its report; returns notes. Errors are those of its requests.

        ``options`` are those of ``RecordedModel``.
        """
        length = max_length or max_positions(candidate.config) or DEFAULT_MAX_LENGTH
        model = RecordedModel(candidate, self.answers, max_length=length, **options)
        with seeded():
            results = lm_evaluate(
                lm=model,
                task_dict=self.tasks,
                limit=self.limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=self.folder is not None or self.keep_questions,
                confirm_run_unsafe_code=self.options.allow_code_execution,
            )
        if self.folder is not None:
            folder = self.folder / EXAMPLES / f"{candidate.folder.name}-{model.name}"
            for name, samples in results["samples"].items():
                lines = "".join(json.dumps(sample, default=_plain) + "\n" for sample in samples)
                write_text(folder / f"{name.replace('/', '_')}.jsonl", lines)
        if self.keep_questions:
            report.questions = {name: scores_of_questions(of) for name, of in results["samples"].items()}
        report.tasks = _scores(results)
        report.suites = _suites(self.options, report.tasks)
        return [f"{candidate.given}: {note}" for note in _notes(model)]


def _notes(model: RecordedModel) -> Iterator[str]:
    if model.known:
        yield f"{model.known} of {model.asked} requests were on record"
    if model.shortened:
        yield f"{model.shortened} requests were longer than the window and lost their beginning"
    if model.merged:
        yield (
            f"in {model.merged} requests the answer merges with the prompt's last token: it is scored by what it has "
            "beyond as many tokens as the prompt has, as in lm-eval"
        )
    if model.replaced:
        yield replaced_note(model.replaced, "requests")


def _scores(results: dict[str, Any]) -> dict[str, TaskScore]:
    """lm-eval's results, task by task, each group with an average of its own before the first of its tasks."""
    members: dict[str, list[str]] = results["group_subtasks"]
    order: dict[str, None] = {}

    def place(name: str) -> None:
        for group, children in members.items():
            if name in children:
                place(group)
        order.setdefault(name)

    def tasks_of(name: str) -> list[str]:
        """The tasks of a group, or the task itself."""
        return [task for child in members[name] for task in tasks_of(child)] if name in members else [name]

    for name in results["results"]:
        if name not in members:
            place(name)
    everything = {**results["results"], **results.get("groups", {})}
    scores = {}
    for name in order:
        metrics = _metrics(everything.get(name, {}))
        if not metrics:  # a group without an average
            continue
        tasks = tasks_of(name)
        shots = {results["n-shot"][task] for task in tasks}
        scores[name] = TaskScore(
            metrics,
            {metric: bool(up) for task in tasks for metric, up in results["higher_is_better"][task].items()},
            shots.pop() if len(shots) == 1 else None,
            int(everything[name].get("sample_len", 0)),
            str(results["versions"].get(name, "")),
            tuple(members.get(name, ())),
        )
    return scores


def _metrics(values: dict[str, Any]) -> dict[str, Measured]:
    """A task's metrics by name and filter, with their standard errors."""
    metrics = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = values.get(f"{metric}_stderr,{filtered}")
        error = float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None
        metrics[metric if filtered == "none" else key] = Measured(float(value), error)
    return metrics


def _suites(options: TaskOptions, tasks: dict[str, TaskScore]) -> dict[str, SuiteScore]:
    """The paper's columns."""
    suites = {}
    for name, suite in options.suites.items():
        members = {member["task"]: member["metric"] for member in suite["members"]}
        mean = _mean([tasks[task].metrics[metric] for task, metric in members.items()])
        suites[name] = SuiteScore(suite["title"], mean, members)
    if EVERYTHING in options.names:
        suites[EVERYTHING] = SuiteScore("Avg", _mean([suite.score for suite in suites.values()]), {})
    return suites


def _mean(parts: list[Measured]) -> Measured:
    """Plain mean; its parts are independent."""
    known = [part.stderr for part in parts if part.stderr is not None]
    stderr = math.sqrt(sum(error**2 for error in known)) / len(parts) if len(known) == len(parts) else None
    return Measured(sum(part.value for part in parts) / len(parts), stderr)


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays as Python's, anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)

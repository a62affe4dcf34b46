"""The tables that ``branchmix eval`` prints: domains, tasks, and suites in the form of the paper's Table 3."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import typer

from branchmix.pages.numbers import human_count
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.evaluate.scores import EvalReport, ModelReport, TaskScore

BEST = "* "
"""Begins the best cell among several models."""


def print_report(report: EvalReport) -> None:
    """A table for domains, one for tasks and one for suites, the best of what is compared marked."""
    tables = [
        (_domains, [model for model in report.models if model.domains is not None]),
        (_tasks, [model for model in report.models if model.tasks is not None]),
        (_suites, [model for model in report.models if model.suites]),
    ]
    for number, (table, models) in enumerate((table, models) for table, models in tables if models):
        if number:
            typer.echo("")
        table(models).show()
    if len(report.models) > 1:
        typer.echo(f"{BEST}the best")


def _domains(models: list[ModelReport]) -> Table:
    """Models in rows, domains in columns."""
    columns = models[0].domains or {}
    best = {name: min((model.domains or {})[name].bits_per_byte for model in models) for name in columns}
    rows = []
    for model in models:
        rows.append([model.model])
        for name, score in (model.domains or {}).items():
            mark = _mark(models, score.bits_per_byte == best[name])
            rows[-1].append(f"{mark}{_number(score.bits_per_byte, score.stderr)} ({score.perplexity:.2f})")
    head = ["model", *(f"{name}, {human_count(score.bytes)}B" for name, score in columns.items())]
    note = f"window {models[0].max_length} tokens, stride {models[0].stride}"
    return _table(head, rows, "bits per byte ± standard error (perplexity)", note)


def _tasks(models: list[ModelReport]) -> Table:
    """Tasks in rows, models in columns; a group with an average replaces its tasks."""
    first = models[0].tasks or {}
    within = _below(first)
    rows = []
    for name, task in first.items():
        for metric in task.metrics if name not in within else ():
            scores = [(model.tasks or {})[name].metrics[metric] for model in models]
            sign = -1 if task.higher_is_better.get(metric.split(",")[0]) is False else 1
            best = max(sign * score.value for score in scores)
            cells = [_mark(models, sign * each.value == best) + _number(each.value, each.stderr) for each in scores]
            shots = "" if task.num_fewshot is None else str(task.num_fewshot)
            rows.append([name, str(task.examples), shots, metric.replace(",", ", "), *cells])
    head = ["task", "examples", "shots", "metric", *(model.model for model in models)]
    note = f"{len(within)} tasks of these groups: see --json" if within else ""
    return _table(head, rows, "downstream tasks, ± standard error", note, left=("metric",))


def _below(tasks: dict[str, TaskScore]) -> set[str]:
    """Tasks and groups that are part of a group with an average of its own."""
    below: set[str] = set()
    todo = [name for task in tasks.values() for name in task.subtasks]
    while todo:
        name = todo.pop()
        if name in tasks and name not in below:
            below.add(name)
            todo += tasks[name].subtasks
    return below


def _suites(models: list[ModelReport]) -> Table:
    """The form of the paper's Table 3: models in rows, suites in columns, percent."""
    columns = models[0].suites
    best = {name: max(model.suites[name].score.value for model in models) for name in columns}
    rows = []
    for model in models:
        rows.append([model.model])
        for name, suite in model.suites.items():
            mark, stderr = _mark(models, suite.score.value == best[name]), suite.score.stderr
            percent = _number(100 * suite.score.value, None if stderr is None else 100 * stderr, digits=2)
            rows[-1].append(mark + percent)
    head = ["model", *(suite.title for suite in columns.values())]
    return _table(head, rows, "suites of the BAM paper, % ± standard error")


def _table(head: list[str], rows: list[list[str]], title: str, note: str = "", left: Collection[str] = ()) -> Table:
    best = {(n, column) for n, row in enumerate(rows) for column, cell in enumerate(row) if cell.startswith(BEST)}
    return Table(head, rows, title=title, note=note, bold=best, left=left)


def _mark(models: list[ModelReport], is_best: bool) -> str:
    return BEST if is_best and len(models) > 1 else ""


def _number(value: float, stderr: float | None, digits: int = 4) -> str:
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")

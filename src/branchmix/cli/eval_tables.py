"""The tables that ``branchmix eval`` prints: domains, tasks, and suites in the form of the paper's Table 3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from branchmix.evaluate.scores import EvalReport, Measured, ModelReport, TaskScore


def print_report(report: EvalReport) -> None:
    """A table for domains, one for tasks and one for suites, the best of what is compared marked."""
    from branchmix.cli.console import result_console

    console = result_console()
    tables = [
        (_domains, [model for model in report.models if model.domains is not None]),
        (_tasks, [model for model in report.models if model.tasks is not None]),
        (_suites, [model for model in report.models if model.suites]),
    ]
    shown = [(table, models) for table, models in tables if models]
    for number, (table, models) in enumerate(shown):
        if number:
            console.print()
        for line in table(models):
            console.print(line, highlight=False, soft_wrap=isinstance(line, str))
    if len(report.models) > 1:
        console.print("* the best", highlight=False)


def _domains(models: list[ModelReport]) -> list[Any]:
    """Models in rows, domains in columns."""
    from branchmix.cli.console import human_count

    columns = models[0].domains or {}
    table = _table("bits per byte ± standard error (perplexity)")
    for name, score in columns.items():
        table.add_column(f"{name}, {human_count(score.bytes)}B", justify="right", no_wrap=True)
    best = {name: min((model.domains or {})[name].bits_per_byte for model in models) for name in columns}
    for model in models:
        cells = []
        for name, found in (model.domains or {}).items():
            error = "" if found.stderr is None else f" ± {found.stderr:.4f}"
            words = f"{found.bits_per_byte:.4f}{error} ({found.perplexity:.2f})"
            cells.append(_cell(words, len(models) > 1 and found.bits_per_byte == best[name]))
        table.add_row(model.model, *cells)
    return [table, f"window {models[0].max_length} tokens, stride {models[0].stride}"]


def _tasks(models: list[ModelReport]) -> list[Any]:
    """Tasks in rows, models in columns; a group with an average stands for its tasks."""
    first = models[0].tasks or {}
    within = _below(first)
    table = _table("downstream tasks, ± standard error", "task")
    for name in ("examples", "shots", "metric"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for model in models:
        table.add_column(model.model, justify="right", overflow="fold")
    for name, task in first.items():
        if name in within:
            continue
        for metric in task.metrics:
            found = [(model.tasks or {})[name].metrics[metric] for model in models]
            sign = -1 if task.higher_is_better.get(metric.split(",")[0]) is False else 1
            best = max(sign * each.value for each in found)
            cells = [_cell(_number(each), len(models) > 1 and sign * each.value == best) for each in found]
            shots = "" if task.num_fewshot is None else str(task.num_fewshot)
            table.add_row(name, str(task.examples), shots, metric.replace(",", ", "), *cells)
    lines: list[Any] = [table]
    if within:
        lines.append(f"{len(within)} tasks of these groups: see --json")
    return lines


def _below(tasks: dict[str, TaskScore]) -> set[str]:
    """Tasks and groups that a group with an average of its own stands for."""
    found: set[str] = set()
    todo = [name for task in tasks.values() for name in task.subtasks]
    while todo:
        name = todo.pop()
        if name in tasks and name not in found:
            found.add(name)
            todo += tasks[name].subtasks
    return found


def _suites(models: list[ModelReport]) -> list[Any]:
    """The form of the paper's Table 3: models in rows, suites in columns, percent."""
    columns = models[0].suites
    table = _table("suites of the BAM paper, % ± standard error")
    for suite in columns.values():
        table.add_column(suite.title, justify="right", no_wrap=True)
    best = {name: max(model.suites[name].score.value for model in models) for name in columns}
    for model in models:
        cells = []
        for name, suite in model.suites.items():
            error = "" if suite.score.stderr is None else f" ± {100 * suite.score.stderr:.2f}"
            is_best = len(models) > 1 and suite.score.value == best[name]
            cells.append(_cell(f"{100 * suite.score.value:.2f}{error}", is_best))
        table.add_row(model.model, *cells)
    return [table]


def _table(title: str, first: str = "model") -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    return table


def _number(measured: Measured) -> str:
    return f"{measured.value:.4f}" + ("" if measured.stderr is None else f" ± {measured.stderr:.4f}")


def _cell(words: str, is_best: bool) -> Text:
    from rich.text import Text

    return Text(f"* {words}" if is_best else words, style="bold" if is_best else "")

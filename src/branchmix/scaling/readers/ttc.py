"""Results of the code of "Inverse Scaling in Test-Time Compute" (arXiv 2507.14417): ``raw/MODEL/TASK.jsonl``.

A line is one answer: ``instance_id``, ``reasoning_budget``, ``metric`` and ``correct``, ``squared_error`` or
``relative_error``; repeated runs of a question are called ``ID_run2``, and become seeds. The axis is the budget that
was assigned. Lines with an ``error`` are left out; of several answers to one question, the last counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from branchmix.checkpoint.json_text import parse_json
from branchmix.data.sources import json_lines
from branchmix.errors import DataError
from branchmix.scaling.examples import read_text
from branchmix.scaling.readers.runs import Run, files_below, number, numbers_in, table_of
from branchmix.scaling.trends.table import ResultsTable, Scores

_FIELDS = {"accuracy": "correct", "mse": "squared_error", "relative_error": "relative_error"}
_ERRORS = ("mse", "relative_error")


def read_test_time_compute(path: Path) -> ResultsTable:
    """All answers below a folder of results, or one file ``MODEL/TASK.jsonl``.

    Raises:
        DataError: there are none, or a line is not a record of that code.
    """
    notes: list[str] = []
    runs = [run for file in files_below(path, "*.jsonl") for run in _runs(file, notes)]
    if not runs:
        raise DataError(f"{path}: has no answers in raw/MODEL/TASK.jsonl: give the folder of the results")
    return table_of(path, runs, notes)


def _runs(file: Path, notes: list[str]) -> Iterator[Run]:
    groups: dict[tuple[Any, ...], Scores] = {}
    failed: Counter[str] = Counter()
    for where, line in json_lines(file, (read_text(file) or "").split("\n"), parse_json):
        if not isinstance(line, dict) or not {"instance_id", "reasoning_budget", "model", "task_id"} <= line.keys():
            raise DataError(f"{where}: has no instance_id, reasoning_budget, model or task_id: is it of this harness?")
        metric = str(line.get("metric") or "accuracy")
        value = number(line.get(_FIELDS.get(metric, metric)))
        budget = numbers_in({"budget": line["reasoning_budget"]}).get("budget")
        if line.get("error") is not None or value is None or budget is None:
            failed["failed" if line.get("error") is not None else "have no score"] += 1
            continue
        question, run = _question(str(line["instance_id"]))
        shots = numbers_in({"shots": line.get("icl_num_examples")}).get("shots", 0.0)
        group = (str(line["task_id"]), str(line["model"]), metric, budget, shots, run)
        groups.setdefault(group, {})[question] = (value, question)
    notes += [f"{file}: {count} answers {why}: left out" for why, count in failed.items()]
    for (task, model, metric, budget, shots, run), scores in groups.items():
        yield Run(
            task=task,
            model=model,
            metric=metric,
            source=file,
            axes={"reasoning_budget": budget, "shots": shots},
            scores=scores,
            seed=run,
            lower_is_better=metric in _ERRORS,
        )


def _question(instance: str) -> tuple[str, str]:
    """A question and the number of its run."""
    found = re.fullmatch(r"(.*)_run(\d+)", instance)
    return (found[1], found[2]) if found else (instance, "1")

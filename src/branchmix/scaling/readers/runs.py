"""What readers have in common: a run's results on a task, with the scores of its questions, become a table's rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from branchmix.checkpoint.json_text import parse_json
from branchmix.errors import DataError
from branchmix.scaling.examples import read_text
from branchmix.scaling.metrics import mean
from branchmix.scaling.trends.table import AXES, Measurement, ResultsTable, Scores, axes_within
from branchmix.settings import parse


@dataclass(frozen=True)
class Run:
    """A metric of a model on a task, in one setting."""

    task: str
    model: str
    metric: str
    source: Path
    """The file that it is from."""
    axes: Mapping[str, float] = field(default_factory=dict)
    scores: Scores | None = None
    """Scores of single questions; if given, value and standard error are computed from them."""
    value: float | None = None
    stderr: float | None = None
    n: int | None = None
    seed: str = ""
    created: str = ""
    """When, as text that sorts: of two runs that are alike, the later one counts."""
    lower_is_better: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        return self.task, self.model, self.metric.lower(), self.seed, tuple(sorted(self.axes.items()))


def table_of(path: Path, runs: Iterable[Run], notes: Sequence[str] = ()) -> ResultsTable:
    """The table of all runs, paired by question where there are scores.

    Raises:
        DataError: there is no run, or a value cannot be meant.
    """
    told = list(notes)
    found = _told_apart(list(runs))
    chosen: dict[tuple[Any, ...], Run] = {}
    for run in found:
        other = chosen.setdefault(run.key, run)
        if other is not run:
            earlier, chosen[run.key] = sorted((other, run), key=lambda one: one.created)
            told.append(f"{earlier.source}: {run.model} on {run.task} was run again later: the later run counts")
    rows: list[Measurement] = []
    scores: dict[tuple[int, str], Scores] = {}
    for line, run in enumerate(chosen.values(), start=1):
        given: dict[str, Any] = {"value": run.value, "stderr": run.stderr, "n": run.n}
        if run.scores is not None:
            own = mean([value for value, _ in run.scores.values()])
            given = {"value": own.value, "stderr": own.stderr, "n": own.n}
            scores[line, run.metric.lower()] = run.scores
        if given["value"] is None or (given["stderr"] is None and (given["n"] or 0) < 2):  # one answer has no error
            told.append(f"{run.source}: {run.metric} of {run.task} has no standard error: left out")
            continue
        known = {"line": line, "source": str(run.source), "task": run.task, "model": run.model, "metric": run.metric}
        given = {name: value for name, value in given.items() if value is not None}
        rows.append(parse(Measurement, {**known, "seed": run.seed, "axes": dict(run.axes), **given}, str(run.source)))
    if not rows:
        raise DataError(f"{path}: there are no results: {'; '.join(told) or 'no run is complete'}")
    names = {name for row in rows for name in row.axes}
    axes = [*(axis for axis in AXES if axis in names), *sorted(names - {*AXES})]
    lower = tuple(dict.fromkeys(run.metric.lower() for run in chosen.values() if run.lower_is_better))
    within = axes_within(rows, axes)
    return ResultsTable(
        path,
        rows,
        axes,
        (lambda row: scores.get((row.line, row.metric))) if scores else None,
        within=within,
        notes=tuple(dict.fromkeys(told)),
        lower_is_better=lower,
    )


def _told_apart(runs: list[Run]) -> list[Run]:
    """Runs whose seeds are all the same have none, and axes with a single place for all are still axes."""
    has_seeds = len({run.seed for run in runs}) > 1
    return runs if has_seeds else [replace(run, seed="") for run in runs]


def mapping(value: Any) -> dict[str, Any]:
    """A JSON object; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float | None:
    """A finite number, or right and wrong as 1 and 0; None for anything else."""
    try:
        found = float(value) if isinstance(value, (bool, int, float)) else math.nan
    except OverflowError:
        found = math.nan
    return found if math.isfinite(found) else None


def numbers_in(values: Any) -> dict[str, float]:
    """Those entries of a JSON object that can be places on an axis: numbers of 0 or more."""
    found = {str(name).lower(): number(v) for name, v in mapping(values).items() if not isinstance(v, bool)}
    return {name: place for name, place in found.items() if place is not None and place >= 0}


def json_of(file: Path) -> Any:
    """What a JSON file holds; DataError if it holds none."""
    text = read_text(file)
    try:
        return parse_json((text or "").encode("utf-8", "replace"))
    except (ValueError, json.JSONDecodeError) as error:
        raise DataError(f"{file}: is not JSON ({error})") from None


def files_below(path: Path, *patterns: str) -> Iterator[Path]:
    """The path itself if it is a file, else all files below it that fit a pattern, in alphabetical order.

    Raises:
        DataError: there is no such path.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    if path.is_file():
        yield path
        return
    yield from sorted({file for pattern in patterns for file in path.rglob(pattern) if file.is_file()})

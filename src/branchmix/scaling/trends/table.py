"""Results as a csv table: one row for each task, model and metric. Whatever harness made it, it can be judged.

    task,model,params,metric,value,stderr,n
    memo-trap,pythia-70m,70e6,accuracy,0.8729,0.0109,936

Columns: `task, model, metric, value`, and `stderr` or `n`. Optional: `family` (curves are drawn by family), `seed`
(several runs of one size), `data` (official or fresh), `cause`, `description` (what a task of one's own tests), and
what `FLAG_COLUMNS` lists. Every further column of numbers is an axis. Where it differs between rows of one model, such
as the number of examples in the prompt, it is an axis within models, and may be 0.

Scores of single examples lie beside the table, for a bootstrap in which all models meet the same questions:
`examples/<model>/<task>.jsonl`, a line for each example with `key` (the same for all models), `template` (examples of
one template are drawn together), `correct` (0 or 1) and further metrics by name, such as `loss`. Fresh data lies in
`<task>.fresh.jsonl`, a run with a seed in `<model>/seed-<seed>/`, and what differs within a model in a folder for each
of those axes, in alphabetical order: `<model>/seed-<seed>/shots-4/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.folder import is_entry
from branchmix.checkpoint.json_text import parse_json
from branchmix.data.sources import json_lines
from branchmix.errors import DataError
from branchmix.scaling.examples import csv_lines, read_text
from branchmix.settings import Settings, parse

REQUIRED = ("task", "model", "metric", "value")
FLAG_COLUMNS = ("constant_share", "constant_baselines", "coverage", "chance")
"""For accuracy: the share of the most frequent answer; what each constant answer would score, as `0.45|0.55`; the
probability mass on the classes; what guessing scores. Rows of other metrics may have `chance` as well."""
AXES = ("flops", "params", "active_params", "tokens")
"""Axes known by name, the default first."""
Data = Literal["official", "fresh"]
DATA: tuple[Data, ...] = get_args(Data)
FILE = "results.csv"
COUNTED = ("accuracy", "acc", "acc_norm", "exact_match")
"""Shares of examples, each right or wrong; the last three are lm-eval's names. Their error follows from ``n``."""
SHARES = (*COUNTED, "f1", "mc1", "mc2")
"""Metrics between 0 and 1, of which more is better."""
FIELDS = {"accuracy": "correct"}
"""Metrics whose field in the scores of examples has another name."""


def is_any_of(metric: str, words: Sequence[str]) -> bool:
    """Whether a metric has one of these names: alone, after `_`, or with a filter of lm-eval (`acc,none`)."""
    name = metric.partition(",")[0]
    return any(name == word or name.endswith(f"_{word}") for word in words)


def is_share(metric: str) -> bool:
    """Whether values are between 0 and 1."""
    return is_any_of(metric, SHARES)


class Measurement(Settings):
    """A metric of a model on a task."""

    line: int
    source: str = ""
    """The file, if it is not the table's."""
    task: str
    model: str
    metric: Annotated[str, BeforeValidator(str.lower)]
    value: float
    stderr: float | None = Field(default=None, ge=0)
    """None where neither the table nor the number of examples tells it."""
    n: Annotated[int, BeforeValidator(float), Field(gt=0)] | None = None
    family: str = ""
    seed: str = ""
    data: Annotated[Data, BeforeValidator(str.lower)] = "official"
    cause: str = ""
    description: str = ""
    axes: dict[str, float]
    """Only what the row says; no negative number, and 0 only on axes that are not known by name."""
    constant_share: float | None = None
    constant_baselines: Annotated[
        tuple[float, ...], BeforeValidator(lambda text: [word for word in text.split("|") if word.strip()])
    ] = ()
    coverage: float | None = None
    chance: float | None = None

    @model_validator(mode="after")
    def _of_shares(self) -> Measurement:
        """A share is between 0 and 1. One of examples has an error of sqrt(a(1-a)/(n-1)), and never of 0: a share of 0
        or 1 is not known exactly. The floor is the error half an example away from the edge, so that no model gets all
        the weight."""
        value, n = self.value, self.n or 0
        if is_share(self.metric) and not 0 <= value <= 1:
            raise ValueError(f"{self.metric} is {value:g}: write a share of 1, such as 0.53, not percent")
        if not is_any_of(self.metric, COUNTED):
            return self
        if n > 1:
            if self.stderr is None:
                self.stderr = math.sqrt(value * (1 - value) / (n - 1))
            if value in (0, 1):
                inside = (0.5 + value * n) / (n + 1)
                self.stderr = max(self.stderr, math.sqrt(inside * (1 - inside) / (n - 1)))
        if not self.stderr and value in (0, 1):
            if n == 1:
                raise ValueError(
                    f"{self.metric} is {value:g} on one example, which has no standard error: two or more are needed"
                )
            raise ValueError(
                f"{self.metric} is {value:g} with no error: no model is known to be without, so give the number of "
                "examples as n"
            )
        return self


KNOWN = Measurement.model_fields.keys() - {"line", "source", "axes"}
"""Columns that are not axes."""


Scores = dict[str, tuple[float, str]]
"""A metric of one model on single examples: value and template by key."""
ScoresOf = Callable[[Measurement], Scores | None]
"""Finds the scores behind a row; None if there are none."""


@dataclass(frozen=True)
class ResultsTable:
    """All rows of a file, in its order."""

    path: Path
    rows: list[Measurement]
    axes: list[str]
    """Columns that can be an axis: those known by name first."""
    scores: ScoresOf | None = None
    """Finds scores of single examples, if there are any."""
    not_axes: dict[str | None, str] = field(default_factory=dict)
    """Further columns that cannot be an axis, and why not."""
    within: tuple[str, ...] = ()
    """Axes along which one model has several rows: its settings, not its size."""
    notes: tuple[str, ...] = ()
    """What was left out."""
    lower_is_better: tuple[str, ...] = ()
    """Metrics of which the table's source says so."""

    def where(self, row: Measurement) -> str:
        """The place of a row, for messages."""
        return row.source or f"{self.path}, line {row.line}"

    def zero(self, axis: str) -> float:
        """The number whose logarithm stands for 0 on an axis: one step to the left of the smallest positive place."""
        places = sorted({place for row in self.rows if (place := row.axes.get(axis, 0.0)) > 0})
        return places[0] ** 2 / places[1] if len(places) > 1 else (places or [1.0])[0] / 2

    def choose_axis(self, wanted: str | None, notes: list[str]) -> str:
        """The axis asked for, or the training FLOPs, or else what every row has; all rows have a value on it.

        Raises:
            DataError: there is no such column, or it is empty for a model.
        """
        if wanted in self.not_axes:
            raise DataError(f"{self.path}: {self.not_axes[wanted]}, so {wanted!r} cannot be an axis")
        if wanted is not None and wanted not in self.axes:
            there = ", ".join(self.axes) or "none: add a column such as params"
            raise DataError(f"{self.path}: there is no axis {wanted!r}{nearest(wanted, self.axes)}; axes: {there}")
        if not self.axes:
            raise DataError(f"{self.path}: there is no axis: add a column such as params or flops")
        lacking = {axis: next((row for row in self.rows if axis not in row.axes), None) for axis in self.axes}
        first = self.axes[0]
        axis = wanted or next((axis for axis in self.axes if lacking[axis] is None), first)
        varied = next((axis for axis in self.within if lacking[axis] is None), None)
        if wanted is None and varied is not None and len({row.axes.get(axis) for row in self.rows}) == 1:
            notes.append(f"the axis is {varied}: along {axis} there is a single place")
            return varied
        if (row := lacking[axis]) is not None:
            advice = "fill it in" if wanted is None else "fill it in for every model, or choose another --axis"
            raise DataError(f"{self.where(row)}: {row.model} has no {axis}: {advice}")
        if (row := lacking[first]) is not None and wanted is None:
            notes.append(f"the axis is {axis}: {row.model} has no {first} (line {row.line})")
        elif axis != "flops" and wanted is None and axis not in self.within:
            notes.append(f"the axis is {axis}: the table has no training FLOPs (column flops)")
        return axis


def read_table(path: Path) -> ResultsTable:
    """The table of a csv file, or of `results.csv` in a folder that may hold scores of single examples as well.

    Raises:
        DataError, RecipeError: what is wrong, with the number of the line.
    """
    folder = path if path.is_dir() else None
    file = path / FILE if folder else path
    text = read_text(file)
    if text is None:
        what = f"has no {FILE}" if folder else "there is no such file"
        raise DataError(f"{path}: {what}: give a csv table or the folder of a run")
    first = text.lstrip().split("\n", 1)[0]
    lines = csv_lines(file, text, delimiter=max(",\t;", key=first.count))
    header = [name.strip().lower() for name in next(lines, (0, []))[1]]
    _check_header(file, header)
    cells: list[tuple[int, dict[str, str]]] = []
    for number, values in lines:
        if len(values) != len(header):
            raise DataError(f"{file}, line {number}: has {len(values)} fields, the header has {len(header)}")
        named = zip(header, map(str.strip, values), strict=True)
        cells.append((number, {name: value for name, value in named if name and value}))
    axes: list[str] = []
    not_axes: dict[str | None, str] = {}
    for name in sorted(header, key=lambda name: AXES.index(name) if name in AXES else len(AXES)):
        given = [(number, cell[name]) for number, cell in cells if name not in KNOWN and name in cell]
        bad = next((place for place in given if not _is_place(place[1], may_be_zero=name not in AXES)), None)
        if bad is not None:
            what = "not a positive number" if name in AXES else "neither 0 nor a positive number"
            not_axes[name] = f"line {bad[0]} has {bad[1]!r} as {name}, which is {what}"
        elif given:
            axes.append(name)
    if wrong := next((not_axes[name] for name in AXES if name in not_axes), None):
        raise DataError(f"{file}: {wrong}")
    rows = []
    for number, cell in cells:
        known: dict[str, object] = {name: value for name, value in cell.items() if name in KNOWN}
        known["axes"] = {name: float(cell[name]) for name in axes if name in cell}
        rows.append(parse(Measurement, {"line": number, **known}, f"{file}, line {number}"))
    if not rows:
        raise DataError(f"{file}: has a header but no rows: add a row for each task, model and metric")
    seen: dict[tuple[object, ...], int] = {}
    for row in rows:
        key = (row.task, row.model, row.family, row.data, row.metric, row.seed, *sorted(row.axes.items()))
        if seen.setdefault(key, row.line) != row.line:
            raise DataError(
                f"{file}, line {row.line}: {row.metric} of {row.model} on {row.task} is already in line {seen[key]}: "
                "remove one, or distinguish the runs in a column `seed`"
            )
    examples = folder / "examples" if folder and (folder / "examples").is_dir() else None
    within = axes_within(rows, axes)
    scores = partial(read_scores, examples, within=within) if examples is not None else None
    return ResultsTable(file, rows, axes, scores, not_axes, within)


def axes_within(rows: Sequence[Measurement], axes: Sequence[str]) -> tuple[str, ...]:
    """Axes not known by name in which rows differ that are of one model, seed and place on the axes known by name."""
    places: dict[tuple[object, ...], list[Measurement]] = {}
    for row in rows:
        known = (row.axes.get(axis) for axis in AXES)
        places.setdefault((row.task, row.model, row.family, row.data, row.metric, row.seed, *known), []).append(row)
    return tuple(
        axis
        for axis in axes
        if axis not in AXES and any(len({row.axes.get(axis) for row in of}) > 1 for of in places.values())
    )


def settings_of(row: Measurement, within: Sequence[str]) -> dict[str, float]:
    """Where a row is on the axes within models."""
    return {axis: row.axes[axis] for axis in sorted(within) if axis in row.axes}


def settings_folder(settings: Mapping[str, float]) -> str:
    """Folder of examples of a model with these settings, below the model's own: ``shots-4``; empty without any."""
    return "/".join(f"{axis}-{settings[axis]:.15g}" for axis in sorted(settings))


def read_scores(folder: Path, row: Measurement, within: Sequence[str] = ()) -> Scores | None:
    """Scores behind a row of the table; None if there are none. ``within`` are the table's axes within models.

    Raises:
        DataError: a line has no key, a key occurs twice, or a score is not a number.
    """
    name = f"{row.task}.jsonl" if row.data == DATA[0] else f"{row.task}.{row.data}.jsonl"
    settings = settings_folder(settings_of(row, within))
    file = folder / row.model / (f"seed-{row.seed}" if row.seed else "") / settings / name
    parts = (*row.model.split("/"), f"seed-{row.seed}", *filter(None, settings.split("/")), name)
    is_name = all(map(is_entry, parts))  # else nobody's files are called so
    text = read_text(file) if is_name else None
    if text is None:
        return None
    field = FIELDS.get(row.metric, row.metric)
    scores: Scores = {}
    keys = set()
    for where, record in json_lines(file, text.split("\n"), parse_json):
        if not isinstance(record, dict) or "key" not in record:
            raise DataError(f"{where}: there is no key: each line is a JSON object with a key that all models share")
        key = str(record["key"])
        if key in keys:
            raise DataError(f"{where}: the key {key!r} occurs twice")
        keys.add(key)
        if record.get(field) is None:  # refused examples and other metrics' files
            continue
        try:
            value = float(record[field])
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{where}: {field} is {record[field]!r}, which is not a number")
        scores[key] = value, str(record.get("template") or key)
    return scores or None


def _check_header(file: Path, header: list[str]) -> None:
    if not header:
        raise DataError(f"{file}: is empty: the header is {','.join(REQUIRED)},stderr,n and an axis such as params")
    for name in REQUIRED:
        if name not in header:
            hint = nearest(name, [other for other in header if other not in KNOWN]).replace("did you mean", "is it")
            raise DataError(f"{file}: there is no column {name!r}{hint}; columns: {', '.join(header)}")
    if "stderr" not in header and "n" not in header:
        raise DataError(f"{file}: there is neither a column 'stderr' nor 'n': one of them must say how sure values are")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{file}: the column {twice!r} appears twice: rename one")


def _is_place(word: str, *, may_be_zero: bool) -> bool:
    try:
        return (float(word) >= 0 if may_be_zero else float(word) > 0) and float(word) < math.inf
    except ValueError:
        return False

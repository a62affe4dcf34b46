"""Results as a csv table: one row for each task, model and metric. Whatever harness made it, it can be judged.

    task,model,params,metric,value,stderr,n
    memo-trap,pythia-70m,70e6,accuracy,0.8729,0.0109,936

Columns: `task, model, metric, value`, and `stderr` or `n`. Optional: `family` (curves are drawn by family), `seed`
(several runs of one size), `data` (official or fresh), `cause`, `description` (what a task of one's own tests), and
what `FLAG_COLUMNS` lists. Every further column of numbers is an axis.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from branchmix.checkpoint.families import nearest
from branchmix.errors import DataError

REQUIRED = ("task", "model", "metric", "value")
FLAG_COLUMNS = ("constant_share", "constant_baselines", "coverage", "chance")
"""For accuracy: the share of the most frequent answer; what each constant answer would score, as `0.45|0.55`; the
probability mass on the classes; what guessing scores. Rows of other metrics may have `chance` as well."""
_FLAG_NUMBERS = ("constant_share", "coverage", "chance")
KNOWN = (*REQUIRED, "stderr", "n", "family", "seed", "data", "cause", "description", *FLAG_COLUMNS)
AXES = ("flops", "params", "active_params", "tokens")
"""Axes known by name, the default first."""
DATA = ("official", "fresh")
FILE = "results.csv"
COUNTED = ("accuracy", "acc", "acc_norm", "exact_match")
"""Shares of examples, each right or wrong; the last three are lm-eval's names. Their error follows from ``n``."""
SHARES = (*COUNTED, "f1", "mc1", "mc2")
"""Metrics between 0 and 1, of which more is better."""


def is_any_of(metric: str, words: Sequence[str]) -> bool:
    """Whether a metric has one of these names: alone, after `_`, or with a filter of lm-eval (`acc,none`)."""
    name = metric.partition(",")[0]
    return any(name == word or name.endswith(f"_{word}") for word in words)


def is_share(metric: str) -> bool:
    """Whether values are between 0 and 1."""
    return is_any_of(metric, SHARES)


@dataclass(frozen=True)
class Row:
    """A metric of a model on a task."""

    line: int
    task: str
    model: str
    metric: str
    value: float
    stderr: float | None
    """None where neither the table nor the number of examples tells it."""
    n: int | None
    family: str
    seed: str
    data: str
    cause: str
    description: str
    axes: dict[str, float]
    """Only what the row says; all positive."""
    constant_share: float | None = None
    constant_baselines: tuple[float, ...] = ()
    coverage: float | None = None
    chance: float | None = None


@dataclass(frozen=True)
class ResultsTable:
    """All rows of a file, in its order."""

    path: Path
    rows: list[Row]
    axes: list[str]
    """Columns that can be an axis: those known by name first."""
    examples: Path | None = None
    """Where scores of single examples lie, if there are any."""
    not_axes: dict[str | None, str] = field(default_factory=dict)
    """Further columns that cannot be an axis, and why not."""

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
        if (row := lacking[axis]) is not None:
            advice = "fill it in" if wanted is None else "fill it in for every model, or choose another --axis"
            raise DataError(f"{self.path}, line {row.line}: {row.model} has no {axis}: {advice}")
        if (row := lacking[first]) is not None and wanted is None:
            notes.append(f"the axis is {axis}: {row.model} has no {first} (line {row.line})")
        elif axis != "flops" and wanted is None:
            notes.append(f"the axis is {axis}: the table has no training FLOPs (column flops)")
        return axis


def read_table(path: Path) -> ResultsTable:
    """The table of a csv file, or of `results.csv` in a folder that may hold scores of single examples as well.

    Raises:
        DataError: one line that says what is wrong, with its line number.
    """
    folder = path if path.is_dir() else None
    file = path / FILE if folder else path
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        what = f"has no {FILE}" if folder else "there is no such file"
        raise DataError(f"{path}: {what}: give a csv table or the folder of a run") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise DataError(f"{file}: {reason}: give a csv table") from None
    lines = _lines(file, text)
    _, first = next(lines, (0, []))
    header = [name.lower() for name in first]
    _check_header(file, header)
    not_axes: dict[str | None, str] = {}
    cells = [(number, dict(zip(header, values, strict=True))) for number, values in lines]
    axes = [name for name in header if name and name not in KNOWN and _is_axis(name, cells, not_axes)]
    axes.sort(key=lambda name: AXES.index(name) if name in AXES else len(AXES))
    rows = [_row(f"{file}, line {number}", number, cell, axes) for number, cell in cells]
    if not rows:
        raise DataError(f"{file}: has a header but no rows: add a row for each task, model and metric")
    seen: dict[tuple[object, ...], int] = {}
    for row in rows:
        key = (row.task, row.model, row.family, row.data, row.metric, row.seed, *sorted(row.axes.items()))
        if key in seen:
            raise DataError(
                f"{file}, line {row.line}: {row.metric} of {row.model} on {row.task} is already in line {seen[key]}: "
                "remove one, or distinguish the runs in a column `seed`"
            )
        seen[key] = row.line
    examples = folder / "examples" if folder and (folder / "examples").is_dir() else None
    return ResultsTable(file, rows, axes, examples, not_axes)


def _lines(file: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields, the header first; every line has as many fields as the header."""
    first = text.lstrip().split("\n", 1)[0]
    delimiter = max(",\t;", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    width = 0
    try:
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            width = width or len(fields)
            if len(fields) != width:
                raise DataError(f"{file}, line {reader.line_num}: has {len(fields)} fields, the header has {width}")
            yield reader.line_num, [field.strip() for field in fields]
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: not valid csv: {error}") from None


def _check_header(file: Path, header: list[str]) -> None:
    if not header:
        raise DataError(f"{file}: is empty: the header is {','.join(REQUIRED)},stderr,n and an axis such as params")
    for name in REQUIRED:
        if name not in header:
            hint = nearest(name, [other for other in header if other not in KNOWN])
            raise DataError(
                f"{file}: there is no column {name!r}{hint.replace('did you mean', 'is it')}; columns: "
                f"{', '.join(header)}"
            )
    if "stderr" not in header and "n" not in header:
        raise DataError(f"{file}: there is neither a column 'stderr' nor 'n': one of them must say how sure values are")
    twice = next((name for number, name in enumerate(header) if name in header[:number]), None)
    if twice is not None:
        raise DataError(f"{file}: the column {twice!r} appears twice: rename one")


def _is_axis(name: str, cells: list[tuple[int, dict[str, str]]], not_axes: dict[str | None, str]) -> bool:
    """Whether a column holds positive numbers (or nothing); for one that doesn't, ``not_axes`` says where."""
    for number, cell in cells:
        if name not in AXES and cell[name] and not (_number(cell[name]) or 0) > 0:
            not_axes[name] = f"line {number} has {cell[name]!r} as {name}, which is not a positive number"
            return False
    return any(cell[name] for _, cell in cells)


def _row(where: str, line: int, cell: dict[str, str], axes: list[str]) -> Row:
    for name in ("task", "model", "metric"):
        if not cell[name]:
            raise DataError(f"{where}: the {name} is empty")
    metric = cell["metric"].lower()
    value = _parsed(where, "value", cell["value"])
    if value is None:
        raise DataError(f"{where}: the value is empty: leave the row out if there is no result")
    if is_share(metric) and not 0 <= value <= 1:
        raise DataError(f"{where}: {metric} is {cell['value']}: write a share of 1, such as 0.53, not percent")
    numbers = {name: _parsed(where, name, cell.get(name, "")) for name in ("n", "stderr", *_FLAG_NUMBERS)}
    size, stderr = numbers.pop("n"), numbers.pop("stderr")
    if size is not None and (size < 1 or size != int(size)):
        raise DataError(f"{where}: n is {cell['n']}: write the number of examples")
    n = None if size is None else int(size)
    if stderr is not None and stderr < 0:
        raise DataError(f"{where}: the stderr is {cell['stderr']}: a standard error is never negative")
    if is_any_of(metric, COUNTED):
        stderr = _share_stderr(value, stderr, n)
        if not stderr and value in (0, 1):
            raise DataError(
                f"{where}: {metric} is {value:g} with no error: no model is known to be without, so give the number of "
                "examples as n"
            )
    data = cell.get("data", "").lower() or DATA[0]
    if data not in DATA:
        raise DataError(f"{where}: data is {data!r}{nearest(data, DATA)}: write {' or '.join(DATA)}")
    places = {axis: _parsed(where, axis, cell[axis]) for axis in axes}
    for axis, position in places.items():
        if position is not None and position <= 0:
            raise DataError(f"{where}: {axis} is {cell[axis]}: it must be greater than 0, as the axis is logarithmic")
    words = cell.get("constant_baselines", "").split("|")
    baselines = [_parsed(where, "constant_baselines", word.strip()) for word in words]
    more: dict[str, Any] = {name: cell.get(name, "") for name in ("family", "seed", "cause", "description")} | numbers
    more["axes"] = {axis: position for axis, position in places.items() if position is not None}
    more["constant_baselines"] = tuple(number for number in baselines if number is not None)
    return Row(line, cell["task"], cell["model"], metric, value, stderr, n, data=data, **more)


def _share_stderr(value: float, stderr: float | None, n: int | None) -> float | None:
    """sqrt(a(1-a)/(n-1)), and never 0: a share of 0 or 1 of n examples is not known exactly.

    The floor is the error half an example away from the edge, so that no model gets all the weight.
    """
    if n is None or n < 2:
        return stderr
    if stderr is None:
        stderr = math.sqrt(value * (1 - value) / (n - 1))
    inside = (0.5 + value * n) / (n + 1)
    floor = math.sqrt(inside * (1 - inside) / (n - 1)) if value in (0, 1) else 0.0
    return max(stderr, floor)


def _parsed(where: str, name: str, word: str) -> float | None:
    """The number in a column; None where it is empty."""
    if not word:
        return None
    number = _number(word)
    if number is None:
        raise DataError(f"{where}: {name} is {word!r}, which is not a number")
    return number


def _number(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return number if math.isfinite(number) else None

"""``branchmix scaling trends --compare``: two models of a table on the same questions, task by task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from branchmix.checkpoint.families import nearest
from branchmix.errors import DataError
from branchmix.scaling.trends.series import chosen_metrics, is_lower_better, known_metrics
from branchmix.scaling.trends.table import DATA, Measurement, ResultsTable, settings_of
from branchmix.scaling.trends.verdict import Limits
from branchmix.statistics import Correction, PairedDifference, adjusted_of, paired_difference


@dataclass(frozen=True)
class ComparedTask:
    """A metric of a task, second model minus first."""

    task: str
    metric: str
    data: str
    lower_is_better: bool
    found: PairedDifference
    p_adjusted: float | None
    """After the correction for the number of tasks of this metric and kind of data."""
    alpha: float

    @property
    def differs(self) -> bool:
        return self.p_adjusted is not None and self.p_adjusted < self.alpha

    @property
    def verdict(self) -> str:
        """What the second model is: ``better``, ``worse``, or ``not different`` as far as these questions show."""
        if not self.differs:
            return "not different"
        return "better" if (self.found.difference > 0) != self.lower_is_better else "worse"

    def as_dict(self) -> dict[str, Any]:
        return {**self.found.as_dict(), "p_adjusted": self.p_adjusted, "verdict": self.verdict}


@dataclass
class ComparedModels:
    """Two runs of a table on all tasks that both have."""

    first: str
    second: str
    tasks: list[ComparedTask]
    limits: Limits
    correction: Correction
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        kinds: dict[str, dict[str, dict[str, Any]]] = {}
        for one in self.tasks:
            kinds.setdefault(one.data, {}).setdefault(one.task, {})[one.metric] = one.as_dict()
        content: dict[str, Any] = {"models": [self.first, self.second], "tasks": kinds.pop(DATA[0], {})}
        return content | kinds | {"alpha": self.limits.alpha, "correction": self.correction, "notes": self.notes}


def compare_models(
    table: ResultsTable,
    first: str,
    second: str,
    *,
    metrics: Sequence[str] = (),
    limits: Limits | None = None,
    correction: Correction = "bh",
    lower_is_better: Sequence[str] = (),
) -> ComparedModels:
    """Question by question, on every task and metric for which both runs have scores of single examples.

    A run is named as the model, or where that has several as ``MODEL, seed 1`` or ``MODEL, shots 4``. Questions of one
    template count together. The interval is about the questions: another training of either model may differ by more.

    Raises:
        DataError: there is no such run or metric, a name stands for several runs, both names for one, or there are no
            scores of examples that both have.
    """
    limits = limits or Limits()
    wanted = chosen_metrics(table, metrics)
    rows = [_rows_of(table, name, wanted) for name in (first, second)]
    if any(rows[1].get(key) is row for key, row in rows[0].items()):
        raise DataError(f"{table.path}: {first!r} and {second!r} are the same run: name two that differ")
    named = (*known_metrics(table, lower_is_better), *table.lower_is_better)
    notes: list[str] = []
    found = {key: pair for key in rows[0] if key in rows[1] and (pair := _pair(table, rows, key, limits, notes))}
    if not found:
        why = notes[-1] if notes else f"{first} and {second} have no task in common"
        raise DataError(f"{table.path}: nothing to compare: {why}")
    p_adjusted: dict[tuple[str, str, str], float | None] = {}
    for group in dict.fromkeys(key[1:] for key in found):
        p_adjusted |= adjusted_of({key: found[key].p for key in found if key[1:] == group}, correction)
    tasks = [
        ComparedTask(*key, is_lower_better(key[1], named), pair, p_adjusted[key], limits.alpha)
        for key, pair in found.items()
    ]
    return ComparedModels(first, second, tasks, limits, correction, [*table.notes, *notes])


def _rows_of(table: ResultsTable, name: str, metrics: Sequence[str]) -> dict[tuple[str, str, str], Measurement]:
    """The rows of a run by task, metric and kind of data."""
    names = list(dict.fromkeys(one for row in table.rows for one in _names(row, table)))
    if name not in names:
        raise DataError(f"{table.path}: there is no model {name!r}{nearest(name, names)}")
    rows: dict[tuple[str, str, str], Measurement] = {}
    for row in table.rows:
        if name in _names(row, table) and row.metric in metrics:
            other = rows.setdefault((row.task, row.metric, row.data), row)
            if other is not row:
                longer = [one for both in (other, row) for one in _names(both, table) if one != name]
                hint = f": name one of them, such as {longer[0]!r}" if longer else ""
                places = f"{table.path}, lines {other.line} and {row.line}"
                places = f"{other.source} and {row.source}" if row.source else places
                raise DataError(f"{places}: {name} is several runs{hint}")
    return rows


def _names(row: Measurement, table: ResultsTable) -> Iterator[str]:
    """What a run may be called: its whole name last."""
    parts = [f"seed {row.seed}"] * bool(row.seed)
    parts += [f"{axis} {place:.15g}" for axis, place in settings_of(row, table.within).items()]
    for count in range(len(parts) + 1):
        for some in combinations(parts, count):
            yield ", ".join([row.model, *some])


def _pair(
    table: ResultsTable,
    rows: Sequence[dict[tuple[str, str, str], Measurement]],
    where: tuple[str, str, str],
    limits: Limits,
    notes: list[str],
) -> PairedDifference | None:
    first, second = (table.scores(of[where]) if table.scores is not None else None for of in rows)
    if first is None or second is None:
        lacking = rows[0 if first is None else 1][where]
        notes.append(
            f"{where[0]}, {where[1]}: {lacking.model} has no scores of single examples, as `scaling run` writes them"
        )
        return None
    shared = [key for key in first if key in second]
    if len(shared) < max(len(first), len(second)):
        notes.append(f"{where[0]}, {where[1]}: {len(shared)} of {max(len(first), len(second))} questions are in both")
    if len(shared) < 2:
        notes.append(f"{where[0]}, {where[1]}: fewer than two questions are in both, too few to compare: left out")
        return None
    one_N, other_N = ([scores[key][0] for key in shared] for scores in (first, second))
    return paired_difference(one_N, other_N, [first[key][1] for key in shared], alpha=limits.alpha)

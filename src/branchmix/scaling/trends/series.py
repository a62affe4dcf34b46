"""Rows of a table as curves: a series is one metric of one task, for one family on one kind of data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from branchmix.errors import DataError
from branchmix.scaling.metrics import CONSTANT_SHARE, LOW_COVERAGE
from branchmix.scaling.trends.examples import read_scores, resampled_deviations
from branchmix.scaling.trends.fit import NUM_DRAWS
from branchmix.scaling.trends.table import ResultsTable, Row, is_any_of

LOWER_IS_BETTER = ("loss", "nll", "perplexity", "bits_per_byte", "error", "brier", "logodds", "absolute_logodds")
"""Metrics, and endings of metrics after `_`, of which less is better. The log-odds metrics say how far a model is
swayed from the right answer."""
NOT_JUDGED = ("coverage", "label_coverage")
"""Metrics that are no performance."""
_MANY_AT_CHANCE = 2.0
"""Standard errors within which a model is at chance."""


@dataclass(frozen=True, eq=False)
class Series:
    """The runs of a curve, in the table's order."""

    task: str
    metric: str
    family: str
    data: str
    lower_is_better: bool
    rows: list[Row]
    stderr: np.ndarray
    deviations_BN: np.ndarray | None = field(repr=False, default=None)
    """From resampled examples, the same for all runs."""

    @property
    def y(self) -> np.ndarray:
        return np.array([row.value for row in self.rows])

    @property
    def names(self) -> list[str]:
        """Names of models, with seed and place where several models share one: all different."""
        names = [row.model + (f", seed {row.seed}" if row.seed else "") for row in self.rows]
        return [
            name if names.count(name) == 1 else ", ".join([name, *(f"{axis} {x:g}" for axis, x in row.axes.items())])
            for name, row in zip(names, self.rows, strict=True)
        ]

    def x(self, axis: str) -> np.ndarray:
        """log10 of an axis."""
        return np.log10([row.axes[axis] for row in self.rows])

    def has(self, axis: str) -> bool:
        return all(axis in row.axes for row in self.rows)


def all_series(
    table: ResultsTable, *, metrics: list[str], lower_is_better: tuple[str, ...], notes: list[str]
) -> list[Series]:
    """Every curve of the table with one of ``metrics``, paired over examples where their scores are there."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in table.rows:
        if row.metric in metrics:
            groups.setdefault((row.task, row.metric, row.family, row.data), []).append(row)
    return [
        _series(table.path, table.examples, *key, rows, is_lower_better(key[1], lower_is_better), notes)
        for key, rows in groups.items()
    ]


def is_lower_better(metric: str, named: tuple[str, ...] = ()) -> bool:
    return metric in named or is_any_of(metric, LOWER_IS_BETTER)


def _series(
    path: Path,
    examples: Path | None,
    task: str,
    metric: str,
    family: str,
    data: str,
    rows: list[Row],
    lower: bool,
    notes: list[str],
) -> Series:
    deviations_BN, errors = _paired(examples, rows, notes)
    if deviations_BN is not None and errors is not None:
        # Resampling never draws a wrong answer of a model that has none, so there the error is the table's.
        given = np.where(errors == 0, [row.stderr or 0.0 for row in rows], 0.0)
        errors = errors + given
        deviations_BN = deviations_BN + np.random.default_rng(0).standard_normal(deviations_BN.shape) * given
        return Series(task, metric, family, data, lower, rows, errors, deviations_BN)
    without = next((row for row in rows if row.stderr is None), None)
    if without is not None:
        raise DataError(
            f"{path}, line {without.line}: {metric} has no stderr: give it, or the scores of single examples beside "
            "the table"
        )
    least = 1e-6 * max(1e-3, float(np.ptp([row.value for row in rows])))
    stderr = np.array([max(row.stderr or 0.0, least) for row in rows])
    return Series(task, metric, family, data, lower, rows, stderr)


def _paired(
    examples: Path | None, rows: list[Row], notes: list[str]
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    if examples is None:
        return None, None
    what = f"{rows[0].task}, {rows[0].metric}"
    runs = [(row.model, row.seed) for row in rows]
    twice = next((run for run in runs if runs.count(run) > 1), None)
    if twice is not None:
        notes.append(f"{what}: {twice[0]} stands at several places, which examples are not told apart by: no bootstrap")
        return None, None
    read = [read_scores(examples, row) for row in rows]
    absent = [row for row, scores in zip(rows, read, strict=True) if scores is None]
    scores = [one for one in read if one is not None]
    if absent:
        if scores:
            notes.append(f"{what}: {absent[0].model} has no scores of single examples, so no bootstrap over them")
        return None, None
    for row, one in zip(rows, scores, strict=True):
        mean = float(np.mean(list(one.values.values())))
        if abs(mean - row.value) > 1e-3 * max(1.0, abs(row.value)):
            notes.append(
                f"{what}: {row.model} has {row.value:g} in the table, but its examples have a mean of {mean:.4g}"
            )
    shared = set.intersection(*(set(one.values) for one in scores))
    most = max(len(one.values) for one in scores)
    if len(shared) < 0.5 * most:
        notes.append(f"{what}: models share {len(shared)} of up to {most} examples: too few for a bootstrap over them")
        return None, None
    drawn = resampled_deviations(scores, num_draws=NUM_DRAWS)
    return drawn if drawn is not None else (None, None)


def flags_of(series: Series) -> list[str]:
    """Signs that a model did not do the task at all, from the table's optional columns."""
    if series.metric != "accuracy":
        return []
    flags = []
    rows = series.rows
    constant = [row for row in rows if row.constant_share is not None and row.constant_share > CONSTANT_SHARE]
    if constant:
        flags.append(f"nearly always the same answer: {_names(constant)}")
    equal = [
        row
        for row in rows
        if row not in constant
        and any(abs(row.value - baseline) <= 0.5 / (row.n or 1000) for baseline in row.constant_baselines)
    ]
    if equal:
        flags.append(f"exactly what a constant answer scores: {_names(equal)}")
    unlikely = [row for row in rows if row.coverage is not None and row.coverage < LOW_COVERAGE]
    if unlikely:
        flags.append(f"hardly any probability on the classes: {_names(unlikely)}")
    at_chance = [
        row.chance is not None and abs(row.value - row.chance) <= _MANY_AT_CHANCE * float(stderr)
        for row, stderr in zip(rows, series.stderr, strict=True)
    ]
    if len(rows) > 1 and all(at_chance):
        flags.append("every model is at chance")
    return flags


def _names(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row.model for row in rows))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

"""Rows of a table as curves: a series is one metric of one task, for one family on one kind of data.

Along an axis within models, such as the number of examples in the prompt, a curve is of one model instead of a family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from branchmix.checkpoint.families import nearest
from branchmix.errors import DataError
from branchmix.scaling.metrics import CONSTANT_SHARE, LOW_COVERAGE
from branchmix.scaling.trends.fit import NUM_DRAWS
from branchmix.scaling.trends.table import Measurement, ResultsTable, Scores, is_any_of, settings_of

LOWER_IS_BETTER = ("loss", "nll", "perplexity", "bits_per_byte", "error", "brier", "logodds", "absolute_logodds")
"""Metrics, and endings of metrics after `_`, of which less is better. The log-odds metrics say how far a model is
swayed from the right answer."""
NOT_JUDGED = ("coverage", "label_coverage")
"""Metrics that do not measure performance."""
_MANY_AT_CHANCE = 2.0
"""Standard errors within which a model is at chance."""
_CHUNK = 2_000_000
"""Draws times clusters held in memory at once."""


@dataclass(frozen=True, eq=False)
class Series:
    """The runs of a curve, in the table's order."""

    task: str
    metric: str
    family: str
    """What the curve is of: a family of models, or a model along an axis within models; and its other settings."""
    data: str
    lower_is_better: bool
    rows: list[Measurement]
    stderr: np.ndarray
    deviations_BN: np.ndarray | None = field(repr=False, default=None)
    """From resampled examples, the same for all runs."""
    zeros: Mapping[str, float] = field(default_factory=dict)
    """By axis, what stands for 0 where logarithms are taken."""
    group: str | None = None
    """What a slice of the questions is of, and the whole beside it; None if there are no slices."""
    slice: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Task and metric."""
        return self.task, self.metric

    @property
    def part(self) -> tuple[str, str]:
        """Family and kind of data."""
        return self.family, self.data

    @property
    def tested_with(self) -> tuple[str, str, str]:
        """What curves have in common whose p are corrected together."""
        return self.metric, self.family if self.group is None else self.group, self.data

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

    def places(self, axis: str) -> np.ndarray:
        return np.array([row.axes[axis] for row in self.rows])

    def x(self, axis: str) -> np.ndarray:
        """log10 of an axis; 0 is one step to the left of the smallest positive place."""
        places_N = self.places(axis)
        return np.log10(np.where(places_N == 0, self.zeros.get(axis, 1.0), places_N))

    def has(self, axis: str) -> bool:
        return all(axis in row.axes for row in self.rows)


def all_series(
    table: ResultsTable, axis: str, *, metrics: list[str], lower_is_better: tuple[str, ...], notes: list[str]
) -> list[Series]:
    """Every curve of the table along an axis with one of ``metrics``, paired over examples where their scores exist."""
    families: dict[str, set[str]] = {}
    for row in table.rows:
        families.setdefault(row.model, set()).add(row.family)

    def curve_of(row: Measurement) -> str:
        held = [f"{name} {place:g}" for name, place in settings_of(row, table.within).items() if name != axis]
        who = row.family
        if axis in table.within:
            who = row.model + (f" ({row.family})" if len(families[row.model]) > 1 else "")
        return ", ".join(filter(None, [who, *held]))

    groups: dict[tuple[str, ...], list[Measurement]] = {}
    for row in table.rows:
        if row.metric in metrics:
            groups.setdefault((row.task, row.metric, curve_of(row), row.data), []).append(row)
    zeros = {name: table.zero(name) for name in table.axes}
    return [
        _series(table, key, rows, is_lower_better(key[1], lower_is_better), notes, zeros)
        for key, rows in groups.items()
    ]


def chosen_metrics(table: ResultsTable, asked: Sequence[str]) -> list[str]:
    """The metrics asked for, in lower case, or all that measure performance.

    Raises:
        DataError: the table has no such metric, or none that measures performance.
    """
    there = list(dict.fromkeys(row.metric for row in table.rows))
    wanted = known_metrics(table, asked) or [metric for metric in there if metric not in NOT_JUDGED]
    if not wanted:
        raise DataError(
            f"{table.path}: has only {', '.join(there)}, which does not measure performance: name a metric to judge"
        )
    return wanted


def known_metrics(table: ResultsTable, asked: Sequence[str]) -> list[str]:
    """These metrics in lower case; DataError if the table does not have one of them."""
    there = list(dict.fromkeys(row.metric for row in table.rows))
    for metric in asked:
        if metric.lower() not in there:
            hint = nearest(metric.lower(), there)
            raise DataError(f"{table.path}: there is no metric {metric!r}{hint}; metrics: {', '.join(there)}")
    return list(dict.fromkeys(metric.lower() for metric in asked))


def is_lower_better(metric: str, named: tuple[str, ...] = ()) -> bool:
    return metric in named or is_any_of(metric, LOWER_IS_BETTER)


def _series(
    table: ResultsTable,
    key: tuple[str, ...],
    rows: list[Measurement],
    is_lower: bool,
    notes: list[str],
    zeros: Mapping[str, float],
) -> Series:
    first, told_N = rows[0], np.array([row.stderr or 0.0 for row in rows])
    task, metric, family, data = key
    if table.scores is not None and (drawn := _paired(table, rows, notes)) is not None:
        rows, deviations_BN, stderr_N = drawn
        # Resampling never draws a wrong answer of a model that has none, so there the error is the table's.
        told_N = np.where(stderr_N == 0, told_N, 0.0)
        noise_BN = np.random.default_rng(0).standard_normal(deviations_BN.shape) * told_N
        stderr_N, deviations_BN = stderr_N + told_N, deviations_BN + noise_BN
        return Series(task, metric, family, data, is_lower, rows, stderr_N, deviations_BN, zeros)
    without = next((row for row in rows if row.stderr is None), None)
    if without is not None:
        raise DataError(
            f"{table.where(without)}: {first.metric} has no stderr: give it, or the scores of single "
            "examples beside the table"
        )
    stderr_N = np.maximum(told_N, 1e-6 * max(1e-3, float(np.ptp([row.value for row in rows]))))
    return Series(task, metric, family, data, is_lower, rows, stderr_N, zeros=zeros)


# ---- scores of single examples ----


def _paired(
    table: ResultsTable, rows: list[Measurement], notes: list[str]
) -> tuple[list[Measurement], np.ndarray, np.ndarray] | None:
    """``resampled_deviations`` of all runs, where each has scores of its own and they share examples.

    A model's settings are compared on the examples that all of them have: the rows have the means over those. More
    examples in the prompt may leave no room for some questions, and those that are left are not a fair sample.
    """
    what, scores_of = f"{rows[0].task}, {rows[0].metric}", table.scores
    assert scores_of is not None
    runs = [(row.model, row.seed, settings_of(row, table.within)) for row in rows]
    if twice := [run for run in runs if runs.count(run) > 1]:
        notes.append(f"{what}: {twice[0][0]} is in several rows, and its examples do not say which: no bootstrap")
        return None
    read = [(row, scores_of(row)) for row in rows]
    scored = [(row, scores) for row, scores in read if scores is not None]
    if len(scored) < len(rows):
        if scored:
            absent = next(row for row, scores in read if scores is None)
            notes.append(f"{what}: {absent.model} has no scores of single examples, so no bootstrap over them")
        return None
    for row, scores in scored:
        mean = float(np.mean([value for value, _ in scores.values()]))
        if abs(mean - row.value) > 1e-3 * max(1.0, abs(row.value)):
            notes.append(
                f"{what}: {row.model} has {row.value:g} in the table, but its examples have a mean of {mean:.4g}"
            )
    keys = [set(scores) for _, scores in scored]
    shared, most = len(set.intersection(*keys)), max(map(len, keys))
    if shared < 0.5 * most:
        notes.append(f"{what}: models share {shared} of up to {most} examples: too few for a bootstrap over them")
        return None
    drawn = resampled_deviations([scores for _, scores in scored], num_draws=NUM_DRAWS)
    settings = [settings_of(row, table.within) for row in rows]
    if drawn is None:
        return None
    if shared < most and any(one != settings[0] for one in settings):
        notes.append(f"{what}: {rows[0].model} is judged on the {shared} of {most} examples that all settings have")
        common = sorted(set.intersection(*keys))
        means = [float(np.mean([scores[key][0] for key in common])) for _, scores in scored]
        rows = [row.model_copy(update={"value": v, "n": shared}) for row, v in zip(rows, means, strict=True)]
    return rows, *drawn


def resampled_deviations(scores: list[Scores], *, num_draws: int) -> tuple[np.ndarray, np.ndarray] | None:
    """[B, N] means over resampled examples minus the mean, and [N] their standard errors; None if nothing is shared.

    Whole clusters are drawn with replacement, the same for all runs, so what is hard for all models moves all curves'
    points together and leaves the trend alone.
    """
    keys = sorted(set.intersection(*map(set, scores)))
    if len(keys) < 2:
        return None
    values_NX = np.array([[score[key][0] for key in keys] for score in scores])
    return deviations_of(values_NX, np.ones_like(values_NX), [scores[0][key][1] for key in keys], num_draws=num_draws)


def deviations_of(
    values_NX: np.ndarray, member_NX: np.ndarray, clusters: Sequence[str], *, num_draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """``resampled_deviations`` of the questions, X, that each run counts: those where ``member_NX`` is 1."""
    names, cluster_of = np.unique(clusters, return_inverse=True)
    if len(names) < 2:  # all of one template: nothing to draw but examples
        names, cluster_of = np.arange(len(clusters)), np.arange(len(clusters))
    sums_NC, counts_NC = (
        np.stack([np.bincount(cluster_of, row, len(names)) for row in rows_NX])
        for rows_NX in (values_NX * member_NX, member_NX.astype(float))
    )
    random = np.random.default_rng(0)
    step = max(1, _CHUNK // len(names))
    means = []
    for start in range(0, num_draws, step):
        number = min(step, num_draws - start)
        drawn_BC = random.multinomial(len(names), np.full(len(names), 1 / len(names)), number).astype(float)
        means.append((drawn_BC @ sums_NC.T) / np.maximum(drawn_BC @ counts_NC.T, 1.0))
    deviations_BN = np.concatenate(means) - sums_NC.sum(1) / counts_NC.sum(1)
    return deviations_BN, deviations_BN.std(0, ddof=1)


# ---- models that did not do the task ----


def flags_of(series: Series) -> list[str]:
    """Signs that a model did not do the task at all, from the table's optional columns."""
    if series.metric != "accuracy":
        return []
    rows = series.rows
    constant = [row for row in rows if (row.constant_share or 0) > CONSTANT_SHARE]
    equal = [row for row in rows if any(abs(row.value - b) <= 0.5 / (row.n or 1000) for b in row.constant_baselines)]
    signs = {
        "nearly always the same answer": constant,
        "exactly what a constant answer scores": [row for row in equal if row not in constant],
        "hardly any probability on the classes": [
            row for row in rows if row.coverage is not None and row.coverage < LOW_COVERAGE
        ],
    }
    flags = [f"{sign}: {several(list(dict.fromkeys(row.model for row in of)))}" for sign, of in signs.items() if of]
    if len(rows) > 1 and all(
        row.chance is not None and abs(row.value - row.chance) <= _MANY_AT_CHANCE * float(stderr)
        for row, stderr in zip(rows, series.stderr, strict=True)
    ):
        flags.append("every model is at chance")
    return flags


def several(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

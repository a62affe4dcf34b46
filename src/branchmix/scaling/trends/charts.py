"""Drawings of curves: a task with axes and error bars, a small one for the overview, and sketches of the shapes.

Up is better in all of them: where less is better, as with a loss, the axis is turned round. So a curve that falls is
one that gets worse with scale, and a U looks like a U, whatever the metric.

Two bars stand at each point. The thick one holds the chance of the questions, the thin one that of the models as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from branchmix.pages.canvas import Canvas, Point, smooth
from branchmix.pages.pictures import COLOURS
from branchmix.scaling.trends import words
from branchmix.scaling.trends.report import Judged
from branchmix.scaling.trends.table import DATA, Row

LABEL_COLOURS = {
    "standard": "#009E73",
    "inverse": "#D55E00",
    "u-shaped": "#0072B2",
    "inverted-u": "#CC79A7",
    "flat": "#777777",
    "inconclusive": "#777777",
    "not-testable": "#777777",
}
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_LEAST_SPAN = 0.2
"""Of the axis of an accuracy: no change of a point or two looks like a cliff."""


@dataclass(frozen=True)
class Panel:
    """One metric of one task along one axis: all its curves, and what they are compared with."""

    curves: Sequence[Judged]
    axis: str
    alpha: float
    chance: float | None = None
    """What guessing scores."""
    baselines: tuple[float, ...] = ()
    """What constant answers score."""

    @property
    def metric(self) -> str:
        return self.curves[0].series.metric

    @property
    def lower_is_better(self) -> bool:
        return self.curves[0].series.lower_is_better

    @property
    def official(self) -> Panel:
        """Without the curves of fresh data, where there are others."""
        found = [one for one in self.curves if one.series.data == DATA[0]]
        return replace(self, curves=found or self.curves)

    @property
    def names(self) -> list[str]:
        """What tells the curves apart; empty for a single one."""
        families = len({one.series.family for one in self.curves})
        kinds = len({one.series.data for one in self.curves})
        return [
            words.part_name(one.series.family, one.series.data, families=families, kinds=kinds) for one in self.curves
        ]

    def colour(self, one: Judged) -> str:
        """Families differ in colour, fresh data in the line's dashes."""
        families = list(dict.fromkeys(other.series.family for other in self.curves))
        return COLOURS[families.index(one.series.family) % (len(COLOURS) - 1)]

    def bars(self, one: Judged) -> tuple[np.ndarray, np.ndarray]:
        """[K] half widths: of questions alone, and of models as well."""
        quantile = float(stats.norm.isf(self.alpha / 2))
        sampling_K = np.diag(one.curve.sampling_KK)
        return quantile * np.sqrt(sampling_K), quantile * np.sqrt(sampling_K + one.curve.jitter_K)


@dataclass(frozen=True)
class _Scales:
    """From an axis and a metric to pixels."""

    x: Callable[[float], float]
    """Of log10."""
    y: Callable[[float], float]
    x_ticks: list[float]
    y_ticks: list[float]
    low: float
    high: float

    def within(self, value: float) -> float:
        return self.y(min(max(value, self.low), self.high))


def chart(panel: Panel, *, width: float = 510, height: float = 310) -> Canvas:
    """A task: axes, every curve with its bars, single runs as small points, chance and constant answers as lines."""
    canvas = Canvas(width, height)
    legend = _legend_rows(panel, width)
    top, bottom, left, right = 14 + 20 * len(legend), height - 44, 62, width - 14
    scales = _scales(panel, left, right, top, bottom, whole=False)
    for number, row in enumerate(legend):
        _legend(canvas, panel, row, left, 14 + 20 * number)
    _frame(canvas, panel, scales, left, right, bottom, size=12)
    canvas.words(
        ((left + right) / 2, height - 6),
        f"{words.axis_name(panel.axis)} (logarithmic)",
        size=12,
        colour="soft",
        anchor="middle",
    )
    name = words.metric_name(panel.metric)
    turned = f"{name}, less is better" if panel.lower_is_better else name
    canvas.words(
        (14, (top + bottom) / 2), f"{turned} \u2192 better", size=12, colour="soft", anchor="middle", turned=True
    )
    _references(canvas, panel, scales, left, right)
    for number, one in enumerate(panel.curves):
        shift = 5.0 * (number - (len(panel.curves) - 1) / 2)
        _curve(canvas, panel, one, scales, shift=shift, colour=panel.colour(one))
    _reference_names(canvas, panel, scales, right)
    return canvas


def small(panel: Panel, *, width: float = 230, height: float = 104) -> Canvas:
    """A task at a glance: accuracies all have the same axis, so that tasks can be compared by eye.

    A single curve has the colour of its verdict, as the sketch beside it.
    """
    canvas = Canvas(width, height)
    left, right, top, bottom = 36, width - 6, 8, height - 20
    scales = _scales(panel, left, right, top, bottom, whole=True)
    _frame(canvas, panel, scales, left, right, bottom, size=10)
    _references(canvas, panel, scales, left, right)
    for number, one in enumerate(panel.curves):
        colour = panel.colour(one) if len(panel.curves) > 1 else LABEL_COLOURS[one.verdict.label]
        shift = 2.0 * (number - (len(panel.curves) - 1) / 2)
        _curve(canvas, panel, one, scales, shift=shift, colour=colour, is_small=True)
    return canvas


def sketch(label: str) -> Canvas:
    """What a verdict looks like: size to the right, performance upwards."""
    width, height = 72, 44
    canvas = Canvas(width, height)
    colour = LABEL_COLOURS[label]
    left, right, top, bottom = 6, width - 5, 6, height - 6
    middle, centre = (top + bottom) / 2, (left + right) / 2
    canvas.line((left, 2), (left, bottom + 2), (width - 2, bottom + 2), colour="line", width=1.5)
    wide = {"width": 3.0, "colour": colour}
    if label == "standard":
        canvas.line((left + 3, bottom - 3), (right, top), **wide)
    elif label == "inverse":
        canvas.line((left + 3, top), (right, bottom - 3), **wide)
    elif label in ("u-shaped", "inverted-u"):
        ends, turn = (top, bottom - 4) if label == "u-shaped" else (bottom - 4, top)
        canvas.line(*smooth(((left + 3, ends), (centre + 1, turn), (right, ends))), **wide)
    elif label == "flat":
        canvas.line((left + 3, middle), (right, middle), **wide)
    elif label == "not-testable":
        for number, y in enumerate((top + 4, bottom - 6, middle - 3)):
            canvas.dot((left + 13 + 22 * number, y), 3.5, colour=colour)
    else:
        for number, y in enumerate((middle + 3, top + 7, middle + 5, middle - 4, bottom - 9, middle - 1)):
            x = left + 7 + 10.5 * number
            canvas.line((x, max(2, y - 12)), (x, min(bottom + 1, y + 12)), colour=colour, width=1.2)
            canvas.dot((x, y), 2.6, colour=colour)
    return canvas


# ---- parts ----


def _scales(panel: Panel, left: float, right: float, top: float, bottom: float, *, whole: bool) -> _Scales:
    x = np.concatenate([one.curve.x_K for one in panel.curves])
    first, last = float(x.min()), float(x.max())
    margin = 0.06 * (last - first) or 0.5
    first, last = first - margin, last + margin
    is_share = words.is_share(panel.metric)
    if whole and is_share:
        low, high = 0.0, 1.0
    else:
        low, high = _value_range(panel, is_share=is_share)
    bottom_value, top_value = (high, low) if panel.lower_is_better else (low, high)
    return _Scales(
        x=lambda place: left + (place - first) / (last - first) * (right - left),
        y=lambda value: bottom + (value - bottom_value) / (top_value - bottom_value) * (top - bottom),
        x_ticks=[math.log10(tick) for tick in log_ticks(10**first, 10**last, most=max(2, int((right - left) / 58)))],
        y_ticks=[0.0, 0.5, 1.0] if whole and is_share else ticks(low, high, most=3 if whole else 6),
        low=low,
        high=high,
    )


def _value_range(panel: Panel, *, is_share: bool) -> tuple[float, float]:
    """What the points and their thick bars need; thin bars may be so long that they end at the edge."""
    values = [value for value in (panel.chance,) if value is not None]
    for one in panel.curves:
        inner_K, outer_K = panel.bars(one)
        reach_K = np.minimum(outer_K, np.maximum(inner_K, 0.5 * np.ptp(one.curve.y_K)))
        values += [*(one.curve.y_K - reach_K), *(one.curve.y_K + reach_K), *one.series.y]
    low, high = min(values), max(values)
    least = _LEAST_SPAN if is_share else 0.05 * max(abs(low), abs(high), 1e-9)
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    margin = 0.04 * (high - low)
    low, high = low - margin, high + margin
    if is_share:
        low, high = max(low, -0.01), min(high, 1.01)
    return low, high


def ticks(low: float, high: float, *, most: int) -> list[float]:
    """Round numbers between two values, ``most`` at most."""
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in _STEPS if (high - low) / (power * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [step * (first + k) for k in range(int((high - first * step) / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, *, most: int) -> list[float]:
    """Round numbers on a logarithmic axis, ``most`` at most, and those few that say most."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**power for power in powers for f in factors if low <= f * 10.0**power <= high]
        if 2 <= len(found) <= most:
            return found
    found = [10.0**power for power in powers if low <= 10.0**power <= high]
    if len(found) > most:
        return found[:: math.ceil(len(found) / most)]
    return found or [float(f"{math.sqrt(low * high):.1e}")]


def _frame(
    canvas: Canvas,
    panel: Panel,
    scales: _Scales,
    left: float,
    right: float,
    bottom: float,
    *,
    size: float,
) -> None:
    for tick in scales.y_ticks:
        y = scales.y(tick)
        canvas.line((left, y), (right, y), colour="line", width=0.7)
        canvas.words((left - 6, y + size / 3), _tick(panel.metric, tick, scales.y_ticks), size=size, anchor="end")
    for tick in scales.x_ticks:
        x = scales.x(tick)
        canvas.line((x, bottom), (x, bottom + 4), colour="soft")
        canvas.words(
            (x, bottom + 5 + size), words.axis_value(panel.axis, 10**tick), size=size, anchor="middle", colour="ink"
        )
    canvas.line((left, bottom), (right, bottom), colour="soft")


def _tick(metric: str, value: float, all_ticks: Sequence[float]) -> str:
    scale = 100 if words.is_share(metric) else 1
    step = round(scale * (all_ticks[1] - all_ticks[0]), 9) if len(all_ticks) > 1 else 1
    digits = next((count for count in range(9) if round(step, count) == step), 9)
    text = f"{scale * value + 0.0:.{digits}f}".replace("-", words.MINUS)
    return f"{text}{words.PERCENT}" if scale == 100 else text


def _references(canvas: Canvas, panel: Panel, scales: _Scales, left: float, right: float) -> None:
    """Guessing, and constant answers."""
    for value, dash, name in _reference_lines(panel, scales):
        y = scales.y(value)
        title = f"{name}: {words.shown(panel.metric, value)}"
        canvas.line((left, y), (right, y), colour="soft", width=1.2, dash=dash, title=title)


def _reference_names(canvas: Canvas, panel: Panel, scales: _Scales, right: float) -> None:
    """Beside the lines, as far as there is room."""
    taken: list[float] = []
    for value, _, name in _reference_lines(panel, scales):
        y = scales.y(value)
        if all(abs(y - other) > 13 for other in taken):
            taken.append(y)
            canvas.words((right, y - 4), name, size=11, colour="soft", anchor="end")


def _reference_lines(panel: Panel, scales: _Scales) -> list[tuple[float, str, str]]:
    """Value, dashes and name of each that is in sight."""
    lines = [] if panel.chance is None else [(panel.chance, "dashed", "guessing")]
    lines += [(value, "dotted", "always the same answer") for value in panel.baselines]
    return [line for line in lines if scales.low <= line[0] <= scales.high]


def _curve(
    canvas: Canvas,
    panel: Panel,
    one: Judged,
    scales: _Scales,
    *,
    shift: float,
    colour: str,
    is_small: bool = False,
) -> None:
    is_fresh = one.series.data != DATA[0]
    inner_K, outer_K = panel.bars(one)
    x_K = [scales.x(float(place)) + shift for place in one.curve.x_K]
    y_K = [scales.y(float(value)) for value in one.curve.y_K]
    if bool(np.any(outer_K > 1.02 * inner_K)):
        canvas.bars(_bars(x_K, one, scales, outer_K), colour=colour, width=0.8 if is_small else 1.1)
    canvas.bars(_bars(x_K, one, scales, inner_K), colour=colour, width=2.2 if is_small else 3.6)
    points: list[Point] = list(zip(x_K, y_K, strict=True))
    canvas.line(*points, colour=colour, width=1.6 if is_small else 2.0, dash="dashed" if is_fresh else "")
    rows = _rows_by_size(panel, one)
    if not is_small:
        for x, members in zip(x_K, rows, strict=True):
            for row in members if len(members) > 1 else ():
                title = f"{_who([row])}: {words.shown(panel.metric, row.value)}"
                canvas.dot((x, scales.y(row.value)), 2.6, colour=colour, opacity=0.55, title=title)
    for (x, y), members, value, inner in zip(points, rows, one.curve.y_K, inner_K, strict=True):
        title = "" if is_small else _title(panel, one, members, float(value), float(inner))
        canvas.dot((x, y), 2.8 if is_small else 5.0, colour=colour, filled=not is_fresh, title=title)


def _bars(x_K: Sequence[float], one: Judged, scales: _Scales, half_K: np.ndarray) -> list[tuple[Point, Point]]:
    """From end to end, as far as the axis goes."""
    return [
        ((x, scales.within(value - half)), (x, scales.within(value + half)))
        for x, value, half in zip(x_K, one.curve.y_K, half_K, strict=True)
    ]


def _rows_by_size(panel: Panel, one: Judged) -> list[list[Row]]:
    """Runs of each place on the axis."""
    places_N = np.round(one.series.x(panel.axis), 6)
    return [
        [row for row, place in zip(one.series.rows, places_N, strict=True) if place == wanted]
        for wanted in one.curve.x_K
    ]


def _title(panel: Panel, one: Judged, members: Sequence[Row], value: float, inner: float) -> str:
    """What the mouse reads at a point."""
    low, high = value - inner, value + inner
    if words.is_share(panel.metric):
        low, high = max(low, 0.0), min(high, 1.0)
    name = panel.names[list(panel.curves).index(one)]
    place = words.place(panel.axis, members[0].axes[panel.axis])
    runs = f", mean of {len(members)} runs" if len(members) > 1 else ""
    count = f"; {members[0].n:,} questions" if members[0].n else ""
    return (
        f"{_who(members)}{f' ({name})' if name else ''}\n{words.metric_name(panel.metric)} "
        f"{words.shown(panel.metric, value)}{runs} ({words.shown(panel.metric, low)} to "
        f"{words.shown(panel.metric, high)} by chance of the questions{count})\n{place}"
    )


def _who(members: Sequence[Row]) -> str:
    names = list(dict.fromkeys(row.model for row in members))
    seed = f", seed {members[0].seed}" if len(members) == 1 and members[0].seed else ""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") + seed


def _legend_rows(panel: Panel, width: float) -> list[list[tuple[Judged, str]]]:
    """Curves with their names, in rows that fit."""
    rows: list[list[tuple[Judged, str]]] = []
    room = 0.0
    for one, name in zip(panel.curves, panel.names, strict=True):
        if not name:
            continue
        needed = _legend_width(name)
        if needed > room:
            rows.append([])
            room = width - 70
        rows[-1].append((one, name))
        room -= needed
    return rows


def _legend_width(name: str) -> float:
    return 46 + 6.2 * len(name)


def _legend(canvas: Canvas, panel: Panel, row: Sequence[tuple[Judged, str]], left: float, y: float) -> None:
    x = left
    for one, name in row:
        is_fresh, colour = one.series.data != DATA[0], panel.colour(one)
        canvas.line((x, y), (x + 24, y), colour=colour, width=2.0, dash="dashed" if is_fresh else "")
        canvas.dot((x + 12, y), 4.2, colour=colour, filled=not is_fresh)
        canvas.words((x + 30, y + 4), name, size=12)
        x += _legend_width(name)

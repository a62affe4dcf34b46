"""Pictures of trends: a task with all its curves, a small one for the overview, and a sheet of all tasks.

Up is better in all of them: where less is better, as with a loss, the axis is turned round. So a curve that falls is
one that gets worse with scale, and a U looks like a U, whatever the metric.

Each point has two bars. The thick one is the interval over questions, the thin one over questions and models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from textwrap import wrap
from typing import Any

import numpy as np

from branchmix.pages.pictures import PAPER, Draw, Figure, figure_with, set_title, take_ink
from branchmix.scaling.tasks import CAUSES
from branchmix.scaling.trends import sentences
from branchmix.scaling.trends.judge import Judged
from branchmix.scaling.trends.overview import Entry, Overview, Panel, heading, is_fresh, slugs
from branchmix.scaling.trends.series import several
from branchmix.scaling.trends.table import Measurement
from branchmix.scaling.trends.verdict import DIRECTED, WORDS

SIGNS = {
    "standard": ("\u2197", "#009e73"),
    "inverse": ("\u2198", "#d55e00"),
    "u-shaped": ("\u222a", "#0072b2"),
    "inverted-u": ("\u2229", "#cc79a7"),
    "flat": ("\u2192", "#777777"),
    "inconclusive": ("?", "#777777"),
    "not-testable": ("\u2026", "#777777"),
}
"""What each verdict looks like, size to the right and performance upwards, and its colour."""
SHEET = "sheet"
"""Stem of the sheet's files; those of tasks end in a metric."""
_COLUMNS = 4
_LEAST_SPAN = 0.2
"""Shortest axis of an accuracy, so that a change of a point or two does not look like a cliff."""


def pictures(overview: Overview) -> dict[str, Draw]:
    """Drawings by the names of their files: the sheet, and each metric of each task along the axis asked for."""
    drawings: dict[str, Draw] = {SHEET: partial(sheet, overview)}
    slug_of = slugs(overview.metrics)
    for entry in overview.entries:
        for metric in entry.metrics:
            panel = overview.panel(entry, metric, overview.reports[0])
            drawings[f"{entry.slug}-{slug_of[metric]}"] = partial(chart, panel, title=entry.name)
    return {f"{stem}.{kind}": draw for stem, draw in drawings.items() for kind in ("png", "svg")}


def chart(panel: Panel, ink: str, *, title: str = "") -> Figure:
    """A task: every curve with its bars, single runs as small points, chance and constant answers as lines.

    ``title`` stands above the picture, with the verdicts; without it there are neither.
    """
    figure, (axes,) = figure_with(1, (5.2, 3.1 + (0.3 + 0.18 * len(panel.curves)) * bool(title)), ink)
    low, high = _frame(axes, panel, ink)
    axes.set_xlabel(f"{sentences.axis_name(panel.axis)} (logarithmic)", color=ink)
    turned = ", less is better" if panel.lower_is_better else ""
    axes.set_ylabel(f"{sentences.metric_name(panel.metric)}{turned} \u2192 better", color=ink)
    _references(axes, panel, ink, low, high, with_names=True)
    step = 0.012 * float(np.ptp(axes.get_xlim()))  # curves side by side, so that their bars do not cover each other
    middle = (len(panel.curves) - 1) / 2
    shifts = [step * (number - middle) for number in range(len(panel.curves))]
    drawn = [_curve(axes, panel, one, panel.colour(one), shift=x) for one, x in zip(panel.curves, shifts, strict=True)]
    if any(panel.names):  # given as labels, names may begin with "_", which matplotlib leaves out otherwise
        labels, columns = (_verdicts(panel), 1) if title else (panel.names, 2)
        look = {"loc": "outside upper left", "ncols": columns, "frameon": False, "fontsize": 8.5}
        legend = figure.legend(drawn, labels, labelcolor=ink, title=title, alignment="left", **look)
        legend.get_title().set(color=ink, fontweight="bold")
    elif title:
        axes.set_title(f"{title}: {_verdicts(panel)[0]}", loc="left", color=ink, fontweight="bold")
    return figure


def small(panel: Panel, ink: str) -> Figure:
    """A task at a glance."""
    from matplotlib.figure import Figure as MatplotlibFigure

    figure = MatplotlibFigure(figsize=(2.3, 1.1))
    axes = figure.add_axes((0.17, 0.16, 0.77, 0.81))
    take_ink(axes, ink)
    _small(axes, panel, ink)
    return figure


def sheet(overview: Overview, ink: str) -> Figure:
    """All tasks by the metric that most have, under their causes; small causes share a row."""
    from matplotlib.figure import Figure as MatplotlibFigure

    report, metric, rows = overview.reports[0], overview.main_metric, _rows(overview)
    columns = max(2, *(sum(width for *_, width in row) for row in rows))
    heights = [0.7 + 1.5 * max(-(-len(entries) // _COLUMNS) for _, entries, _ in row) for row in rows]
    figure = MatplotlibFigure(figsize=(2.7 * columns, 0.7 + sum(heights)), layout="constrained")
    figure.suptitle(sentences.question(report), x=0.01, ha="left", color=ink, fontsize=13, fontweight="bold")
    along = f"{sentences.metric_name(metric)} along {sentences.axis_name(report.axis)}; dashed across: guessing"
    figure.supxlabel(along, x=0.01, ha="left", color=ink, fontsize=9)
    strips = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, strip in zip(rows, strips, strict=True):
        texts = [[heading(cause), *wrap(CAUSES.get(cause, ""), 38 * width)] for cause, _, width in row]
        widths = [width for *_, width in row]
        spare = [columns - sum(widths)] if sum(widths) < columns else []
        blocks = strip.subfigures(1, len(widths + spare), width_ratios=widths + spare, squeeze=False)[0]
        for (_, entries, width), lines, block in zip(row, texts, blocks, strict=False):
            lines += [" "] * (max(map(len, texts)) - len(lines))  # so that the pictures of a row are level
            block.suptitle("\n".join(lines), x=0.01, ha="left", color=ink, fontsize=9.5)
            tiles = block.subplots(-(-len(entries) // _COLUMNS), width, squeeze=False).ravel()
            for axes, entry in zip_longest(tiles, entries):
                if entry is None:
                    axes.set_axis_off()
                else:
                    panel = overview.panel(entry, overview.metric_for(entry, metric), report).official
                    take_ink(axes, ink)
                    _tile(axes, entry, panel, metric, ink)
    return figure


def _rows(overview: Overview) -> list[list[tuple[str, list[Entry], int]]]:
    """Causes that fit side by side, each with its tasks and its width in pictures."""
    rows: list[list[tuple[str, list[Entry], int]]] = []
    room = 0
    for cause, entries in overview.groups.items():
        if len(entries) > room:
            rows.append([])
            room = _COLUMNS
        rows[-1].append((cause, entries, min(_COLUMNS, len(entries))))
        room -= len(entries)
    return rows


def _tile(axes: Any, entry: Entry, panel: Panel, metric: str, ink: str) -> None:
    """A task of the sheet: its name, its curve, its verdicts."""
    other = f" ({sentences.metric_name(panel.metric)})" if panel.metric != metric else ""
    axes.set_title(entry.name + other, loc="left", color=ink, fontsize=9, fontweight="bold")
    drawn, labels = _small(axes, panel, ink), _verdicts(panel)
    if len(drawn) > 1:
        place = {"loc": "upper left", "bbox_to_anchor": (-0.04, -0.1), "frameon": False}
        axes.legend(drawn, labels, labelcolor=ink, fontsize=8.5, **place)
    else:
        weight = "bold" if panel.curves[0].verdict.label in (*DIRECTED, "flat") else "normal"
        axes.set_xlabel(labels[0], loc="left", color=ink, fontsize=8.5, fontweight=weight)


def _verdicts(panel: Panel) -> list[str]:
    """A line for each curve."""
    labels = [(name, one.verdict.label) for one, name in panel.named]
    return [f"{SIGNS[label][0]} {f'{name}: ' if name else ''}{WORDS[label]}" for name, label in labels]


# ---- parts ----


def _small(axes: Any, panel: Panel, ink: str) -> list[Any]:
    """Accuracies all have the same axis, so that tasks can be compared; a single curve has its verdict's colour."""
    _references(axes, panel, ink, *_frame(axes, panel, ink, is_small=True))
    verdict_colour = SIGNS[panel.curves[0].verdict.label][1] if len(panel.curves) == 1 else None
    return [_curve(axes, panel, one, verdict_colour or panel.colour(one), is_small=True) for one in panel.curves]


def _frame(axes: Any, panel: Panel, ink: str, *, is_small: bool = False) -> tuple[float, float]:
    """Axes with few ticks, those across at sizes of models; returns the range of values."""
    from matplotlib.ticker import PercentFormatter

    x = np.unique(np.concatenate([one.curve.x_K for one in panel.curves]))
    span = float(np.ptp(x)) or 1.0
    axes.set_xlim(x[0] - 0.07 * span, x[-1] + 0.07 * span)
    ticks, least = [x[0]], (0.28 if is_small else 0.13) * span
    for place in x[1:]:
        if place - ticks[-1] > least and (place == x[-1] or x[-1] - place > least):
            ticks.append(place)
    places = {x: place for one in panel.curves for x, place in zip(one.curve.x_K, one.curve.places_K, strict=True)}
    axes.set_xticks(ticks, [sentences.axis_value(panel.axis, places[tick]) for tick in ticks])
    low, high = (-0.03, 1.03) if panel.is_share and is_small else _value_range(panel)
    axes.set_ylim(*((high, low) if panel.lower_is_better else (low, high)))
    if panel.is_share and is_small:
        axes.set_yticks([0, 0.5, 1])
    else:
        axes.locator_params(axis="y", nbins=3 if is_small else 6)
    if panel.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=sentences.PERCENT))
    axes.grid(axis="y", color=ink, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=7 if is_small else 8.5)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_alpha(0.5)
    return low, high


def _references(axes: Any, panel: Panel, ink: str, low: float, high: float, *, with_names: bool = False) -> None:
    """Lines across at what guessing and constant answers score, if that is in sight."""
    lines = [(panel.chance, "--", "guessing"), *((value, ":", "always the same answer") for value in panel.baselines)]
    named: list[float] = []
    for value, style, name in lines:
        if value is not None and low <= value <= high:
            line = axes.axhline(value, color=ink, alpha=0.55, linewidth=0.9, linestyle=style)
            if with_names:
                set_title(line, f"{name}: {sentences.shown(panel.metric, value)}")
            if with_names and all(abs(value - other) > 0.05 * (high - low) for other in named):
                named.append(value)
                beside = {"xy": (1, value), "xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
                axes.annotate(name, fontsize=8, color=ink, alpha=0.7, **beside)


def _value_range(panel: Panel) -> tuple[float, float]:
    """What the points and their thick bars need; thin bars may be so long that they end at the edge."""
    values = [value for value in (panel.chance,) if value is not None]
    for one in panel.curves:
        inner_K, outer_K = panel.bars(one)
        reach_K = np.minimum(outer_K, np.maximum(inner_K, 0.5 * np.ptp(one.curve.y_K)))
        values += [*(one.curve.y_K - reach_K), *(one.curve.y_K + reach_K), *one.series.y]
    low, high = min(values), max(values)
    least = _LEAST_SPAN if panel.is_share else 0.05 * max(abs(low), abs(high), 1e-9)
    wider = max(0.0, least - (high - low)) / 2 + 0.04 * max(least, high - low)
    low, high = low - wider, high + wider
    return (max(low, -0.01), min(high, 1.01)) if panel.is_share else (low, high)


def _curve(axes: Any, panel: Panel, one: Judged, colour: str, *, shift: float = 0.0, is_small: bool = False) -> Any:
    """Draws a curve with its bars; returns its line, for a legend."""
    inner_K, outer_K = panel.bars(one)
    x_K, y_K = one.curve.x_K + shift, one.curve.y_K
    thin, thick, width, size = (0.8, 1.8, 1.3, 3.2) if is_small else (1.0, 3.0, 1.7, 6.5)
    if np.any(outer_K > 1.02 * inner_K):
        axes.errorbar(x_K, y_K, yerr=outer_K, fmt="none", ecolor=colour, elinewidth=thin)
    axes.errorbar(x_K, y_K, yerr=inner_K, fmt="none", ecolor=colour, elinewidth=thick)
    look = {"color": colour, "marker": "o", "markersize": size, "linewidth": width}
    look |= {"markerfacecolor": PAPER, "linestyle": "--"} if is_fresh(one) else {}
    (drawn,) = axes.plot(x_K, y_K, **look)
    if is_small:
        return drawn
    places_N = np.round(one.series.x(panel.axis), 6)
    for x, place, y, half in zip(x_K, one.curve.x_K, y_K, inner_K, strict=True):
        runs = [row for row, at in zip(one.series.rows, places_N, strict=True) if at == place]
        for row in runs if len(runs) > 1 else ():
            (point,) = axes.plot(x, row.value, "o", color=colour, markersize=3.5, alpha=0.55, markeredgewidth=0)
            set_title(point, f"{_who([row])}: {sentences.shown(panel.metric, row.value)}")
        (point,) = axes.plot(x, y, **look)
        set_title(point, _title(panel, one, runs, float(y), float(half)))
    if (turn := one.verdict.turning_point) is not None:
        line = axes.axvline(one.curve.x_of(turn), color=colour, alpha=0.6, linewidth=1, linestyle=":")
        set_title(line, f"turns at about {sentences.place(panel.axis, turn)}")
    if jump := one.verdict.form.get("jump"):
        start, end = one.curve.x_of(jump["from"]), one.curve.x_of(jump["to"])
        set_title(axes.axvspan(start, end, color=colour, alpha=0.1, linewidth=0), "jump")
    return drawn


def _title(panel: Panel, one: Judged, members: Sequence[Measurement], value: float, half: float) -> str:
    """What the mouse reads at a point."""
    low, high = value - half, value + half
    if panel.is_share:
        low, high = max(low, 0.0), min(high, 1.0)
    name = panel.names[list(panel.curves).index(one)]
    named = f" ({name})" if name not in ("", members[0].model) else ""
    runs = f", mean of {len(members)} runs" if len(members) > 1 else ""
    count = f"; {members[0].n:,} questions" if members[0].n else ""
    at, lowest, highest = (sentences.shown(panel.metric, number) for number in (value, low, high))
    return (
        f"{_who(members)}{named}\n{sentences.metric_name(panel.metric)} {at}{runs} "
        f"({lowest} to {highest} by chance of the questions{count})\n"
        f"{sentences.place(panel.axis, members[0].axes[panel.axis])}"
    )


def _who(members: Sequence[Measurement]) -> str:
    seed = f", seed {members[0].seed}" if len(members) == 1 and members[0].seed else ""
    return several(list(dict.fromkeys(row.model for row in members))) + seed

"""Pictures of ``branchmix scaling trends --plots DIR``: a sheet of all tasks by cause, and one of each task.

They are the page's own drawings on white, as PNG and as SVG.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from branchmix.pages.canvas import Canvas
from branchmix.pages.pictures import png, save
from branchmix.scaling.trends import words
from branchmix.scaling.trends.charts import Panel, chart, sketch, small
from branchmix.scaling.trends.overview import Entry, Overview, heading, slug, why
from branchmix.scaling.trends.report import Judged
from branchmix.scaling.trends.table import DATA
from branchmix.scaling.trends.verdict import DIRECTED, WORDS

SHEET = "sheet"
"""No task's file is named so: those end in a metric."""
_COLUMNS = 4
_WIDTH, _HEIGHT = 230.0, 176.0
_GAP, _EDGE = 16.0, 18.0


def names(overview: Overview) -> list[str]:
    """Of all files, in the order they are written."""
    stems = [SHEET, *(stem for stem, _, _ in _panels(overview))]
    return [f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")]


def write(overview: Overview, folder: Path) -> Iterator[Path]:
    """Write a picture after the other, and yield it once it is there.

    Raises:
        OutputError: a file cannot be written.
    """
    drawn = ((stem, task(entry, panel)) for stem, entry, panel in _panels(overview))
    for stem, canvas in ((SHEET, sheet(overview)), *drawn):
        yield png(canvas.figure, folder / f"{stem}.png")
        yield save(canvas.figure, folder / f"{stem}.svg")


def _panels(overview: Overview) -> Iterator[tuple[str, Entry, Panel]]:
    """Each metric of each task along the axis asked for, with a file's stem."""
    for entry in overview.entries:
        for metric in entry.metrics:
            panel = overview.panel(entry, metric, overview.reports[0])
            yield f"{entry.slug}-{slug(metric)}", entry, panel


def sheet(overview: Overview) -> Canvas:
    """All tasks by the metric that most have, in rows under their cause."""
    report, metric = overview.reports[0], overview.main_metric
    groups = overview.groups
    columns = min(_COLUMNS, max(map(len, groups.values())))
    width = max(2 * _EDGE + columns * (_WIDTH + _GAP) - _GAP, 520)
    canvas = Canvas(width, 0)
    y = _EDGE + 18
    canvas.words((_EDGE, y), "Do larger models do better?", size=19, bold=True)
    y += 20
    told = f"{words.metric_name(metric)} along {words.axis_name(report.axis)}; dashed across: guessing"
    canvas.words((_EDGE, y), told, size=12, colour="soft")
    for cause, entries in groups.items():
        y += 34
        canvas.words((_EDGE, y), heading(cause), size=14, bold=True)
        if why(cause):
            y += 17
            canvas.words((_EDGE, y), why(cause), size=11.5, colour="soft")
        y += 12
        panels = [overview.panel(entry, overview.metric_for(entry, metric), report) for entry in entries]
        lines = max(len(_official(panel)) for panel in panels)
        step = _HEIGHT + 20 * (lines - 1)
        for number, (entry, panel) in enumerate(zip(entries, panels, strict=True)):
            row, column = divmod(number, columns)
            _tile(canvas, entry, panel, _EDGE + column * (_WIDTH + _GAP), y + row * (step + 6), metric)
        y += ((len(entries) - 1) // columns + 1) * (step + 6) - 14
    canvas.height = y + _EDGE
    return canvas


def _tile(canvas: Canvas, entry: Entry, panel: Panel, x: float, y: float, metric: str) -> None:
    """A task of the sheet: its name, its curve, its verdicts."""
    canvas.words((x, y + 12), entry.name, size=12.5, bold=True)
    if panel.metric != metric:
        canvas.words((x + _WIDTH, y + 12), words.metric_name(panel.metric), size=11, colour="soft", anchor="end")
    canvas.place(small(panel, width=_WIDTH), x, y + 18)
    _verdicts(canvas, _official(panel), x, y + 130)


def task(entry: Entry, panel: Panel) -> Canvas:
    """A task by itself: name, verdicts, chart."""
    drawn = chart(panel)
    verdicts = list(zip(panel.curves, panel.names, strict=True))
    top = 40 + 20 * len(verdicts)
    canvas = Canvas(drawn.width + 2 * 8, drawn.height + top + 8)
    canvas.words((16, 26), entry.name, size=16, bold=True)
    _verdicts(canvas, verdicts, 16, 36)
    canvas.place(drawn, 8, top)
    return canvas


def _official(panel: Panel) -> list[tuple[Judged, str]]:
    """The curves whose verdicts the sheet names: not those of fresh data where there are official ones."""
    found = [one for one in panel.curves if one.series.data == DATA[0]] or list(panel.curves)
    several = len({one.series.family for one in found}) > 1
    return [(one, one.series.family if several else "") for one in found]


def _verdicts(canvas: Canvas, verdicts: Sequence[tuple[Judged, str]], x: float, y: float) -> None:
    for number, (one, name) in enumerate(verdicts):
        label = one.verdict.label
        canvas.place(sketch(label, width=30, height=18), x, y + 20 * number)
        text = f"{name}: {WORDS[label]}" if name else WORDS[label]
        canvas.words((x + 37, y + 13 + 20 * number), text, size=12, bold=label in (*DIRECTED, "flat"))

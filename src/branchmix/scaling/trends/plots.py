"""Pictures of ``branchmix scaling trends --plots DIR``: a sheet of all tasks by cause, and one of each task.

They are the page's own drawings on white, as PNG and as SVG.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap

from branchmix.pages.canvas import Canvas
from branchmix.pages.pictures import png, save
from branchmix.scaling.trends import words
from branchmix.scaling.trends.charts import Panel, chart, sketch, small
from branchmix.scaling.trends.overview import Entry, Overview, heading, slug, why
from branchmix.scaling.trends.verdict import DIRECTED, WORDS

SHEET = "sheet"
"""No task's file is named so: those end in a metric."""
_COLUMNS = 4
_WIDTH, _HEIGHT = 230.0, 136.0
"""Of a task, without its verdicts."""
_GAP, _EDGE = 16.0, 18.0
_CHARACTER = 5.9
"""Of a small text, on average."""


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
    """All tasks by the metric that most have, under their causes; small causes share a row."""
    report, metric = overview.reports[0], overview.main_metric
    rows = _rows(overview)
    columns = max(sum(min(_COLUMNS, len(entries)) for _, entries in row) for row in rows)
    width = max(2 * _EDGE + columns * (_WIDTH + _GAP) - _GAP, 480)
    canvas = Canvas(width, 0)
    y = _EDGE + 16
    canvas.words((_EDGE, y), "Do larger models do better?", size=19, bold=True)
    y += 20
    told = f"{words.metric_name(metric)} along {words.axis_name(report.axis)}; dashed across: guessing"
    canvas.words((_EDGE, y), told, size=12, colour="soft")
    for row in rows:
        y = _row(canvas, overview, row, y + 34)
    canvas.height = y + _EDGE - 10
    return canvas


def _rows(overview: Overview) -> list[list[tuple[str, list[Entry]]]]:
    """Causes that fit side by side; one with more tasks than there are columns has a row for itself."""
    rows: list[list[tuple[str, list[Entry]]]] = []
    room = 0
    for cause, entries in overview.groups.items():
        if len(entries) > room:
            rows.append([])
            room = _COLUMNS
        rows[-1].append((cause, entries))
        room -= len(entries)
    return rows


def _row(canvas: Canvas, overview: Overview, row: list[tuple[str, list[Entry]]], y: float) -> float:
    """Causes side by side from the base line ``y`` of their headings; where the row ends."""
    report, metric = overview.reports[0], overview.main_metric
    texts = [
        wrap(why(cause), int((min(_COLUMNS, len(entries)) * (_WIDTH + _GAP) - _GAP) / _CHARACTER))
        for cause, entries in row
    ]
    top = y + 16 * max(map(len, texts)) + 12
    x, bottom = _EDGE, top
    for (cause, entries), lines in zip(row, texts, strict=True):
        canvas.words((x, y), heading(cause), size=14, bold=True)
        for number, line in enumerate(lines):
            canvas.words((x, y + 17 + 16 * number), line, size=11.5, colour="soft")
        panels = [overview.panel(entry, overview.metric_for(entry, metric), report).official for entry in entries]
        step = _HEIGHT + 20 * max(len(panel.curves) for panel in panels)
        for number, (entry, panel) in enumerate(zip(entries, panels, strict=True)):
            down, right = divmod(number, _COLUMNS)
            _tile(canvas, entry, panel, x + right * (_WIDTH + _GAP), top + down * step, metric)
            bottom = max(bottom, top + (down + 1) * step)
        x += min(_COLUMNS, len(entries)) * (_WIDTH + _GAP)
    return bottom


def _tile(canvas: Canvas, entry: Entry, panel: Panel, x: float, y: float, metric: str) -> None:
    """A task of the sheet: its name, its curve, its verdicts."""
    canvas.words((x, y + 12), entry.name, size=12.5, bold=True)
    if panel.metric != metric:
        canvas.words((x + _WIDTH, y + 12), words.metric_name(panel.metric), size=11, colour="soft", anchor="end")
    canvas.place(small(panel, width=_WIDTH), x, y + 18)
    _verdicts(canvas, panel, x, y + 126)


def task(entry: Entry, panel: Panel) -> Canvas:
    """A task by itself: name, verdicts, chart."""
    drawn = chart(panel)
    top = 40 + 20 * len(panel.curves)
    canvas = Canvas(drawn.width + 2 * 8, drawn.height + top + 8)
    canvas.words((16, 26), entry.name, size=16, bold=True)
    _verdicts(canvas, panel, 16, 36)
    canvas.place(drawn, 8, top)
    return canvas


def _verdicts(canvas: Canvas, panel: Panel, x: float, y: float) -> None:
    for number, (one, name) in enumerate(zip(panel.curves, panel.names, strict=True)):
        label = one.verdict.label
        canvas.place(sketch(label), x, y + 20 * number, scale=0.42)
        text = f"{name}: {WORDS[label]}" if name else WORDS[label]
        canvas.words((x + 37, y + 13 + 20 * number), text, size=12, bold=label in (*DIRECTED, "flat"))

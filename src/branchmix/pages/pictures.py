"""Matplotlib figures as inline SVG of a page and as files on white.

A drawing is a function of one argument, an ``ink`` colour, that returns a figure with a transparent background. ``svg``
makes it inline SVG in the page's own text colour, which is readable on light and on dark pages.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from branchmix.checkpoint.folder import writing

Draw = Callable[[str], Figure]

INK = "#010203"
"""Stands for the page's text colour."""
PAPER = "#fdfefd"
"""Stands for the page's background; white in files."""
PRINTED_INK = "#1f2328"
"""The ink of pictures on white."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#777777")
"""The palette of Okabe and Ito, which colour-blind readers can distinguish; the last is a grey for the background."""
_RC = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # names of domains, experts and methods may have a $
}
_BRIGHTEST = 0.8
"""Share that has the palette's last colour."""


def svg(draw: Draw, name: str, label: str) -> str:
    """An inline ``<svg>`` for a page.

    ``name`` keeps the ids of several pictures of a page apart. ``label`` is for readers who don't see it; a picture
    without one is skipped by screen readers.
    """
    with matplotlib.rc_context({**_RC, "svg.fonttype": "none", "svg.hashsalt": name}):
        file = io.StringIO()
        figure = draw(INK)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = _with_titles(file.getvalue())
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "var(--back)")
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|\n\s*(?=<)", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to groups
    text = re.sub(r'(id=")', rf"\g<1>{name}-", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace("'DejaVu Sans'", "system-ui")
    width, height = 72 * figure.get_size_inches()
    role = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    # No size of its own: pages find the width that it was drawn for in ``--drawn``.
    opening = f'{_OPENING} viewBox="0 0 {width:g} {height:g}" style="--drawn: {width:g}pt" {role}>'
    return re.sub(r"<svg [^>]*>", lambda _: opening, text, count=1)


_OPENING = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
_TITLE = "title: "


def set_title(artist: Any, text: str) -> None:
    """What SVG shows while the mouse is over an artist, and screen readers read."""
    artist.set_gid(_TITLE + text)


def _with_titles(svg: str) -> str:
    return re.sub(rf"<g id=([\"']){_TITLE}(.*?)\1>", r"<g><title>\2</title>", svg, flags=re.DOTALL)


def save(draw: Draw, file: Path, **options: Any) -> Path:
    """A picture on white in the format of the file's name (``.png``, ``.svg``, ``.pdf``), whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}")
    with writing(file), matplotlib.rc_context({**_RC, "svg.hashsalt": file.stem}):
        file.parent.mkdir(parents=True, exist_ok=True)
        kind = file.suffix.removeprefix(".")
        fixed = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)  # the same picture, the same bytes
        try:
            draw(PRINTED_INK).savefig(part, format=kind, facecolor="white", metadata=fixed, **options)
            if kind == "svg":
                part.write_text(_with_titles(part.read_text(encoding="utf-8")), encoding="utf-8")
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    return file


def figure_with(panels: int, size: tuple[float, float], ink: str, *, rows: int = 1) -> tuple[Figure, list[Any]]:
    """A figure of ``size`` (inches) with panels side by side, and the panels, row by row."""
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, panels, squeeze=False).flat)
    for panel in axes:
        take_ink(panel, ink)
    return figure, axes


def take_ink(panel: Any, ink: str) -> None:
    """Draws a panel's frame and ticks in the ink, on nothing."""
    panel.tick_params(colors=ink, which="both")
    panel.patch.set_alpha(0)
    for spine in panel.spines.values():
        spine.set_edgecolor(ink)


def heat(
    panel: Any,
    shares: Sequence[Sequence[float]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    ink: str,
    *,
    rows: bool = True,
) -> None:
    """Shares of 1 as coloured cells; each says its number, so that colour is not needed to read it.

    Names of the rows are shown if ``rows``.
    """
    cells = panel.pcolormesh(shares, cmap="cividis", vmin=0, vmax=_BRIGHTEST)
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            red, green, blue, _ = cells.to_rgba(value)
            text = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            panel.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", color=text, fontsize=8)
    panel.set_ylim(len(shares), 0)
    panel.set_xticks([place + 0.5 for place in range(len(column_names))], column_names)
    panel.set_yticks([place + 0.5 for place in range(len(shares))], row_names if rows else [""] * len(shares))
    panel.tick_params(length=0, colors=ink)
    for spine in panel.spines.values():
        spine.set_visible(False)

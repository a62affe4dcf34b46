"""Pictures of a page: as large as they were drawn for, and in the page's ink, in light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from branchmix.evaluate.routing.plots import shares
from branchmix.pages import page
from branchmix.pages.canvas import Canvas, Words
from branchmix.pages.pictures import Figure, figure_with, png, save, svg


def drawing(width: float) -> Any:
    """So many inches wide."""

    def draw(ink: str) -> Figure:
        figure, (panel,) = figure_with(1, (width, 2.0), ink)
        panel.set_xlabel("tokens", color=ink)
        return figure

    return draw


@pytest.mark.parametrize("dark", [False, True])
def test_a_small_picture_is_not_stretched_and_is_readable(tmp_path: Path, open_page: Any, dark: bool) -> None:
    pictures = [f"<figure>{svg(drawing(width), f'n{width:.0f}', 'a picture')}</figure>" for width in (3.0, 10.0)]
    file = page.write(tmp_path / "page.html", page.document("Pictures", "branchmix", ["A page."], pictures))
    shown = open_page(file, width=1200, dark=dark)
    small, large = shown.run(
        "return [...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().width)"
    )
    assert 3 * 96 <= small <= 1.4 * 3 * 96 and large > 850
    # What is drawn in ink, frame and words, is as light or dark as the page's text.
    inks = shown.run(
        """const marks = [...document.querySelectorAll('svg path, svg text')].map(mark => getComputedStyle(mark));
        const found = marks.flatMap(style => [style.fill, style.stroke]).filter(colour => colour.startsWith('rgb'));
        return [getComputedStyle(document.body).color, ...new Set(found)]"""
    )
    assert inks[0] in inks[1:] and "rgb(1, 2, 3)" not in inks
    assert (inks[0] == "rgb(230, 237, 243)") == dark


NAMES = ("US$ \\frac A$", "a_b^c", "\\alpha", "100 % {x}", "$")
"""Of domains, experts and models: none of it is mathematics."""


def test_names_are_no_mathematics(tmp_path: Path) -> None:
    layer = {"layer": 0, "by_domain": {name: [0.5, 0.3, 0.2] for name in NAMES}}
    found = {"experts": list(NAMES[:3]), "ffn": [layer], "attention": [layer]}

    def draw(ink: str) -> Figure:
        figure, (panel,) = figure_with(1, (6.0, 2.0), ink)
        panel.plot([1, 2], [1, 2], label=NAMES[0])
        panel.set_yscale("log")
        panel.set_title(NAMES[1])
        panel.set_xticks(range(len(NAMES)), NAMES)
        panel.annotate(NAMES[0], (1, 1))
        panel.legend()
        return figure

    def canvas(ink: str) -> Figure:
        return Canvas(80, 40, [Words((5, 20), NAMES[0])]).figure(ink)

    for kind in ("svg", "pdf"):
        for drawing in (draw, canvas, lambda ink: shares(found, ink, domains=NAMES)):
            save(drawing, tmp_path / f"a.{kind}")
    png(draw, tmp_path / "b.png")
    text = svg(draw, "n", "a picture")
    assert text.count("US$ \\frac A$") >= 3 and "a_b^c" in text and ">$<" in text

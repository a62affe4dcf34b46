"""Pictures of a page: as large as they were drawn for, and in the page's ink, in light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from branchmix.pages import page
from branchmix.pages.pictures import Figure, figure_with, svg


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

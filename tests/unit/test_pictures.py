"""Pictures of a page: as large as they were drawn for, and in the page's ink, in light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from branchmix.evaluate.routing.plots import shares
from branchmix.pages import page
from branchmix.pages.numbers import human_bytes, human_count
from branchmix.pages.pictures import PAPER, Figure, figure_with, save, set_title, svg

TEMPLATE = '{% extends "page.html" %}{% block head %}{% endblock %}{% block content %}{{ pictures }}{% endblock %}'


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
    template = tmp_path / "template.html"
    template.write_text(TEMPLATE)
    content = {
        "title": "Pictures",
        "kicker": "branchmix",
        "lead": ["A page."],
        "pictures": Markup("".join(pictures)),
    }
    file = tmp_path / "pictures.html"
    file.write_text(page.render(template, **content))
    shown = open_page(file, width=1200, dark=dark)
    small, large = shown.run(
        "return [...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().width)"
    )
    assert 3 * 96 <= small <= 1.4 * 3 * 96 and large > 850
    # What is drawn in ink, frame and words, is as light or dark as the page's text.
    inks = shown.run(
        """const marks = [...document.querySelectorAll('svg path, svg text')].map(mark => getComputedStyle(mark));
        const inks = marks.flatMap(style => [style.fill, style.stroke]).filter(colour => colour.startsWith('rgb'));
        return [getComputedStyle(document.body).color, ...new Set(inks)]"""
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

    for kind in ("svg", "pdf"):
        for drawing in (draw, lambda ink: shares(found, ink, domains=NAMES)):
            save(drawing, tmp_path / f"a.{kind}")
    save(draw, tmp_path / "b.png", dpi=160)
    text = svg(draw, "n", "a picture")
    assert text.count("US$ \\frac A$") >= 3 and "a_b^c" in text and ">$<" in text


TITLES = ("a < b & c\nsecond line", "\"quoted\" and 'quoted'")


def test_titles_and_the_page_colours(tmp_path: Path) -> None:
    """The mouse reads what ``set_title`` was given, whatever signs it has, on a page and in a file."""

    def draw(ink: str) -> Figure:
        figure, (panel,) = figure_with(1, (3.0, 2.0), ink)
        for number, title in enumerate(TITLES):
            (point,) = panel.plot(number, 0, "o", color=ink, markerfacecolor=PAPER)
            set_title(point, title)
        return figure

    text = svg(draw, "n", "what & why")
    root = ElementTree.fromstring(text)
    assert [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")] == list(TITLES)
    assert root.attrib["aria-label"] == "what & why" and "var(--back)" in text and PAPER not in text
    assert ElementTree.fromstring(svg(draw, "n", "")).attrib["aria-hidden"] == "true"
    file = ElementTree.parse(save(draw, tmp_path / "a.svg"))
    assert [title.text for title in file.iter("{http://www.w3.org/2000/svg}title")] == list(TITLES)


def test_counts_and_bytes() -> None:
    assert [human_count(n) for n in (7, 1200, 134.5e6, 12e9, 1.4e12)] == ["7", "1.2k", "134.5M", "12B", "1.4T"]
    assert [human_bytes(n) for n in (12, 1.84e9, 2e12)] == ["12 B", "1.84 GB", "2 TB"]

"""Drawings that are SVG on a page and a matplotlib figure in a file, and numbers as people read them."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import image

from branchmix.pages.canvas import Canvas, smooth
from branchmix.pages.numbers import human_bytes, human_count
from branchmix.pages.pictures import png, save

RED = "#ff0000"


def drawing() -> Canvas:
    canvas = Canvas(100, 50)
    canvas.line((10, 25), (90, 25), width=4, colour=RED, title='a < b & "c"')
    canvas.bars([((20, 5), (20, 45)), ((30, 5), (30, 45))], colour="soft")
    canvas.dot((60, 10), 6, colour="#0000ff", filled=True)
    canvas.words((5, 48), "<tag>", anchor="end", bold=True)
    return canvas


def test_svg_is_xml_whose_marks_have_titles_and_the_page_colours() -> None:
    root = ElementTree.fromstring(drawing().svg("what & why"))
    assert root.attrib["viewBox"] == "0 0 100 50" and root.attrib["aria-label"] == "what & why"
    line, bars, dot, words = root
    assert line[0].text == 'a < b & "c"' and line.attrib["d"] == "M10 25L90 25"
    assert bars.attrib == {"d": "M20 5L20 45M30 5L30 45", "fill": "none", "stroke": "var(--soft)", "stroke-width": "1"}
    assert (dot.attrib["cx"], dot.attrib["cy"], dot.attrib["r"], dot.attrib["fill"]) == ("60", "10", "6", "#0000ff")
    assert words.text == "<tag>" and words.attrib["text-anchor"] == "end" and words.attrib["fill"] == "currentColor"
    ornament = ElementTree.fromstring(drawing().svg())
    assert ornament.attrib["aria-hidden"] == "true" and "role" not in ornament.attrib


def test_the_file_shows_the_same_in_the_same_places(tmp_path: Path) -> None:
    pixels = image.imread(png(drawing().figure, tmp_path / "drawing.png"))[..., :3]
    scale = 160 / 72
    assert pixels.shape[:2] == (round(50 * scale), round(100 * scale))

    def at(x: float, y: float) -> list[float]:
        return [round(float(value), 2) for value in pixels[int(y * scale), int(x * scale)]]

    assert at(70, 25) == [1, 0, 0] and at(70, 32) == [1, 1, 1]
    assert at(60, 10) == [0, 0, 1]
    assert at(95, 5) == [1, 1, 1]
    assert "<svg" in save(drawing().figure, tmp_path / "drawing.svg").read_text()


def test_a_canvas_on_a_canvas_is_moved_and_scaled() -> None:
    whole = Canvas(300, 200)
    whole.place(drawing(), 100, 50, scale=0.5)
    line, bars, dot, words = whole.marks
    assert line.parts == (((105, 62.5), (145, 62.5)),) and line.width == 2
    assert bars.parts[1] == ((115, 52.5), (115, 72.5))
    assert (dot.at, dot.radius) == ((130, 55), 3) and words.size == 6


def test_a_parabola_meets_its_three_points() -> None:
    points = smooth(((0, 0), (1, 3), (4, 0)))
    assert points[0] == (0, 0) and points[-1] == pytest.approx((4, 0))
    assert [y for _, y in points] == pytest.approx([x * (4 - x) for x, _ in points])
    assert np.all(np.diff([x for x, _ in points]) > 0)


def test_counts_and_bytes() -> None:
    assert [human_count(n) for n in (7, 1200, 134.5e6, 12e9, 1.4e12)] == ["7", "1.2k", "134.5M", "12B", "1.4T"]
    assert [human_bytes(n) for n in (12, 1.84e9, 2e12)] == ["12 B", "1.84 GB", "2 TB"]

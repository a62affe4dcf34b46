"""A drawing made of lines, dots and words, which a page shows as SVG and a file as whatever matplotlib writes.

One drawing serves both, so that the picture in a paper is the picture on the page. As SVG it is a twentieth of what
matplotlib writes, is made in a millisecond, takes its colours from the page (light or dark), and each of its marks may
have a title that the browser shows under the mouse. Units are pixels from the upper left corner, y downwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

from branchmix.pages.pictures import PRINTED_INK, Figure

Point = tuple[float, float]
INKS = {"ink": "currentColor", "soft": "var(--soft)", "line": "var(--line)", "back": "var(--back)"}
"""Colours that a page sets, by name; every other colour is itself."""
_PRINTED = {"soft": "#59636e", "line": "#d1d9e0", "back": "#ffffff"}
"""The same on white."""
_DASHES = {"": None, "dashed": (5.0, 3.5), "dotted": (1.5, 3.0)}


@dataclass(frozen=True)
class Line:
    parts: tuple[tuple[Point, ...], ...]
    """Each through its points; apart from each other."""
    colour: str = "ink"
    width: float = 1.0
    dash: str = ""
    """Nothing, ``dashed`` or ``dotted``."""
    title: str = ""


@dataclass(frozen=True)
class Dot:
    at: Point
    radius: float
    colour: str = "ink"
    filled: bool = True
    opacity: float = 1.0
    title: str = ""


@dataclass(frozen=True)
class Words:
    at: Point
    """Where the text's base line begins, ends or has its middle."""
    text: str
    size: float = 12.0
    colour: str = "ink"
    anchor: str = "start"
    """``start``, ``middle`` or ``end``."""
    bold: bool = False
    turned: bool = False
    """Written upwards."""


@dataclass
class Canvas:
    """Marks on nothing, the later ones above."""

    width: float
    height: float
    marks: list[Line | Dot | Words] = field(default_factory=list)

    def line(self, *points: Point, **options: Any) -> None:
        self.marks.append(Line((points,), **options))

    def bars(self, parts: Iterable[tuple[Point, Point]], **options: Any) -> None:
        """Many short lines of one look, which an SVG says in a fifth of the space."""
        self.marks.append(Line(tuple(parts), **options))

    def dot(self, at: Point, radius: float, **options: Any) -> None:
        self.marks.append(Dot(at, radius, **options))

    def words(self, at: Point, text: str, **options: Any) -> None:
        self.marks.append(Words(at, text, **options))

    def place(self, other: Canvas, x: float, y: float, *, scale: float = 1.0) -> None:
        """Draw another canvas with its upper left corner at (x, y), larger or smaller."""

        def moved(point: Point) -> Point:
            return x + scale * point[0], y + scale * point[1]

        for mark in other.marks:
            if isinstance(mark, Line):
                parts = tuple(tuple(moved(point) for point in part) for part in mark.parts)
                self.marks.append(replace(mark, parts=parts, width=scale * mark.width))
            elif isinstance(mark, Dot):
                self.marks.append(replace(mark, at=moved(mark.at), radius=scale * mark.radius))
            else:
                self.marks.append(replace(mark, at=moved(mark.at), size=scale * mark.size))

    def svg(self, label: str = "") -> str:
        """An inline ``<svg>`` of a page; without a label it is an ornament, which screen readers pass over."""
        role = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
        marks = "".join(_svg(mark) for mark in self.marks)
        return f'<svg {role} viewBox="0 0 {self.width:g} {self.height:g}">{marks}</svg>'

    def figure(self, ink: str = PRINTED_INK) -> Figure:
        """A matplotlib figure of the same size, a pixel being a point; for ``pictures.save`` and ``pictures.png``."""
        from matplotlib.figure import Figure as MatplotlibFigure

        figure = MatplotlibFigure(figsize=(self.width / 72, self.height / 72))
        panel = figure.add_axes((0, 0, 1, 1))
        panel.set_xlim(0, self.width)
        panel.set_ylim(self.height, 0)
        panel.set_axis_off()
        for order, mark in enumerate(self.marks):
            _draw(panel, mark, ink, order)
        return figure


def smooth(points: Sequence[Point]) -> tuple[Point, ...]:
    """Many points along the parabola through three, for sketches."""
    (x0, y0), (x1, y1), (x2, y2) = points
    found = []
    for step in range(25):
        x = x0 + (x2 - x0) * step / 24
        a, b, c = (x - x1) * (x - x2), (x - x0) * (x - x2), (x - x0) * (x - x1)
        found.append(
            (
                x,
                y0 * a / ((x0 - x1) * (x0 - x2)) + y1 * b / ((x1 - x0) * (x1 - x2)) + y2 * c / ((x2 - x0) * (x2 - x1)),
            )
        )
    return tuple(found)


def _svg(mark: Line | Dot | Words) -> str:
    colour = INKS.get(mark.colour, mark.colour)
    if isinstance(mark, Words):
        x, y = map(_short, mark.at)
        extra = f' text-anchor="{mark.anchor}"' if mark.anchor != "start" else ""
        extra += ' font-weight="600"' if mark.bold else ""
        extra += f' transform="rotate(-90 {x} {y})"' if mark.turned else ""
        return f'<text x="{x}" y="{y}" font-size="{mark.size:g}" fill="{colour}"{extra}>{escape(mark.text)}</text>'
    title = f"<title>{escape(mark.title)}</title>" if mark.title else ""
    if isinstance(mark, Dot):
        x, y = map(_short, mark.at)
        fill = colour if mark.filled else INKS["back"]
        extra = f' opacity="{mark.opacity:g}"' if mark.opacity < 1 else ""
        stroke = f' stroke="{colour}" stroke-width="1.6"' if not mark.filled else ""
        return f'<circle cx="{x}" cy="{y}" r="{mark.radius:g}" fill="{fill}"{stroke}{extra}>{title}</circle>'
    path = "".join("M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in part) for part in mark.parts)
    dashes = _DASHES[mark.dash]
    extra = f' stroke-dasharray="{dashes[0]:g} {dashes[1]:g}"' if dashes else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{mark.width:g}"{extra}>{title}</path>'


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _draw(panel: Any, mark: Line | Dot | Words, ink: str, order: int) -> None:
    """The mark on matplotlib's axes."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Circle

    colours = {"ink": ink, **_PRINTED}
    colour = colours.get(mark.colour, mark.colour)
    if isinstance(mark, Words):
        across = {"start": "left", "middle": "center", "end": "right"}[mark.anchor]
        panel.text(
            *mark.at,
            mark.text,
            color=colour,
            fontsize=mark.size * 0.92,  # DejaVu Sans is wider than what browsers take
            ha=across,
            va="baseline",
            weight="bold" if mark.bold else "normal",
            rotation=90 if mark.turned else 0,
            rotation_mode="anchor",
            zorder=order,
        )
    elif isinstance(mark, Dot):
        fill = colour if mark.filled else colours["back"]
        panel.add_patch(
            Circle(
                mark.at,
                mark.radius,
                facecolor=fill,
                edgecolor=colour,
                linewidth=0 if mark.filled else 1.6,
                alpha=mark.opacity,
                zorder=order,
            )
        )
    else:
        dashes = _DASHES[mark.dash]
        style: Any = (0, tuple(length / mark.width for length in dashes)) if dashes else "-"
        panel.add_collection(
            LineCollection(mark.parts, colors=[colour], linewidths=[mark.width], linestyles=[style], zorder=order),
            autolim=False,
        )

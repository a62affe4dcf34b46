"""A table as HTML, Markdown, LaTeX, CSV and on a terminal, from one description."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from branchmix.pages.page import TEMPLATES, render

if TYPE_CHECKING:
    from rich import table as rich_table

PIPE_WIDTH = 160
"""Columns of a file or pipe, so that it gets whole lines."""


@dataclass(frozen=True)
class Table:
    """Text cells; a row of one cell is a heading over those below it. The first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    name: str = ""
    """Name of its file, without ending."""
    title: str = ""
    note: str = ""
    bold: set[tuple[int, int]] = field(default_factory=set)
    """Row and column of cells that stand out."""
    left: Collection[str] = ()
    """Heads of further columns of words, which a terminal aligns left and folds like the first one."""

    def html(self) -> str:
        """For a page, without its title."""
        return render(TEMPLATES / "table.html", table=self)

    def markdown(self) -> str:
        """With its title."""
        rows = [
            [f"**{c}**" if c and self._stands_out(n, i) else c for i, c in enumerate(r)]
            for n, r in enumerate(self.rows)
        ]
        rows = [[*row, *[""] * (len(self.head) - len(row))] for row in rows]
        lines = map(_pipes, [self.head, ["---", *["---:"] * (len(self.head) - 1)], *rows])
        return "\n".join([f"### {self.title}", "", *lines, *(["", self.note] if self.note else []), ""])

    def latex(self) -> str:
        """A ``table`` of the package booktabs."""
        columns, head = "l" + "r" * (len(self.head) - 1), " & ".join(map(_tex, self.head)) + r" \\"
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(self.title)}}}", rf"\label{{tab:{self.name}}}"]
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule"]
        for number, row in enumerate(self.rows):
            if len(row) == 1:
                lines.append(rf"\multicolumn{{{len(self.head)}}}{{l}}{{\emph{{{_tex(row[0])}}}}} \\")
            else:
                cells = [rf"\textbf{{{_tex(c)}}}" if (number, n) in self.bold else _tex(c) for n, c in enumerate(row)]
                lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        if self.note:
            lines.append(rf"\\[2pt]{{\footnotesize {_tex(self.note)}}}")
        return "\n".join([*lines, r"\end{table}", ""])

    def terminal(self) -> rich_table.Table:
        """For a rich console. Cells are plain text, so ``[x]`` in one is not markup."""
        from rich.table import Table as RichTable
        from rich.text import Text

        shown = RichTable(
            box=None,
            pad_edge=False,
            padding=(0, 2, 0, 0),
            title=Text(self.title, style="italic") if self.title else None,
            title_justify="left",
            caption=Text(self.note) if self.note else None,
            caption_justify="left",
        )
        for number, name in enumerate(self.head):
            is_words = number == 0 or name in self.left
            options: Any = {"overflow": "fold"} if is_words else {"justify": "right", "no_wrap": True}
            shown.add_column(Text(name), **options)
        for number, row in enumerate(self.rows):
            shown.add_row(*(Text(cell, style="bold" * self._stands_out(number, n)) for n, cell in enumerate(row)))
        return shown

    def show(self, stream: TextIO | None = None) -> None:
        """Print it on ``stream``, which is standard output if not given."""
        from rich.console import Console

        stream = stream or sys.stdout
        Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH).print(self.terminal())

    def csv(self) -> str:
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([self.head, *self.rows])
        return file.getvalue()

    def _stands_out(self, row: int, column: int) -> bool:
        return (row, column) in self.bold or len(self.rows[row]) == 1


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


_TEX = {"\\": r"\textbackslash{}", "±": r"$\pm$"} | {c: rf"\{c}" for c in "&%$#_{}"}
_TEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(char, char) for char in text)

"""A table as HTML, Markdown, LaTeX and CSV from one description."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from branchmix.pages.page import TEMPLATES, render


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

    def html(self) -> str:
        """For a page, without its title."""
        return render(TEMPLATES / "table.html", table=self)

    def markdown(self) -> str:
        """With its title."""
        rows = [
            [f"**{row[0]}**", *[""] * (len(self.head) - 1)] if len(row) == 1 else self._marked(n, row, "**{}**")
            for n, row in enumerate(self.rows)
        ]
        lines = [
            f"### {self.title}",
            "",
            _pipes(self.head),
            _pipes(["---", *["---:"] * (len(self.head) - 1)]),
            *map(_pipes, rows),
        ]
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])

    def latex(self) -> str:
        """A ``table`` of the package booktabs."""
        columns = "l" + "r" * (len(self.head) - 1)
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(self.title)}}}", rf"\label{{tab:{self.name}}}"]
        lines += [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(_tex, self.head)) + r" \\",
            r"\midrule",
        ]
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

    def csv(self) -> str:
        """Cells alone."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(self.head)
        writer.writerows(self.rows)
        return file.getvalue()

    def _marked(self, number: int, row: Sequence[str], mark: str) -> list[str]:
        return [mark.format(cell) if (number, n) in self.bold and cell else cell for n, cell in enumerate(row)]


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


_TEX = {"\\": r"\textbackslash{}", "±": r"$\pm$"} | {c: rf"\{c}" for c in "&%$#_{}"}
_TEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(char, char) for char in text)

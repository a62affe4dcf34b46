"""A table on a terminal: aligned, marked, and nothing in it read as rich's markup."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from branchmix.pages.table import Table


def lines(table: Table, width: int = 60, **console: bool) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, **console).print(table.terminal())
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_words_are_aligned_left_and_numbers_right() -> None:
    table = Table(["name", "how", "size"], [["a", "copied", "5"], ["longer", "x", "12,345"]], left=("how",))
    assert lines(table) == ["name    how       size", "a       copied       5", "longer  x       12,345"]


def test_nothing_is_markup() -> None:
    table = Table(["[b]", "[i]n[/i]"], [["[red]x[/red]", "[1]"], ["[/]", "2"]], title="[dim]t", note="[link=x]")
    shown = lines(table, force_terminal=True)
    assert [
        line for line in ("[dim]t", "[b]", "[i]n[/i]", "[red]x[/red]", "[/]", "[link=x]") if line not in str(shown)
    ] == []


def test_bold_cells_and_headings_stand_out() -> None:
    table = Table(["m", "loss"], [["group"], ["a", "1.0"], ["b", "2.0"]], bold={(2, 1)})
    shown = lines(table, force_terminal=True)
    bold = [line.split("\x1b[1m")[1].split("\x1b[0m")[0].strip() for line in shown[1:] if "\x1b[1m" in line]
    assert bold == ["group", "2.0"]


def test_numbers_stay_whole_where_words_fold() -> None:
    table = Table(["name", "size"], [["long words " * 5, "1,234,567"]])
    shown = lines(table, width=30)
    assert len(shown) > 2 and "1,234,567" in shown[1]


def test_files_and_pipes_get_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Table(["name", "how"], [["x" * 70, "y" * 70]], left=("how",)).show()
    assert f"{'x' * 70}  {'y' * 70}" in capsys.readouterr().out

"""Phrases that mark a translation stay out of pages, help texts and messages; the README stays short."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

PAGES = [
    "README.md",
    *sorted(
        str(page.relative_to(ROOT)) for folder in ("docs", "docs/studies") for page in (ROOT / folder).glob("*.md")
    ),
    *sorted(str(recipe.relative_to(ROOT)) for recipe in (ROOT / "recipes").glob("*.yaml")),
]
"""Help texts are in ``docs/cli.md``, settings in other generated pages."""

PHRASES = {
    "goes on": "resumes, continues",
    "go on with it": "resume it",
    "stands (?:twice|there|beside|several)": "is, appears, is listed twice",
    "may stand": "may be repeated, may be listed",
    "(?:told|tells?) apart": "distinguished, statistically indistinguishable",
    "of (?:theirs|ours|yours)": "their, our, your",
    "do(?:es)? as well": "works too",
    "dr[ae]ws? by lot": "random",
    "as good as by lot": "at random",
    "is none of": "is not one of",
    "but for": "except for",
    "do not decide": "are inconclusive",
    "grown from one": "fine-tuned from the same",
}
"""A pattern, and what to write instead."""


def found_phrases(text: str) -> list[str]:
    """Each phrase in ``text``, also across a line break, with its line and what to write instead."""
    return [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}; write: {instead}"
        for phrase, instead in PHRASES.items()
        for match in re.finditer(r"\b" + phrase.replace(" ", r"\s+") + r"\b", text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_pages_have_none_of_the_phrases(page: str) -> None:
    assert found_phrases((ROOT / page).read_text(encoding="utf-8")) == []


def test_messages_have_none_of_the_phrases() -> None:
    """All text of the code except docstrings."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                found += [f"{path.name}, line {node.lineno}: {phrase}" for phrase in found_phrases(node.value)]
    assert found == []


def test_the_search_finds_what_it_looks_for() -> None:
    text = "A stopped run goes\non. Results of other harnesses do as well.\nBAM cannot be told apart from BTX."
    assert [line.partition(":")[0] for line in found_phrases(text)] == ["line 1", "line 3", "line 2"]


def test_docstrings_of_commands_begin_with_a_word_of_their_own() -> None:
    files = [*(ROOT / "src/branchmix/cli").glob("*.py"), ROOT / "src/branchmix/study/settings.py"]
    begun = [f"{path.name}: {match[0]}" for path in files for match in re.finditer(r'"""Of\s.*', path.read_text())]
    assert begun == []


def test_a_newcomer_reads_the_readme_to_its_end() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150

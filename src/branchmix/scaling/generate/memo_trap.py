"""Memo trap: end the beginning of a famous line with another word than the one everybody knows.

Our lines are rhymes, songs, literature and proverbs, none of which is in the prize's file.
"""

from __future__ import annotations

import re
from random import Random

from branchmix.scaling.examples import Example
from branchmix.scaling.generate.vocabulary import changed_line, texts, two_answers

_WORDINGS = texts("memo_trap").wordings


def make(random: Random, number: int) -> Example:
    """A line, and a word to end it with that fits its grammar."""
    place, start, usual, word = changed_line(random)
    prompt = random.choice(_WORDINGS).format(word=word, start=start)
    return two_answers(prompt, f"{word}.", f"{usual}.", number, template=f"line {place + 1}")


def solve(example: Example) -> int:
    """The class that is the quoted word."""
    quoted = re.findall(r'"(.+?)"', example.prompt)
    assert len(quoted) == 1, example.prompt
    return [name.strip(" .") for name in example.classes].index(quoted[0])

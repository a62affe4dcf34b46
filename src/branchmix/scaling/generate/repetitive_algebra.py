"""Repetitive algebra: many equations with one answer, one with another, then one with the first answer again."""

from __future__ import annotations

import re
from random import Random

from branchmix.scaling.examples import Example
from branchmix.scaling.generate.vocabulary import pick, texts, two_answers

_TEXTS = texts("repetitive_algebra")


def make(random: Random, number: int) -> Example:
    """6 to 14 equations with the answer of the last, one with the other answer, and the last."""
    right, wrong = random.sample(range(2, 100), 2)
    (header, start), (wording, pattern) = pick(random, _TEXTS.headers), pick(random, _TEXTS.wordings)

    def question(value: int) -> str:
        a, d = random.randrange(-90, 190), random.randrange(2, 90)
        letter = random.choice(_TEXTS.letters)
        equation = random.choice(_TEXTS.forms).format(a=a, b=value - a, v=letter, d=d, e=value - d, f=value + d)
        return f"Q: {pattern.format(equation=equation, letter=letter)}\nA:"

    values = [right] * random.randrange(6, 15) + [wrong]
    lines = [start, *(f"{question(value)} {value}" for value in values), question(right)]
    template = f"header {header + 1}, wording {wording + 1}"
    return two_answers("\n".join(lines), right, wrong, number, template=template)


def solve(example: Example) -> int:
    """Solve every equation; those with an answer must have the right one."""
    texts = example.prompt.split("Q: ")[1:]
    for text in texts[:-1]:
        assert _root(text) == int(text.split("A: ")[1]), text
    last = _root(texts[-1])
    before = [_root(text) for text in texts[:-1]]
    assert before[-1] != last and set(before[:-1]) == {last}
    return [int(name) for name in example.classes].index(last)


_SIDE = r"(?:-?\d+|\b[a-z]\b)(?: [+-] (?:-?\d+|[a-z]\b))?"
_EQUATION = re.compile(f"{_SIDE} = {_SIDE}")
_TERM = re.compile(r"([+-]?) ?(-?\d+|[a-z]\b)")


def _root(text: str) -> int:
    """The number that solves the equation in ``text``: its terms brought to one side."""
    equation = _EQUATION.search(text)
    assert equation, text
    numbers = unknowns = 0
    for side, sign in zip(equation[0].split(" = "), (1, -1), strict=True):
        for operator, term in _TERM.findall(side):
            factor = -sign if operator == "-" else sign
            if term.isalpha():
                unknowns += factor
            else:
                numbers += factor * int(term)
    assert abs(unknowns) == 1, text
    return -numbers // unknowns

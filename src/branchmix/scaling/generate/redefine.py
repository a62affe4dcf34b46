"""Redefine: a symbol, an amount, a sign or a word gets a new meaning, and the question depends on it."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from random import Random

from branchmix.scaling.examples import Example
from branchmix.scaling.generate.vocabulary import pick, texts, two_answers

_TEXTS = texts("redefine")
_SIGNS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "+": ("addition", operator.add),
    "-": ("subtraction", operator.sub),
    "*": ("multiplication", operator.mul),
}


def make(random: Random, number: int) -> Example:
    """One of six kinds of new meaning, the right answer and the one that would usually be right."""
    kind = random.choices(range(6), weights=(4, 4, 4, 4, 4, 1))[0]
    while True:
        wording, prompt, right, usual = _KINDS[kind](random)
        if right != usual:
            break
    return two_answers(prompt, right, usual, number, part=kind + 1, template=f"kind {kind + 1}, wording {wording + 1}")


_Made = tuple[int, str, object, object]
"""Number of the wording, prompt, right answer, usual answer."""


def _constant(random: Random) -> _Made:
    number, wording = pick(random, _TEXTS.constant_wordings)
    symbol = random.choice(tuple(_TEXTS.constants))
    place = random.randrange(3)
    value = str(random.randrange(100, 100000))
    prompt = wording.format(s=symbol, n=value, nth=_TEXTS.places[place])
    return number, prompt, value[place], _TEXTS.constants[symbol][place]


def _amount(random: Random) -> _Made:
    number, wording = pick(random, _TEXTS.amount_wordings)
    unit = random.choice(tuple(_TEXTS.amounts))
    parts, usual = _TEXTS.amounts[unit]
    n, k = random.randrange(3, 120), random.randrange(2, 10)
    return number, wording.format(unit=unit, parts=parts, n=n, k=k), n * k, usual * k


def _sign(random: Random) -> _Made:
    number, wording = pick(random, _TEXTS.sign_wordings)
    sign, meaning = random.sample(tuple(_SIGNS), 2)
    b, a = sorted(random.choices(range(2, 60), k=2))
    prompt = wording.format(s=sign, word=_SIGNS[meaning][0], a=a, b=b)
    return number, prompt, _SIGNS[meaning][1](a, b), _SIGNS[sign][1](a, b)


def _numeral(random: Random) -> _Made:
    number, wording = pick(random, _TEXTS.numeral_wordings)
    old, new = random.sample(range(1, 10), 2)
    other = random.randrange(11, 100)
    terms = [str(old), str(other)]
    random.shuffle(terms)
    prompt = wording.format(d=old, word=_TEXTS.numerals[new], a=terms[0], b=terms[1])
    return number, prompt, new + other, old + other


def _text(random: Random) -> _Made:
    number, wording = pick(random, _TEXTS.text_wordings)
    a, b = random.randrange(10, 1000), random.randrange(10, 1000)
    end = random.choice(("first", "last"))
    place = 0 if end == "first" else -1
    return number, wording.format(a=a, b=b, end=end), f"{a}+{b}"[place], str(a + b)[place]


def _colour(random: Random) -> _Made:
    number, wording = pick(random, _TEXTS.colour_wordings)
    thing = random.choice(tuple(_TEXTS.colours))
    new = random.choice(sorted({*_TEXTS.colours.values(), "violet", "beige"}))
    return number, wording.format(old=_TEXTS.colours[thing], new=new, thing=thing), new, _TEXTS.colours[thing]


_KINDS = (_constant, _amount, _sign, _numeral, _text, _colour)


def solve(example: Example) -> int:
    """From the prompt's numbers, signs and quotes, whatever the wording."""
    prompt = example.prompt
    words = re.findall(r"[a-z]+", prompt)
    right: object
    if quoted := re.search(r'"(\w+)"', prompt):
        right = quoted[1]
    elif text := re.search(r"\d+\+\d+", prompt):
        right = text[0][0 if "first" in words else len(text[0]) - 1]
    elif "numeral" in words:
        given = re.search(r"numeral (\d)\b.*?(?:means|worth|read as) ([a-z]+)", prompt)
        terms = re.search(r"(\d+) \+ (\d+)", prompt)
        assert given and terms
        right = sum(_TEXTS.numerals.index(given[2]) if term == given[1] else int(term) for term in terms.groups())
    elif operation := re.search(r"(\d+) [-+*] (\d+)", prompt):
        (compute,) = (compute for meaning, compute in _SIGNS.values() if meaning in words)
        right = compute(int(operation[1]), int(operation[2]))
    elif "digit" in words:
        (value,) = re.findall(r"\d{3,}", prompt)
        (place,) = set(words) & set(_TEXTS.places)
        right = value[_TEXTS.places.index(place)]
    else:
        size, count = map(int, re.findall(r"\d+", prompt))
        right = size * count
    return example.classes.index(f" {right}")

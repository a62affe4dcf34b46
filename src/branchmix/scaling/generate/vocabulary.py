"""What several generators share: reading their texts (``texts/*.yaml``), and choosing from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import TypeVar

from branchmix.scaling.examples import Example
from branchmix.settings import read_yaml

T = TypeVar("T")


def texts(name: str) -> SimpleNamespace:
    """The word lists and sentence patterns of ``texts/NAME.yaml``, as attributes."""
    return SimpleNamespace(**read_yaml(Path(__file__).parent / "texts" / f"{name}.yaml"))


VOCABULARY = texts("vocabulary")


def pick(random: Random, choices: Sequence[T]) -> tuple[int, T]:
    """One of several, after its place among them: templates are named by places."""
    place = random.randrange(len(choices))
    return place, choices[place]


def in_turn(number: int, right: T, wrong: T) -> tuple[T, T]:
    """The right one first if the number is even, else the wrong one."""
    return (right, wrong) if number % 2 == 0 else (wrong, right)


def two_answers(prompt: str, right: object, wrong: object, number: int, *, part: int = 1, template: str) -> Example:
    """An example with two classes; the right one comes first if the number is even."""
    return Example(prompt, in_turn(number, f" {right}", f" {wrong}"), number % 2, part=part, template=template)


def changed_line(random: Random) -> tuple[int, str, str, str]:
    """A famous line: its place, how it begins, how it ends, and another word that could end it."""
    place, (start, usual, kind) = pick(random, VOCABULARY.lines)
    word = random.choice(VOCABULARY.endings[kind])
    while word in f"{start} {usual}".lower():
        word = random.choice(VOCABULARY.endings[kind])
    return place, start, usual, word

"""Modus tollens: is "if A then B; not B; so not A" correct? It always is: the answer is always Yes, as in the prize.

A model that always says Yes does well on it. ``make_control`` makes arguments of the same look that are *not* correct
(deny the first half, or affirm the second): mixed in, they tell such a model from one that reads.
"""

from __future__ import annotations

import re
from random import Random

from branchmix.scaling.examples import Example
from branchmix.scaling.generate.vocabulary import VOCABULARY, pick, texts, two_answers

_TEXTS = texts("modus_tollens")


def make(random: Random, number: int) -> Example:
    """A correct argument; the classes change places, so that no place is always right."""
    return _argument(random, number, is_correct=True)


def make_control(random: Random, number: int) -> Example:
    """An argument of the same look that is not correct: "not A, so not B", or "B, so A". The answer is No."""
    return _argument(random, number, is_correct=False)


def _argument(random: Random, number: int, *, is_correct: bool) -> Example:
    (a, not_a), (b, not_b) = random.sample(_TEXTS.predicates, 2)
    name = random.choice(VOCABULARY.names)
    wording, pattern = pick(random, _TEXTS.wordings)
    fact, claim = (not_b, not_a) if is_correct else random.choice([(not_a, not_b), (b, a)])
    rule = f"If {name} {a}, then {name} {b}"
    prompt = pattern.format(rule=rule, fact=f"{name} {fact}", claim=f"{name} {claim}")
    right, wrong, part = ("Yes", "No", 1) if is_correct else ("No", "Yes", 2)
    return two_answers(prompt, right, wrong, number, part=part, template=f"wording {wording + 1}, {a}")


def solve(example: Example) -> int:
    """By a table of truth values: the claim must hold wherever the rule and the fact do."""
    rule = re.search(r"If (\w+) ([^,]+), then \1 ([^.]+)\.", example.prompt)
    assert rule
    name, *halves = rule.groups()
    atoms = [_atom(half)[0] for half in halves]
    rest = example.prompt[rule.end() :]
    fact, claim = (_atom(text) for text in re.findall(rf"\b{name} ([^.?\n]+)", rest)[:2])
    follows = all(
        world[claim[0]] == claim[1]
        for a in (True, False)
        for b in (True, False)
        if (not a or b) and (world := {atoms[0]: a, atoms[1]: b})[fact[0]] == fact[1]
    )
    return example.classes.index(" Yes" if follows else " No")


def _atom(text: str) -> tuple[str, bool]:
    """A statement without its negation, and whether it had none: ``cannot swim`` is ``can swim``, False."""
    for negation, verb in (("does not ", ""), ("is not ", "be "), ("cannot ", "can ")):
        if text.startswith(negation):
            return verb + text.removeprefix(negation), False
    verb, _, rest = text.partition(" ")
    return f"{ {'is': 'be', 'can': 'can'}.get(verb) or verb.removesuffix('s') } {rest}", True

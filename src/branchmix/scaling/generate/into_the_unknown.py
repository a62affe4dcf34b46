"""Into the unknown: which of two facts helps to answer a question? One repeats what is known."""

from __future__ import annotations

from random import Random

from branchmix.scaling.examples import Example
from branchmix.scaling.generate.vocabulary import VOCABULARY, in_turn, pick, texts

_TEXTS = texts("into_the_unknown")


def make(random: Random, number: int) -> Example:
    """A scene, a fact of it again, and a new one."""
    scene, (facts, question, helpful) = pick(random, _TEXTS.scenes)
    wording, pattern = pick(random, _TEXTS.wordings)
    a, b = random.sample(VOCABULARY.names, 2)
    thing, room = random.choice(_TEXTS.things)
    words = {"a": a, "b": b, "thing": thing, "room": room, "day": random.choice(_TEXTS.days)}
    known = [f"{fact.format(**words)}." for fact in facts]
    new, old = f"{random.choice(helpful).format(**words)}.", random.choice(known)
    first, second = in_turn(number, new, old)
    asked = question.format(**words)
    prompt = pattern.format(facts=" ".join(known), question=asked, first=first, second=second)
    return Example(prompt, (" A", " B"), number % 2, part=1, template=f"scene {scene + 1}, wording {wording + 1}")


def solve(example: Example) -> int:
    """The option that is in the prompt only once."""
    options = [line[3:] for line in example.prompt.splitlines() if line[:3] in ("A. ", "B. ")]
    once = [example.prompt.count(option) == 1 for option in options]
    assert sorted(once) == [False, True], example.prompt
    return once.index(True)

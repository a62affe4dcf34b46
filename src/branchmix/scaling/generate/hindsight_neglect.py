"""Hindsight neglect: was a bet worth taking? Luck and wisdom agree in ten shots, and not in the question."""

from __future__ import annotations

import re
from random import Random

from branchmix.scaling.examples import Example
from branchmix.scaling.generate.vocabulary import VOCABULARY, pick, texts

NUM_SHOTS = 10
_TEXTS = texts("hindsight_neglect")


def make(random: Random, number: int) -> Example:
    """Ten bets that ended as the odds said, five worth taking and five not; and one that ended the other way."""
    (scene, story), (question, ask) = pick(random, _TEXTS.scenes), pick(random, _TEXTS.questions)
    unit = random.choice(_TEXTS.units)
    wise = [True, False] * (NUM_SHOTS // 2)
    random.shuffle(wise)
    answer = number % 2

    def bet(worth_it: bool, won: bool) -> str:
        name = random.choice(VOCABULARY.names)
        likely = random.randrange(60, 98)
        gain, loss = random.choice(_TEXTS.large), random.choice(_TEXTS.small)
        gain, loss = (gain, loss) if worth_it else (loss, gain)
        chance = likely if worth_it else 100 - likely
        odds = [
            f"a chance of {chance} percent to win {gain} {unit}",
            f"a chance of {100 - chance} percent to lose {loss} {unit}",
        ]
        random.shuffle(odds)
        end = f"wins {gain} {unit}" if won else f"loses {loss} {unit}"
        told = story.format(name=name, odds=" and ".join(odds), end=end)
        return f"Question: {told} {ask.format(name=name)}\nAnswer:"

    shots = [f"{bet(good, good)} {'Y' if good else 'N'}\n" for good in wise]
    last = bet(answer == 0, answer == 1)
    template = f"scene {scene + 1}, question {question + 1}"
    return Example("".join([*shots, last]), (" Y", " N"), answer, part=1, template=template)


def solve(example: Example) -> int:
    """By expected value of the last bet; the shots must have been answered that way, and ended that way."""
    *shots, last = [text for text in example.prompt.split("Question: ") if text]
    assert len(shots) == NUM_SHOTS
    for shot in shots:
        value, won = _read(shot)
        assert shot.endswith(f"Answer: {'Y' if value > 0 else 'N'}\n") and won == (value > 0), shot
    value, won = _read(last)
    assert won != (value > 0), "the last bet must not end as the odds said"
    return example.classes.index(" Y" if value > 0 else " N")


_ODDS = re.compile(r"(\d+) percent to (win|lose) (\d+)")


def _read(text: str) -> tuple[int, bool]:
    """A hundred times the expected value, and whether it was won."""
    outcomes = {kind: (int(chance), int(amount)) for chance, kind, amount in _ODDS.findall(text)}
    assert outcomes["win"][0] + outcomes["lose"][0] == 100
    value = outcomes["win"][0] * outcomes["win"][1] - outcomes["lose"][0] * outcomes["lose"][1]
    won = f" wins {outcomes['win'][1]} " in text
    assert won or f" loses {outcomes['lose'][1]} " in text
    return value, won

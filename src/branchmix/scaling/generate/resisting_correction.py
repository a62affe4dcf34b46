"""Resisting correction: repeat sentences exactly, the wrong ones too. The output stops before the word that is wrong.

Four kinds of error: a famous line that ends wrongly, a misspelt word, a verb in the wrong number, a wrong capital.
"""

from __future__ import annotations

import re
from random import Random

from branchmix.scaling.examples import Example
from branchmix.scaling.generate.vocabulary import VOCABULARY, changed_line, pick, texts, two_answers

_TEXTS = texts("resisting_correction")


def make(random: Random, number: int) -> Example:
    """Two or three sentences and their copies, then the wrong sentence and its copy up to the wrong word."""
    kind = random.randrange(4)
    frame, sentence, wrong, right = (_line, _misspelt, _number, _capital)[kind](random)
    start, _, rest = sentence.partition("{w}")
    blocks = [random.choice(_TEXTS.headers)]
    source, target = random.choice(_TEXTS.labels)
    blocks += [f"{source}: {text}\n{target}: {text}" for text in random.sample(_TEXTS.clean, random.randrange(2, 4))]
    blocks.append(f"{source}: {start}{wrong}{rest}\n{target}: {start.rstrip()}".rstrip())
    template = f"kind {kind + 1}, sentence {frame + 1}"
    return two_answers("\n\n".join(blocks), wrong, right, number, part=kind + 1, template=template)


_Made = tuple[int, str, str, str]
"""Number of the frame, the sentence with ``{w}`` for the word, the wrong word, the usual one."""


def _line(random: Random) -> _Made:
    frame, start, usual, word = changed_line(random)
    return frame, f"{start} {{w}}.", word, usual


def _misspelt(random: Random) -> _Made:
    frame, (right, wrong, sentence) = pick(random, _TEXTS.misspelt)
    name, when = random.choice(VOCABULARY.names), random.choice(_TEXTS.when)
    return frame, sentence.format(name=name, when=when, w="{w}"), wrong, right


def _number(random: Random) -> _Made:
    frame, (right, wrong, sentence) = pick(random, _TEXTS.number)
    name, other = random.sample(VOCABULARY.names, 2)
    city = random.choice(tuple(VOCABULARY.countries.values()))
    return frame, sentence.format(name=name, other=other, city=city, w="{w}"), wrong, right


def _capital(random: Random) -> _Made:
    frame, sentence = pick(random, _TEXTS.capitals)
    capitals = VOCABULARY.countries
    country, other = random.sample(tuple(capitals), 2)
    sentence = sentence.format(country=country, name=random.choice(VOCABULARY.names), w="{w}")
    return frame, sentence, capitals[other], capitals[country]


def solve(example: Example) -> int:
    """The class that continues the line as given; the shots must be exact copies."""
    *shots, last = [block.splitlines() for block in example.prompt.split("\n\n")[1:]]
    for given, copy in shots:
        assert given.split(": ", 1)[1] == copy.split(": ", 1)[1]
    given, copy = (line.split(": ", 1)[1] for line in last)
    assert given.startswith(copy)
    rest = given[len(copy) :]
    fits = [re.match(rf"{re.escape(name)}(?!\w)", rest) is not None for name in example.classes]
    assert sorted(fits) == [False, True], example.prompt
    return fits.index(True)

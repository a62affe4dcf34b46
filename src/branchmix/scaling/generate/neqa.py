"""NeQA: questions about common sense, turned around by a negation.

The knowledge is a table of our own: things by kind, uses of tools, what animals do, and things by size.
"""

from __future__ import annotations

import re
from random import Random

from branchmix.scaling.examples import Example
from branchmix.scaling.generate.vocabulary import in_turn, pick, texts

_TEXTS = texts("neqa")


def make(random: Random, number: int) -> Example:
    """One of four kinds of question, the answer that fits the negation and the one that fits without it."""
    kind = random.choices(range(4), weights=(4, 3, 3, 2))[0]
    wording, question, right, wrong = (_odd_one_out, _not_a, _not_for, _not_more)[kind](random)
    header, start = pick(random, _TEXTS.headers)
    first, second = in_turn(number, right, wrong)
    prompt = f"{start}\n\nQuestion: {question[0].upper()}{question[1:]}\nA. {first}\nB. {second}\nAnswer:"
    template = f"kind {kind + 1}, wording {wording + 1}, header {header + 1}"
    return Example(prompt, (" A", " B"), number % 2, part=kind + 1, template=template)


_Made = tuple[int, str, str, str]
"""Number of the wording, question, right answer, answer that would be right without the negation."""


def _odd_one_out(random: Random) -> _Made:
    kind, other = random.sample(tuple(_TEXTS.kinds), 2)
    number, wording = pick(random, _TEXTS.kind_wordings)
    question = wording.format(kind=_article(kind))
    return number, question, random.choice(_TEXTS.kinds[other]), random.choice(_TEXTS.kinds[kind])


def _not_a(random: Random) -> _Made:
    kind, other = random.sample(tuple(_TEXTS.kinds), 2)
    number, wording = pick(random, _TEXTS.member_wordings)
    question = wording.format(member=f'"{random.choice(_TEXTS.kinds[kind])}"')
    return number, question, _article(other), _article(kind)


def _not_for(random: Random) -> _Made:
    tool, other = random.sample(tuple(_TEXTS.uses), 2)
    number, wording = pick(random, _TEXTS.use_wordings)
    return number, wording.format(tool=tool), _TEXTS.uses[other], _TEXTS.uses[tool]


def _not_more(random: Random) -> _Made:
    small, middle, large = sorted(random.sample(range(len(_TEXTS.sizes)), 3))
    number, wording = pick(random, _TEXTS.size_wordings)
    more = random.choice(("larger", "smaller", "bigger", "heavier", "lighter"))
    upwards = more in ("larger", "bigger", "heavier")
    question = wording.format(thing=_TEXTS.sizes[middle], more=more)
    right, wrong = (large, small) if upwards else (small, large)
    return number, question, _TEXTS.sizes[right], _TEXTS.sizes[wrong]


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


_KIND_OF = {member: kind for kind, members in _TEXTS.kinds.items() for member in members}


def solve(example: Example) -> int:
    """Strike out the answer of the question without its negation; exactly one must remain."""
    question = example.prompt.split("Question: ")[1].splitlines()[0]
    options = [line[3:] for line in example.prompt.splitlines()[-3:-1]]
    assert re.search(r"\b(not|no|nobody|never|cannot|wrong)\b", question.lower()), "a question without a negation"
    fits = [_fits(question, option) for option in options]
    assert sum(fits) == 1, example.prompt
    return fits.index(False)


def _fits(question: str, option: str) -> bool:
    """Whether the option answers the question without its negation."""
    if quoted := re.search(r'"(\w+)"', question):
        return option.split(" ", 1)[1] == _KIND_OF[quoted[1]]
    if option in _KIND_OF:
        return bool(re.search(rf"\ban? {_KIND_OF[option]}\b", question))
    if option in _TEXTS.sizes:
        things = [thing for thing in _TEXTS.sizes if re.search(rf"\b{thing}\b", question, re.IGNORECASE)]
        difference = _TEXTS.sizes.index(max(things, key=len)) - _TEXTS.sizes.index(option)
        return difference > 0 if re.search("larger|bigger|heavier", question) else difference < 0
    (tool,) = (tool for tool, use in _TEXTS.uses.items() if use == option)
    return bool(re.search(rf"\b{tool}\b", question, re.IGNORECASE))

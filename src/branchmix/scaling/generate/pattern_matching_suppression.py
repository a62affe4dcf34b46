"""Pattern matching suppression: two symbols alternate, and the last one should break the pattern."""

from __future__ import annotations

import re
from random import Random

from branchmix.scaling.examples import Example
from branchmix.scaling.generate.vocabulary import in_turn, pick, texts, two_answers

_TEXTS = texts("pattern_matching_suppression")


def make(random: Random, number: int) -> Example:
    """All symbols but the last; the answer is the one that was there just before."""
    wording, pattern = pick(random, _TEXTS.wordings)
    kind, symbols = pick(random, _TEXTS.symbols)
    first, second = random.sample(symbols, 2)
    # The symbol shown last is the answer: the first of the two after an odd number of symbols.
    shown = 2 * random.randrange(2, 8) + 1 - number % 2
    separator = random.choice(_TEXTS.separators)
    row = separator.join((first, second)[place % 2] for place in range(shown)) + separator
    header = pattern.format(n=shown + 1, a=first, b=second)
    template = f"wording {wording + 1}, symbols {kind + 1}"
    right, wrong = in_turn(number, first, second)
    return two_answers(f"{header}\n{row}".rstrip(), right, wrong, number, template=template)


def solve(example: Example) -> int:
    """The symbol that stops alternating; the row must be one short of what was asked for."""
    header, _, rest = example.prompt.partition("\n")
    row = re.split(r"[,;]?\s|[,;]$", rest.strip() + " ")
    row = [symbol for symbol in row if symbol]
    assert row[2:] == row[:-2] and len(set(row)) == 2, "the row must alternate"
    wanted = [int(count) for count in re.findall(r"(\d+) marks", header)]
    assert len(row) + 1 in wanted, header
    usual = row[-2]
    (surprising,) = {name.strip() for name in example.classes} - {usual}
    return [name.strip() for name in example.classes].index(surprising)

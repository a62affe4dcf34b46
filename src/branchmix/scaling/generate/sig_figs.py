"""Significant figures: round to so many of them, where one choice is rounded to so many decimal places instead."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from random import Random

from branchmix.scaling.examples import Example
from branchmix.scaling.generate.vocabulary import in_turn, pick, texts

_WORDINGS = texts("sig_figs").wordings


def make(random: Random, number: int) -> Example:
    """A number with decimals between 0.001 and 100,000, none of whose roundings is a tie."""
    while True:
        figures = random.randrange(1, 5)
        size = random.randrange(-3, 5)  # of the first figure, as a power of ten
        digits = [random.randrange(1, 10), *(random.randrange(10) for _ in range(random.randrange(4, 8)))]
        x = Decimal((0, tuple(digits), size - len(digits) + 1))
        exponent = int(x.as_tuple().exponent)
        if digits[-1] in (0, 5) or -exponent <= figures:
            continue  # a written zero at the end, a tie, or nothing to round to so many places
        right = x.quantize(Decimal((0, (1,), size - figures + 1)), rounding=ROUND_HALF_UP)
        wrong = x.quantize(Decimal((0, (1,), -figures)), rounding=ROUND_HALF_UP)
        if right != wrong and wrong != 0 and _is_plain(right, size, figures):
            break
    wording, pattern = pick(random, _WORDINGS)
    question = pattern.format(x=format(x, "f"), n=figures, s="s" if figures > 1 else "")
    first, second = in_turn(number, format(right, "f"), format(wrong, "f"))
    prompt = f"Question: {question}\nA. {first}\nB. {second}\nAnswer:"
    template = f"wording {wording + 1}, {figures} figures"
    return Example(prompt, (" A", " B"), number % 2, part=1, template=template)


def _is_plain(rounded: Decimal, size: int, figures: int) -> bool:
    """Whether rounding did not carry into a further digit, as 99.96 does: such cases are questions of notation."""
    return rounded.adjusted() == size and len(rounded.as_tuple().digits) == figures


def solve(example: Example) -> int:
    """Digit by digit: find the first figure, count, and round up by hand."""
    words = example.prompt.splitlines()[0].replace("?", " ").replace(",", " ").replace(":", " ").split()
    x = next(word.rstrip(".") for word in words if "." in word.rstrip("."))
    figures = int(words[words.index("significant") - 1])
    whole, _, fraction = x.partition(".")
    digits = [int(digit) for digit in whole + fraction]
    start = next(place for place, digit in enumerate(digits) if digit)
    kept = int("".join(map(str, digits[start : start + figures])))
    kept += digits[start + figures] >= 5
    shift = start + figures - len(whole)  # decimal places of what was kept
    right = str(kept).zfill(shift + 1)
    right = f"{right[:-shift]}.{right[-shift:]}" if shift > 0 else right + "0" * -shift
    options = [line[3:] for line in example.prompt.splitlines()[1:3]]
    return options.index(right)

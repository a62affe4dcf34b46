"""Few-shot versions of a task, built as the prize's organisers built theirs (README of the data release)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from branchmix.errors import DataError
from branchmix.scaling.examples import Example

SEPARATOR = "\n\n\n"


def fewshot(examples: Sequence[Example], shots: int, seed: int) -> list[Example]:
    """Put ``shots`` other examples with their right answers before each prompt, three newlines between them.

    They are sampled without replacement from all other examples, anew for each prompt and depending on nothing but
    the seed and the example's place, so that a run on the first few examples sees the same prompts as one on all.

    Raises:
        DataError: there are not enough other examples.
    """
    if shots == 0:
        return list(examples)
    if shots >= len(examples):
        raise DataError(f"{shots} shots need {shots + 1} examples at least, and there are {len(examples)}")
    with_shots = []
    for number, example in enumerate(examples):
        sampled = random.Random(f"fewshot/{seed}/{number}").sample(range(len(examples) - 1), shots)
        shown = [examples[place + (place >= number)] for place in sampled]  # all places but its own
        before = [one.prompt + one.answer for one in shown]
        other = example.other_prompt
        if other is not None:
            other = SEPARATOR.join([*before, other])
        with_shots.append(replace(example, prompt=SEPARATOR.join([*before, example.prompt]), other_prompt=other))
    return with_shots

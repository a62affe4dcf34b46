"""Fresh examples of the 11 tasks, in our own words: as many as asked, the same for the same seed.

Tests solve 10,000 examples of each task from the text alone and in another way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from branchmix.checkpoint.folder import require_new_file, write_text
from branchmix.errors import OutputError, RecipeError
from branchmix.scaling.examples import Example, fewshot, jsonl
from branchmix.scaling.generate.generators import GENERATORS, modus_tollens
from branchmix.scaling.official import check
from branchmix.scaling.tasks import TASKS, Task

GENERATED_ROUND = 0
"""``round`` of our examples: the prize had rounds 1 and 2."""
_MAX_DRAWS = 1000
"""Draws of one example until its prompt is new."""


def make_data(
    folder: Path, *, tasks: Sequence[Task] = tuple(TASKS.values()), force: bool = False, **options: Any
) -> Iterator[Path]:
    """Write a file of each task under its official name, and yield it once it is there.

    ``force`` replaces files of these names; official ones are never replaced. ``options`` are those of
    ``make_examples``, which raises RecipeError.

    Raises:
        OutputError: a file is there already, or the folder cannot be written.
    """
    for task in tasks:
        path = folder / task.file
        require_new_file(path, force=force)
        if path.exists() and check(path, task).state == "ok":
            raise OutputError(f"{path}: is the official file, which is not replaced: choose another folder")
    for task in tasks:
        write_text(folder / task.file, jsonl(make_examples(task, **options)).decode("ascii"))
        yield folder / task.file


def make_examples(
    task: Task, *, seed: int, num_examples: int = 1000, shots: int = 0, controls: bool = False
) -> list[Example]:
    """Examples of a task: unique prompts, and each place among the classes right equally often (to within one).

    Example number n depends on nothing but the seed and those before it, so fewer examples are the first of more.

    Args:
        task: one of the 11.
        seed: of the random numbers.
        num_examples: how many.
        shots: further examples before each prompt, the official way; ignored for tasks that have theirs by nature.
        controls: make every other pair of modus-tollens' examples an argument that is *not* correct. Officially its
            answer is always Yes, so that a model which always says Yes does perfectly.

    Raises:
        RecipeError: the numbers cannot be meant.
    """
    if shots >= num_examples:
        raise RecipeError(f"--shots {shots}: needs {shots + 1} examples at least, and --num is {num_examples}")
    made: dict[str, Example] = {}
    for number in range(num_examples):
        is_control = controls and task.name == "modus-tollens" and number % 4 >= 2
        make = partial(modus_tollens, is_correct=False) if is_control else GENERATORS[task.name]
        random = Random(f"{task.name}/{seed}/{number}")
        drawn = (make(random, number) for _ in range(_MAX_DRAWS))
        example = next((one for one in drawn if one.prompt not in made and not _is_nested(one.classes)), None)
        if example is None:
            raise RecipeError(f"--num: there are no more than {len(made)} different examples of {task.name}")
        made[example.prompt] = replace(example, round=GENERATED_ROUND)
    examples = list(made.values())
    return examples if task.shots_in_prompt else fewshot(examples, shots, seed)


def _is_nested(classes: Sequence[str]) -> bool:
    """Whether a class begins another, so that its probability holds the other's."""
    return any(a != b and a.startswith(b) for a in classes for b in classes)

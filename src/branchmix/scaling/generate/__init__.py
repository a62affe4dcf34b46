"""Fresh examples of the 11 tasks, in our own words: as many as asked, the same for the same seed, each answer checked.

Each module makes one task: ``make(random, number)`` gives an example, whose number sets which answer is right, and
``solve(example)`` finds the answer from the text alone and in another way. An example is written only if both agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from branchmix.checkpoint.folder import require_new_file, write_text
from branchmix.errors import OutputError, RecipeError
from branchmix.scaling.examples import Example, jsonl
from branchmix.scaling.fewshot import fewshot
from branchmix.scaling.generate import modus_tollens
from branchmix.scaling.official import check
from branchmix.scaling.tasks import TASKS, Task

GENERATED_ROUND = 0
"""``round`` of our examples: the prize had rounds 1 and 2."""
_MAX_DRAWS = 1000
"""Draws of one example until its prompt is new."""


GENERATORS: dict[str, Any] = {task: import_module(f"{__name__}.{task.replace('-', '_')}") for task in TASKS}


def make_data(
    folder: Path,
    *,
    seed: int,
    num_examples: int = 1000,
    tasks: Sequence[Task] = tuple(TASKS.values()),
    shots: int = 0,
    controls: bool = False,
    force: bool = False,
) -> Iterator[Path]:
    """Write a file of each task under its official name, and yield it once it is there.

    Args:
        shots: further examples before each prompt, of tasks whose prompts have none by nature.
        controls: see ``make_examples``.
        force: replace files of these names; official ones are never replaced.

    Raises:
        OutputError: a file is there already, or the folder cannot be written.
        RecipeError: the numbers cannot be meant.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file: choose a folder")
    for task in tasks:
        path = folder / task.file
        require_new_file(path, force=force)
        if path.exists() and check(path, task).state == "ok":
            raise OutputError(f"{path}: is the official file, which is not replaced: choose another folder")
    for task in tasks:
        path = folder / task.file
        examples = make_examples(task, seed=seed, num_examples=num_examples, shots=shots, controls=controls)
        write_text(path, jsonl(examples).decode("ascii"))
        yield path


def make_examples(task: Task, *, seed: int, num_examples: int, shots: int = 0, controls: bool = False) -> list[Example]:
    """Examples of a task: unique prompts, and each place among the classes right equally often (to within one).

    Example number n depends on nothing but the seed and those before it, so fewer examples are the first of more.

    Args:
        shots: further examples before each prompt, the official way; ignored for tasks that have theirs by nature.
        controls: make every other pair of modus-tollens' examples an argument that is *not* correct. Officially its
            answer is always Yes, so that a model which always says Yes does perfectly.
    """
    if num_examples < 1 or shots < 0:
        raise RecipeError(f"--num {num_examples} --shots {shots}: one example at least, and no negative shots")
    if shots >= num_examples:
        raise RecipeError(f"--shots {shots}: needs {shots + 1} examples at least, and --num is {num_examples}")
    generator = GENERATORS[task.name]
    prompts: set[str] = set()
    examples = []
    for number in range(num_examples):
        is_control = controls and task.name == "modus-tollens" and number % 4 >= 2
        make = modus_tollens.make_control if is_control else generator.make
        example = _new(make, f"{task.name}/{seed}/{number}", number, prompts)
        solved = generator.solve(example)
        wanted = example.answer_index if example.classes else example.completion
        assert solved == wanted, f"{task.name} {number}: made with answer {wanted!r}, solved as {solved!r}"
        prompts.add(example.prompt)
        examples.append(replace(example, round=GENERATED_ROUND))
    return examples if task.shots_in_prompt else fewshot(examples, shots, seed)


def _new(make: Callable[[Random, int], Example], seed: str, number: int, prompts: set[str]) -> Example:
    """An example whose prompt is not among ``prompts``, and none of whose classes begins another."""
    random = Random(seed)
    for _ in range(_MAX_DRAWS):
        example = make(random, number)
        nested = any(a != b and a.startswith(b) for a in example.classes for b in example.classes)
        if example.prompt not in prompts and not nested:
            return example
    raise RecipeError(f"--num: there are no more than {len(prompts)} different examples of {seed.split('/')[0]}")

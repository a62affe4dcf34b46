"""The 11 tasks of "Inverse Scaling: When Bigger Isn't Better" (arXiv 2306.09479), and tasks that users add.

The files are not part of the package: ``official.py`` fetches and verifies them, ``generate`` makes new ones.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.names import is_file_name
from branchmix.errors import DataError, RecipeError
from branchmix.scaling.examples import Example, Metric, load_examples
from branchmix.settings import Settings, parse, read_yaml

__all__ = ["CAUSES", "TASKS", "Example", "Task", "UserTask", "choose", "data_file", "load_examples"]

Cause = Literal["strong prior", "unwanted imitation", "distractor", "spurious few-shot"]
CAUSES: dict[Cause, str] = {
    "strong prior": "The model follows what it has learnt by heart instead of what the prompt says.",
    "unwanted imitation": "The model imitates mistakes that are common in the text it has learnt from.",
    "distractor": "The model does an easier task that resembles the one asked for.",
    "spurious few-shot": "The model picks up a pattern of the examples in the prompt that misleads it.",
}
"""Why larger models may do worse, in the paper's four groups."""


@dataclass(frozen=True)
class Task:
    """What is scored, and how."""

    name: str
    metric: Metric
    description: str
    """Two sentences: what it tests, and why larger models may fail."""
    cause: str | None = None
    round: int | None = None
    """Of the prize, in which the released version was submitted."""
    stem: str | None = None
    """Of the file's name in the release."""
    num_examples: int | None = None
    bytes: int | None = None
    sha256: str | None = None
    shots_in_prompt: bool = False
    """Its prompts are few-shot by nature: no further examples are put before them."""

    @property
    def file(self) -> str:
        """Name of its file in the release, and of those we make."""
        return f"{self.stem or self.name}.jsonl"


def _official(
    name: str,
    cause: Cause,
    round: int,
    num_examples: int | None,
    bytes: int,
    sha256: str,
    description: str,
    *,
    metric: Metric = "classification",
    shots_in_prompt: bool = False,
) -> Task:
    stem = f"{name}_{'sequence-probability' if metric == 'sequence_prob' else metric}"
    return Task(name, metric, description, cause, round, stem, num_examples, bytes, sha256, shots_in_prompt)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _official(
            "resisting-correction",
            "strong prior",
            2,
            7344,
            3572356,
            "0c2720f095a4272e6b1462fe774704c57db0f124c4b68f35747d76e79e5352f6",
            "The model is asked to repeat a sentence exactly, though a word of it is wrong. Larger models know better "
            "what the sentence should say, and may put it right instead of repeating it.",
            shots_in_prompt=True,
        ),
        _official(
            "memo-trap",
            "strong prior",
            2,
            936,
            165763,
            "f09aac90bf841f2eb899d23beed8c8ccad2e1d3ab4f0fd3f1ff403fd5c7e11f2",
            "The model is asked to end the beginning of a famous line with another word than the one everybody knows. "
            "Larger models know more lines by heart, and may fall into reciting them.",
        ),
        _official(
            "redefine",
            "strong prior",
            2,
            1244,
            202277,
            "4ca8573039b0f943ea773d258cea3f937a8429cf0f6f0f060c281fd8eb6d5c7c",
            "A symbol or a word is given a new meaning, and a question is asked that depends on it. Larger models are "
            "surer of the usual meaning, and may answer with that.",
        ),
        _official(
            "prompt-injection",
            "strong prior",
            2,
            None,  # not known from a source
            863354,
            "0c8e7342a256e5ff53913e83c7477f57d5b776d77fbab2aef473e92054773e21",
            "The model is asked to copy sentences with a capital letter and to obey none of them, and then one of them "
            "is a command. Larger models are better at following commands, and may obey the wrong one.",
            metric="sequence_prob",
        ),
        _official(
            "modus-tollens",
            "unwanted imitation",
            2,
            1236,
            426022,
            "fdf82374d7e401902f25303428678d3b540031ec81c7a7078cb3d7f346314a7d",
            'The model is asked whether a conclusion of the form "if A then B; not B; so not A" is correct, which it '
            "always is. People often get this wrong, and larger models may imitate their mistake.",
        ),
        _official(
            "pattern-matching-suppression",
            "distractor",
            2,
            1428,
            338768,
            "29ff41ccc2592ecd19c8bdf8e632a394314cb7d84d21e668d9060070d95fdad0",
            "The model is asked to break a simple repeating pattern at its end. Continuing the pattern is the easier "
            "task, which larger models do better, and they may do it unasked.",
        ),
        _official(
            "neqa",
            "distractor",
            1,
            300,
            84046,
            "50ca9dca517dcd7fcdbb6d7f750fbbdade2142c0ac2da2bd196dc27464b464e6",
            'The model answers questions about common sense that were turned around by a word such as "not". Larger '
            "models know the answer of the question without that word, and may give it.",
        ),
        _official(
            "sig-figs",
            "distractor",
            2,
            20897,
            15047173,
            "19ca4afdd2b5d0fb2608097cf747b5a4105038ea2183750796c8bf57f23e7448",
            "The model rounds a number to so many significant figures, and one of the choices is rounded to so many "
            "decimal places. Larger models can do the easier rounding, and may take it for the one asked for.",
        ),
        _official(
            "into-the-unknown",
            "distractor",
            2,
            1824,
            1012764,
            "74b5e1aca9e4aeedd2b6ce1686d0e5ee9cd380509d65bca37cad1ebebaecf51d",
            "The model chooses which of two pieces of information would help to answer a question, one of which only "
            "repeats what is known. Larger models see better which one fits the story, and may choose the repetition.",
        ),
        _official(
            "hindsight-neglect",
            "spurious few-shot",
            1,
            315,
            953341,
            "1539e144e20c760cd70980ca012d3d75744b59385bdf78cffc4d02560c4b3686",
            "The model judges whether a bet was worth taking, after ten examples in which good bets happened to be won "
            "and bad ones lost; then luck goes the other way. Larger models may learn from the examples to judge by "
            "the outcome instead of by the odds.",
            shots_in_prompt=True,
        ),
        _official(
            "repetitive-algebra",
            "spurious few-shot",
            2,
            1000,
            740039,
            "c2496c285bfef9e8da82dd28026aeb35f834da1c20ea410540c82698526428f3",
            "The model solves a small equation after many examples with the same answer and a last one with another, "
            "and the answer is that of the many. Larger models may copy the last example's answer instead of solving "
            "the equation.",
            shots_in_prompt=True,
        ),
    )
}
"""The tasks that won a prize, by name; sizes and hashes are those of the released files."""


class UserTask(Settings):
    """A task of one's own: a YAML file beside its examples."""

    name: str
    """Small letters, digits and hyphens."""
    metric: Metric = "classification"
    """``classification`` (accuracy and loss over classes), ``sequence_prob`` (loss of one text), ``logodds`` or
    ``absolute_logodds`` (how a change of the prompt moves the odds of two classes)."""
    data: str
    """The examples: a ``.jsonl`` or ``.csv`` file, from the YAML file's folder."""
    cause: Cause | None = None
    """Group that the task is shown in."""
    description: str = Field(default="", max_length=1000)
    """What the task tests, for readers of the page."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not (re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) and is_file_name(name)):
            raise ValueError(f"may have small letters, digits and hyphens only, got {name!r}")
        if name in TASKS:
            raise ValueError(f"{name!r} is one of the 11 official tasks: choose another name")
        return name

    @classmethod
    def load(cls, path: Path) -> tuple[Task, Path]:
        """The task of a YAML file, and where its examples are.

        Raises:
            RecipeError: the file is missing, no YAML, or does not make sense.
            DataError: its ``data`` is no ``.jsonl`` or ``.csv`` file that is there.
        """
        found: UserTask = parse(cls, read_yaml(path), str(path))
        data = path.parent / found.data
        if data.suffix.lower() not in (".jsonl", ".csv") or not os.path.isfile(data):  # noqa: PTH113 (that of pathlib raises for long names)
            raise DataError(f"{path}: data: {data} is no .jsonl or .csv file that is there")
        return Task(found.name, found.metric, found.description, found.cause), data


def choose(names: str) -> list[Task]:
    """The official tasks that ``all`` or ``memo-trap,neqa`` means, in the paper's order.

    Raises:
        RecipeError: a name is none of the 11; says the nearest.
    """
    if names.strip() == "all":
        return list(TASKS.values())
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise RecipeError(f"tasks: none is named in {names!r}: give all, or some of {', '.join(TASKS)}")
    for name in wanted:
        if name not in TASKS:
            raise RecipeError(
                f"tasks: there is no task {name!r}{nearest(name, list(TASKS))}; known: {', '.join(TASKS)}"
            )
    return [task for task in TASKS.values() if task.name in wanted]


def data_file(folder: Path, task: Task) -> Path:
    """Where a task's examples are in a folder: its official name as ``.jsonl``, or the same as ``.csv``.

    Raises:
        DataError: it has neither.
    """
    places = [folder / task.file, (folder / task.file).with_suffix(".csv")]
    for place in places:
        if place.is_file():
            return place
    raise DataError(f"{folder}: has no {task.file}: `branchmix scaling data fetch` or `data make` puts it there")

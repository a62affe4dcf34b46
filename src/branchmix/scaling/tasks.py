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
from branchmix.checkpoint.folder import is_file_name
from branchmix.errors import DataError, RecipeError
from branchmix.scaling.examples import Metric
from branchmix.settings import Settings, parse, read_yaml

Cause = Literal["strong prior", "unwanted imitation", "distractor", "spurious few-shot"]
CAUSES: dict[str, str] = {
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
    """Round of the prize in which the released version was submitted."""
    num_examples: int | None = None
    bytes: int | None = None
    sha256: str | None = None
    shots_in_prompt: bool = False
    """Its prompts are few-shot by nature: no further examples are put before them."""

    @property
    def file(self) -> str:
        """Name of an official task's file in the release, and of those we make."""
        kind = "sequence-probability" if self.metric == "sequence_prob" else self.metric
        return f"{self.name}_{kind}.jsonl"


TASKS = {
    name: Task(name=name, **{"metric": "classification", **facts})
    for name, facts in read_yaml(Path(__file__).with_suffix(".yaml")).items()
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
            DataError: its ``data`` is not a ``.jsonl`` or ``.csv`` file that exists.
        """
        task: UserTask = parse(cls, read_yaml(path), str(path))
        data = path.parent / task.data
        if data.suffix.lower() not in (".jsonl", ".csv") or not os.path.isfile(data):  # noqa: PTH113 (that of pathlib raises for long names)
            raise DataError(f"{path}: data: {data} is not a .jsonl or .csv file that exists")
        return Task(task.name, task.metric, task.description, task.cause), data


def choose(names: str) -> list[Task]:
    """The official tasks that ``all`` or ``memo-trap,neqa`` means, in the paper's order.

    Raises:
        RecipeError: a name is not one of the 11; names the nearest.
    """
    if names.strip() == "all":
        return list(TASKS.values())
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = next((name for name in wanted or [names] if name not in TASKS), None)
    if unknown is not None:
        hint = nearest(unknown, list(TASKS))
        raise RecipeError(f"tasks: there is no task {unknown!r}{hint}; choose all, or from {', '.join(TASKS)}")
    return [task for task in TASKS.values() if task.name in wanted]

"""Which examples a run scores: tasks by name or by YAML file, from folders of official or of fresh files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from branchmix.checkpoint.text import replaced_note
from branchmix.errors import DataError, RecipeError
from branchmix.scaling.examples import Example, fewshot, load_examples
from branchmix.scaling.generate import GENERATED_ROUND
from branchmix.scaling.official import check
from branchmix.scaling.tasks import TASKS, Task, UserTask, choose

SHOTS_SEED = 0
"""Which examples come before a prompt with ``--shots``: the same for every model and run."""


@dataclass(frozen=True)
class Selected:
    """A file of examples of a task."""

    task: Task
    file: Path
    examples: list[Example]
    data: str
    """``official`` or ``fresh``, as in the table for ``branchmix scaling trends``; a user's own task is official."""
    is_release: bool | None
    """Whether it is the prize's file, byte for byte; None for other tasks and for fresh files."""
    shots: int
    num_available: int
    """Examples of the whole file."""

    @property
    def label(self) -> str:
        return self.task.name + (", fresh" if self.data == "fresh" else "")


def select(
    tasks: str,
    data: Sequence[Path],
    fresh: Sequence[Path] = (),
    *,
    shots: int = 0,
    limit: int | None = None,
) -> tuple[list[Selected], list[str]]:
    """The examples of every task, and notes on what is not as one might think.

    The arguments are the options of ``branchmix scaling run``: ``all`` tasks are those whose files exist, and a file in
    ``data`` is official or fresh by what its examples say.

    Raises:
        RecipeError: a task is unknown.
        DataError: a file is missing or broken, fresh where it must not be, or there is nothing to score.
    """
    words = [word.strip() for word in tasks.split(",") if word.strip()]
    own = [word for word in words if word.lower().endswith((".yaml", ".yml"))]
    named = [word for word in words if word not in own]
    everything = "all" in named
    official = choose("all" if everything else ",".join(named)) if named or not own else []
    folders = [*((folder, False) for folder in data), *((folder, True) for folder in fresh)]
    for folder, _ in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: there is no such folder: `branchmix scaling data make` or `fetch` fills one")
    if official and not folders:
        raise RecipeError("--data: give the folder of the tasks' files")
    chosen: list[tuple[Task, Path, bool]] = []
    missing: list[str] = []
    for task in official:
        there = []
        for folder, is_fresh in folders:
            places = (folder / task.file, (folder / task.file).with_suffix(".csv"))
            if file := next((place for place in places if place.is_file()), None):
                there.append((task, file, is_fresh))
            elif not everything:
                raise DataError(
                    f"{folder}: has no {task.file}: `branchmix scaling data fetch` or `data make` puts it there"
                )
        chosen += there
        missing += [] if there else [task.name]
    chosen += [(*UserTask.load(Path(word)), False) for word in own]
    if not chosen:
        raise DataError(f"{', '.join(map(str, (*data, *fresh)))}: has no file of any task, such as {official[0].file}")
    notes: list[str] = []
    selected = [_selected(task, file, is_fresh, shots, limit, notes) for task, file, is_fresh in chosen]
    if missing:
        notes.append(f"no files of {', '.join(missing)}: left out")
    seen: dict[tuple[str, str], Path] = {}
    for one in selected:
        other = seen.setdefault((one.task.name, one.data), one.file)
        if other is not one.file:
            raise DataError(f"{one.file} and {other}: both are {one.data} examples of {one.task.name}: leave one out")
    return selected, notes


def select_all(
    tasks: str, data: Sequence[Path], fresh: Sequence[Path] = (), *, shots: Sequence[int], limit: int | None = None
) -> tuple[list[Selected], list[str]]:
    """``select`` for several numbers of examples in the prompt, each selection once; errors are those of ``select``."""
    found: dict[tuple[str, str, int], Selected] = {}
    notes: list[str] = []
    for number in shots:
        selected, told = select(tasks, data, fresh, shots=number, limit=limit)
        for one in selected:
            found.setdefault((one.task.name, one.data, one.shots), one)
        notes += told
    return list(found.values()), list(dict.fromkeys(notes))


def _selected(task: Task, file: Path, must_be_fresh: bool, shots: int, limit: int | None, notes: list[str]) -> Selected:
    examples = load_examples(file, task.metric)
    if count := sum(example.replaced for example in examples):
        notes.append(f"{file}: {replaced_note(count, 'examples')}")
    generated = sum(example.round == GENERATED_ROUND for example in examples)
    if 0 < generated < len(examples):
        raise DataError(
            f"{file}: {generated} of {len(examples)} examples are fresh (round 0): keep them in a file apart"
        )
    if must_be_fresh and not generated:
        raise DataError(f"{file}: is not fresh, for its round is not 0: `branchmix scaling data make` makes such files")
    data = "fresh" if generated else "official"
    is_release = check(file, task).state == "ok" if task.name in TASKS and not generated else None
    if is_release is False:
        notes.append(f"{file}: is not the official file: see `branchmix scaling data verify`")
    used = 0 if task.shots_in_prompt else shots
    if shots and task.shots_in_prompt:
        notes.append(f"{task.name}: its prompts have their own shots, so --shots changes nothing there")
    shown = fewshot(examples, used, SHOTS_SEED)
    return Selected(task, file, shown[:limit], data, is_release, used, len(examples))

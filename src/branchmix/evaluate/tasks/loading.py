"""From names to lm-eval's tasks with their data and requests, before any model is loaded; and lm-eval kept quiet.

Data sets and metrics come from a local folder first, the Hub otherwise.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import evaluate
import lm_eval.api.metrics
import lm_eval.api.task
import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind, TaskIndex

from branchmix.checkpoint.families import nearest
from branchmix.data.sources import refuse_pointers
from branchmix.errors import BranchMixError, DataError, RecipeError
from branchmix.evaluate.tasks.options import EVERYTHING, SUITES, TaskOptions
from branchmix.likelihood.models import Progress

DEFINITIONS = Path(__file__).parent / "definitions"
"""Our own task files, for what the suites need and lm-eval does not have."""
_CODE_SWITCH = "HF_ALLOW_CODE_EVAL"


def load(
    options: TaskOptions, failed: Sequence[DataError], *, limit: int | None, progress: Progress | None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Every task that ``options`` names, with its data set and all its requests, as lm-eval's ``evaluate`` takes them.

    Returns notes for the user with them. ``failed`` is filled with what cannot be loaded while this works (see
    ``sources``); a task has at most ``limit`` examples.

    Raises:
        RecipeError: a name is unknown, a task runs code without leave, or its definition makes no sense.
        DataError: a data set cannot be loaded.
    """
    say = progress or (lambda step, done, total: None)
    shots = {m["task"]: m["num_fewshot"] for suite in options.suites.values() for m in suite["members"]}
    plain = [name for name in options.names if name not in SUITES and name != EVERYTHING]
    manager = _manager([*shots, *plain], options.include_path, say)
    named = dict.fromkeys(name for given in plain for name in _matching(given, manager.task_index))
    _refuse_code([*shots, *named], manager.task_index, options)
    tasks, groups, notes = dict[str, Any](), dict[str, Any](), list[str]()
    fewshot: dict[str, int] = {}
    wanted: list[tuple[str, int | None]] = [*shots.items(), *((name, None) for name in named)]
    for number, (name, of_suite) in enumerate(wanted, start=1):
        try:
            with _one_line(name):
                of_name = manager.load([name])
        finally:
            if failed:
                raise failed[0]
        for task_name, task in of_name["tasks"].items():
            num_fewshot = _num_fewshot(task, of_suite, options, notes)
            if fewshot.setdefault(task_name, num_fewshot) != num_fewshot:
                raise RecipeError(
                    f"tasks: {task_name} is listed twice, with {fewshot[task_name]} and with {num_fewshot} examples in "
                    "the prompt: evaluate them one after the other, or give --num-fewshot"
                )
            tasks[task_name] = task
        groups |= of_name.get("groups", {})
        say("tasks and their data", number, len(wanted))
    for name, task in tasks.items():
        say(f"requests of {name}", 0, 1)
        _build(name, task, fewshot[name], limit, options)
        say(f"requests of {name}", 1, 1)
    return {"tasks": tasks, "groups": groups}, notes


# ---- names ----


def _manager(names: Sequence[str], include_path: Sequence[Path], say: Progress) -> TaskManager:
    """lm-eval's task manager. Its 14,000 task files take seconds to read, so the given folders are tried first."""
    folders = [str(folder) for folder in (DEFINITIONS, *include_path)]
    manager = TaskManager(include_defaults=False, include_path=folders)
    if not all(_is_file(name) or _complete(name, manager.task_index) for name in names):
        say("lm-eval's list of tasks", 0, 1)
        manager = TaskManager(include_path=folders)
        say("lm-eval's list of tasks", 1, 1)
    return manager


def _complete(name: str, index: dict[str, Any]) -> bool:
    return name in index and all(_complete(child, index) for child in _children(index[name]))


def _children(entry: Any) -> list[str]:
    """Names below a group or tag, without tasks that the group defines itself."""
    if entry.kind is Kind.TAG:
        return sorted(entry.tags)
    if entry.kind is not Kind.GROUP or not isinstance(entry.cfg.get("task"), list):
        return []
    children = [item if isinstance(item, str) else item.get("task", item.get("group")) for item in entry.cfg["task"]]
    return [child for child in children if isinstance(child, str)]


def _is_file(name: str) -> bool:
    return Path(name).suffix.lower() in (".yaml", ".yml") and Path(name).is_file()


def _matching(given: str, index: dict[str, Any]) -> list[str]:
    if given in index or _is_file(given):
        return [given]
    if any(letter in given for letter in "*?["):
        if matching := sorted(name for name in index if fnmatch(name, given)):
            return matching
        raise RecipeError(f"tasks: no task's name fits {given!r}")
    known = [*index, *SUITES, EVERYTHING]
    raise RecipeError(f"tasks: {given!r} is neither a task, group or tag of lm-eval nor a suite{nearest(given, known)}")


def _refuse_code(names: Sequence[str], index: dict[str, Any], options: TaskOptions) -> None:
    if unsafe := {task for name in names for task in _tasks_with_code(name, index)}:
        options.refuse_code(sorted(unsafe))


def _tasks_with_code(name: str, index: dict[str, Any]) -> Iterator[str]:
    with _one_line(name):
        entry = index.get(name) or TaskIndex.entry_from_path(Path(name))
    if entry is not None and entry.kind in (Kind.GROUP, Kind.TAG):
        for child in _children(entry):
            yield from _tasks_with_code(child, index)
    elif entry is not None and (entry.cfg or {}).get("unsafe_code"):
        yield entry.name


# ---- tasks ----


def _num_fewshot(task: Any, of_suite: int | None, options: TaskOptions, notes: list[str]) -> int:
    """Examples in the prompt: what the user says, else the suite, else the task; what is fixed at 0 stays there."""
    own = task.get_config("num_fewshot")
    if options.num_fewshot is not None:
        if own != 0 or options.num_fewshot == 0:
            return options.num_fewshot
        notes.append(f"{task.task_name}: lm-eval fixes it at 0 examples in the prompt; --num-fewshot is not used")
    return of_suite if of_suite is not None else int(own or 0)


def _build(name: str, task: Any, num_fewshot: int, limit: int | None, options: TaskOptions) -> None:
    """The requests of a task, which are the same for every model: built once, and handed out afresh each time."""
    if getattr(task, "MULTIMODAL", False):
        raise RecipeError(f"tasks: {name}: needs images or sound, and only language models are evaluated here")
    if getattr(task, "UNSAFE_CODE", False):
        options.refuse_code([name])
    task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    with _one_line(name):
        task.build_all_requests(limit=limit, rank=0, world_size=1)

    def afresh(**_: Any) -> None:
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}

    task.build_all_requests = afresh


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Whatever lm-eval and the task's own code raise inside, as the one line that a user sees."""
    try:
        yield
    except BranchMixError:
        raise
    except Exception as error:
        lacks = isinstance(error, ModuleNotFoundError)
        what = "needs a package that is not installed" if lacks else "lm-eval cannot make a task of it"
        raise RecipeError(f"tasks: {name}: {what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """What an error says, as far as it fits into one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


# ---- where lm-eval works ----


@contextmanager
def sources(task_data: Path | None, *, allow_code_execution: bool) -> Iterator[list[DataError]]:
    """Inside the block ``datasets`` and ``evaluate`` look into ``task_data`` before they ask the Hub.

    It holds data sets as ``ORG/NAME`` or ``NAME``, and metrics as ``evaluate-metric/NAME`` or ``NAME``. Yields what
    could not be loaded so far: lm-eval passes over a metric that it does not find.
    """
    load_dataset, load_metric = datasets.load_dataset, evaluate.load
    failed: list[DataError] = []
    check = "check the network and HF_HUB_OFFLINE, or give --task-data a folder with"

    def local(path: str, name: str | None = None, *args: Any, **options: Any) -> Any:
        copy, where, config = _below(task_data, path), path, name
        what = f"{path} ({name})" if name else path
        if copy is not None:
            where = str(copy)
            # A copy of a Hub repository has its configurations in its README.
            if name is not None and not (copy / "README.md").is_file():
                where, config = str(copy / name if (copy / name).is_dir() else copy), None
            refuse_pointers(Path(where))
        try:
            return load_dataset(where, config, *args, **options)
        except Exception as error:  # of the network, of pyarrow, of the Hub's client
            unread = f"{where}: the data set {what} cannot be read: {_first_line(error)}"
            unfound = f"the data set {what} cannot be loaded: {_first_line(error)}: {check} {path} in it"
            raise DataError(unfound if copy is None else unread) from error

    def local_metric(path: str, *args: Any, **options: Any) -> Any:
        name = f"evaluate-metric/{path}"
        copy = _below(task_data, name)
        try:
            return load_metric(path if copy is None else str(copy / f"{copy.name}.py"), *args, **options)
        except Exception as error:
            failed.append(DataError(f"the metric {path} cannot be loaded: {_first_line(error)}: {check} {name} in it"))
            raise failed[-1] from error

    with (
        mock.patch.object(datasets, "load_dataset", local),
        mock.patch.object(evaluate, "load", local_metric),
        mock.patch.dict(os.environ, {_CODE_SWITCH: "1" if allow_code_execution else "0"}),
    ):
        yield failed


def _below(folder: Path | None, path: str) -> Path | None:
    """The local copy of what the Hub calls ``path``."""
    if folder is None or Path(path).is_absolute() or path.startswith("."):
        return None
    return next((copy for copy in (folder / path, folder / Path(path).name) if copy.is_dir()), None)


@contextmanager
def quiet() -> Iterator[None]:
    """Logs and progress bars of lm-eval and of the Hub's client have no place between our lines.

    What a task prints goes to stderr.
    """
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels, bars = [logger.level for logger in loggers], datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    with (
        mock.patch.object(lm_eval.api.task, "tqdm", lambda items, **_: items),
        mock.patch.object(lm_eval.api.metrics, "bootstrap_stderr", _bootstrap_stderr),
        redirect_stdout(sys.stderr),
    ):
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if not bars:
                datasets.enable_progress_bars()


def _bootstrap_stderr(metric: Any, values: Any, iters: int) -> float:
    """lm-eval's own numbers, draw by draw, without its prints and without forking a process full of threads."""
    from lm_eval.api.metrics import _bootstrap_internal, sample_stddev

    chunk = min(1000, iters)
    drawn = [value for seed in range(iters // chunk) for value in _bootstrap_internal(metric, chunk)((seed, values))]
    return float(sample_stddev(drawn))


@contextmanager
def seeded() -> Iterator[None]:
    """lm-eval's seeds inside the block, and the generators as they were after it."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.random.manual_seed(DEFAULT_OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])

"""The folder of a run: whether it holds this run or another one, and what a run writes into it.

During a run it holds ``run.json`` (the settings, and what was fixed at the start), ``metrics.jsonl`` and
``checkpoints/``; after it, the model, ``training.json`` and ``metrics.jsonl``. ``checkpoints/step-00000120/`` holds the
model as ``save_pretrained`` writes it, and in ``training/`` what a run needs to resume; ``training/files.json`` lists
all files with their sizes. All processes of a run must see the same file system. This module does not import torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from branchmix.checkpoint.companions import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TEMPLATES, TOKENIZER_FILES
from branchmix.checkpoint.folder import (
    fsync_path,
    in_order_of_removal,
    locked,
    require_name,
    require_writable_parent,
    writing,
)
from branchmix.checkpoint.json_text import read_object
from branchmix.errors import BranchMixError, OutputError
from branchmix.pages.numbers import too_little_space
from branchmix.settings import parse
from branchmix.train.config import RunConfig

RUN, DONE, CHECKPOINTS = "run.json", "training.json", "checkpoints"
RESULTS = ("config.json", ADAPTER_CONFIG)
AVERAGE = ".ema"
"""Folder of the moving average until the result is complete."""
LOCK = ".lock"
COMPANIONS = {"run.yaml", "log.txt", LOCK}
"""Files that ``branchmix branch`` writes here for a run. They do not make the folder a run's, and starting over keeps
them."""
OURS = (
    *(RUN, DONE, CHECKPOINTS, AVERAGE, "metrics.jsonl", "metrics.tmp", "ema", ".model.part", "tensorboard", "wandb"),
    *(f".{RUN}.*", f".{DONE}.*", ".metrics.jsonl.*", "config.json", "generation_config.json", ADAPTER_CONFIG),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", ADAPTER_WEIGHTS),
    *TOKENIZER_FILES,
    TEMPLATES,
)
"""Names of what a run and its loggers write. Starting over removes these only, and no other files in the folder."""

FREE_TO_CHANGE = {
    *("out", "checkpoints", "evaluation", "logging", "parallel", "threads", "micro_batch_size"),
    *("gradient_checkpointing", "trust_remote_code"),
}
"""Settings that may change when resuming: they do not change the result, up to rounding."""

TRAINING = "training"
"""Folder inside a checkpoint."""
FILES = f"{TRAINING}/files.json"
LAST = (ADAPTER_CONFIG, "config.json", "training.json")
"""Files by which others recognise a model and a finished run, so they are moved last."""

State = Literal["new", "unfinished", "finished"]


def is_main_process() -> bool:
    """Whether this process reports for the run and writes into its folder, among those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class RunReport:
    """What ``train`` did, or would do."""

    out: Path
    status: Literal["trained", "finished before", "stopped", "dry run"]
    record: dict[str, Any]
    """``training.json``; after a dry run the plan."""
    signal: int | None = None
    """The signal that stopped it; the same command resumes from its last checkpoint."""


class RunFolder:
    """``out`` of a run, before, while and after it."""

    def __init__(self, config: RunConfig):
        path = Path(config.out).expanduser()
        self.path = path if path.is_absolute() else config.folder / path
        self.checkpoints = self.path / CHECKPOINTS

    def look(self, config: RunConfig, *, force: bool) -> State:
        """Say whether the run is new, unfinished or finished. With ``force``, any run in the folder is ignored.

        Raises:
            OutputError: it is not the folder of a run, or it holds a run with different settings.
        """
        require_name(self.path)
        if not self.path.exists():
            require_writable_parent(self.path)
            return "new"
        if not self.path.is_dir():
            raise OutputError(f"{self.path}: is a file: choose a folder that does not exist yet")
        record = self.record()
        if record is None:
            if any(entry.name not in COMPANIONS for entry in self.path.iterdir()):
                raise OutputError(f"{self.path}: exists, but is not the folder of a run: choose another")
            return "new"
        if force:
            return "new"
        difference = _difference(record, config)
        if difference:
            raise OutputError(
                f"{self.path}: holds a run with {difference}: choose another folder, or start over with --force"
            )
        return "unfinished" if result_of(self.path) is None else "finished"

    def record(self) -> dict[str, Any] | None:
        """Content of ``training.json`` or ``run.json``; None if the folder is not a run's."""
        for name in (DONE, RUN):
            record = read_object(self.path / name)
            # Other programs have files of these names too.
            if record is not None and isinstance(record.get("config"), dict) and "data" in record["config"]:
                return record
        return None

    def clear(self) -> None:
        """Remove what a run wrote, if the folder is a run's. Call ``look`` first."""
        if self.path.exists() and self.record() is not None:
            with writing(self.path):
                for entry in in_order_of_removal(self._ours(), last=(RUN, DONE)):
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    else:
                        entry.unlink()

    def _ours(self) -> list[Path]:
        return [entry for entry in self.path.iterdir() if any(fnmatch(entry.name, name) for name in OURS)]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the folder against other runs inside the block. The system releases the lock if the process dies.

        Raises:
            OutputError: another process holds the lock, or the folder cannot be written.
        """
        with locked(self.path / LOCK, wait=0) as held:
            if not held:
                raise OutputError(
                    f"{self.path}: another process is training here: wait until it ends, or choose another folder (if "
                    f"no process is running, remove {LOCK} there)"
                )
            try:
                yield
            finally:
                if (self.path / DONE).is_file():
                    (self.path / LOCK).unlink(missing_ok=True)

    def clean_up(self) -> None:
        """Remove what only an unfinished run needs."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        shutil.rmtree(self.path / AVERAGE, ignore_errors=True)
        (self.path / RUN).unlink(missing_ok=True)

    def require_space(self, num_bytes: int) -> None:
        """Refuse, before writing, what does not fit on the disk.

        Raises:
            OutputError: with bytes needed and free.
        """
        place = self.path.absolute()
        free = shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists())).free
        if self.path.is_dir() and self.record() is not None:  # what is there already makes room for what replaces it
            files = (file for entry in self._ours() for file in (entry, *entry.rglob("*")))
            free += sum(file.stat().st_size for file in files if file.is_file())
        if num_bytes > free:
            raise OutputError(
                f"{self.path}: checkpoints and result need {too_little_space(num_bytes, free)}: make room, "
                "lower checkpoints.keep, or choose a folder on another disk"
            )


def result_of(folder: Path) -> dict[str, Any] | None:
    """``training.json`` of a finished run; None if the run is not finished."""
    return read_object(folder / DONE) if any((folder / name).is_file() for name in RESULTS) else None


def _difference(record: dict[str, Any], config: RunConfig) -> str | None:
    """The first setting in which a run on disk differs from this one, with both values."""
    try:
        theirs = parse(RunConfig, record["config"], RUN).model_dump(mode="json")
    except BranchMixError:
        return "settings that this version of branchmix does not know"
    return _first_difference(theirs, config.model_dump(mode="json"), "")


def _first_difference(theirs: Any, ours: Any, path: str) -> str | None:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        inner = [(f"{path}{key}", theirs.get(key), ours.get(key)) for key in {**theirs, **ours}]
        differences = (_first_difference(a, b, f"{place}.") for place, a, b in inner if place not in FREE_TO_CHANGE)
        return next(filter(None, differences), None)
    return None if theirs == ours else f"{path[:-1]} {json.dumps(theirs)} instead of {json.dumps(ours)}"


# ---- Checkpoints: written under a temporary name, renamed when complete, and checked before use ----


def latest_checkpoint(folder: Path, *, notice: Callable[[str], None] = lambda line: None) -> Path | None:
    """The newest complete checkpoint in ``folder``, which need not exist, or None.

    Damaged checkpoints are skipped with a ``notice`` of one line; unfinished ones of killed writers are ignored.
    """
    for _, checkpoint in sorted(_by_step(folder).items(), reverse=True):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        notice(f"note: {checkpoint}: {problem}, so it is not used")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, by names and sizes of its files; None if it is complete."""
    sizes = read_object(checkpoint / FILES)
    if sizes is None:
        return f"{FILES} is missing or unreadable"
    for name, size in sizes.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if (actual := (checkpoint / name).stat().st_size) != size:
            return f"{name} has {actual:,} bytes instead of {size:,}"
    return None


def checkpoint_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(checkpoint.name.removeprefix("step-"))


def part_of(target: Path) -> Path:
    """Temporary path of a checkpoint until it is complete; the same on all processes."""
    return target.with_name(f".{target.name}.part")


def start_checkpoint(target: Path, *, num_bytes: int) -> None:
    """Make an empty folder for ``target``, and remove the leftovers of killed runs.

    Raises:
        OutputError: less than ``num_bytes`` are free.
        OSError: the folder cannot be created.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(".step-*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(target.parent).free
    if num_bytes > free:
        raise OutputError(f"a checkpoint needs {too_little_space(num_bytes, free)}")
    part_of(target).mkdir()
    (part_of(target) / TRAINING).mkdir()


def complete_checkpoint(target: Path) -> None:
    """List and sync the files written, and move the checkpoint to its final name."""
    part = part_of(target)
    files = sorted(path for path in part.rglob("*") if path.is_file())
    sizes = {str(file.relative_to(part)): file.stat().st_size for file in files}
    (part / FILES).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    fsync(part)
    if target.exists():  # damaged, and rewritten by a run that resumed from an earlier one
        shutil.rmtree(target)
    part.rename(target)
    fsync_path(target.parent)


def remove_others(target: Path, *, keep: int) -> None:
    """Keep the newest ``keep`` checkpoints up to ``target``; later ones belong to a run that was set back.

    One whose removal is interrupted lacks files, so it is not used (``damage``), and is removed next time.
    """
    steps = _by_step(target.parent)
    earlier = sorted(step for step in steps if step <= step_of(target))
    for step in steps.keys() - set(earlier[-keep:]):
        shutil.rmtree(steps[step], ignore_errors=True)


def publish(part: Path, out: Path) -> None:
    """Move the content of ``part`` into ``out``, file by file, the config last, and remove ``part``."""
    fsync(part)
    entries = sorted(part.iterdir(), key=lambda entry: (LAST.index(entry.name) if entry.name in LAST else -1, entry))
    for entry in entries:
        place = out / entry.name
        if entry.is_dir() and place.is_dir():
            shutil.rmtree(place)
        entry.replace(place)
    fsync_path(out)
    part.rmdir()


def fsync(folder: Path) -> None:
    """Make all files and names in ``folder`` survive a power cut."""
    for path in (*folder.rglob("*"), folder):
        fsync_path(path)


def _by_step(folder: Path) -> dict[int, Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return {step_of(path): path for path in paths if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()}

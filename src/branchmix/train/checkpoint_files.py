"""Checkpoint folders on disk: written under a temporary name, renamed when complete, and checked before use.

``OUT/checkpoints/step-00000120/`` holds the model as ``save_pretrained`` writes it, and in ``training/`` what a run
needs to resume. ``training/files.json`` lists all files with their sizes. All processes of a run must see the same file
system.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from branchmix.checkpoint.companions import ADAPTER_CONFIG
from branchmix.checkpoint.folder import fsync_folder
from branchmix.checkpoint.json_text import read_object
from branchmix.errors import OutputError
from branchmix.pages.numbers import too_little_space

TRAINING = "training"
"""Folder inside a checkpoint."""
FILES = f"{TRAINING}/files.json"
LAST = (ADAPTER_CONFIG, "config.json", "training.json")
"""Files by which others recognise a model and a finished run, so they are moved last."""


def latest_checkpoint(folder: Path, *, notice: Callable[[str], None] = lambda line: None) -> Path | None:
    """The newest complete checkpoint in ``folder``, which need not exist, or None.

    Damaged checkpoints are skipped with a ``notice`` of one line; unfinished ones of killed writers are ignored.
    """
    for _, checkpoint in sorted(_by_step(folder), reverse=True):
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
        try:
            actual = (checkpoint / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if actual != size:
            return f"{name} has {actual:,} bytes instead of {size:,}"
    return None


def checkpoint_of(folder: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def part_of(target: Path) -> Path:
    """Temporary path of a checkpoint until it is complete; the same on all processes."""
    return target.with_name(f".{target.name}.part")


def start(target: Path, *, num_bytes: int) -> None:
    """Make an empty folder for ``target``, and remove the leftovers of killed runs.

    Raises:
        OutputError: less than ``num_bytes`` are free.
        OSError: the folder cannot be created.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (*target.parent.glob(".step-*.part"), *target.parent.glob(".step-*.gone")):
        shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(target.parent).free
    if num_bytes > free:
        raise OutputError(f"a checkpoint needs {too_little_space(num_bytes, free)}")
    part_of(target).mkdir()
    (part_of(target) / TRAINING).mkdir()


def complete(target: Path) -> None:
    """List and sync the files written, and move the checkpoint to its final name."""
    part = part_of(target)
    sizes = {str(file.relative_to(part)): file.stat().st_size for file in _files(part)}
    (part / FILES).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    fsync(part)
    if target.exists():  # damaged, and rewritten by a run that resumed from an earlier one
        _remove(target)
    part.rename(target)
    fsync_folder(target.parent)


def remove_others(target: Path, *, keep: int) -> None:
    """Keep the newest ``keep`` checkpoints up to ``target``; later ones belong to a run that was set back."""
    steps = dict(_by_step(target.parent))
    earlier = sorted(step for step in steps if step <= step_of(target))
    for step in steps.keys() - set(earlier[-keep:]):
        _remove(steps[step])


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(checkpoint.name.removeprefix("step-"))


def publish(part: Path, out: Path) -> None:
    """Move the content of ``part`` into ``out``, file by file, the config last, and remove ``part``."""
    fsync(part)
    entries = sorted(part.iterdir(), key=lambda entry: (LAST.index(entry.name) if entry.name in LAST else -1, entry))
    for entry in entries:
        place = out / entry.name
        if entry.is_dir() and place.is_dir():
            shutil.rmtree(place)
        entry.replace(place)
    fsync_folder(out)
    part.rmdir()


def fsync(folder: Path) -> None:
    """Make all files and names in ``folder`` survive a power cut."""
    for file in _files(folder):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        fsync_folder(inner)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    checkpoints = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return [(step_of(path), path) for path in checkpoints]


def _remove(checkpoint: Path) -> None:
    """Rename first, so that an interrupted removal leaves nothing that looks like a checkpoint."""
    gone = checkpoint.with_name(f".{checkpoint.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(FileNotFoundError):
        checkpoint.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

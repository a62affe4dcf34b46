"""The folder of a run: whether it holds this run or another one, and what a run writes into it.

During a run it holds ``run.json`` (the settings, and what was fixed at the start), ``metrics.jsonl`` and
``checkpoints/``; after it, the model, ``training.json`` and ``metrics.jsonl``. This module does not import torch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from branchmix.checkpoint.companions import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TEMPLATES, TOKENIZER_FILES
from branchmix.checkpoint.folder import in_order_of_removal, require_name, write_json, writing
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
    is_main: bool = field(default_factory=is_main_process)
    """Whether this process reports for the run."""


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
            parent = next(folder for folder in self.path.absolute().parents if folder.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
                raise OutputError(f"{self.path}: {parent} is not a writable folder: choose another place")
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
        from filelock import FileLock, Timeout

        file = self.path / LOCK
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(file)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise OutputError(
                    f"{self.path}: another process is training here: wait until it ends, or choose another folder (if "
                    f"no process is running, remove {LOCK} there)"
                ) from None
        try:
            yield
        finally:
            if (self.path / DONE).is_file():
                file.unlink(missing_ok=True)
            lock.release()

    def write_run(self, record: dict[str, Any]) -> None:
        """Write ``run.json``."""
        write_json(self.path / RUN, record)

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
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
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
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            place = f"{path}.{key}" if path else key
            if place in FREE_TO_CHANGE:
                continue
            difference = _first_difference(theirs.get(key), ours.get(key), place)
            if difference:
                return difference
        return None
    if theirs == ours:
        return None
    return f"{path} {json.dumps(theirs)} instead of {json.dumps(ours)}"

"""The folder of a run: what is in it already, whether that is this run, and how the result appears in it.

While a run goes on: ``run.json`` (its settings, and what was fixed at its start), ``metrics.jsonl``, ``checkpoints/``.
When it is done: the model, ``training.json`` and ``metrics.jsonl``. No torch in here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from branchmix.checkpoint.folder import TOKENIZER_FILES, require_name, writing
from branchmix.checkpoint.json_text import read_json
from branchmix.checkpoint.moves import in_order_of_removal
from branchmix.errors import BranchMixError, OutputError
from branchmix.pages.numbers import too_little_space
from branchmix.settings import parse
from branchmix.train.config import RunConfig

RUN, DONE, CHECKPOINTS = "run.json", "training.json", "checkpoints"
RESULTS = ("config.json", "adapter_config.json")
AVERAGE = ".ema"
"""Where the moving average lies until the result is complete."""
LOCK = ".lock"
COMPANIONS = {"run.yaml", "log.txt", LOCK}
"""The run's own file and output, where ``branchmix branch`` keeps them: no run by themselves, kept by a new start."""
OURS = (
    *(RUN, DONE, CHECKPOINTS, AVERAGE, "metrics.jsonl", "metrics.tmp", "ema", ".model.part", "tensorboard", "wandb"),
    *(f".{RUN}.part", f".{DONE}.part", "config.json", "generation_config.json", "adapter_config.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
    *TOKENIZER_FILES,
)
"""What a run and its loggers write, by name: a new start removes these alone, so that whatever else somebody keeps in
the folder stays."""

FREE_TO_CHANGE = {
    *("out", "checkpoints", "evaluation", "logging", "parallel", "threads", "micro_batch_size"),
    *("gradient_checkpointing", "trust_remote_code"),
}
"""Keys that a resumed run may have otherwise: its result stays the same, up to rounding."""

State = Literal["new", "unfinished", "finished"]


class RunFolder:
    """``out`` of a run, before, while and after it."""

    def __init__(self, config: RunConfig):
        self.given = config.out
        path = Path(config.out).expanduser()
        self.path = path if path.is_absolute() else config.folder / path
        self.checkpoints = self.path / CHECKPOINTS

    def look(self, config: RunConfig, *, force: bool) -> State:
        """What is there. With ``force``, a run of any settings counts as nothing.

        Raises:
            OutputError: it is no run's folder, or a run of other settings.
        """
        require_name(self.path)
        if not self.path.exists():
            parent = next(folder for folder in self.path.absolute().parents if folder.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
                raise OutputError(f"{self.path}: {parent} is no folder that can be written: choose another place")
            return "new"
        if not self.path.is_dir():
            raise OutputError(f"{self.path}: is a file: choose a folder that does not exist yet")
        record = self.record()
        if record is None:
            if any(entry.name not in COMPANIONS for entry in self.path.iterdir()):
                raise OutputError(f"{self.path}: exists, and is no folder of a run: choose another")
            return "new"
        if force:
            return "new"
        difference = _difference(record, config)
        if difference:
            raise OutputError(
                f"{self.path}: is a run with {difference}: choose another folder, or start anew with --force"
            )
        done = (self.path / DONE).is_file() and any((self.path / name).is_file() for name in RESULTS)
        return "finished" if done else "unfinished"

    def record(self) -> dict[str, Any] | None:
        """``training.json`` or ``run.json``, if the folder is a run's."""
        for name in (DONE, RUN):
            try:
                found = read_json(self.path / name)
            except (OSError, ValueError):
                continue
            # Other programs have files of these names too.
            if isinstance(found, dict) and isinstance(found.get("config"), dict) and "data" in found["config"]:
                return found
        return None

    def clear(self) -> None:
        """Removes what a run wrote, if the folder is a run's; ``look`` has to have been asked."""
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
        """While a run writes here: another one of the same folder is refused. The system ends it with the process.

        Raises:
            OutputError: some process is writing here, or the folder cannot be written.
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
                    f"{self.path}: another process is training in it: wait for its end, or choose another folder (if "
                    f"there is none, remove {LOCK} there)"
                ) from None
        try:
            yield
        finally:
            if (self.path / DONE).is_file():
                file.unlink(missing_ok=True)
            lock.release()

    def write_run(self, record: dict[str, Any]) -> None:
        """``run.json``."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / RUN, record)

    def clean_up(self) -> None:
        """After the end: what only an unfinished run needs goes."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        shutil.rmtree(self.path / AVERAGE, ignore_errors=True)
        (self.path / RUN).unlink(missing_ok=True)

    def require_space(self, num_bytes: int) -> None:
        """Refuse beforehand what cannot fit.

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


def write_json(file: Path, content: Any) -> None:
    """Atomically."""
    temporary = file.with_name(f".{file.name}.part")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(file)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings as JSON, with defaults."""
    return dict(config.model_dump(mode="json"))


def _difference(record: dict[str, Any], config: RunConfig) -> str | None:
    """The first key in which a run on the disk and this one differ, with its value there."""
    try:
        theirs = settings_of(parse(RunConfig, record["config"], RUN))
    except BranchMixError:
        return "settings that this version of branchmix does not know"
    return _first_difference(theirs, settings_of(config), "")


def _first_difference(theirs: Any, ours: Any, path: str) -> str | None:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            place = f"{path}.{key}" if path else key
            if place in FREE_TO_CHANGE:
                continue
            found = _first_difference(theirs.get(key), ours.get(key), place)
            if found:
                return found
        return None
    if theirs == ours:
        return None
    return f"{path} {json.dumps(theirs)} instead of {json.dumps(ours)}"

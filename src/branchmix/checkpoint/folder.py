"""Output folders that appear complete or not at all.

Whole folders change places: exchanged in one step where the system can, else put back after a kill. A folder that is
removed loses first what makes a model of it, so that a removal which is cut short leaves none.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from branchmix.checkpoint.companions import ADAPTER_CONFIG, TEMPLATES, TOKENIZER_FILES
from branchmix.checkpoint.json_text import json_document, read_object
from branchmix.errors import BranchMixError, OutputError

_OF_A_CHECKPOINT = (
    *TOKENIZER_FILES,
    *("*.safetensors", "*.bin", "*.index.json", "config.json", "generation_config.json", ADAPTER_CONFIG),
    *("tokenizer*", "preprocessor_config.json", "processor_config.json", "chat_templates", TEMPLATES, "params.json"),
    *("configuration_*.py", "modeling_*.py", "modular_*.py", "tokenization_*.py", "*_branchmix.py", "__pycache__"),
    *("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY.md", "original", "onnx", "*.gguf"),
    *(".gitattributes", ".cache", ".huggingface", ".DS_Store"),
    # of branchmix: merged, trained, measured
    *("branchmix.json", "training.json", "run.json", "run.yaml", "metrics.jsonl", "log.txt", "results*", "routes.json"),
    *("shares.csv", "requests.jsonl", "ema", "training", "tensorboard", "wandb", ".lock"),
    # of transformers' Trainer
    *("training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
)
"""Names in a folder that is a checkpoint and nothing else, as patterns: only such a folder is ever replaced."""


UNFINISHED, MERGED, REPLACED = "incomplete", "adapter", "replaced"
"""Kinds of folders beside an output while it is made: its content, a LoRA expert merged for it, what it replaces."""


def beside(target: Path, kind: str) -> Path:
    """A new name beside an output that names the process which made it: see ``stale_folders``."""
    return target.parent / f".{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def atomic_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """Yields a temporary folder beside ``out``, which becomes ``out`` if the block succeeds and vanishes if not.

    A killed process leaves ``.NAME.incomplete-PID-RANDOM`` (see ``stale_folders``) and never touches ``out``. With
    ``force`` an existing checkpoint is replaced once the new one is complete. Errors name ``out`` where they would name
    the temporary folder.

    Raises:
        OutputError: ``out`` exists (or, with force, is or holds something else), or cannot be written.
    """
    require_replaceable(out, force=force)
    target = Path(os.path.realpath(out))
    temporary = beside(target, UNFINISHED)
    with writing(out):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    try:
        yield temporary
        require_replaceable(out, force=force)  # again, as others may have written there meanwhile
        with writing(out):
            fsync_path(temporary)
            if target.exists():
                replace_folder(temporary, target, aside=beside(target, REPLACED))
            else:
                temporary.rename(target)
            fsync_path(target.parent)
    except BaseException as error:
        discard(temporary)
        if isinstance(error, BranchMixError):
            error.rename(str(temporary), str(out))
        raise


def require_replaceable(out: Path, *, force: bool) -> None:
    """Refuses a place where no checkpoint may be written, before the work; raises as ``atomic_folder``."""
    put_back(out)
    target = Path(os.path.realpath(out))
    if target.is_dir():
        if not force:
            raise OutputError(f"{out}: exists already: choose another folder, or --force to replace it")
        _require_nothing_else(out, target)
    elif target.exists():
        raise OutputError(f"{out}: is a file: choose a folder that does not exist yet")
    require_writable_parent(out, target)


def _require_nothing_else(out: Path, target: Path) -> None:
    """A folder that is replaced is empty, or a checkpoint with nothing beside it."""
    names = sorted(entry.name for entry in target.iterdir())
    if not names:
        return
    lacks = ""
    if "config.json" not in names:
        lacks = "no config.json"
    elif "model_type" not in (read_object(target / "config.json") or {}) and not any(
        name.endswith((".safetensors", ".bin")) for name in names
    ):
        lacks = "no model_type in its config.json, and no weights"
    if lacks:
        raise OutputError(f"{out}: is not a checkpoint folder ({lacks}), so it is not replaced: choose another")
    others = [name for name in names if not any(fnmatch(name, pattern) for pattern in _OF_A_CHECKPOINT)]
    if others:
        raise OutputError(
            f"{out}: holds {others[0]}, which is not part of a checkpoint, so it is not replaced: choose another "
            "folder, or move that away"
        )


def require_name(out: Path) -> None:
    """Raises OutputError for a name that the disk does not accept: one of 300 letters, or a link to itself."""
    try:
        out.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise OutputError(f"{out}: {error.strerror}: choose another name") from None
    except ValueError:  # a zero byte, or half a surrogate
        raise OutputError(f"{str(out)!r}: is not a file name: choose another name") from None


def require_new_file(file: Path, *, force: bool) -> None:
    """Raises OutputError for a file that cannot be written later, or exists and is not to be replaced."""
    require_name(file)
    target = Path(os.path.realpath(file))
    if target.is_dir():
        raise OutputError(f"{file}: is a folder: give the name of a file")
    if target.exists() and not force:
        raise OutputError(f"{file}: exists already: choose another name, or --force to replace it")
    require_writable_parent(file, target)


def require_writable_parent(out: Path, target: Path | None = None) -> None:
    """Raises OutputError if ``out``, which may be a link to ``target``, could not be written where it is to be."""
    parent = next(folder for folder in (target or out.absolute()).parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"{out}: {parent} is a file, not a folder: choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: {parent} is not writable: choose another place")


def stale_folders(out: Path) -> list[Path]:
    """Folders that killed runs on ``out`` left beside it; ``holds_model`` says which of them are more than scraps."""
    require_name(out)
    target = Path(os.path.realpath(out))
    return [folder for kind in (UNFINISHED, MERGED, REPLACED) for folder in _left_of(target, kind)]


def holds_model(folder: Path) -> bool:
    """Whether a folder that was left is a whole model: ``config.json`` is written last, and removed first."""
    return f".{MERGED}-" not in folder.name and (folder / "config.json").is_file()


def put_back(out: Path) -> bool:
    """Restores the model that an interrupted run moved aside before the new one was in place; whether it did.

    Raises OutputError if ``out`` cannot be a name, or the model cannot be moved.
    """
    require_name(out)
    target = Path(os.path.realpath(out))
    aside = [] if os.path.lexists(target) else [folder for folder in _left_of(target, REPLACED) if holds_model(folder)]
    if not aside:
        return False
    with writing(out), suppress(FileNotFoundError):  # another start was faster
        max(aside, key=lambda folder: folder.stat().st_ctime_ns).rename(target)
    return True


def _left_of(target: Path, kind: str) -> list[Path]:
    """Folders of one kind beside ``target`` whose processes are gone."""
    import psutil

    name = re.compile(re.escape(f".{target.name}.{kind}-") + r"([0-9]{1,9})-.+")
    there = sorted(target.parent.iterdir()) if target.parent.is_dir() else []
    named = [(folder, match[1]) for folder in there if (match := name.fullmatch(folder.name))]
    return [folder for folder, pid in named if not psutil.pid_exists(int(pid))]


# ---- Folders that change places ----

_AT_FDCWD = -100
_RENAME_EXCHANGE, _RENAME_SWAP = 2, 2
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
"""What kernels, sandboxes and file systems without an exchange answer."""
MAKES_A_MODEL = ("config.json", ADAPTER_CONFIG, "model.safetensors.index.json")
"""Files without which no program takes a folder for a model."""


@cache
def libc(name: str) -> Any:
    """A function of the C library that Python does not offer; None where there is no such function."""
    with suppress(OSError, AttributeError, TypeError):
        return getattr(ctypes.CDLL(None, use_errno=True), name)
    return None


def exchange(first: Path, second: Path) -> bool:
    """Swaps the names of two folders in one step that no kill can interrupt; False where the system cannot do that.

    Raises OSError if it can, but not with these two.
    """
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform.startswith("linux") and (rename := libc("renameat2")) is not None:
        done = rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE))
    elif sys.platform == "darwin" and (rename := libc("renamex_np")) is not None:
        done = rename(names[0], names[1], ctypes.c_uint(_RENAME_SWAP))
    else:
        return False
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def replace_folder(new: Path, target: Path, *, aside: Path) -> None:
    """Puts ``new`` in place of ``target``, which is called ``aside`` while it is removed.

    A kill leaves the old or the new folder as ``target``. Only where the system cannot exchange folders, a kill between
    two renames leaves the old one as ``aside`` and none as ``target``: see ``put_back``.
    """
    if exchange(new, target):
        new.rename(aside)
    else:
        target.rename(aside)
        try:
            new.rename(target)
        except BaseException:
            aside.rename(target)
            raise
    discard(aside)


def discard(folder: Path) -> None:
    """Removes a folder as far as that is possible; what remains is not a model."""
    for inner, _, files in os.walk(folder):
        for name in MAKES_A_MODEL:
            if name in files:
                with suppress(OSError):
                    Path(inner, name).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def in_order_of_removal(entries: Iterable[Path], *, last: Iterable[str] = ()) -> list[Path]:
    """Entries so ordered that an interrupted removal leaves no folder that looks like a model; ``last`` go last."""
    late = tuple(last)
    return sorted(entries, key=lambda entry: (entry.name in late, entry.name not in MAKES_A_MODEL, entry.name))


def fsync_path(path: Path) -> None:
    """Makes a file's content, or new names in a folder where the platform opens folders, survive a power cut."""
    with suppress(PermissionError, IsADirectoryError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# ---- Names that files bring along and that become names on a disk: one rule, so that none leaves its folder ----

_PLAIN = re.compile(r"\w[\w.+-]*")
_MOST_BYTES = 100
"""File systems take 255; endings, numbers and names of temporary files come on top."""
PLAIN = "letters, digits, -, _, . and +, at most 100"
EXPERT = "letters, digits, -, _ and ., at most 100, and not 'auto'"


def is_file_name(name: str) -> bool:
    """Whether a name may become that of a new file or folder: letters, digits, ``-``, ``_``, ``.`` and ``+``."""
    return _PLAIN.fullmatch(name) is not None and len(name.encode()) <= _MOST_BYTES


def is_expert_name(name: str) -> bool:
    """The same for experts, whose names other programs read too: ASCII without ``+``, a letter or digit first.

    ``--experts auto`` means those that the gates choose.
    """
    return is_file_name(name) and name.isascii() and "+" not in name and name[0] != "_" and name != "auto"


def is_entry(name: str) -> bool:
    """Whether a name can be that of a file which somebody else put directly into a folder, whatever its letters."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return 0 < len(encoded) <= 255 and not set(name) & {"/", "\\", "\0"} and name not in (".", "..")


# ---- Files ----


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turns an OSError inside into the one line a user sees."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{file}: the disk is full (or your quota): free space, or write elsewhere") from error
        raise OutputError(f"{file}: cannot be written: {error.strerror or error}") from error


def system_error(error: Exception) -> OSError:
    """What the system said; safetensors has its number in the text alone: ``... (os error 28)``."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), str(error)) if number else OSError(str(error))


@contextmanager
def locked(file: Path, *, wait: float = -1) -> Iterator[bool]:
    """Hold the lock of ``file`` inside the block, which gets False if others still hold it after ``wait`` seconds.

    A negative ``wait`` has no end. The folder is made if need be. The system frees the lock if the process dies.

    Raises:
        OutputError: the lock's folder cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(Timeout):
            lock.acquire(timeout=wait)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def write_json(file: Path, content: Any, *, allow_nan: bool = False) -> None:
    """``write_text`` for JSON; ``allow_nan`` writes NaN and infinities as JavaScript spells them, else ValueError."""
    write_text(file, json_document(content, allow_nan=allow_nan))


def write_text(file: Path, text: str) -> None:
    """Writes a text file whole or not at all, and its folder if needed; raises OutputError if it cannot."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)

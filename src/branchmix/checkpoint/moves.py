"""Whole folders change places: exchanged in one step where the system can, else put back after a kill.

A folder that is removed loses first what makes a model of it, so that a removal which is cut short leaves none.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from branchmix.checkpoint.adapters import ADAPTER_CONFIG

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
    two renames leaves the old one as ``aside`` and none as ``target``: see ``put_back`` in ``folder.py``.
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


def fsync_folder(folder: Path) -> None:
    """Makes new names in ``folder`` survive a power cut, where the platform opens folders."""
    with suppress(PermissionError, IsADirectoryError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

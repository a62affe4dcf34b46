"""What a killed evaluation has already found out: an append-only file with a line of JSON for each model and item.

Any number of processes may add to one file at once: each line is written whole, under a lock. What a killed writer left
of its last line is passed over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from branchmix.checkpoint.folder import writing
from branchmix.errors import OutputError


class Journal:
    """All lines so far, by the key of the model and that of the item; on disk if there is a folder for them."""

    def __init__(self, folder: Path | None, file: str, item: str):
        """
        Args:
            folder: made if need be; None keeps everything in memory.
            file: name in the folder, ending in ``.jsonl``.
            item: the field that says what a line is about, such as ``document``.

        Raises:
            OutputError: the folder is a file, or cannot be read or written.
        """
        self._file = folder / file if folder is not None else None
        self._item = item
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        self._described: set[str] = set()
        if folder is not None:
            if folder.exists() and not folder.is_dir():
                raise OutputError(f"{folder}: is a file: choose a folder")
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            for line in self._read():
                self._keep(line)

    def find(self, model: str, item: str) -> dict[str, Any] | None:
        """The line about an item, if there is one."""
        return self._known.get((model, item))

    def describe(self, model: str, facts: dict[str, Any]) -> None:
        """What a model's key stands for, once."""
        if model not in self._described:
            self.add_line({"model": model, **facts})

    def add_line(self, line: dict[str, Any]) -> None:
        """Keep a line, on disk at once."""
        self._keep(line)
        if self._file is None:
            return
        from filelock import FileLock

        encoded = json.dumps(line, allow_nan=False).encode() + b"\n"
        with writing(self._file), FileLock(self._file.with_suffix(".lock")), self._file.open("ab+") as file:
            if _ends_within_a_line(file):
                encoded = b"\n" + encoded
            file.write(encoded)

    def _read(self) -> Iterator[dict[str, Any]]:
        assert self._file is not None
        try:
            with self._file.open("rb") as lines:
                for line in lines:
                    try:
                        record = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(record, dict):
                        yield record
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputError(f"{self._file}: cannot be read: {error.strerror}: choose another folder") from error

    def _keep(self, line: dict[str, Any]) -> None:
        if self._item in line:
            self._known[line["model"], line[self._item]] = line
        else:
            self._described.add(line["model"])


def _ends_within_a_line(file: BinaryIO) -> bool:
    if not (end := file.seek(0, os.SEEK_END)):
        return False
    file.seek(end - 1)
    return file.read(1) != b"\n"

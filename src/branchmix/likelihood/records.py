"""Results that outlive a killed process: an append-only file of JSON lines; and keys for what results depend on."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from branchmix.checkpoint.companions import ADAPTER_WEIGHTS
from branchmix.checkpoint.folder import locked, writing
from branchmix.checkpoint.json_text import key_of, parse_json
from branchmix.checkpoint.writer import FileHashes
from branchmix.errors import OutputError

FILE = "records.jsonl"


class Lines:
    """JSON objects in a file of a folder, ``records.jsonl`` by default; nothing is kept if there is none.

    Any number of processes may add to one file at once: each line is written whole, under a lock. What a killed writer
    left of its last line is passed over. The folder is made if need be.

    Raises:
        OutputError: the folder is a file, or cannot be read or written.
    """

    def __init__(self, folder: Path | None, file: str = FILE):
        self.file = folder / file if folder is not None else None
        if folder is not None:
            if folder.exists() and not folder.is_dir():
                raise OutputError(f"{folder}: is a file: choose a folder")
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def add(self, *records: dict[str, Any]) -> None:
        """Append objects, on disk at once."""
        if self.file is None or not records:
            return
        lines = b"".join(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records)
        with writing(self.file), locked(self.file.with_suffix(".lock")), self.file.open("ab+") as file:
            if _ends_within_a_line(file):
                lines = b"\n" + lines
            file.write(lines)

    def read(self) -> Iterator[dict[str, Any]]:
        """All objects that are whole."""
        if self.file is None:
            return
        try:
            with self.file.open("rb") as lines:
                for line in lines:
                    try:
                        record = parse_json(line)
                    except ValueError:
                        continue
                    if isinstance(record, dict):
                        yield record
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputError(f"{self.file}: cannot be read: {error.strerror}: choose another folder") from error


class Rounds:
    """Which items a process set out to compute together, in which order.

    Numbers depend on the batch in their last bits. So what a killed process left of its items is computed in the
    batches of all of them, and a resumed run has the numbers of one that was not stopped, bit for bit. Items that are
    new, or whose batches have another size now, are a round of their own, for which nothing is computed again.
    """

    def __init__(self, lines: Lines):
        self._lines = lines
        self._last: dict[tuple[str, int, str], list[str]] = {}

    def keep(self, line: dict[str, Any]) -> bool:
        """Take in a line if it is about a round."""
        if not isinstance(items := line.get("round"), list):
            return False
        self._last |= dict.fromkeys(((line["model"], line["batch_tokens"], item) for item in items), items)
        return True

    def of(self, model: str, batch_tokens: int, items: Iterable[str], known: Container[str]) -> list[list[str]]:
        """The rounds of all items that are not ``known``, each with its known ones too."""
        there = dict.fromkeys(items)
        todo = dict.fromkeys(item for item in there if item not in known)
        rounds = []
        for item in list(todo):
            whole = self._last.get((model, batch_tokens, item))
            if item in todo and whole is not None and there.keys() >= set(whole):
                rounds.append(whole)
                for one in whole:
                    todo.pop(one, None)
        if todo:
            line = {"model": model, "batch_tokens": batch_tokens, "round": list(todo)}
            self.keep(line)
            self._lines.add(line)
            rounds.append(list(todo))
        return rounds


class Journal:
    """Lines about a model and an item each, found again by both; in memory only if there is no folder.

    ``item`` is the field that says what a line is about, such as ``document``. Folder, file and errors: see ``Lines``.
    """

    def __init__(self, folder: Path | None, file: str, item: str):
        self._lines = Lines(folder, file)
        self._item = item
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        self._described: set[str] = set()
        self.rounds = Rounds(self._lines)
        for line in self._lines.read():
            if isinstance(line.get("model"), str) and isinstance(line.get(item, ""), str):  # else somebody else's line
                self._keep(line)
        self._earlier = set(self._known)

    def was_there(self, model: str, item: str) -> bool:
        """Whether the line about an item was on the disk before this process began to write."""
        return (model, item) in self._earlier

    def find(self, model: str, item: str) -> dict[str, Any] | None:
        """The line about an item, if there is one."""
        return self._known.get((model, item))

    def describe(self, model: str, facts: dict[str, Any]) -> None:
        """Keeps what a model's key means, once."""
        if model not in self._described:
            self.add_line({"model": model, **facts})

    def add_line(self, line: dict[str, Any]) -> None:
        """Keep a line, on disk at once."""
        self._keep(line)
        self._lines.add(line)

    def _keep(self, line: dict[str, Any]) -> None:
        if self.rounds.keep(line):
            return
        if self._item in line:
            self._known[line["model"], line[self._item]] = line
        else:
            self._described.add(line["model"])


def _ends_within_a_line(file: BinaryIO) -> bool:
    if not (end := file.seek(0, os.SEEK_END)):
        return False
    file.seek(end - 1)
    return file.read(1) != b"\n"


def model_hash(folder: Path) -> str:
    """Hash of the content of a model's config, code and weights; reading them costs about what loading them does."""
    patterns = ("*.safetensors", "config.json", "*.py")
    files = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.name != ADAPTER_WEIGHTS)
    with FileHashes(files) as hashes:
        return key_of({file.name: hashes.of(file) for file in files})


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what turns text into tokens; chat templates and the like don't count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return key_of({"tokenizer": backend.to_str() if backend is not None else tokenizer.get_vocab()})

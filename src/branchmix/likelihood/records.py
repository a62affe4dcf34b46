"""Results that outlive a killed process: an append-only file of JSON lines; and hashes of what results depend on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from branchmix.checkpoint.companions import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from branchmix.checkpoint.folder import locked, writing
from branchmix.checkpoint.json_text import key_of, parse_json
from branchmix.checkpoint.writer import FileHashes
from branchmix.errors import OutputError

FILE = "records.jsonl"


class Journal:
    """Lines about a model and an item each, found again by both; in memory only if there is no folder.

    ``item`` is the field that says what a line is about, such as ``document``. Any number of processes may add to one
    file at once: each line is written whole, under a lock. What a killed writer left of its last line is passed over.
    The folder is made if need be.

    Numbers depend on the batch in their last bits. So lines called ``round`` say which items were to be computed
    together, and what a killed process left of them is computed in the batches of all of them: a resumed run has the
    numbers of one that was not stopped, bit for bit. Items that are new, or whose batches have another size now, are a
    round of their own, for which nothing is computed again.

    Raises:
        OutputError: the folder is a file, or cannot be read or written.
    """

    def __init__(self, folder: Path | None, file: str, item: str):
        self.file = folder / file if folder is not None else None
        self.item = item
        self.known: dict[tuple[str, str], dict[str, Any]] = {}
        """Lines by model and item."""
        self.described: set[str] = set()
        """Keys of models that a line says the meaning of."""
        self.rounds: dict[tuple[str, int, str], list[str]] = {}
        """Items to be computed together, by model, tokens of a batch and each of them."""
        if folder is not None:
            if folder.exists() and not folder.is_dir():
                raise OutputError(f"{folder}: is a file: choose a folder")
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
        for line in self._read():
            if isinstance(line.get("model"), str) and isinstance(line.get(item, ""), str):  # else somebody else's line
                self._keep(line)
        self.earlier = set(self.known)
        """What was on the disk before this process began to write."""

    def _read(self) -> Iterator[dict[str, Any]]:
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

    def _keep(self, line: dict[str, Any]) -> None:
        if isinstance(items := line.get("round"), list):
            self.rounds |= dict.fromkeys(((line["model"], line["batch_tokens"], item) for item in items), items)
        elif self.item in line:
            self.known[line["model"], line[self.item]] = line
        else:
            self.described.add(line["model"])

    def add(self, line: dict[str, Any]) -> None:
        """Keep a line, on disk at once."""
        self._keep(line)
        if self.file is None:
            return
        content = json.dumps(line, allow_nan=False).encode() + b"\n"
        with writing(self.file), locked(self.file.with_suffix(".lock")), self.file.open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # within a line that a killed writer left
                    content = b"\n" + content
            file.write(content)

    def of(self, facts: dict[str, Any], **source: Any) -> ModelRecords:
        """The lines about the model with these facts; ``source`` says where it came from, which nothing depends on."""
        return ModelRecords(self, key_of(facts), {**source, **facts})


class ModelRecords:
    """The lines of a journal about one model, under the hash of all that its results depend on."""

    def __init__(self, journal: Journal, key: str, facts: dict[str, Any]):
        self.key = key
        self._journal, self._facts = journal, facts

    def __getitem__(self, item: str) -> dict[str, Any]:
        """The line about an item that is on record."""
        return self._journal.known[self.key, item]

    def add(self, item: str, **fields: Any) -> None:
        """Keep a line about an item, on disk at once."""
        self._journal.add({"model": self.key, self._journal.item: item, **fields})

    def missing(self, items: Iterable[str], batch_tokens: int) -> Iterator[tuple[list[str], set[int]]]:
        """The rounds of all items that are not on record, each with the places of those of its items that are."""
        journal, there = self._journal, dict.fromkeys(items)
        todo = {item: None for item in there if (self.key, item) not in journal.known}
        rounds = []
        for item in list(todo):
            whole = journal.rounds.get((self.key, batch_tokens, item))
            if item in todo and whole is not None and there.keys() >= set(whole):
                rounds.append(whole)
                for one in whole:
                    todo.pop(one, None)
        if todo:
            rounds.append(list(todo))
            journal.add({"model": self.key, "batch_tokens": batch_tokens, "round": rounds[-1]})
        for together in rounds:
            if self.key not in journal.described:
                journal.add({"model": self.key, **self._facts})
            yield together, {place for place, item in enumerate(together) if (self.key, item) in journal.known}

    def num_earlier(self, items: Iterable[str]) -> int:
        """How many items were on record before this process began to write."""
        return sum((self.key, item) in self._journal.earlier for item in items)


def model_hash(folder: Path, adapter: Path | None = None) -> str:
    """Hash of the content of a model's config, code and weights, and of an adapter's on it; reading them costs about
    what loading them does."""
    patterns = ("*.safetensors", "config.json", "*.py")
    files = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.name != ADAPTER_WEIGHTS)
    files += [adapter / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)] if adapter is not None else []
    with FileHashes(files) as hashes:
        return key_of({file.name: hashes.of(file) for file in files})


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what turns text into tokens; chat templates and the like don't count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return key_of({"tokenizer": backend.to_str() if backend is not None else tokenizer.get_vocab()})

"""One domain's tokens: made ready once, read as they are needed, and waited for where a stream is still being read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from branchmix.checkpoint.folder import locked
from branchmix.data.build import (
    FAILURE_FILE,
    LOCK,
    Chunk,
    Counts,
    Encoder,
    Plan,
    build,
    chunks_in,
    is_complete,
)
from branchmix.data.sources import Reader
from branchmix.errors import DataError

_PATIENCE = 30.0
"""Seconds to wait for a chunk in a folder that no process writes into."""


class Domain:
    """A domain's tokens in the cache, all of them or, if it is streamed, those that have been read so far."""

    def __init__(self, folder: Path, plan: Plan, *, streamed: bool):
        self.name = plan["name"]
        self.folder = folder
        self.streamed = streamed
        self._plan = plan
        self.chunks: list[Chunk] = []
        self.complete = False
        self.excluded: set[int] = set()
        """Hashes of documents that are not trained on because another domain holds them out."""
        self._producer: subprocess.Popen[str] | None = None

    @property
    def counts(self) -> Counts:
        return sum((chunk.counts for chunk in self.chunks), Counts())

    def fingerprint(self) -> str:
        """A hash of the documents to train on and their tokens; of a stream's first chunk, which is there at the start.

        Equal fingerprints give equal sequences.
        """
        from xxhash import xxh3_128

        digest = xxh3_128()
        for chunk in self.chunks[:1] if self.streamed else self.chunks:
            for name in ("hashes", "ends"):
                digest.update(chunk.arrays[name].tobytes())
        return digest.hexdigest()

    def make_ready(self, reader: Reader, encoder: Encoder, progress: Callable[[str], None]) -> None:
        """Tokenise in this process, or wait for another that does: all of it, or the first chunk if it is streamed."""
        while not self._ready():
            with locked(self.folder / LOCK, wait=0.5) as held:
                if not held:
                    progress(f"waiting for {self.name}, which another process tokenises")
                elif not self._ready():
                    (self.folder / FAILURE_FILE).unlink(missing_ok=True)
                    progress(f"tokenising {self.name}")
                    build(self.folder, self._plan, reader, encoder, wanted=lambda: 1)

    def _ready(self) -> bool:
        self.refresh()
        return bool(self.chunks) if self.streamed else self.complete

    def refresh(self) -> None:
        """Open chunks that have been written since."""
        if not self.complete:
            self.chunks = [*self.chunks, *chunks_in(self.folder, len(self.chunks))]
            self.complete = bool(self.chunks) and bool(self.chunks[-1].header["last"])

    def want(self, tokens: int) -> None:
        """Have so many tokens read in the background, by one process a machine; it ends with this one."""
        self.refresh()
        if self.complete or self.counts.tokens >= tokens or int(os.environ.get("LOCAL_RANK", 0)):
            return
        lines = f"{tokens}\n"
        if self._producer is None:
            lines = f"{json.dumps(self._plan)}\n{lines}"
            (self.folder / FAILURE_FILE).unlink(missing_ok=True)
            self._producer = subprocess.Popen(
                [sys.executable, "-m", "branchmix.data.build", str(self.folder)],
                stdin=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C lets the run finish its step, which may need more text
            )
        assert self._producer.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which is noticed once its text is needed
            self._producer.stdin.write(lines)
            self._producer.stdin.flush()

    def wait_for_more(self) -> None:
        """Wait for the next chunk or the end of the source.

        Raises:
            DataError: no process reads the source any more, or reading has failed.
        """
        known, started = len(self.chunks), time.monotonic()
        while len(self.chunks) == known and not self.complete:
            self.refresh()
            self._require_life(time.monotonic() - started)
            time.sleep(0.05)

    def _require_life(self, waited: float) -> None:
        failure = self.folder / FAILURE_FILE
        if failure.exists():
            raise DataError(f"data.{self.name}: {json.loads(failure.read_text(encoding='utf-8'))['error']}")
        if self._producer is not None:
            if (code := self._producer.poll()) is not None and not is_complete(self.folder):
                raise DataError(f"data.{self.name}: reading in the background has ended with code {code}: start again")
        elif waited > _PATIENCE:
            with locked(self.folder / LOCK, wait=0) as held:
                if held:
                    raise DataError(
                        f"data.{self.name}: the process that reads it in the background is gone: start again"
                    )

    def lengths(self, number: int) -> np.ndarray:
        """Tokens of each document of a chunk, 0 for those not trained on."""
        arrays = self.chunks[number].arrays
        lengths = np.diff(arrays["ends"], prepend=0)
        if self.excluded:
            lengths = np.where(np.isin(arrays["hashes"], np.array(list(self.excluded), np.uint64)), 0, lengths)
        return lengths

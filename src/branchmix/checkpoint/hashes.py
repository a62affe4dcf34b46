"""Hashes of the source files of a mixture, computed in a thread while the mixture is written.

XXH3 of 128 bits, which `xxh128sum` prints: it identifies files and does not protect against forgery. BLAKE3 took a
quarter of the merge's CPU time, SHA-256 more than twice that. Files of the Hub's cache are named by their SHA-256
already and are not read.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

_BLOCK = 1 << 18


def key_of(content: Any) -> str:
    """A short name for JSON that a result depends on."""
    from xxhash import xxh3_128_hexdigest

    return str(xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode()))


class FileHashes:
    """Context manager that hashes ``files`` in the background; leaving it stops the work."""

    def __init__(self, files: Sequence[Path]):
        self._known = {file: {"sha256": name} for file in files if (name := _name_in_hub_cache(file))}
        self._wanted = [file for file in dict.fromkeys(files) if file not in self._known]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> FileHashes:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def of(self, file: Path) -> dict[str, str]:
        """``{"xxh3_128": ...}`` or ``{"sha256": ...}``, waiting if need be; empty for a file that was not asked for."""
        if file in self._wanted:
            self._thread.join()
        return self._known.get(file, {})

    def _work(self) -> None:
        from xxhash import xxh3_128

        # The processors belong to the writing first: hashes fill the time in which it waits for the disk.
        if sys.platform.startswith("linux"):  # elsewhere it would be the whole process
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        buffer = memoryview(bytearray(_BLOCK))
        for file in self._wanted:
            digest = xxh3_128()
            with file.open("rb", buffering=0) as opened:
                while count := opened.readinto(buffer):
                    if self._stop.is_set():
                        return
                    digest.update(buffer[:count])
            self._known[file] = {"xxh3_128": digest.hexdigest()}


def _name_in_hub_cache(file: Path) -> str | None:
    target = file.resolve()
    return target.name if target.parent.name == "blobs" and len(target.name) == 64 else None

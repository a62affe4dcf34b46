"""sha256 of the source files, computed in a thread beside the writing (hashlib releases the interpreter lock).

It is the hash that the Hub shows for a file, so anybody can tell later what a mixture was made of.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

_BLOCK = 1 << 20


class FileHashes:
    """Context manager that hashes ``files`` in the background; leaving it stops the work.

    Files of the Hub's cache are named by their sha256 already and are not read.
    """

    def __init__(self, files: Sequence[Path]):
        self._known = {file: name for file in files if (name := _name_in_hub_cache(file))}
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
        """``{"sha256": ...}``, waiting for the thread if need be; empty for a file that was not asked for."""
        if file in self._wanted:
            self._thread.join()
        found = self._known.get(file)
        return {"sha256": found} if found else {}

    def _work(self) -> None:
        buffer = memoryview(bytearray(_BLOCK))
        for file in self._wanted:
            digest = hashlib.sha256()
            with file.open("rb", buffering=0) as opened:
                while count := opened.readinto(buffer):
                    if self._stop.is_set():
                        return
                    digest.update(buffer[:count])
            self._known[file] = digest.hexdigest()


def _name_in_hub_cache(file: Path) -> str | None:
    target = file.resolve()
    return target.name if target.parent.name == "blobs" and len(target.name) == 64 else None

"""Tokenised documents on disk: one safetensors file a chunk, mapped into memory when read.

A chunk holds whole documents end to end (``tokens``, and ``ends`` of each), the hashes of their texts, and the
documents held out, with their text. It appears complete or not at all, by a rename; its header has the counts of what
it holds and the place in the source after it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from branchmix.checkpoint.folder import writing
from branchmix.checkpoint.index import read_header
from branchmix.errors import CheckpointError

_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64, "U64": np.uint64}


@dataclass
class Counts:
    """How much text there is: of a chunk, or of a domain."""

    documents: int = 0
    """Documents to train on."""
    tokens: int = 0
    bytes: int = 0
    """Size of their text in UTF-8."""
    held_out_documents: int = 0
    held_out_tokens: int = 0
    held_out_bytes: int = 0
    duplicates: int = 0
    """Documents that repeated an earlier one, and were dropped."""
    replaced: int = 0
    """Documents in which half of a surrogate pair, which is not a character, became U+FFFD."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass
class Documents:
    """Documents being gathered: tokens, hash and size of each."""

    tokens: list[np.ndarray] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    bytes: int = 0
    num_tokens: int = 0

    def add(self, tokens: np.ndarray, text_hash: int, num_bytes: int) -> None:
        self.tokens.append(tokens)
        self.hashes.append(text_hash)
        self.bytes += num_bytes
        self.num_tokens += len(tokens)

    def remove(self, place: int, num_bytes: int) -> np.ndarray:
        """Takes a document out again, and returns its tokens."""
        del self.hashes[place]
        tokens = self.tokens.pop(place)
        self.bytes -= num_bytes
        self.num_tokens -= len(tokens)
        return tokens

    def arrays(self, prefix: str, dtype: Any) -> dict[str, np.ndarray]:
        return {
            f"{prefix}tokens": np.concatenate(self.tokens).astype(dtype) if self.tokens else np.zeros(0, dtype),
            f"{prefix}ends": np.cumsum([len(tokens) for tokens in self.tokens], dtype=np.int64),
            f"{prefix}hashes": np.array(self.hashes, dtype=np.uint64),
        }


def write_chunk(file: Path, arrays: dict[str, np.ndarray], counts: Counts, **facts: Any) -> None:
    """Writes a chunk, all or nothing; ``facts`` go into its header, as JSON.

    The arrays are ``tokens``, ``ends``, ``hashes``, the same with ``held_out_``, and ``held_out_text`` with its
    ``_ends``. Raises OutputError if the disk is full, or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    metadata = {"branchmix": json.dumps({"counts": asdict(counts), **facts})}
    with writing(file):
        try:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary, metadata)
            temporary.replace(file)
        except SafetensorError as error:  # it wraps what the system says: "... (os error 28)"
            code = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(code[1]), str(error)) if code else OSError(str(error))) from error
        finally:
            temporary.unlink(missing_ok=True)


class Chunk:
    """A chunk on disk; its arrays are mapped when first used, and left behind when it is sent to another process."""

    def __init__(self, file: Path):
        self.file = file

    @cached_property
    def header(self) -> dict[str, Any]:
        """Counts, and what ``write_chunk`` was told."""
        with self.file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            return dict(json.loads(json.loads(stream.read(length))["__metadata__"]["branchmix"]))

    @cached_property
    def counts(self) -> Counts:
        return Counts(**self.header["counts"])

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name, as views of the file."""
        content = np.memmap(self.file, dtype=np.uint8, mode="r")
        return {
            ref.name: content[ref.offset : ref.offset + ref.nbytes].view(_DTYPES[ref.dtype])
            for ref in read_header(self.file)
        }

    def piece(self, values: str, ends: str, place: int) -> np.ndarray:
        """The part of ``values`` that belongs to document ``place``."""
        start = int(self.arrays[ends][place - 1]) if place else 0
        return self.arrays[values][start : int(self.arrays[ends][place])]

    def held_out_text(self, place: int) -> str:
        return self.piece("held_out_text", "held_out_text_ends", place).tobytes().decode()

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file}


def chunk_file(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:06d}.safetensors"


def chunks_in(folder: Path, first: int = 0) -> list[Chunk]:
    """The chunks from ``first`` on without a gap; a damaged one counts as missing."""
    chunks: list[Chunk] = []
    while (file := chunk_file(folder, first + len(chunks))).exists():
        try:
            read_header(file)
        except CheckpointError:
            break
        chunks.append(Chunk(file))
    return chunks


def dtype_for(vocab_size: int) -> Any:
    """The smallest type that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def utf8(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Texts end to end as bytes, and the end of each."""
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), ends

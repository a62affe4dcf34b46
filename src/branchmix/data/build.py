"""Tokenises a source into chunks, in this process or in one of its own: ``python -m branchmix.data.build FOLDER``.

Local files are read once, split into documents to train on and documents held out, and then shuffled as a whole. A
streamed source becomes chunks in the order it is read, as far as it is needed; the rest is done in the background.
A process that writes into a domain's folder holds its lock, which the system frees when the process dies.

A chunk is a safetensors file, mapped into memory when read. It holds whole documents end to end (``tokens``, and
``ends`` of each), the hashes of their texts, and the documents held out, with their text. It appears complete or not at
all, by a rename; its header has the counts of what it holds and the place in the source after it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from branchmix.checkpoint.folder import locked, system_error, write_json, writing
from branchmix.checkpoint.index import read_header
from branchmix.checkpoint.text import LONG, Window, tokens_in_pieces, whole_characters
from branchmix.data.config import Source
from branchmix.data.sources import Reader, hash_of, held_out_among, is_held_out, open_source
from branchmix.errors import BranchMixError, CheckpointError, DataError

CHUNK_TOKENS = 4_000_000
"""Tokens of a chunk, approximately: 8 MB on disk, and what is lost when a process is killed."""
SHUFFLE_SEED = 20240815

_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64, "U64": np.uint64}
TOKENIZER_FILE, FAILURE_FILE, LOCK = "tokenizer.json", "failure.json", "lock"


class Encoder:
    """A tokenizer's Rust core: many documents at once, on all cores, with its special tokens and EOS at the end."""

    def __init__(self, tokenizer_json: str, eos_token_id: int | None):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.eos_token_id = eos_token_id
        self.dtype: Any = np.uint16 if self.tokenizer.get_vocab_size(with_added_tokens=True) <= 2**16 else np.uint32

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        with _parallel_tokenizers():
            short = iter(self.tokenizer.encode_batch_fast([text for text in texts if len(text) <= LONG]))
            return [
                self._finished([next(short).ids] if len(text) <= LONG else tokens_in_pieces(text, self._window))
                for text in texts
            ]

    def _window(self, text: str) -> Window:
        encoding = self.tokenizer.encode(text)
        return Window(encoding.ids, [start for start, _ in encoding.offsets], encoding.special_tokens_mask)

    def _finished(self, pieces: Iterable[list[int]]) -> np.ndarray:
        tokens = np.concatenate([np.array(ids, dtype=self.dtype) for ids in pieces])
        if self.eos_token_id is not None and (not len(tokens) or tokens[-1] != self.eos_token_id):
            tokens = np.append(tokens, np.array(self.eos_token_id, dtype=self.dtype))
        return tokens


@contextmanager
def _parallel_tokenizers() -> Iterator[None]:
    """Many set TOKENIZERS_PARALLELISM=false against warnings after a fork; here, all cores are the point."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        os.environ |= {} if before is None else {"TOKENIZERS_PARALLELISM": before}


Plan = dict[str, Any]
"""What a domain's tokens are made of, as JSON: its ``name`` and ``source``, the ``folder`` that the source's relative
paths start from, ``held_out_share``, ``eos_token_id`` and ``chunk_tokens``."""


def build(folder: Path, plan: Plan, reader: Reader, encoder: Encoder, *, wanted: Callable[[], int]) -> None:
    """Continues a domain's folder until it is complete, or holds ``wanted()`` tokens if it is streamed.

    The caller holds the folder's lock. Raises DataError if the source cannot be read, or has no text.
    """
    if reader.streamed:
        _tokenise(folder, plan, reader, encoder, wanted)
        return
    raw = folder / "in-order"
    if not is_complete(folder):
        raw.mkdir(exist_ok=True)
        _tokenise(raw, plan, reader, encoder, lambda: 2**62)
        _shuffle(chunks_in(raw), folder, encoder.dtype, plan["chunk_tokens"])
    shutil.rmtree(raw, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    chunks = chunks_in(folder)
    return bool(chunks) and bool(chunks[-1].header["last"])


def _tokenise(folder: Path, plan: Plan, reader: Reader, encoder: Encoder, wanted: Callable[[], int]) -> None:
    """Chunks in reading order, from where the last one ended."""
    chunks, share = chunks_in(folder), plan["held_out_share"]
    if is_complete(folder):
        return
    seen = {int(value) for chunk in chunks for kind in ("", "held_out_") for value in chunk.arrays[f"{kind}hashes"]}
    tokens = sum(chunk.counts.tokens for chunk in chunks)
    # Of about 1 MB, so that many threads have something to do, and a chunk ends near where it should.
    batches = _batches(reader.read(chunks[-1].header["state"] if chunks else None), plan["chunk_tokens"] // 4)
    number = len(chunks)
    last = False
    while not last and tokens < wanted():
        documents: list[_Tokenised] = []
        new_tokens = duplicates = replaced = 0
        last, state = True, None
        for texts in batches:
            state = reader.state()
            whole = [whole_characters(text) for text in texts]
            replaced += sum(text is not given for text, given in zip(whole, texts, strict=True))
            new = {text_hash: text for text in whole if (text_hash := hash_of(text)) not in seen}
            seen.update(new)
            duplicates += len(texts) - len(new)
            for (text_hash, text), ids in zip(new.items(), encoder(list(new.values())), strict=True):
                documents.append(_Tokenised(ids, text_hash, text.encode()))
                new_tokens += 0 if is_held_out(text, share) else len(ids)
            if new_tokens >= plan["chunk_tokens"]:
                last = False
                break
        if not number and not documents:
            raise DataError("there is no text in it")
        chosen = held_out_among([document.hash for document in documents], share, at_least_one=not number)
        train = [document for document in documents if document.hash not in chosen]
        held_out = [document for document in documents if document.hash in chosen]
        forced = next((document.hash for document in held_out if document.hash >= share * 2**64), None)
        counts = Counts(*_sizes(train), *_sizes(held_out), duplicates, replaced)
        arrays = _arrays(train, held_out, encoder.dtype)
        write_chunk(chunk_file(folder, number), arrays, counts, last=last, state=state, forced=forced)
        number += 1
        tokens += counts.tokens


class _Tokenised(NamedTuple):
    tokens: np.ndarray
    hash: int
    text: bytes


def _sizes(documents: list[_Tokenised]) -> tuple[int, int, int]:
    """How many documents, tokens and bytes."""
    return len(documents), sum(len(d.tokens) for d in documents), sum(len(d.text) for d in documents)


def _arrays(train: list[_Tokenised], held_out: list[_Tokenised], dtype: Any) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {
        "held_out_text": np.frombuffer(b"".join(d.text for d in held_out), dtype=np.uint8),
        "held_out_text_ends": np.cumsum([len(d.text) for d in held_out], dtype=np.int64),
    }
    for prefix, documents in (("", train), ("held_out_", held_out)):
        arrays |= {
            f"{prefix}tokens": np.concatenate([np.zeros(0, dtype), *(d.tokens for d in documents)]).astype(dtype),
            f"{prefix}ends": np.cumsum([len(d.tokens) for d in documents], dtype=np.int64),
            f"{prefix}hashes": np.array([d.hash for d in documents], dtype=np.uint64),
        }
    return arrays


def _batches(documents: Iterator[str], size: int) -> Iterator[list[str]]:
    """Documents in lists of about ``size`` characters."""
    texts: list[str] = []
    characters = 0
    for text in documents:
        texts.append(text)
        characters += len(text)
        if characters >= size:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def _shuffle(chunks: list[Chunk], folder: Path, dtype: Any, chunk_tokens: int) -> None:
    """The same documents in chunks of another order: that of the whole corpus, shuffled. No text is read for it."""
    sizes = [np.diff(chunk.arrays["ends"], prepend=0) for chunk in chunks]
    places = np.concatenate([np.stack([np.full(len(s), i), np.arange(len(s))]) for i, s in enumerate(sizes)], axis=1)
    order = permutation(places.shape[1], SHUFFLE_SEED)
    ends = np.cumsum(np.concatenate(sizes)[order])
    total = int(ends[-1]) if len(ends) else 0
    num_chunks = max(1, round(total / chunk_tokens))
    cuts = np.searchsorted(ends, np.arange(1, num_chunks) * (total / num_chunks))
    for number, part in enumerate(np.split(order, cuts)):
        last = number == num_chunks - 1
        train = [
            _Tokenised(chunks[i].piece("tokens", "ends", place), int(chunks[i].arrays["hashes"][place]), b"")
            for i, place in places[:, part].T.tolist()
        ]
        # Held-out documents stay in their order, in any chunk.
        beside = chunks[number:] if last else chunks[number : number + 1]
        counts = sum((chunk.counts for chunk in beside), Counts())
        counts.documents, counts.tokens, _ = _sizes(train)
        held_out = [
            _Tokenised(chunk.held_out_tokens(place), text_hash, chunk.held_out_text(place).encode())
            for chunk in beside
            for place, text_hash in enumerate(chunk.arrays["held_out_hashes"].tolist())
        ]
        arrays = _arrays(train, held_out, dtype)
        forced = chunks[0].header["forced"] if number == 0 else None
        write_chunk(chunk_file(folder, number), arrays, counts, last=last, state=None, forced=forced)


def permutation(length: int, *seed: int) -> np.ndarray:
    """0 to ``length`` - 1 in an order that depends on the seed alone; numpy keeps raw bits the same for ever, while
    its shuffling may change with its version."""
    bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(length)
    return np.argsort(bits, kind="stable")


# ---- Chunks on disk ----


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
        except SafetensorError as error:
            raise system_error(error) from error
        finally:
            temporary.unlink(missing_ok=True)


class Chunk:
    """A chunk on disk; its arrays are mapped when first used."""

    def __init__(self, file: Path):
        self.file = file

    @cached_property
    def header(self) -> dict[str, Any]:
        """Counts, and what ``write_chunk`` was told."""
        from safetensors import safe_open

        with safe_open(self.file, "numpy") as stream:
            return dict(json.loads(stream.metadata()["branchmix"]))

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

    def held_out_tokens(self, place: int) -> np.ndarray:
        return self.piece("held_out_tokens", "held_out_ends", place)

    def held_out_text(self, place: int) -> str:
        return self.piece("held_out_text", "held_out_text_ends", place).tobytes().decode()


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


# ---- In a process of its own ----


def main(folder: Path) -> int:
    """Continues ``folder`` as stdin says: a plan, then numbers of tokens. It ends with the process at the other end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to whole jobs; the run may need text for its last step
    plan: Plan = json.loads(sys.stdin.readline())
    wanted = [int(sys.stdin.readline())]

    def listen() -> None:
        for line in sys.stdin:
            wanted[0] = max(wanted[0], int(line))
        os._exit(0)  # an unfinished chunk is lost, and read again next time

    threading.Thread(target=listen, daemon=True).start()
    try:
        reader = open_source(Source(**plan["source"]), folder=Path(plan["folder"]))
        encoder = Encoder((folder / TOKENIZER_FILE).read_text(encoding="utf-8"), plan["eos_token_id"])
        while not is_complete(folder):
            with locked(folder / LOCK):  # released after each round: other runs may want more than this one
                build(folder, plan, reader, encoder, wanted=lambda: wanted[0])
            time.sleep(0.2)
    except Exception as error:
        known = isinstance(error, BranchMixError)
        message = str(error) if known else f"reading in the background failed: {type(error).__name__}: {error}"
        write_json(folder / FAILURE_FILE, {"error": message})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""Tokenises a source into chunks, in this process or in one of its own: ``python -m branchmix.data.build FOLDER``.

Local files are read once, split into documents to train on and documents held out, and then shuffled as a whole. A
streamed source becomes chunks in the order it is read, as far as it is needed; the rest is done in the background.
A process that writes into a domain's folder holds its lock, which the system frees when the process dies.
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
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from branchmix.checkpoint.folder import write_json
from branchmix.checkpoint.text import LONG, Window, tokens_in_pieces, whole_characters
from branchmix.data.config import Source
from branchmix.data.sources import Reader, frozen, hash_of, open_source
from branchmix.data.tokens import (
    Chunk,
    Counts,
    Documents,
    chunk_file,
    chunks_in,
    dtype_for,
    utf8,
    write_chunk,
)
from branchmix.errors import BranchMixError, DataError

CHUNK_TOKENS = 4_000_000
"""Tokens of a chunk, approximately: 8 MB on disk, and what is lost when a process is killed."""
SHUFFLE_SEED = 20240815

Progress = Callable[[str, int, int], None]
TOKENIZER_FILE, PLAN_FILE, FAILURE_FILE = "tokenizer.json", "plan.json", "failure.json"


class Encoder:
    """A tokenizer's Rust core: many documents at once, on all cores, with its special tokens and EOS at the end."""

    def __init__(self, tokenizer_json: str, eos_token_id: int | None):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.eos_token_id = eos_token_id
        self.dtype = dtype_for(self.tokenizer.get_vocab_size(with_added_tokens=True))

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
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class Plan(TypedDict):
    """What a domain's tokens are made of, as JSON."""

    name: str
    source: dict[str, Any]
    folder: str
    """Where the source's relative paths start from."""
    held_out_share: float
    eos_token_id: int | None
    chunk_tokens: int


def build(
    folder: Path, plan: Plan, reader: Reader, encoder: Encoder, *, wanted: Callable[[], int], progress: Progress
) -> None:
    """Continues a domain's folder until it is complete, or holds ``wanted()`` tokens if it is streamed.

    The caller holds the folder's lock. Raises DataError if the source cannot be read, or has no text.
    """
    if reader.streamed:
        _tokenise(folder, plan, reader, encoder, wanted, progress)
        return
    raw = folder / "in-order"
    if not is_complete(folder):
        raw.mkdir(exist_ok=True)
        _tokenise(raw, plan, reader, encoder, lambda: 2**62, progress)
        _shuffle(chunks_in(raw), folder, encoder.dtype, plan["chunk_tokens"])
    shutil.rmtree(raw, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    chunks = chunks_in(folder)
    return bool(chunks) and bool(chunks[-1].header["last"])


def _tokenise(
    folder: Path, plan: Plan, reader: Reader, encoder: Encoder, wanted: Callable[[], int], progress: Progress
) -> None:
    """Chunks in reading order, from where the last one ended."""
    chunks = chunks_in(folder)
    if is_complete(folder):
        return
    seen = {int(value) for chunk in chunks for kind in ("", "held_out_") for value in chunk.arrays[f"{kind}hashes"]}
    tokens = sum(chunk.counts.tokens for chunk in chunks)
    # Of about 1 MB, so that many threads have something to do, and a chunk ends near where it should.
    batches = _batches(reader.read(chunks[-1].header["state"] if chunks else None), plan["chunk_tokens"] // 4)
    number = len(chunks)
    while tokens < wanted():
        content = _Content(plan["held_out_share"], hold_one=number == 0)
        last, state = True, None
        for texts, state in batches:
            whole = [whole_characters(text) for text in texts]
            content.replaced += sum(text is not given for text, given in zip(whole, texts, strict=True))
            hashed = {hash_of(text): text for text in whole}
            new = {text_hash: text for text_hash, text in hashed.items() if text_hash not in seen}
            seen.update(new)
            content.duplicates += len(texts) - len(new)
            for (text_hash, text), ids in zip(new.items(), encoder(list(new.values())), strict=True):
                content.add(text, text_hash, ids)
            done, total = reader.bytes_read(state)
            if not total:
                done, total = min(tokens + content.train.num_tokens, wanted()), wanted()
            progress(f"tokenising {plan['name']}", done, total)
            if content.train.num_tokens >= plan["chunk_tokens"]:
                last = False
                break
        if last and number == 0 and not content.train.tokens and not content.held_out.tokens:
            raise DataError("there is no text in it")
        arrays, counts = content.finished(encoder.dtype)
        write_chunk(chunk_file(folder, number), arrays, counts, last=last, state=state, forced=content.forced)
        number += 1
        tokens += counts.tokens
        if last:
            return


class _Content:
    """A chunk while it is being filled."""

    def __init__(self, held_out_share: float, *, hold_one: bool):
        self.limit = held_out_share * 2**64
        self.hold_one = hold_one and held_out_share > 0
        self.train, self.held_out = Documents(), Documents()
        self.texts: list[str] = []
        self.duplicates = self.replaced = 0
        self.forced: int | None = None
        """Hash of a document that is held out though its hash does not say so."""
        self._lowest: tuple[int, str, int] | None = None

    def add(self, text: str, text_hash: int, ids: np.ndarray) -> None:
        num_bytes = len(text.encode())
        if text_hash < self.limit:
            self.held_out.add(ids, text_hash, num_bytes)
            self.texts.append(text)
            return
        if self.hold_one and (self._lowest is None or text_hash < self._lowest[0]):
            self._lowest = (text_hash, text, len(self.train.tokens))
        self.train.add(ids, text_hash, num_bytes)

    def finished(self, dtype: Any) -> tuple[dict[str, np.ndarray], Counts]:
        """Arrays as ``write_chunk`` takes them; the first chunk has a document to evaluate on, if it has two."""
        if self.hold_one and not self.texts and self._lowest is not None and len(self.train.tokens) > 1:
            text_hash, text, place = self._lowest
            num_bytes = len(text.encode())
            self.held_out.add(self.train.remove(place, num_bytes), text_hash, num_bytes)
            self.texts.append(text)
            self.forced = text_hash
        content, ends = utf8(self.texts)
        arrays = {
            **self.train.arrays("", dtype),
            **self.held_out.arrays("held_out_", dtype),
            "held_out_text": content,
            "held_out_text_ends": ends,
        }
        train, held_out = ((len(part.tokens), part.num_tokens, part.bytes) for part in (self.train, self.held_out))
        return arrays, Counts(*train, *held_out, self.duplicates, self.replaced)


def _batches(documents: Iterator[tuple[str, Any]], size: int) -> Iterator[tuple[list[str], Any]]:
    """Documents in lists of about ``size`` characters, each with the state after it."""
    texts: list[str] = []
    characters = 0
    for text, state in documents:
        texts.append(text)
        characters += len(text)
        if characters >= size:
            yield texts, frozen(state)
            texts, characters = [], 0
    if texts:
        yield texts, frozen(state)


def _shuffle(chunks: list[Chunk], folder: Path, dtype: Any, chunk_tokens: int) -> None:
    """The same documents in chunks of another order: that of the whole corpus, shuffled. No text is read for it."""
    sizes = [np.diff(chunk.arrays["ends"], prepend=0) for chunk in chunks]
    places = np.concatenate([np.stack([np.full(len(s), i), np.arange(len(s))]) for i, s in enumerate(sizes)], axis=1)
    order = permutation(places.shape[1], SHUFFLE_SEED)
    ends = np.cumsum(np.concatenate(sizes)[order])
    num_chunks = max(1, round(int(ends[-1]) / chunk_tokens)) if len(ends) else 1
    cuts = np.searchsorted(ends, np.arange(1, num_chunks) * (int(ends[-1]) / num_chunks if len(ends) else 0))
    for number, part in enumerate(np.split(order, cuts)):
        last = number == num_chunks - 1
        train = Documents()
        for chunk_index, document in places[:, part].T.tolist():
            arrays = chunks[chunk_index].arrays
            end = int(arrays["ends"][document])
            train.add(
                arrays["tokens"][end - int(sizes[chunk_index][document]) : end], int(arrays["hashes"][document]), 0
            )
        # Held-out documents stay in their order, in any chunk.
        beside = chunks[number:] if last else chunks[number : number + 1]
        counts = sum((chunk.counts for chunk in beside), Counts())
        held_out: dict[str, np.ndarray] = {}
        for key in ("held_out_tokens", "held_out_hashes", "held_out_text"):
            held_out[key] = np.concatenate([chunk.arrays[key] for chunk in beside] or [np.zeros(0, np.uint8)])
        for key in ("held_out_ends", "held_out_text_ends"):
            lengths = [np.diff(chunk.arrays[key], prepend=0) for chunk in beside]
            held_out[key] = np.cumsum(np.concatenate(lengths or [np.zeros(0, np.int64)]))
        counts.documents, counts.tokens = len(train.tokens), train.num_tokens
        forced = chunks[0].header["forced"] if number == 0 else None
        file = chunk_file(folder, number)
        write_chunk(file, {**train.arrays("", dtype), **held_out}, counts, last=last, state=None, forced=forced)


def permutation(length: int, *seed: int) -> np.ndarray:
    """0 to ``length`` - 1 in an order that depends on the seed alone; numpy keeps raw bits the same for ever, while
    its shuffling may change with its version."""
    bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(length)
    return np.argsort(bits, kind="stable")


# ---- In a process of its own ----


def folder_lock(folder: Path) -> Any:
    """Held by the process that writes into ``folder``; the system frees it when that process dies."""
    from filelock import FileLock

    return FileLock(folder / "lock")


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
            with folder_lock(folder):  # released after each round: other runs may want more than this one
                build(folder, plan, reader, encoder, wanted=lambda: wanted[0], progress=lambda *_: None)
            time.sleep(0.2)
    except Exception as error:
        known = isinstance(error, BranchMixError)
        message = str(error) if known else f"reading in the background failed: {type(error).__name__}: {error}"
        write_json(folder / FAILURE_FILE, {"error": message})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""Writes expressions as a safetensors checkpoint at the speed of ``cp``, in a few megabytes of memory.

All offsets are known beforehand, so headers come first and a few threads fill the tensors in. Stored bytes pass
through one buffer that fits the second-level cache: read, checked for NaN and Inf, written. That is faster than
``copy_file_range`` (ranges of tensors are never block-aligned, so no file system shares their blocks), needs no second
pass for the check, and notices a source that is cut meanwhile. Early write-back lets the disk start at once.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from branchmix.checkpoint.expressions import ByteRange, Expression, Stored, cut_ranges, opened, read_into
from branchmix.checkpoint.folder import fsync_path, libc, write_json, writing
from branchmix.checkpoint.index import DTYPE_BITS, INDEX_FILE, SINGLE_FILE, TensorRef
from branchmix.checkpoint.numbers import Array, storage, widened
from branchmix.errors import CheckpointError

BUFFER_BYTES = 1 << 18
"""Fits the second-level cache beside everything else; 1 MiB was half as fast."""
TASK_BYTES = 1 << 24
"""The work of a thread at a time, and the bytes handed to write-back at once."""
_SYNC_FILE_RANGE_WRITE = 2
_FINITE_BELOW = {
    "BF16": (np.int16, np.uint16, 0x7F80),
    "F16": (np.int16, np.uint16, 0x7C00),
    "F32": (np.int32, np.uint32, 0x7F80_0000),
    "F64": (np.int64, np.uint64, 0x7FF0_0000_0000_0000),
}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the checkpoint to be written."""

    name: str
    expression: Expression
    offset: int = -1
    """In bytes, from the beginning of its file, once that is planned."""


@dataclass(frozen=True)
class Shard:
    """One file of the output, planned."""

    name: str
    header: bytes
    """Everything before the data: length and padded JSON."""
    tensors: tuple[OutputTensor, ...]
    nbytes: int
    """Size of the whole file."""


def write_checkpoint(
    tensors: Sequence[OutputTensor],
    folder: Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    check: bool = True,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Path, ...]:
    """Writes ``tensors`` into the existing ``folder``: model.safetensors, or shards and their index file.

    The index file is written last. On an error the folder holds unfinished files: use it inside ``atomic_folder``.

    Args:
        max_shard_bytes: tensor bytes in one file; a larger tensor gets a file of its own.
        check: refuse NaN and Inf in what is read, and values that overflow in what is computed.
        threads: default: as many as there are processors, at most 4.
        progress: called with the tensor bytes done so far, from the writing threads, one at a time.

    Returns:
        The weight files and, if there are several, their index.

    Raises:
        CheckpointError: a source cannot be read, or holds NaN or Inf (with tensor, file and index).
        OutputError: the disk is full, or a file cannot be written.
    """
    shards = shard_plan(tensors, max_shard_bytes=max_shard_bytes)
    state = _Run(check=check, progress=progress)
    num_threads = threads or min(4, os.cpu_count() or 1)
    if not hasattr(os, "pwrite"):
        num_threads = 1  # without positioned writes the threads would share one file position
    with ExitStack() as stack:
        targets = []
        for shard in shards:
            file = folder / shard.name
            with writing(file):
                fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
                stack.callback(os.close, fd)
                _allocate(fd, shard.nbytes)
                _write_at(fd, 0, memoryview(shard.header))
            targets.append((fd, file, shard))
        # In turn from each file: a file system lets one thread at a time write to a file, and the others spin.
        turns = zip_longest(*(_tasks(fd, file, shard) for fd, file, shard in targets))
        tasks = (task for turn in turns for task in turn if task is not None)
        with ThreadPoolExecutor(num_threads, thread_name_prefix="branchmix-writer") as pool:
            workers = [pool.submit(state.work, tasks) for _ in range(num_threads)]
            try:
                for worker in workers:
                    worker.result()
            except BaseException:
                state.stop.set()
                raise
        for fd, file, _ in targets:
            with writing(file):
                os.fsync(fd)
    files = [file for _, file, _ in targets]
    if len(shards) > 1:
        weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        metadata = {"total_size": sum(tensor.expression.nbytes for tensor in tensors)}
        files.append(folder / INDEX_FILE)
        write_json(files[-1], {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
        with writing(files[-1]):
            fsync_path(files[-1])
    return tuple(files)


def shard_plan(tensors: Sequence[OutputTensor], *, max_shard_bytes: int = 5_000_000_000) -> tuple[Shard, ...]:
    """Files, headers and offsets of the checkpoint that ``write_checkpoint`` would write; reads and writes nothing.

    Shards are filled greedily in the given order. Within one, larger elements come first, which aligns every tensor
    without padding (the format allows none).
    """
    assert len({tensor.name for tensor in tensors}) == len(tensors), "two output tensors of one name"
    groups: list[list[OutputTensor]] = [[]]
    used = 0
    for tensor in tensors:
        if groups[-1] and used + tensor.expression.nbytes > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.expression.nbytes
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else [SINGLE_FILE]
    return tuple(_laid_out(name, group) for name, group in zip(names, groups, strict=True))


def _laid_out(name: str, tensors: list[OutputTensor]) -> Shard:
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.expression.dtype])
    offsets = list(accumulate((tensor.expression.nbytes for tensor in ordered), initial=0))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor, span in zip(ordered, pairwise(offsets), strict=True):
        value = tensor.expression
        header[tensor.name] = {"dtype": value.dtype, "shape": list(value.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed = tuple(replace(tensor, offset=start + at) for tensor, at in zip(ordered, offsets, strict=False))
    return Shard(name, len(text).to_bytes(8, "little") + text, placed, start + offsets[-1])


@dataclass(frozen=True)
class _Stretch:
    """Rows [start, stop) of one output tensor, of which ``ranges`` are the source bytes, unless it is computed."""

    fd: int
    file: Path
    tensor: OutputTensor
    ranges: list[ByteRange] | None
    start: int
    stop: int

    @property
    def place(self) -> tuple[int, int]:
        """Offset in the output file, and number of bytes."""
        size = self.tensor.expression.row_nbytes
        return self.tensor.offset + self.start * size, (self.stop - self.start) * size


def _tasks(fd: int, file: Path, shard: Shard) -> Iterator[_Stretch]:
    """The shard's work in file order."""
    for tensor in shard.tensors:
        value, ranges = tensor.expression, tensor.expression.ranges()
        step = max(1, TASK_BYTES // max(1, value.row_nbytes))
        for row in range(0, value.num_rows if value.nbytes else 0, step):
            yield _Stretch(fd, file, tensor, ranges, row, min(row + step, value.num_rows))


class _Run:
    """What the threads of one ``write_checkpoint`` share."""

    def __init__(self, *, check: bool, progress: Callable[[int], None] | None):
        self.check = check
        self.progress = progress
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.done = 0
        self.checked: set[ByteRange] = set()

    def work(self, tasks: Iterator[_Stretch]) -> None:
        """One thread: takes tasks until there are none, or another thread has failed."""
        buffer = np.empty(BUFFER_BYTES, np.uint8)
        try:
            while not self.stop.is_set():
                with self.lock:
                    task = next(tasks, None)
                if task is None:
                    return
                if task.ranges is not None:
                    self._copy(task, task.ranges, buffer)
                else:
                    self._compute(task)
                offset, nbytes = task.place
                _start_write_back(task.fd, offset, nbytes)
                with self.lock:
                    self.done += nbytes
                    if self.progress is not None:
                        self.progress(self.done)
        except BaseException:
            self.stop.set()
            raise

    def _copy(self, task: _Stretch, ranges: list[ByteRange], buffer: Array) -> None:
        value = task.tensor.expression
        to, _ = task.place
        for source in cut_ranges(ranges, task.start * value.row_nbytes, task.stop * value.row_nbytes):
            file, first, nbytes = source
            check = self.check and source not in self.checked
            with opened(file) as stream:
                for start in range(0, nbytes, BUFFER_BYTES):
                    block = buffer[: min(BUFFER_BYTES, nbytes - start)]
                    read_into(stream, first + start, block)
                    self._write(task, to + start, block, check=check)
            to += nbytes
            self.checked.add(source)

    def _compute(self, task: _Stretch) -> None:
        value = task.tensor.expression
        step = max(1, value.block_nbytes // max(1, value.row_nbytes))
        to, _ = task.place
        for row in range(task.start, task.stop, step):
            stop = min(row + step, task.stop)
            block = np.ascontiguousarray(value.rows(row, stop))
            assert block.nbytes == (stop - row) * value.row_nbytes and block.dtype == storage(value.dtype)
            self._write(task, to, block, check=self.check)
            to += block.nbytes

    def _write(self, task: _Stretch, offset: int, block: Array, *, check: bool) -> None:
        dtype = task.tensor.expression.dtype
        if check and dtype in _FINITE_BELOW and not all_finite(block, dtype):
            _blame(task.tensor)
        with writing(task.file):
            _write_at(task.fd, offset, block.reshape(-1).view(np.uint8).data)


def all_finite(block: Array, dtype: str) -> bool:
    """Whether contiguous ``block``, values of ``dtype`` in whatever view, is free of NaN and Inf.

    Two maxima, which numpy takes at 50 GB/s from cache: as signed integers, the positive non-finite values are the
    largest; as unsigned ones, the negative are.
    """
    signed, unsigned, limit = _FINITE_BELOW[dtype]
    bits = block.reshape(-1).view(signed)
    if not bits.size:
        return True
    sign = 1 << (DTYPE_BITS[dtype] - 1)
    return int(bits.max()) < limit and int(bits.view(unsigned).max()) < limit | sign


def _blame(tensor: OutputTensor) -> None:
    """Raises for the first NaN or Inf among the tensor's sources; if there is none, the result has overflowed."""
    for ref in dict.fromkeys(tensor.expression.sources()):
        if ref.dtype in _FINITE_BELOW and (first := _first_non_finite(ref)):
            kind, index = first
            raise CheckpointError(
                f"{ref.file}: tensor {ref.name} has {kind} at {list(index)}: "
                "the checkpoint is damaged, or its training diverged"
            )
    raise CheckpointError(
        f"tensor {tensor.name}: computed values do not fit {tensor.expression.dtype}: write it in bfloat16 or float32"
    )


def _first_non_finite(ref: TensorRef) -> tuple[str, tuple[int, ...]] | None:
    source = Stored(ref)
    step = max(1, source.block_nbytes // max(1, source.row_nbytes))
    for start in range(0, source.num_rows, step):
        values = widened(source.rows(start, min(start + step, source.num_rows)), ref.dtype)
        for row, *inner in np.argwhere(~np.isfinite(values)).tolist():
            return "NaN" if np.isnan(values[(row, *inner)]) else "Inf", (start + row, *inner)
    return None


def _write_at(fd: int, offset: int, data: memoryview) -> None:
    while data:
        if hasattr(os, "pwrite"):
            done = os.pwrite(fd, data, offset)
        else:
            os.lseek(fd, offset, os.SEEK_SET)
            done = os.write(fd, data)
        data, offset = data[done:], offset + done


def _allocate(fd: int, nbytes: int) -> None:
    """Reserves the file's space at once, so that a full disk shows before any work; else only sets the size.

    Not ``os.posix_fallocate``, which writes into every block where the file system cannot reserve.
    """
    fallocate = libc("fallocate64") or libc("fallocate")
    if fallocate is not None:
        if fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) == 0:
            return
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))
    os.ftruncate(fd, nbytes)


def _start_write_back(fd: int, offset: int, nbytes: int) -> None:
    """Asks the kernel to begin writing what the task left in the page cache; only a hint, so errors don't matter."""
    sync = libc("sync_file_range")
    if sync is not None:
        sync(fd, ctypes.c_int64(offset), ctypes.c_int64(nbytes), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


class FileHashes:
    """Hashes of a mixture's source files, computed in a thread while it is written; leaving the context stops that.

    XXH3 of 128 bits, which `xxh128sum` prints: it identifies files and does not protect against forgery. BLAKE3 took a
    quarter of the merge's CPU time, SHA-256 more than twice that. Files of the Hub's cache are named by their SHA-256
    already and are not read.
    """

    def __init__(self, files: Sequence[Path]):
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, "branchmix-hashes", initializer=_wait_for_others)
        self._hashes = {file: self._pool.submit(self._hash_of, file) for file in dict.fromkeys(files)}

    def __enter__(self) -> FileHashes:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def of(self, file: Path) -> dict[str, str]:
        """``{"xxh3_128": ...}`` or ``{"sha256": ...}``, waiting if need be; empty for a file that was not asked for."""
        return self._hashes[file].result() if file in self._hashes else {}

    def _hash_of(self, file: Path) -> dict[str, str]:
        from xxhash import xxh3_128

        target = file.resolve()
        if target.parent.name == "blobs" and len(target.name) == 64:
            return {"sha256": target.name}
        digest, buffer = xxh3_128(), memoryview(bytearray(BUFFER_BYTES))
        with file.open("rb", buffering=0) as opened:
            while (count := opened.readinto(buffer)) and not self._stop.is_set():
                digest.update(buffer[:count])
        return {"xxh3_128": digest.hexdigest()}


def _wait_for_others() -> None:
    """Processors belong to the writing first: hashes fill the time in which it waits for the disk."""
    if sys.platform.startswith("linux"):  # elsewhere it would be the whole process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)

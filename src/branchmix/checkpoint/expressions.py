"""Output tensors as small, lazily evaluated expressions over stored ones: what a plan is made of.

An expression knows its dtype and shape without reading data. If its value is nothing but source bytes, ``ranges()``
says which, and the writer has the kernel copy them; else ``rows(start, stop)`` computes a block of rows.

Numbers: sums of 16-bit parts are in float32, of 32- and 64-bit parts in float64; the result is rounded once, to
nearest even. bfloat16, which numpy lacks, is held as uint16 bits. Scalars count as one row and come with shape (1,).
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from branchmix.checkpoint.index import DTYPE_BITS, TensorRef
from branchmix.errors import CheckpointError

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
ByteRange = tuple[Path, int, int]
"""File, absolute offset, number of bytes."""
Span = tuple[int, int]
"""First index and the one after the last."""

FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
_STORAGE = dict(BF16="<u2", F16="<f2", F32="<f4", F64="<f8", C64="<c8", BOOL="|u1")  # noqa: C408
_STORAGE |= dict(U8="|u1", I8="|i1", U16="<u2", I16="<i2", U32="<u4", I32="<i4", U64="<u8", I64="<i8")  # noqa: C408
_STORAGE |= {code: "|u1" for code in DTYPE_BITS if code.startswith("F8_")}
_CHUNK_BYTES = 1 << 20
_NORMAL_CHUNK = 1 << 16


class Expression(ABC):
    """The value of one output tensor."""

    dtype: str
    """safetensors code."""
    shape: Shape

    @abstractmethod
    def parts_read(self) -> tuple[Expression, ...]:
        """The expressions this one is made of."""

    @abstractmethod
    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        """Rows [start, stop) along dim 0; of a 2-D expression only the given columns.

        Returns an array of ``storage(dtype)`` and shape [stop - start, *shape[1:]], possibly a strided view.

        Raises:
            CheckpointError: a source file cannot be read, or has become shorter.
        """

    def ranges(self) -> list[ByteRange] | None:
        """The contiguous source ranges that make up the value in this order, or None if it has to be computed."""
        return None

    def sources(self) -> Iterator[TensorRef]:
        """Every stored tensor that is read, once for each use."""
        for part in self.parts_read():
            yield from part.sources()

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_nbytes(self) -> int:
        return math.prod(self.shape[1:]) * DTYPE_BITS[self.dtype] // 8

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.row_nbytes

    @property
    def block_nbytes(self) -> int:
        """How many bytes of rows to ask for at a time: what fits the cache."""
        return max((part.block_nbytes for part in self.parts_read()), default=1 << 19)

    def _become(self, dtype: str, shape: Shape) -> None:
        """Sets the two derived fields of a frozen dataclass."""
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "shape", shape)


def storage(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that holds ``dtype``: bfloat16 and the 8-bit floats as their bits."""
    assert dtype in _STORAGE, f"{dtype} elements are no whole bytes"
    return np.dtype(_STORAGE[dtype])


def to_float32(array: Array, dtype: str) -> npt.NDArray[np.float32]:
    """Values of an array that holds ``dtype`` (one of ``FLOAT_DTYPES``); exact for all but F64."""
    assert dtype in FLOAT_DTYPES, dtype
    if dtype != "BF16":
        return array.astype(np.float32, copy=False)
    bits = array.astype(np.uint32)
    np.left_shift(bits, 16, out=bits)
    return bits.view(np.float32)


def from_float32(array: Array, dtype: str) -> Array:
    """``array`` of float32 (or float64) rounded to nearest even; NaN stays NaN, what is too large becomes infinite."""
    assert dtype in FLOAT_DTYPES, dtype
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "BF16":
            return array.astype(storage(dtype), copy=False)
        values = np.ascontiguousarray(array.astype(np.float32, copy=False))
    bits = values.view(np.uint32)
    rounded = bits >> 16
    np.bitwise_and(rounded, 1, out=rounded)
    np.add(rounded, 0x7FFF, out=rounded)
    np.add(rounded, bits, out=rounded)
    np.right_shift(rounded, 16, out=rounded)
    result = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        result[nan] = (bits[nan] >> 16) | 0x0040
    return result


def _accumulator(dtype: str) -> type[np.float32] | type[np.float64]:
    """float32 holds sums of 16-bit floats; three times a float32 does not fit float32, so those are summed in 64."""
    return np.float32 if dtype in ("BF16", "F16") else np.float64


def _widened(array: Array, dtype: str) -> Array:
    return array.astype(np.float64) if _accumulator(dtype) is np.float64 else to_float32(array, dtype)


@dataclass(frozen=True)
class Source(Expression):
    """A stored tensor as it is."""

    ref: TensorRef
    dtype: str = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        self._become(self.ref.dtype, self.ref.shape)

    def parts_read(self) -> tuple[Expression, ...]:
        return ()

    def sources(self) -> Iterator[TensorRef]:
        yield self.ref

    def ranges(self) -> list[ByteRange]:
        return [(self.ref.file, self.ref.offset, self.ref.nbytes)]

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        element, row_nbytes = storage(self.dtype), self.row_nbytes
        if columns is None:
            block = np.empty((stop - start, *self.shape[1:]), element)
            with opened(self.ref.file) as fd:
                read_into(fd, self.ref.file, self.ref.offset + start * row_nbytes, block)
            return block
        first, last = columns
        strip = np.empty((stop - start, last - first), element)
        skipped = row_nbytes - strip.shape[1] * element.itemsize
        with opened(self.ref.file) as fd:
            if skipped > 4096:  # one call costs about as much as reading so many bytes
                for row in range(start, stop):
                    offset = self.ref.offset + row * row_nbytes + first * element.itemsize
                    read_into(fd, self.ref.file, offset, strip[row - start])
                return strip
            step = max(1, _CHUNK_BYTES // max(1, row_nbytes))
            for row in range(start, stop, step):
                whole = np.empty((min(step, stop - row), self.shape[1]), element)
                read_into(fd, self.ref.file, self.ref.offset + row * row_nbytes, whole)
                strip[row - start : row - start + step] = whole[:, first:last]
        return strip


@contextmanager
def opened(file: Path) -> Iterator[int]:
    """A file descriptor for reading, closed at the end of the block."""
    try:
        fd = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def read_into(fd: int, file: Path, offset: int, block: Array) -> None:
    """Fills a contiguous array; a file that has been cut meanwhile is an error, where a mapping would kill us."""
    left = block.reshape(-1).view(np.uint8).data
    while left:
        try:
            if hasattr(os, "preadv"):
                got = os.preadv(fd, [left], offset)
            else:  # Windows; each descriptor belongs to one call of rows()
                os.lseek(fd, offset, os.SEEK_SET)
                piece = os.read(fd, len(left))
                got = len(piece)
                left[:got] = piece
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
        if not got:
            raise CheckpointError(f"{file}: has been truncated while it was read: nothing was written from it")
        left, offset = left[got:], offset + got


@dataclass(frozen=True)
class Rows(Expression):
    """Ranges of rows of a part, in this order; adjacent ranges are merged.

    Example: Rows(Source(qkv), ((0, 64), (128, 192))) has 128 rows.
    """

    part: Expression
    spans: tuple[Span, ...]
    dtype: str = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        merged: list[Span] = []
        for start, stop in self.spans:
            assert 0 <= start <= stop <= self.part.num_rows, f"rows {start}:{stop} of {self.part.num_rows}"
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], stop)
            elif start < stop:
                merged.append((start, stop))
        object.__setattr__(self, "spans", tuple(merged))
        self._become(self.part.dtype, (sum(b - a for a, b in merged), *self.part.shape[1:]))

    def parts_read(self) -> tuple[Expression, ...]:
        return (self.part,)

    def ranges(self) -> list[ByteRange] | None:
        whole = self.part.ranges()
        if whole is None:
            return None
        size = self.part.row_nbytes
        return merge_ranges([piece for a, b in self.spans for piece in cut_ranges(whole, a * size, b * size)])

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        pieces = [self.part.rows(a, b, columns) for a, b in _overlaps(self.spans, start, stop)]
        return _joined(pieces, self, columns)


@dataclass(frozen=True)
class Stack(Expression):
    """Parts below each other (dim 0), of one dtype and one row shape."""

    parts: tuple[Expression, ...]
    dtype: str = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        first = self.parts[0]
        for part in self.parts:
            assert part.dtype == first.dtype and part.shape[1:] == first.shape[1:] and part.shape, "parts don't stack"
        self._become(first.dtype, (sum(part.num_rows for part in self.parts), *first.shape[1:]))

    def parts_read(self) -> tuple[Expression, ...]:
        return self.parts

    def ranges(self) -> list[ByteRange] | None:
        found: list[ByteRange] = []
        for part in self.parts:
            piece = part.ranges()
            if piece is None:
                return None
            found += piece
        return merge_ranges(found)

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        pieces, top = [], 0
        for part in self.parts:
            a, b = max(start - top, 0), min(stop - top, part.num_rows)
            if a < b:
                pieces.append(part.rows(a, b, columns))
            top += part.num_rows
        return _joined(pieces, self, columns)


@dataclass(frozen=True)
class Columns(Expression):
    """Segments of columns of 2-D parts side by side: (part, start, stop), left to right.

    Example: the output projections [d, H*D] of N attention experts become one [d, N*H*D]; with shared K/V the segments
    alternate between the experts, one for each group of heads. However many they are, each part is read once.
    """

    segments: tuple[tuple[Expression, int, int], ...]
    dtype: str = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        first = self.segments[0][0]
        for part, start, stop in self.segments:
            assert len(part.shape) == 2 and part.dtype == first.dtype and part.num_rows == first.num_rows, "differ"
            assert 0 <= start <= stop <= part.shape[1], f"columns {start}:{stop} of {part.shape[1]}"
        self._become(first.dtype, (first.num_rows, sum(stop - start for _, start, stop in self.segments)))

    def parts_read(self) -> tuple[Expression, ...]:
        return tuple(self._moves)

    def ranges(self) -> list[ByteRange] | None:
        part, start, stop = self.segments[0]
        whole = len(self.segments) == 1 and (start, stop) == (0, part.shape[1])
        return part.ranges() if whole else None

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        low, high = columns or (0, self.shape[1])
        block = np.empty((stop - start, high - low), storage(self.dtype))
        for part, all_moves in self._moves.items():
            clipped = (
                (max(to, low), source + max(low - to, 0), min(to + width, high)) for to, source, width in all_moves
            )
            moves = [(to, source, end - to) for to, source, end in clipped if to < end]
            if not moves:
                continue
            first = min(source for _, source, _ in moves)
            last = max(source + width for _, source, width in moves)
            piece = part.rows(start, stop, (first, last))
            for to, source, width in moves:
                block[:, to - low : to - low + width] = piece[:, source - first : source - first + width]
        return block

    @cached_property
    def _moves(self) -> dict[Expression, list[tuple[int, int, int]]]:
        """For each part, (column here, column there, width) of its segments."""
        found: dict[Expression, list[tuple[int, int, int]]] = {}
        left = 0
        for part, start, stop in self.segments:
            found.setdefault(part, []).append((left, start, stop - start))
            left += stop - start
        return found


@dataclass(frozen=True)
class Transposed(Expression):
    """A 2-D part with rows and columns exchanged (GPT-2's Conv1D)."""

    part: Expression
    dtype: str = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        assert len(self.part.shape) == 2, "only matrices are transposed"
        self._become(self.part.dtype, self.part.shape[::-1])

    def parts_read(self) -> tuple[Expression, ...]:
        return (self.part,)

    def ranges(self) -> list[ByteRange] | None:
        return self.part.part.ranges() if isinstance(self.part, Transposed) else None

    @property
    def block_nbytes(self) -> int:
        return 1 << 22  # wider strips of the source's rows

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        low, high = columns or (0, self.shape[1])
        return self.part.rows(low, high, (start, stop)).T


@dataclass(frozen=True)
class Mean(Expression):
    """The (weighted) mean of parts, in ``dtype`` (default: the first part's).

    Parts may have fewer rows than the result (vocabularies of different sizes): a part then covers the first rows
    only, and each row is the mean over the parts that have it.
    """

    parts: tuple[Expression, ...]
    weights: tuple[float, ...] | None = None
    """Positive; they need not sum to 1. None: all equal."""
    dtype: str = ""
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        first = self.parts[0]
        for part in self.parts:
            assert part.shape[1:] == first.shape[1:] and len(part.shape) == len(first.shape), "row shapes differ"
            assert part.dtype in FLOAT_DTYPES, f"{part.dtype} has no mean"
        if self.weights is not None:
            assert len(self.weights) == len(self.parts) and min(self.weights) > 0, "one positive weight for each part"
        tallest = max(self.parts, key=lambda part: part.num_rows)
        self._become(self.dtype or first.dtype, tallest.shape)

    def parts_read(self) -> tuple[Expression, ...]:
        return self.parts

    def ranges(self) -> list[ByteRange] | None:
        return self.parts[0].ranges() if len(self.parts) == 1 and self.parts[0].dtype == self.dtype else None

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        width = self.shape[1:] if columns is None else (columns[1] - columns[0],)
        wide = max((_accumulator(part.dtype) for part in self.parts), key=lambda kind: np.dtype(kind).itemsize)
        total = np.empty((stop - start, *width), wide)
        edges = sorted({start, stop, *(part.num_rows for part in self.parts if start < part.num_rows < stop)})
        with np.errstate(over="ignore", invalid="ignore"):
            for low, high in pairwise(edges):
                rows, weight = total[low - start : high - start], 0.0
                for part, share in zip(self.parts, self.weights or (1.0,) * len(self.parts), strict=True):
                    if high <= part.num_rows:
                        values = _widened(part.rows(low, high, columns), part.dtype)
                        values = values if share == 1.0 else values * wide(share)
                        if weight:
                            np.add(rows, values, out=rows)
                        else:  # not added to zero, which would lose the sign of -0.0
                            np.copyto(rows, values)
                        weight += share
                np.divide(rows, wide(weight), out=rows)
        return from_float32(total, self.dtype)


@dataclass(frozen=True)
class Scaled(Expression):
    """A part times a constant."""

    part: Expression
    factor: float
    dtype: str = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        assert self.part.dtype in FLOAT_DTYPES, f"{self.part.dtype} is not scaled"
        self._become(self.part.dtype, self.part.shape)

    def parts_read(self) -> tuple[Expression, ...]:
        return (self.part,)

    def ranges(self) -> list[ByteRange] | None:
        return self.part.ranges() if self.factor == 1.0 else None

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        values = _widened(self.part.rows(start, stop, columns), self.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            return from_float32(values * values.dtype.type(self.factor), self.dtype)


@dataclass(frozen=True)
class Gained(Expression):
    """Column j of a matrix [out, in] times (gain[j] + offset): a norm's gain folded into the projection behind it."""

    part: Expression
    gain: Expression
    offset: float = 0.0
    """What the family adds to the stored gain (Gemma: 1)."""
    dtype: str = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        assert len(self.part.shape) == 2 and self.gain.shape == self.part.shape[1:], "one gain for each column"
        assert {self.part.dtype, self.gain.dtype} <= set(FLOAT_DTYPES), "gains are for floats"
        self._become(self.part.dtype, self.part.shape)

    def parts_read(self) -> tuple[Expression, ...]:
        return (self.part, self.gain)

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        low, high = columns or (0, self.shape[1])
        values = _widened(self.part.rows(start, stop, columns), self.dtype)
        gain = _widened(self.gain.rows(low, high), self.gain.dtype).astype(values.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            return from_float32(values * (gain + values.dtype.type(self.offset)), self.dtype)


@dataclass(frozen=True)
class Cast(Expression):
    """A part in another float dtype."""

    part: Expression
    dtype: str
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        assert {self.part.dtype, self.dtype} <= set(FLOAT_DTYPES) or self.part.dtype == self.dtype, (
            "only floats are cast"
        )
        self._become(self.dtype, self.part.shape)

    def parts_read(self) -> tuple[Expression, ...]:
        return (self.part,)

    def ranges(self) -> list[ByteRange] | None:
        return self.part.ranges() if self.part.dtype == self.dtype else None

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        values = self.part.rows(start, stop, columns)
        return values if self.part.dtype == self.dtype else from_float32(_widened(values, self.part.dtype), self.dtype)


@dataclass(frozen=True)
class Constant(Expression):
    """The same value everywhere."""

    shape: Shape
    value: float
    dtype: str

    def parts_read(self) -> tuple[Expression, ...]:
        return ()

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        width = self.shape[1:] if columns is None else (columns[1] - columns[0],)
        if self.dtype not in FLOAT_DTYPES:
            return np.full((stop - start, *width), self.value, storage(self.dtype))
        return from_float32(np.full((stop - start, *width), self.value, _accumulator(self.dtype)), self.dtype)


@dataclass(frozen=True, eq=False)
class Held(Expression):
    """Values computed beforehand and held in memory: small ones, such as routers from hidden states."""

    values: npt.NDArray[np.float32]
    dtype: str
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        assert self.values.dtype == np.float32 and self.dtype in FLOAT_DTYPES, "values are held as float32"
        self._become(self.dtype, tuple(self.values.shape))

    def parts_read(self) -> tuple[Expression, ...]:
        return ()

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        block = self.values[start:stop]
        return from_float32(block if columns is None else block[:, columns[0] : columns[1]], self.dtype)


@dataclass(frozen=True)
class Normal(Expression):
    """Draws from N(0, std^2) that depend on seed, key and position only: not on order, threads or blocks."""

    shape: Shape
    std: float
    seed: int
    key: str
    """Usually the tensor's name."""
    dtype: str

    def parts_read(self) -> tuple[Expression, ...]:
        return ()

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        width = math.prod(self.shape[1:])
        values = self._draws(start * width, stop * width).reshape(stop - start, *self.shape[1:])
        values *= np.float32(self.std)
        return from_float32(values if columns is None else values[:, slice(*columns)], self.dtype)

    def _draws(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Elements [start, stop) of a stream made of chunks, each with a counter of its own."""
        found = np.empty(stop - start, np.float32)
        for chunk in range(start // _NORMAL_CHUNK, -(-stop // _NORMAL_CHUNK)):
            top = chunk * _NORMAL_CHUNK
            low, high = max(start, top), min(stop, top + _NORMAL_CHUNK)
            draws = _generator(self.seed, self.key, chunk).standard_normal(high - top, np.float32)
            found[low - start : high - start] = draws[low - top :]
        return found


def _generator(seed: int, key: str, chunk: int = 0) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    philox_key = np.frombuffer(digest[:16], "<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=philox_key, counter=[0, 0, chunk, 0]))


@dataclass(frozen=True)
class PartlyRedrawn(Expression):
    """Drop-Upcycling: a fraction of a matrix's rows (axis 0) or columns (axis 1) drawn anew.

    The new values have mean and standard deviation of the old ones at these indices (Nakamura et al. 2025,
    arXiv:2502.19261). Matrices of one expert that share ``index_key`` lose the same intermediate units:
    axis 0 of gate and up, axis 1 of down.
    """

    part: Expression
    fraction: float
    """Between 0 and 1."""
    seed: int
    key: str
    """Decides the values."""
    index_key: str
    """Decides the indices, together with the seed."""
    axis: int
    dtype: str = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        assert 0 <= self.fraction <= 1 and self.axis in (0, 1) and self.part.dtype in FLOAT_DTYPES
        assert len(self.part.shape) == 2 or (len(self.part.shape) == 1 and self.axis == 0), "a matrix, or a bias"
        self._become(self.part.dtype, self.part.shape)

    def parts_read(self) -> tuple[Expression, ...]:
        return (self.part,)

    def ranges(self) -> list[ByteRange] | None:
        return None if len(self.indices) else self.part.ranges()

    @cached_property
    def indices(self) -> npt.NDArray[np.int64]:
        """The redrawn rows or columns, ascending."""
        size = self.shape[self.axis]
        order = _generator(self.seed, self.index_key).permutation(size)
        return np.sort(order[: round(self.fraction * size)])

    @cached_property
    def _draws(self) -> Normal:
        """The new values before their mean is added: as many rows or columns as there are ``indices``."""
        shape = list(self.shape)
        shape[self.axis] = len(self.indices)
        return Normal(tuple(shape), self._moments[1], self.seed, f"{self.key}:redrawn", "F32")

    @cached_property
    def _moments(self) -> tuple[float, float]:
        """Mean and standard deviation of the old values at ``indices``, read once in fixed blocks."""
        count, total, squares = 0, 0.0, 0.0
        step = max(1, _CHUNK_BYTES // max(1, self.row_nbytes))
        for start in range(0, self.num_rows, step):
            stop = min(start + step, self.num_rows)
            chosen = self.indices
            if self.axis == 0:
                chosen = chosen[(start <= chosen) & (chosen < stop)] - start
                if not len(chosen):
                    continue
            values = _widened(self.part.rows(start, stop), self.dtype).take(chosen, axis=self.axis).astype(np.float64)
            count, total, squares = count + values.size, total + float(values.sum()), squares + float((values**2).sum())
        mean = total / count
        return mean, math.sqrt(max(0.0, squares / count - mean**2))

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        block = np.array(self.part.rows(start, stop, columns))
        spans = ((start, stop), columns or (0, self.shape[-1]))
        low, high = np.searchsorted(self.indices, spans[self.axis]).tolist()
        if low == high:
            return block
        at = self.indices[low:high] - spans[self.axis][0]
        if self.axis == 0:
            draws = self._draws.rows(low, high, columns)
            block[at] = from_float32(draws + np.float32(self._moments[0]), self.dtype)
        else:
            draws = self._draws.rows(start, stop, (low, high))
            block[:, at] = from_float32(draws + np.float32(self._moments[0]), self.dtype)
        return block


def merge_ranges(ranges: list[ByteRange]) -> list[ByteRange]:
    """Joins ranges that follow each other in one file."""
    merged: list[ByteRange] = []
    for file, offset, nbytes in ranges:
        if merged and merged[-1][0] == file and merged[-1][1] + merged[-1][2] == offset:
            merged[-1] = (file, merged[-1][1], merged[-1][2] + nbytes)
        elif nbytes:
            merged.append((file, offset, nbytes))
    return merged


def cut_ranges(ranges: list[ByteRange], start: int, stop: int) -> list[ByteRange]:
    """Bytes [start, stop) of what the ranges describe one after the other."""
    cut: list[ByteRange] = []
    top = 0
    for file, offset, nbytes in ranges:
        a, b = max(start - top, 0), min(stop - top, nbytes)
        if a < b:
            cut.append((file, offset + a, b - a))
        top += nbytes
    return cut


def _overlaps(spans: tuple[Span, ...], start: int, stop: int) -> Iterator[Span]:
    """The sub-spans that make up rows [start, stop) of the spans laid end to end."""
    top = 0
    for a, b in spans:
        low, high = max(start - top, 0), min(stop - top, b - a)
        if low < high:
            yield a + low, a + high
        top += b - a


def _joined(pieces: list[Array], expression: Expression, columns: Span | None) -> Array:
    if len(pieces) == 1:
        return pieces[0]
    if pieces:
        return np.concatenate(pieces)
    width = expression.shape[1:] if columns is None else (columns[1] - columns[0],)
    return np.empty((0, *width), storage(expression.dtype))

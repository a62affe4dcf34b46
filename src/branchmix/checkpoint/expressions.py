"""Output tensors as small, lazily evaluated expressions over stored ones: what a plan is made of.

An expression knows its dtype and shape without reading data. If its value is nothing but source bytes, ``ranges()``
says which, and the writer has the kernel copy them; else ``rows(start, stop)`` computes a block of rows.

Numbers: sums of 16-bit parts are in float32, of 32- and 64-bit parts in float64; the result is rounded once, to
nearest even. bfloat16, which numpy lacks, is held as uint16 bits. Scalars count as one row and come with shape (1,).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from itertools import pairwise
from pathlib import Path

import numpy as np

from branchmix.checkpoint.index import DTYPE_BITS, TensorRef
from branchmix.checkpoint.numbers import FLOAT_DTYPES, Array, accumulator, from_float32, storage, widened
from branchmix.errors import CheckpointError

Shape = tuple[int, ...]
ByteRange = tuple[Path, int, int]
"""File, absolute offset, number of bytes."""
Span = tuple[int, int]
"""First index and the one after the last."""

_CHUNK_BYTES = 1 << 20


class Expression(ABC):
    """The value of one output tensor."""

    dtype: str
    """safetensors code."""
    shape: Shape

    def parts_read(self) -> tuple[Expression, ...]:
        """The expressions this one is made of."""
        return ()

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
        """How many bytes of rows to ask for at a time: few enough for the cache, many enough for numpy."""
        return max((part.block_nbytes for part in self.parts_read()), default=1 << 20)

    def _row_shape(self, columns: Span | None) -> Shape:
        """Shape of a row of ``rows(..., columns)``."""
        return self.shape[1:] if columns is None else (columns[1] - columns[0],)

    def _become(self, dtype: str, shape: Shape) -> None:
        """Sets dtype and shape, which follow from the fields of a frozen dataclass."""
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "shape", shape)


@dataclass(frozen=True)
class Derived(Expression):
    """A value computed from, or cut out of, another."""

    part: Expression

    def parts_read(self) -> tuple[Expression, ...]:
        return (self.part,)


@dataclass(frozen=True)
class Stored(Expression):
    """A stored tensor, unchanged."""

    ref: TensorRef

    def __post_init__(self) -> None:
        self._become(self.ref.dtype, self.ref.shape)

    def sources(self) -> Iterator[TensorRef]:
        yield self.ref

    def ranges(self) -> list[ByteRange]:
        return [(self.ref.file, self.ref.offset, self.ref.nbytes)]

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        element, row_nbytes = storage(self.dtype), self.row_nbytes
        with opened(self.ref.file) as stream:
            if columns is None or columns == (0, self.shape[1]):
                block = np.empty((stop - start, *self.shape[1:]), element)
                read_into(stream, self.ref.offset + start * row_nbytes, block)
                return block
            first, last = columns
            strip = np.empty((stop - start, last - first), element)
            for row in range(start, stop):
                read_into(stream, self.ref.offset + row * row_nbytes + first * element.itemsize, strip[row - start])
        return strip


@contextmanager
def opened(file: Path) -> Iterator[FileIO]:
    """A file to read from; an OSError in the block is one of reading it."""
    try:
        with file.open("rb", buffering=0) as stream:
            yield stream
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error


def read_into(stream: FileIO, offset: int, block: Array) -> None:
    """Fills a contiguous array; a file that has been cut meanwhile is an error, where a mapping would kill us."""
    left = block.reshape(-1).view(np.uint8).data
    stream.seek(offset)
    while left:
        got = stream.readinto(left)
        if not got:
            raise CheckpointError(f"{stream.name}: has been truncated while it was read: nothing was written from it")
        left = left[got:]


@dataclass(frozen=True)
class _Below(Expression):
    """Ranges of rows of parts below each other: (part, start, stop), of one dtype and one row shape."""

    segments: tuple[tuple[Expression, int, int], ...]

    def __post_init__(self) -> None:
        first = self.segments[0][0]
        for part, start, stop in self.segments:
            assert part.dtype == first.dtype and part.shape[1:] == first.shape[1:] and part.shape, "parts don't stack"
            assert 0 <= start <= stop <= part.num_rows, f"rows {start}:{stop} of {part.num_rows}"
        self._become(first.dtype, (sum(stop - start for _, start, stop in self.segments), *first.shape[1:]))

    def parts_read(self) -> tuple[Expression, ...]:
        return tuple({id(part): part for part, _, _ in self.segments}.values())

    def ranges(self) -> list[ByteRange] | None:
        whole = {id(part): part.ranges() for part in self.parts_read()}
        size, pieces = self.row_nbytes, []
        for part, start, stop in self.segments:
            if (ranges := whole[id(part)]) is None:
                return None
            pieces += cut_ranges(ranges, start * size, stop * size)
        return merge_ranges(pieces)

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        pieces, top = [], 0
        for part, first, last in self.segments:
            low, high = max(start - top, 0), min(stop - top, last - first)
            if low < high:
                pieces.append(part.rows(first + low, first + high, columns))
            top += last - first
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty((0, *self._row_shape(columns)), storage(self.dtype))


class Rows(_Below):
    """Ranges of rows of a part, in this order.

    Example: Rows(Stored(qkv), ((0, 64), (128, 192))) has 128 rows.
    """

    def __init__(self, part: Expression, spans: Iterable[Span]):
        super().__init__(tuple((part, *span) for span in spans))


class Stack(_Below):
    """Parts below each other (dim 0), of one dtype and one row shape."""

    def __init__(self, parts: Iterable[Expression]):
        super().__init__(tuple((part, 0, part.num_rows) for part in parts))


@dataclass(frozen=True)
class Columns(Expression):
    """Segments of columns of 2-D parts side by side: (part, start, stop), left to right.

    Example: the output projections [d, H*D] of N attention experts become one [d, N*H*D]; with shared K/V the segments
    alternate between the experts, one for each group of heads. However many they are, each part is read once.
    """

    segments: tuple[tuple[Expression, int, int], ...]

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
        moves: dict[Expression, list[tuple[int, int, int]]] = {}
        left = 0
        for part, start, stop in self.segments:
            moves.setdefault(part, []).append((left, start, stop - start))
            left += stop - start
        return moves


@dataclass(frozen=True)
class Transposed(Derived):
    """A 2-D part with rows and columns exchanged (GPT-2's Conv1D)."""

    def __post_init__(self) -> None:
        assert len(self.part.shape) == 2, "only matrices are transposed"
        self._become(self.part.dtype, self.part.shape[::-1])

    def ranges(self) -> list[ByteRange] | None:
        return self.part.part.ranges() if isinstance(self.part, Transposed) else None

    @property
    def block_nbytes(self) -> int:
        return 1 << 22  # wider strips of the source's rows

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        low, high = columns or (0, self.shape[1])
        return self.part.rows(low, high, (start, stop)).T


@dataclass(frozen=True)
class Average(Expression):
    """The (weighted) mean of parts, in ``dtype`` (default: the first part's).

    Parts may have fewer rows than the result (vocabularies of different sizes): a part then covers the first rows
    only, and each row is the mean over the parts that have it.
    """

    parts: tuple[Expression, ...]
    weights: tuple[float, ...] | None = None
    """Positive; they need not sum to 1. None: all equal."""
    dtype: str = ""

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
        wide = max((accumulator(part.dtype) for part in self.parts), key=lambda kind: np.dtype(kind).itemsize)
        total = np.empty((stop - start, *self._row_shape(columns)), wide)
        edges = sorted({start, stop, *(part.num_rows for part in self.parts if start < part.num_rows < stop)})
        with np.errstate(over="ignore", invalid="ignore"):
            for low, high in pairwise(edges):
                rows, weight = total[low - start : high - start], 0.0
                for part, share in zip(self.parts, self.weights or (1.0,) * len(self.parts), strict=True):
                    if high <= part.num_rows:
                        values = widened(part.rows(low, high, columns), part.dtype)
                        values = values if share == 1.0 else values * wide(share)
                        if weight:
                            np.add(rows, values, out=rows)
                        else:  # not added to zero, which would lose the sign of -0.0
                            np.copyto(rows, values)
                        weight += share
                np.divide(rows, wide(weight), out=rows)
        return from_float32(total, self.dtype)


class Elementwise(Derived):
    """A part of floats, computed number by number in the accumulator's dtype and rounded once."""

    def __post_init__(self) -> None:
        assert self.part.dtype in FLOAT_DTYPES, f"{self.part.dtype} has no arithmetic"
        self._become(self.part.dtype, self.part.shape)

    @abstractmethod
    def computed(self, values: Array, columns: Span | None) -> Array:
        """The result of a block of the part's values."""

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        values = widened(self.part.rows(start, stop, columns), self.part.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            return from_float32(self.computed(values, columns), self.dtype)


@dataclass(frozen=True)
class Scaled(Elementwise):
    """A part times a constant."""

    factor: float

    def ranges(self) -> list[ByteRange] | None:
        return self.part.ranges() if self.factor == 1.0 else None

    def computed(self, values: Array, columns: Span | None) -> Array:
        return values * values.dtype.type(self.factor)


@dataclass(frozen=True)
class Gained(Elementwise):
    """Column j of a matrix [out, in] times (gain[j] + offset): a norm's gain folded into the projection behind it."""

    gain: Expression
    offset: float = 0.0
    """What the family adds to the stored gain (Gemma: 1)."""

    def __post_init__(self) -> None:
        assert len(self.part.shape) == 2 and self.gain.shape == self.part.shape[1:], "one gain for each column"
        assert self.gain.dtype in FLOAT_DTYPES, "gains are for floats"
        super().__post_init__()

    def parts_read(self) -> tuple[Expression, ...]:
        return (self.part, self.gain)

    def computed(self, values: Array, columns: Span | None) -> Array:
        gain = widened(self.gain.rows(*(columns or (0, self.shape[1]))), self.gain.dtype).astype(values.dtype)
        return values * (gain + values.dtype.type(self.offset))


@dataclass(frozen=True)
class Adapted(Derived):
    """A matrix [O, I] and its change of low rank, ``W + B^T A``, rounded once (LoRA, arXiv 2106.09685)."""

    A: Expression
    """[r, I]."""
    B: Expression
    """[r, O]: the transpose of LoRA's B, with its scale."""

    def __post_init__(self) -> None:
        rank = self.A.num_rows
        assert self.part.shape == (self.B.shape[1], self.A.shape[1]) and self.B.num_rows == rank, "shapes don't fit"
        self._become(self.part.dtype, self.part.shape)

    def parts_read(self) -> tuple[Expression, ...]:
        return (self.part, self.A, self.B)

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        rank = self.A.num_rows
        B = widened(self.B.rows(0, rank, (start, stop)), self.B.dtype)
        change = B.T @ widened(self.A.rows(0, rank, columns), self.A.dtype)
        return from_float32(widened(self.part.rows(start, stop, columns), self.part.dtype) + change, self.dtype)


@dataclass(frozen=True)
class Cast(Elementwise):
    """A part in another float dtype."""

    dtype: str

    def __post_init__(self) -> None:
        assert {self.part.dtype, self.dtype} <= set(FLOAT_DTYPES), "only floats are cast"
        self._become(self.dtype, self.part.shape)

    def ranges(self) -> list[ByteRange] | None:
        return self.part.ranges() if self.part.dtype == self.dtype else None

    def computed(self, values: Array, columns: Span | None) -> Array:
        return values


def same_values(first: Expression, other: Expression) -> bool:
    """Whether two expressions have the same dtype, shape and values; reads no further than to the first difference."""
    if first == other:
        return True
    if (first.dtype, first.shape) != (other.dtype, other.shape):
        return False
    step = max(1, _CHUNK_BYTES // max(1, first.row_nbytes))
    spans = ((start, min(start + step, first.num_rows)) for start in range(0, first.num_rows, step))
    return all(np.array_equal(first.rows(*span), other.rows(*span)) for span in spans)


def same_numbers(one: TensorRef, other: TensorRef) -> bool:
    """Whether two tensors hold the same numbers, whatever the float dtypes that they are stored in."""
    parts = Stored(one), Stored(other)
    floats = {one.dtype, other.dtype} <= {*FLOAT_DTYPES}
    return same_values(*parts) or (floats and same_values(*(Cast(part, "F32") for part in parts)))


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

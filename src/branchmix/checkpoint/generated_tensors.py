"""Expressions whose values come from no checkpoint: constants, routers held in memory, random numbers.

Random numbers depend on seed, key and position only, so a plan gives the same bytes in any order, on any machine.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from branchmix.checkpoint.expressions import ByteRange, Derived, Expression, Shape, Span
from branchmix.checkpoint.numbers import FLOAT_DTYPES, Array, accumulator, from_float32, storage, widened

_NORMAL_CHUNK = 1 << 16


@dataclass(frozen=True)
class Constant(Expression):
    """The same value everywhere."""

    shape: Shape
    value: float
    dtype: str

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        shape = (stop - start, *self._row_shape(columns))
        if self.dtype not in FLOAT_DTYPES:
            return np.full(shape, self.value, storage(self.dtype))
        return from_float32(np.full(shape, self.value, accumulator(self.dtype)), self.dtype)


@dataclass(frozen=True, eq=False)
class Held(Expression):
    """Values computed beforehand and held in memory: small ones, such as routers from hidden states, or counts."""

    values: Array
    dtype: str

    def __post_init__(self) -> None:
        held = "<f4" if self.dtype in FLOAT_DTYPES else storage(self.dtype)
        assert self.values.dtype == held, "floats are held as float32, other numbers as they are written"
        self._become(self.dtype, tuple(self.values.shape))

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        block = self.values[start:stop] if columns is None else self.values[start:stop, columns[0] : columns[1]]
        return from_float32(block, self.dtype) if self.dtype in FLOAT_DTYPES else np.ascontiguousarray(block)


@dataclass(frozen=True)
class Normal(Expression):
    """Random numbers from N(0, std^2) that depend on seed, key and position only: not on order, threads or blocks."""

    shape: Shape
    std: float
    seed: int
    key: str
    """Usually the tensor's name."""
    dtype: str

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        width = math.prod(self.shape[1:])
        values = self._draws(start * width, stop * width).reshape(stop - start, *self.shape[1:])
        values *= np.float32(self.std)
        return from_float32(values if columns is None else values[:, slice(*columns)], self.dtype)

    def _draws(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Elements [start, stop) of a stream made of chunks, each with a counter of its own."""
        drawn = np.empty(stop - start, np.float32)
        for chunk in range(start // _NORMAL_CHUNK, -(-stop // _NORMAL_CHUNK)):
            top = chunk * _NORMAL_CHUNK
            low, high = max(start, top), min(stop, top + _NORMAL_CHUNK)
            draws = _generator(self.seed, self.key, chunk).standard_normal(high - top, np.float32)
            drawn[low - start : high - start] = draws[low - top :]
        return drawn


def _generator(seed: int, key: str, chunk: int = 0) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    philox_key = np.frombuffer(digest[:16], "<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=philox_key, counter=[0, 0, chunk, 0]))


@dataclass(frozen=True)
class PartlyRedrawn(Derived):
    """Drop-Upcycling: a fraction of a matrix's rows (axis 0) or columns (axis 1) drawn anew.

    The new values have mean and standard deviation of the old ones at these indices (Nakamura et al. 2025,
    arXiv:2502.19261). Matrices of one expert that share ``index_key`` lose the same intermediate units:
    axis 0 of gate and up, axis 1 of down.
    """

    fraction: float
    """Between 0 and 1."""
    seed: int
    key: str
    """Decides the values."""
    index_key: str
    """Decides the indices, together with the seed."""
    axis: int

    def __post_init__(self) -> None:
        assert 0 <= self.fraction <= 1 and self.axis in (0, 1) and self.part.dtype in FLOAT_DTYPES
        assert len(self.part.shape) == 2 or (len(self.part.shape) == 1 and self.axis == 0), "a matrix, or a bias"
        self._become(self.part.dtype, self.part.shape)

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
        step = max(1, (1 << 20) // max(1, self.row_nbytes))
        for start in range(0, self.num_rows, step):
            stop = min(start + step, self.num_rows)
            chosen = self.indices
            if self.axis == 0:
                chosen = chosen[(start <= chosen) & (chosen < stop)] - start
                if not len(chosen):
                    continue
            values = widened(self.part.rows(start, stop), self.dtype).take(chosen, axis=self.axis).astype(np.float64)
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
        draws = self._draws.rows(low, high, columns) if self.axis == 0 else self._draws.rows(start, stop, (low, high))
        block[at if self.axis == 0 else (slice(None), at)] = from_float32(
            draws + np.float32(self._moments[0]), self.dtype
        )
        return block

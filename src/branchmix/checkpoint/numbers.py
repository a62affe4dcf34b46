"""Numbers as stored and as computed with. bfloat16, which numpy lacks, is held as uint16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from branchmix.checkpoint.index import DTYPE_BITS

Array = npt.NDArray[Any]

FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
_STORAGE = dict(BF16="<u2", F16="<f2", F32="<f4", F64="<f8", C64="<c8", BOOL="|u1")  # noqa: C408
_STORAGE |= dict(U8="|u1", I8="|i1", U16="<u2", I16="<i2", U32="<u4", I32="<i4", U64="<u8", I64="<i8")  # noqa: C408
_STORAGE |= {code: "|u1" for code in DTYPE_BITS if code.startswith("F8_")}


def storage(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that holds ``dtype``: bfloat16 and the 8-bit floats as their bits."""
    assert dtype in _STORAGE, f"{dtype} elements are not whole bytes"
    return np.dtype(_STORAGE[dtype])


def to_float32(array: Array, dtype: str) -> npt.NDArray[np.float32]:
    """Values of an array that holds ``dtype`` (one of ``FLOAT_DTYPES``); exact for all but F64."""
    assert dtype in FLOAT_DTYPES, dtype
    if dtype != "BF16":
        return array.astype(np.float32, copy=False)
    return (array.astype(np.uint32) << 16).view(np.float32)


def from_float32(array: Array, dtype: str) -> Array:
    """``array`` of float32 (or float64) rounded to nearest even; NaN stays NaN, what is too large becomes infinite."""
    assert dtype in FLOAT_DTYPES, dtype
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "BF16":
            return array.astype(storage(dtype), copy=False)
        values = np.ascontiguousarray(array.astype(np.float32, copy=False))
    bits = values.view(np.uint32)
    result = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        result[nan] = (bits[nan] >> 16) | 0x0040
    return result


def accumulator(dtype: str) -> type[np.float32] | type[np.float64]:
    """float32 holds sums of 16-bit floats; three times a float32 does not fit float32, so those are summed in 64."""
    return np.float32 if dtype in ("BF16", "F16") else np.float64


def widened(array: Array, dtype: str) -> Array:
    return array.astype(np.float64) if accumulator(dtype) is np.float64 else to_float32(array, dtype)

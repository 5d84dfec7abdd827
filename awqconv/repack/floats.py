"""Scale and zero-point numbers as raw bits: numpy has no bfloat16, so it travels as uint16."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RAW: dict[str, np.dtype[np.generic]] = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "I8": np.dtype("i1"),
}


def to_float32(raw: NDArray[np.generic], dtype: str) -> NDArray[np.float32]:
    """Raw elements of a safetensors dtype (F16, BF16, F32, I8) as float32; exact."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def from_float32(values: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """float32 to raw elements of F16, BF16, F32 or I8, rounded to nearest even; NaN stays NaN."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(RAW[dtype])
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


def caster(source: str, target: str) -> Callable[[NDArray[np.generic]], NDArray[np.generic]]:
    """The conversion of raw elements between two dtypes; the identity where they are the same."""
    if source == target:
        return lambda raw: raw
    return lambda raw: from_float32(to_float32(raw, source), target)


def lossless(source: str, target: str) -> bool:
    """Whether every value of `source` survives a cast to `target` and back."""
    return target in (source, "F32")

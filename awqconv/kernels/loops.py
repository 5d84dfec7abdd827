"""The compiled loops of `cpu`: numba functions, imported at first use and cached on disk.

One signature each, and no threads of numba's own: the loops release the GIL, so a caller's threads
scale them, and no threading layer aborts when two of those call at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import float32, int64, uint8, uint32, uint64, void
from numpy.typing import NDArray

Array = NDArray[Any]

ROWS = 16  # of the buffer that words are decoded to: with 512 columns it fills 32 KiB
SUM = 8  # products that are added to each other before they are added to a block's sum


def _input(dtype: Any, dimensions: int = 1) -> Any:
    """A contiguous array that is only read, so that read-only file mappings are taken too."""
    return numba.types.Array(dtype, dimensions, "C", readonly=True)


def _compile(*arguments: Any) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        def compiled(cache: bool) -> Any:
            # A product may fuse with the sum after it; nothing is reordered, and NaN stays NaN.
            return numba.njit(
                void(*arguments),
                cache=cache,
                nogil=True,
                error_model="numpy",
                fastmath={"contract"},
            )(function)

        try:
            return compiled(True)
        except (RuntimeError, OSError):  # there is no folder that a cache can be written to
            return compiled(False)

    return decorate


@_compile(_input(uint32), _input(uint64), _input(uint64), uint32, uint8[:, ::1])
def nibbles(words: Array, rows: Array, columns: Array, xor: Any, out: Array) -> None:
    """out[i, j] = the nibble at position rows[i] + columns[j] of the words, xor `xor`."""
    for i in range(len(rows)):
        for j in range(len(columns)):
            at = rows[i] + columns[j]
            shift = uint32(at & uint64(7)) << uint32(2)
            out[i, j] = (words[at >> uint64(3)] >> shift & uint32(15)) ^ xor


@_compile(
    *(_input(uint32), uint64, _input(uint64), _input(uint32, 2), uint32),
    *(_input(float32), uint32[::1], float32[:, ::1]),
)
def _decode(
    words: Array,
    base: Any,
    columns: Array,
    shifts: Array,
    xor: Any,
    zeros: Array,
    word: Array,
    w: Array,
) -> None:
    """w[a, c * len(columns) + j] = q - z, of nibble (a, c) in the word at base + columns[j]."""
    count = len(columns)
    for j in range(count):
        at = base + columns[j]
        shift = uint32(at & uint64(7)) << uint32(2)
        word[j] = (words[at >> uint64(3)] >> shift) ^ xor
    for a in range(shifts.shape[0]):
        for c in range(shifts.shape[1]):
            shift = shifts[a, c] & uint32(31)
            row, zero = w[a, c * count :], zeros[c * count :]
            for j in range(count):
                row[j] = np.float32(np.int32(word[j] >> shift & uint32(15))) - zero[j]


@_compile(_input(float32), _input(int64), float32[:, ::1], float32[::1])
def _add(x: Array, ks: Array, w: Array, part: Array) -> None:
    """part[n] += sum over i of x[ks[i]] w[i, n]; rows of w beyond those are zero."""
    v = np.empty(SUM, np.float32)
    for k in range(0, len(ks), SUM):
        for i in range(SUM):
            v[i] = x[ks[k + i]] if k + i < len(ks) else np.float32(0)
        v0, v1, v2, v3, v4, v5, v6, v7 = v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]
        w0, w1, w2, w3 = w[k], w[k + 1], w[k + 2], w[k + 3]
        w4, w5, w6, w7 = w[k + 4], w[k + 5], w[k + 6], w[k + 7]
        for n in range(len(part)):
            low = v0 * w0[n] + v1 * w1[n] + v2 * w2[n] + v3 * w3[n]
            high = v4 * w4[n] + v5 * w5[n] + v6 * w6[n] + v7 * w7[n]
            part[n] += low + high


@_compile(
    *(_input(uint32), uint32, _input(float32, 2), _input(float32, 2), _input(float32, 2)),
    *(_input(uint64), _input(uint64), _input(uint32, 2)),
    *(_input(int64), _input(int64), _input(int64, 2), int64),
    *(_input(float32, 2), _input(float32), int64, int64, float32[:, ::1]),
)
def multiply(
    words: Array,
    xor: Any,
    zeros: Array,
    scales: Array,
    minus: Array,
    rows: Array,
    columns: Array,
    shifts: Array,
    ks: Array,
    ns: Array,
    blocks: Array,
    width: int,
    x: Array,
    alpha: Array,
    first: int,
    last: int,
    y: Array,
) -> None:
    """Tiles first..last of y = alpha x @ ((q - z) * s), of a `cpu.Tables` and a `cpu.Order`.

    For each block of rows k within a group i, in float32:

        y[m, n] += ((sum of x[m, k] (q - z)[k, n]) - minus[block, n]) * alpha[m] * s[i, n]
    """
    M, per_k, per_n = len(x), shifts.shape[0], shifts.shape[1]
    w = np.empty((ROWS, width * per_n), np.float32)
    word = np.empty(width, np.uint32)
    part = np.empty((M, width * per_n), np.float32)
    total = np.empty((M, width * per_n), np.float32)
    for t in range(first, last):
        j0, j1 = t * width, min(t * width + width, len(columns))
        n0, size = j0 * per_n, (j1 - j0) * per_n
        total.fill(0)
        for b in range(len(blocks)):
            start, end, group = blocks[b, 0], blocks[b, 1], blocks[b, 2]
            part.fill(0)
            for k0 in range(start, end, ROWS):
                k1 = min(k0 + ROWS, end)
                for i in range(0, k1 - k0, per_k):
                    base = rows[(k0 + i) // per_k]
                    zero = zeros[group, n0 : n0 + size]
                    _decode(words, base, columns[j0:j1], shifts, xor, zero, word, w[i : i + per_k])
                for i in range(k1 - k0, ROWS):
                    w[i].fill(0)
                for m in range(M):
                    _add(x[m], ks[k0:k1], w, part[m, :size])
            scale = scales[group, n0 : n0 + size]
            for m in range(M):
                for n in range(size if len(minus) else 0):
                    part[m, n] -= minus[b, n0 + n]
                for n in range(size):
                    total[m, n] += part[m, n] * alpha[m] * scale[n]
        for m in range(M):
            for n in range(size):
                y[m, ns[n0 + n]] = total[m, n]

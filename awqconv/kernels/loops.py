"""The compiled loops of `cpu`: numba functions, imported at first use and cached on disk.

One signature each, without numba's own threads: they release the GIL, so a caller's threads scale
them, and no threading layer is there to abort when two of those call at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import float32, int64, uint8, uint32, uint64, void
from numpy.typing import NDArray

Array = NDArray[Any]


def _input(dtype: Any, dimensions: int = 1) -> Any:
    """A contiguous array that is only read, so that read-only file mappings are taken too."""
    return numba.types.Array(dtype, dimensions, "C", readonly=True)


def _compile(*arguments: Any) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        # Products may fuse with the sum that follows; nothing else is reordered, NaN stays NaN.
        options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
        try:
            return numba.njit(void(*arguments), cache=True, **options)(function)
        except (RuntimeError, OSError):  # no folder that a cache can be written to
            return numba.njit(void(*arguments), **options)(function)

    return decorate


@_compile(_input(uint32), _input(uint64), _input(uint64), uint32, uint8[:, ::1])
def nibbles(words: Array, rows: Array, columns: Array, xor: Any, out: Array) -> None:
    """out[i, j] = the nibble at position rows[i] + columns[j] of little-endian words, xor `xor`."""
    for i in range(len(rows)):
        for j in range(len(columns)):
            at = rows[i] + columns[j]
            shift = uint32(at & uint64(7)) << uint32(2)
            out[i, j] = (words[at >> uint64(3)] >> shift & uint32(15)) ^ xor


@_compile(
    _input(float32, 2),  # x
    _input(uint32),  # words
    _input(uint64),  # rows
    _input(uint64),  # columns
    _input(uint32, 2),  # shifts
    uint32,  # xor
    _input(int64),  # ks
    _input(int64),  # ns
    _input(int64, 2),  # blocks
    _input(float32, 2),  # zeros
    _input(float32, 2),  # scales
    _input(float32, 2),  # minus
    _input(float32),  # alpha
    int64,  # width
    int64,  # first
    int64,  # last
    float32[:, ::1],  # y
)
def multiply(  # noqa: PLR0917
    x: Array,
    words: Array,
    rows: Array,
    columns: Array,
    shifts: Array,
    xor: Any,
    ks: Array,
    ns: Array,
    blocks: Array,
    zeros: Array,
    scales: Array,
    minus: Array,
    alpha: Array,
    width: int,
    first: int,
    last: int,
    y: Array,
) -> None:
    """Columns of y = x @ ((q - z) * s) from packed words; `cpu.Weight` says what the tables are.

    `width` word columns make a tile; tiles first..last are computed. For each of `blocks`
    (first row, last row, group) the tile's q - z goes to a buffer, and

        y[m, n] += ((sum over the block's k of x[m, k] (q - z)[k, n]) - minus[block, n]) alpha[m] s

    in float32: four products are added to each other, then to the block's sum.
    """
    M, per_k, per_n = len(x), shifts.shape[0], shifts.shape[1]
    tile = width * per_n
    deepest = 0
    for b in range(len(blocks)):
        deepest = max(deepest, blocks[b, 1] - blocks[b, 0])
    # Rows beyond a block's last are zero up to a multiple of four.
    w = np.zeros((deepest + 3, tile), np.float32)
    word = np.empty(width, np.uint32)
    total = np.empty((M, tile), np.float32)
    part = np.empty((4, tile), np.float32)
    for t in range(first, last):
        j0 = t * width
        count = min(width, len(columns) - j0)
        n0, live = j0 * per_n, count * per_n
        total[:, :live] = 0
        for b in range(len(blocks)):
            k0, k1, group = blocks[b, 0], blocks[b, 1], blocks[b, 2]
            for i in range((k1 - k0) // per_k):
                base = rows[k0 // per_k + i]
                for j in range(count):
                    at = base + columns[j0 + j]
                    shift = uint32(at & uint64(7)) << uint32(2)
                    word[j] = (words[at >> uint64(3)] >> shift) ^ xor
                for a in range(per_k):
                    for c in range(per_n):
                        shift = shifts[a, c]
                        for j in range(count):
                            code = np.int32(word[j] >> shift & uint32(15))
                            w[i * per_k + a, c * count + j] = (
                                np.float32(code) - zeros[group, n0 + c * count + j]
                            )
            depth = k1 - k0
            while depth % 4:
                w[depth, :live] = 0
                depth += 1
            for m0 in range(0, M, 4):
                high = min(4, M - m0)
                part[:high, :live] = 0
                for k in range(0, depth, 4):
                    ka = ks[k0 + k]
                    kb = ks[min(k0 + k + 1, k1 - 1)]
                    kc = ks[min(k0 + k + 2, k1 - 1)]
                    kd = ks[min(k0 + k + 3, k1 - 1)]
                    for h in range(high):
                        xa, xb = x[m0 + h, ka], x[m0 + h, kb]
                        xc, xd = x[m0 + h, kc], x[m0 + h, kd]
                        for n in range(live):
                            part[h, n] += (
                                xa * w[k, n]
                                + xb * w[k + 1, n]
                                + xc * w[k + 2, n]
                                + xd * w[k + 3, n]
                            )
                for h in range(high):
                    row = alpha[m0 + h]
                    for n in range(live):
                        value = part[h, n]
                        if len(minus):
                            value -= minus[b, n0 + n]
                        total[m0 + h, n] += value * row * scales[group, n0 + n]
        for m in range(M):
            for n in range(live):
                y[m, ns[n0 + n]] = total[m, n]

"""CPU kernels on packed words: y = x @ ((q - z) * s), codes, and the dequantized weight.

A `Weight` holds a layer's stored tensors and the tables that address them; `gemm`, `dequantize`
and `codes` are its methods for one use. Arithmetic of `gemm`, in float32, over blocks of at most
`ROWS` rows that lie within one group i and are summed in turn:

    y[m, n] = bias[n] + sum over blocks of s[i, n] * (sum over the block's k of x[m, k] (q - z))

q - z is an integer of at most 4 bits and a sign, so no product is rounded before it is added, and
a sum has a depth of `depth(K)` additions. `bounds` turns that into the error allowed.

A layout whose rows are padded by one int32 a column (AMX) is multiplied as its engine does it,
W4A8: activations are rounded to a = 128 + round(127 x / max|x|) by row, blocks are those of the
layout, their sums are exact integers, and 128 times the compensation read from the padding is
taken off. Source: sgl-kernel/csrc/cpu/gemm_int4.cpp int4_scaled_mm_cpu.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awqconv.errors import AwqconvError, VerificationError
from awqconv.repack.floats import RAW, to_float32
from awqconv.targets.base import Linear, Part, Target

Arrays = Mapping[str, NDArray[Any]]
Codes = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]

ROWS = 128  # of a block
TILE = 64  # columns, where words hold no neighbours along N


class Weight:
    """One layer's packed tensors, addressed: `packed` holds them by suffix, as bytes of any dtype.

    `columns` (int64, logical, any order) samples the output; without it, n is all of N.
    Raises AwqconvError for a tensor that is missing or of the wrong size.
    """

    def __init__(
        self,
        packed: Arrays,
        target: Target,
        linear: Linear,
        columns: NDArray[np.int64] | None = None,
    ) -> None:
        self.linear, self.packed = linear, packed
        self.columns = np.arange(linear.N) if columns is None else np.asarray(columns, np.int64)
        self.parts = {part.of: part for part in target.parts(linear)}
        bias = target.bias(linear)
        self.bias = None
        if bias:
            self.bias = to_float32(_raw(packed, "bias", RAW[bias], linear.N), bias)[self.columns]
        if "w" in self.parts:
            self.w = self._numbers(self.parts["w"])
        else:
            self.z, self.s = self._zeros(), self._numbers(self.parts["s"])
            self._address()

    def _offsets(self, part: Part) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        layout = part.layout(self.linear)
        rows = layout.offsets(0) + layout.offset
        return rows.astype(np.uint64), layout.offsets(1)[self.columns].astype(np.uint64)

    def _words(self, part: Part) -> NDArray[np.uint32]:
        raw = _raw(self.packed, part.suffix, np.dtype(np.uint8), part.nbytes(self.linear))
        if len(raw) % 4:
            raw = np.append(raw, np.zeros(-len(raw) % 4, np.uint8))
        return np.require(raw.view("<u4"), requirements="A")

    def _nibbles(self, part: Part) -> NDArray[np.uint8]:
        rows, columns = self._offsets(part)
        out = np.empty((len(rows), len(columns)), np.uint8)
        _loops().nibbles(self._words(part), rows, columns, part.xor, out)
        return out

    def _numbers(self, part: Part) -> NDArray[np.float32]:
        rows, columns = self._offsets(part)
        size = part.nbytes(self.linear) // RAW[part.dtype].itemsize
        raw = _raw(self.packed, part.suffix, RAW[part.dtype], size)
        return to_float32(raw[rows[:, None] + columns], part.dtype)

    def _zeros(self) -> NDArray[np.float32]:
        """Zero points as stored: what is no integer stays none."""
        part = self.parts["z"]
        if part.coded:
            return self._nibbles(part).astype(np.float32)
        return (self._numbers(part) - np.float32(part.offset)) * np.float32(part.sign)

    def _address(self) -> None:
        """The tables of `loops.multiply`.

        Rows of a block and columns are taken in storage order. Where all their words hold the same
        number of rows and columns at the same nibbles, `rows` and `columns` are positions of words
        and `shifts` [rows, columns in a word] the bits to shift by; else every element has its own.
        `ks`, `ns`: the logical indices in the order of the buffer.
        """
        part, linear = self.parts["q"], self.linear
        off_k, off_n = self._offsets(part)
        granule = part.pattern.granule
        self.padded = part.pattern.pad > 0
        order_n = np.argsort(off_n, kind="stable")
        columns, in_n = _by_word(off_n[order_n])
        self.width = max(TILE // len(in_n), 32)
        tile = self.width * len(in_n)
        depth = granule(0) if self.padded else min(ROWS, ROWS * TILE // tile)
        starts = np.array(
            [
                k
                for group in range(0, linear.K, linear.g)
                for k in range(group, group + linear.g, depth)
            ]
        )
        ends = np.append(starts[1:], linear.K)
        self.blocks = np.stack((starts, ends, starts // linear.g), 1)
        order_k = np.concatenate(
            [start + np.argsort(off_k[start:end]) for start, end in zip(starts, ends, strict=True)]
        )
        rows, in_k = _by_word(off_k[order_k], starts)
        self.words, self.rows, self.word_columns = self._words(part), rows, columns
        self.shifts = (4 * (in_k[:, None] + in_n)).astype(np.uint32)
        self.xor = np.uint32(0x11111111 * part.xor)
        whole = len(columns) // self.width * tile
        self.ks = order_k
        # A tile's columns: those at a word's first nibble, then those at its next, ...
        self.ns = np.concatenate(
            [
                piece.reshape(tiles, -1, len(in_n)).transpose(0, 2, 1).reshape(-1)
                for piece, tiles in ((order_n[:whole], whole // tile), (order_n[whole:], 1))
                if len(piece)
            ]
        )
        self.zn, self.sn = (np.ascontiguousarray(part[:, self.ns]) for part in (self.z, self.s))
        self.minus = np.empty((0, 0), np.float32)
        if self.padded:
            comp = self._compensation(part)[:, self.ns].astype(np.float32)
            self.minus = np.ascontiguousarray(128 * comp)

    def _compensation(self, part: Part) -> NDArray[np.int32]:
        """The int32 after each block of rows, [K / block, n]."""
        block, neighbours = part.pattern.granule(0), part.pattern.granule(1)
        if part.pattern.pad != 8 * neighbours:
            raise ValueError(f"{part.pattern} is not padded by one int32 a column")
        layout = part.layout(self.linear)
        row = layout.stored[-1] * layout.stored[-2]
        start = (
            layout.offsets(0)[::block, None]
            + layout.offsets(1)[self.columns // neighbours * neighbours]
        )
        return self.words.view("<i4")[(start + row) // 8 + self.columns % neighbours]

    def gemm(self, x: NDArray[np.float32], threads: int = 1) -> NDArray[np.float32]:
        """x [M, K] @ w [K, n] + bias, float32 [M, n], on this thread and threads - 1 more."""
        M, n = len(x), len(self.columns)
        if x.shape != (M, self.linear.K):
            raise ValueError(f"x is {x.shape}, and the layer takes K = {self.linear.K}")
        x = np.ascontiguousarray(x, np.float32)
        if "w" in self.parts:
            y = x @ self.w
        else:
            alpha = np.ones(M, np.float32)
            if self.padded:
                x, alpha = quantize_rows(x)
            y = np.empty((M, n), np.float32)
            tiles = -(-len(self.word_columns) // self.width)
            threads = min(threads, tiles)
            ends = [tiles * i // threads for i in range(threads + 1)]

            def run(first: int, last: int) -> None:
                _loops().multiply(
                    x, self.words, self.rows, self.word_columns, self.shifts, self.xor,
                    self.ks, self.ns, self.blocks, self.zn, self.sn, self.minus, alpha,
                    self.width, first, last, y,
                )  # fmt: skip

            (mine, *rest) = pairwise(ends)
            others = [_pool().submit(run, *piece) for piece in rest]
            run(*mine)
            for other in others:
                other.result()
        return y if self.bias is None else y + self.bias

    def codes(self) -> Codes:
        """q uint8 [K, n], z uint8 [G, n], s float32 [G, n]: what the words hold.

        Raises VerificationError where a zero point is no integer of 0..15.
        """
        z = self.z.astype(np.uint8)
        wrong = np.argwhere((z != self.z) | (z > 15))
        if len(wrong):
            i, j = wrong[0]
            raise VerificationError(
                f"a zero point is {self.z[i, j]}: group {i}, column {self.columns[j]}",
                self.parts["z"].suffix,
                "convert the checkpoint again",
            )
        return self._nibbles(self.parts["q"]), z, self.s

    def dequantize(self) -> NDArray[np.float32]:
        """(q - z) * s as float32 [K, n], exact for 16-bit scales."""
        if "w" in self.parts:
            return self.w
        w = (
            self._nibbles(self.parts["q"])
            .astype(np.float32)
            .reshape(self.linear.G, self.linear.g, -1)
        )
        w -= self.z[:, None]
        w *= self.s[:, None]
        return w.reshape(self.linear.K, -1)


def gemm(
    x: NDArray[np.float32],
    packed: Arrays,
    target: Target,
    linear: Linear,
    columns: NDArray[np.int64] | None = None,
    *,
    threads: int = 1,
) -> NDArray[np.float32]:
    """x float32 [M, K] times the packed weight (+ bias): float32 [M, n]."""
    return Weight(packed, target, linear, columns).gemm(x, threads)


def dequantize(
    packed: Arrays, target: Target, linear: Linear, columns: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """The weight (q - z) * s as float32 [K, n]."""
    return Weight(packed, target, linear, columns).dequantize()


def codes(
    packed: Arrays, target: Target, linear: Linear, columns: NDArray[np.int64] | None = None
) -> Codes:
    """q uint8 [K, n], z uint8 [G, n], s float32 [G, n], read through separable addresses."""
    return Weight(packed, target, linear, columns).codes()


def quantize_rows(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Activations as 128 + round(x * (127 / max|x|)) [M, K] and their scales max|x| / 127 [M]."""
    peak = np.maximum(np.abs(x).max(1), np.float32(1e-7))
    return np.rint(x * (np.float32(127) / peak)[:, None]) + np.float32(128), peak / np.float32(127)


def _raw(packed: Arrays, suffix: str, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    if suffix not in packed:
        raise AwqconvError(f"there is no {suffix}", fix="convert the checkpoint again")
    raw = np.ascontiguousarray(packed[suffix]).reshape(-1).view(np.uint8)
    if raw.size != count * dtype.itemsize:
        raise AwqconvError(
            f"{suffix} has {raw.size} bytes and the layout {count * dtype.itemsize}",
            fix="convert the checkpoint again",
        )
    return raw.view(dtype)


def _by_word(
    positions: NDArray[np.uint64], starts: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Sorted nibble positions as (positions of words, nibbles that each of them holds)."""
    here = positions[positions < positions[0] // 8 * 8 + 8] % 8
    size = len(here)
    if len(positions) % size == 0 and (starts is None or not (starts % size).any()):
        words = positions.reshape(-1, size)
        first = words[:, :1] - here[0]
        if (first % 8 == 0).all() and (words - first == here).all():
            return first[:, 0].copy(), here
    return positions, np.zeros(1, np.uint64)


@cache
def _loops() -> Any:
    from awqconv.kernels import loops

    return loops


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="awqconv")

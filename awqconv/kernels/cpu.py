"""CPU kernels on packed words: y = x @ ((q - z) * s), the codes, the dequantized weight.

A `Weight` holds one layer's stored tensors and the tables that address them, and serves many
calls; `gemm`, `dequantize` and `codes` are its methods for a single one. `gemm` sums in float32
over blocks of at most 128 rows that lie within one group i:

    y[m, n] = bias[n] + sum over blocks of s[i, n] * (sum over the block's k of x[m, k] (q - z))

`sample` does the same for a few columns in numpy, and so needs nothing compiled.

q - z is exact, so `roundings` counts few steps from a product to y, and one flipped bit of one
code tends to exceed the error that `bounds` derives from them.

A layout with one int32 a column after each block (AMX) is multiplied as its engine does it, W4A8:
activations become a = 128 + round(127 x / max|x|) by row, blocks are those of the layout, their
sums are exact integers, and 128 times the compensation as stored is taken off them. Source:
sgl-kernel/csrc/cpu/gemm_int4.cpp int4_scaled_mm_cpu.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from itertools import pairwise
from math import gcd
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from awqconv.errors import AwqconvError, VerificationError
from awqconv.repack.floats import RAW, to_float32
from awqconv.targets.base import Linear, Part, Target

Arrays = Mapping[str, NDArray[Any]]
Floats = NDArray[np.float32]
Codes = tuple[NDArray[np.uint8], NDArray[np.uint8], Floats]
Positions = NDArray[np.uint64]  # in nibbles

BLOCK = 128  # rows: of engines' AMX blocks too, whose sums float32 holds exactly (< 2^24)
TILE = 512  # columns that are multiplied together


class Order(NamedTuple):
    """Where `loops.multiply` finds each code: B blocks, W words across n columns.

    Rows of a block and columns are taken in storage order. Where all words hold the same rows and
    columns at the same nibbles, `rows` and `columns` address words and a word is loaded once for
    all its nibbles; else each element has a word of its own.
    """

    rows: Positions  # [K / rows in a word]
    columns: Positions  # [W]
    shifts: NDArray[np.uint32]  # [rows in a word, columns in a word], bits
    ks: NDArray[np.int64]  # [K] the logical row of each row that is multiplied
    ns: NDArray[np.int64]  # [n] the output column of each column
    blocks: NDArray[np.int64]  # [B, 3]: first row, last row, group
    width: int  # words across a tile


class Tables(NamedTuple):
    """What one layer has at those places, columns in storage order."""

    words: NDArray[np.uint32]
    xor: np.uint32
    zeros: Floats  # [G, n]
    scales: Floats  # [G, n]
    minus: Floats  # [B, n], 128 times the compensation, or [0, 0]


def _offsets(part: Part, linear: Linear, columns: NDArray[np.int64]) -> tuple[Positions, Positions]:
    """Where rows, and where some columns, lie in a part: in elements."""
    layout = part.layout(linear)
    rows = layout.offsets(0) + layout.offset
    return rows.astype(np.uint64), layout.offsets(1)[columns].astype(np.uint64)


@lru_cache(maxsize=16)
def _order(part: Part, linear: Linear, chosen: bytes) -> Order:
    """Where the codes of some columns, int64 numbers as bytes, lie."""
    K, g = linear.K, linear.g
    length = part.pattern.granule(0) if part.pattern.pad else BLOCK
    starts = np.array([k for i in range(0, K, g) for k in range(i, i + g, length)], np.int64)
    blocks = np.stack((starts, np.append(starts[1:], K), starts // g), 1)

    off_k, off_n = _offsets(part, linear, np.frombuffer(chosen, np.int64))
    ks = np.concatenate([start + np.argsort(off_k[start:end]) for start, end, _ in blocks])
    ns = np.argsort(off_n)
    (rows, in_k), (columns, in_n) = _by_word(off_k[ks], starts), _by_word(off_n[ns])
    if max(in_k) + max(in_n) + max(rows % 8) + max(columns % 8) > 7:
        (rows, in_k), (columns, in_n) = (off_k[ks], _FIRST), (off_n[ns], _FIRST)

    tiles = -(-len(ns) // TILE)
    width = -(-len(columns) // tiles // 8) * 8
    # A tile takes the columns at a word's first nibble, then those at its next, and so on.
    by_word = ns.reshape(-1, len(in_n))
    ns = np.concatenate(
        [by_word[j : j + width].T.reshape(-1) for j in range(0, len(columns), width)]
    )
    shifts = (4 * (in_k[:, None] + in_n)).astype(np.uint32)
    return Order(rows, columns, shifts, ks, ns, blocks, width)


class Weight:
    """A layer's packed tensors, addressed. `packed` has them by suffix, as bytes of any dtype.

    `columns` (int64, any order) samples the output's n columns; without it n = N. `compiled`: by
    compiled loops, which take a moment to load, or by numpy, which suits a few columns. Raises
    AwqconvError for a tensor that is missing or of the wrong size.
    """

    def __init__(
        self,
        packed: Arrays,
        target: Target,
        linear: Linear,
        columns: NDArray[np.int64] | None = None,
        *,
        compiled: bool = True,
    ) -> None:
        self.linear, self.packed, self.compiled = linear, packed, compiled
        self.columns = np.arange(linear.N) if columns is None else np.asarray(columns, np.int64)
        self.parts = {part.of: part for part in target.parts(linear)}
        self.bias: Floats | None = None
        if bias := target.bias(linear):
            raw = _raw(packed, "bias", RAW[bias], linear.N)
            self.bias = to_float32(raw, bias)[self.columns]
        if "w" in self.parts:
            self.w = self._numbers(self.parts["w"])
        else:
            self.z, self.s = self._zeros(), self._numbers(self.parts["s"])
            self.order = _order(self.parts["q"], linear, self.columns.tobytes())
            self.tables = self._tables()

    def gemm(self, x: Floats, threads: int = 1) -> Floats:
        """x [M, K] @ w [K, n] + bias: float32 [M, n], on this thread and threads - 1 others.

        Packed sums do not depend on `threads`, on other rows of x or on other columns. From about
        100 rows on, BLAS on `dequantize()` is faster, at a depth of K.
        """
        if x.ndim != 2 or x.shape[1] != self.linear.K:
            raise ValueError(f"x is {x.shape}, and the layer takes K = {self.linear.K}")
        x = np.ascontiguousarray(x, np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            y = x @ self.w if "w" in self.parts else self._multiply(x, threads)
            return y if self.bias is None else y + self.bias

    def dequantize(self) -> Floats:
        """(q - z) * s as float32 [K, n]; no rounding where the scales have 16 bits."""
        if "w" in self.parts:
            return self.w
        w = self._nibbles(self.parts["q"]).astype(np.float32)
        groups = w.reshape(self.linear.G, self.linear.g, -1)
        groups -= self.z[:, None]
        groups *= self.s[:, None]
        return w

    def codes(self) -> Codes:
        """q uint8 [K, n], z uint8 [G, n], s float32 [G, n].

        Raises VerificationError where a zero point is no integer of 0..15.
        """
        wrong = np.argwhere(~np.isin(self.z, np.arange(16)))
        if len(wrong):
            group, j = wrong[0]
            raise VerificationError(
                f"the zero point of group {group}, column {self.columns[j]} is {self.z[group, j]}",
                self.parts["z"].suffix,
                "convert the checkpoint again",
            )
        return self._nibbles(self.parts["q"]), self.z.astype(np.uint8), self.s

    def _words(self, part: Part) -> NDArray[np.uint32]:
        raw = _raw(self.packed, part.suffix, np.dtype(np.uint8), part.nbytes(self.linear))
        if len(raw) % 4:
            raw = np.append(raw, np.zeros(-len(raw) % 4, np.uint8))
        return np.require(raw.view("<u4"), requirements="A")

    def _nibbles(self, part: Part) -> NDArray[np.uint8]:
        rows, columns = _offsets(part, self.linear, self.columns)
        words = self._words(part)
        if not self.compiled:
            at = rows[:, None] + columns
            shifts = (at.astype(np.uint32) & 7) << 2
            codes = words[at >> 3] >> shifts & 15
            return np.asarray(codes ^ part.xor, np.uint8)
        out = np.empty((len(rows), len(columns)), np.uint8)
        _loops().nibbles(words, rows, columns, part.xor, out)
        return out

    def _numbers(self, part: Part) -> Floats:
        rows, columns = _offsets(part, self.linear, self.columns)
        dtype = RAW[part.dtype]
        raw = _raw(self.packed, part.suffix, dtype, part.nbytes(self.linear) // dtype.itemsize)
        return to_float32(raw[rows[:, None] + columns], part.dtype)

    def _zeros(self) -> Floats:
        """Zero points as stored: what is no integer stays none."""
        part = self.parts["z"]
        if part.coded:
            return self._nibbles(part).astype(np.float32)
        return (self._numbers(part) - np.float32(part.offset)) * np.float32(part.sign)

    def _tables(self) -> Tables:
        part, ns = self.parts["q"], self.order.ns
        minus = np.empty((0, 0), np.float32)
        if part.pattern.pad:
            minus = np.float32(128) * self._compensation(part)[:, ns].astype(np.float32)
        return Tables(
            self._words(part),
            np.uint32(0x11111111 * part.xor),
            np.ascontiguousarray(self.z[:, ns]),
            np.ascontiguousarray(self.s[:, ns]),
            np.ascontiguousarray(minus),
        )

    def _compensation(self, part: Part) -> NDArray[np.int32]:
        """The int32 of each column after each block of rows, [B, n]."""
        block, neighbours = part.pattern.granule(0), part.pattern.granule(1)
        if part.pattern.pad != 8 * neighbours:
            raise ValueError(f"{part.pattern} is not padded by one int32 for each column")
        layout = part.layout(self.linear)
        rows, columns = layout.offsets(0)[::block], layout.offsets(1)
        place = self.columns % neighbours
        start = rows[:, None] + columns[self.columns - place]
        words = self._words(part).view("<i4")
        return np.asarray(words[(start + layout.stored[-2] * layout.stored[-1]) // 8 + place])

    def _multiply(self, x: Floats, threads: int) -> Floats:
        alpha = np.ones(len(x), np.float32)
        if self.tables.minus.size:
            x, alpha = quantize_rows(x)
        y = np.empty((len(x), len(self.columns)), np.float32)
        if not self.compiled:
            y[:, self.order.ns] = self._sums(x) * alpha[:, None]
            return y

        def run(first: int, last: int) -> None:
            _loops().multiply(*self.tables, *self.order, x, alpha, first, last, y)

        tiles = -(-len(self.order.columns) // self.order.width)
        threads = max(1, min(threads, tiles))
        mine, *rest = pairwise(tiles * i // threads for i in range(threads + 1))
        others = [_pool().submit(run, *piece) for piece in rest]
        run(*mine)
        for other in others:
            other.result()
        return y

    def _sums(self, x: Floats) -> NDArray[np.float64]:
        """x [M, K] @ ((q - z) * s) [M, n], columns in storage order, by numpy in float64."""
        t, order, (G, g) = self.tables, self.order, (self.linear.G, self.linear.g)
        M, W, n = len(x), len(order.columns), len(self.columns)
        at = order.rows[:, None] + order.columns
        words = (t.words[at >> 3] >> ((at.astype(np.uint32) & 7) << 2)) ^ t.xor
        tiles = (words[:, None, None, j : j + order.width] for j in range(0, W, order.width))
        codes = [tile >> order.shifts[:, :, None] & 15 for tile in tiles]
        weight = np.concatenate([c.reshape(G, g, -1) for c in codes], 2, dtype=np.float64)
        weight -= t.zeros[:, None]
        depth = gcd(g, BLOCK)  # products so small that BLAS takes no threads of its own for them
        rows = x[:, order.ks].astype(np.float64).reshape(M, -1, depth).swapaxes(0, 1)
        sums = (rows @ weight.reshape(-1, depth, n)).reshape(G, -1, M, n).sum(1)
        if t.minus.size:
            sums -= t.minus.reshape(G, -1, 1, n).sum(1, dtype=np.float64)
        total: NDArray[np.float64] = (sums * t.scales[:, None]).sum(0)
        return total


def gemm(
    x: Floats,
    packed: Arrays,
    target: Target,
    linear: Linear,
    columns: NDArray[np.int64] | None = None,
    *,
    threads: int = 1,
) -> Floats:
    """x float32 [M, K] times the packed weight, + bias: float32 [M, n]. See `Weight`."""
    return Weight(packed, target, linear, columns).gemm(x, threads)


def sample(x: Floats, packed: Arrays, target: Target, linear: Linear) -> Floats:
    """As `gemm`, by numpy with sums in float64: for a packed weight of few columns."""
    return Weight(packed, target, linear, compiled=False).gemm(x)


def dequantize(
    packed: Arrays, target: Target, linear: Linear, columns: NDArray[np.int64] | None = None
) -> Floats:
    """The weight (q - z) * s, float32 [K, n]. See `Weight`."""
    return Weight(packed, target, linear, columns).dequantize()


def codes(
    packed: Arrays, target: Target, linear: Linear, columns: NDArray[np.int64] | None = None
) -> Codes:
    """q uint8 [K, n], z uint8 [G, n], s float32 [G, n]. See `Weight`."""
    return Weight(packed, target, linear, columns).codes()


def quantize_rows(x: Floats) -> tuple[Floats, Floats]:
    """128 + round(x * (127 / max|x|)) [M, K] and the scales max|x| / 127 [M], max|x| by row.

    The least max|x| is 1e-7. Source: sgl-kernel/csrc/cpu/vec.h quantize_row_int8.
    """
    peak = np.maximum(np.abs(x).max(1), np.float32(1e-7))
    return np.rint(x * (np.float32(127) / peak)[:, None]) + np.float32(128), peak / np.float32(127)


def roundings(target: Target, linear: Linear) -> int:
    """The most roundings that lie between a product x[m, k] w[k, n] and y[m, n] in `gemm`."""
    (part,) = (part for part in target.parts(linear) if part.of in "qw")
    bias = linear.bias is not None
    if part.of == "w":
        return linear.K + bias
    length = part.pattern.granule(0) if part.pattern.pad else min(BLOCK, linear.g)
    blocks = linear.G * -(-linear.g // length)
    # In a block: a product, 4 additions to 7 others, and those of such sums (AMX: all exact). Then
    # alpha and the scale, and an addition for each block.
    return (0 if part.pattern.pad else 5 + -(-length // 8)) + 2 + blocks + bias


_FIRST = np.zeros(1, np.uint64)


def _by_word(positions: Positions, starts: NDArray[np.int64] | None = None) -> tuple[Any, Any]:
    """Positions in storage order as (positions of words, the nibbles that each of them holds).

    Where words differ, or one crosses a start: (positions, 0), each nibble for itself.
    """
    word = positions[0] - positions[0] % 8
    here = positions[: np.searchsorted(positions, word + 8)] - word
    size = len(here)
    if len(positions) % size == 0 and (starts is None or not (starts % size).any()):
        words = positions.reshape(-1, size)
        first = words[:, 0] - here[0]
        if not (first % 8).any() and (words == first[:, None] + here).all():
            return first, here
    return positions, _FIRST


def _raw(packed: Arrays, suffix: str, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """The stored elements, flat. Raises AwqconvError for a missing tensor or a wrong size."""
    if suffix not in packed:
        raise AwqconvError("the tensor is missing", suffix, "convert the checkpoint again")
    raw = np.ascontiguousarray(packed[suffix]).reshape(-1).view(np.uint8)
    if raw.size != count * dtype.itemsize:
        raise AwqconvError(
            f"it has {raw.size} bytes, and the layout {count * dtype.itemsize}",
            suffix,
            "convert the checkpoint again",
        )
    return raw.view(dtype)


@cache
def _loops() -> Any:
    from awqconv.kernels import loops

    return loops


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="awqconv-gemm")

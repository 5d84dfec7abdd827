"""From an axis pattern to kernel constants: where the element of an index lies, digit by digit.

A layout's element lies at a sum over its axes of digit * stride, and its dimensions are
independent, so the kernels need one `Line` for each dimension of each stored tensor:

    offset(i) = i // outer * stride + sum over inner of i // divisor % size * step

`outer` and `inner` are compile-time constants, `stride` alone depends on the shape, so one
compiled kernel serves every shape of a layout.

Packed codes are read as 32-bit words of eight nibbles. Some digits of k and n choose the nibble
and never the word: fix them, and the words of a tile are a dense matrix [n words, k words] whose
rows and columns are counted by the other digits, in storage order. So the eight nibbles of such a
matrix are eight weight matrices that lie alike in registers: nothing moves between them. `Codes`
holds that split.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod

from awqconv.errors import AwqconvError
from awqconv.repack.axes import Axis, Layout
from awqconv.targets.base import Linear, Part

WORD = 8  # nibbles of the 32-bit words that kernels load, whatever the stored word


@dataclass(frozen=True)
class Line:
    """Offset of an index along one dimension, see above. `inner`: flat (divisor, size, step)."""

    outer: int
    stride: int
    inner: tuple[int, ...] = ()

    def __call__(self, index: int) -> int:
        """The offset of one index: what `place` computes in a kernel."""
        triples = zip(self.inner[0::3], self.inner[1::3], self.inner[2::3], strict=True)
        return index // self.outer * self.stride + sum(index // d % n * s for d, n, s in triples)


def _line(digits: list[tuple[int, int, int]]) -> Line:
    """Digits (divisor, size, step) of one index; the one with the largest divisor is outermost."""
    *inner, (outer, _, stride) = sorted(digits) or [(1, 1, 0)]
    return Line(outer, stride, tuple(number for digit in inner for number in digit))


def line(layout: Layout, dim: int) -> Line:
    """Storage offset, in elements, of the indices of one logical dimension."""
    return _line([(a.logical, a.size, a.stored) for a in layout.axes if a.dim == dim])


@dataclass(frozen=True)
class Side:
    """One dimension of packed codes: `words` word rows, each with a nibble for each of `shift`.

    Word row i and nibble j hold the logical index `index(i) + offset[j]`; its word lies at
    `word(i)` (a sum with the other dimension's) and its code at bit `shift[j]` (likewise).
    Word rows are counted in storage order, `run` of them cover logical indices without a gap.
    """

    words: int
    word: Line
    index: Line
    shift: tuple[int, ...]
    offset: tuple[int, ...]
    run: int


def _split(axis: Axis) -> tuple[Axis | None, Axis | None]:
    """The part of an axis that chooses a nibble of a word, and the part that chooses the word."""
    if axis.stored >= WORD:
        return None, axis
    low = min(axis.size, WORD // axis.stored)
    if axis.size % low or WORD % (axis.stored * low):
        raise AwqconvError(
            f"axis {axis.name} of size {axis.size} straddles 32-bit words",
            fix="the kernels need whole 32-bit words: dequantize this module instead",
        )
    high = Axis(axis.name, axis.size // low, axis.dim, axis.logical * low, axis.stored * low)
    return Axis(axis.name, low, axis.dim, axis.logical, axis.stored), high


@cache
def side(layout: Layout, dim: int) -> Side:
    """The split of one dimension of packed codes. Raises AwqconvError where words do not divide."""
    pairs = [_split(axis) for axis in layout.axes if axis.dim == dim]
    nibbles = sorted((a for a, _ in pairs if a and a.size > 1), key=lambda a: -a.logical)
    # Storage order, the dimension's outermost axis last: a tile is then a range of word rows.
    axes = [a for _, a in pairs if a and a.size > 1]
    outermost = max((a.logical for a in axes), default=0)
    axes.sort(key=lambda a: (a.logical == outermost, a.stored))
    word, index, radix = [], [], 1
    for axis in axes:
        word.append((radix, axis.size, axis.stored // WORD))
        index.append((radix, axis.size, axis.logical))
        radix *= axis.size
    digits = list(product(*(range(a.size) for a in nibbles)))
    return Side(
        words=radix,
        word=_line(word),
        index=_line(index),
        shift=tuple(
            4 * sum(d * a.stored for d, a in zip(ds, nibbles, strict=True)) for ds in digits
        ),
        offset=tuple(sum(d * a.logical for d, a in zip(ds, nibbles, strict=True)) for ds in digits),
        run=prod(axis.size for axis in axes[:-1]),
    )


@cache
def pairs(at: Side) -> tuple[tuple[int, int], ...]:
    """The offsets of the two codes in each byte of a word, where all are of this dimension and as
    far apart in every byte; else none."""
    offset = [o for _, o in sorted(zip(at.shift, at.offset, strict=True))]
    found = tuple(zip(offset[0::2], offset[1::2], strict=True)) if len(offset) == WORD else ()
    return found if len({b - a for a, b in found}) == 1 else ()


@dataclass(frozen=True)
class Codes:
    """Packed codes [K, N]: both sides, and what every code was xored with."""

    k: Side
    n: Side
    xor: int


@cache
def codes(part: Part, linear: Linear) -> Codes:
    """How a kernel reads this part's codes."""
    layout = part.layout(linear)
    return Codes(side(layout, 0), side(layout, 1), part.xor)


@dataclass(frozen=True)
class Order:
    """The words of a tile [BN, BK] in the order of their addresses.

    Word t lies at the sum over `digits`, flat (divisor, size, axis, step), of t // divisor % size
    * step, times the stride of n (axis 1) or of k (axis 2). Put as `shape` and permuted by `axes`
    the words are the tile, whose row r is the tile's word row with bit n_bits[i] of bit i of r,
    and whose columns likewise.
    """

    digits: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    n_bits: tuple[int, ...]
    k_bits: tuple[int, ...]


def _bits(at: Line, rows: int) -> list[tuple[int, bool, int]]:
    """Of each bit of a row: its stride in words, and that as a step of `stride` or of a word."""
    out = []
    for bit in range(rows.bit_length() - 1):
        index = 1 << bit
        digits = zip(at.inner[0::3], at.inner[1::3], at.inner[2::3], strict=True)
        steps = [s * (index // d) for d, n, s in digits if d <= index < d * n]
        out += [(s, False, s) for s in steps] or [(at(index), True, index // at.outer)]
    return out


@cache
def order(own: Codes, BN: int, BK: int, deep: bool) -> Order | None:
    """The order of addresses of a tile, or None where digits are no powers of two.

    Bits of the address go to bits of row and column as mma.m16n8k16 holds a matrix: rows 8 apart
    and columns 2 t, 2 t + 1 and 8 apart are one thread's, which then reads words that lie
    together; the next bits are the lanes'. `deep`: a thread also has rows BN / 2 apart.
    """
    lines, sizes = (own.n.word, own.k.word), (BN, BK)
    for at in lines:
        if any(n & n - 1 for n in (*at.inner[0::3], *at.inner[1::3], at.outer)):
            return None
    # Of each bit of an address, lowest first: its stride, axis and step, its dimension and bit.
    bits = sorted(
        (stride, (dim + 1) * runtime, step, dim, bit)
        for dim in (0, 1)
        for bit, (stride, runtime, step) in enumerate(_bits(lines[dim], sizes[dim]))
    )
    widths = [size.bit_length() - 1 for size in sizes]
    mine = ([3, widths[0] - 1] if deep and widths[0] > 4 else [3], [0, 3])
    lanes, rest = ([0, 1, 2], [1, 2]), [range(width) for width in widths]
    free = [set(positions) for positions in rest]
    places = []
    for nth, (*_, dim, _) in enumerate(bits):
        wanted = (mine if nth < 2 else lanes, lanes, rest)
        places.append(next(p for pool in wanted for p in pool[dim] if p in free[dim]))
        free[dim].remove(places[-1])
    digits: list[list[int]] = []
    for i, (_, axis, step, *_) in enumerate(bits):
        if digits and digits[-1][2] == axis and digits[-1][3] * digits[-1][1] == step:
            digits[-1][1] *= 2
        else:
            digits.append([1 << i, 2, axis, step])
    # The tile's bits, slowest first, as those of t: what stays together is one axis.
    top = len(bits) - 1
    runs: list[list[int]] = []
    for i in sorted(range(len(bits)), key=lambda i: (bits[i][3], -places[i])):
        if runs and runs[-1][-1] + 1 == top - i:
            runs[-1].append(top - i)
        else:
            runs.append([top - i])
    if len(runs) > 8:
        return None
    stored = sorted(runs)
    pad = 8 - len(runs)
    back = [{places[i]: b[4] for i, b in enumerate(bits) if b[3] == dim} for dim in (0, 1)]
    return Order(
        digits=tuple(n for digit in digits for n in digit),
        shape=(*(1 << len(run) for run in stored), *(1,) * pad),
        axes=(*(stored.index(run) for run in runs), *range(8 - pad, 8)),
        n_bits=tuple(back[0][i] for i in range(widths[0])),
        k_bits=tuple(back[1][i] for i in range(widths[1])),
    )

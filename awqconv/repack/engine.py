"""The CPU engine: moves every element of one layout to its place in another, at memory speed.

A position is a sum over index digits, so to go from layout A to layout B is to permute digits.
Cut to digits that both layouts know, one of 2^t * m values is t bits and a digit of m values, and
each bit has one stride in A and one in B. Counted in nibbles:

    slot 0         which nibble of a byte          stride 1
    slots 1..6     which byte of a register        strides 2 4 8 .. 64, as far as they go
    more slots     which register                  any stride
    loops          every other digit, of any size  any stride

A tile is the bits in a register of A or of B. It is loaded in A's order, its slots are permuted,
and it is stored in B's order. To swap two slots costs, for every register,

    two byte slots             one byte shuffle, whatever the permutation
    a byte slot, a register    one shuffle of two registers
    slot 0, a register         (x & 15) | (y << 4) and (x >> 4) | (y & ~15)
    slots 0 and 1              the same within 16-bit lanes
    two registers              nothing: they are renamed

`codegen` turns a tile and its loops into a function; counts and strides are its arguments, so
that one function serves every shape of a pair of layouts. Where A and B share so few bits that a
tile does not fit the registers (as when a matrix is transposed), two passes fetch a part of the
bits each, through a third layout, X, of one tile in a buffer on the stack.
"""

from __future__ import annotations

from functools import lru_cache, reduce
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from awqconv.repack.axes import Axis, Layout
from awqconv.repack.codegen import LINE, SLOTS, Nest, Tile, compiled, write_nest

Bytes = NDArray[np.uint8]

_TILE = SLOTS + 4  # slots of a tile: half of AVX-512's 32 registers, for both sides of a swap
_JUMP = 4  # times what is read in one go, from one read to the next: no CPU sees a sequence there
_AHEAD = 32  # lines that are fetched before they are read where it sees none
_STREAM = 1 << 22  # bytes of a destination that would not stay there: stores bypass the caches


class Digit(NamedTuple):
    """One digit of an index: `size` values, its strides in A and in B in nibbles."""

    size: int
    a: int
    b: int


class Block(NamedTuple):
    """A part of the digits: where it begins in A and B in bytes, and a function with its arguments.

    `address` is that of `params`, which looking it up each time would cost a microsecond.
    """

    a: int
    b: int
    nest: Nest
    params: NDArray[np.int64]
    address: int


def repack(src: Bytes, a: Layout, dst: Bytes, b: Layout, *, bits: int = 4, xor: int = 0) -> None:
    """Move every element from its place by layout `a` in `src` to that by layout `b` in `dst`.

    `src` and `dst` are contiguous uint8 [any] that do not overlap. The layouts place the same
    logical shape, their strides and offsets counted in elements of `bits` = 4, 8, 16 or 32.
    Nibbles are xored with `xor` = 0..15. What lies between the elements of b keeps its value.
    The interpreter lock is released; any number of threads may call this. Fastest where the rows
    of `dst` begin on cache lines (see `aligned`).

    Raises ValueError for arguments that are not so, before anything is written.
    """
    if bits not in (4, 8, 16, 32) or not 0 <= xor < 16 or (xor and bits != 4):
        raise ValueError(f"no elements of {bits} bits xored with {xor}")
    if a.shape != b.shape:
        raise ValueError(f"layouts of {a.shape} and of {b.shape} hold different elements")
    if 0 in a.shape:
        return
    for name, buffer, layout in (("src", src, a), ("dst", dst, b)):
        _check(name, buffer, np.uint8)
        last = layout.offset + _extent(layout.axes)
        if layout.offset < 0 or (last + 1) * bits > buffer.size * 8:
            raise ValueError(f"element {last} of the layout is outside {name}, {buffer.size} bytes")
    if not dst.flags.writeable or np.may_share_memory(src, dst):
        raise ValueError("dst is read-only or overlaps src")

    source, odd_source = divmod(a.offset * bits, 8)
    target, odd_target = divmod(b.offset * bits, 8)
    source, target = source + src.ctypes.data, target + dst.ctypes.data
    stream = dst.size >= _STREAM and target % LINE == 0
    blocks = _plan(a.shape, a.axes, b.axes, bits, xor, stream)
    if blocks is None or odd_source or odd_target:
        _scatter(src, a, dst, b, bits, xor)
        return
    for at_a, at_b, nest, _, params in blocks:
        compiled(write_nest, nest)(source + at_a, target + at_b, params)


def aligned(size: int) -> Bytes:
    """uint8 [size], not initialized, that begins on a cache line: what `repack` best writes to."""
    room = np.empty(size + LINE, np.uint8)
    begin = -room.ctypes.data % LINE
    return room[begin : begin + size]


def _check(name: str, buffer: NDArray[Any], dtype: type[np.generic]) -> None:
    if buffer.dtype != dtype or buffer.ndim != 1 or not buffer.flags.c_contiguous:
        raise ValueError(f"{name} is not a contiguous {np.dtype(dtype)} array of one dimension")


# Planning: which bits are in a register, and which digits are loops.


Axes = tuple[Axis, ...]


@lru_cache(maxsize=1024)
def _extent(axes: Axes) -> int:
    """How far the last element lies from the first."""
    return sum((axis.size - 1) * axis.stored for axis in axes)


def _digits(shape: tuple[int, ...], a: Axes, b: Axes, bits: int) -> list[Digit] | None:
    """The digits that A and B are both made of; None where their boundaries cross."""
    scale = bits // 4
    digits = [Digit(scale, 1, 1)]
    for dim, length in enumerate(shape):
        axes = [axis for axis in a + b if axis.dim == dim]
        for low, high in pairwise(sorted({1, length} | {axis.logical for axis in axes})):
            if high % low:
                return None
            stride = [
                low // axis.logical * axis.stored * scale
                for axis in axes
                if axis.logical <= low < axis.logical * axis.size
            ]
            digits.append(Digit(high // low, *stride))
    return digits


def _by_a(digit: Digit) -> tuple[int, int]:
    return digit.a, digit.b


def _by_b(digit: Digit) -> tuple[int, int]:
    return digit.b, digit.a


class _Parts:
    """Digits as the bits that registers hold in A (`first`) and in B (`last`), and as loops."""

    def __init__(self, digits: list[Digit]) -> None:
        bits, rest = [], []
        for size, a, b in digits:
            twos = (size & -size).bit_length() - 1
            bits += [Digit(2, a << i, b << i) for i in range(twos)]
            rest.append(Digit(size >> twos, a << twos, b << twos))
        self.first = self._chain({bit.a: bit for bit in bits})
        self.last = self._chain({bit.b: bit for bit in bits})
        self.tile = list(dict.fromkeys(self.first + self.last))
        self.loops = self._merge(rest + [bit for bit in bits if bit not in self.tile])

    @staticmethod
    def _chain(bits: dict[int, Digit]) -> list[Digit]:
        """The bits of strides 1, 2, 4, .. without a gap."""
        chain: list[Digit] = []
        while len(chain) < SLOTS and 1 << len(chain) in bits:
            chain.append(bits[1 << len(chain)])
        return chain

    @staticmethod
    def _merge(digits: list[Digit]) -> list[Digit]:
        """The same positions in the fewest digits."""
        merged: list[Digit] = []
        for digit in sorted((d for d in digits if d.size > 1), key=_by_a):
            for i, (size, a, b) in enumerate(merged):
                if (digit.a, digit.b) == (a * size, b * size):
                    merged[i] = Digit(size * digit.size, a, b)
                    break
            else:
                merged.append(digit)
        return merged

    def whole_bytes(self) -> bool:
        """Whether all that moves together is bytes, at byte addresses."""
        a = [d.a for d in self.tile + self.loops if d not in self.first]
        b = [d.b for d in self.tile + self.loops if d not in self.last]
        return bool(self.first and self.last) and not any(stride % 2 for stride in a + b)

    def streams(self, loops: list[Digit]) -> bool:
        """Whether registers of B are whole cache lines wherever these loops and the tile go."""
        apart = [digit.b for digit in self.tile + loops if digit not in self.last]
        return len(self.last) == SLOTS and not any(stride % (2 * LINE) for stride in apart)

    def one_pass(self, loops: list[Digit], xor: int, stream: bool) -> tuple[Tile, list[int]]:
        """The tile in some loops, and its parameters."""
        stores = tuple(map(self.tile.index, self.last))
        params = [stride // 2 for bit in self.tile for stride in bit[1:]]
        return Tile(len(self.first), stores, len(loops), xor, stream), params + _params(loops)


def _params(loops: list[Digit]) -> list[int]:
    return [number for size, a, b in loops for number in (size, a // 2, b // 2)]


@lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...], a: Axes, b: Axes, bits: int, xor: int, stream: bool
) -> list[Block] | None:
    """What to run for layouts of these axes; None where their digits are no whole bytes."""
    digits = _digits(shape, a, b, bits)
    return _blocks(digits, xor, stream) if digits else None


def _blocks(digits: list[Digit], xor: int, stream: bool) -> list[Block] | None:
    parts = _Parts(digits)
    if not parts.whole_bytes():
        return None
    for i, digit in enumerate(digits):
        # Where an odd count ends the slots of a register, all that fills registers goes first.
        for stride, slots in ((digit.a, parts.first), (digit.b, parts.last)):
            fill = max(2 * LINE // stride, 1)
            ends = stride * (digit.size & -digit.size) == 1 << len(slots)
            left = digit.size % fill
            if ends and left and digit.size > fill:
                whole = digit.size - left
                a, b = whole * digit.a // 2, whole * digit.b // 2
                head = _blocks(_resized(digits, i, whole), xor, stream)
                tail = _blocks(_resized(digits, i, left), xor, stream and b % LINE == 0)
                return head and tail and head + [t._replace(a=t.a + a, b=t.b + b) for t in tail]
    # One pass writes in sequence, and what it reads may jump; two passes read in sequence, but in
    # more sequences at a time than a CPU can follow.
    two = len(parts.tile) > _TILE
    loops = sorted(parts.loops, key=_by_a if two else _by_b, reverse=True)
    stream &= parts.streams(loops)
    passes = _through_x(parts, xor, stream) if two else [parts.one_pass([], xor, stream)]
    lines = [0]
    for bit in parts.tile:
        if bit not in parts.first:
            lines += [line + bit.a // 2 for line in lines]
    run = 1
    while run in {bit.a for bit in parts.tile}:
        run *= 2
    jumps = bool(loops) and (two or loops[-1].a > _JUMP * run)
    nest = Nest(
        len(loops),
        tuple(tile for tile, _ in passes),
        1 << len(parts.tile) - 1,
        len(lines) if jumps else 0,
        max(1, _AHEAD // len(lines)),
    )
    params = np.array([*_params(loops), *(x for _, p in passes for x in p), *lines], np.int64)
    return [Block(0, 0, nest, params, params.ctypes.data)]


def _resized(digits: list[Digit], i: int, size: int) -> list[Digit]:
    return [*digits[:i], digits[i]._replace(size=size), *digits[i + 1 :]]


def _through_x(parts: _Parts, xor: int, stream: bool) -> list[tuple[Tile, list[int]]]:
    """Two passes for a tile, and their parameters."""
    # X has A's slots; as many bits of B as a tile can fetch replace those that B does not hold.
    tile, arriving = list(parts.first), [bit for bit in parts.last if bit not in parts.first]
    fetch = _TILE - len(tile)
    for slot in [*range(len(tile), SLOTS), *range(SLOTS - 1, 0, -1)]:
        if fetch and (slot == len(tile) or tile[slot] not in parts.last):
            tile[slot : slot + 1] = [arriving.pop()]
            fetch -= 1
    tile += [bit for bit in parts.tile if bit not in tile]
    to_x = _Parts([bit._replace(b=1 << i) for i, bit in enumerate(tile)])
    from_x = _Parts([bit._replace(a=1 << i) for i, bit in enumerate(tile)])
    return [
        to_x.one_pass(sorted(to_x.loops, key=_by_a, reverse=True), 0, False),
        from_x.one_pass(sorted(from_x.loops, key=_by_b, reverse=True), xor, stream),
    ]


def _scatter(src: Bytes, a: Layout, dst: Bytes, b: Layout, bits: int, xor: int) -> None:
    """Nibble by nibble, for what no digits describe (a granule of 20 against one of 8, a row that
    begins inside a byte). Slow, and right for any two layouts.
    """
    scale = bits // 4
    ends = [[layout.offsets(dim) * scale for dim in range(len(a.shape))] for layout in (a, b)]
    for index in range(a.shape[0]):  # a row at a time bounds the memory of positions
        at_a, at_b = (
            reduce(np.add.outer, [at[0][index] + layout.offset * scale, *at[1:], np.arange(scale)])
            for layout, at in zip((a, b), ends, strict=True)
        )
        codes = src[at_a >> 1] >> (at_a % 2 * 4).astype(np.uint8) & 15 ^ xor
        for half, kept in ((0, 0xF0), (1, 0x0F)):  # of a byte, one after the other
            mine = at_b % 2 == half
            dst[at_b[mine] >> 1] = dst[at_b[mine] >> 1] & kept | codes[mine] << 4 * half

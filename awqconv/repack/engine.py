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
bits each, through a third layout, X, in a buffer that stays in the cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, lru_cache, reduce
from itertools import accumulate, pairwise, product
from operator import mul
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from awqconv.repack.axes import Axis, Layout
from awqconv.repack.codegen import LINE, SLOTS, Tile, compiled, write_tile

Bytes = NDArray[np.uint8]

_TILE = SLOTS + 4  # slots of a tile: half of AVX-512's 32 registers, for both sides of a swap
_SCRATCH = 1 << 20  # bytes of X: what stays in a core's L2
_JUMP = 8 * LINE  # nibbles from one read to the next: more, and no prefetcher sees a sequence
_STREAM = 1 << 22  # bytes of a destination that would not stay there: stores bypass the caches


class Digit(NamedTuple):
    """One digit of an index: `size` values, its strides in A and in B in nibbles."""

    size: int
    a: int
    b: int


class Move(NamedTuple):
    """A function and its arguments: strides of the tile's bits, then count and strides of loops.

    `address` is that of `params`, which looking it up each time would cost a microsecond.
    """

    tile: Tile
    params: NDArray[np.int64]
    address: int


class Block(NamedTuple):
    """A part of the digits: where it begins in A and B in bytes; one move, or two through X."""

    a: int
    b: int
    moves: tuple[Move, ...]


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
    for at_a, at_b, moves in blocks:
        if len(moves) == 1:
            _run(moves[0], source + at_a, target + at_b)
        else:
            _run(moves[0], source + at_a, _scratch())
            _run(moves[1], _scratch(), target + at_b)


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


Order = Callable[[Digit], tuple[int, int]]


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

    def move(self, xor: int, stream: bool, order: Order, far: bool = False) -> Move:
        """One pass, its loops in an order; `far`: what it reads is in no cache."""
        apart = [digit.b for digit in self.tile + self.loops if digit not in self.last]
        stream &= len(self.last) == SLOTS and not any(stride % (2 * LINE) for stride in apart)
        loops = sorted(self.loops, key=order, reverse=True)
        stores = tuple(map(self.tile.index, self.last))
        params = [stride // 2 for bit in self.tile for stride in bit[1:]]
        params += [number for size, a, b in loops for number in (size, a // 2, b // 2)]
        jumps = far and bool(loops) and loops[-1].a > _JUMP
        tile = Tile(len(self.first), stores, len(loops), xor, stream, jumps)
        array = np.array(params, np.int64)
        return Move(tile, array, array.ctypes.data)


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
                return head and tail and head + [Block(x + a, y + b, m) for x, y, m in tail]
    if len(parts.tile) > _TILE:
        return _through_x(parts, xor, stream)
    return [Block(0, 0, (parts.move(xor, stream, _by_b, far=True),))]


def _resized(digits: list[Digit], i: int, size: int) -> list[Digit]:
    return [*digits[:i], digits[i]._replace(size=size), *digits[i + 1 :]]


def _through_x(parts: _Parts, xor: int, stream: bool) -> list[Block]:
    """Two passes for every part of the digits that fits X."""
    stream &= not any(digit.b % (2 * LINE) for digit in parts.loops)  # so parts begin on lines
    # X has A's slots; as many bits of B as a tile can fetch replace those that B does not hold.
    tile, arriving = list(parts.first), [bit for bit in parts.last if bit not in parts.first]
    fetch = _TILE - len(tile)
    for slot in [*range(len(tile), SLOTS), *range(SLOTS - 1, 0, -1)]:
        if fetch and (slot == len(tile) or tile[slot] not in parts.last):
            tile[slot : slot + 1] = [arriving.pop()]
            fetch -= 1
    tile += [bit for bit in parts.tile if bit not in tile]

    # A block takes short runs in B first, then runs in A as long as they fit.
    loops = sorted(parts.loops, key=_by_a, reverse=True)
    room, counts = 2 * _SCRATCH >> len(tile), dict.fromkeys(loops, 1)
    runs = [(digit, 4) for digit in sorted(loops, key=_by_b)[:1]]
    for digit, most in [*runs, *((digit, digit.size) for digit in reversed(loops))]:
        taken = min(digit.size, most, counts[digit] * room)
        room, counts[digit] = counts[digit] * room // taken, taken

    @cache
    def moves(*sizes: int) -> tuple[Move, Move]:
        block = tile + [d._replace(size=n) for d, n in zip(loops, sizes, strict=True)]
        places = list(accumulate((d.size for d in block[:-1]), mul, initial=1))
        to_x = _Parts([d._replace(b=x) for d, x in zip(block, places, strict=True)])
        from_x = _Parts([d._replace(a=x) for d, x in zip(block, places, strict=True)])
        return to_x.move(0, False, _by_a), from_x.move(xor, stream, _by_b)

    blocks = []
    for starts in product(*(range(0, d.size, counts[d]) for d in loops)):
        at = list(zip(loops, starts, strict=True))
        sizes = [min(counts[d], d.size - i) for d, i in at]
        begin_a, begin_b = (sum(d[side] * i for d, i in at) // 2 for side in (1, 2))
        blocks.append(Block(begin_a, begin_b, moves(*sizes)))
    return blocks


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


# Running: compiled functions, and a buffer for X in each thread.

_local = threading.local()


def _run(move: Move, source: int, target: int) -> None:
    compiled(write_tile, move.tile)(source, target, move.address)


def _scratch() -> int:
    """The address of this thread's X."""
    if not hasattr(_local, "x"):
        _local.x = aligned(_SCRATCH)
    return int(_local.x.ctypes.data)

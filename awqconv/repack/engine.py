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

LLVM turns a tile and its loops into a function; counts and strides are its arguments, so that one
function serves every shape of a pair of layouts. Where A and B share so few bits that a tile does
not fit the registers (as when a matrix is transposed), two passes fetch a part of the bits each,
through a third layout, X, in a buffer that stays in the cache.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, lru_cache, reduce
from itertools import accumulate, count, pairwise, product
from operator import mul
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from awqconv.repack.axes import Layout

Bytes = NDArray[np.uint8]

_LINE = 64  # bytes of a register: a cache line, and an AVX-512 vector
_SLOTS = _LINE.bit_length()  # log2 of its nibbles
_TILE = _SLOTS + 4  # slots of a tile: half of AVX-512's 32 registers, for both sides of a swap
_SCRATCH = 1 << 20  # bytes of X: what stays in a core's L2
_STREAM = 1 << 22  # bytes of a destination that would not stay there: stores bypass the caches
_BURST = 255 // 15  # nibbles whose sum fits a byte


class Digit(NamedTuple):
    """One digit of an index: `size` values, its strides in A and in B in nibbles."""

    size: int
    a: int
    b: int


class Tile(NamedTuple):
    """What a function is compiled for. Bits 0..loads-1 are A's slots, in order.

    `stores` are the bits in B's slots, in order; `loops` is the depth of the nest around the tile.
    """

    loads: int
    stores: tuple[int, ...]
    loops: int
    xor: int
    stream: bool


class Move(NamedTuple):
    """A function and its arguments: strides of the tile's bits, then count and strides of loops."""

    tile: Tile
    params: NDArray[np.int64]


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
        last = layout.offset + sum((axis.size - 1) * axis.stored for axis in layout.axes)
        if layout.offset < 0 or (last + 1) * bits > buffer.size * 8:
            raise ValueError(f"element {last} of the layout is outside {name}, {buffer.size} bytes")
    if not dst.flags.writeable or np.may_share_memory(src, dst):
        raise ValueError("dst is read-only or overlaps src")

    source, odd_source = divmod(a.offset * bits, 8)
    target, odd_target = divmod(b.offset * bits, 8)
    source, target = source + src.ctypes.data, target + dst.ctypes.data
    stream = dst.size >= _STREAM and target % _LINE == 0
    blocks = _plan(replace(a, offset=0), replace(b, offset=0), bits, xor, stream)
    if blocks is None or odd_source or odd_target:
        _scatter(src, a, dst, b, bits, xor)
        return
    for at_a, at_b, moves in blocks:
        if len(moves) == 1:
            _run(moves[0], source + at_a, target + at_b)
        else:
            _run(moves[0], source + at_a, _scratch())
            _run(moves[1], _scratch(), target + at_b)


def nibble_sums(src: Bytes, apart: int, rows: int, out: NDArray[np.uint16]) -> None:
    """Sum every nibble over rows of 64 bytes: out[b, 2i] and out[b, 2i+1] for byte i's two halves.

    `src` is contiguous uint8 with a block of `rows` rows every `apart` bytes; `out` is contiguous
    uint16 [blocks, 128]. 1..4369 rows: what keeps a sum in uint16.

    Raises ValueError for arguments that are not so, before anything is written.
    """
    _check("src", src, np.uint8)
    _check("out", out.reshape(-1), np.uint16)
    blocks = out.size // (2 * _LINE)
    if out.shape != (blocks, 2 * _LINE) or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(f"sums of {out.shape}, not of [blocks, {2 * _LINE}]")
    if not 0 < rows <= 65535 // 15 or apart < rows * _LINE:
        raise ValueError(f"no blocks of {rows} rows every {apart} bytes")
    if (blocks - 1) * apart + rows * _LINE > src.size:
        raise ValueError(f"{blocks} blocks every {apart} bytes leave src, {src.size}")
    out[:] = 0
    full = rows // _BURST
    for row, bursts, height in ((0, full, _BURST), (full * _BURST, 1, rows % _BURST)):
        if blocks and bursts and height:
            params = np.array([bursts, blocks, height, apart], np.int64)
            begin = src.ctypes.data + row * _LINE
            _function(None)(begin, out.ctypes.data, params.ctypes.data)


def aligned(size: int) -> Bytes:
    """uint8 [size], not initialized, that begins on a cache line: what `repack` best writes to."""
    room = np.empty(size + _LINE, np.uint8)
    begin = -room.ctypes.data % _LINE
    return room[begin : begin + size]


def _check(name: str, buffer: NDArray[Any], dtype: type[np.generic]) -> None:
    if buffer.dtype != dtype or buffer.ndim != 1 or not buffer.flags.c_contiguous:
        raise ValueError(f"{name} is not a contiguous {np.dtype(dtype)} array of one dimension")


# Planning: which bits are in a register, and which digits are loops.


def _digits(a: Layout, b: Layout, bits: int) -> list[Digit] | None:
    """The digits that A and B are both made of; None where their boundaries cross."""
    scale = bits // 4
    digits = [Digit(scale, 1, 1)]
    for dim, length in enumerate(a.shape):
        axes = [axis for layout in (a, b) for axis in layout.axes if axis.dim == dim]
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
        while len(chain) < _SLOTS and 1 << len(chain) in bits:
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

    def move(self, xor: int, stream: bool, order: Order | None = None) -> Move:
        """One pass. Unless an order of its loops is given, it reads in sequence where stores
        bypass the caches, and otherwise writes in sequence.
        """
        apart = [digit.b for digit in self.tile + self.loops if digit not in self.last]
        stream &= len(self.last) == _SLOTS and not any(stride % (2 * _LINE) for stride in apart)
        loops = sorted(self.loops, key=order or (_by_a if stream else _by_b), reverse=True)
        stores = tuple(map(self.tile.index, self.last))
        params = [stride // 2 for bit in self.tile for stride in bit[1:]]
        params += [number for size, a, b in loops for number in (size, a // 2, b // 2)]
        tile = Tile(len(self.first), stores, len(loops), xor, stream)
        return Move(tile, np.array(params, np.int64))


@lru_cache(maxsize=1024)
def _plan(a: Layout, b: Layout, bits: int, xor: int, stream: bool) -> list[Block] | None:
    """What to run for two layouts of offset 0; None where their digits are no whole bytes."""
    digits = _digits(a, b, bits)
    return _blocks(digits, xor, stream) if digits else None


def _blocks(digits: list[Digit], xor: int, stream: bool) -> list[Block] | None:
    parts = _Parts(digits)
    if not parts.whole_bytes():
        return None
    for i, digit in enumerate(digits):
        # Where an odd count ends the slots of a register, all that fills registers goes first.
        for stride, slots in ((digit.a, parts.first), (digit.b, parts.last)):
            fill = max(2 * _LINE // stride, 1)
            ends = stride * (digit.size & -digit.size) == 1 << len(slots)
            left = digit.size % fill
            if ends and left and digit.size > fill:
                whole = digit.size - left
                a, b = whole * digit.a // 2, whole * digit.b // 2
                head = _blocks(_resized(digits, i, whole), xor, stream)
                tail = _blocks(_resized(digits, i, left), xor, stream and b % _LINE == 0)
                return head and tail and head + [Block(x + a, y + b, m) for x, y, m in tail]
    if len(parts.tile) > _TILE:
        return _through_x(parts, xor, stream)
    return [Block(0, 0, (parts.move(xor, stream),))]


def _resized(digits: list[Digit], i: int, size: int) -> list[Digit]:
    return [*digits[:i], digits[i]._replace(size=size), *digits[i + 1 :]]


def _through_x(parts: _Parts, xor: int, stream: bool) -> list[Block]:
    """Two passes for every part of the digits that fits X."""
    stream &= not any(digit.b % (2 * _LINE) for digit in parts.loops)  # so parts begin on lines
    # X has A's slots; as many bits of B as a tile can fetch replace those that B does not hold.
    tile, arriving = list(parts.first), [bit for bit in parts.last if bit not in parts.first]
    fetch = _TILE - len(tile)
    for slot in [*range(len(tile), _SLOTS), *range(_SLOTS - 1, 0, -1)]:
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


# Running: functions by what they are compiled for, and a buffer for X in each thread.

_lock = threading.Lock()
_functions: dict[Tile | None, Any] = {}
_local = threading.local()


def _run(move: Move, source: int, target: int) -> None:
    _function(move.tile)(source, target, move.params.ctypes.data)


def _function(key: Tile | None) -> Any:
    """The compiled function of a tile, or of the nibble sums."""
    if key not in _functions:
        with _lock:
            if key not in _functions:
                _functions[key] = _compile(_tile(key) if key else _sums())
    return _functions[key]


def _scratch() -> int:
    """The address of this thread's X."""
    if not hasattr(_local, "x"):
        _local.x = aligned(_SCRATCH)
    return int(_local.x.ctypes.data)


def _compile(text: str) -> Any:
    import llvmlite.binding as llvm  # slow to import, and many commands need none

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(text)
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=1))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    function = kind(engine.get_function_address("f"))
    function.engine = engine  # type: ignore[attr-defined]  # it owns the code
    return function


# Code: LLVM IR of the two functions.


class _Code:
    """`void f(src, dst, params)` being written, and the few instructions the engine is made of."""

    def __init__(self) -> None:
        from llvmlite import ir

        self.ir, self.i8, self.i64 = ir, ir.IntType(8), ir.IntType(64)
        self.module = ir.Module()
        pointers = [self.i8.as_pointer(), self.i8.as_pointer(), self.i64.as_pointer()]
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), pointers), "f")
        self.src, self.dst, self.params = function.args
        self.src.add_attribute("noalias")
        self.dst.add_attribute("noalias")
        self.b, self.numbers = ir.IRBuilder(function.append_basic_block()), count()

    def param(self) -> Any:
        """The next of the parameters."""
        return self.b.load(self.b.gep(self.params, [self.i64(next(self.numbers))]))

    @contextmanager
    def loop(self, times: Any) -> Iterator[Any]:
        """`for i in range(times)` around what is written inside; times > 0."""
        before, body = self.b.block, self.b.append_basic_block()
        self.b.branch(body)
        self.b.position_at_end(body)
        i = self.b.phi(self.i64)
        i.add_incoming(self.i64(0), before)
        yield i
        following, done = self.b.add(i, self.i64(1)), self.b.append_basic_block()
        i.add_incoming(following, self.b.block)
        self.b.cbranch(self.b.icmp_signed("<", following, times), body, done)
        self.b.position_at_end(done)

    def at(self, pointer: Any, index: Any, stride: Any = None) -> Any:
        return self.b.gep(pointer, [index if stride is None else self.b.mul(index, stride)])

    def load(self, pointer: Any, size: int, bits: int = 8) -> Any:
        kind = self.ir.VectorType(self.ir.IntType(bits), size)
        value = self.b.load(self.b.bitcast(pointer, kind.as_pointer()))
        value.align = 1
        return value

    def store(self, value: Any, pointer: Any, stream: bool = False) -> None:
        stored = self.b.store(value, self.b.bitcast(pointer, value.type.as_pointer()))
        stored.align = _LINE if stream else 1
        if stream:
            stored.set_metadata("nontemporal", self.module.add_metadata([self.ir.IntType(32)(1)]))

    def shuffle(self, x: Any, y: Any, order: list[int]) -> Any:
        lanes = self.ir.VectorType(self.ir.IntType(32), len(order))
        return self.b.shuffle_vector(x, y, lanes(order))

    def nibbles(self, x: Any, mask: int, shift: int = 0) -> Any:
        """`x << shift & mask` in every lane; a negative shift goes right."""
        lanes = [x.type([value] * x.type.count) for value in (abs(shift), mask)]
        if shift:
            x = (self.b.shl if shift > 0 else self.b.lshr)(x, lanes[0])
        return self.b.and_(x, lanes[1])


class _Registers:
    """A tile in registers: vectors, numbered by the slots above theirs; `slots` says which bits."""

    def __init__(self, code: _Code, vectors: list[Any], slots: list[int], width: int) -> None:
        self.code, self.vectors, self.slots, self.width = code, vectors, slots, width
        self.size = 1 << width - 1

    def swap(self, slot: int, bit: int) -> None:
        """Swap what a slot holds with a bit that numbers registers."""
        code, half = self.code, 1 << slot - 1 if slot else 0
        other = self.slots.index(bit)
        pair = 1 << other - self.width
        lower = [i if not i & half else self.size + i - half for i in range(self.size)]
        upper = [i + half if not i & half else self.size + i for i in range(self.size)]
        for i, x in enumerate(self.vectors):
            if i & pair:
                continue
            y = self.vectors[i | pair]
            if slot:
                both = code.shuffle(x, y, lower), code.shuffle(x, y, upper)
            else:
                low = code.b.or_(code.nibbles(x, 0x0F), code.nibbles(y, 0xF0, 4))
                high = code.b.or_(code.nibbles(x, 0x0F, -4), code.nibbles(y, 0xF0))
                both = low, high
            self.vectors[i], self.vectors[i | pair] = both
        self.slots[slot], self.slots[other] = bit, self.slots[slot]

    def swap_nibbles(self) -> None:
        """Swap slots 0 and 1: the two middle nibbles of every 16 bits."""
        code, wide = self.code, self.code.ir.VectorType(self.code.ir.IntType(16), self.size // 2)
        for i, x in enumerate(self.vectors):
            y = code.b.bitcast(x, wide)
            moved = code.b.or_(code.nibbles(y, 0x0F00, 4), code.nibbles(y, 0x00F0, -4))
            self.vectors[i] = code.b.bitcast(code.b.or_(code.nibbles(y, 0xF00F), moved), x.type)
        self.slots[:2] = self.slots[1::-1]

    def permute(self, order: list[int]) -> None:
        """Put these bits, all of those in byte slots, in this order."""
        old = [self.slots.index(bit) - 1 for bit in order]
        source = [sum((i >> new & 1) << s for new, s in enumerate(old)) for i in range(self.size)]
        if source != sorted(source):
            self.vectors = [self.code.shuffle(x, x, source) for x in self.vectors]
        self.slots[1 : self.width] = order

    def route(self, last: list[int]) -> None:
        """Bring the bits `last` to slots 0, 1, .. in order."""
        inside = self.slots[: self.width]
        arriving = [bit for bit in last if bit not in inside]
        if self.slots[0] != last[0] and last[0] in inside and arriving:
            self.swap(inside.index(last[0]), arriving[0])  # out, to come back by slot 0
        if self.slots[0] != last[0] and last[0] in inside and not arriving:
            self.permute(sorted(inside[1:], key=lambda bit: bit != last[0]))
            self.swap_nibbles()
        elif self.slots[0] != last[0]:
            self.swap(0, last[0])
        for bit in last:
            if bit not in self.slots[: self.width]:
                out = [slot for slot in range(1, self.width) if self.slots[slot] not in last]
                self.swap(out[-1], bit)
        rest = [bit for bit in self.slots[1 : self.width] if bit not in last]
        self.permute(last[1:] + rest)


def _tile(tile: Tile) -> str:
    """The function that moves a tile in its loops."""
    code, last = _Code(), list(tile.stores)
    # What one load leaves of a register is filled by those bits of B that come last.
    slots = [*range(tile.loads), *(bit for bit in reversed(last) if bit >= tile.loads)]
    width, stored = min(len(slots), _SLOTS), len(last)
    strides = [(code.param(), code.param()) for _ in slots]

    def places(bits: list[int], side: int) -> list[Any]:
        """The offsets of all values of some bits, the first bit changing fastest."""
        offsets = [code.i64(0)]
        for bit in bits:
            offsets += [code.b.add(offset, strides[bit][side]) for offset in offsets]
        return offsets

    apart = [bit for bit in slots if bit not in last]
    sources, targets = places(slots[tile.loads :], 0), places(apart, 1)
    loops = [(code.param(), code.param(), code.param()) for _ in range(tile.loops)]
    with ExitStack() as nest:
        src, dst = code.src, code.dst
        for times, step_a, step_b in loops:
            i = nest.enter_context(code.loop(times))
            src, dst = code.at(src, i, step_a), code.at(dst, i, step_b)
        vectors = [code.load(code.at(src, place), 1 << tile.loads - 1) for place in sources]
        while vectors[0].type.count < 1 << width - 1:
            both = list(range(2 * vectors[0].type.count))
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [code.shuffle(x, y, both) for x, y in pairs]
        registers = _Registers(code, vectors, slots, width)
        registers.route(last)
        size = 1 << stored - 1
        for number in range(1 << len(slots) - stored):
            register, part = divmod(number, 1 << width - stored)
            value = registers.vectors[register]
            if stored < width:
                value = code.shuffle(value, value, list(range(part * size, part * size + size)))
            if tile.xor:
                value = code.b.xor(value, value.type([tile.xor * 0x11] * size))
            held = {bit for i, bit in enumerate(registers.slots[stored:]) if number >> i & 1}
            place = targets[sum(1 << i for i, bit in enumerate(apart) if bit in held)]
            code.store(value, code.at(dst, place), tile.stream)
    if tile.stream:
        code.b.fence("seq_cst")  # such stores are ordered by nothing else
    code.b.ret_void()
    return str(code.module)


def _sums() -> str:
    """The function that adds bursts of 64-byte rows of each block to uint16 sums of nibbles."""
    code = _Code()
    bursts, blocks, height, apart = (code.param() for _ in range(4))
    kind = code.ir.VectorType(code.i8, _LINE)
    sums = [code.b.alloca(kind), code.b.alloca(kind)]
    wide = code.ir.VectorType(code.ir.IntType(16), 2 * _LINE)
    spread = [half * _LINE + i for i in range(_LINE) for half in (0, 1)]
    line = code.i64(_LINE)
    with code.loop(blocks) as block, code.loop(bursts) as burst:
        start = code.at(code.src, burst, code.b.mul(height, line))
        start = code.at(start, block, apart)
        for total in sums:
            code.b.store(kind([0] * _LINE), total)
        with code.loop(height) as row:
            x = code.load(code.at(start, row, line), _LINE)
            for total, shift in zip(sums, (0, -4), strict=True):
                code.b.store(code.b.add(code.b.load(total), code.nibbles(x, 0x0F, shift)), total)
        both = code.shuffle(code.b.load(sums[0]), code.b.load(sums[1]), spread)
        to = code.at(code.dst, block, code.i64(4 * _LINE))
        code.store(code.b.add(code.load(to, 2 * _LINE, 16), code.b.zext(both, wide)), to)
    code.b.ret_void()
    return str(code.module)

"""Small functions compiled for the vectors of the CPU at hand, through LLVM.

A function is `void f(src, dst, params)`: two pointers, and counts and strides as int64, so that
one function serves every shape. It is written by a Python function that is given a `Code` and
whatever else decides its instructions, and compiled the first time it is asked for:

    compiled(write_nest, nest)(source, target, params)
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

from awqconv.digest import digest

LINE = 64  # bytes of a register: a cache line, and an AVX-512 vector
SLOTS = LINE.bit_length()  # log2 of its nibbles

Function = Callable[[int, int, int], None]

_lock = threading.Lock()
_functions: dict[tuple[Hashable, ...], Function] = {}


class Tile(NamedTuple):
    """A tile and its loops. Bits 0..loads-1 are A's slots, in order; `stores` are the bits in B's.

    `loops` is the depth of the nest around the tile; `stream`: its stores bypass the caches.
    """

    loads: int
    stores: tuple[int, ...]
    loops: int
    xor: int
    stream: bool


class Nest(NamedTuple):
    """What a function is compiled for: `loops` around one pass of `size` bytes, or around two by
    way of X.

    In each round every pass has `lines` cache lines fetched that will be read `ahead` rounds of the
    innermost loop later. Twice, for a CPU drops what it has no room for.
    """

    loops: int
    passes: tuple[Tile, ...]
    size: int
    lines: int
    ahead: int


def compiled(write: Callable[..., None], *key: Hashable) -> Function:
    """The function that `write(code, *key)` writes, of the addresses of src, dst and params.

    It checks nothing. The interpreter lock is released while it runs.
    """
    name = (write, *key)
    if name not in _functions:
        with _lock:
            if name not in _functions:
                code = Code()
                write(code, *key)
                code.b.ret_void()
                _functions[name] = _compile(str(code.module))
    return _functions[name]


def _compile(text: str) -> Function:
    import llvmlite.binding as llvm  # slow to import, and many commands need none

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=cpu, features=features, opt=3
    )

    def compiled() -> bytes:
        module = llvm.parse_assembly(text)
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(1))
        passes.getModulePassManager().run(module, passes)
        return cast(bytes, machine.emit_object(module))

    key = "\n".join((text, cpu, features, str(llvm.llvm_version_info)))
    code = _cached(digest(key.encode()), compiled)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    function: Any = kind(engine.get_function_address("f"))
    function.engine = engine  # it owns the code
    return cast(Function, function)


def _cached(name: str, make: Callable[[], bytes]) -> bytes:
    """What `make` returns, kept in the user's cache folder where that can be written.

    A file is taken that is whole and the user's own: it is code that will run.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # not set, or to be ignored
        root = os.path.expanduser("~/.cache")
    if not os.path.isabs(root):  # a user without a home
        return make()
    path = Path(root, "awqconv", name)
    with suppress(OSError), path.open("rb") as file:
        begin, data = file.read(32), file.read()
        own = os.fstat(file.fileno()).st_uid == os.geteuid()
        if own and begin == digest(data).encode():
            return data
    data = make()
    new = path.with_suffix(f".{os.getpid()}")  # `compiled` lets one thread in
    try:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        new.write_bytes(digest(data).encode() + data)
        new.replace(path)
    except OSError:
        with suppress(OSError):
            new.unlink()
    return data


class Code:
    """`void f(src, dst, params)` being written: its arguments, and the few instructions it takes.

    `b` is llvmlite's builder, for all others. No byte that is read through `src` may be written
    through `dst`.
    """

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

    def loop_params(self, depth: int) -> list[tuple[Any, Any, Any]]:
        """Count and strides in src and dst of so many loops."""
        return [(self.param(), self.param(), self.param()) for _ in range(depth)]

    def nest(
        self, stack: ExitStack, loops: list[tuple[Any, Any, Any]], src: Any, dst: Any
    ) -> tuple[Any, Any, Any]:
        """Enter loops; where a round of the innermost begins in src and dst, and its number."""
        number = self.i64(0)
        for times, step_a, step_b in loops:
            i = stack.enter_context(self.loop(times))
            src, dst = self.at(src, i, step_a), self.at(dst, i, step_b)
            number = self.b.add(self.b.mul(number, times), i)
        return src, dst, number

    def room(self, size: int) -> Any:
        """So many bytes, on a cache line, while the function runs."""
        room = self.b.alloca(self.ir.ArrayType(self.i8, size))
        room.align = LINE
        return self.b.bitcast(room, self.i8.as_pointer())

    def at(self, pointer: Any, index: Any, stride: Any = None) -> Any:
        return self.b.gep(pointer, [index if stride is None else self.b.mul(index, stride)])

    def load(self, pointer: Any, size: int, bits: int = 8) -> Any:
        kind = self.ir.VectorType(self.ir.IntType(bits), size)
        value = self.b.load(self.b.bitcast(pointer, kind.as_pointer()))
        value.align = 1
        return value

    def prefetch(self, pointer: Any) -> None:
        """Have a line fetched into L2; any address will do."""
        kinds = [pointer.type, *[self.ir.IntType(32)] * 3]
        kind = self.ir.FunctionType(self.ir.VoidType(), kinds)
        function = self.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        self.b.call(function, [pointer, *(kinds[1](i) for i in (0, 2, 1))])  # to read, L2, data

    def store(self, value: Any, pointer: Any, stream: bool = False) -> None:
        stored = self.b.store(value, self.b.bitcast(pointer, value.type.as_pointer()))
        stored.align = LINE if stream else 1
        if stream:
            stored.set_metadata("nontemporal", self.module.add_metadata([self.ir.IntType(32)(1)]))

    def shuffle(self, x: Any, y: Any, order: list[int]) -> Any:
        lanes = self.ir.VectorType(self.ir.IntType(32), len(order))
        return self.b.shuffle_vector(x, y, lanes(order))

    def lanes(self, x: Any, bits: int) -> Any:
        """The same vector in lanes of so many bits."""
        count = x.type.count * x.type.element.width // bits
        return self.b.bitcast(x, self.ir.VectorType(self.ir.IntType(bits), count))

    def field(self, x: Any, mask: int, shift: int = 0) -> Any:
        """`x << shift & mask` in every lane; a negative shift goes right."""
        lanes = [x.type([value] * x.type.count) for value in (abs(shift), mask)]
        if shift:
            x = (self.b.shl if shift > 0 else self.b.lshr)(x, lanes[0])
        return self.b.and_(x, lanes[1])


class _Registers:
    """A tile in registers: vectors, numbered by the slots above theirs; `slots` says which bits."""

    def __init__(self, code: Code, vectors: list[Any], slots: list[int], width: int) -> None:
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
                low = code.b.or_(code.field(x, 0x0F), code.field(y, 0xF0, 4))
                high = code.b.or_(code.field(x, 0x0F, -4), code.field(y, 0xF0))
                both = low, high
            self.vectors[i], self.vectors[i | pair] = both
        self.slots[slot], self.slots[other] = bit, self.slots[slot]

    def swap_nibbles(self) -> None:
        """Swap slots 0 and 1: the two middle nibbles of every 16 bits."""
        code = self.code
        for i, x in enumerate(self.vectors):
            y = code.lanes(x, 16)
            moved = code.b.or_(code.field(y, 0x0F00, 4), code.field(y, 0x00F0, -4))
            self.vectors[i] = code.lanes(code.b.or_(code.field(y, 0xF00F), moved), 8)
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
        for slot, bit in enumerate(last):
            if bit not in self.slots[: self.width]:
                out = [i for i in range(1, self.width) if self.slots[i] not in last]
                self.swap(slot if slot in out else out[-1], bit)
        rest = [bit for bit in self.slots[1 : self.width] if bit not in last]
        self.permute(last[1:] + rest)


class _Pass:
    """A tile in its loops. Parameters: of each of the tile's bits the strides in src and dst, of
    each loop its count and those strides, the outermost first; all in bytes.
    """

    def __init__(self, code: Code, tile: Tile) -> None:
        self.code, self.tile, self.last = code, tile, list(tile.stores)
        # What one load leaves of a register is filled by those bits of B that come last.
        rest = (bit for bit in reversed(self.last) if bit >= tile.loads)
        self.slots = [*range(tile.loads), *rest]
        self.size = 1 << len(self.slots) - 1
        strides = [(code.param(), code.param()) for _ in self.slots]

        def places(bits: list[int], side: int) -> list[Any]:
            """The offsets of all values of some bits, the first bit changing fastest."""
            offsets = [code.i64(0)]
            for bit in bits:
                offsets += [code.b.add(offset, strides[bit][side]) for offset in offsets]
            return offsets

        self.apart = [bit for bit in self.slots if bit not in self.last]
        self.sources = places(self.slots[tile.loads :], 0)
        self.targets = places(self.apart, 1)
        self.loops = code.loop_params(tile.loops)

    def write(self, src: Any, dst: Any, ahead: Any, table: Any, each: int) -> None:
        """Write the pass from `src` to `dst`; in every round of its loops the next `each` of a
        table of offsets from `ahead` are fetched.
        """
        code = self.code
        with ExitStack() as nest:
            src, dst, number = code.nest(nest, self.loops, src, dst)
            first = code.b.mul(number, code.i64(each))
            for i in range(each):
                line = code.b.load(code.at(table, code.b.add(first, code.i64(i))))
                code.prefetch(code.at(ahead, line))
            self._move(src, dst)

    def _move(self, src: Any, dst: Any) -> None:
        code, tile, slots, stored = self.code, self.tile, self.slots, len(self.last)
        width = min(len(slots), SLOTS)
        vectors = [code.load(code.at(src, place), 1 << tile.loads - 1) for place in self.sources]
        while vectors[0].type.count < 1 << width - 1:
            both = list(range(2 * vectors[0].type.count))
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [code.shuffle(x, y, both) for x, y in pairs]
        registers = _Registers(code, vectors, slots, width)
        registers.route(self.last)
        size = 1 << stored - 1
        for number in range(1 << len(slots) - stored):
            register, part = divmod(number, 1 << width - stored)
            value = registers.vectors[register]
            if stored < width:
                value = code.shuffle(value, value, list(range(part * size, part * size + size)))
            if tile.xor:
                value = code.b.xor(value, value.type([tile.xor * 0x11] * size))
            held = {bit for i, bit in enumerate(registers.slots[stored:]) if number >> i & 1}
            place = self.targets[sum(1 << i for i, bit in enumerate(self.apart) if bit in held)]
            code.store(value, code.at(dst, place), tile.stream)


def write_nest(code: Code, nest: Nest) -> None:
    """Write what runs passes in loops. Parameters: of each loop its count and its strides in src
    and dst, the outermost first, in bytes; then those of each pass; the offsets of `lines`.
    """
    loops = code.loop_params(nest.loops)
    passes = [_Pass(code, tile) for tile in nest.passes]
    table = code.at(code.params, code.i64(next(code.numbers)))
    x = [code.room(nest.size)] * (len(passes) - 1)
    with ExitStack() as stack:
        src, dst, _ = code.nest(stack, loops, code.src, code.dst)
        ahead = code.at(src, code.i64(nest.ahead), loops[-1][1]) if nest.lines else src
        for part, (begin, end) in zip(passes, pairwise([src, *x, dst]), strict=True):
            each = nest.lines * part.size // nest.size
            part.write(begin, end, ahead, table, each)
    if passes[-1].tile.stream:
        code.b.fence("seq_cst")  # such stores are ordered by nothing else

"""The engine against the oracle: every ordered pair of layouts, slices, widths, threads."""

import threading
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from awqconv.repack import codegen, engine, layouts, reference
from awqconv.repack.axes import Layout, Pattern

PACKED = {
    "AWQ": layouts.AWQ,
    "ROWS": layouts.ROWS,
    "MARLIN": layouts.MARLIN,
    "MARLIN_ZEROS": layouts.MARLIN_ZEROS,
    "COLUMNS": layouts.COLUMNS,
    "CT_ZEROS": layouts.CT_ZEROS,
    "GPTQ": layouts.GPTQ,
    "WNA16": layouts.WNA16,
    "WNA16_ZEROS": layouts.WNA16_ZEROS,
    "VLLM_CPU": layouts.VLLM_CPU,
    "GEMV_FAST": layouts.GEMV_FAST,
}
PACKED |= {f"AMX_{block}": layouts.amx(block) for block in (32, 48, 64, 128)}
WIDE = {
    "MARLIN_SCALES": layouts.MARLIN_SCALES,
    "MARLIN_SCALES_SINGLE": layouts.MARLIN_SCALES_SINGLE,
    "AMX_COLUMNS": layouts.AMX_COLUMNS,
    "TRANSPOSED": layouts.TRANSPOSED,
    "PLAIN": layouts.PLAIN,
}
GUARD = 67  # bytes, odd so that nothing is aligned by chance


def elements(layout: Layout) -> int:
    """Elements from a layout's first to its last, one more."""
    return layout.offset + sum((axis.size - 1) * axis.stored for axis in layout.axes) + 1


def places(layout: Layout) -> np.ndarray:
    """Storage position of every logical element."""
    return np.add.outer(layout.offsets(0), layout.offsets(1)) + layout.offset


def written(
    codes: np.ndarray, layout: Layout, bits: int, size: int, fill: int = 0xA5
) -> np.ndarray:
    """The bytes of a buffer of `fill` that holds the elements at the layout's positions."""
    buffer = np.full(size, fill, np.uint8)
    if bits > 4:
        whole = buffer[: size * 8 // bits * bits // 8].view(f"u{bits // 8}")
        whole[places(layout)] = codes
        return buffer
    nibbles = reference.unpack_nibbles(buffer)
    nibbles[places(layout)] = codes
    return reference.pack_nibbles(nibbles)


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> np.ndarray:
    dtype = np.uint8 if bits == 4 else f"u{bits // 8}"
    return np.random.default_rng([seed, *shape]).integers(0, 2**bits, shape, dtype=dtype)


def check(a: Layout, b: Layout, bits: int = 4, xor: int = 0, seed: int = 0) -> None:
    """Run the engine between buffers with guards; everything but b's elements must keep."""
    codes = random_codes(a.shape, bits, seed)
    size_a, size_b = (-(-elements(layout) * bits // 8) + GUARD for layout in (a, b))
    size_a, size_b = size_a & -4, size_b & -4
    src, dst = written(codes, a, bits, size_a, 0x3C), np.full(size_b, 0xA5, np.uint8)
    before = src.copy()
    engine.repack(src, a, dst, b, bits=bits, xor=xor)
    np.testing.assert_array_equal(dst, written(codes ^ xor, b, bits, size_b))
    np.testing.assert_array_equal(src, before)


def common(*patterns: Pattern) -> tuple[int, int]:
    """The smallest shape that all patterns divide."""
    k, n = (int(np.lcm.reduce([p.granule(dim) for p in patterns])) for dim in (0, 1))
    return k, n


def test_written_agrees_with_reference() -> None:
    """The oracle of this file is the reference, extended by guards and padding."""
    for pattern in PACKED.values():
        shape = tuple(3 * n for n in common(pattern))
        codes = random_codes(shape, 4)
        layout = pattern.bind(shape)
        if not pattern.pad:
            expected = reference.pack(codes, pattern).reshape(-1)
            found = written(codes, layout, 4, prod(shape) // 2)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("to", PACKED)
@pytest.mark.parametrize("source", PACKED)
def test_every_pair(source: str, to: str) -> None:
    """Shapes of many tiles, of odd counts, and the least: K != N, no axis symmetric."""
    a, b = PACKED[source], PACKED[to]
    k, n = common(a, b)
    for shape in ((k, n), (3 * k, 5 * n), (-(-320 // k) * k, -(-384 // n) * n)):
        check(a.bind(shape), b.bind(shape))


pairs = st.tuples(st.sampled_from(sorted(PACKED)), st.sampled_from(sorted(PACKED)))


@settings(max_examples=100, deadline=None)
@given(pairs, st.integers(1, 12), st.integers(1, 12), st.integers(0, 15), st.integers(0, 9))
def test_shapes(pair: tuple[str, str], rows: int, columns: int, xor: int, seed: int) -> None:
    a, b = (PACKED[name] for name in pair)
    k, n = common(a, b)
    shape = k * min(rows, 1 + 384 // k), n * min(columns, 1 + 512 // n)
    check(a.bind(shape), b.bind(shape), xor=xor, seed=seed)


@settings(max_examples=60, deadline=None)
@given(pairs, st.data())
def test_slices(pair: tuple[str, str], data: st.DataObject) -> None:
    """A part of one matrix goes to a part of another, and nothing else changes."""
    a, b = (PACKED[name] for name in pair)
    granules = common(a, b)
    part = [granule * data.draw(st.integers(1, 3)) for granule in granules]
    sliced = []
    for pattern in (a, b):
        before = [granule * data.draw(st.integers(0, 2)) for granule in granules]
        after = [granule * data.draw(st.integers(0, 2)) for granule in granules]
        sizes = zip(before, part, after, strict=True)
        layout = pattern.bind(tuple(sum(size) for size in sizes))
        for dim in (0, 1):
            layout = layout.slice(dim, before[dim], before[dim] + part[dim])
        sliced.append(layout)
    check(*sliced)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("to", WIDE)
@pytest.mark.parametrize("source", WIDE)
def test_wide_elements(source: str, to: str, bits: int) -> None:
    a, b = WIDE[source], WIDE[to]
    g, n = common(a, b)
    for shape in ((g, n), (3 * g, 5 * n), (32 * g, 2 * n), (7 * g, n)):
        check(a.bind(shape), b.bind(shape), bits=bits)


@pytest.mark.parametrize(
    ("a", "b", "shape"),
    [
        (layouts.amx(20), layouts.COLUMNS, (40, 96)),  # granules that do not divide each other
        (layouts.COLUMNS, layouts.amx(20), (120, 64)),
        (layouts.TRANSPOSED, layouts.PLAIN, (3, 5)),  # rows that begin inside a byte
        (layouts.PLAIN, layouts.TRANSPOSED, (7, 16)),
        (layouts.PLAIN, layouts.PLAIN, (7, 1)),
    ],
)
def test_without_common_digits(a: Pattern, b: Pattern, shape: tuple[int, int]) -> None:
    assert engine._plan(shape, a.bind(shape).axes, b.bind(shape).axes, 4, 0, False) is None
    check(a.bind(shape), b.bind(shape), xor=5)
    for odd in (1, 2, 3):
        check(a.bind(shape)._replace(offset=odd), b.bind(shape)._replace(offset=4 - odd))


LARGE = [
    (name, shape)
    for name in ("MARLIN", "AMX_128", "COLUMNS", "ROWS")
    for shape in ((384, 640), (384, 704), (640, 2880), (384, 648), (1288, 640))
    if not any(n % PACKED[name].granule(dim) for dim, n in enumerate(shape))
]


@pytest.mark.parametrize(("to", "shape"), LARGE)
def test_large_destinations(
    to: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stores that bypass the caches, and shapes that are cut to blocks."""
    monkeypatch.setattr(engine, "_STREAM", 0)
    engine._plan.cache_clear()
    codes = random_codes(shape, 4)
    for a, b in ((layouts.AWQ, PACKED[to]), (PACKED[to], layouts.AWQ)):
        size = elements(b.bind(shape)) // 2 + GUARD
        dst = engine.aligned(size)
        dst[:] = 0xA5
        src = written(codes, a.bind(shape), 4, elements(a.bind(shape)) // 2 + 1)
        engine.repack(src, a.bind(shape), dst, b.bind(shape), xor=8)
        np.testing.assert_array_equal(dst, written(codes ^ 8, b.bind(shape), 4, size))
    engine._plan.cache_clear()


def test_round_trip() -> None:
    shape = 384, 256
    original = reference.pack(random_codes(shape, 4), layouts.AWQ).reshape(-1)
    awq = layouts.AWQ.bind(shape)
    for pattern in PACKED.values():
        there = pattern.bind(shape)
        middle, back = np.zeros(elements(there) // 2 + 1, np.uint8), np.zeros_like(original)
        engine.repack(original, awq, middle, there, xor=3)
        engine.repack(middle, there, back, awq, xor=3)
        np.testing.assert_array_equal(back, original)


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many threads compile the same and other functions at once, each with its own X."""
    monkeypatch.setattr(codegen, "_functions", {})
    names, failures = ["AWQ", "MARLIN", "COLUMNS", "AMX_64", "GEMV_FAST"], []
    start = threading.Barrier(12)

    def work(seed: int) -> None:
        start.wait()
        for i in range(6):
            a, b = PACKED[names[(seed + i) % 5]], PACKED[names[(seed * 2 + i + 1) % 5]]
            try:
                check(a.bind((256, 320)), b.bind((256, 320)), seed=seed)
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_compiled_code_is_kept_and_checked(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[int] = []

    def code() -> bytes:
        made.append(1)
        return b"code" * len(made)

    assert codegen._cached("name", code) == b"code" == codegen._cached("name", code)
    (file,) = (tmp_path / "awqconv").iterdir()
    for damaged in (b"", file.read_bytes()[:-1], b"\xff" + file.read_bytes()[1:]):
        file.write_bytes(damaged)
        before = len(made)
        assert codegen._cached("name", code) == b"code" * (before + 1)
        assert codegen._cached("name", code) == b"code" * (before + 1)
    monkeypatch.setattr(codegen.os, "geteuid", lambda: -1)  # somebody else's
    assert codegen._cached("name", code) == b"code" * 5
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # where no folder can be
    assert codegen._cached("name", code) == b"code" * 6
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(codegen.os.path, "expanduser", lambda path: path)  # of no known user
    monkeypatch.chdir(tmp_path)
    assert codegen._cached("name", code) == b"code" * 7
    assert [path.name for path in tmp_path.iterdir()] == ["awqconv"]


def test_kernels_of_another_process_are_taken(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    a, b = layouts.AWQ.bind((256, 320)), layouts.MARLIN.bind((256, 320))
    times = []
    for _ in range(2):
        monkeypatch.setattr(codegen, "_functions", {})
        check(a, b)
        times.append({f.name: f.stat().st_mtime_ns for f in (tmp_path / "awqconv").iterdir()})
        assert len(times[-1]) == len(codegen._functions) > 0
    assert times[0] == times[1]


LAYOUT = layouts.AWQ.bind((4, 16))
GOOD = {
    "src": np.zeros(32, np.uint8), "a": LAYOUT, "dst": np.zeros(32, np.uint8), "b": LAYOUT,
    "bits": 4, "xor": 0,
}  # fmt: skip
FROZEN = np.zeros(32, np.uint8)
FROZEN.flags.writeable = False


@pytest.mark.parametrize(
    "bad",
    [
        {"src": np.zeros(31, np.uint8)},
        {"dst": np.zeros(31, np.uint8)},
        {"src": np.zeros(32, np.int8)},
        {"dst": np.zeros((4, 8), np.uint8)},
        {"dst": np.zeros(64, np.uint8)[::2]},
        {"dst": GOOD["src"]},
        {"dst": FROZEN},
        {"a": LAYOUT._replace(offset=2)},
        {"b": LAYOUT._replace(offset=-2)},
        {"b": layouts.AWQ.bind((2, 32))},
        {"bits": 5},
        {"bits": 8},
        {"xor": 16},
        {"bits": 8, "xor": 8},
    ],
)
def test_refuses(bad: dict[str, object]) -> None:
    arguments = SimpleNamespace(**(GOOD | bad))
    with pytest.raises(ValueError, match=r"."):
        engine.repack(
            arguments.src, arguments.a, arguments.dst, arguments.b,
            bits=arguments.bits, xor=arguments.xor,
        )  # fmt: skip

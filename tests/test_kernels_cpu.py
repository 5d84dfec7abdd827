"""The CPU kernels against float64 products of weights packed by the reference, within the bound.

Nothing here calls the engine: packed words are the reference's (reshape and transpose), or the
vendors' own.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
from golden_cases import cases

from awqconv.errors import AwqconvError, VerificationError
from awqconv.kernels import KERNELS, bounds, cpu
from awqconv.repack import reference
from awqconv.repack.axes import Pattern
from awqconv.repack.floats import from_float32, to_float32
from awqconv.targets import Linear, Part, Rule, Target, layout, targets

NAMES = [target.name for target in targets()]
SHAPES = [
    (128, 64, 128),
    (256, 192, 64),
    (256, 64, 256),
    (384, 320, 128),
    (384, 576, 32),
    (512, 128, 256),
    (192, 96, 48),
    (288, 160, 96),
    (144, 96, 16),
    (640, 64, 640),
    (1664, 64, 1664),
    (72, 40, 24),
    (40, 8, 8),
    (44, 24, 4),
    (56, 1032, 56),
]


class Odd(Target):
    """Bytes of two nibbles where K is no multiple of 8: an element's word is its own."""

    name = "odd"
    title = "rows of bytes along K"
    rules = (Rule("K % 2 == 0", "none"),)

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        return (
            Part("q", "q", Pattern("(kw e) n -> n kw (e)", e=2), "U8", xor=5),
            Part("z", "z", Pattern("g n -> n g"), "I8", sign=-1, offset=3),
            Part("s", "s", Pattern("g n -> n g"), "F32"),
        )


ODD = Odd()
EVERY = [layout(name) for name in (*NAMES, "bf16")] + [ODD]


class Case:
    """A random layer, its float64 weight, and its tensors as the reference packs them."""

    def __init__(self, target: Target, linear: Linear, seed: int = 0) -> None:
        self.target, self.linear = target, linear
        random = np.random.default_rng([seed, linear.K, linear.N, linear.g])
        self.q = random.integers(0, 16, linear.shape("q"), np.uint8)
        self.z = random.integers(0, 16, linear.shape("z"), np.uint8)
        self.raw = from_float32(
            random.uniform(1e-3, 1e-2, linear.shape("s")).astype(np.float32), linear.scales
        )
        self.s = to_float32(self.raw, linear.scales)
        difference = self.q.astype(np.int64) - np.repeat(self.z, linear.g, 0)
        self.w = difference * np.repeat(self.s.astype(np.float64), linear.g, 0)
        self.packed = self._pack_all()
        self.bias = None
        if linear.bias:
            bias = from_float32(random.standard_normal(linear.N).astype(np.float32), linear.bias)
            self.bias = to_float32(bias, linear.bias)
            self.packed["bias"] = from_float32(self.bias, target.bias(linear) or "")
        self.x = random.standard_normal((5, linear.K)).astype(np.float32)

    def window(self, k: slice, n: slice) -> dict[str, np.ndarray]:
        """The tensors of some rows, whole groups, and columns, as the reference packs them."""
        g = self.linear.g
        some, groups = copy(self), (slice(k.start // g, -(-k.stop // g)), n)
        some.q, some.w, some.z, some.s = self.q[k, n], self.w[k, n], self.z[groups], self.s[groups]
        shape = {"K": k.stop - k.start, "N": n.stop - n.start, "g": min(g, k.stop - k.start)}
        some.linear = replace(self.linear, **shape)
        return some._pack_all()

    def _pack_all(self) -> dict[str, np.ndarray]:
        difference = self.q.astype(np.int64) - np.repeat(self.z, self.linear.g, 0)
        parts = self.target.parts(self.linear)
        return {part.suffix: self._pack(part, difference) for part in parts}

    def _pack(self, part: Part, difference: np.ndarray) -> np.ndarray:
        if part.coded:
            packed = reference.pack((self.q if part.of == "q" else self.z) ^ part.xor, part.pattern)
            if not part.pattern.pad:
                return packed
            block = part.pattern.granule(0)
            sums = difference.reshape(-1, block, self.linear.N).sum(1).astype("<i4")
            sums = sums.reshape(len(sums), -1, 32).transpose(1, 0, 2)
            bytes_ = np.ascontiguousarray(sums).view(np.uint8)
            return np.concatenate((packed.reshape(*bytes_.shape[:2], -1), bytes_), -1)
        numbers = {"z": part.offset + part.sign * self.z.astype(np.float32), "s": self.s}
        numbers["w"] = self.w.astype(np.float32)
        stored = reference.arrange(numbers[part.of], part.pattern)
        return from_float32(np.ascontiguousarray(stored, np.float32), part.dtype)

    def judge(self, y: np.ndarray, x: np.ndarray | None = None) -> bounds.Verdict:
        x = self.x if x is None else x
        with np.errstate(invalid="ignore"):
            exact = x.astype(np.float64) @ self.w + (0 if self.bias is None else self.bias)
        return bounds.judge(y, exact, x, self.w, self.target, self.linear, bias=self.bias)


def each(target: Target) -> list[Case]:
    """Every shape that the target's kernels take, with fp16 and bf16 scales."""
    linears = [layer(target, *shape, scales=dtype) for shape in SHAPES for dtype in ("F16", "BF16")]
    taken = [linear for linear in linears if target.broken(linear) is None]
    assert len(taken) >= 8
    return [Case(target, linear) for linear in taken]


def layer(target: Target, *shape: int, **more: str) -> Linear:
    """A dense layer, or an expert where the target takes no dense one."""
    dense = Linear(*shape, **more)
    expert = replace(dense, kind="expert")
    return expert if target.broken(dense) and not target.broken(expert) else dense


@pytest.mark.parametrize("target", EVERY, ids=repr)
def test_products_are_within_their_bound(target):
    for case in each(target):
        for product in (cpu.gemm, cpu.sample):
            verdict = case.judge(product(case.x, case.packed, target, case.linear))
            assert not verdict.beyond, (product, case.linear, verdict)
            assert verdict.error <= verdict.bound


@pytest.mark.parametrize("target", EVERY, ids=repr)
def test_products_of_whole_activations_are_as_exact_in_eight_bits(target):
    for case in each(target):
        x = bounds.activations(3, case.linear.K, np.random.default_rng(1))
        verdict = case.judge(cpu.gemm(x, case.packed, target, case.linear), x)
        assert not verdict.beyond, (case.linear, verdict)
        assert verdict.bound < (0.2 if target.name == "bf16" else 1e-4)


@pytest.mark.parametrize("target", EVERY, ids=repr)
def test_codes_and_weight_are_exact(target):
    for case in each(target):
        w = cpu.dequantize(case.packed, target, case.linear)
        if target.name == "bf16":
            assert (np.abs(w - case.w) <= 2.0**-8 * np.abs(case.w)).all()
            continue
        assert w.dtype == np.float32
        assert (w == case.w).all()
        for got, expected in zip(
            cpu.codes(case.packed, target, case.linear), (case.q, case.z, case.s), strict=True
        ):
            assert got.dtype == expected.dtype
            assert (got == expected).all()


@pytest.mark.parametrize("target", EVERY, ids=repr)
def test_sampled_columns_are_those_of_the_whole(target):
    for case in each(target)[::3]:
        N = case.linear.N
        for columns in (np.array([N - 1, 0, 3, 3]), np.arange(N)[::-1], np.arange(N // 2)):
            whole = cpu.gemm(case.x, case.packed, target, case.linear)[:, columns]
            some = cpu.gemm(case.x, case.packed, target, case.linear, columns)
            # BLAS may sum in another order for another shape; the packed loops never do.
            assert (
                np.allclose(some, whole, 1e-4, 1e-4)
                if target.name == "bf16"
                else (some == whole).all()
            )
            w = cpu.dequantize(case.packed, target, case.linear, columns)
            assert (w == cpu.dequantize(case.packed, target, case.linear)[:, columns]).all()


@pytest.mark.parametrize("target", EVERY, ids=repr)
def test_bias_is_added(target):
    linear = layer(target, 256, 192, 64, bias="F16")
    case = Case(target, linear)
    assert not case.judge(cpu.gemm(case.x, case.packed, target, linear)).beyond
    without = cpu.gemm(case.x, case.packed, target, replace(linear, bias=None))
    assert case.judge(without).beyond


@pytest.mark.parametrize("target", EVERY, ids=repr)
def test_rows_and_threads_do_not_change_a_product(target):
    linear = layer(target, 256, 1600, 64)
    case = Case(target, linear)
    weight = cpu.Weight(case.packed, target, linear)
    x = np.random.default_rng(2).standard_normal((9, 256)).astype(np.float32)
    y = weight.gemm(x)
    assert not case.judge(y, x).beyond
    assert (weight.gemm(x, threads=64) == y).all()
    with ThreadPoolExecutor(8) as pool:
        assert all((got == y).all() for got in pool.map(weight.gemm, [x] * 16))
    assert weight.gemm(x[:0]).shape == (0, 1600)
    if target.name != "bf16":
        assert (weight.gemm(x[4:5]) == y[4:5]).all()


@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_bit_is_beyond_the_bound(name):
    """Of a code, a coded zero point, or a compensation: the bound is narrower than one bit."""
    target = layout(name)
    linear = layer(target, 1024, 64, 128)
    case = Case(target, linear)
    x = bounds.activations(4, linear.K, np.random.default_rng(3))
    random = np.random.default_rng(4)
    for part in target.parts(linear):
        for _ in range(24 if part.of != "s" else 0):
            if part.of == "z" and part.dtype in ("F16", "BF16"):
                break  # the last bits of a float zero point are less than the bound
            packed = {k: np.ascontiguousarray(v).copy() for k, v in case.packed.items()}
            flat = packed[part.suffix].view(np.uint8).reshape(-1)
            at = random.integers(len(flat))
            flat[at] ^= 1 << random.integers(8)
            for product in (cpu.gemm, cpu.sample):
                assert case.judge(product(x, packed, target, linear), x).beyond, (part, at)


@pytest.mark.parametrize("target", EVERY, ids=repr)
def test_one_flipped_bit_changes_what_is_read(target):
    linear = layer(target, 256, 64, 64)
    case = Case(target, linear)
    random = np.random.default_rng(5)
    x = np.eye(256, dtype=np.float32)

    def read(packed):
        weight = cpu.Weight(packed, target, linear)
        arrays = [weight.w] if target.name == "bf16" else [weight.s, weight.z]
        # A flipped sign of a zero is a change too.
        return b"".join(array.tobytes() for array in (weight.gemm(x), *arrays))

    before = read(case.packed)
    for part in target.parts(linear):
        for _ in range(16):
            packed = {k: np.ascontiguousarray(v).copy() for k, v in case.packed.items()}
            flat = packed[part.suffix].view(np.uint8).reshape(-1)
            zero = part.of == "z" and not part.coded and part.dtype != "I8"
            # The last bits of a float zero point near 0 vanish in 8 - z; its upper byte does not.
            at = random.integers(len(flat)) | int(zero)
            flat[at] ^= 4 << random.integers(5 if zero else 6)
            assert read(packed) != before, (part, at)


@pytest.mark.parametrize("target", EVERY, ids=repr)
def test_any_contiguous_bytes_are_taken(target):
    linear = layer(target, 256, 64, 64)
    case = Case(target, linear)
    y = cpu.gemm(case.x, case.packed, target, linear)
    for shift in (0, 1):
        packed = {}
        for suffix, array in case.packed.items():
            room = np.zeros(array.nbytes + shift, np.uint8)
            room[shift:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
            packed[suffix] = room[shift:]
            packed[suffix].flags.writeable = False
        assert (cpu.gemm(case.x, packed, target, linear) == y).all()


def test_nan_and_infinite_scales_pass_only_where_the_exact_value_has_them():
    linear = Linear(256, 64, 64)
    case = Case(layout("marlin"), linear)
    clean = cpu.gemm(case.x, case.packed, case.target, linear)
    assert not case.judge(clean).beyond
    for value in (np.nan, np.inf):
        wrong = clean.copy()
        wrong[2, 7] = value
        assert "row 2, column 7" in case.judge(wrong).beyond
        broken = Case(layout("marlin"), linear)
        broken.s[1, 7] = value
        with np.errstate(invalid="ignore"):
            broken.w[64:128, 7] *= value
        part = broken.target.parts(linear)[2]
        broken.packed["scales"] = broken._pack(part, broken.q)
        y = cpu.gemm(broken.x, broken.packed, broken.target, linear)
        assert np.isfinite(np.delete(y, 7, 1)).all()
        verdict = broken.judge(y)
        assert not verdict.beyond
        assert verdict.error <= verdict.bound < 1e-4
        assert "column 7" in broken.judge(clean).beyond


def test_the_verdict_says_which_element_and_how_far():
    linear = Linear(256, 64, 64)
    case = Case(layout("awq"), linear)
    y = cpu.gemm(case.x, case.packed, case.target, linear)
    y[3, 9] += 0.5
    y[1, 2] += 0.25
    verdict = case.judge(y)
    assert verdict.worst == pytest.approx(0.5, abs=1e-3)
    assert verdict.beyond.startswith("row 3, column 9 is ")
    assert "(2 of 320 are beyond)" in verdict.beyond
    assert verdict.error > verdict.bound


def test_a_lossy_cast_of_scales_is_allowed_for():
    source, stored = Linear(256, 64, 64), Linear(256, 64, 64, scales="BF16")
    case = Case(layout("awq"), source)
    packed = dict(case.packed, scales=from_float32(case.s, "BF16"))
    y = cpu.gemm(case.x, packed, case.target, stored)
    assert case.judge(y).beyond
    exact = case.x.astype(np.float64) @ case.w
    cast = bounds.cpu(case.target, stored, scales="F16")
    args = (y, exact, case.x, case.w, case.target, stored)
    assert not bounds.judge(*args, arithmetic=cast).beyond


def test_a_bound_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no error bound"):
        _ = bounds.Arithmetic(2**24).gamma
    assert bounds.Arithmetic(7).gamma == pytest.approx(8 * 2.0**-24)


def test_sums_are_shorter_than_k():
    for name, most in (("awq", 56), ("marlin", 56), ("amx", 35)):
        assert cpu.roundings(layout(name), Linear(4096, 64, 128)) <= most


@pytest.mark.parametrize("case", ["amx_K128_N128_g64", "amx_K256_N192_g128"])
def test_amx_product_is_the_engines(case):
    """int4_scaled_mm_cpu on a Xeon: every bf16 element of y is the same."""
    golden, linear = cases("gemm")[case], _linear(case)
    target, source = layout("amx"), layout("awq")
    x = golden["in/x"].array.view(np.float16).reshape(-1, linear.K).astype(np.float32)
    x = to_float32(from_float32(x, "BF16"), "BF16")
    y = cpu.gemm(x, _part(golden, "out"), target, linear)
    engine = golden["out/y"].array.view(np.uint16).reshape(y.shape)
    assert (from_float32(y, "BF16") == engine).all()
    w = cpu.dequantize(_part(golden, "in"), source, linear).astype(np.float64)
    rounded = replace(bounds.cpu(target, linear), output=("BF16",))
    args = (to_float32(engine, "BF16"), x.astype(np.float64) @ w, x, w, target, linear)
    assert not bounds.judge(*args, arithmetic=rounded).beyond


@pytest.mark.parametrize("case", ["marlin_K256_N192_g128", "marlin_K256_N128_gch"])
def test_marlin_product_is_the_engines_within_its_bound(case):
    """The CUDA kernel on an H200, weights and y in fp16; ours reads the words that it read."""
    golden, linear = cases("gemm")[case], _linear(case)
    target, source = layout("marlin"), layout("awq")
    x = golden["in/x"].array.view(np.float16).reshape(-1, linear.K).astype(np.float32)
    w = cpu.dequantize(_part(golden, "in"), source, linear).astype(np.float64)
    assert (cpu.dequantize(_part(golden, "out"), target, linear) == w).all()
    exact = x.astype(np.float64) @ w
    y = cpu.gemm(x, _part(golden, "out"), target, linear)
    assert not bounds.judge(y, exact, x, w, target, linear).beyond
    engine = golden["out/y"].array.view(np.float16).reshape(y.shape)
    args = (engine.astype(np.float32), exact, x, w, target, linear)
    verdict = bounds.judge(*args, arithmetic=bounds.gpu(target, linear, "F16"))
    assert not verdict.beyond
    assert verdict.bound < 0.01


def _linear(case: str) -> Linear:
    K, N, g = (text[1:] for text in case.split("_")[1:])
    return Linear(int(K), int(N), int(K) if g == "ch" else int(g))


def _part(golden, section: str) -> dict[str, np.ndarray]:
    return {name: golden[f"{section}/{name}"].array for name in ("qweight", "qzeros", "scales")}


def test_a_missing_tensor_and_a_wrong_size_are_named():
    linear = Linear(256, 64, 64)
    case = Case(layout("awq"), linear)
    packed = dict(case.packed)
    packed["scales"] = packed["scales"][:-1]
    with pytest.raises(AwqconvError, match=r"scales: it has 384 bytes, and the layout 512"):
        cpu.gemm(case.x, packed, case.target, linear)
    del packed["qzeros"]
    with pytest.raises(AwqconvError, match="qzeros: the tensor is missing"):
        cpu.gemm(case.x, packed, case.target, linear)
    with pytest.raises(ValueError, match="K = 256"):
        cpu.gemm(case.x[:, 1:], case.packed, case.target, linear)


@pytest.mark.parametrize(
    ("name", "value"), [("xpu", 16), ("xpu", -1), ("npu", 0.5), ("npu", np.nan)]
)
def test_a_zero_point_that_is_none_is_refused(name, value):
    linear = Linear(256, 64, 64)
    case = Case(layout(name), linear)
    case.packed["qzeros"][2, 5] = value
    with pytest.raises(VerificationError, match="group 2, column 5"):
        cpu.codes(case.packed, case.target, linear)


def test_padding_that_is_no_compensation_is_refused():
    class Padded(Odd):
        def parts(self, linear):
            q = Pattern("(kw e) (nb ni) -> nb kw ni (e)", pad=16, e=2, ni=32)
            return (Part("q", "q", q, "U8"), *super().parts(linear)[1:])

    target, linear = Padded(), Linear(64, 64, 64)
    packed = {p.suffix: np.zeros(p.nbytes(linear), np.uint8) for p in target.parts(linear)}
    with pytest.raises(ValueError, match="not padded by one int32"):
        cpu.gemm(np.ones((1, 64), np.float32), packed, target, linear)


def test_loops_compile_where_no_cache_can_be_written(monkeypatch):
    from awqconv.kernels import loops

    real, asked = loops.numba.njit, []

    def njit(*args, cache, **options):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(*args, cache=cache, **options)

    monkeypatch.setattr(loops.numba, "njit", njit)
    fill = loops._compile(loops.float32[::1])(_fill)
    out = np.zeros(3, np.float32)
    fill(out)
    assert out.tolist() == [2, 2, 2]
    assert asked == [True, False]


def _fill(out):
    for i in range(len(out)):
        out[i] = 2


def test_importing_the_kernels_imports_nothing_heavy():
    code = "import awqconv.kernels.cpu, awqconv.kernels.bounds, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numba", "torch", "triton"} & set(done.stdout.split())
    assert set(KERNELS) == {"cpu", "cuda"}

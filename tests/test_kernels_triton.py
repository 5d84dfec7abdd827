"""The Triton kernels against float64, every layout, under the interpreter where there is no GPU."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from awqconv.errors import AwqconvError
from awqconv.kernels.triton import dequantize, gemm, grouped_gemm
from awqconv.kernels.triton.address import codes, order
from awqconv.repack import layouts
from awqconv.repack.axes import Pattern
from awqconv.repack.floats import from_float32
from awqconv.repack.reference import arrange, pack
from awqconv.targets import Linear, Part, Target, layout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I8": torch.int8}
WORDS = {"I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}


class Table(Target):
    """A layout that is no target of its own: a table of parts is all that a kernel needs."""

    def __init__(self, name: str, q: Part, z: Part, scales: Pattern) -> None:
        self.name, self.q, self.z, self.scales = name, q, z, scales

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        return self.q, self.z, Part("scales", "s", self.scales, linear.scales)


ROWS = Part("qzeros", "z", layouts.ROWS, "I32")
TARGETS = {
    name: layout(name) for name in ("awq", "marlin", "npu", "amx", "xpu", "compressed-tensors")
}
TARGETS["gptq"] = Table("gptq", Part("qweight", "q", layouts.GPTQ, "I32"), ROWS, layouts.PLAIN)
TARGETS["moe_wna16"] = Table(
    "moe_wna16",
    Part("qweight", "q", layouts.WNA16, "U8"),
    Part("qzeros", "z", layouts.WNA16_ZEROS, "U8"),
    layouts.TRANSPOSED,
)
TARGETS["vllm_cpu"] = Table(
    "vllm_cpu", Part("qweight", "q", layouts.VLLM_CPU, "I32"), ROWS, layouts.PLAIN
)
TARGETS["gemv_fast"] = Table(
    "gemv_fast", Part("qweight", "q", layouts.GEMV_FAST, "I16"), ROWS, layouts.PLAIN
)


def number(raw: np.ndarray, dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(raw))
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor.to(TORCH[dtype])


def module(
    target: Target, linear: Linear, seed: int = 0
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random packed tensors of one module, written by the reference, and its w float64 [K, N]."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16, (linear.K, linear.N), dtype=np.uint8)
    z = rng.integers(0, 16, (linear.G, linear.N), dtype=np.uint8)
    s = rng.uniform(0.005, 0.02, (linear.G, linear.N)).astype(np.float32)
    s = number(from_float32(s, linear.scales), linear.scales).float().numpy()
    packed = {}
    for part in target.parts(linear):
        if part.coded:
            raw = pack((q if part.of == "q" else z) ^ part.xor, part.pattern)
            if part.pattern.pad:  # other data between the blocks, which kernels must step over
                raw = raw.reshape(*part.shape(linear)[:2], -1)
                raw = raw[..., : part.shape(linear)[-1]] if raw.shape[2] else raw
                blocks = np.full(part.shape(linear), 0xA5, np.uint8)
                blocks[..., : raw.shape[2]] = raw
                raw = blocks
            packed[part.suffix] = torch.from_numpy(raw.copy()).view(WORDS[part.dtype])
            packed[part.suffix] = packed[part.suffix].reshape(part.shape(linear)).to(DEVICE)
        else:
            values = arrange(
                s if part.of == "s" else part.offset + part.sign * z.astype(np.float32),
                part.pattern,
            )
            raw = from_float32(values, part.dtype) if part.dtype != "I8" else values.astype(np.int8)
            packed[part.suffix] = number(raw, part.dtype).to(DEVICE)
    w = (q - np.repeat(z, linear.g, 0).astype(np.float64)) * np.repeat(s, linear.g, 0)
    return packed, torch.from_numpy(w)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double().cpu() - want).norm() / want.norm())


SHAPES = [
    (256, 192, 128),
    (384, 64, 96),
    (96, 64, 48),
    (512, 64, 256),
    (256, 64, 256),
    (128, 64, 32),
]


def fits(target: Target, linear: Linear) -> bool:
    granules = [part.pattern.granule(d) for part in target.parts(linear)[:1] for d in (0, 1)]
    return linear.K % granules[0] == 0 and linear.N % granules[1] == 0


@pytest.mark.parametrize("name", TARGETS)
def test_words_and_nibbles_hold_every_code(name: str) -> None:
    linear = Linear(384, 128, 128)
    part = TARGETS[name].parts(linear)[0]
    own, bound = codes(part, linear), part.layout(linear)
    for dim, side in enumerate((own.k, own.n)):
        offsets, seen = bound.offsets(dim), set()
        for row in range(side.words):
            for shift, offset in zip(side.shift, side.offset, strict=True):
                index = side.index(row) + offset
                assert offsets[index] == side.word(row) * 8 + shift // 4
                seen.add(index)
        assert seen == set(range(linear.shape("q")[dim]))


@pytest.mark.parametrize("scales", ["F16", "BF16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_dequantize_rounds_once(name: str, shape: tuple[int, int, int], scales: str) -> None:
    linear = Linear(*shape, scales=scales)
    if not fits(TARGETS[name], linear) or (scales == "BF16" and shape != SHAPES[0]):
        pytest.skip("the layout does not hold the shape")
    packed, w = module(TARGETS[name], linear)
    got = dequantize(packed, TARGETS[name], linear, TORCH[scales]).cpu()
    if INTERPRETED and scales == "BF16":  # whose casts to bfloat16 truncate
        assert ((got.double() - w).abs() <= w.abs() * 2.0**-7).all()
    else:
        assert torch.equal(got, w.float().to(TORCH[scales]))


CASES = [(1, shape, "F16") for shape in SHAPES] + [
    (19, SHAPES[0], "F16"),
    (19, SHAPES[5], "F16"),
    (3, SHAPES[0], "F16"),
    (19, SHAPES[0], "BF16"),
    (27, (192, 64, 64), "F16"),  # groups of 64 where a program takes a byte of each word
    (19, (256, 704, 128), "F16"),  # of 88 words of eight codes: a tile and a part of one
    (70, (512, 256, 128), "F16"),
    (5, SHAPES[0], "BF16"),
    (5, SHAPES[2], "BF16"),
]


@pytest.mark.parametrize(("M", "shape", "scales"), CASES, ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_gemm_against_float64(name: str, M: int, shape: tuple[int, int, int], scales: str) -> None:
    linear = Linear(*shape, scales=scales)
    if not fits(TARGETS[name], linear):
        pytest.skip("the layout does not hold the shape")
    packed, w = module(TARGETS[name], linear)
    x = torch.randn(M, linear.K, generator=torch.Generator().manual_seed(M)).to(
        TORCH[linear.scales]
    )
    bias = torch.linspace(-1, 1, linear.N).to(x.dtype)
    y = gemm(x.to(DEVICE), packed, TARGETS[name], linear, bias.to(DEVICE))
    assert y.shape == (M, linear.N)
    assert y.dtype == x.dtype
    # One rounding of y, and where the scale is put on the weights one of each weight.
    unit = 2.0**-11 if x.dtype == torch.float16 else 2.0 ** (-7 if INTERPRETED else -8)
    assert relative(y, x.double() @ w + bias.double()) < 1.2 * unit


@pytest.mark.parametrize("offsets", [(0, 5, 5, 22, 23), (0, 70, 70, 139, 140)], ids=str)
@pytest.mark.parametrize("name", ["awq", "marlin", "npu", "amx", "moe_wna16", "compressed-tensors"])
def test_grouped_gemm(name: str, offsets: tuple[int, ...]) -> None:
    linear = Linear(128, 64, 64, kind="expert")
    experts = [module(TARGETS[name], linear, seed) for seed in range(4)]
    packed = {key: torch.stack([tensors[key] for tensors, _ in experts]) for key in experts[0][0]}
    starts = torch.tensor(offsets)
    x = torch.randn(int(starts[-1]), linear.K, generator=torch.Generator().manual_seed(1)).half()
    y = grouped_gemm(x.to(DEVICE), packed, TARGETS[name], linear, starts.to(DEVICE))
    want = torch.cat(
        [
            x[a:b].double() @ w
            for (a, b), (_, w) in zip(starts.unfold(0, 2, 1), experts, strict=True)
        ]
    )
    assert relative(y, want) < 2.0**-11


@pytest.mark.parametrize(("name", "M", "g"), [("marlin", 200, 32), ("npu", 33, 64)])
def test_many_rows_go_through_dequantization(name: str, M: int, g: int) -> None:
    linear = Linear(128, 64, g)
    packed, w = module(TARGETS[name], linear)
    x = torch.randn(M, 128).half().to(DEVICE)
    y = gemm(x, packed, TARGETS[name], linear)
    assert relative(y, x.cpu().double() @ w) < 2.0**-10
    assert torch.equal(y, x @ dequantize(packed, TARGETS[name], linear, x.dtype))


def test_the_plain_fallback_layout() -> None:
    linear, weight = Linear(64, 32, 32), torch.randn(32, 64).bfloat16()
    x = torch.randn(3, 64).bfloat16()
    packed = {"weight": weight.to(DEVICE)}
    y = gemm(x.to(DEVICE), packed, layout("bf16"), linear)
    assert relative(y, x.double() @ weight.double().T) < 2.0**-8
    assert torch.equal(dequantize(packed, layout("bf16"), linear, torch.bfloat16).cpu(), weight.T)


def test_shapes_are_checked() -> None:
    linear = Linear(128, 64, 32)
    packed, _ = module(TARGETS["marlin"], linear)
    with pytest.raises(AwqconvError, match=r"qweight has shape \(8, 128\), not \(16, 128\)"):
        gemm(torch.randn(1, 256).half().to(DEVICE), packed, TARGETS["marlin"], Linear(256, 64, 32))
    with pytest.raises(AwqconvError, match=r"x is torch\.float32"):
        gemm(torch.randn(1, 128).to(DEVICE), packed, TARGETS["marlin"], linear)


def test_words_must_divide() -> None:
    linear = Linear(12, 64, 12)
    with pytest.raises(AwqconvError, match="straddles 32-bit words"):
        codes(TARGETS["moe_wna16"].parts(linear)[0], linear)


@pytest.mark.parametrize(("BN", "BK"), [(16, 32), (32, 16), (64, 32)])
@pytest.mark.parametrize("name", [name for name in TARGETS if name != "gemv_fast"])
def test_order_of_addresses(name: str, BN: int, BK: int) -> None:
    """A tile loaded word after word and permuted has each word where its row and column say."""
    linear = Linear(512, 512, 128)
    own = codes(TARGETS[name].parts(linear)[0], linear)
    found = order(own, BN, BK, deep=True)
    if found is None:
        pytest.skip("more than eight runs of bits")
    t, strides = np.arange(BN * BK), (1, own.n.word.stride, own.k.word.stride)
    digits = [found.digits[i : i + 4] for i in range(0, len(found.digits), 4)]
    at = sum(t // d % size * step * strides[axis] for d, size, axis, step in digits)
    assert (np.diff(at) > 0).all()  # in order
    tile = np.asarray(at).reshape(found.shape).transpose(found.axes).reshape(BN, BK)
    for sides, bits, rows in ((own.n, found.n_bits, BN), (own.k, found.k_bits, BK)):
        assert sorted(bits) == list(range(rows.bit_length() - 1)), sides
    rows, columns = (
        [sum((r >> i & 1) << bit for i, bit in enumerate(bits)) for r in range(count)]
        for bits, count in ((found.n_bits, BN), (found.k_bits, BK))
    )
    want = [[own.n.word(n) + own.k.word(k) for k in columns] for n in rows]
    np.testing.assert_array_equal(tile, want)

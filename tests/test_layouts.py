"""Every entry of the catalogue against bytes of the code it names, and the laws of patterns."""

import numpy as np
import pytest
from golden_cases import awq_inputs, cases
from hypothesis import given
from hypothesis import strategies as st

from awqconv.errors import AwqconvError
from awqconv.repack import layouts, reference
from awqconv.repack.axes import Axis, Layout, Pattern

PACKED = {
    name: pattern
    for name, pattern in {
        **{n: p for n, p in vars(layouts).items() if isinstance(p, Pattern)},
        "amx(32)": layouts.amx(32),
        "amx(48)": layouts.amx(48),
        "amx(128)": layouts.amx(128),
    }.items()
    if len(pattern.right) > 2 or name in ("AWQ",)
}
PLAIN = ("MARLIN_SCALES", "MARLIN_SCALES_SINGLE", "AMX_COLUMNS", "TRANSPOSED", "PLAIN")


def codes(case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    given_ = awq_inputs(case)
    K, words = given_["qweight"].shape
    q = reference.unpack(given_["qweight"].array, layouts.AWQ, (K, 8 * words))
    G = given_["qzeros"].shape[0]
    z = reference.unpack(given_["qzeros"].array, layouts.AWQ, (G, 8 * words))
    s = given_["scales"].array.view("<f2").reshape(G, 8 * words)
    return q, z, s


def dense(file: str) -> list[str]:
    return [case for case in cases(file) if case.startswith("K")]


# file, tensor, array, pattern, xor
ENTRIES = [
    ("marlin_awq", "out/qweight", "q", layouts.MARLIN, 0),
    ("marlin_awq", "out/qzeros", "z", layouts.MARLIN_ZEROS, 0),
    ("ascend_awq", "out/weight", "q", layouts.ROWS, 8),
    ("xpu_int4pack", "out/qweight", "q", layouts.COLUMNS, 0),
    ("vllm_cpu_wna16", "out/qweight", "q", layouts.VLLM_CPU, 0),
    ("vllm_cpu_wna16", "out/qzeros", "z", layouts.ROWS, 0),
    ("compressed_tensors_pack", "out/weight_packed", "q", layouts.COLUMNS, 0),
    ("compressed_tensors_pack", "out/weight_zero_point", "z", layouts.CT_ZEROS, 0),
    ("gptq_exllama", "out_v2/qweight", "q", layouts.GPTQ, 0),
    ("gptq_exllama", "out_v2/qzeros", "z", layouts.ROWS, 0),
    ("gemv_fast_llmawq_v2", "out/qweight", "q", layouts.GEMV_FAST, 0),
    ("autoawq_gemv", "out/qweight", "q", layouts.COLUMNS, 0),
]


@pytest.mark.parametrize(("file", "tensor", "of", "pattern", "xor"), ENTRIES)
def test_packed_words_are_the_vendors(file, tensor, of, pattern, xor):
    checked = 0
    for case in dense(file):
        raw = cases(file)[case].get(tensor)
        if raw is None or raw.dtype == "BF16":  # the bf16 fallback of Ascend
            continue
        array = codes(case)["qz".index(of)]
        assert reference.pack(array ^ xor, pattern).tobytes() == raw.data, case
        assert np.array_equal(reference.unpack(raw.array, pattern, array.shape) ^ xor, array)
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize("case", dense("amx_sgl_int4"))
def test_amx_blocks_are_the_vendors(case):
    q = codes(case)[0]
    raw = cases("amx_sgl_int4")[case]["out/qweight"]
    block = (raw.shape[-1] - 128) // 16
    blocks = raw.array.reshape(raw.shape)[..., :-128]
    assert reference.pack(q, layouts.amx(block)).tobytes() == blocks.tobytes()


@pytest.mark.parametrize("case", dense("marlin_awq"))
def test_marlin_scales_are_the_vendors(case):
    s = codes(case)[2]
    pattern = layouts.MARLIN_SCALES if len(s) > 1 else layouts.MARLIN_SCALES_SINGLE
    other = layouts.MARLIN_SCALES_SINGLE if len(s) > 1 else layouts.MARLIN_SCALES
    golden = cases("marlin_awq")[case]["out/scales"].data
    assert reference.arrange(s, pattern).tobytes() == golden
    assert reference.arrange(s, other).tobytes() != golden


@st.composite
def shaped(draw, names=tuple(PACKED)):
    """A pattern and a shape it takes, the open axes of any size."""
    name = draw(st.sampled_from(sorted(names)))
    pattern = PACKED.get(name) or getattr(layouts, name)
    shape = tuple(pattern.granule(d) * draw(st.integers(1, 5)) for d in range(2))
    return pattern, shape


@given(shaped(names=(*PACKED, *PLAIN)))
def test_arrange_and_restore_are_inverse_and_offsets_say_where(case):
    pattern, shape = case
    distinct = np.arange(shape[0] * shape[1]).reshape(shape)
    stored = reference.arrange(distinct, pattern)
    assert np.array_equal(reference.restore(stored, pattern, shape), distinct)
    layout = Pattern(pattern.text, **pattern.sizes).bind(shape)
    where = layout.offsets(0)[:, None] + layout.offsets(1)
    assert np.array_equal(stored.reshape(-1)[where], distinct)


@given(shaped(), st.data())
def test_a_slice_at_the_granule_is_a_layout_of_its_own(case, data):
    pattern, shape = case
    layout = pattern.bind(shape)
    dim = data.draw(st.integers(0, 1))
    grain = max(axis.logical for axis in layout.axes if axis.dim == dim)
    start = data.draw(st.integers(0, shape[dim] // grain - 1)) * grain
    stop = data.draw(st.integers(start // grain + 1, shape[dim] // grain)) * grain
    part = layout.slice(dim, start, stop)
    whole = layout.offsets(dim)[start:stop] + layout.offset
    assert np.array_equal(part.offsets(dim) + part.offset, whole)
    assert np.array_equal(part.offsets(1 - dim), layout.offsets(1 - dim))


def test_layouts_that_are_equal_are_sliced_alike():
    one, other = (
        Layout(bound.shape, bound.stored, tuple(Axis(*axis) for axis in bound.axes))
        for bound in [layouts.MARLIN.bind((128, 192))] * 2
    )
    assert one.slice(1, 64, 128) == other.slice(1, 64, 128) != one


def test_a_slice_off_the_granule_is_refused():
    with pytest.raises(ValueError, match=r"8\.\.32 is no slice"):
        layouts.MARLIN.bind((16, 64)).slice(0, 8, 32)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("k n -> k m", {}),
        ("k (a b) -> k a b", {}),
        ("k n", {}),
        ("k k -> k k", {}),
        ("k n -> n k", {"m": 2}),
    ],
)
def test_a_text_that_is_no_pattern_is_refused(text, sizes):
    with pytest.raises(ValueError, match=r"axes|sizes"):
        Pattern(text, **sizes)


def test_a_shape_that_does_not_divide_is_refused_with_its_numbers():
    with pytest.raises(AwqconvError, match=r"96 does not split as .* granule 64"):
        layouts.MARLIN.bind((128, 96))

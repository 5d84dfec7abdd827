"""Float weights in an engine's own order: its packer's bytes, blocks by chunks, and read back."""

import numpy as np
import pytest
from golden_cases import cases
from hypothesis import given
from hypothesis import strategies as st

from awqconv.checkpoint.header import TensorInfo
from awqconv.checkpoint.views import Views
from awqconv.forms.sglang import packed_float
from awqconv.jobs import unplaced
from awqconv.repack import layouts
from awqconv.repack.blocks import Blocks
from awqconv.repack.floats import RAW

FLOATS = cases("amx_float_weights")


class Memory:
    """A source of one file."""

    name, in_order = "memory", False

    def __init__(self, data: bytes) -> None:
        self.data = data

    def files(self) -> dict[str, int]:
        return {"file": len(self.data)}

    def read(self, file: str, start: int, stop: int) -> bytes:
        return self.data[start:stop]

    def readinto(self, file: str, start: int, buffer: memoryview) -> None:
        buffer[:] = self.data[start : start + len(buffer)]

    def fingerprint(self, file: str) -> tuple[int, ...]:
        return ()

    def close(self) -> None:
        pass


def stored(blocks: Blocks, data: bytes, step: int) -> bytes:
    array = np.frombuffer(data, np.uint8)
    chunks = (array[i : i + step] for i in range(0, len(array), step))
    return b"".join(block.tobytes() for block in blocks.arranged(chunks))


@pytest.mark.parametrize("case", FLOATS)
def test_float_weights_are_the_engines_bytes(case):
    given, wanted = FLOATS[case]["in"], FLOATS[case]["out"]
    output, blocks = packed_float(unplaced("gate.weight", given.dtype, given.shape))
    assert (output.dtype, output.shape) == (wanted.dtype, wanted.shape)
    assert blocks
    assert stored(blocks, given.data, 1000) == wanted.data


@given(
    st.integers(1, 5), st.integers(1, 9), st.integers(1, 4), st.sampled_from([("F16", "F16"),
    ("BF16", "F32"), ("F32", "F32")]), st.integers(1, 999), st.randoms(),
)  # fmt: skip
def test_any_range_reads_back_as_it_was(rows, N, pairs, dtypes, step, random):
    was, dtype = dtypes
    blocks = Blocks((N, 2 * pairs), rows, layouts.VNNI, was, dtype)
    size = N * 2 * pairs * RAW[was].itemsize
    values = np.random.default_rng(step).standard_normal(N * 2 * pairs).astype(np.float32)
    data = (values.view("<u2")[1::2] if was == "BF16" else values.astype(RAW[was])).tobytes()
    assert len(data) == size
    packed = stored(blocks, data, step)
    views = Views(Memory(b"head" + packed))
    views.add("view", TensorInfo("t", dtype, (N, 2 * pairs), "file", 4, len(packed)), blocks)
    for _ in range(5):
        start, stop = sorted((random.randint(0, size), random.randint(0, size)))
        buffer = bytearray(stop - start)
        views.readinto("view", start, memoryview(buffer))
        assert buffer == data[start:stop]

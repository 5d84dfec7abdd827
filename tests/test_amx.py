"""Compensation of the AMX blocks against its definition; vendors' bytes are in test_convert."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from awqconv.repack.engine import repack
from awqconv.repack.layouts import ROWS, amx
from awqconv.repack.reference import pack
from awqconv.targets.amx import TARGET
from awqconv.targets.base import Linear

SIZES = [4, 32, 48, 64, 96, 100, 128, 256, 640]


@settings(max_examples=80, deadline=None)
@given(
    g=st.sampled_from(SIZES), G=st.integers(1, 5), width=st.integers(1, 5), seed=st.integers(0, 99)
)
@example(g=128, G=1, width=1, seed=-1)
@example(g=640, G=3, width=3, seed=-1)
def test_compensation(g: int, G: int, width: int, seed: int) -> None:
    """comp[n] = sum over a block's k of (q[k, n] - z[n]); nothing but the padding is written.

    Zero points are a slice of a wider array, as the encoder has them. Seed -1: the largest sums.
    """
    linear = Linear(g * G, 32 * width, g)
    rng = np.random.default_rng([seed + 1, g, G, width])
    q = rng.integers(0, 16, (linear.K, linear.N), dtype=np.uint8)
    z = rng.integers(0, 16, (G, linear.N + 48), dtype=np.uint8)[:, 16 : 16 + linear.N]
    if seed < 0:
        q[:], z[:] = 15, 0
    block = min(g, 128)
    size = 16 * block + 128
    buffer = np.full(width * (linear.K // block) * size + 2, 0xA5, np.uint8)
    rows, pattern = buffer[1:-1], amx(block)  # nothing is aligned
    repack(pack(q, ROWS).reshape(-1), ROWS.bind(q.shape), rows, pattern.bind(q.shape))
    before = rows.reshape(width, -1, size).copy()
    TARGET.derive(TARGET.parts(linear)[0], linear, rows, z)
    after = rows.reshape(width, -1, size)
    centred = q.astype(np.int64) - np.repeat(z, g, axis=0)
    sums = centred.reshape(-1, block, width, 32).sum(1).swapaxes(0, 1)
    found = np.ascontiguousarray(after[..., 16 * block :]).view("<i4")
    np.testing.assert_array_equal(found, sums)
    np.testing.assert_array_equal(after[..., : 16 * block], before[..., : 16 * block])
    assert buffer[0] == buffer[-1] == 0xA5

"""Intel CPUs with AMX: sgl-kernel's int4 blocks with their compensation, for its W4A8 GEMM.

qweight uint8 [N/32, K/b, 16 b + 128] with b = min(g, 128), qzeros int8 [N/32, G, 32], scales
float32 [N/32, G, 32], bias float32. Source: sgl-kernel/csrc/cpu/gemm_int4.cpp
convert_weight_packed_scale_zp, int4_scaled_mm_cpu.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from awqconv.repack import layouts
from awqconv.repack.engine import nibble_sums
from awqconv.targets.base import Linear, Part, Rule, Target

SOURCE = "sgl-kernel gemm_int4.cpp convert_weight_packed_scale_zp"


class Amx(Target):
    name = "amx"
    title = "Intel CPUs with AMX: SGLang (W4A8)"
    rules = (
        Rule("N % 32 == 0", SOURCE),
        Rule("g % 4 == 0", SOURCE),
        # The GEMM takes g // 128 blocks a group: other sizes above 128 read the wrong scales.
        Rule("g <= 128 or g % 128 == 0", "sgl-kernel gemm_int4.cpp int4_scaled_mm_cpu"),
    )
    expert_rules = (
        Rule("H % 32 == 0", SOURCE),
        # Gate and up lie in one w13: its reader takes block i and block i + I / 32 together.
        Rule("I % 32 == 0", "sgl-kernel fused_experts_cpu (INT4_W4A8)"),
        *rules[1:],
    )
    fallback = "bf16"

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        return (
            Part("qweight", "q", layouts.amx(min(linear.g, 128)), "U8"),
            Part("qzeros", "z", layouts.AMX_COLUMNS, "I8"),
            Part("scales", "s", layouts.AMX_COLUMNS, "F32"),
        )

    def bias(self, linear: Linear) -> str | None:
        return linear.bias and "F32"

    def derive(
        self, part: Part, linear: Linear, rows: NDArray[np.uint8], z: NDArray[np.uint8]
    ) -> None:
        """Compensation: int32 sum over a block's rows of (q - z), for each of its 32 columns."""
        block = min(linear.g, 128)
        rows = rows.reshape(-1, linear.K // block, 16 * block + 128)
        # A block is block / 4 lines of 64 bytes (pair 2, column 8, k 4), a column's two halves in
        # one byte: lines are added up, then the four k of a line.
        sums = np.empty((rows.shape[0] * rows.shape[1], 128), np.uint16)
        nibble_sums(rows.reshape(-1), rows.shape[2], block // 4, sums)
        pairs = sums.view(np.uint64).reshape(-1, 2)  # of k, of halves: sums of 4 do not overflow
        two = pairs[:, 0] + pairs[:, 1]
        halves = (two + (two >> 32)).astype(np.uint32).view(np.uint16)
        columns = halves.reshape(-1, 2, 8, 2).swapaxes(2, 3).reshape(*rows.shape[:2], 32)
        zeros = z.reshape(linear.G, -1, 32).transpose(1, 0, 2).astype(np.int32) * block
        comp = columns - np.repeat(zeros, linear.g // block, axis=1)
        rows[..., 16 * block :] = comp.astype("<i4").view(np.uint8)


TARGET = Amx()

"""Intel CPUs with AMX: sgl-kernel's int4 blocks with their compensation, for its W4A8 GEMM.

qweight uint8 [N/32, K/b, 16 b + 128] with b = min(g, 128), qzeros int8 [N/32, G, 32], scales
float32 [N/32, G, 32], bias float32. Source: sgl-kernel/csrc/cpu/gemm_int4.cpp
convert_weight_packed_scale_zp, int4_scaled_mm_cpu.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
from numpy.typing import NDArray

from awqconv.repack import layouts
from awqconv.repack.codegen import Code, compiled
from awqconv.targets.base import Linear, Part, Rule, Target

SOURCE = "sgl-kernel gemm_int4.cpp convert_weight_packed_scale_zp"
BURST = 255 // 15  # codes whose sum fits a byte


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
        width = len(rows.reshape(-1, linear.K // block, 16 * block + 128))
        zeros = np.ascontiguousarray(z).reshape(linear.G, 32 * width)
        counts = np.array([width, linear.G, linear.g // block], np.int64)
        function = compiled(_compensate, block)
        function(zeros.ctypes.data, rows.ctypes.data, counts.ctypes.data)


def _compensate(code: Code, block: int) -> None:
    """Write what fills the padding of blocks [N/32, G, g/block]; zero points are uint8 [G, N].

    A block is block / 4 lines of 64 bytes (pair 2, column 8, k 4), a column's two halves in one
    byte. Bytes are added up over as many lines as cannot overflow them, then the four k of a line.
    """
    width, groups, blocks = (code.param() for _ in range(3))
    with code.loop(width) as n, code.loop(groups) as group, code.loop(blocks) as i:
        number = code.b.add(code.b.mul(code.b.add(code.b.mul(n, groups), group), blocks), i)
        rows = code.at(code.dst, number, code.i64(16 * block + 128))
        z = code.at(code.at(code.src, group, code.b.mul(width, code.i64(32))), n, code.i64(32))
        halves = []
        for shift in (0, -4):
            bursts = []
            for first in range(0, block // 4, BURST):
                lines = range(first, min(first + BURST, block // 4))
                loaded = [code.load(code.at(rows, code.i64(64 * line)), 64) for line in lines]
                total = reduce(code.b.add, [code.field(x, 15, shift) for x in loaded])
                for bits in (8, 16):
                    pairs, mask = code.lanes(total, 2 * bits), (1 << bits) - 1
                    total = code.b.add(code.field(pairs, mask), code.field(pairs, mask, -bits))
                bursts.append(total)
            halves.append(reduce(code.b.add, bursts))
        order = [8 * pair + 16 * half + i for pair in (0, 1) for half in (0, 1) for i in range(8)]
        sums = code.shuffle(halves[0], halves[1], order)
        zeros = code.b.zext(code.load(z, 32), sums.type)
        below = code.b.mul(zeros, sums.type([block] * 32))
        code.store(code.b.sub(sums, below), code.at(rows, code.i64(16 * block)))


TARGET = Amx()

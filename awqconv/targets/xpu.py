"""Intel XPU: qweight int32 [N, K/8] along K, scales [G, N], zero points int8 [G, N].

Reader: torch._weight_int4pack_mm_with_scales_and_zeros, which SGLang's AWQXPULinearKernel calls
(there under the names qweight, xpu_scales, xpu_zero_points).
"""

from __future__ import annotations

from awqconv.repack import layouts
from awqconv.targets.base import Linear, Part, Rule, Target


class Xpu(Target):
    name = "xpu"
    title = "Intel GPUs: SGLang, PyTorch int4pack"
    rules = (
        Rule("g in (32, 64, 128, 256)", "SGLang AWQXPULinearKernel"),
        Rule("K % 8 == 0", "aten::_convert_weight_to_int4pack"),
        Rule("kind == 'dense'", "SGLang AWQXPULinearKernel: mixtures are not implemented"),
    )
    fallback = "bf16"

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        return (
            Part("qweight", "q", layouts.COLUMNS, "I32"),
            Part("qzeros", "z", layouts.PLAIN, "I8"),
            Part("scales", "s", layouts.PLAIN, linear.scales),
        )


TARGET = Xpu()

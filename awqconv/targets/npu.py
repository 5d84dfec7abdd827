"""Huawei Ascend: qweight int32 [K, N/8] of two's complement nibbles q - 8, qzeros = 8 - z.

Reader: npu_weight_quant_batchmatmul, y = x @ ((w + offset) * scale); zeros [G, N] in the scales'
dtype. Producer: SGLang AWQAscendLinearKernel.process_weights_after_loading.
"""

from __future__ import annotations

from awqconv.repack import layouts
from awqconv.targets.base import Linear, Part, Rule, Target


class Npu(Target):
    name = "npu"
    title = "Huawei Ascend NPUs: SGLang, vllm-ascend"
    rules = (
        Rule("g % 32 == 0", "SGLang AWQAscendLinearKernel, the int4 path"),
        Rule("g < K", "SGLang AWQAscendLinearKernel, the int4 path"),
        Rule("K <= 65535 and N <= 65535", "torch_npu npu_weight_quant_batchmatmul"),
    )
    # The mixture kernel has no slow path in the engine and takes a single group too. Experts with
    # other group sizes become plain weights here, all of a layer, for its unquantized mixture.
    expert_rules = (
        Rule("g % 32 == 0", "torch_npu npu_grouped_matmul, antiquant_scale"),
        Rule("H <= 65535 and 2 * I <= 65535", "torch_npu npu_grouped_matmul"),
    )
    fallback = "bf16"

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        return (
            Part("qweight", "q", layouts.ROWS, "I32", xor=8),
            Part("qzeros", "z", layouts.PLAIN, linear.scales, sign=-1, offset=8),
            Part("scales", "s", layouts.PLAIN, linear.scales),
        )


TARGET = Npu()

"""Marlin, uint4 with zero points: qweight int32 [K/16, 2N], qzeros int32 [G, N/8], scales [G, N].

Producers and readers: SGLang srt/layers/quantization/marlin_utils.py and
kernels/jit/csrc/gemm/marlin/awq_marlin_repack.cuh; vLLM csrc/quantization/marlin.
The bias stays in plain order, as SGLang and this package's loaders read it; vLLM permutes it
itself after loading.
"""

from __future__ import annotations

from awqconv.repack import layouts
from awqconv.targets.base import Linear, Part, Rule, Target

SOURCE = "marlin_utils.py check_marlin_supports_layer, verify_marlin_supports_shape"
# The check also lets -1 pass; a mixture with it has no shape in the engine (H // -1 groups).
EXPERTS = "marlin_utils.py check_moe_marlin_supports_layer"


class Marlin(Target):
    name = "marlin"
    title = "NVIDIA GPUs (SM80 and later): SGLang, vLLM"
    rules = (
        Rule("g in (32, 64, 128, K)", "marlin_utils.py MARLIN_SUPPORTED_GROUP_SIZES"),
        Rule("N % 64 == 0", SOURCE),
        Rule("K % 128 == 0", SOURCE),
    )
    expert_rules = (
        Rule("g in (32, 64, 128)", EXPERTS),
        Rule("H % 128 == 0", EXPERTS),
        Rule("I % max(64, g) == 0", EXPERTS),
    )
    expert_fallback = "moe_wna16"

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        # The kernel takes the one-group order wherever it is handed one row of scales.
        scales = layouts.MARLIN_SCALES if linear.G > 1 else layouts.MARLIN_SCALES_SINGLE
        return (
            Part("qweight", "q", layouts.MARLIN, "I32"),
            Part("qzeros", "z", layouts.MARLIN_ZEROS, "I32"),
            Part("scales", "s", scales, linear.scales),
        )


TARGET = Marlin()

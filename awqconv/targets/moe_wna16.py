"""moe_wna16: experts for the Triton kernel that SGLang and vLLM fall back to from Marlin.

qweight uint8 [N, K/2], qzeros uint8 [N/2, G], scales [N, G], the lower nibble first. Source:
MoeWNA16Method.get_weight_loader, convert_awq_tensor; both engines the same.
"""

from __future__ import annotations

from awqconv.repack import layouts
from awqconv.targets.base import Linear, Part, Rule, Target

SOURCE = "moe_wna16.py MoeWNA16Method.create_weights"


class MoeWna16(Target):
    name = "moe_wna16"
    title = "experts that Marlin does not take: SGLang, vLLM (Triton)"
    rules = (Rule("kind == 'expert'", "moe_wna16.py MoeWNA16Config.get_quant_method"),)
    expert_rules = (
        Rule("H % 2 == 0 and I % 2 == 0", SOURCE),
        Rule("H % g == 0 and I % g == 0", SOURCE),
    )

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        return (
            Part("qweight", "q", layouts.WNA16, "U8"),
            Part("qzeros", "z", layouts.WNA16_ZEROS, "U8"),
            Part("scales", "s", layouts.TRANSPOSED, linear.scales),
        )


TARGET = MoeWna16()

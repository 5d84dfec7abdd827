"""AutoAWQ GEMM, the source layout: int32 qweight [K, N/8] and qzeros [G, N/8], scales [G, N].

https://github.com/casper-hansen/AutoAWQ/blob/88e4c76b/awq/modules/linear/gemm.py
"""

from __future__ import annotations

from typing import Any

from awqconv.repack import layouts
from awqconv.targets.base import Linear, Part, Rule, Target


class Awq(Target):
    name = "awq"
    title = "AutoAWQ GEMM: every engine's AWQ loader"
    rules = (
        Rule("N % 8 == 0", "WQLinear_GEMM.__init__"),
        Rule("K % g == 0", "WQLinear_GEMM.__init__"),
    )

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        return (
            Part("qweight", "q", layouts.AWQ, "I32"),
            Part("qzeros", "z", layouts.AWQ, "I32"),
            Part("scales", "s", layouts.PLAIN, linear.scales),
        )

    def quantization_config(self, common: dict[str, Any]) -> dict[str, Any]:
        restored: dict[str, Any] = common["source"]["quantization_config"]
        return restored


TARGET = Awq()

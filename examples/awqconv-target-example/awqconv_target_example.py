"""vLLM on CPUs without AMX: qweight int32 [N/16, 2K], qzeros int32 [G, N/8], scales [G, N].

Sixteen columns of a row lie in two words, in plain order. Reader: vLLM csrc/cpu/cpu_wna16.cpp
cpu_gemm_wna16. Producer: cpu_wna16.py CPUAWQLinearMethod._process_weights_woq.
"""

from awqconv.repack.axes import Pattern
from awqconv.repack.layouts import PLAIN
from awqconv.targets import Linear, Part, Rule, Target

SOURCE = "vLLM cpu_wna16.py CPUAWQLinearMethod"
WEIGHT = Pattern("k (nb nw e) -> nb (k nw) (e)", nw=2, e=8)
ZEROS = Pattern("g (nw e) -> g nw (e)", e=8)


class VllmCpu(Target):
    name = "vllm-cpu"
    title = "CPUs: vLLM (16-bit activations)"
    rules = (
        Rule("K % 32 == 0", SOURCE),
        Rule("N % 32 == 0", SOURCE),
        Rule("g % 2 == 0", SOURCE),
        Rule("kind == 'dense'", SOURCE),  # it has no mixtures
    )
    fallback = "awq"

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        return (
            Part("qweight", "q", WEIGHT, "I32"),
            Part("qzeros", "z", ZEROS, "I32"),
            Part("scales", "s", PLAIN, linear.scales),
        )


TARGET = VllmCpu()

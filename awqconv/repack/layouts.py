"""The catalogue: every weight, zero-point and scale layout as one pattern, with its source.

Logical arrays are codes q [K, N], zero points z [G, N], scales s [G, N]; the last group on the
right of a packed pattern is the nibbles of a word, lowest first. The proof of each entry is
`tests/test_layouts.py`, against bytes written by the named code.
"""

from awqconv.repack.axes import Pattern

# AutoAWQ GEMM, weight and zero points: awq/utils/packing_utils.py (order 0 2 4 6 1 3 5 7),
# awq/modules/linear/gemm.py WQLinear_GEMM.from_linear. int32 [K, N/8], [G, N/8].
AWQ = Pattern("k (nw pair odd) -> k nw (odd pair)", pair=4, odd=2)

# Nibbles in plain order along N. Ascend: npu_weight_quant_batchmatmul's int4 weight (two's
# complement, so every nibble xor 8), SGLang AWQAscendLinearKernel. GPTQ v2 zero points.
ROWS = Pattern("k (nw e) -> k nw (e)", e=8)

# Marlin, uint4 with zero points: awq_marlin_repack (SGLang kernels/jit/csrc/gemm/marlin/
# awq_marlin_repack.cuh, vLLM csrc/quantization/marlin). int32 [K/16, 2N]. A word holds one
# thread's share of an mma.m16n8k16 B fragment.
MARLIN = Pattern(
    "(kt k8 kp k1) (nt nq n8 nc) -> kt (nt nc kp nq) (k1 n8 k8)",
    k8=2, kp=4, k1=2, nq=4, n8=2, nc=8,
)  # fmt: skip
# marlin_utils.py marlin_zero_points (scale permutation, then interleave 0 2 4 6 1 3 5 7).
MARLIN_ZEROS = Pattern("g (nt pair odd j) -> g (nt j) (odd pair)", pair=4, odd=2, j=8)
# marlin_utils.py marlin_permute_scales and get_scale_perms: by groups, and for a single group.
MARLIN_SCALES = Pattern("g (nt i j) -> g (nt j i)", i=8, j=8)
MARLIN_SCALES_SINGLE = Pattern("g (nt i j p) -> g (nt j i p)", i=4, j=4, p=2)


def amx(block: int) -> Pattern:
    """Weight blocks of sgl-kernel's int4 GEMM for AMX: `block` = min(g, 128) rows by 32 columns.

    uint8 [N/32, K/block, 16 * block + 128]; the last 128 bytes are int32 compensation.
    Source: sgl-kernel/csrc/cpu/gemm_int4.cpp convert_weight_packed_scale_zp.
    """
    return Pattern(
        "(kc kb ki) (nc pair hi ni) -> nc kc (kb pair ni ki) (hi)",
        pad=256, kb=block // 4, ki=4, pair=2, hi=2, ni=8,
    )  # fmt: skip


AMX_COLUMNS = Pattern("g (nc nn) -> nc g nn", nn=32)  # zero points int8 and scales float32

# Nibbles in plain order along K, a row per column of the logical matrix. compressed-tensors
# pack_to_int32 (weight_packed [N, K/8]); XPU aten::_convert_weight_to_int4pack [N, K/8].
COLUMNS = Pattern("(kw e) n -> n kw (e)", e=8)
# compressed-tensors weight_zero_point int32 [N/8, G]: packed along N.
CT_ZEROS = Pattern("g (nw e) -> nw g (e)", e=8)
TRANSPOSED = Pattern("g n -> n g")
PLAIN = Pattern("g n -> g n")

# GPTQ (v2): qweight int32 [K/8, N]; zero points as ROWS. GPTQModel, AutoAWQ exllama.py.
GPTQ = Pattern("(kw e) n -> kw n (e)", e=8)

# moe_wna16 of SGLang and vLLM (MoeWNA16Method): bytes [N, K/2] and zero points [N/2, G].
WNA16 = Pattern("(kw e) n -> n kw (e)", e=2)
WNA16_ZEROS = Pattern("g (nw e) -> nw g (e)", e=2)

# vLLM CPU WNA16 (cpu_wna16.py _process_weights_woq): int32 [N/16, 2K].
VLLM_CPU = Pattern("k (nb nw e) -> nb (k nw) (e)", nw=2, e=8)

# Other AutoAWQ dialects. GEMV: int32 [N, K/8], awq/modules/linear/gemv.py, as COLUMNS.
# GEMV_FAST and llm-awq v2: int16 [N/4, K], awq/modules/linear/gemv_fast.py pack_intweight.
GEMV_FAST = Pattern(
    "(kb kh kq kr) (nb nr) -> nb (kb nr kh kr) (kq)", kh=2, kq=4, kr=8, nr=4
)  # fmt: skip

# Float weights [N, K] of a CPU's linear layers, each block of 32 rows (or the last 16): pairs of k
# beside each other, as AMX's bf16 tiles take them. sgl-kernel/csrc/cpu/gemm.cpp pack_vnni.
VNNI = Pattern("n (kp ki) -> kp n ki", ki=2)

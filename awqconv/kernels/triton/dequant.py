"""w = (q - z) * s from packed words, any layout: one kernel, its constants from the pattern.

A program writes a tile of w [BK, BN] and finds each code by its position, a sum of its k's and
its n's offset (`address.line`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from awqconv.kernels.triton.address import line
from awqconv.kernels.triton.gemm import Plan, place, zero_point


@triton.jit
def dequant_kernel(  # type: ignore[no-untyped-def]
    words, zeros, scales, out, K, N, g, words_expert, zeros_expert, scales_expert,
    qk_stride, qn_stride, zg_stride, zn_stride, sg_stride, sn_stride,
    qk: tl.constexpr, qn: tl.constexpr, zg: tl.constexpr, zn: tl.constexpr,
    z_form: tl.constexpr, sg: tl.constexpr, sn: tl.constexpr, xor: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's w [K, N]. Each constexpr line goes with its stride argument."""
    expert = tl.program_id(2).to(tl.int64)
    words += expert * words_expert
    zeros += expert * zeros_expert
    scales += expert * scales_expert
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (k < K)[:, None] & (n < N)[None, :]
    k_in, n_in = tl.minimum(k, K - 1), tl.minimum(n, N - 1)
    at = place(k_in, qk_stride, qk)[:, None] + place(n_in, qn_stride, qn)[None, :]
    q = ((tl.load(words + (at >> 3)) >> ((at & 7) * 4)) & 15) ^ xor
    z_at = place(k_in // g, zg_stride, zg)[:, None] + place(n_in, zn_stride, zn)[None, :]
    s_at = place(k_in // g, sg_stride, sg)[:, None] + place(n_in, sn_stride, sn)[None, :]
    w = (q - 8).to(tl.float32) - zero_point(zeros, z_at, z_form)
    w *= tl.load(scales + s_at).to(tl.float32)
    out += expert * K * N + k.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, w.to(out.dtype.element_ty), mask)


def launch(
    words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, own: Plan, dtype: torch.dtype
) -> torch.Tensor:
    """w [E, K, N] from words int32, zeros (bytes where coded) and scales, each with leading E."""
    linear, layout = own.linear, own.q.layout(own.linear)
    K, N, E = linear.K, linear.N, len(words)
    qk, qn = line(layout, 0), line(layout, 1)
    out = torch.empty(E, K, N, dtype=dtype, device=words.device)
    names = ("zg", "zn", "z_form", "sg", "sn", "xor")
    constants: dict[str, Any] = {name: own.constants[name] for name in names}
    strides = {name: own.strides[name] for name in own.strides if name[0] in "zs"}
    BK, BN = 16, 128
    dequant_kernel[(triton.cdiv(N, BN), triton.cdiv(K, BK), E)](
        words, zeros, scales, out, K, N, linear.g,
        words.stride(0), zeros.stride(0), scales.stride(0),
        qk_stride=qk.stride, qn_stride=qn.stride, **strides,
        qk=(qk.outer, *qk.inner), qn=(qn.outer, *qn.inner), **constants, BK=BK, BN=BN,
    )  # fmt: skip
    return out

"""GPU kernels that read packed words where they lie: fused GEMM and dequantization, in Triton.

One kernel body serves every layout; see `address` for how its constants come from the axis
pattern. Runs on CUDA GPUs and, on small shapes, under TRITON_INTERPRET=1.

    gemm(x, packed, target, linear, bias)                    y [M, N] = x [M, K] @ w + bias
    grouped_gemm(x, packed, target, linear, offsets)         the same with an expert for each row
    dequantize(packed, target, linear, dtype)                w [K, N] = (q - z) * s
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton

from awqconv.errors import AwqconvError
from awqconv.kernels.triton import dequant
from awqconv.kernels.triton.gemm import Plan, launch, plan
from awqconv.kernels.triton.tiles import choose
from awqconv.targets.base import Linear, Target

__all__ = ["dequantize", "gemm", "grouped_gemm"]

# From this many rows on a pass of dequantization and a dense product are faster than the fused
# kernel (benchmarks/gemm_h100.md), and from fewer on where that reads the words of a small matrix
# four times (benchmarks/RESULTS.md).
DENSE_ROWS = 65
SMALL, DENSE_ROWS_SMALL = 1 << 24, 33


def _weight(
    packed: Mapping[str, torch.Tensor], target: Target, linear: Linear
) -> torch.Tensor | None:
    """The plain weight [..., N, K] of a module that was left dequantized, or None."""
    part, *_ = target.parts(linear)
    return packed[part.suffix] if part.of == "w" else None


def _checked(
    packed: Mapping[str, torch.Tensor], target: Target, linear: Linear, experts: bool
) -> Plan:
    """The plan, once every packed tensor has the shape that the layout gives it."""
    parts = target.parts(linear)
    for part in parts:
        shape = tuple(packed[part.suffix].shape)
        if shape[experts:] != part.shape(linear):
            raise AwqconvError(
                f"{part.suffix} has shape {shape}, not {(*shape[:experts], *part.shape(linear))}",
                fix=f"pass the tensors of one {target.name} module of K {linear.K}, N {linear.N}, "
                f"group size {linear.g}",
            )
    return plan(parts, linear)


def _rows(x: torch.Tensor, linear: Linear) -> None:
    if x.ndim != 2 or x.shape[1] != linear.K or x.dtype not in (torch.float16, torch.bfloat16):
        raise AwqconvError(
            f"x is {x.dtype} {tuple(x.shape)}",
            fix=f"pass float16 or bfloat16 of shape [M, {linear.K}]",
        )


def gemm(
    x: torch.Tensor,
    packed: Mapping[str, torch.Tensor],
    target: Target,
    linear: Linear,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M, N] = x @ ((q - z) * s) + bias in x's dtype, summed in float32.

    x: float16 or bfloat16 [M, K]; packed: the module's tensors by suffix; bias [N], any float.
    Up to 64 rows, 32 of some small matrices, words go straight to the tensor cores; for more, w is
    dequantized to x's dtype and multiplied by the vendor's GEMM. Raises AwqconvError for shapes
    that do not match.
    """
    _rows(x, linear)
    weight = _weight(packed, target, linear)
    if weight is not None:
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias)
    own = _checked(packed, target, linear, experts=False)
    if len(x) == 0:
        return x.new_empty(0, linear.N)
    tile = choose(own.codes, len(x), linear.g) if len(x) < DENSE_ROWS else None
    small = len(x) >= DENSE_ROWS_SMALL and linear.K * linear.N < SMALL
    if tile is None or (small and tile.takers > 1):
        y = x @ dequantize(packed, target, linear, x.dtype)
        return y if bias is None else y.add_(bias)
    return launch(x, packed, own, tile, bias)


def grouped_gemm(
    x: torch.Tensor,
    packed: Mapping[str, torch.Tensor],
    target: Target,
    linear: Linear,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """y [M, N]: rows offsets[e] .. offsets[e + 1] of x times expert e, as `gemm`.

    packed: each tensor with a leading E; offsets: int [E + 1] on x's device, rising from 0 to M,
    so x is sorted by expert. The host never reads it: empty row tiles are launched and skipped.
    """
    _rows(x, linear)
    own = _checked(packed, target, linear, experts=True)
    E, M = len(offsets) - 1, len(x)
    tile = choose(own.codes, triton.cdiv(M, E), linear.g, slots=False)
    # Expert e has ceil(rows / BM) tiles; their number is bounded by M // BM + E.
    starts, ends = offsets[:-1].long(), offsets[1:].long()
    counts = (ends - starts + tile.BM - 1) // tile.BM
    after = counts.cumsum(0)
    index = torch.arange(M // tile.BM + E, device=x.device)
    expert = torch.searchsorted(after, index, right=True).clamp_(max=E - 1)
    row = starts[expert] + (index - (after - counts)[expert]) * tile.BM
    end = torch.where(index < after[-1], ends[expert], 0)
    return launch(x, packed, own, tile, blocks=torch.stack((expert, row, end), 1).int())


def dequantize(
    packed: Mapping[str, torch.Tensor],
    target: Target,
    linear: Linear,
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """w [K, N] = (q - z) * s, computed in float32 and rounded once to dtype."""
    weight = _weight(packed, target, linear)
    if weight is not None:
        return weight.T.to(dtype)
    own = _checked(packed, target, linear, experts=False)
    words = packed[own.q.suffix].view(torch.int32)[None]
    zeros, scales = packed[own.z.suffix][None], packed[own.s.suffix][None]
    return dequant.launch(
        words, zeros.view(torch.uint8) if own.z.coded else zeros, scales, own, dtype
    )[0]

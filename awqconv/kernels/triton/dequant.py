"""w = (q - z) * s from packed words, any layout: one kernel, its constants from the pattern.

A program reads a tile of words [BN, BK] as the GEMM does. The matrices of its nibbles are put in
the order of n by regrouping digits, as the pattern does, so that whole rows of w are written; a
nibble's k side only selects the rows.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, assignment, misc"
# (the bodies under triton.jit are Triton's language, not Python's)

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from awqconv.kernels.triton.address import Side
from awqconv.kernels.triton.gemm import (
    Plan,
    centred,
    columns,
    decode,
    extraction,
    fetch,
    joined,
    place,
)
from awqconv.kernels.triton.tiles import folds


@triton.jit
def dequant_kernel(
    words, zeros, scales, out, K, N, k_words, n_words, g,
    words_expert, zeros_expert, scales_expert,
    k_word_stride, n_word_stride, k_index_stride, n_index_stride,
    zg_stride, zn_stride, sg_stride, sn_stride,
    k_word: tl.constexpr, k_index: tl.constexpr, k_shift: tl.constexpr, k_offset: tl.constexpr,
    n_word: tl.constexpr, n_index: tl.constexpr, n_shift: tl.constexpr, n_offset: tl.constexpr,
    zg: tl.constexpr, zn: tl.constexpr, z_form: tl.constexpr, sg: tl.constexpr, sn: tl.constexpr,
    xor: tl.constexpr, extract: tl.constexpr, digits: tl.constexpr, order: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's w [K, N].

    `digits`: sizes of the axes (k word rows, n digits, n nibbles) and `order` their order by
    weight in k and n; empty where the digits of n are no powers of two or too many.
    """
    JN: tl.constexpr = len(n_shift)
    dtype: tl.constexpr = out.dtype.element_ty
    expert = tl.program_id(2).to(tl.int64)
    words += expert * words_expert
    zeros += expert * zeros_expert
    scales += expert * scales_expert
    out += expert * K * N
    n_row = tl.program_id(0) * BN + tl.arange(0, BN)
    k_row = tl.program_id(1) * BK + tl.arange(0, BK)
    n_in, k_in = (n_row < n_words)[None, :], (k_row < k_words)[:, None]
    n_row, k_row = tl.minimum(n_row, n_words - 1), tl.minimum(k_row, k_words - 1)
    n = place(n_row, n_index_stride, n_index)[None, :]
    k = place(k_row, k_index_stride, k_index)
    at = place(k_row, k_word_stride, k_word)[:, None] + place(n_row, n_word_stride, n_word)[None, :]
    w = tl.load(words + at)
    column = tl.program_id(0) * (BN * JN) + tl.arange(0, BN * JN)[None, :]
    if len(order) > 0:
        own, offsets = tl.minimum(column, N - 1), (0,)
    else:
        own, offsets = n, n_offset
    z_at, s_at = columns(own, zn_stride, sn_stride, zn, sn, z_form, offsets)
    if FOLD:
        group = tl.program_id(1) * (BK * len(k_shift)) // g
        zs = fetch(zeros, scales, group, z_at, s_at, zg_stride, sg_stride, zg, sg, z_form, (1, 0))
        zs = decode(zs, z_at, z_form, (1, 0))
    for jk in tl.static_range(len(k_shift)):
        row = k + k_offset[jk]
        if not FOLD:
            groups = (row // g)[:, None]
            zs = fetch(
                zeros, scales, groups, z_at, s_at, zg_stride, sg_stride, zg, sg, z_form, (1, 0)
            )
            zs = decode(zs, z_at, z_form, (1, 0))
        target = out + row.to(tl.int64)[:, None] * N
        values = ()
        for jn in tl.static_range(JN):
            values += (centred(w, k_shift[jk] + n_shift[jn], xor, extract, dtype),)
        if len(order) > 0:
            tile = tl.reshape(joined(values), digits)  # of JN matrices [BK, BN]
            tile = tl.permute(tile, order[0], order[1], order[2], order[3], order[4], order[5])
            tile = tl.reshape(tile, (BK, BN * JN)).to(tl.float32)
            tl.store(target + column, ((tile - zs[0]) * zs[1]).to(dtype), k_in & (column < N))
        else:
            for jn in tl.static_range(JN):
                value = (values[jn].to(tl.float32) - zs[2 * jn]) * zs[2 * jn + 1]
                tl.store(target + n + n_offset[jn], value.to(dtype), k_in & n_in)


@cache
def regrouping(side: Side, BK: int, BN: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`digits` and `order` of `dequant_kernel` for BN word rows; empty if there are none."""
    inner = list(zip(side.index.inner[1::3], side.index.inner[2::3], strict=True))
    sizes = [size for size, _ in inner]
    if any(size & size - 1 for size in (*sizes, len(side.offset))) or BN % prod(sizes):
        return (), ()
    # Slowest first: the word rows' outermost digit, the inner ones, the nibbles'.
    axes = [(BN // prod(sizes), side.index.stride), *reversed(inner)]
    width = len(side.offset)
    while width > 1:
        width //= 2
        axes.append((2, side.offset[width]))
    axes += [(1, 0)] * (5 - len(axes))
    order = sorted(range(len(axes)), key=lambda i: -axes[i][1])
    if len(axes) > 5:
        return (), ()
    return (BK, *(size for size, _ in axes)), (0, *(i + 1 for i in order))


def launch(
    words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, own: Plan, dtype: torch.dtype
) -> torch.Tensor:
    """w [E, K, N] from words int32, zeros (bytes where coded) and scales, each with leading E."""
    linear, k, n = own.linear, own.codes.k, own.codes.n
    E, JN = len(words), len(n.offset)
    out = torch.empty(E, linear.K, linear.N, dtype=dtype, device=words.device)
    width, count = (64, 1024) if JN > 2 else (128, 2048)  # columns and words of a tile
    BN = triton.next_power_of_2(max(n.run, width // JN))
    BK = max(32, count // BN)
    while BK > 1 and not folds(k, BK, linear.g):
        BK //= 2
    fold = folds(k, BK, linear.g)
    digits, order = regrouping(n, BK, BN)
    # Two words to an instruction, so two to a thread, of numbers that have 16 bits.
    paired = dtype in (torch.float16, torch.bfloat16) and BN * BK >= 256
    nvidia = paired and words.device.type == "cuda" and torch.version.cuda is not None
    constants: dict[str, Any] = {k: v for k, v in own.constants.items() if k != "s_form"}
    constants["z_form"] = (*own.constants["z_form"][:3], 1, 0)  # a load for each column
    dequant_kernel[(triton.cdiv(n.words, BN), triton.cdiv(k.words, BK), E)](
        words, zeros, scales, out, linear.K, linear.N, k.words, n.words, linear.g,
        words.stride(0), zeros.stride(0), scales.stride(0), **own.strides, **constants,
        extract=extraction(dtype, own.q.xor) if nvidia else (),
        digits=digits, order=order, BN=BN, BK=BK, FOLD=fold,
    )  # fmt: skip
    return out

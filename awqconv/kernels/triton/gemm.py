"""y = x @ ((q - z) * s) + bias over packed words: one kernel body, its constants from the pattern.

A program holds a tile of words [BN word rows of n, BK word rows of k] (see `address`). For each
nibble (jn, jk) of a word it forms the weight matrix of that nibble and multiplies it with the
rows of x that match: the n side of a nibble selects an accumulator, its k side a slice of x. So
words go from memory to the tensor cores without a shuffle:

    acc[jn] [BN, BM] += s[jn] * sum over jk of (q[jn, jk] - z[jn]) [BN, BK] @ x[jk]^T [BK, BM]

q - z is exact in fp16 and bf16. Where a tile lies inside one group the scale is applied once to
the fp32 sums; otherwise to each weight, which is then rounded to x's dtype. K is split over
programs, of which the last to finish adds the fp32 parts in a fixed order, so results repeat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from awqconv.kernels.triton.address import Codes, Side, codes, line
from awqconv.targets.base import Linear, Part, Target


@triton.jit
def place(index, stride, rule: tl.constexpr):  # type: ignore[no-untyped-def]
    """`Line.__call__` for a tensor of indices."""
    at = index // rule[0] * stride
    for i in tl.static_range(1, len(rule), 3):
        at += index // rule[i] % rule[i + 1] * rule[i + 2]
    return at


@triton.jit
def zero_point(ptr, at, form: tl.constexpr):  # type: ignore[no-untyped-def]
    """z - 8 as float32. `form`: (coded, xor, 0), `at` in nibbles, or (not, sign, offset), in elements."""
    if form[0]:
        byte = tl.load(ptr + (at >> 1)).to(tl.int32)
        z = ((((byte >> ((at & 1) * 4)) & 15) ^ form[1]) - 8).to(tl.float32)
    else:
        z = (tl.load(ptr + at).to(tl.float32) - form[2]) * form[1] - 8
    return z


@triton.jit
def centred(
    words, shift: tl.constexpr, xor: tl.constexpr, extract: tl.constexpr, dtype: tl.constexpr
):  # type: ignore[no-untyped-def]
    """The code at bit `shift` of each int32 word, minus 8, in fp16 or bf16; exact.

    `extract` is PTX for each of the eight nibbles (see `extraction`), or nothing.
    """
    if len(extract) == 0:
        code = ((((words >> shift) & 15) ^ xor) - 8).to(tl.float32).to(dtype)
    else:
        asm: tl.constexpr = extract[shift // 4]
        if dtype == tl.float16:
            code = tl.inline_asm_elementwise(asm, "=r,r,r", [words], tl.float16, True, 2)
        else:
            code = tl.inline_asm_elementwise(asm, "=r,r,r", [words], tl.bfloat16, True, 2)
    return code


@triton.jit
def multiply(a, b, acc, extract: tl.constexpr):  # type: ignore[no-untyped-def]
    """a @ b + acc. The interpreter, which has no `extract`, knows no product of bfloat16."""
    if len(extract) == 0:
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        out = tl.dot(a, b, acc)
    return out


@cache
def extraction(dtype: torch.dtype, xor: int) -> tuple[str, ...]:
    """PTX of `centred`, a text for each nibble: 16 codes of two words in 24 instructions.

    The codes of both words at one nibble are or-ed into the mantissas of a pair of numbers.
    """
    bits, subtract = {
        torch.float16: (0x6400, "mov.b32 c, 0xe408e408; add.f16x2 $0, t, c;"),  # 1024 + q - 1032
        torch.bfloat16: (0x4300, "mov.b32 one, 0x3f803f80; mov.b32 c, 0xc308c308; "
                                 "fma.rn.bf16x2 $0, t, one, c;"),  # 128 + q - 136
    }[dtype]  # fmt: skip
    texts = []
    for nibble in range(8):
        halves = "0x5410" if nibble < 4 else "0x7632"  # the lower or the upper half of both words
        texts.append(
            f"{{ .reg .b32 t, one, c; prmt.b32 t, $1, $2, {halves}; "
            f"shr.u32 t, t, {nibble % 4 * 4}; "
            f"lop3.b32 t, t, 0x000f000f, {(bits ^ xor) * 0x10001:#x}, 0x6a; "  # (t & 15) ^ bits
            f"{subtract} }}"
        )
    return tuple(texts)


@triton.jit(do_not_specialize=["M", "splits", "chunks"])
def gemm_kernel(  # type: ignore[no-untyped-def]
    x, words, zeros, scales, bias, y, partial, counters, blocks,
    M, N, k_words, n_words, g, chunks, splits,
    x_row, words_expert, zeros_expert, scales_expert,
    k_word_stride, n_word_stride, k_index_stride, n_index_stride,
    zg_stride, zn_stride, sg_stride, sn_stride,
    k_word: tl.constexpr, k_index: tl.constexpr, k_shift: tl.constexpr, k_offset: tl.constexpr,
    n_word: tl.constexpr, n_index: tl.constexpr, n_shift: tl.constexpr, n_offset: tl.constexpr,
    zg: tl.constexpr, zn: tl.constexpr, z_form: tl.constexpr, sg: tl.constexpr, sn: tl.constexpr,
    xor: tl.constexpr, extract: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FOLD: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, ARRANGED: tl.constexpr,
    GROUPED: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of y: `blocks` int32 [blocks, 3] (expert, first row, end row) where GROUPED.

    Each constexpr (outer, *inner) with its stride argument is a `Line`. `chunks`: tiles of BK
    word rows that one split sums. ARRANGED: x is [M, jk, k words], else [M, K].
    """
    JK: tl.constexpr = len(k_shift)
    JN: tl.constexpr = len(n_shift)
    dtype = x.dtype.element_ty
    tiles = tl.cdiv(n_words, BN)
    tile = tl.program_id(0) % tiles
    block = tl.program_id(0) // tiles
    split = tl.program_id(1)
    row, end = block * BM, M
    if GROUPED:
        expert = tl.load(blocks + block * 3).to(tl.int64)
        row = tl.load(blocks + block * 3 + 1)
        end = tl.load(blocks + block * 3 + 2)
        words += expert * words_expert
        zeros += expert * zeros_expert
        scales += expert * scales_expert
    m = row + tl.arange(0, BM)
    m_in = m < end
    n_row = tile * BN + tl.arange(0, BN)
    n_in = n_row < n_words
    n_row_in = n_row if EVEN_N else tl.minimum(n_row, n_words - 1)
    n = place(n_row_in, n_index_stride, n_index)
    words += place(n_row_in, n_word_stride, n_word)[:, None]
    x += m[None, :].to(tl.int64) * x_row

    ones = tl.full((BN, BK), 1.0, tl.float32).to(dtype)
    acc = ()
    for _ in tl.static_range(JN):
        acc += (tl.zeros((BN, BM), tl.float32),)
    for chunk in tl.range(split * chunks, tl.minimum((split + 1) * chunks, tl.cdiv(k_words, BK)),
                          num_stages=STAGES):  # fmt: skip
        k_row = chunk * BK + tl.arange(0, BK)
        k_in = k_row < k_words
        k_row_in = k_row if EVEN_K else tl.minimum(k_row, k_words - 1)
        w = tl.load(words + place(k_row_in, k_word_stride, k_word)[None, :])
        k = place(k_row_in, k_index_stride, k_index)
        parts = ()
        ones_x = tl.zeros((BN, BM), tl.float32)
        if FOLD:
            for jn in tl.static_range(JN):
                parts += (tl.zeros((BN, BM), tl.float32),)
        else:
            parts = acc
        for jk in tl.static_range(JK):
            x_at = jk * k_words + k_row if ARRANGED else k + k_offset[jk]
            x_in = m_in[None, :] if EVEN_K else m_in[None, :] & k_in[:, None]
            xt = tl.load(x + x_at[:, None], x_in, other=0.0)
            sums = ()
            for jn in tl.static_range(JN):
                weight = centred(w, k_shift[jk] + n_shift[jn], xor, extract, dtype)
                if not FOLD:
                    groups = ((k + k_offset[jk]) // g)[None, :]
                    columns = (n + n_offset[jn])[:, None]
                    z_at = place(groups, zg_stride, zg) + place(columns, zn_stride, zn)
                    s_at = place(groups, sg_stride, sg) + place(columns, sn_stride, sn)
                    weight = weight.to(tl.float32) - zero_point(zeros, z_at, z_form)
                    weight = (weight * tl.load(scales + s_at)).to(dtype)
                sums += (multiply(weight, xt, parts[jn], extract),)
            parts = sums
            if FOLD:
                ones_x = multiply(ones, xt, ones_x, extract)
        if FOLD:
            group = chunk * (BK * JK) // g
            z_group = place(group, zg_stride, zg)
            s_group = place(group, sg_stride, sg)
            sums = ()
            for jn in tl.static_range(JN):
                z_at = z_group + place(n + n_offset[jn], zn_stride, zn)
                s_at = s_group + place(n + n_offset[jn], sn_stride, sn)
                z = zero_point(zeros, z_at, z_form)[:, None]
                s = tl.load(scales + s_at).to(tl.float32)[:, None]
                sums += (acc[jn] + (parts[jn] - z * ones_x) * s,)
            parts = sums
        acc = parts

    if SPLIT:
        # Parts lie [split, m, jn, n word row]: the order of the accumulators, whatever n is.
        part = partial + m[None, :].to(tl.int64) * N + n_row[:, None]
        mask = n_in[:, None] & m_in[None, :]
        for jn in tl.static_range(JN):
            at = part + split.to(tl.int64) * M * N + jn * n_words
            tl.store(at, acc[jn], mask)
        tl.debug_barrier()
        last = tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel") == splits - 1
        if last:
            tl.store(counters + tl.program_id(0), 0)
            total = gather(part, mask, n_words, M * N, splits, BN, BM, JN)
            finish(total, y, bias, m, n, n_in, m_in, N, n_offset, BIAS)
    else:
        finish(acc, y, bias, m, n, n_in, m_in, N, n_offset, BIAS)


@triton.jit
def gather(part, mask, step, size, splits, BN: tl.constexpr, BM: tl.constexpr, JN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The accumulators summed over the splits, `size` elements apart."""
    acc = ()
    for jn in tl.static_range(JN):
        total = tl.zeros((BN, BM), tl.float32)
        at = part + jn * step
        for _ in range(splits):
            total += tl.load(at, mask, other=0.0, cache_modifier=".cg")
            at += size
        acc += (total,)
    return acc


@triton.jit
def finish(acc, y, bias, m, n, n_in, m_in, N, n_offset: tl.constexpr, BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the accumulators, plus bias, to their columns of y [M, N]."""
    for jn in tl.static_range(len(n_offset)):
        column = n + n_offset[jn]
        total = acc[jn]
        if BIAS:
            total += tl.load(bias + column).to(tl.float32)[:, None]
        at = m[None, :].to(tl.int64) * N + column[:, None]
        tl.store(y + at, total.to(y.dtype.element_ty), n_in[:, None] & m_in[None, :])


@dataclass(frozen=True)
class Tile:
    """What a program of `gemm_kernel` computes, and how it is compiled."""

    BM: int
    BN: int  # word rows along n: a tile covers BN * len(n.shift) columns
    BK: int  # word rows along k
    warps: int = 4
    stages: int = 4
    programs: int = 8  # that K is split to fill


@dataclass(frozen=True)
class Plan:
    """The tensors of a linear layer as the kernels address them; the same for every M."""

    linear: Linear
    q: Part
    z: Part
    s: Part
    codes: Codes
    constants: dict[str, Any]
    strides: dict[str, int]

    def __hash__(self) -> int:
        return hash((self.linear, self.q, self.z, self.s))


@cache
def plan(parts: tuple[Part, ...], linear: Linear) -> Plan:
    """Kernel constants of a target's parts. Raises AwqconvError where words do not divide."""
    by = {part.of: part for part in parts}
    q, z, s = by["q"], by["z"], by["s"]
    own = codes(q, linear)
    lines = {
        "k_word": own.k.word,
        "k_index": own.k.index,
        "n_word": own.n.word,
        "n_index": own.n.index,
        "zg": line(z.layout(linear), 0),
        "zn": line(z.layout(linear), 1),
        "sg": line(s.layout(linear), 0),
        "sn": line(s.layout(linear), 1),
    }
    constants: dict[str, Any] = {name: (at.outer, *at.inner) for name, at in lines.items()}
    constants |= {
        "k_shift": own.k.shift,
        "k_offset": own.k.offset,
        "n_shift": own.n.shift,
        "n_offset": own.n.offset,
        "z_form": (1, z.xor, 0) if z.coded else (0, z.sign, z.offset),
        "xor": own.xor,
    }
    strides = {f"{name}_stride": at.stride for name, at in lines.items()}
    return Plan(linear, q, z, s, own, constants, strides)


@cache
def folds(side: Side, BK: int, g: int) -> bool:
    """Whether every BK word rows along k hold one range of k inside one group."""
    span = BK * len(side.offset)
    whole = BK % side.run == 0 or side.run % BK == 0
    last = max(side.index(i) for i in range(min(BK, side.words))) + max(side.offset)
    return whole and g % span == 0 and last < span


@cache
def order(side: Side, device: torch.device) -> torch.Tensor:
    """The k of each (jk, word row), int64 [K]: the order that the kernel reads x in."""
    rows = [side.index(i) for i in range(side.words)]
    return torch.tensor([k + offset for offset in side.offset for k in rows], device=device)


@cache
def _counters(device: torch.device, stream: int) -> torch.Tensor:
    """Arrivals of each tile's splits; a launch leaves them zero, so that a stream shares one."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


@cache
def multiprocessors() -> int:
    """Of the current GPU; 2 under the interpreter."""
    return (
        torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 2
    )


def choose(own: Codes, M: int, g: int) -> Tile:
    """The tile for M rows: a small table, measured (benchmarks/gemm_h200.md)."""
    JK = len(own.k.offset)
    BM = 8 if M <= 8 else min(64, triton.next_power_of_2(M))
    BK = 16
    while BK * JK < 128 and not (folds(own.k, BK, g) and not folds(own.k, 2 * BK, g)):
        BK *= 2
    return Tile(BM, 64, BK, programs=4 * multiprocessors())


def launch(
    x: torch.Tensor,
    packed: Mapping[str, torch.Tensor],
    own: Plan,
    tile: Tile,
    bias: torch.Tensor | None = None,
    blocks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run `gemm_kernel`. `blocks` int32 [blocks, 3]: expert, first row, end row of each row tile."""
    (M, _), N, device = x.shape, own.linear.N, x.device
    k, n = own.codes.k, own.codes.n
    arranged = M > 16 and k.offset != (0,)
    x = x.index_select(1, order(k, device)) if arranged else x.contiguous()
    words = packed[own.q.suffix].view(torch.int32)
    zeros, scales = packed[own.z.suffix], packed[own.s.suffix]
    zeros = zeros.view(torch.uint8) if own.z.coded else zeros
    tiles = triton.cdiv(n.words, tile.BN)
    tiles *= triton.cdiv(M, tile.BM) if blocks is None else len(blocks)
    chunks = triton.cdiv(k.words, tile.BK)
    per = triton.cdiv(chunks, max(1, min(tile.programs // tiles, 16)))
    splits = triton.cdiv(chunks, per)
    y = torch.empty(M, N, dtype=x.dtype, device=device)
    partial, counters = y, y
    if splits > 1:
        partial = torch.empty(splits, M, N, dtype=torch.float32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        counters = _counters(device, stream)
    gpu = device.type == "cuda" and torch.version.cuda is not None
    gemm_kernel[(tiles, splits)](
        x, words, zeros, scales, y if bias is None else bias, y, partial, counters,
        x if blocks is None else blocks,
        M, N, k.words, n.words, own.linear.g, per, splits,
        x.stride(0), words.stride(0), zeros.stride(0), scales.stride(0),
        **own.strides, **own.constants,
        extract=extraction(x.dtype, own.q.xor) if gpu else (),
        BM=tile.BM, BN=tile.BN, BK=tile.BK,
        FOLD=folds(k, tile.BK, own.linear.g),
        EVEN_K=k.words % tile.BK == 0, EVEN_N=n.words % tile.BN == 0, ARRANGED=arranged,
        GROUPED=blocks is not None, BIAS=bias is not None, SPLIT=splits > 1, STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y

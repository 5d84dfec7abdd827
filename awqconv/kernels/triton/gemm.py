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

# mypy: disable-error-code="untyped-decorator, no-untyped-def, assignment, misc"
# (the bodies under triton.jit are Triton's language, not Python's)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from awqconv.kernels.triton.address import Codes, Side, codes, line
from awqconv.targets.base import Linear, Part


@triton.jit
def place(index, stride, rule: tl.constexpr):
    """`Line.__call__` for a tensor of indices."""
    at = index // rule[0] * stride
    for i in tl.static_range(1, len(rule), 3):
        at += index // rule[i] % rule[i + 1] * rule[i + 2]
    return at


@triton.jit
def centred(
    words, shift: tl.constexpr, xor: tl.constexpr, extract: tl.constexpr, dtype: tl.constexpr
):
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
def multiply(a, b, acc, extract: tl.constexpr):
    """a @ b + acc. The interpreter, which has no `extract`, knows no product of bfloat16."""
    if len(extract) == 0:
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        out = tl.dot(a, b, acc)
    return out


@cache
def extraction(dtype: torch.dtype, xor: int) -> tuple[str, ...]:
    """PTX of `centred`, a text for each nibble: 16 codes of two words in about 20 instructions.

    The codes of both words at one nibble are or-ed into the mantissas of a pair of numbers, which
    then hold 1024 + q, or 1024 + 16 q for every second nibble (bfloat16: 128 + q).
    """
    texts = []
    for nibble in range(8):
        halves = "0x5410" if nibble < 4 else "0x7632"  # the lower or the upper half of both words
        shift, low = nibble % 4 * 4, 0
        if dtype == torch.float16:
            shift, low = nibble % 4 // 2 * 8, nibble % 2 * 4
        mask, magic = 15 << low, (0x4300 if dtype == torch.bfloat16 else 0x6400) ^ xor << low
        texts.append(
            f"{{ .reg .b32 t, a, c; prmt.b32 t, $1, $2, {halves}; shr.u32 t, t, {shift}; "
            f"lop3.b32 t, t, {mask * 0x10001:#x}, {magic * 0x10001:#x}, 0x6a; "  # t & mask ^ magic
        )
        if dtype == torch.bfloat16:  # t * 1 - 136
            one, less = "0x3f803f80", "0xc308c308"
            texts[-1] += f"mov.b32 a, {one}; mov.b32 c, {less}; fma.rn.bf16x2 $0, t, a, c; }}"
        elif low:  # t / 16 - 72
            scale, less = "0x2c002c00", "0xd480d480"
            texts[-1] += f"mov.b32 a, {scale}; mov.b32 c, {less}; fma.rn.f16x2 $0, t, a, c; }}"
        else:  # t - 1032
            texts[-1] += "mov.b32 c, 0xe408e408; add.f16x2 $0, t, c; }"
    return tuple(texts)


@triton.jit
def arrange_kernel(
    x, out, sums, M, k_words, k_index_stride, k_index: tl.constexpr, k_offset: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """x [M, K] to out [M, chunks, jk, BK], zero beyond K, and its sums float32 [chunks, M]."""
    if CHAIN:
        tl.extra.cuda.gdc_launch_dependents()
    JK: tl.constexpr = len(k_offset)
    chunk = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    row = chunk * BK + tl.arange(0, BK)
    mask = (m < M)[:, None] & (row < k_words)[None, :]
    k = place(row, k_index_stride, k_index)
    x += m[:, None].to(tl.int64) * (k_words * JK) + k[None, :]
    out += m[:, None].to(tl.int64) * (tl.num_programs(0) * JK * BK) + chunk * JK * BK
    total = tl.zeros((BM,), tl.float32)
    for jk in tl.static_range(JK):
        value = tl.load(x + k_offset[jk], mask, other=0.0)
        total += tl.sum(value.to(tl.float32), 1)
        tl.store(out + jk * BK + tl.arange(0, BK)[None, :], value, (m < M)[:, None])
    tl.store(sums + chunk * M + m, total, m < M)


@triton.jit
def fetch(zeros, scales, group, n, zg_stride, zn_stride, sg_stride, sn_stride,
          zg: tl.constexpr, zn: tl.constexpr, z_form: tl.constexpr, sg: tl.constexpr,
          sn: tl.constexpr, n_offset: tl.constexpr):  # fmt: skip
    """Zero points and scales as stored, of groups and columns, for every jn: z, s, z, s, ..."""
    z_group = place(group, zg_stride, zg)
    s_group = place(group, sg_stride, sg)
    out = ()
    for jn in tl.static_range(len(n_offset)):
        at = z_group + place(n + n_offset[jn], zn_stride, zn)
        out += (tl.load(zeros + (at >> 1 if z_form[0] else at)),)
        out += (tl.load(scales + s_group + place(n + n_offset[jn], sn_stride, sn)),)
    return out


@triton.jit
def decode(stored, group, n, zg_stride, zn_stride, zg: tl.constexpr, zn: tl.constexpr,
           z_form: tl.constexpr, n_offset: tl.constexpr):  # fmt: skip
    """What `fetch` returned as float32, zero points less 8.

    `z_form`: (coded, xor, 0), each zero point in the nibble of its position, else
    (not coded, sign, offset).
    """
    z_group = place(group, zg_stride, zg)
    out = ()
    for jn in tl.static_range(len(n_offset)):
        z = stored[2 * jn]
        if z_form[0]:
            at = z_group + place(n + n_offset[jn], zn_stride, zn)
            z = (((z.to(tl.int32) >> ((at & 1) * 4)) & 15) ^ z_form[1]).to(tl.float32)
        else:
            z = (z.to(tl.float32) - z_form[2]) * z_form[1]
        out += (z - 8, stored[2 * jn + 1].to(tl.float32))
    return out


@triton.jit(do_not_specialize=["M", "jobs", "per"])
def gemm_kernel(
    x, sums, words, zeros, scales, bias, y, partial, counters, blocks,
    M, N, k_words, n_words, g, jobs, per,
    words_expert, zeros_expert, scales_expert,
    k_word_stride, n_word_stride, k_index_stride, n_index_stride,
    zg_stride, zn_stride, sg_stride, sn_stride,
    k_word: tl.constexpr, k_index: tl.constexpr, k_shift: tl.constexpr, k_offset: tl.constexpr,
    n_word: tl.constexpr, n_index: tl.constexpr, n_shift: tl.constexpr, n_offset: tl.constexpr,
    zg: tl.constexpr, zn: tl.constexpr, z_form: tl.constexpr, sg: tl.constexpr, sn: tl.constexpr,
    xor: tl.constexpr, extract: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FOLD: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    GROUPED: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, CHAIN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`per` chunks of BK word rows, of one or more jobs; a job is one tile of y.

    x [M, chunks, jk, BK] and its sums [chunks, M] as `arrange_kernel` leaves them. Each constexpr
    line (outer, *inner) goes with its stride argument. Where GROUPED `blocks` is int32
    [row blocks, 3]: expert, first row, end row. SPLIT: some job is done by several programs.
    """
    if CHAIN:
        tl.extra.cuda.gdc_wait()
    JK: tl.constexpr = len(k_shift)
    JN: tl.constexpr = len(n_shift)
    AHEAD: tl.constexpr = FOLD and JN <= 2 and BM <= 16
    dtype: tl.constexpr = x.dtype.element_ty
    chunks = tl.cdiv(k_words, BK)
    row_blocks = jobs // tl.cdiv(n_words, BN)
    start = tl.program_id(0) * per
    stop = tl.minimum(start + per, jobs * chunks)
    for job in range(start // chunks, tl.cdiv(stop, chunks)):
        row, end = job % row_blocks * BM, M
        words_job, zeros_job, scales_job = words, zeros, scales
        if GROUPED:
            expert = tl.load(blocks + job % row_blocks * 3).to(tl.int64)
            row = tl.load(blocks + job % row_blocks * 3 + 1)
            end = tl.load(blocks + job % row_blocks * 3 + 2)
            words_job += expert * words_expert
            zeros_job += expert * zeros_expert
            scales_job += expert * scales_expert
        m = row + tl.arange(0, BM)
        m_in = m < end
        n_row = job // row_blocks * BN + tl.arange(0, BN)
        n_in = n_row < n_words
        n_row_in = n_row if EVEN_N else tl.minimum(n_row, n_words - 1)
        n = place(n_row_in, n_index_stride, n_index)
        words_n = words_job + place(n_row_in, n_word_stride, n_word)[:, None]
        x_rows = x + m[None, :].to(tl.int64) * (chunks * JK * BK) + tl.arange(0, BK)[:, None]

        acc = ()
        for _ in tl.static_range(JN):
            acc += (tl.zeros((BN, BM), tl.float32),)
        first = tl.maximum(start, job * chunks) - job * chunks
        last = tl.minimum(stop, (job + 1) * chunks) - job * chunks
        if AHEAD:
            stored = fetch(zeros_job, scales_job, first * (BK * JK) // g, n, zg_stride, zn_stride,
                           sg_stride, sn_stride, zg, zn, z_form, sg, sn, n_offset)  # fmt: skip
        for chunk in tl.range(first, last, num_stages=STAGES):
            k_row = chunk * BK + tl.arange(0, BK)
            k_row = k_row if EVEN_K else tl.minimum(k_row, k_words - 1)
            w = tl.load(words_n + place(k_row, k_word_stride, k_word)[None, :])
            if FOLD:
                parts = ()
                for _ in tl.static_range(JN):
                    parts += (tl.zeros((BN, BM), tl.float32),)
                total = tl.load(sums + chunk * M + m, m_in, other=0.0)[None, :]
                # Few columns a thread: fetch the next chunk's numbers while this one is multiplied.
                ahead = tl.minimum(chunk + 1, last - 1) if AHEAD else chunk
                after = fetch(zeros_job, scales_job, ahead * (BK * JK) // g, n, zg_stride,
                              zn_stride, sg_stride, sn_stride, zg, zn, z_form, sg, sn,
                              n_offset)  # fmt: skip
                zs = decode(stored if AHEAD else after, chunk * (BK * JK) // g, n, zg_stride,
                            zn_stride, zg, zn, z_form, n_offset)  # fmt: skip
            else:
                parts = acc
            for jk in tl.static_range(JK):
                xt = tl.load(x_rows + (chunk * JK + jk) * BK, m_in[None, :], other=0.0)
                if not FOLD:
                    group = (place(k_row, k_index_stride, k_index) + k_offset[jk]) // g
                    zs = fetch(zeros_job, scales_job, group[None, :], n[:, None], zg_stride,
                               zn_stride, sg_stride, sn_stride, zg, zn, z_form, sg, sn,
                               n_offset)  # fmt: skip
                    zs = decode(zs, group[None, :], n[:, None], zg_stride, zn_stride, zg, zn,
                                z_form, n_offset)  # fmt: skip
                products = ()
                for jn in tl.static_range(JN):
                    weight = centred(w, k_shift[jk] + n_shift[jn], xor, extract, dtype)
                    if not FOLD:
                        z, s = zs[2 * jn], zs[2 * jn + 1]
                        weight = ((weight.to(tl.float32) - z) * s).to(dtype)
                    products += (multiply(weight, xt, parts[jn], extract),)
                parts = products
            if FOLD:
                scaled = ()
                for jn in tl.static_range(JN):
                    part = parts[jn] - zs[2 * jn][:, None] * total
                    scaled += (acc[jn] + part * zs[2 * jn + 1][:, None],)
                acc = scaled
                if AHEAD:
                    stored = after
            else:
                acc = parts

        # Programs that share this job: the one that starts it, and each multiple of `per` inside.
        before = job * chunks // per
        sharers = (job * chunks + chunks - 1) // per - before + 1
        mask = n_in[:, None] & m_in[None, :]
        if SPLIT:
            if sharers == 1:
                finish(acc, y, bias, m, n, mask, N, n_offset, BIAS)
            else:
                # Parts lie [sharer, m, jn, word row]: the order of acc, whatever the order of n.
                part = partial + m[None, :].to(tl.int64) * N + n_row[:, None]
                own = part + (tl.program_id(0) - before).to(tl.int64) * M * N
                for jn in tl.static_range(JN):
                    tl.store(own + jn * n_words, acc[jn], mask)
                tl.debug_barrier()
                if tl.atomic_add(counters + job, 1, sem="acq_rel") == sharers - 1:
                    tl.store(counters + job, 0)
                    summed = gather(part, mask, n_words, M * N, sharers, BN, BM, JN)
                    finish(summed, y, bias, m, n, mask, N, n_offset, BIAS)
        else:
            finish(acc, y, bias, m, n, mask, N, n_offset, BIAS)


@triton.jit
def gather(part, mask, step, size, sharers, BN: tl.constexpr, BM: tl.constexpr, JN: tl.constexpr):
    """The accumulators summed over their sharers, `size` elements apart."""
    acc = ()
    for _ in tl.static_range(JN):
        acc += (tl.zeros((BN, BM), tl.float32),)
    for _ in tl.range(0, sharers, loop_unroll_factor=4 if JN * BM <= 64 else 1):
        total = ()
        for jn in tl.static_range(JN):
            loaded = tl.load(part + jn * step, mask, other=0.0, cache_modifier=".cg")
            total += (acc[jn] + loaded,)
        acc = total
        part += size
    return acc


@triton.jit
def finish(acc, y, bias, m, n, mask, N, n_offset: tl.constexpr, BIAS: tl.constexpr):
    """Write the accumulators, plus bias, to their columns of y [M, N]."""
    for jn in tl.static_range(len(n_offset)):
        column = n + n_offset[jn]
        total = acc[jn]
        if BIAS:
            total += tl.load(bias + column).to(tl.float32)[:, None]
        at = m[None, :].to(tl.int64) * N + column[:, None]
        tl.store(y + at, total.to(y.dtype.element_ty), mask)


@dataclass(frozen=True)
class Tile:
    """What a program of `gemm_kernel` computes, and how it is compiled."""

    BM: int
    BN: int  # word rows along n: a tile covers BN * len(n.shift) columns
    BK: int  # word rows along k
    warps: int
    stages: int
    programs: int  # that the work is divided into
    registers: int | None = None  # of a thread, at most


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
def _counters(device: torch.device, stream: int) -> torch.Tensor:
    """Arrivals at each shared job; a launch leaves them zero, so those of a stream share one."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


@cache
def multiprocessors() -> int:
    """Of the current GPU; 2 under the interpreter."""
    return (
        torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 2
    )


def choose(own: Codes, M: int, g: int) -> Tile:
    """The tile for M rows: a small table, measured (benchmarks/gemm_h200.md).

    What matters is JN, the accumulators a word feeds, and how many rows of x there are.
    """
    JN, JK = len(own.n.offset), len(own.k.offset)
    BM = 8 if M <= 8 else min(32 if JN > 2 else 64, triton.next_power_of_2(M))
    BN, warps, resident, registers = 64, 4, 2, None
    if JN > 2:
        BN = 32 if BM == 16 and own.n.words < 1024 else 64
        warps, resident = (8, 1) if BM > 16 else (4, 2)
    elif BM == 8:
        warps, resident = 2, 4 if JN == 2 else 5
    elif JN == 1:
        BN = 128
        warps, resident, registers = (8, 1, None) if BM > 16 else (4, 3, 168)
    BK = max(16, 128 // JK) if (BN, BM, JK) != (64, 16, 1) else 64
    while BK > 16 and not folds(own.k, BK, g):
        BK //= 2
    return Tile(BM, BN, BK, warps, 3, resident * multiprocessors(), registers)


def launch(
    x: torch.Tensor,
    packed: Mapping[str, torch.Tensor],
    own: Plan,
    tile: Tile,
    bias: torch.Tensor | None = None,
    blocks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arrange x and multiply. `blocks` int32 [row blocks, 3]: expert, first row, end row."""
    (M, _), N, device = x.shape, own.linear.N, x.device
    k, n = own.codes.k, own.codes.n
    words = packed[own.q.suffix].view(torch.int32)
    zeros, scales = packed[own.z.suffix], packed[own.s.suffix]
    zeros = zeros.view(torch.uint8) if own.z.coded else zeros
    chunks = triton.cdiv(k.words, tile.BK)
    span = tile.BK * len(k.offset)
    arranged = torch.empty(M, chunks * span, dtype=x.dtype, device=device)
    sums = torch.empty(chunks, M, dtype=torch.float32, device=device)
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    chain = nvidia and torch.cuda.get_device_capability(device) >= (9, 0)
    k_index = {name: own.constants[name] for name in ("k_index", "k_offset")}
    arrange_kernel[(chunks, triton.cdiv(M, 4))](
        x.contiguous(), arranged, sums, M, k.words, own.strides["k_index_stride"], **k_index,
        BM=4, BK=tile.BK, CHAIN=chain,
    )  # fmt: skip
    jobs = triton.cdiv(n.words, tile.BN)
    jobs *= triton.cdiv(M, tile.BM) if blocks is None else len(blocks)
    per = triton.cdiv(jobs * chunks, tile.programs)
    if jobs >= 8 * tile.programs:
        per = triton.cdiv(per, chunks) * chunks
    shared = per % chunks != 0
    y = torch.empty(M, N, dtype=x.dtype, device=device)
    partial, counters = y, y
    if shared:
        sharers = min(chunks, triton.cdiv(chunks - 1, per) + 1)
        partial = torch.empty(sharers, M, N, dtype=torch.float32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        counters = _counters(device, stream)
    gemm_kernel[(triton.cdiv(jobs * chunks, per),)](
        arranged, sums, words, zeros, scales, y if bias is None else bias, y, partial, counters,
        y if blocks is None else blocks,
        M, N, k.words, n.words, own.linear.g, jobs, per,
        words.stride(0), zeros.stride(0), scales.stride(0), **own.strides, **own.constants,
        extract=extraction(x.dtype, own.q.xor) if nvidia else (),
        BM=tile.BM, BN=tile.BN, BK=tile.BK, FOLD=folds(k, tile.BK, own.linear.g),
        EVEN_K=k.words % tile.BK == 0, EVEN_N=n.words % tile.BN == 0,
        GROUPED=blocks is not None, BIAS=bias is not None, SPLIT=shared, CHAIN=chain,
        STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
        **({"launch_pdl": True} if chain else {}),
        **({"maxnreg": tile.registers} if tile.registers else {}),
    )  # fmt: skip
    return y

"""y = x @ ((q - z) * s) + bias over packed words: one kernel body, its constants from the pattern.

A program holds a tile of words [BN word rows of n, BK word rows of k] (see `address`). For each
nibble (jn, jk) of a word it forms the weight matrix of that nibble and multiplies it with the
rows of x that match: the n side of a nibble selects an accumulator, its k side a slice of x. So
words go from memory to the tensor cores without a shuffle:

    acc[jn] [BN, BM] += s[jn] * sum over jk of (q[jn, jk] - z[jn]) [BN, BK] @ x[jk]^T [BK, BM]

q - z is exact in fp16 and bf16. Where a tile lies inside one group the scale is applied once to
the fp32 sums, unless these are so many that it is cheaper to scale the weights; these are then
rounded to x's dtype, as they are where a tile holds several groups. K is split over programs, of
which the last to finish adds the fp32 parts in a fixed order, so results repeat.

Which word row is which row of the tile is free, as x is gathered and y scattered: where words that
follow each other along n are few, a tile is read in the order of its addresses and its digits are
put so that each thread's own words lie together (`Order`). A product of one to four rows of x has
columns to spare for the sums of several groups, which are then scaled together. Where a word feeds
many accumulators the warps of a program split k and not n: a tile has fewer columns, and their
sums are added within the program rather than through memory. For more rows of x than 16 four
programs read such words, each for one of their bytes.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, assignment, misc"
# (the bodies under triton.jit are Triton's language, not Python's)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from awqconv.kernels.triton.address import Codes, Line, Order, Side, codes, line, order, pairs
from awqconv.kernels.triton.tiles import Tile, folds, share
from awqconv.targets.base import Linear, Part


@triton.jit
def place(index, stride, rule: tl.constexpr):
    """`Line.__call__` for a tensor of indices."""
    at = index // rule[0] * stride
    for i in tl.static_range(1, len(rule), 3):
        at += index // rule[i] % rule[i + 1] * rule[i + 2]
    return at


@triton.jit
def start(tile, step: tl.constexpr, stride, rule: tl.constexpr):
    """`place` of the scalar tile * step, where that is what `steady` says."""
    if step % rule[0] == 0:
        at = tile * (step // rule[0]) * stride
    else:
        at = tile * step // rule[0] * stride
    for i in tl.static_range(1, len(rule), 3):
        if step % (rule[i] * rule[i + 1]) != 0:
            at += tile * step // rule[i] % rule[i + 1] * rule[i + 2]
    return at


@triton.jit
def spread(index, bits: tl.constexpr):
    """The number that has bit i of index as its bit bits[i]; index where there are no bits."""
    out = index
    if len(bits) > 0:
        out = index * 0
        for i in tl.static_range(len(bits)):
            out += ((index >> i) & 1) << bits[i]
    return out


@triton.jit
def centred(
    words, shift: tl.constexpr, xor: tl.constexpr, extract: tl.constexpr, dtype: tl.constexpr,
    byte=None,
):  # fmt: skip
    """The code at bit `shift` of each int32 word, minus 8, in fp16 or bf16; exact.

    `extract` is PTX for each of the eight nibbles (see `extraction`), or nothing. `byte`: None, or
    a tensor that says which byte of the words counts (see `bytewise`); shift is then 0 or 4 in it.
    """
    if len(extract) == 0:
        if byte is not None:
            words = words >> ((byte & 15) * 8)
        code = ((((words >> shift) & 15) ^ xor) - 8).to(tl.float32).to(dtype)
    elif byte is None:
        asm: tl.constexpr = extract[shift // 4]
        if dtype == tl.float16:
            code = tl.inline_asm_elementwise(asm, "=r,r,r", [words], tl.float16, True, 2)
        else:
            code = tl.inline_asm_elementwise(asm, "=r,r,r", [words], tl.bfloat16, True, 2)
    else:
        part: tl.constexpr = extract[16 + shift // 4]
        both = [words, byte]
        if dtype == tl.float16:
            code = tl.inline_asm_elementwise(part, "=r,r,r,r,r", both, tl.float16, True, 2)
        else:
            code = tl.inline_asm_elementwise(part, "=r,r,r,r,r", both, tl.bfloat16, True, 2)
    return code


@triton.jit
def scaled(words, shift: tl.constexpr, z, s, extract: tl.constexpr, dtype: tl.constexpr):
    """(q - z) * s of the code at bit `shift` of each word, rounded once. z less 8, s of dtype."""
    asm: tl.constexpr = extract[8 + shift // 4]
    high: tl.constexpr = dtype == tl.float16 and shift % 8 != 0
    base: tl.constexpr = 136 if dtype == tl.bfloat16 else 72 if high else 1032
    less, s = (-base - z).to(dtype), s.to(dtype)
    if dtype == tl.float16:
        out = tl.inline_asm_elementwise(asm, "=r,r,r,r,r", [words, less, s], tl.float16, True, 2)
    else:
        out = tl.inline_asm_elementwise(asm, "=r,r,r,r,r", [words, less, s], tl.bfloat16, True, 2)
    return out


@triton.jit
def nought(SLICES: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """Sums to begin with: zeros [BN, BM], or for each of several slices."""
    out = tl.zeros((BN, BM), tl.float32)
    if SLICES > 1:
        out = tl.zeros((SLICES, BN, BM), tl.float32)
    return out


@triton.jit
def along(values, BK: tl.constexpr):
    """Numbers [BN, groups] repeated along BK word rows, as many to each group: [BN, BK]."""
    BN: tl.constexpr = values.shape[0]
    GROUPS: tl.constexpr = values.shape[1]
    return tl.reshape(tl.broadcast_to(values[:, :, None], (BN, GROUPS, BK // GROUPS)), (BN, BK))


@triton.jit
def joined(tiles):
    """Tensors [...] as one [..., 2, 2, 2], a bit of the tensor's number in each; one as it is."""
    number: tl.constexpr = len(tiles)
    for halving in tl.static_range(1, 4):
        if number >> halving > 0:
            pairs = ()
            for i in tl.static_range(number >> halving):
                pairs += (tl.join(tiles[i], tiles[i + (number >> halving)]),)
            tiles = pairs
    return tiles[0]


@triton.jit
def across(acc):
    """Accumulators [slices, BN, BM] summed over slices: one exchange between warps for all."""
    SLICES: tl.constexpr = acc[0].shape[0]
    BN: tl.constexpr = acc[0].shape[1]
    BM: tl.constexpr = acc[0].shape[2]
    number: tl.constexpr = len(acc)
    out = tl.permute(tl.reshape(joined(acc), (SLICES, BN * BM * number)), 1, 0)
    for halving in tl.static_range(1, 4):
        if SLICES >> halving > 0:
            a, b = tl.split(tl.reshape(out, (BN * BM * number, SLICES >> halving, 2)))
            out = a + b
    flat = (tl.reshape(out, (BN * BM * number,)),)
    for halving in tl.static_range(3):
        if number >> halving > 1:  # the lowest bit of jn first
            even, odd = (), ()
            for i in tl.static_range(1 << halving):
                a, b = tl.split(tl.reshape(flat[i], (BN * BM * (number >> (halving + 1)), 2)))
                even += (a,)
                odd += (b,)
            flat = even + odd
    out = ()
    for i in tl.static_range(number):
        out += (tl.reshape(flat[i], (BN, BM)),)
    return out


@triton.jit
def beside(tiles):
    """One, two, four or eight matrices [BN, BK] as one [BN, number * BK]; one of any shape."""
    BN: tl.constexpr = tiles[0].shape[0]
    BK: tl.constexpr = tiles[0].shape[1]
    number: tl.constexpr = len(tiles)
    out = joined(tiles)
    if number == 2:
        out = tl.permute(out, 0, 2, 1)
    elif number == 4:
        out = tl.permute(out, 0, 2, 3, 1)
    elif number == 8:
        out = tl.permute(out, 0, 2, 3, 4, 1)
    if number > 1:
        out = tl.reshape(out, (BN, number * BK))
    return out


@triton.jit
def shifted(product, z, s, total):
    """The sums of (q - z) * s * x [..., BN, BM] from those of q * x and the totals of x."""
    return (product - tl.expand_dims(z, -1) * total) * tl.expand_dims(s, -1)


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
    """PTX of `centred`, a text for each nibble: 16 codes of two words in about 20 instructions;
    then the same of `scaled`, then of `centred` the two nibbles of a byte that $3 selects.

    The codes of both words at one nibble are or-ed into the mantissas of a pair of numbers, which
    then hold 1024 + q, or 1024 + 16 q for every second nibble (bfloat16: 128 + q).
    """
    plain, times, chosen = [], [], []
    for nibble in range(8):
        halves = "0x5410" if nibble < 4 else "0x7632"  # the lower or the upper half of both words
        shift, low = nibble % 4 * 4, 0
        if dtype == torch.float16:
            shift, low = nibble % 4 // 2 * 8, nibble % 2 * 4
        mask, magic = 15 << low, (0x4300 if dtype == torch.bfloat16 else 0x6400) ^ xor << low
        text = (
            f"{{ .reg .b32 t, a, c; prmt.b32 t, $1, $2, {halves}; shr.u32 t, t, {shift}; "
            f"lop3.b32 t, t, {mask * 0x10001:#x}, {magic * 0x10001:#x}, 0x6a; "  # t & mask ^ magic
        )
        if dtype == torch.bfloat16:  # t * 1 - 136
            text += "mov.b32 a, 0x3f803f80; "
            add, less, times_s = "fma.rn.bf16x2", "t, a, c", "fma.rn.bf16x2 $0, t, $4, a"
            constant, zero = "0xc308c308", "mov.b32 a, 0x80008000; "
        elif low:  # t / 16 - 72
            text += "mov.b32 a, 0x2c002c00; "
            add, less, times_s = "fma.rn.f16x2", "t, a, c", "mul.f16x2 $0, t, $4"
            constant, zero = "0xd480d480", ""
        else:  # t - 1032
            add, less, times_s, constant, zero = (
                "add.f16x2", "t, c", "mul.f16x2 $0, t, $4", "0xe408e408", ""
            )  # fmt: skip
        plain.append(f"{text}mov.b32 c, {constant}; {add} $0, {less}; }}")
        if nibble < 2:
            chosen.append(plain[nibble].replace(halves, "$3"))
        times.append(f"{text}mov.b32 c, $3; {add} t, {less}; {zero}{times_s}; }}")
    return (*plain, *times, *chosen)


@triton.jit
def arrange_kernel(
    x, out, sums, takes, M, k_words, k_index_stride, k_index: tl.constexpr,
    k_offset: tl.constexpr, k_bits: tl.constexpr, numbers: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """x [M, K] to out [M, chunks, jk, BK], zero beyond K, and its sums float32 [chunks, M].

    `numbers`, if any, to `takes`: so that the GEMM has them in memory (see there) on any stream.
    """
    if CHAIN:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    JK: tl.constexpr = len(k_offset)
    chunk = tl.program_id(0)
    if (chunk == 0) & (tl.program_id(1) == 0):
        for i in tl.static_range(len(numbers)):
            tl.store(takes + i, numbers[i])
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    row = chunk * BK + spread(tl.arange(0, BK), k_bits)
    mask = (m < M)[:, None] & (row < k_words)[None, :]
    k = place(row, k_index_stride, k_index)
    x += m[:, None].to(tl.int64) * (k_words * JK) + k[None, :]
    out += m[:, None].to(tl.int64) * (tl.num_programs(0) * JK * BK) + chunk * JK * BK
    values = ()  # loaded before any is stored: a load after a store would wait for it
    for jk in tl.static_range(JK):
        values += (tl.load(x + k_offset[jk], mask, other=0.0),)
    total = tl.zeros((BM, BK), tl.float32)
    for jk in tl.static_range(JK):
        total += values[jk].to(tl.float32)
        tl.store(out + jk * BK + tl.arange(0, BK)[None, :], values[jk], (m < M)[:, None])
    tl.store(sums + chunk * M + m, tl.sum(total, 1), m < M)


@triton.jit
def columns(n, zn_stride, sn_stride, zn: tl.constexpr, sn: tl.constexpr, z_form: tl.constexpr,
            n_offset: tl.constexpr):  # fmt: skip
    """Where zero points and scales of columns n lie, for every jn, in elements."""
    z_at, s_at = (), ()
    for jn in tl.static_range(len(n_offset)):
        z_at += (place(n + n_offset[jn], zn_stride, zn),)
        s_at += (place(n + n_offset[jn], sn_stride, sn),)
    return z_at, s_at


@triton.jit
def fetch(zeros, scales, group, z_at, s_at, zg_stride, sg_stride, zg: tl.constexpr,
          sg: tl.constexpr, z_form: tl.constexpr, s_form: tl.constexpr):  # fmt: skip
    """Zero points and scales as stored, of groups and columns, for every jn: z, s, z, s, ...

    Several columns that lie in one 32-bit word (see `gathered`) are one load.
    """
    z_group = place(group, zg_stride, zg)
    s_group = place(group, sg_stride, sg)
    z_step: tl.constexpr = z_form[3]
    s_step: tl.constexpr = s_form[0]
    out = ()
    for jn in tl.static_range(len(z_at)):
        if jn % z_step != 0:
            out += (out[2 * (jn - jn % z_step)],)
        elif z_form[0] and z_step > 1:  # whole words from group to group
            out += (tl.load(zeros + ((z_at[jn] >> 3) + (z_group >> 3))),)
        elif z_form[0] or z_step > 1:  # whole bytes
            out += (tl.load(zeros + ((z_at[jn] >> 1) + (z_group >> 1))),)
        else:
            out += (tl.load(zeros + (z_at[jn] + z_group)),)
        if jn % s_step != 0:
            out += (out[2 * (jn - jn % s_step) + 1],)
        elif s_step > 1:
            out += (tl.load(scales + ((s_at[jn] >> 1) + (s_group >> 1))),)
        else:
            out += (tl.load(scales + (s_at[jn] + s_group)),)
    return out


@triton.jit
def half(pair, index: tl.constexpr, dtype: tl.constexpr):
    """The lower or the upper half of int32 words, as a number of 16 bits, in float32."""
    return (pair >> (16 * index)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def decode(stored, z_at, z_form: tl.constexpr, s_form: tl.constexpr, z_first=0):
    """What `fetch` returned as float32, zero points less 8.

    `z_form`: (coded, xor, 0, step, dtype or shifts), each zero point in the nibble of its
    position, else (not coded, sign, offset, ...). `z_first`: added to the shifts.
    """
    out = ()
    for jn in tl.static_range(len(z_at)):
        z, s = stored[2 * jn], stored[2 * jn + 1]
        if z_form[0]:
            if z_form[3] > 1:
                z = (z >> (z_form[4][jn] + z_first)) & 15
            else:
                z = (z.to(tl.int32) >> ((z_at[jn] & 1) * 4)) & 15
            z = (z ^ z_form[1]).to(tl.float32) - 8
        else:
            if z_form[3] > 1:
                z = half(z, jn % 2, z_form[4])
            z = z.to(tl.float32) * z_form[1] - (z_form[1] * z_form[2] + 8)
        if s_form[0] > 1:
            s = half(s, jn % 2, s_form[1])
        out += (z, s.to(tl.float32))
    return out


@triton.jit(do_not_specialize=["M", "jobs", "per"])
def gemm_kernel(
    x, sums, words, zeros, scales, bias, y, partial, counters, blocks, takes,
    M, N, k_words, n_words, g, jobs, per,
    words_expert, zeros_expert, scales_expert,
    k_word_stride, n_word_stride, k_index_stride, n_index_stride,
    zg_stride, zn_stride, sg_stride, sn_stride,
    k_word: tl.constexpr, k_index: tl.constexpr, k_shift: tl.constexpr, k_offset: tl.constexpr,
    n_word: tl.constexpr, n_index: tl.constexpr, n_shift: tl.constexpr, n_offset: tl.constexpr,
    zg: tl.constexpr, zn: tl.constexpr, z_form: tl.constexpr, sg: tl.constexpr, sn: tl.constexpr,
    s_form: tl.constexpr, xor: tl.constexpr, extract: tl.constexpr,
    digits: tl.constexpr, shape: tl.constexpr, axes: tl.constexpr,
    n_bits: tl.constexpr, k_bits: tl.constexpr,
    BM: tl.constexpr, SLOTS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SLICES: tl.constexpr, STEPS: tl.constexpr, TAKERS: tl.constexpr,
    GROUPS: tl.constexpr, PER: tl.constexpr, WEIGH: tl.constexpr,
    EXACT: tl.constexpr, FOLD: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    STEADY: tl.constexpr, AHEAD: tl.constexpr, JOIN: tl.constexpr,
    GROUPED: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, CHAIN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`per` chunks of SLICES or STEPS times BK word rows, of one or more jobs: one tile of y each.

    x [M, chunks, slices, jk, BK] and its sums [chunks, slices, M] as `arrange_kernel` leaves them.
    STEPS loads of words, one after the other, make a chunk: where k has no nibbles, jk = 1.
    TAKERS: jobs that read the same words, each for the byte that `takes` names (see `bytewise`).
    Each constexpr line (outer, *inner) goes with its stride argument. Where GROUPED `blocks` is
    int32 [row blocks, 3]: expert, first row, end row. SPLIT: some job is done by several programs.
    FOLD: a slice lies in one group, so fp32 sums are scaled and not the weights, or it has GROUPS
    parts that do, of BK / GROUPS word rows; PER such parts make a group. WEIGH: scale the weights
    all the same. EXACT: scales have x's dtype.
    Slices are multiplied side by side, each by a warp, and their sums added at the end.
    A product has SLOTS * BM columns, the rows of x once for each of SLOTS chunks and zero but for
    the chunk at hand: few rows then keep the sums of several groups apart until they are scaled.
    """
    JK: tl.constexpr = len(k_shift)
    JN: tl.constexpr = len(n_shift)
    WIDE: tl.constexpr = BM * SLOTS
    PIECES: tl.constexpr = JK // JOIN
    DIRECT: tl.constexpr = FOLD and not WEIGH and SLOTS == 1 and PIECES * STEPS == 1
    PARTS: tl.constexpr = SLICES * GROUPS
    dtype: tl.constexpr = x.dtype.element_ty
    chunks = tl.cdiv(k_words, SLICES * STEPS * BK)
    row_blocks = jobs // (tl.cdiv(n_words, BN) * TAKERS)
    last_group = (k_words * JK - 1) // g
    begin = tl.program_id(0) * per
    stop = tl.minimum(begin + per, jobs * chunks)
    if CHAIN:
        tl.extra.cuda.gdc_wait()
    for job in range(begin // chunks, tl.cdiv(stop, chunks)):
        row, end = job % row_blocks * BM, M
        words_job, zeros_job, scales_job = words, zeros, scales
        if GROUPED:
            expert = tl.load(blocks + job % row_blocks * 3).to(tl.int64)
            row = tl.load(blocks + job % row_blocks * 3 + 1)
            end = tl.load(blocks + job % row_blocks * 3 + 2)
            words_job += expert * words_expert
            zeros_job += expert * zeros_expert
            scales_job += expert * scales_expert
        # Column c of a product is row c % BM of x, of the chunk of slot c // BM.
        column = tl.arange(0, WIDE)
        slot = column // BM
        column = row + column % BM
        column_in = column < end
        taker = job // row_blocks % TAKERS
        n_tile = job // row_blocks // TAKERS
        n_first = n_tile * BN
        n_row = n_first + spread(tl.arange(0, BN), n_bits)
        n_in = n_row < n_words
        n_row_in = n_row if EVEN_N else tl.minimum(n_row, n_words - 1)
        n = place(n_row_in, n_index_stride, n_index)
        byte, z_first = None, 0
        if TAKERS > 1:
            # A tensor that was loaded may be computed with in the layout of a product's operand.
            byte = tl.load(takes + taker + tl.zeros((BN, 1), tl.int32))
            n += tl.load(takes + TAKERS + taker)
            z_first = tl.load(takes + 2 * TAKERS + taker)
        words_n = words_job + place(n_row_in, n_word_stride, n_word)[:, None]
        k_tile = spread(tl.arange(0, BK), k_bits)[None, :]
        x_rows = x + column[None, :].to(tl.int64) * (chunks * SLICES * STEPS * JK * BK)
        x_rows += tl.arange(0, JOIN * BK)[:, None]
        part_of = 0
        if SLICES > 1:
            part_of = tl.arange(0, SLICES)[:, None]
            k_tile += part_of[:, :, None] * BK
            x_rows += part_of[:, :, None] * (JK * BK)
        elif GROUPS > 1:
            part_of = tl.arange(0, GROUPS)[None, :]
        if len(digits) > 0:
            t = tl.arange(0, BN * BK)
            words_tile = words_job + start(n_tile, BN, n_word_stride, n_word)
            for i in tl.static_range(0, len(digits), 4):
                digit = t // digits[i] % digits[i + 1] * digits[i + 3]
                if digits[i + 2] == 1:
                    digit *= n_word_stride
                elif digits[i + 2] == 2:
                    digit *= k_word_stride
                words_tile += digit
        else:
            words_tile = words_n + place(k_tile, k_word_stride, k_word)

        first = tl.maximum(begin, job * chunks) - job * chunks
        last = tl.minimum(stop, (job + 1) * chunks) - job * chunks
        acc, parts = (), ()
        for _ in tl.static_range(JN):
            acc += (nought(SLICES, BN, WIDE),)
        for _ in tl.static_range(JN if SLOTS > 1 else 0):
            parts += (tl.zeros((BN, WIDE), tl.float32),)
        z_at, s_at = columns(n[:, None] if GROUPS > 1 else n, zn_stride, sn_stride, zn, sn, z_form,
                             n_offset)  # fmt: skip
        if AHEAD:
            group = (first * PARTS + part_of) // PER
            if PARTS > 1 and not EVEN_K:
                group = tl.minimum(group, last_group)
            stored = fetch(zeros_job, scales_job, group, z_at, s_at,
                           zg_stride, sg_stride, zg, sg, z_form, s_form)  # fmt: skip
        for chunk in tl.range(first, last, num_stages=STAGES):
            tiles = ()
            for step in tl.static_range(STEPS):
                tile = chunk * STEPS + step
                k_row = tile * (SLICES * BK) + k_tile
                if STEADY:
                    at = words_tile + start(tile, SLICES * BK, k_word_stride, k_word)
                else:
                    at = tl.minimum(k_row, k_words - 1)
                    at = words_n + place(at, k_word_stride, k_word)
                w = tl.load(at) if EVEN_K else tl.load(at, k_row < k_words, other=0)
                if len(digits) > 0:
                    w = tl.reshape(w, shape)
                    w = tl.permute(
                        w, axes[0], axes[1], axes[2], axes[3], axes[4], axes[5], axes[6], axes[7]
                    )
                    w = tl.reshape(w, (BN, BK))
                tiles += (w,)
            x_in = column_in
            if SLOTS > 1:
                x_in = column_in & (slot == (chunk - first) % SLOTS)
            if FOLD and SLOTS == 1:
                # Fetch the next chunk's numbers while this one is multiplied.
                ahead = tl.minimum(chunk + 1, last - 1) if AHEAD else chunk
                group = (ahead * PARTS + part_of) // PER
                if PARTS > 1 and not EVEN_K:
                    group = tl.minimum(group, last_group)
                after = fetch(zeros_job, scales_job, group, z_at, s_at,
                              zg_stride, sg_stride, zg, sg, z_form, s_form)  # fmt: skip
                zs = decode(stored if AHEAD else after, z_at, z_form, s_form, z_first)
                products = acc
                if not WEIGH:
                    products = ()
                    for _ in tl.static_range(JN):
                        products += (nought(SLICES, BN, WIDE),)
                    total = sums + (chunk * SLICES + part_of) * M + column
                    total = tl.expand_dims(tl.load(total, column_in, other=0.0), -2)
            elif FOLD:
                products = parts
            else:
                products = acc
            for piece in tl.static_range(STEPS * PIECES):
                w = tiles[piece // PIECES]
                xt = x_rows + (chunk * (SLICES * STEPS * JK) + piece * JOIN) * BK
                xt = tl.load(xt, x_in[None, :], other=0.0)
                added = ()
                for jn in tl.static_range(JN):
                    weights = ()
                    for jk in tl.static_range(piece % PIECES * JOIN, piece % PIECES * JOIN + JOIN):
                        if FOLD and not WEIGH:
                            weight = centred(
                                w, k_shift[jk] + n_shift[jn], xor, extract, dtype, byte
                            )
                        else:
                            if GROUPS > 1:
                                z, s = along(zs[2 * jn], BK), along(zs[2 * jn + 1], BK)
                            elif FOLD:
                                z = tl.expand_dims(zs[2 * jn], -1)
                                s = tl.expand_dims(zs[2 * jn + 1], -1)
                            else:
                                group = tl.minimum(k_row, k_words - 1)
                                group = place(group, k_index_stride, k_index) + k_offset[jk]
                                column_n = n[:, None] + n_offset[jn]
                                z2_at = (place(column_n, zn_stride, zn),)
                                s2_at = (place(column_n, sn_stride, sn),)
                                each = fetch(
                                    zeros_job, scales_job, group // g, z2_at, s2_at,
                                    zg_stride, sg_stride, zg, sg, z_form, s_form,
                                )  # fmt: skip
                                z, s = decode(each, z2_at, z_form, s_form)
                            if len(extract) > 0 and EXACT:
                                weight = scaled(w, k_shift[jk] + n_shift[jn], z, s, extract, dtype)
                            else:
                                weight = centred(w, k_shift[jk] + n_shift[jn], xor, extract, dtype)
                                weight = ((weight.to(tl.float32) - z) * s).to(dtype)
                        weights += (weight,)
                    product = multiply(beside(weights), xt, products[jn], extract)
                    if DIRECT:
                        product = shifted(product, zs[2 * jn], zs[2 * jn + 1], total) + acc[jn]
                    added += (product,)
                products = added
            if DIRECT or WEIGH or not FOLD:
                acc = products
            elif SLOTS == 1:
                finished = ()
                for jn in tl.static_range(JN):
                    part = shifted(products[jn], zs[2 * jn], zs[2 * jn + 1], total)
                    finished += (acc[jn] + part,)
                acc = finished
            else:
                parts = products
                if ((chunk - first) % SLOTS == SLOTS - 1) | (chunk == last - 1):
                    own = chunk - (chunk - first) % SLOTS + slot
                    own_in = column_in & (own <= chunk)
                    own = tl.minimum(own, chunk)
                    total = tl.load(sums + own * M + column, own_in, other=0.0)[None, :]
                    z2_at, s2_at = columns(n[:, None], zn_stride, sn_stride, zn, sn, z_form,
                                           n_offset)  # fmt: skip
                    zs = fetch(zeros_job, scales_job, (own // PER)[None, :], z2_at, s2_at,
                               zg_stride, sg_stride, zg, sg, z_form, s_form)  # fmt: skip
                    zs = decode(zs, z2_at, z_form, s_form)
                    finished, parts = (), ()
                    for jn in tl.static_range(JN):
                        part = products[jn] - zs[2 * jn] * total
                        finished += (acc[jn] + part * zs[2 * jn + 1],)
                        parts += (tl.zeros((BN, WIDE), tl.float32),)
                    acc = finished
            if AHEAD:
                stored = after

        if SLICES > 1:
            acc = across(acc)
        if SLOTS > 1:
            whole = ()
            for jn in tl.static_range(JN):
                whole += (tl.sum(tl.reshape(acc[jn], (BN, SLOTS, BM)), 1),)
            acc = whole
        m = row + tl.arange(0, BM)
        # Programs that share this job: the one that starts it, and each multiple of `per` inside.
        before = job * chunks // per
        sharers = (job * chunks + chunks - 1) // per - before + 1
        mask = n_in[:, None] & (m < end)[None, :]
        if SPLIT:
            if sharers == 1:
                finish(acc, y, bias, m, n, mask, N, n_offset, BIAS)
            else:
                # Parts lie [sharer, m, jn, word row]: the order of acc, whatever the order of n.
                row_of = n_first + taker * JN * n_words + tl.arange(0, BN)
                part = partial + m[None, :].to(tl.int64) * N + row_of[:, None]
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


HALVES = {"F16": tl.float16, "BF16": tl.bfloat16}


def gathered(part: Part, across: Line, down: Line, n: Side) -> tuple[Any, Any]:
    """How many columns of a word row lie in one aligned 32-bit word, and how to take them apart:
    the shift of each jn, or the dtype of two numbers. (1, 0) where every column is a load."""
    at = [[across(n.index(i) + o) for o in n.offset] for i in range(min(n.words, 256))]
    even = [down.stride, *down.inner[2::3]]
    if part.coded:
        shifts = [a % 8 for a in at[0]]
        same = all([a % 8 for a in row] == shifts and len({a // 8 for a in row}) == 1 for row in at)
        if len(n.offset) > 1 and same and all(step % 8 == 0 for step in even):
            return len(n.offset), tuple(4 * shift for shift in shifts)
    elif part.dtype in HALVES and len(n.offset) > 1:
        pairs = [(a, b) for row in at for a, b in zip(row[0::2], row[1::2], strict=True)]
        if all(a % 2 == 0 and b == a + 1 for a, b in pairs) and all(s % 2 == 0 for s in even):
            return 2, HALVES[part.dtype]
    return 1, 0


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
        "z_form": (
            *((1, z.xor, 0) if z.coded else (0, z.sign, z.offset)),
            *gathered(z, lines["zn"], lines["zg"], own.n),
        ),
        "s_form": gathered(s, lines["sn"], lines["sg"], own.n),
        "xor": own.xor,
    }
    strides = {f"{name}_stride": at.stride for name, at in lines.items()}
    return Plan(linear, q, z, s, own, constants, strides)


@cache
def bytewise(own: Plan) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Constants for programs that take a byte of each word, and the numbers that tell them apart.

    The numbers, of each byte: b * 0x1111 + 0x4400, with which PTX's prmt puts byte b of two words
    into the halves of one; the column of its first code; where its zero points' shifts begin.
    """
    n, bytes_ = own.codes.n, pairs(own.codes.n)
    constants = {"n_shift": (0, 4), "n_offset": (0, bytes_[0][1] - bytes_[0][0])}
    z_first = [0] * len(bytes_)
    for name, part in (("z_form", own.z), ("s_form", own.s)):
        across, down = (line(part.layout(own.linear), dim) for dim in (1, 0))
        forms = [gathered(part, across, down, replace(n, offset=pair)) for pair in bytes_]
        if part.coded and all(count > 1 for count, _ in forms):
            z_first = [shifts[0] for _, shifts in forms]
            forms = [(count, tuple(s - shifts[0] for s in shifts)) for count, shifts in forms]
        form = forms[0] if len(set(forms)) == 1 else (1, 0)
        constants[name] = (*own.constants[name][:3], *form) if name == "z_form" else form
    selectors = (b * 0x1111 + 0x4400 for b in range(len(bytes_)))
    return constants, (*selectors, *(first for first, _ in bytes_), *z_first)


def steady(at: Line, step: int) -> bool:
    """Whether the offset of every multiple of `step` plus less than it is the sum of both's."""
    digits = [(d, d * n) for d, n in zip(at.inner[0::3], at.inner[1::3], strict=True)]
    return all(
        low % step == 0 or (step % low == 0 and (high % step == 0 or step % high == 0))
        for low, high in [*digits, (at.outer, step * at.outer)]
    )


@cache
def _counters(device: torch.device, stream: int) -> torch.Tensor:
    """Arrivals at each shared job; a launch leaves them zero, so those of a stream share one."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


STAGES = 3  # chunks on their way


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
    step = tile.slices * tile.steps * tile.BK  # word rows of a chunk
    chunks = triton.cdiv(k.words, step)
    rows = tile.steps * tile.BK  # of a slice
    span = rows * len(k.offset)
    arranged = torch.empty(M, chunks * tile.slices * span, dtype=x.dtype, device=device)
    totals = torch.empty(chunks * tile.slices, M, dtype=torch.float32, device=device)
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    chain = nvidia and torch.cuda.get_device_capability(device) >= (9, 0)
    k_index = {name: own.constants[name] for name in ("k_index", "k_offset")}
    pdl = {"launch_pdl": True} if chain else {}
    registers = {"maxnreg": tile.registers} if nvidia and tile.registers else {}
    even_k, even_n = k.words % step == 0, n.words % tile.BN == 0
    words_order, even = None, even_k and even_n
    if tile.by_address and even and steady(n.word, tile.BN) and steady(k.word, tile.BK):
        words_order = order(own.codes, tile.BN, tile.BK, deep=16 * tile.warps < tile.BN)
    words_order = words_order or Order((), (), (), (), ())
    fold = folds(k, rows // tile.groups, own.linear.g)
    constants, numbers, takes = own.constants, (), totals
    if tile.takers > 1:
        taken, numbers = bytewise(own)
        constants = constants | taken
        takes = torch.empty(len(numbers), dtype=torch.int32, device=device)
    arrange_kernel[(chunks * tile.slices, triton.cdiv(M, 4))](
        x.contiguous(), arranged, totals, takes, M, k.words, own.strides["k_index_stride"],
        **k_index, k_bits=words_order.k_bits, numbers=numbers, BM=4, BK=rows, CHAIN=chain,
        num_warps=1, **pdl,
    )  # fmt: skip
    z_form, s_form = constants["z_form"], constants["s_form"]
    if not fold:
        z_form, s_form = (*z_form[:3], 1, 0), (1, 0)
    if z_form[3] > 1:
        zeros = zeros.view(torch.int32)
    elif own.z.coded:
        zeros = zeros.view(torch.uint8)
    if s_form[0] > 1:
        scales = scales.view(torch.int32)
    jobs = triton.cdiv(n.words, tile.BN) * tile.takers
    jobs *= triton.cdiv(M, tile.BM) if blocks is None else len(blocks)
    per = share(jobs, chunks, tile)
    shared = per % chunks != 0
    y = torch.empty(M, N, dtype=x.dtype, device=device)
    partial, counters = y, y
    if shared:
        sharers = min(chunks, triton.cdiv(chunks - 1, per) + 1)
        partial = torch.empty(sharers, M, N, dtype=torch.float32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        counters = _counters(device, stream)
    gemm_kernel[(triton.cdiv(jobs * chunks, per),)](
        arranged, totals, words, zeros, scales, y if bias is None else bias, y, partial, counters,
        y if blocks is None else blocks, takes,
        M, N, k.words, n.words, own.linear.g, jobs, per,
        words.stride(0), zeros.stride(0), scales.stride(0), **own.strides,
        **constants | {"z_form": z_form, "s_form": s_form},
        extract=extraction(x.dtype, own.q.xor) if nvidia else (),
        BM=tile.BM, SLOTS=tile.slots, BN=tile.BN, BK=tile.BK, SLICES=tile.slices,
        STEPS=tile.steps, TAKERS=tile.takers, GROUPS=tile.groups,
        PER=own.linear.g * tile.groups // span if fold else 1,
        WEIGH=tile.weigh, EXACT=packed[own.s.suffix].dtype == x.dtype, FOLD=fold,
        digits=words_order.digits, shape=words_order.shape, axes=words_order.axes,
        n_bits=words_order.n_bits, k_bits=words_order.k_bits, EVEN_K=even_k, EVEN_N=even_n,
        JOIN=tile.join, STEADY=steady(k.word, tile.slices * tile.BK),
        AHEAD=fold and tile.slots == 1 and len(constants["n_offset"]) <= 2,
        GROUPED=blocks is not None, BIAS=bias is not None, SPLIT=shared, CHAIN=chain,
        STAGES=STAGES, num_warps=tile.warps, num_stages=STAGES,
        **pdl, **registers,
    )  # fmt: skip
    return y

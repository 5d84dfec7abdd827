"""What one program of the GEMM kernel computes: the tile for a layout and a number of rows.

How a tile is worked on is said where the kernel is (`gemm`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton

from awqconv.kernels.triton.address import Codes, Side, pairs

REGISTERS = 65536  # of an NVIDIA multiprocessor


@dataclass(frozen=True)
class Tile:
    """What a program of `gemm_kernel` computes, and how it is compiled."""

    BM: int  # rows of x
    BN: int  # word rows along n: a tile covers BN * len(n.shift) columns
    BK: int  # word rows along k
    warps: int
    resident: int  # programs that share a multiprocessor
    slots: int = 1  # chunks whose sums a product keeps apart, each in BM columns of its own
    join: int = 1  # nibbles along k that one product takes
    by_address: bool = False  # load words in the order of their addresses (see `Order`)
    slices: int = 1  # of BK word rows each, that a chunk consists of: as many as warps, or one
    steps: int = 1  # loads of BK word rows each, that a chunk consists of where k has no nibbles
    takers: int = 1  # programs that read the same words: one, or four for a byte each
    groups: int = 1  # that BK word rows lie in
    weigh: bool = False  # scale weights, not sums

    @property
    def programs(self) -> int:
        """That the work is divided into."""
        return self.resident * multiprocessors()

    @property
    def registers(self) -> int | None:
        """Of a thread, so that `resident` programs fit; None where any number does."""
        most = REGISTERS // (32 * self.warps * self.resident)
        return most if most < 255 else None


@cache
def folds(side: Side, BK: int, g: int) -> bool:
    """Whether every BK word rows along k hold one range of k inside one group."""
    span = BK * len(side.offset)
    whole = BK % side.run == 0 or side.run % BK == 0
    last = max(side.index(i) for i in range(min(BK, side.words))) + max(side.offset)
    return whole and g % span == 0 and last < span


@cache
def multiprocessors() -> int:
    """Of the current GPU; 2 under the interpreter."""
    return (
        torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 2
    )


def choose(own: Codes, M: int, g: int, slots: bool = True) -> Tile:
    """The tile for M rows: a small table, measured (benchmarks/gemm_h100.md).

    What matters is JN, the accumulators a word feeds, and how many rows of x there are. `slots`:
    whether products of few rows may keep several groups apart.
    """
    JN, JK, n = len(own.n.offset), len(own.k.offset), own.n.words
    # Chunks within one group, of fewer word rows if need be, or else of several groups.
    BK = {1: 16, 2: 32}.get(JN, 128 if slots and M <= 4 else 64)
    least = BK if JN == 1 else 16 if M > 16 else 16 // JK
    fewer = [BK >> i for i in range(8) if BK >> i >= least]
    BK = next((b for b in fewer if folds(own.k, b, g)), BK)
    some = [c for c in (1, 2, 4, 8, 16) if c <= BK and (c == 1 or JN <= 2)]
    groups = next((c for c in some if folds(own.k, BK // c, g)), 1)
    BM = triton.next_power_of_2(min(M, 64))
    count = 8 // BM if slots and BM < 8 and groups == 1 and folds(own.k, BK, g) else 1
    if count == 1:
        BM = max(BM, 8 if groups == 1 else 16)
    # Words that follow each other along n in fewer than 64 bytes: a tile's rows are no long runs.
    scattered = any(own.n.word(i) != i for i in range(min(n, 16)))
    by_address = JK > 1 and own.n.word(min(1, n - 1)) == 1 and (M <= 16 or scattered)
    slices, steps, takers, weigh = 1, 1, 1, groups > 1
    if JN > 2:
        BN, warps, join, resident = 16, 4, 1, 2
        if count > 1:
            BN, warps, resident = 32, 2, 4
        elif M > 16 and pairs(own.n) and folds(own.k, 64, g):
            BN, BK, steps, takers = 64, 32, 4 if folds(own.k, 128, g) else 2, len(pairs(own.n))
        elif M > 16:
            BM, weigh = 32, True
            if M > 32 and n >= 2048:
                warps, resident = 2, 4
        slices = warps if count == takers == 1 else 1
    elif JN == 2:
        BN, warps, join, resident = 64, 4, 4, 2
        if count > 1:
            BN, warps, join, resident = 32, 1, 1 if BK > 8 else 4, 8
        elif BK < 32 and M <= 16:
            BM, resident = max(BM, 16 if BK < 16 else 8), 4
        elif M > 16 and groups == 1 and (n >= 8192 or not scattered):
            join = 1
        elif M > 16 and groups == 1:
            BM = 32
    else:
        BN, warps, join, resident = 64, 4, 8, 4
        if M <= 8 and groups == 1:
            warps, join, resident = 2, 4 if count > 1 else 8, 8
        elif M > 16:
            join, resident = 4 if groups == 1 else 8, 2
    by_address = by_address and groups == slices == 1
    join = min(join, JK)
    return Tile(
        BM, BN, BK, warps, resident, count, join, by_address, slices, steps, takers, groups, weigh
    )


def share(jobs: int, chunks: int, tile: Tile) -> int:
    """How many chunks a program does, of `jobs` times `chunks`."""
    per = -(-jobs * chunks // tile.programs)
    if jobs >= 8 * tile.programs:
        return -(-per // chunks) * chunks
    if tile.BM > 8:  # the last of those that share a job sums their parts
        per = max(per, -(-chunks // 8))
    # Somewhat more for each, where no program then has parts of two jobs.
    whole = next((d for d in range(per, chunks + 1) if chunks % d == 0), per)
    fits = 3 * whole <= 4 * per and (whole < chunks or tile.BM > 16)
    return whole if fits else per

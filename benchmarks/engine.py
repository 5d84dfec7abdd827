"""Speed of the engine beside memcpy of the same bytes, interleaved in one run.

    python benchmarks/engine.py [--shape K N] [--matrices M] [--threads T] [--repeat R]
                                [--cpu] [--json]

M matrices of K x N nibbles lie one after the other in a buffer and go to another; choose M so
that both are larger than the caches. Each thread takes its share of the matrices. Prints GB/s of
source bytes, medians, the ratio to memcpy by the same number of threads, and to the same work by
one thread alone. --cpu counts the threads' CPU time instead of time, for a machine that has other
work.
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median

import numpy as np

from awqconv.feed import TILE
from awqconv.repack import layouts
from awqconv.repack.axes import Layout
from awqconv.repack.engine import aligned, repack
from awqconv.targets.base import Linear, layout

PATTERNS = {
    "awq": layouts.AWQ,
    "rows": layouts.ROWS,
    "marlin": layouts.MARLIN,
    "amx": layouts.amx(128),
    "columns": layouts.COLUMNS,
    "gptq": layouts.GPTQ,
    "vllm_cpu": layouts.VLLM_CPU,
    "gemv_fast": layouts.GEMV_FAST,
}
PAIRS = [("awq", name) for name in PATTERNS] + [(name, "awq") for name in PATTERNS if name != "awq"]
LINE = 64


def size_of(layout: Layout) -> int:
    """Bytes that a layout takes with its padding, in whole cache lines."""
    outer = layout.axes[0]
    return -(-outer.size * outer.stored // 2 // LINE) * LINE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 14336), metavar=("K", "N"))
    parser.add_argument("--matrices", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    K, N = args.shape
    bound = {name: pattern.bind((K, N)) for name, pattern in PATTERNS.items()}
    apart = max(map(size_of, bound.values()))
    src, dst = aligned(args.matrices * apart), aligned(args.matrices * apart)
    dst[:] = 0
    src[:] = np.random.default_rng(0).integers(0, 256, src.size, dtype=np.uint8)
    weight = K * N // 2
    amx, linear = layout("amx"), Linear(K, N, 128)
    weights = amx.parts(linear)[0]
    zeros = np.random.default_rng(1).integers(0, 16, linear.shape("z"), dtype=np.uint8)
    strip = bound["amx"].axes[0].stored // 2  # bytes of 32 columns
    tile_columns = max(TILE // strip // 4, 1) * 128

    def part(buffer: np.ndarray, i: int) -> np.ndarray:
        return buffer[i * apart : (i + 1) * apart]

    shares = [range(t, args.matrices, args.threads) for t in range(args.threads)]

    def copy(thread: int) -> None:
        """The bytes of the thread's share in one call: the fastest that memcpy gets."""
        begin = sum(map(len, shares[:thread])) * weight
        end = begin + len(shares[thread]) * weight
        np.copyto(dst[begin:end], src[begin:end])

    def move(pair: tuple[str, str], thread: int) -> None:
        for i in shares[thread]:
            repack(
                part(src, i), bound[pair[0]], part(dst, i), bound[pair[1]],
                xor=8 if "rows" in pair else 0,
            )  # fmt: skip

    def compensate(thread: int) -> None:
        """Blocks and their compensation."""
        for i in shares[thread]:
            blocks = part(dst, i)[: N // 32 * strip]
            repack(part(src, i), bound["awq"], blocks, bound["amx"])
            amx.derive(weights, linear, blocks, zeros)

    def in_tiles(thread: int) -> None:
        """The same as conversion does it: some columns at a time, all to one buffer of a thread."""
        buffer = aligned(tile_columns // 32 * strip)
        for i in shares[thread]:
            for start in range(0, N, tile_columns):
                stop = min(start + tile_columns, N)
                to = weights.pattern.bind((K, stop - start))
                tile = buffer[: to.axes[0].size * strip]
                repack(part(src, i), bound["awq"].slice(1, start, stop), tile, to)
                amx.derive(weights, linear, tile, zeros[:, start:stop])

    def speed(
        pool: ThreadPoolExecutor, work: Callable[[int], None], threads: int = args.threads
    ) -> float:
        clock, share = (time.process_time, threads) if args.cpu else (time.perf_counter, 1)
        begin = clock()
        list(pool.map(work, range(threads)))
        done = sum(map(len, shares[:threads])) * weight
        return done / (clock() - begin) * share / 1e9

    jobs = {f"{a} -> {b}": partial(move, (a, b)) for a, b in PAIRS} | {
        "awq -> amx + compensation": compensate,
        "the same in tiles": in_tiles,
    }
    found = []
    if not args.json:
        print(f"{'':26}{'GB/s':>8}{'memcpy':>8}{'ratio':>8}{'x one':>8}{'compiled in ms':>16}")  # noqa: T201
    with ThreadPoolExecutor(args.threads) as pool:
        for name, work in jobs.items():
            begin = time.perf_counter()
            work(0)
            first = time.perf_counter() - begin
            begin = time.perf_counter()
            work(0)
            compiled = max(first - (time.perf_counter() - begin), 0.0)
            rounds = [
                (speed(pool, copy), speed(pool, work), speed(pool, work, 1))
                for _ in range(args.repeat)
            ]
            row = {
                "move": name,
                "gb_s": median(own for _, own, _ in rounds),
                "memcpy": median(other for other, _, _ in rounds),
                "ratio": median(own / other for other, own, _ in rounds),
                "x_one": median(own / one for _, own, one in rounds),
                "compiled_ms": compiled * 1e3,
            }
            found.append(row)
            if not args.json:
                numbers = (row[key] for key in ("gb_s", "memcpy", "ratio", "x_one"))
                text = "".join(f"{number:8.2f}" for number in numbers)
                print(f"{name:26}{text}{row['compiled_ms']:16.0f}", flush=True)  # noqa: T201
    if args.json:
        shape = {"k": K, "n": N, "matrices": args.matrices, "threads": args.threads}
        print(json.dumps(shape | {"moves": found}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()

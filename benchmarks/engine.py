"""Speed of the engine beside memcpy of the same bytes, interleaved in one run.

    python benchmarks/engine.py [--shape K N] [--matrices M] [--threads T] [--repeat R] [--json]

M matrices of K x N nibbles lie one after the other in a buffer and go to another; choose M so
that both are larger than the caches. Each thread takes its share of the matrices. Prints GB/s of
source bytes, medians, and the ratio to memcpy by the same number of threads.
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median

import numpy as np

from awqconv.repack import layouts
from awqconv.repack.axes import Layout
from awqconv.repack.engine import aligned, nibble_sums, repack

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
    """Bytes from a layout's first nibble to its last, in whole cache lines."""
    last = sum((axis.size - 1) * axis.stored for axis in layout.axes)
    return (last // 2 // LINE + 1) * LINE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 14336), metavar=("K", "N"))
    parser.add_argument("--matrices", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    K, N = args.shape
    bound = {name: pattern.bind((K, N)) for name, pattern in PATTERNS.items()}
    step = max(size_of(layout) for layout in bound.values())
    src, dst = aligned(args.matrices * step), aligned(args.matrices * step)
    dst[:] = 0
    src[:] = np.random.default_rng(0).integers(0, 256, src.size, dtype=np.uint8)
    weight = K * N // 2
    sums = np.zeros((args.threads, weight // 2048, 128), np.uint16)

    def part(buffer: np.ndarray, i: int) -> np.ndarray:
        return buffer[i * step : (i + 1) * step]

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

    def add(thread: int) -> None:
        for i in shares[thread]:
            nibble_sums(part(src, i), 2048, 32, sums[thread])

    def speed(pool: ThreadPoolExecutor, work: Callable[[int], None]) -> float:
        begin = time.perf_counter()
        list(pool.map(work, range(args.threads)))
        return args.matrices * weight / (time.perf_counter() - begin) / 1e9

    jobs = {f"{a} -> {b}": partial(move, (a, b)) for a, b in PAIRS} | {"nibble sums": add}
    found = []
    if not args.json:
        print(f"{'':20}{'GB/s':>8}{'memcpy':>8}{'ratio':>8}{'compiled in ms':>16}")  # noqa: T201
    with ThreadPoolExecutor(args.threads) as pool:
        for name, work in jobs.items():
            begin = time.perf_counter()
            work(0)
            first = time.perf_counter() - begin
            begin = time.perf_counter()
            work(0)
            compiled = max(first - (time.perf_counter() - begin), 0.0)
            pairs = [(speed(pool, copy), speed(pool, work)) for _ in range(args.repeat)]
            row = {
                "move": name,
                "gb_s": median(own for _, own in pairs),
                "memcpy": median(other for other, _ in pairs),
                "ratio": median(own / other for other, own in pairs),
                "compiled_ms": compiled * 1e3,
            }
            found.append(row)
            if not args.json:
                numbers = (row[key] for key in ("gb_s", "memcpy", "ratio"))
                text = "".join(f"{number:8.2f}" for number in numbers)
                print(f"{name:20}{text}{row['compiled_ms']:16.0f}", flush=True)  # noqa: T201
    if args.json:
        shape = {"k": K, "n": N, "matrices": args.matrices, "threads": args.threads}
        print(json.dumps(shape | {"moves": found}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()

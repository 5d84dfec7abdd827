"""Verification beside reading the converted files once, in the page cache, interleaved.

    python benchmarks/verify.py [--model llama-8b] [--layers L] [--targets T ...] [--repeat 5]
                                [--dir DIR] [--json]

Reading is by one thread into one buffer of 8 MiB. `exact` is `awqconv verify DEST --columns 0`:
integrity and exactness, against the manifest; `all` adds the products. Seconds of processes,
medians; ratios are to the reading of the same round. What no verification can do without: `start`
is an interpreter that imports what verify imports, `digest` every byte read and digested once by
as many threads as there are processors.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import measure

from awqconv.checkpoint.header import TensorInfo
from awqconv.checkpoint.source import Folder
from awqconv.feed import Reader

START = "import awqconv.cli, awqconv.verification"
PIECE = 1 << 26


def digest(folder: Path) -> float:
    """Seconds to read and digest all files once, by threads."""
    source = Folder(folder)
    reader = Reader(source)
    pieces = [
        TensorInfo(name, "U8", (), name, start, min(start + PIECE, length))
        for name, length in source.files().items()
        for start in range(0, length, PIECE)
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        began = time.perf_counter()
        list(pool.map(reader.digest, pieces))
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="llama-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument(
        "--targets", nargs="+", default=("marlin", "npu", "amx", "compressed-tensors")
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    room = Path(tempfile.mkdtemp(prefix="verify-", dir=args.dir))
    source, dest = measure.model(args.model, args.layers, args.dir or room), room / "out"
    rows: list[dict[str, Any]] = []
    try:
        for target in args.targets:
            measure.measured(measure.awqconv("convert", source, dest, "-t", target, "-q"))
            runs = []
            for _ in range(args.repeat + 1):
                measure.warm(dest)
                read = measure.warm(dest)
                one = {"read s": read, "digest s": digest(dest)}
                one["start s"] = measure.measured([sys.executable, "-c", START]).wall
                for name, columns in (("exact", 0), ("all", 64)):
                    command = measure.awqconv("verify", dest, "-q", "--columns", columns)
                    used = measure.measured(command)
                    one |= {
                        f"{name} s": used.wall,
                        f"{name} cpu s": used.cpu,
                        f"{name} ratio": used.wall / read,
                        "peak MB": used.peak / 1e6,
                    }
                runs.append(one)
            rows.append({"target": target, "GB": measure.size(dest) / 1e9}
                        | measure.medians(runs[1:]))  # fmt: skip
            if not args.json:
                print(f"# {rows[-1]}", file=sys.stderr)  # noqa: T201
            shutil.rmtree(dest)
    finally:
        shutil.rmtree(room)
    title = f"Verification of {args.model}, {args.layers or 'all'} layers, medians of {args.repeat}"
    measure.show(title, rows, args.json, model=args.model, layers=args.layers, repeat=args.repeat)


if __name__ == "__main__":
    main()

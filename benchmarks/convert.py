"""Whole conversions beside `cp -r` of the same folder, with and without syncing, interleaved.

    python benchmarks/convert.py [--model llama-8b] [--layers L] [--targets T ...] [--repeat 5]
                                 [--sync yes no] [--dir DIR] [--json]

Each is a process of its own, `awqconv convert` or `cp -r`; the source is read once before each, so
that it is in the page cache. With syncing, the copy is followed by an fsync of its files and
folder. Prints medians: seconds, processor seconds, GB/s written; the ratio of a round's
seconds to that round's copy, and the same per byte written.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import measure

TARGETS = ("marlin", "npu", "amx", "compressed-tensors")


def copy(source: Path, dest: Path, *, sync: bool) -> dict[str, float]:
    """`cp -r` and, with `sync`, the sync of the copy."""
    used = measure.measured(["cp", "-r", source, dest])
    began, before = time.perf_counter(), time.process_time()
    if sync:
        measure.sync(dest)
    return {
        "s": used.wall + time.perf_counter() - began,
        "cpu s": used.cpu + time.process_time() - before,
    }


def convert(source: Path, dest: Path, target: str, *, sync: bool) -> dict[str, float]:
    """`awqconv convert` in one process."""
    used = measure.measured(measure.awqconv("convert", source, dest, "-t", target, "-q", sync=sync))
    return {"s": used.wall, "cpu s": used.cpu, "peak MB": used.peak / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="llama-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--sync", nargs="+", choices=("yes", "no"), default=("yes", "no"))
    parser.add_argument("--dir", type=Path, help="Where the model is, or is made, and copied to.")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    room = Path(tempfile.mkdtemp(prefix="convert-", dir=args.dir))
    source = measure.model(args.model, args.layers, args.dir or room)
    dest = room / "out"
    names = ("cp -r", *args.targets)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    try:
        for _ in range(args.repeat):
            for synced in args.sync:
                for name in names:
                    measure.warm(source)
                    sync = synced == "yes"
                    one = (copy(source, dest, sync=sync) if name == "cp -r"
                           else convert(source, dest, name, sync=sync))  # fmt: skip
                    one["GB"] = measure.size(dest) / 1e9
                    found.setdefault((synced, name), []).append(one)
                    shutil.rmtree(dest)
                    os.sync()
                    if not args.json:
                        print(f"# sync {synced}, {name}: {one['s']:.2f} s", file=sys.stderr)  # noqa: T201
    finally:
        shutil.rmtree(room)
    rows: list[dict[str, Any]] = []
    for (synced, name), runs in found.items():
        copies = found[synced, "cp -r"]
        for run, other in zip(runs, copies, strict=True):
            run["GB/s"] = run["GB"] / run["s"]
            run["ratio"] = run["s"] / other["s"]
            run["per byte"] = run["ratio"] * other["GB"] / run["GB"]
        mid = measure.medians(runs)
        rows.append({"sync": synced, "what": name} | {
            key: mid.get(key, 0.0)
            for key in ("GB", "s", "cpu s", "GB/s", "ratio", "per byte", "peak MB")
        })  # fmt: skip
    title = f"{args.model}, {args.layers or 'all'} layers, medians of {args.repeat}"
    measure.show(title, rows, args.json, model=args.model, layers=args.layers, repeat=args.repeat)


if __name__ == "__main__":
    main()

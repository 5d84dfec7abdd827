"""Peak resident memory of conversions, by size of the checkpoint, target and --max-memory.

    python benchmarks/memory.py [--gb 1 4 5 16] [--targets T ...] [--limits default 200MB ...]
                                [--dir DIR] [--json]

The checkpoints are llama-1b, llama-8b and llama-70b, cut to as many layers as make the size; all
their bytes are zero, in files with holes, for memory does not depend on values. Sources and
outputs are removed when they are done with.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import measure

MODELS = {
    1: ("llama-1b", 1),
    4: ("llama-8b", 17),
    5: ("llama-70b", 2),
    16: ("llama-70b", 26),
}  # GB: model, layers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gb", type=int, nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--targets", nargs="+", default=("marlin", "npu", "amx", "compressed-tensors")
    )
    parser.add_argument("--limits", nargs="+", default=("default", "300MB", "200MB"))
    parser.add_argument("--verify", action="store_true", help="Verify each as well.")
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    room = Path(tempfile.mkdtemp(prefix="memory-", dir=args.dir))
    rows = []
    try:
        for gb in args.gb:
            source, dest = measure.model(*MODELS[gb], room, zeros=True), room / "out"
            for target in args.targets:
                for limit in args.limits:
                    command = measure.awqconv("convert", source, dest, "-t", target, "-q",
                                              sync=False)  # fmt: skip
                    more = [] if limit == "default" else ["--max-memory", limit]
                    used = measure.measured([*command, *more])
                    row = {"GB": measure.size(source) / 1e9, "target": target, "limit": limit,
                           "peak MB": used.peak / 1e6, "s": used.wall}  # fmt: skip
                    if args.verify:
                        again = measure.measured(measure.awqconv("verify", dest, "-q"))
                        row["verify peak MB"] = again.peak / 1e6
                    rows.append(row)
                    shutil.rmtree(dest)
                    if not args.json:
                        print(f"# {rows[-1]}", file=sys.stderr)  # noqa: T201
            shutil.rmtree(source)
    finally:
        shutil.rmtree(room)
    measure.show("Peak resident memory", rows, args.json)


if __name__ == "__main__":
    main()

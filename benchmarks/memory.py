"""Peak resident memory of conversions, by size of the checkpoint, target and --max-memory.

    python benchmarks/memory.py [--of 1 4 16 1b 70b] [--targets T ...] [--limits default 200MB ...]
                                [--dir DIR] [--json]

The checkpoints have the layers of llama-8b, as many as make 1, 4 and 16 GB beside a vocabulary of
32,768; or, "1b" and "70b", those of llama-1b and llama-70b. All their bytes are zero, in files with
holes, for memory does not depend on values. Sources and outputs are removed when they are done
with.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import measure

MODELS = {
    "1": ("llama-8b", 4, 32768),
    "4": ("llama-8b", 31, 32768),
    "16": ("llama-8b", 137, 32768),
    "1b": ("llama-1b", 1, None),
    "70b": ("llama-70b", 2, None),
}  # model, layers, vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--of", nargs="+", choices=MODELS, default=list(MODELS))
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
        for of in args.of:
            name, layers, vocabulary = MODELS[of]
            source = measure.model(name, layers, room, vocabulary=vocabulary, zeros=True)
            dest = room / "out"
            for target in args.targets:
                for limit in args.limits:
                    command = measure.awqconv("convert", source, dest, "-t", target, "-q",
                                              sync=False)  # fmt: skip
                    more = [] if limit == "default" else ["--max-memory", limit]
                    used = measure.measured([*command, *more])
                    row = {"of": f"{name}, {layers} layers", "GB": measure.size(source) / 1e9,
                           "target": target, "limit": limit, "peak MB": used.peak / 1e6,
                           "s": used.wall}  # fmt: skip
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

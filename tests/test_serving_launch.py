"""The commands that a conversion's summary and model card print, and what config.json must say."""

import re
import shlex
import subprocess
import sys

import pytest

from awqconv.errors import AwqconvError
from awqconv.serving.config import Quantization
from awqconv.serving.launch import launch_command
from awqconv.targets import targets

GOOD = {
    "quant_method": "awqconv", "target": "marlin", "layout_version": 1, "form": "hf", "bits": 4,
    "group_size": 128, "zero_point": True, "modules_to_not_convert": ["mlp.gate"],
    "fallback": {"a.k_proj": {"layout": "awq", "rule": "N % 64 == 0 (N = 96)"}},
}  # fmt: skip


@pytest.mark.parametrize("target", [target.name for target in targets()])
def test_every_target_has_a_command(target: str) -> None:
    found = launch_command(target, "my model", tp=2)
    assert found
    for engine, command in found:
        assert "my model" in shlex.split(command), engine
        assert ("2" in shlex.split(command)) == (engine != "transformers")


def test_shards_are_served_by_the_stock_loader() -> None:
    assert launch_command("marlin", "dest", "sglang-sharded", 4) == [
        (
            "SGLang",
            "python -m sglang.launch_server --model-path dest --tp-size 4 "
            "--load-format sharded_state",
        )
    ]


def test_what_a_folder_says() -> None:
    found = Quantization.read(GOOD)
    assert found.skips("model.layers.0.mlp.gate")
    assert found.named(found.fallback.get("a.k_proj")).name == "awq"
    assert found.named(found.fallback.get("a.q_proj")).name == "marlin"
    assert found.linear(256, 64).G == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("quant_method", "awq"), ("target", None), ("layout_version", 2), ("layout_version", None),
     ("bits", 8), ("zero_point", False), ("form", "sglang-sharded"), ("group_size", 0),
     ("group_size", None), ("modules_to_not_convert", "lm_head"), ("fallback", [])],
)  # fmt: skip
def test_what_is_not_known_is_refused(key: str, value: object) -> None:
    with pytest.raises(AwqconvError, match=re.escape(f"{key} is {value!r}")):
        Quantization.read({**GOOD, key: value})


def test_no_engine_is_imported_with_the_package() -> None:
    code = (
        "import sys, awqconv, awqconv.serving.launch, awqconv.serving.config; "
        "print([m for m in ('torch', 'transformers', 'vllm', 'sglang') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"

"""A target from a package of its own, installed as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from golden_cases import awq_inputs, cases, raw_tensors

from awqconv.checkpoint.header import build_header

EXAMPLE = Path(__file__).parents[1] / "examples/awqconv-target-example"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that the example is installed in, without a network."""
    where = tmp_path_factory.mktemp("site")
    copy = tmp_path_factory.mktemp("package")
    for file in EXAMPLE.glob("*.*"):
        (copy / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation",
               "--no-deps", "--no-index", "--target", str(where), str(copy)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the example cannot be installed here: {done.stderr.strip()[-300:]}")
    return where


def run(installed: Path, *arguments: str, module: str = "awqconv") -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(installed), str(EXAMPLE.parents[1])])
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip


def test_a_package_adds_a_target(installed, tmp_path):
    listed = run(installed, "targets")
    assert "vllm-cpu" in listed.stdout, listed.stderr
    modules = {"model.layers.0.mlp.down_proj": (128, 64, 32), "model.odd": (64, 24, 32)}
    source = make_checkpoint(tmp_path / "m", modules)
    for arguments in (
        ("convert", str(source.path), str(tmp_path / "out"), "--target", "vllm-cpu"),
        ("verify", str(tmp_path / "out"), "--source", str(source.path)),
        ("convert", str(tmp_path / "out"), str(tmp_path / "back"), "--target", "awq"),
    ):
        done = run(installed, *arguments)
        assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["target"] == "vllm-cpu"
    assert list(config["fallback"]) == ["model.odd"]
    back, was = (raw_tensors(p / "model.safetensors") for p in (tmp_path / "back", source.path))
    assert back == was
    gone = run(tmp_path, "verify", str(tmp_path / "out"))
    assert gone.returncode == 2
    assert "no target is named 'vllm-cpu'" in gone.stderr


def test_its_bytes_are_the_vendors(installed, tmp_path):
    case = "K256_N128_g128"
    given = {f"m.{n}": r for n, r in awq_inputs(case).items() if n != "bias"}
    header, places = build_header((name, r.dtype, r.shape) for name, r in given.items())
    (tmp_path / "m").mkdir()
    data = header + b"".join(given[name].data for name in places)
    (tmp_path / "m/model.safetensors").write_bytes(data)
    quant = {"quantization_config": {"quant_method": "awq", "group_size": 128}}
    (tmp_path / "m/config.json").write_text(json.dumps(quant))
    done = run(installed, "convert", str(tmp_path / "m"), str(tmp_path / "o"), "--target",
               "vllm-cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = raw_tensors(tmp_path / "o/model.safetensors")
    golden = cases("vllm_cpu_wna16")[case]
    for name in ("qweight", "qzeros", "scales"):
        assert written[f"m.{name}"] == golden[f"out/{name}"]


def test_its_own_tests_pass_there(installed):
    done = run(installed, "-q", "-p", "no:cacheprovider", str(EXAMPLE / "test_laws.py"),
               module="pytest")  # fmt: skip
    assert done.returncode == 0, done.stdout

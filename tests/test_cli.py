"""The command line as users run it: output for people, machines and nobody; exit codes; start."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from awqconv import __version__

EXAMPLE = Path(__file__).parents[1] / "examples/llama-tiny-awq"


def awqconv(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "awqconv", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "out"
    done = awqconv("convert", EXAMPLE, path, "-t", "marlin")
    assert done.returncode == 0, done.stderr
    return path, done


def test_a_conversion_tells_people_what_it_did_and_what_to_do_next(converted):
    path, done = converted
    assert f"to             {path} (marlin: NVIDIA GPUs" in done.stdout
    assert "14 of 14 to marlin" in done.stdout
    assert "14 modules converted to marlin, 0 on the fallback" in done.stdout
    assert f"Verify it: awqconv verify {path} --source {EXAMPLE}" in done.stdout
    assert "Serve it (SGLang): python -m sglang.launch_server" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr  # no colours into a pipe


def test_machines_get_one_json_value(tmp_path):
    done = awqconv("convert", EXAMPLE, tmp_path / "out", "-t", "npu", "--json")
    value = json.loads(done.stdout)
    assert (value["converted"], value["target"], value["fallbacks"]) == (14, "npu", [])
    value = json.loads(awqconv("verify", tmp_path / "out", "--json").stdout)
    assert value["ok"] is True
    assert len(value["modules"]) == 14
    value = json.loads(awqconv("inspect", EXAMPLE, "-t", "amx", "--json").stdout)
    assert (value["quantized"], value["group_size"], len(value["verdicts"])) == (14, 128, 14)
    names = [t["name"] for t in json.loads(awqconv("targets", "--json").stdout)]
    assert {"marlin", "npu", "amx", "xpu", "awq"} <= set(names)


def test_quiet_says_nothing(tmp_path):
    done = awqconv("convert", EXAMPLE, tmp_path / "out", "-t", "npu", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = awqconv("verify", tmp_path / "out", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_on_a_terminal_there_is_a_bar(tmp_path):
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "awqconv", "convert", EXAMPLE, tmp_path / "out", "-t", "amx"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=slave,
                               env={**os.environ, "TERM": "xterm"})  # fmt: skip
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    assert b"converting" in shown
    assert b"/s" in shown


def test_dry_run_writes_nothing(tmp_path):
    source = make_checkpoint(tmp_path / "m", {"x": (192, 64, 64)}).path
    done = awqconv("convert", source, "-t", "marlin", "--dry-run")
    assert done.returncode == 0
    assert "1 stay awq: they break K % 128 == 0 (K = 192), first x" in done.stdout
    value = json.loads(awqconv("convert", source, "-t", "marlin", "--dry-run", "--json").stdout)
    assert value["modules"][0]["rule"] == "K % 128 == 0 (K = 192)"
    assert value["files"][0]["name"] == "model.safetensors"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_inspect_shows_kinds_rules_and_disagreements(tmp_path):
    source = make_checkpoint(
        tmp_path / "m",
        {f"model.layers.{i}.mlp.up_proj": (128, 64, 32) for i in range(3)},
        quant={"group_size": 64, "modules_to_not_convert": ["up_proj"]},
    ).path
    done = awqconv("inspect", source, "-t", "amx")
    assert "model.layers.*.mlp.up_proj" in done.stdout
    assert "config.json says group_size 64; by the headers it is 32 in 3 of 3" in done.stdout
    assert "modules_to_not_convert matches 3 modules that are quantized" in done.stdout
    assert "amx takes 3 of 3 modules" in done.stdout


def test_exit_codes(converted, tmp_path):
    path, _ = converted
    missing = awqconv("convert", tmp_path / "nowhere", "-t", "npu")
    assert missing.returncode == 2
    assert "error:" in missing.stderr
    assert "not there" in missing.stderr
    assert "Give the folder" in missing.stderr
    assert awqconv("convert", EXAMPLE).returncode == 2  # no target
    assert awqconv("nonsense").returncode == 2
    strict = make_checkpoint(tmp_path / "m", {"x": (192, 64, 64)}).path
    done = awqconv("convert", strict, "-t", "marlin", "--strict", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["where"] == "x"

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    report = tmp_path / "report.json"
    done = awqconv("verify", copy, "--report", report)
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    written = json.loads(report.read_text())
    assert written["ok"] is False
    assert written["problems"]
    done = awqconv("verify", path, "--report", tmp_path / "no/such/folder.json")
    assert done.returncode == 2
    assert "the report cannot be written" in done.stderr


def test_the_default_destination_lies_beside_the_model(tmp_path):
    source = make_checkpoint(tmp_path / "model").path
    assert awqconv("convert", "model", "-t", "npu", cwd=tmp_path).returncode == 0
    assert (tmp_path / "model-npu" / "awqconv.json").is_file()
    assert awqconv("convert", source / ".", "-t", "npu").returncode == 2  # it is there already


def test_version_and_help():
    assert awqconv("--version").stdout == f"awqconv {__version__}\n"
    shown = awqconv("--help").stdout
    for verb in ("inspect", "convert", "verify", "targets", "pull", "push"):
        assert verb in shown


@pytest.mark.parametrize("command", [["--help"], ["convert", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys\nfrom awqconv.cli import app\n"
        f"try: app({command!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'triton', 'numba', 'llvmlite', 'huggingface_hub', 'xxhash'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("[]")


def test_a_reader_that_goes_away_is_no_crash():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "awqconv", "targets", "--json"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr

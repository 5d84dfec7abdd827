"""Conversions of whole checkpoints: bytes, config, files, round trips, refusals, interruptions."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
from checkpoints import make_checkpoint
from golden_cases import Raw, awq_inputs, cases, raw_tensors

import awqconv
from awqconv.checkpoint import writer
from awqconv.checkpoint.header import build_header
from awqconv.checkpoint.model import KEPT
from awqconv.errors import AwqconvError, VerificationError
from awqconv.plan import parse_size
from awqconv.targets import Linear, layout, targets

NAMES = [target.name for target in targets()]

# K, N, g: granules met and not, groups of every kind, one group.
SHAPES = {
    "a": (256, 192, 32),
    "b": (384, 128, 128),
    "c": (128, 64, -1),
    "d": (192, 32, 48),
    "e": (192, 96, 96),
    "f": (512, 320, 256),
    "g": (256, 64, 64),
    "h": (64, 8, 16),
    "i": (384, 64, 192),
}


def all_tensors(path: Path) -> dict[str, Raw]:
    found: dict[str, Raw] = {}
    for file in sorted(path.glob("*.safetensors")):
        found.update(raw_tensors(file))
    return found


def golden_checkpoint(path: Path, case: str) -> None:
    """A checkpoint of one module, m, from golden AWQ tensors."""
    path.mkdir()
    given = {f"m.{name}": raw for name, raw in awq_inputs(case).items() if name != "bias"}
    header, places = build_header((name, r.dtype, r.shape) for name, r in given.items())
    (path / "model.safetensors").write_bytes(header + b"".join(given[n].data for n in places))
    groups = given["m.qzeros"].shape[0]
    quant = {"quant_method": "awq", "group_size": given["m.qweight"].shape[0] // groups}
    (path / "config.json").write_text(json.dumps({"quantization_config": quant}))


GOLDENS = [
    ("marlin", "marlin_awq", {n: n for n in ("qweight", "qzeros", "scales")}),
    ("npu", "ascend_awq", {"qweight": "weight", "qzeros": "zeros", "scales": "scales"}),
    ("amx", "amx_sgl_int4", {n: n for n in ("qweight", "qzeros", "scales")}),
    ("xpu", "xpu_int4pack",
     {"qweight": "qweight", "qzeros": "xpu_zero_points", "scales": "xpu_scales"}),
    ("compressed-tensors", "compressed_tensors_pack",
     {n: n for n in ("weight_packed", "weight_zero_point", "weight_scale", "weight_shape")}),
]  # fmt: skip


@pytest.mark.parametrize(("target", "file", "names"), GOLDENS, ids=[g[0] for g in GOLDENS])
def test_a_conversion_writes_the_vendors_bytes(tmp_path, target, file, names):
    dense = [case for case in cases(file) if case.startswith("K")]
    assert len(dense) >= 4
    for case in dense:
        golden_checkpoint(tmp_path / case, case)
        result = awqconv.convert(tmp_path / case, tmp_path / f"{case}-out", target=target)
        written = all_tensors(tmp_path / f"{case}-out")
        golden = {name.removeprefix("out/"): raw for name, raw in cases(file)[case].items()}
        if result.fallbacks:  # Ascend's bf16 weight
            assert written["m.weight"] == golden["weight"], case
            assert set(written) == {"m.weight"}
        else:
            assert {n: written[f"m.{n}"] for n in names} == {n: golden[g] for n, g in names.items()}


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("scales", ["F16", "BF16", "F32"])
def test_every_target_turns_back_to_the_sources_bytes(tmp_path, target, scales):
    source = make_checkpoint(tmp_path / "m", SHAPES, shards=4, scale_dtype=scales, bias=("a", "c"))
    awqconv.convert(source.path, tmp_path / "out", target=target, max_shard_size="40kB")
    back = awqconv.convert(tmp_path / "out", tmp_path / "back", target="awq")
    assert not back.fallbacks
    assert all_tensors(tmp_path / "back") == all_tensors(source.path)
    config, was = (json.loads((p / "config.json").read_text())
                   for p in (tmp_path / "back", source.path))  # fmt: skip
    assert config == was
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (
        source.path / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize("target", ["awq", "amx"])
@pytest.mark.parametrize("name", ["a.qweight", "b.qzeros", "c.scales", "model.norm.weight"])
def test_a_damaged_folder_is_not_converted_further(tmp_path, target, name):
    source = make_checkpoint(tmp_path / "m", SHAPES, bias=True).path
    awqconv.convert(source, tmp_path / "out", target="marlin")
    file = tmp_path / "out/model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8:start])[name]["data_offsets"]
    data[start + begin + 1] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerificationError) as caught:
        awqconv.convert(tmp_path / "out", tmp_path / "next", target=target)
    assert "its bytes are not those that were written" in caught.value.what
    assert name in caught.value.where
    assert caught.value.exit_code == 1
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize("first", ["marlin", "npu", "amx", "xpu", "compressed-tensors"])
def test_from_one_target_to_another_is_as_from_the_source(tmp_path, first):
    source = make_checkpoint(tmp_path / "m", SHAPES, bias=("a",))
    awqconv.convert(source.path, tmp_path / "first", target=first)
    for second in ("marlin", "npu", "amx", "compressed-tensors"):
        awqconv.convert(source.path, tmp_path / f"direct-{second}", target=second)
        awqconv.convert(tmp_path / "first", tmp_path / f"via-{second}", target=second)
        direct = tmp_path / f"direct-{second}"
        assert all_tensors(tmp_path / f"via-{second}") == all_tensors(direct), second


def test_other_tensors_and_bias_are_as_they_were_and_names_stay(tmp_path):
    source = make_checkpoint(tmp_path / "m", SHAPES, bias=True)
    before = all_tensors(source.path)
    for target in ("marlin", "npu"):
        awqconv.convert(source.path, tmp_path / target, target=target)
        after = all_tensors(tmp_path / target)
        rest = [name for name in before if name.split(".")[-1] not in
                ("qweight", "qzeros", "scales")]  # fmt: skip
        assert {name: after[name] for name in rest} == {name: before[name] for name in rest}
    awqconv.convert(source.path, tmp_path / "amx", target="amx")
    bias = all_tensors(tmp_path / "amx")["a.bias"]
    was = before["a.bias"].array.view("<f2")
    assert bias.dtype == "F32"
    assert np.array_equal(bias.array.view("<f4"), was.astype(np.float32))


def test_the_output_is_what_hf_tools_expect(tmp_path):
    source = make_checkpoint(tmp_path / "m", SHAPES)
    awqconv.convert(source.path, tmp_path / "out", target="marlin", max_shard_size="60kB")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    assert shards == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    total, names = 0, set()
    for shard in shards:
        with safetensors.safe_open(tmp_path / "out" / shard, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                total += tensor.nbytes
                names.add(name)
                assert index["weight_map"][name] == shard
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"]) == names
    quant = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert quant["quant_method"] == "awqconv"
    assert (quant["target"], quant["layout_version"], quant["bits"]) == ("marlin", 1, 4)
    assert quant["fallback"]["d"] == {
        "layout": "awq",
        "rule": "g in (32, 64, 128, K) (K = 192, g = 48)",
    }
    assert not list((tmp_path / "out").glob("journal*"))


def test_a_multimodal_config_keeps_its_place(tmp_path):
    source = make_checkpoint(tmp_path / "m").path
    config = json.loads((source / "config.json").read_text())
    nested = {"vision_config": {"depth": 2}, "text_config": config}
    (source / "config.json").write_text(json.dumps(nested))
    awqconv.convert(source, tmp_path / "out", target="npu")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["text_config"]["quantization_config"]["quant_method"] == "awqconv"
    assert set(written) == {"vision_config", "text_config", "transformers_weights"}
    awqconv.convert(tmp_path / "out", tmp_path / "back", target="awq")
    assert json.loads((tmp_path / "back/config.json").read_text()) == nested


def test_an_older_quant_config_file_is_understood_and_not_left_to_contradict(tmp_path):
    source = make_checkpoint(tmp_path / "m").path
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    older = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (source / "quant_config.json").write_text(json.dumps(older))
    awqconv.convert(source, tmp_path / "out", target="npu")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "awqconv"
    assert not (tmp_path / "out/quant_config.json").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scale_dtype_rounds_as_numpy_does_and_can_be_turned_back(tmp_path, dtype):
    import torch

    source = make_checkpoint(tmp_path / "m", SHAPES)
    awqconv.convert(source.path, tmp_path / "out", target="xpu", scale_dtype=dtype)
    raw = all_tensors(tmp_path / "out")["a.scales"]
    want = torch.from_numpy(source.codes["a"][2]).to(getattr(torch, dtype))
    assert raw.data == want.contiguous().view(torch.uint8).numpy().tobytes()
    kept = raw_tensors(tmp_path / "out" / KEPT)
    assert ("a.scales" in kept) == (dtype == "bfloat16")
    awqconv.convert(tmp_path / "out", tmp_path / "back", target="awq")
    assert all_tensors(tmp_path / "back") == all_tensors(source.path)


def test_tiles_strips_and_workers_do_not_change_a_byte(tmp_path, monkeypatch):
    source = make_checkpoint(tmp_path / "m", SHAPES)
    for target in NAMES:
        awqconv.convert(source.path, tmp_path / f"{target}-1", target=target, jobs=1)
    monkeypatch.setattr("awqconv.encoder.TILE", 1 << 12)
    monkeypatch.setattr("awqconv.feed.TILE", 1 << 12)
    monkeypatch.setattr("awqconv.conversion.TILE", 1 << 12)
    monkeypatch.setattr("awqconv.conversion.BASE", 1 << 40)  # no share: everything in strips
    for target in NAMES:
        awqconv.convert(source.path, tmp_path / f"{target}-2", target=target, jobs=4)
        one, two = (files(tmp_path / f"{target}-{i}") for i in (1, 2))
        assert one == two, target


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_constraints_follow_the_engines_rules():
    takes = {
        ("marlin", (128, 64, 128)): None,
        ("marlin", (128, 64, 16)): "g in (32, 64, 128, K)",
        ("marlin", (192, 64, 64)): "K % 128 == 0",
        ("marlin", (256, 96, 64)): "N % 64 == 0",
        ("npu", (256, 8, 32)): None,
        ("npu", (256, 8, 256)): "g < K",
        ("npu", (96, 8, 48)): "g % 32 == 0",
        ("npu", (65536, 8, 128)): "K <= 65535",
        ("amx", (256, 32, 256)): None,
        ("amx", (384, 32, 192)): "g <= 128 or g % 128 == 0",
        ("amx", (256, 24, 64)): "N % 32 == 0",
        ("amx", (60, 32, 30)): "g % 4 == 0",
        ("xpu", (256, 8, 256)): None,
        ("xpu", (512, 8, 512)): "g in (32, 64, 128, 256)",
    }
    for (target, (K, N, g)), rule in takes.items():
        said = layout(target).broken(Linear(K, N, g))
        assert (said is None) == (rule is None), (target, K, N, g, said)
        assert rule is None or rule in said


# --- refusals


def refused(what: str, where: str, fix: str, /, *args, **kwargs) -> None:
    with pytest.raises(AwqconvError) as caught:
        awqconv.convert(*args, **kwargs)
    assert what in caught.value.what, caught.value.what
    assert where in caught.value.where, caught.value.where
    assert fix in caught.value.fix, caught.value.fix
    assert caught.value.exit_code == 2


def test_strict_refuses_with_module_rule_and_numbers(tmp_path):
    source = make_checkpoint(tmp_path / "m", {"x": (128, 64, 32), "y": (192, 64, 64)}).path
    refused("breaks K % 128 == 0 (K = 192)", "y", "--strict", source, target="marlin", strict=True)
    assert not (tmp_path / "m-marlin").exists()
    assert not (tmp_path / "m-marlin.partial").exists()


def test_a_destination_in_use_is_refused(tmp_path):
    source = make_checkpoint(tmp_path / "m").path
    awqconv.convert(source, target="npu")
    dest = tmp_path / "m-npu"
    refused("exists", str(dest), "--overwrite", source, target="npu")
    before = files(dest)
    awqconv.convert(source, target="npu", overwrite=True)
    assert files(dest) == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("dear")
    refused("only what awqconv wrote", str(mine), "Remove it yourself", source, mine,
            target="npu", overwrite=True)  # fmt: skip
    assert (mine / "thesis.txt").read_text() == "dear"
    refused("a file is there", "thesis.txt", "another", source, mine / "thesis.txt", target="npu")


@pytest.mark.parametrize("dest", ["m", "m/inside", "."])
def test_a_destination_inside_the_source_or_around_it_is_refused(tmp_path, dest):
    source = make_checkpoint(tmp_path / "m").path
    refused("", "", "", source, tmp_path / dest, target="npu", overwrite=True)
    assert sorted(p.name for p in source.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json"]  # fmt: skip


def test_arguments_that_mean_nothing_are_refused(tmp_path):
    source = make_checkpoint(tmp_path / "m").path
    refused("no target is named 'tpu'", "", "marlin", source, target="tpu")
    refused("'5 bananas' is no size", "", "5GB", source, target="npu", max_shard_size="5 bananas")
    refused("'int4' is not known", "", "bfloat16", source, target="npu", scale_dtype="int4")
    refused("restores the scales", "", "--scale-dtype", source, target="awq", scale_dtype="float32")


@pytest.mark.parametrize(
    ("text", "value"), [("5GB", 5 * 10**9), ("1GiB", 1 << 30), ("200m", 2 * 10**8), (7, 7)]
)
def test_sizes(text, value):
    assert parse_size(text) == value


def test_two_tensors_of_one_name_are_refused(tmp_path):
    modules = {"x": (64, 8, 16), "y": (128, 64, 32)}
    source = make_checkpoint(tmp_path / "m", modules, {"x.weight": ("F16", (8, 64))}).path
    refused("have this name", "x.weight", "Rename", source, target="npu")


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    source = make_checkpoint(tmp_path / "m").path
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("awqconv.conversion.shutil.disk_usage", lambda path: usage)
    refused("bytes to write, 1,000 free", "", "Free some space", source, target="npu")
    assert not (tmp_path / "m-npu.partial").exists()


# --- interruptions


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_nothing_finished_and_the_run_goes_on(tmp_path, monkeypatch, code):
    source = make_checkpoint(tmp_path / "m", SHAPES).path
    awqconv.convert(source, tmp_path / "whole", target="amx")
    calls, real = 0, os.pwrite

    def pwrite(*args):
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(writer.os, "pwrite", pwrite)
    dest = tmp_path / "out"
    refused("no space left" if code == errno.ENOSPC else "writing failed", "out.partial",
            "run the same command again", source, dest, target="amx")  # fmt: skip
    assert not dest.exists()
    monkeypatch.undo()
    assert awqconv.convert(source, dest, target="amx").resumed > 0
    assert files(dest) == files(tmp_path / "whole")


def interrupted(source: Path, dest: Path, monkeypatch, target: str = "marlin") -> None:
    """Leave a staging folder behind, with some jobs done."""
    calls, real = 0, os.pwrite

    def pwrite(*args):
        nonlocal calls
        calls += 1
        if calls > 10:
            raise OSError(errno.EIO, "stop here")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "pwrite", pwrite)
        with pytest.raises(AwqconvError, match=r"stop here|Input/output"):
            awqconv.convert(source, dest, target=target, jobs=1)


def test_other_arguments_are_told_apart(tmp_path, monkeypatch):
    source, dest = make_checkpoint(tmp_path / "m", SHAPES).path, tmp_path / "out"
    interrupted(source, dest, monkeypatch)
    refused("another target: marlin then, npu now", "out.partial", "rm -r", source, dest,
            target="npu")  # fmt: skip
    refused("another scale dtype: keep then, float32 now", "out.partial", "rm -r", source, dest,
            target="marlin", scale_dtype="float32")  # fmt: skip
    os.utime(source / "model.safetensors", ns=(1, 1))
    refused("another source files, model.safetensors", "out.partial", "rm -r", source, dest,
            target="marlin")  # fmt: skip


def test_what_is_there_is_checked_not_trusted(tmp_path, monkeypatch):
    source, dest = make_checkpoint(tmp_path / "m", SHAPES).path, tmp_path / "out"
    awqconv.convert(source, tmp_path / "whole", target="marlin")
    interrupted(source, dest, monkeypatch)
    staged = tmp_path / "out.partial"
    done = len((staged / writer.JOURNAL).read_text().splitlines()) - 1
    assert done > 1
    shard = staged / "model.safetensors"
    data = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start] ^= 1  # in the first tensor that was finished
    shard.write_bytes(data)
    with (staged / writer.JOURNAL).open("a") as journal:
        journal.write('{"job": "model.safetensors:torn')
    (staged / "stray.txt").write_text("left by something")
    assert awqconv.convert(source, dest, target="marlin", jobs=1).resumed == done - 1
    assert files(dest) == files(tmp_path / "whole")


def test_a_source_that_changes_under_the_run_is_noticed(tmp_path, monkeypatch):
    source = make_checkpoint(tmp_path / "m", SHAPES).path
    real = writer.Staging.put

    def put(self, name, data):
        os.utime(source / "model.safetensors", ns=(1, 1))
        real(self, name, data)

    monkeypatch.setattr(writer.Staging, "put", put)
    refused("changed while it was being converted", "model.safetensors", "run the same", source,
            tmp_path / "out", target="marlin")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_second_run_on_the_same_destination_refuses(tmp_path):
    source, dest = make_checkpoint(tmp_path / "m", SHAPES).path, tmp_path / "out"
    staging = writer.Staging(dest, {"any": 1})
    refused("another awqconv is writing here", "out.partial", "Wait", source, dest, target="npu")
    staging.close()


def run_cli(*args: object, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "awqconv", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


SLOW = """
import sys, time, awqconv.checkpoint.writer as writer
real = writer.Staging.write
def write(self, *args):
    time.sleep(0.01)
    real(self, *args)
writer.Staging.write = write
from awqconv.cli import main
main()
"""


def slow_cli(*args: object) -> subprocess.Popen:
    command = [sys.executable, "-c", SLOW, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_journal(path: Path, lines: int, process: subprocess.Popen) -> None:
    for _ in range(1000):
        if path.is_file() and path.read_bytes().count(b"\n") >= lines:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("no journal")


def test_kill_9_leaves_nothing_finished_and_the_same_command_goes_on(tmp_path):
    source, dest = make_checkpoint(tmp_path / "m", SHAPES).path, tmp_path / "out"
    awqconv.convert(source, tmp_path / "whole", target="amx")
    for lines in (3, 9):
        process = slow_cli("convert", source, dest, "-t", "amx", "-j", "1")
        wait_for_journal(tmp_path / "out.partial" / writer.JOURNAL, lines, process)
        process.kill()
        process.communicate()
        assert not dest.exists()
    result = awqconv.convert(source, dest, target="amx")
    assert result.resumed >= 8
    assert files(dest) == files(tmp_path / "whole")


def test_ctrl_c_says_how_to_go_on(tmp_path):
    source, dest = make_checkpoint(tmp_path / "m", SHAPES).path, tmp_path / "out"
    process = slow_cli("convert", source, dest, "-t", "amx", "-j", "1")
    wait_for_journal(tmp_path / "out.partial" / writer.JOURNAL, 4, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"To continue: awqconv convert {source} {dest} -t amx" in stderr
    assert "Traceback" not in stderr
    assert not dest.exists()
    awqconv.convert(source, dest, target="amx")


def test_real_checkpoints_turn_back(models, tmp_path):
    source = models / "smollm2-135m-instruct-awq-g64"
    before = all_tensors(source)
    for target in ("marlin", "npu", "amx"):
        awqconv.convert(source, tmp_path / target, target=target)
        awqconv.convert(tmp_path / target, tmp_path / "back", target="awq", overwrite=True)
        assert all_tensors(tmp_path / "back") == before, target
        shutil.rmtree(tmp_path / target)


def test_shards_do_not_matter(models, tmp_path):
    awqconv.convert(models / "llama-tiny-awq-sharded", tmp_path / "a", target="marlin")
    awqconv.convert(models / "llama-tiny-awq-gemm-g128", tmp_path / "b", target="marlin")
    assert all_tensors(tmp_path / "a") == all_tensors(tmp_path / "b")


def test_compressed_tensors_is_what_its_own_converter_writes(models, tmp_path):
    awqconv.convert(models / "llama-tiny-awq-gemm-g128", tmp_path / "out",
                    target="compressed-tensors")  # fmt: skip
    theirs = models / "llama-tiny-ct-w4a16-asym"
    assert all_tensors(tmp_path / "out") == all_tensors(theirs)
    ours, config = (json.loads((p / "config.json").read_text())["quantization_config"]
                    for p in (tmp_path / "out", theirs))  # fmt: skip
    config.pop("version")
    assert ours == config

"""Verification finds what is wrong, says where, and finds nothing where nothing is."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_checkpoint
from test_convert import SHAPES
from test_kernels_cpu import EVERY, Case, layer

import awqconv
from awqconv import verification
from awqconv.checkpoint.header import read_header
from awqconv.checkpoint.model import KEPT
from awqconv.checkpoint.source import Folder
from awqconv.digest import digest
from awqconv.errors import AwqconvError
from awqconv.targets import layout

TARGETS = ["marlin", "npu", "amx", "xpu", "compressed-tensors", "awq"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "m"
    return make_checkpoint(path, SHAPES, shards=3, bias=("a", "c")).path


@pytest.fixture(scope="module", params=TARGETS)
def converted(request, source, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "out"
    awqconv.convert(source, path, target=request.param)
    return path


@pytest.fixture
def copy(converted, tmp_path):
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def test_a_right_conversion_holds_with_and_without_the_source(converted, source):
    for given in (None, source):
        found = awqconv.verify(converted, source=given)
        assert found.ok, found.problems
        assert {m.module for m in found.modules} == set(SHAPES)
        for module in found.modules:
            assert module.ok
            assert 0 <= module.error <= module.bound
        assert found.nearest in found.modules
        assert found.tensors > len(SHAPES)


def tensors(path: Path):
    folder = Folder(path)
    for file in folder.files():
        if file.endswith(".safetensors"):
            for info in read_header(folder, file)[0].values():
                yield path / file, info


def flip(file: Path, offset: int, bit: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(offset)
        byte = handle.read(1)[0]
        handle.seek(offset)
        handle.write(bytes([byte ^ 1 << bit]))


def test_one_flipped_bit_in_any_tensor_is_found_and_its_module_named(copy):
    rng = np.random.default_rng(0)
    seen = 0
    for file, info in tensors(copy):
        at, bit = int(rng.integers(info.start, info.stop)), int(rng.integers(0, 8))
        flip(file, at, bit)
        found = awqconv.verify(copy)
        assert not found.ok, info
        owner = info.name.rpartition(".")[0]
        said = [str(p) for p in found.problems]
        if owner in SHAPES:
            assert any(f"module {owner}" in line for line in said), said
            assert not next(m for m in found.modules if m.module == owner).ok
        else:
            assert any(info.name in line for line in said), said
        assert all(m.ok for m in found.modules if m.module != owner)
        flip(file, at, bit)
        seen += 1
    assert seen > 20
    assert awqconv.verify(copy).ok


def test_every_bit_of_amx_compensation_counts(source, tmp_path):
    awqconv.convert(source, tmp_path / "out", target="amx")
    info = next(i for f, i in tensors(tmp_path / "out") if i.name == "a.qweight")
    for bit in range(32):
        at = info.start + 16 * 32 + bit // 8  # of the first block, its first column
        flip(tmp_path / "out/model.safetensors", at, bit % 8)
        said = [str(p) for p in awqconv.verify(tmp_path / "out", modules="^a$").problems]
        assert any("does not follow from its AWQ form: byte" in line for line in said), (bit, said)
        flip(tmp_path / "out/model.safetensors", at, bit % 8)


def forge(path: Path) -> None:
    """Make the manifest agree with the bytes that are there: a conversion that was wrong."""
    from awqconv.digest import digest

    manifest = json.loads((path / "awqconv.json").read_text())
    for file, info in tensors(path):
        data = file.read_bytes()[info.start : info.stop]
        manifest["files"][str(file.relative_to(path))]["tensors"][info.name] = digest(data)
    (path / "awqconv.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("part", "title"), [("q", "code"), ("z", "zero point"), ("s", "scale")])
def test_a_wrong_conversion_is_told_by_element_even_if_its_digests_agree(copy, source, part, title):
    target = json.loads((copy / "awqconv.json").read_text())["target"]
    suffix = next(p.suffix for p in layout(target).parts(_linear()) if p.of == part)
    file, info = next((f, i) for f, i in tensors(copy) if i.name == f"a.{suffix}")
    number = target == "npu" and part == "z"  # 8 - z in float16: no integer any more
    high = 3 if info.dtype == "F32" else 1 if info.dtype == "F16" else 0
    flip(file, info.start + high, 1)
    forge(copy)
    without = awqconv.verify(copy)
    assert any("give --source to see where" in p.what or number for p in without.problems)
    found = awqconv.verify(copy, source=source)
    assert {p.where for p in found.problems} == {"module a"}
    (said,) = {p.what for p in found.problems if p.what.startswith(f"the {title} ")}
    assert number or ("the source has" in said and "worst error of a weight" in said)


def _linear():
    from awqconv.targets import Linear

    return Linear(256, 192, 32)


def test_the_product_finds_a_wrong_order(source, tmp_path, monkeypatch):
    """A layout that is wrong both ways passes round trips; a product by the right one does not."""
    from awqconv.repack import layouts
    from awqconv.targets.marlin import Marlin

    right = Marlin.parts

    def wrong(self, linear):
        return tuple(
            replace(p, pattern=layouts.MARLIN_SCALES_SINGLE) if p.of == "s" else p
            for p in right(self, linear)
        )

    with monkeypatch.context() as patch:
        patch.setattr(Marlin, "parts", wrong)
        awqconv.convert(source, tmp_path / "out", target="marlin")
        assert awqconv.verify(tmp_path / "out", source=source).ok  # wrong both ways
    found = awqconv.verify(tmp_path / "out", source=source)
    beyond = {m.module for m in found.modules if m.error > m.bound}
    assert {"a", "b", "g"} <= beyond


@pytest.mark.parametrize("target", EVERY, ids=repr)
@pytest.mark.parametrize("shape", [(512, 384, 64), (256, 192, 256)])
def test_a_window_of_a_layout_is_the_layout_of_a_window(target, shape):
    """Whatever the pieces that its bytes arrive in, of the second of three experts."""
    linear = layer(target, *shape)
    case, random = Case(target, linear), np.random.default_rng(6)
    parts = (*target.parts(linear), *layout("awq").parts(linear))
    for part in target.parts(linear):
        own = np.ascontiguousarray(case.packed[part.suffix]).reshape(-1).view(np.uint8)
        stored = np.concatenate([~own, own, ~own])
        grains = [
            np.lcm.reduce([verification._grain(p, linear, dim) for p in parts]) for dim in (0, 1)
        ]
        for _ in range(12):
            ends = [
                sorted(random.choice(size // grain + 1, 2, replace=False) * grain)
                for size, grain in zip((linear.K, linear.N), grains, strict=True)
            ]
            if shape[0] > ends[0][1] - ends[0][0] == shape[2]:
                continue  # a single group of several, which Marlin stores in another order
            window = verification._Window(24, part, linear, 1, *map(tuple, ends))
            cuts = sorted({0, *random.integers(0, len(stored), 9), len(stored)})
            for low, high in pairwise(cuts):
                window.update(24 + low, stored[low:high])
            right = case.window(*(slice(*end) for end in ends))[part.suffix]
            right = np.ascontiguousarray(right).reshape(-1).view(np.uint8)
            assert np.array_equal(window.kept.reshape(-1), right)
            assert window.hexdigest() == digest(stored)


def test_less_may_be_multiplied(converted, source):
    found = awqconv.verify(converted, rows=64, columns=32)
    assert found.ok
    assert "64 of K rows and 32 of N columns" in found.sampled
    assert found.nearest


def test_missing_extra_and_changed_files_are_named(copy, source):
    def problems() -> str:
        return "\n".join(map(str, awqconv.verify(copy).problems))

    (copy / "extra.safetensors").write_bytes(b"")
    assert "extra.safetensors: awqconv.json does not name" in problems()
    (copy / "extra.safetensors").unlink()
    (copy / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: 2 bytes" in problems()
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json: the file is missing" in problems()
    shutil.copy(source / "tokenizer.json", copy)
    file = copy / "model.safetensors"
    flip(file, 20, 0)
    assert "model.safetensors: its header is not as it was written" in problems()
    flip(file, 20, 0)
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1)
    assert "model.safetensors: " in problems()


def test_kept_originals_are_verified_too(source, tmp_path):
    awqconv.convert(source, tmp_path / "out", target="amx", scale_dtype="bfloat16")
    assert awqconv.verify(tmp_path / "out", source=source).ok
    file, info = next((f, i) for f, i in tensors(tmp_path / "out") if KEPT in str(f))
    flip(file, info.start, 0)
    assert not awqconv.verify(tmp_path / "out").ok


def test_chosen_modules_only(converted):
    found = awqconv.verify(converted, modules="^(a|b)$")
    assert [m.module for m in found.modules] == ["a", "b"]
    assert awqconv.verify(converted, modules="^a$", columns=0).modules[0].error is None


@pytest.mark.parametrize(
    ("kwargs", "what", "fix"),
    [
        ({"modules": "("}, "is no regular expression", "--modules"),
        ({"modules": "nothing like it"}, "is in the name of none of 9 modules", "--modules"),
        ({"source": "other"}, "it has no AWQ module a", "--source"),
        ({"source": "shapes"}, "a has K, N, g = (128, 64, 32) here and", "--source"),
        ({"dest": "other"}, "no awqconv.json", "awqconv convert"),
        ({"dest": "nowhere"}, "not there", "folder"),
    ],
)
def test_input_that_cannot_be_verified_is_refused(converted, tmp_path, kwargs, what, fix):
    make_checkpoint(tmp_path / "other")
    make_checkpoint(tmp_path / "shapes", dict.fromkeys(SHAPES, (128, 64, 32)))
    given = {k: tmp_path / v if k != "modules" else v for k, v in kwargs.items()}
    dest = given.pop("dest", converted)
    with pytest.raises(AwqconvError) as caught:
        awqconv.verify(dest, **given)
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("target", ["marlin", "amx", "compressed-tensors"])
def test_the_triton_kernel_interpreted(source, tmp_path, target):
    awqconv.convert(source, tmp_path / "out", target=target)
    code = (
        "import awqconv, sys\n"
        f"found = awqconv.verify({str(tmp_path / 'out')!r}, modules='^(b|c)$', kernel='triton', "
        "device='cpu', columns=32)\n"
        "print(found.sampled, found.problems)\nsys.exit(not found.ok)"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "by the triton kernel on cpu" in done.stdout


@pytest.mark.parametrize(
    ("device", "kernel", "what"),
    [
        ("cpu", "triton", "Triton has no kernels for CPUs"),
        ("tpu", "auto", "no device 'tpu'"),
        ("cpu", "cublas", "no kernel 'cublas'"),
    ],
)
def test_a_kernel_that_cannot_run_here_is_refused(converted, device, kernel, what, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(AwqconvError) as caught:
        awqconv.verify(converted, device=device, kernel=kernel)
    assert what in caught.value.what


@pytest.mark.parametrize("target", ["marlin", "npu", "amx"])
def test_a_real_model_holds(models, tmp_path, target):
    source = models / "smollm2-135m-instruct-awq-g64"
    awqconv.convert(source, tmp_path / "out", target=target)
    for given in (None, source):
        found = awqconv.verify(tmp_path / "out", source=given)
        assert found.ok, found.problems
        assert len(found.modules) == 210

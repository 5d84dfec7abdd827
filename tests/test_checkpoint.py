"""Reading checkpoints: what is accepted is read right; a refusal says what, where, what to do."""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import MODULES, OTHERS, Built, make_checkpoint, write_tensors
from safetensors import safe_open

from awqconv.checkpoint.config import quant_config
from awqconv.checkpoint.header import DTYPE_BITS, build_header, parse_header, read_header
from awqconv.checkpoint.reader import Checkpoint, open_checkpoint
from awqconv.checkpoint.source import Folder
from awqconv.checkpoint.strict import MAX_VALUES, parse_json
from awqconv.errors import AwqconvError

INDEX = "model.safetensors.index.json"
GATE = "model.layers.0.mlp.gate_proj"


def refuses(call: Callable[[], object], what: str, where: str, fix: str) -> None:
    """The call raises an AwqconvError whose three parts contain these texts."""
    with pytest.raises(AwqconvError) as caught:
        call()
    error = caught.value
    assert what in error.what
    assert where in error.where
    assert fix in error.fix
    assert error.exit_code == 2
    assert len(str(error)) < 2000


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


# headers


def entry(dtype: str = "F16", shape: object = (2,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_header_round_trip(tmp_path: Path) -> None:
    given = [
        (f"t.{dtype}", dtype, (3, 8) if bits < 8 else (5,))
        for dtype, bits in sorted(DTYPE_BITS.items(), key=lambda item: -item[1])
    ] + [("scalar", "F4", (2,)), ("none", "U8", (0, 7))]
    header, places = build_header(given, {"a": "ü"}, "x.safetensors")
    file = tmp_path / "x.safetensors"
    end = max(place.stop for place in places.values())
    file.write_bytes(header + bytes(end - len(header)))
    assert len(header) % 8 == 0
    assert read_header(Folder(tmp_path), file.name) == (places, {"a": "ü"})
    assert [(p.name, p.dtype, p.shape) for p in places.values()] == given
    with safe_open(file, "np") as library:
        assert set(library.keys()) == set(places)
        for name, dtype, shape in given:
            part = library.get_slice(name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (dtype, shape)


def test_header_keeps_order_until_alignment_breaks() -> None:
    names = list(build_header([("a", "F16", (2,)), ("b", "F32", (1,))])[1])
    assert names == ["a", "b"]
    places = build_header([("a", "F16", (1,)), ("b", "F32", (1,)), ("c", "F16", (3,))])[1]
    assert list(places) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", "F16", (1,)), ("a", "F16", (1,))], "twice"),
        ([("a", "X", (1,))], "unknown dtype 'X'"),
        ([("a", "F16", (-1,))], "dimension of -1"),
    ],
)
def test_build_header_refuses(tensors: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_header(tensors)


def test_tensors_come_in_file_order() -> None:
    raw = json.dumps({"b": entry(offsets=[4, 8]), "a": entry(), "z": entry("F32", [0], [4, 4])})
    tensors, metadata = parse_header(raw.encode(), 8, "f")
    assert list(tensors) == ["a", "z", "b"]
    assert metadata == {}
    assert tensors["b"].start == 8 + len(raw) + 4
    assert (tensors["b"].nbytes, tensors["b"].where) == (4, "f: b")


def text(**entries: object) -> bytes:
    return json.dumps(entries).encode()


DEEP = b"[" * 100_000
HEADERS: dict[str, tuple[bytes, str, str]] = {
    # name: header, what, tensor (data: 4 bytes)
    "empty": (b"", "not JSON", ""),
    "not JSON": (b"{", "not JSON: Expecting property name", ""),
    "not UTF-8": (b'{"\xff":1}', "not UTF-8 at byte 2", ""),
    "UTF-8 mark": (b"\xef\xbb\xbf{}", "not JSON", ""),
    "UTF-16": ("{}".encode("utf-16"), "not UTF-8", ""),
    "half a character": (b'{"\\ud800":1}', "half a character", ""),
    "not an object": (b"[]", "no JSON object", ""),
    "nested": (DEEP, "nested too deeply", ""),
    "nested objects": (b'{"a":' * 100_000, "nested too deeply", ""),
    "NaN": (b'{"a":NaN}', "NaN where only whole numbers", ""),
    "minus zero": (b'{"a":-0}', "-0 where only whole numbers", ""),
    "exponent": (b'{"a":1e999}', "1e999 where only whole numbers", ""),
    "long number": (b'{"a":' + b"9" * 5000 + b"}", "thousands of digits", ""),
    "many values": (b"[" + b"[]," * MAX_VALUES, "JSON values, more than 4,000,000", ""),
    "key twice": (b'{"a":1,"a":1}', "the key 'a' is there twice", ""),
    "key twice inside": (b'{"a":{"shape":[],"shape":[]}}', "the key 'shape' is there twice", ""),
    "metadata": (text(__metadata__={"a": 1}), "__metadata__ must be an object of strings", ""),
    "metadata list": (text(__metadata__=[]), "__metadata__ must be", ""),
    "metadata text": (text(__metadata__=""), "__metadata__ must be", ""),
    "entry list": (text(a=["F16", [2], [0, 4]]), "an entry must be an object of", "a"),
    "entry null": (text(a=None), "an entry must be", "a"),
    "entry misses": (text(a={"dtype": "F16", "shape": [2]}), "an entry must be", "a"),
    "entry has more": (text(a={**entry(), "x": 1}), "an entry must be", "a"),
    "dtype": (text(a=entry("F17")), "unknown dtype 'F17'", "a"),
    "dtype type": (text(a={**entry(), "dtype": ["F16"]}), "unknown dtype", "a"),
    "dtype case": (text(a=entry("f16")), "unknown dtype 'f16'", "a"),
    "shape type": (text(a=entry(shape="2")), "a shape must be a list", "a"),
    "shape null": (text(a=entry(shape=None)), "a shape must be a list", "a"),
    "negative": (text(a=entry(shape=[-2])), "a dimension of -2", "a"),
    "two negative": (text(a=entry(shape=[-1, -2])), "a dimension of -1", "a"),
    "bool": (text(a=entry(shape=[True, 2])), "a dimension of True", "a"),
    "text": (text(a=entry(shape=["2"])), "a dimension of 2", "a"),
    "dimensions": (text(a=entry(shape=[1] * 65)), "at most 64", "a"),
    "overflow": (text(a=entry(shape=[2**32, 2**32])), "more than 2**64 bits", "a"),
    "overflow, then 0": (text(a=entry(shape=[2**63, 2, 0])), "more than 2**64 bits", "a"),
    "overflow of bits": (text(a=entry(shape=[2**60])), "more than 2**64 bits", "a"),
    "huge": (text(a=entry(shape=[10**4000])), "a dimension of 1000", "a"),
    "huge after 0": (text(a=entry(shape=[0, 2**64])), "a dimension of 18446744073709551616", "a"),
    "half a byte": (text(a=entry("F4", [7])), "does not end at a byte", "a"),
    "size": (text(a=entry(shape=[3])), "4 bytes (data offsets 0 to 4) where F16 [3] takes 6", "a"),
    "offsets count": (text(a=entry(offsets=[0, 4, 4])), "no pair of integers", "a"),
    "offsets type": (text(a=entry(offsets=[False, 4])), "no pair of integers", "a"),
    "offsets null": (text(a=entry(offsets=None)), "no pair of integers", "a"),
    "offsets swapped": (text(a=entry(offsets=[4, 0])), "data offsets [4, 0] in a file with 4", "a"),
    "offsets negative": (text(a=entry(offsets=[-4, 0])), "data offsets [-4, 0]", "a"),
    "out of range": (text(a=entry(offsets=[2, 6])), "data offsets [2, 6] in a file with 4", "a"),
    "far out": (text(a=entry(offsets=[0, 10**4000])), "in a file with 4", "a"),
    "hole at the start": (
        text(a=entry(shape=[1], offsets=[2, 4])),
        "starts at data offset 2 and leaves a hole after the header, which ends at 0",
        "a",
    ),
    "hole": (
        text(a=entry("U8", [1], [0, 1]), b=entry("U8", [1], [3, 4])),
        "starts at data offset 3 and leaves a hole after a, which ends at 1",
        "b",
    ),
    "overlap": (
        text(a=entry("U8", [3], [0, 3]), b=entry("U8", [2], [2, 4])),
        "starts at data offset 2 and overlaps 1 bytes of a, which ends at 3",
        "b",
    ),
    "same bytes": (text(a=entry(), b=entry()), "overlaps 4 bytes of a", "b"),
    "rest": (
        text(a=entry(shape=[1], offsets=[0, 2])),
        "4 data bytes, of which the tensors take 2",
        "",
    ),
    "nothing": (b"{}", "4 data bytes, of which the tensors take 0: 4 too many", ""),
    "no name": (text(**{"": entry()}), "1 to 4096 printable characters", ""),
    "long name": (text(**{"n" * 5000: entry()}), "1 to 4096 printable characters", "nnn"),
    "control": (text(**{"a\x1b[2J": entry()}), "printable characters", r"'a\x1b[2J'"),
    "zero byte": (text(**{"a\0": entry()}), "printable characters", r"'a\x00'"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_bad_header(case: str) -> None:
    raw, what, tensor = HEADERS[case]
    where = f"f: {tensor}" if tensor else "f"
    refuses(lambda: parse_header(raw, 4, "f"), what, where, "download it again")


def test_unprintable_names_stay_out_of_messages() -> None:
    with pytest.raises(AwqconvError) as caught:
        parse_header(text(**{"\x1b]0;x\x07\n": entry()}), 4, "f")
    assert re.sub(r"\n", "", str(caught.value)).isprintable()


@pytest.mark.parametrize(
    ("content", "what", "fix"),
    [
        (b"", "0 bytes are too few", "download it again"),
        (b"1234567", "7 bytes are too few", "download it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", "git lfs pull"),
        ((3).to_bytes(8, "little") + b"{}", "a header of 3 bytes in a file of 10", "again"),
        ((2**63).to_bytes(8, "little") + b"{}", "a header of 9,223,372,036,854,775,808", "again"),
        ((2**64 - 8).to_bytes(8, "little") + b"{}", "a header of 18,446,744,073,709,551,608", ""),
    ],
)
def test_bad_header_length(tmp_path: Path, content: bytes, what: str, fix: str) -> None:
    (tmp_path / "f").write_bytes(content)
    refuses(lambda: read_header(Folder(tmp_path), "f"), what, "f", fix)


def test_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "f", "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    refuses(lambda: read_header(Folder(tmp_path), "f"), "limit 100,000,000", "f", "again")


def test_truncated_file(tmp_path: Path) -> None:
    built = make_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    refuses(lambda: open_checkpoint(built.path), "in a file with", "model.safetensors: ", "again")


def test_130_000_tensors() -> None:
    """What takes more than linear time takes hours; `benchmarks/planner.py` has the seconds."""
    header, places = build_header(
        (f"model.layers.{i}.mlp.experts.{i}.gate_proj.qweight", "I32", (4096, 512))
        for i in range(130_000)
    )
    end = max(place.stop for place in places.values()) - len(header)
    assert parse_header(header[8:], end, "")[0] == places


def test_json_may_hold_infinity_where_floats_are_allowed() -> None:
    assert parse_json(b'{"time_step_limit": [0.0, Infinity]}', "", "") == {
        "time_step_limit": [0.0, float("inf")]
    }
    assert parse_json(b'"\\ud83d\\ude00"', "", "") == "\N{GRINNING FACE}"


# the folder


def test_folder_lists_files(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"12345")
    model = tmp_path / "model"
    (model / "sub" / "deep").mkdir(parents=True)
    (model / ".git").mkdir()
    (model / ".git" / "config").write_text("x")
    (model / "sub" / "deep" / "b").write_bytes(b"1")
    (model / "a").symlink_to("../blob")
    (model / "loop").symlink_to(model)
    (model / ".gitattributes").write_bytes(b"")
    os.mkfifo(model / "pipe")
    folder = Folder(model)
    assert folder.files() == {".gitattributes": 0, "a": 5, "sub/deep/b": 1}
    assert folder.read("a", 1, 4) == b"234"
    folder.close()
    assert folder.read("a", 5, 5) == b""


def test_folder_refuses(tmp_path: Path) -> None:
    refuses(lambda: Folder(tmp_path / "no"), "not there", "no", "config.json")
    (tmp_path / "file.gguf").write_bytes(b"1234")
    refuses(lambda: Folder(tmp_path / "file.gguf"), "a file, where", "file.gguf", "Give the folder")
    folder = Folder(tmp_path)
    refuses(lambda: folder.read("file.gguf", 2, 5), "bytes 2 to 5 of a file of 4", "file.gguf", "")
    refuses(lambda: folder.read("file.gguf", 3, 2), "bytes 3 to 2", "file.gguf", "again")
    refuses(lambda: folder.read("../x", 0, 0), "no such file in the model", "../x", "Download")


def test_folder_refuses_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("../blobs/gone")
    refuses(Folder(tmp_path).files, "No such file", "tokenizer.json", "a link to nothing")


def test_folder_refuses_names_that_are_not_utf8(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))).write_bytes(b"")
    refuses(Folder(tmp_path).files, "not UTF-8", r"\udcff", "Rename it")


def test_folder_refuses_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awqconv.checkpoint.source.MAX_FILES", 2)
    for name in "abc":
        (tmp_path / name).write_bytes(b"")
    refuses(Folder(tmp_path).files, "more than 2 files", str(tmp_path)[:20], "one model")


def test_file_cut_while_being_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(100))
    folder = Folder(tmp_path)
    before = folder.fingerprint("f")
    folder.read("f", 0, 100)
    os.truncate(tmp_path / "f", 40)
    refuses(lambda: folder.read("f", 10, 90), "ends at byte 40, before byte 90", "f", "rerun")
    assert folder.fingerprint("f") != before
    (tmp_path / "f").unlink()
    refuses(lambda: folder.fingerprint("f"), "cannot be read", "f", "gone")


def test_read_error_names_file_and_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(bytes(100))
    folder = Folder(tmp_path)

    def fails(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    refuses(
        lambda: folder.read("f", 10, 90), "read at byte 10: Input/output", "f", "Check the disk"
    )


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(bytes(100))
    folder = Folder(tmp_path)
    folder.files()

    def fails(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", fails)
    refuses(lambda: folder.read("f", 0, 1), "opened: Permission denied", "f", "permissions")


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(1000)
    (tmp_path / "f").write_bytes(data)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, buffers, at: real(f, [buffers[0][:7]], at))
    assert Folder(tmp_path).read("f", 3, 900) == data[3:900]


def test_threads_read_one_file(tmp_path: Path) -> None:
    data = np.arange(1 << 16, dtype=np.uint32)
    (tmp_path / "f").write_bytes(data.tobytes())
    folder = Folder(tmp_path)
    out = np.zeros_like(data)

    def read(part: int) -> None:
        view = out.view(np.uint8).data
        for start in range(part * 4096, len(view), 8 * 4096):
            folder.readinto("f", start, view[start : start + 4096])

    threads = [threading.Thread(target=read, args=(part,)) for part in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(out, data)


# config


def open_with(tmp_path: Path, **quant: Any) -> Checkpoint:
    return open_checkpoint(make_checkpoint(tmp_path, quant=quant).path)


def test_defaults_and_names_of_other_writers(tmp_path: Path) -> None:
    built = make_checkpoint(tmp_path)

    def read(**raw: Any) -> tuple[Any, ...]:
        quant = quant_config({"quantization_config": raw}, Folder(built.path))
        return quant.bits, quant.group_size, quant.zero_point, quant.version

    assert read(quant_method="awq") == (4, 128, True, "gemm")
    assert read(quant_method="AWQ", version="GEMM", w_bit=4, q_group_size=64) == (
        4,
        64,
        True,
        "gemm",
    )
    assert read(quant_method="awq", checkpoint_format="gemm", format="GEMM", group_size=-1)[1] == -1
    quant = quant_config(
        {"quantization_config": {"quant_method": "awqconv", "target": "marlin"}}, Folder(built.path)
    )
    assert (quant.method, quant.version) == ("awqconv", "marlin")


def test_older_and_nested_configs(tmp_path: Path) -> None:
    built = make_checkpoint(tmp_path)
    config = json.loads((built.path / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (built.path / "config.json").write_text(
        json.dumps({**config, "text_config": {"quantization_config": quantization}})
    )
    assert open_checkpoint(built.path).quant.group_size == 32
    (built.path / "config.json").write_text(json.dumps(config))
    (built.path / "quant_config.json").write_text(
        '{"zero_point": true, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}'
    )
    checkpoint = open_checkpoint(built.path)
    assert (checkpoint.quant.group_size, checkpoint.quant.version) == (32, "gemm")
    assert checkpoint.notes == []


@pytest.mark.parametrize(
    ("quant", "what", "fix"),
    [
        ({"version": "GEMV"}, "unsupported AWQ dialect 'gemv'", "AutoAWQ, quant_config version"),
        ({"version": "gemv_fast"}, "unsupported AWQ dialect 'gemv_fast'", "AutoAWQ"),
        ({"version": "marlin"}, "unsupported AWQ dialect 'marlin'", "AutoAWQ"),
        ({"backend": "llm-awq"}, "unsupported AWQ dialect 'llm-awq'", "AutoAWQ"),
        (
            {"version": "gemm", "format": "gemv"},
            "version 'gemm' and format 'gemv' disagree",
            "Remo",
        ),
        ({"quant_method": "gptq"}, "quant_method 'gptq' is not AWQ", "with AutoAWQ"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not AWQ", "with AutoAWQ"),
        ({"quant_method": "fp8"}, "'fp8' is not AWQ", "with AutoAWQ"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors' is not", "exchange format"),
        ({"quant_method": "auto-round"}, "'auto-round' is not AWQ", "format 'auto_awq'"),
        ({"quant_method": None}, "quant_method is missing", 'add "quant_method": "awq"'),
        ({"quant_method": 4}, "quant_method is 4", 'add "quant_method": "awq"'),
        ({"bits": 8}, "8 bits; only 4", "with AutoAWQ"),
        ({"bits": True}, "bits is True, not int", "Correct it"),
        ({"bits": 4.0}, "bits is 4.0, not int", "Correct it"),
        ({"w_bit": 3}, "bits 4 and w_bit 3 disagree", "Remove the wrong one"),
        ({"group_size": 0}, "group_size 0 is neither -1", "Correct it"),
        ({"group_size": -2}, "group_size -2 is neither -1", "Correct it"),
        ({"group_size": 10**4000}, "group_size 1000", "Correct it"),
        ({"group_size": "32"}, "group_size is '32', not int", "Correct it"),
        ({"zero_point": "yes"}, "zero_point is 'yes', not bool", "Correct it"),
        ({"version": 1}, "version is 1, not str", "Correct it"),
        ({"modules_to_not_convert": "gate"}, "is 'gate', not list", "Correct it"),
        ({"modules_to_not_convert": ["a", 1]}, "holds 1, not a name", "Correct it"),
    ],
)
def test_bad_quantization_config(
    tmp_path: Path, quant: dict[str, Any], what: str, fix: str
) -> None:
    refuses(lambda: open_with(tmp_path, **quant), what, "config.json: quantization_config", fix)


def test_not_quantized(tmp_path: Path) -> None:
    built = make_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.pop("quantization_config"))
    call = lambda: open_checkpoint(built.path)  # noqa: E731
    refuses(call, "not quantized", "config.json", "Quantize the float model")
    (tmp_path / "quantize_config.json").write_text("{}")
    refuses(call, "'gptq' is not AWQ", "quantize_config.json", "AutoAWQ")
    edit_json(tmp_path / "config.json", lambda c: c.update(compression_config={}))
    refuses(call, "'compressed-tensors'", "config.json: compression_config", "exchange")
    edit_json(tmp_path / "config.json", lambda c: c.update(quantization_config="awq"))
    refuses(call, "it is 'awq', not an object", "config.json: quantization_config", "Correct")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "not JSON"),
        (b"[1]", "a JSON list, not an object"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'{"a": "\xe9"}', "not UTF-8 at byte 7"),
        (DEEP, "nested too deeply"),
    ],
)
def test_bad_config_json(tmp_path: Path, content: bytes, what: str) -> None:
    built = make_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    refuses(lambda: open_checkpoint(built.path), what, "config.json", "Download it again")


def test_config_over_the_limit(tmp_path: Path) -> None:
    built = make_checkpoint(tmp_path)
    os.truncate(tmp_path / "config.json", 100_000_001)
    refuses(lambda: open_checkpoint(built.path), "100,000,001 bytes", "config.json", "again")


def test_folder_without_config(tmp_path: Path) -> None:
    refuses(lambda: open_checkpoint(tmp_path), "no config.json", str(tmp_path)[:20], "Give the")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    refuses(lambda: open_checkpoint(tmp_path), "GGUF", str(tmp_path)[:20], "AutoAWQ")
    refuses(lambda: open_checkpoint(tmp_path / "x"), "not there", "x", "config.json")


# checkpoints


@pytest.mark.parametrize("shards", [1, 3, 13])
@pytest.mark.parametrize("scale_dtype", ["F16", "BF16", "F32"])
def test_tensors_and_modules(tmp_path: Path, shards: int, scale_dtype: str) -> None:
    modules = {**MODULES, "model.layers.0.self_attn.q_proj": (128, 24, 64)}
    built = make_checkpoint(tmp_path, modules, shards=shards, scale_dtype=scale_dtype, bias=[GATE])
    checkpoint = open_checkpoint(built.path)
    assert len(checkpoint.shards) == shards
    assert set(checkpoint.tensors) == set(built.tensors)
    places = [(tensor.file, tensor.start) for tensor in checkpoint.tensors.values()]
    assert places == sorted(places)
    for name, tensor in checkpoint.tensors.items():
        dtype, array = built.tensors[name]
        assert (tensor.dtype, tensor.shape) == (dtype, array.shape)
        assert checkpoint.source.read(tensor.file, tensor.start, tensor.stop) == array.tobytes()
    assert {m.name: (m.K, m.N, m.g, m.G, m.E) for m in checkpoint.modules.values()} == {
        name: (K, N, g, K // g, 1) for name, (K, N, g) in modules.items()
    }
    assert [name for name, module in checkpoint.modules.items() if module.bias] == [GATE]
    assert set(checkpoint.others) == set(OTHERS)
    assert set(checkpoint.metadata) == set(checkpoint.shards)
    assert set(checkpoint.files) >= {*checkpoint.shards, "config.json", "tokenizer.json"}
    checkpoint.source.close()


def test_channelwise_and_stacked(tmp_path: Path) -> None:
    modules = {"a.w": (64, 32, -1), "b.w": (128, 16, -1, 4)}
    built = make_checkpoint(tmp_path, modules, bias=True)
    checkpoint = open_checkpoint(built.path)
    one, stack = checkpoint.modules.values()
    assert (one.g, one.G, one.E) == (64, 1, 1)
    assert (stack.K, stack.N, stack.g, stack.E) == (128, 16, 128, 4)
    assert stack.bias
    assert stack.bias.shape == (4, 16)
    assert [tensor.name for tensor in stack.tensors] == [
        "b.w.qweight", "b.w.qzeros", "b.w.scales", "b.w.bias",
    ]  # fmt: skip
    assert checkpoint.quant.group_size == -1
    assert checkpoint.notes == []


def test_scales_alone_are_no_module(tmp_path: Path) -> None:
    built = make_checkpoint(tmp_path, other={"model.layers.0.mlp.act.scales": ("F16", (64,))})
    checkpoint = open_checkpoint(built.path)
    assert list(checkpoint.others) == ["model.layers.0.mlp.act.scales"]


def test_links_to_blobs(tmp_path: Path) -> None:
    built = make_checkpoint(tmp_path / "blobs", shards=3)
    (tmp_path / "snapshot").mkdir()
    for file in built.path.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name}")
    assert len(open_checkpoint(tmp_path / "snapshot").modules) == 3


def test_single_file_of_another_name(tmp_path: Path) -> None:
    built = make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "awq.safetensors")
    (note,) = open_checkpoint(built.path).notes
    assert "awq.safetensors is the only file of tensors" in note


def test_index_that_names_one_file(tmp_path: Path) -> None:
    built = make_checkpoint(tmp_path)
    weights = dict.fromkeys(built.tensors, "model.safetensors")
    total = sum(array.nbytes for _, array in built.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    (tmp_path / INDEX).write_text(json.dumps(index))
    checkpoint = open_checkpoint(built.path)
    assert checkpoint.shards == ("model.safetensors",)
    assert checkpoint.notes == []


def test_own_output_is_read_without_modules(tmp_path: Path) -> None:
    checkpoint = open_with(tmp_path, quant_method="awqconv", target="marlin", version=None)
    assert checkpoint.modules == {}
    assert set(checkpoint.others) == set(checkpoint.tensors)


# the index


@pytest.fixture
def sharded(tmp_path: Path) -> Built:
    return make_checkpoint(tmp_path / "model", shards=3)


SHARD = "model-00001-of-00003.safetensors"
FIRST = f"{GATE}.qweight"  # in the first shard


@pytest.mark.parametrize(
    "file", ["/etc/x.safetensors", "../x.safetensors", "a/b.safetensors", r"..\x.safetensors",
             "C:x.safetensors", "", "..", ".", "x\0.safetensors", "x\n.safetensors"],
)  # fmt: skip
def test_index_path_leaves_the_folder(sharded: Built, file: str) -> None:
    edit_json(sharded.path / INDEX, lambda index: index["weight_map"].update({FIRST: file}))
    refuses(
        lambda: open_checkpoint(sharded.path),
        "is no file name in the model's own folder",
        f"{INDEX}: {FIRST}",
        "Do not trust",
    )


INDEXES: dict[str, tuple[Callable[[dict[str, Any]], object], str, str]] = {
    "no map": (lambda i: i.pop("weight_map"), "weight_map must be an object", INDEX),
    "map type": (lambda i: i.update(weight_map=[]), "weight_map must be an object", INDEX),
    "map empty": (lambda i: i.update(weight_map={}), "weight_map must be an object", INDEX),
    "file type": (
        lambda i: i["weight_map"].update(x=1),
        "its file is 1, not a name",
        f"{INDEX}: x",
    ),
    "pickle": (lambda i: i["weight_map"].update(x="x.bin"), "no safetensors file", f"{INDEX}: x"),
    "missing shard": (
        lambda i: i["weight_map"].update(x="y.safetensors"),
        "1 of 4 shards are missing, the first y.safetensors",
        INDEX,
    ),
    "no tensor": (
        lambda i: i["weight_map"].update(x=SHARD),
        f"says the tensor is in {SHARD}, but no file has it",
        f"{SHARD}: x",
    ),
    "wrong shard": (
        lambda i: i["weight_map"].update({FIRST: SHARD.replace("1", "2", 1)}),
        f"but it is in {SHARD}",
        f": {FIRST}",
    ),
    "unlisted tensor": (
        lambda i: i["weight_map"].pop(FIRST),
        "does not list this tensor",
        f"{SHARD}: {FIRST}",
    ),
}


@pytest.mark.parametrize("case", INDEXES)
def test_bad_index(sharded: Built, case: str) -> None:
    change, what, where = INDEXES[case]
    edit_json(sharded.path / INDEX, change)
    refuses(lambda: open_checkpoint(sharded.path), what, where, "ownload")


def test_duplicate_key_in_index(sharded: Built) -> None:
    file = sharded.path / INDEX
    file.write_text(file.read_text().replace("{\n", '{"weight_map": {},', 1))
    refuses(lambda: open_checkpoint(sharded.path), "'weight_map' is there twice", INDEX, "Download")


def test_files_the_index_does_not_name(sharded: Built) -> None:
    call = lambda: open_checkpoint(sharded.path)  # noqa: E731
    shutil.copy(sharded.path / SHARD, sharded.path / "model.safetensors")
    refuses(call, f"{INDEX} does not name this file", "model.safetensors", "Move it out")
    (sharded.path / "model.safetensors").unlink()
    (sharded.path / "original").mkdir()
    shutil.copy(sharded.path / SHARD, sharded.path / "original" / "x.safetensors")
    assert len(call().shards) == 3
    (sharded.path / SHARD).unlink()
    refuses(call, f"1 of 3 shards are missing, the first {SHARD}", INDEX, f"Download {SHARD}")
    (sharded.path / INDEX).unlink()
    refuses(call, f"2 files of tensors and no {INDEX}", "model", "Download it")


def test_tensor_in_two_shards(sharded: Built) -> None:
    other = SHARD.replace("1", "2", 1)
    header, places = build_header([(FIRST, "I32", (128, 8))])
    (sharded.path / other).write_bytes(header + bytes(places[FIRST].nbytes))
    refuses(
        lambda: open_checkpoint(sharded.path),
        f"the tensor is also in {SHARD}",
        f"{other}: {FIRST}",
        "Remove",
    )


def test_second_file_without_index(tmp_path: Path) -> None:
    built = make_checkpoint(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "adapter.safetensors")
    refuses(
        lambda: open_checkpoint(built.path), "beside model.safetensors", "adapter", "Move it out"
    )


@pytest.mark.parametrize(
    ("file", "what", "fix"),
    [
        ("pytorch_model.bin", "pickled PyTorch files; only safetensors", "safe_serialization=True"),
        ("llm-awq-w4.pt", "pickled PyTorch files; only safetensors", "safe_serialization=True"),
        ("model.Q4_K.gguf", "GGUF files; only safetensors", "AutoAWQ"),
    ],
)
def test_other_files_of_weights(tmp_path: Path, file: str, what: str, fix: str) -> None:
    built = make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    refuses(lambda: open_checkpoint(built.path), what, file, fix)


def test_no_weights(tmp_path: Path) -> None:
    built = make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refuses(lambda: open_checkpoint(built.path), "no safetensors files", "", "Download")


# modules


def rewritten(built: Built, change: dict[str, tuple[str, tuple[int, ...]] | None]) -> Path:
    """The checkpoint with tensors of the gate module removed, or with other dtypes and shapes."""
    numpy = {"F16": np.float16, "F32": np.float32, "I16": np.int16, "I32": np.int32, "U8": np.uint8}
    for part, new in change.items():
        if new is None:
            del built.tensors[f"{GATE}.{part}"]
        else:
            built.tensors[f"{GATE}.{part}"] = new[0], np.zeros(new[1], numpy[new[0]])
    write_tensors(built.path, built.tensors)
    return built.path


Change = dict[str, tuple[str, tuple[int, ...]] | None]
BAD_MODULES: dict[str, tuple[Change, str, str]] = {
    # K = 128, N = 64, G = 4
    "no qzeros": ({"qzeros": None}, "it has qweight and scales but no qzeros", ""),
    "no scales": ({"scales": None}, "it has qweight and qzeros but no scales", ""),
    "no qweight": ({"qweight": None}, "it has qzeros and scales but no qweight", ""),
    "qweight alone": ({"qzeros": None, "scales": None}, "it has qweight but no qzeros and no", ""),
    "qweight dtype": ({"qweight": ("U8", (128, 8))}, "U8, where qweight must be I32", ".qweight"),
    "qzeros dtype": ({"qzeros": ("F16", (4, 8))}, "F16, where qzeros must be I32", ".qzeros"),
    "scales dtype": ({"scales": ("I32", (4, 64))}, "where scales must be F16 or BF16", ".scales"),
    "ranks": ({"qzeros": ("I32", (1, 4, 8))}, "must all have 2 dimensions, or all 3", ""),
    "flat": ({"scales": ("F16", (256,))}, "must all have 2 dimensions, or all 3", ""),
    "no rows": ({"qweight": ("I32", (0, 8))}, "a dimension of 0 (qweight [0, 8],", ""),
    "no groups": (
        {"qzeros": ("I32", (0, 8)), "scales": ("F16", (0, 64))},
        "a dimension of 0 (qweight [128, 8], qzeros [0, 8], scales [0, 64])",
        "",
    ),
    "qzeros columns": ({"qzeros": ("I32", (4, 7))}, "must have the 8 columns of qweight", ""),
    "scales columns": ({"scales": ("F16", (4, 60))}, "must be [G, N] = [4, 64]", ""),
    "scales rows": ({"scales": ("F16", (2, 64))}, "must be [G, N] = [4, 64]", ""),
    "K % G": (
        {"qzeros": ("I32", (3, 8)), "scales": ("F16", (3, 64))},
        "K = 128 does not divide into the G = 3 groups",
        "",
    ),
    "more groups than rows": (
        {"qzeros": ("I32", (256, 8)), "scales": ("F16", (256, 64))},
        "K = 128 does not divide into the G = 256 groups",
        "",
    ),
    "bias shape": (
        {"bias": ("F16", (63,))},
        "bias F16 [63], where F16 or BF16 or F32 [64]",
        ".bias",
    ),
    "bias dtype": ({"bias": ("I32", (64,))}, "bias I32 [64]", ".bias"),
}


@pytest.mark.parametrize("case", BAD_MODULES)
def test_bad_module(tmp_path: Path, case: str) -> None:
    change, what, tensor = BAD_MODULES[case]
    path = rewritten(make_checkpoint(tmp_path), change)
    where = f"model.safetensors: {GATE}{tensor}"
    refuses(lambda: open_checkpoint(path), what, where, "Download the model again")


DIALECTS: dict[str, tuple[Change, str]] = {
    "gemv": (
        {"qweight": ("I32", (64, 16)), "qzeros": ("I32", (64, 4)), "scales": ("F16", (64, 32))},
        "gemv",
    ),
    "gemv_fast": (
        {"qweight": ("I16", (16, 128)), "qzeros": ("F16", (8, 64)), "scales": ("F16", (8, 64))},
        "gemv_fast",
    ),
    "llm-awq": (
        {"qweight": ("I16", (16, 128)), "qzeros": None, "scaled_zeros": ("F16", (8, 64))},
        "llm-awq v2",
    ),
    "marlin": ({"qweight": ("I32", (8, 128)), "qzeros": None}, "marlin"),
    "gptq": ({"g_idx": ("I32", (128,))}, "GPTQ"),
    "gptq by shape": ({"qweight": ("I32", (16, 64))}, "GPTQ"),
}


@pytest.mark.parametrize("case", DIALECTS)
def test_dialect_by_tensors(tmp_path: Path, case: str) -> None:
    change, dialect = DIALECTS[case]
    path = rewritten(make_checkpoint(tmp_path), change)
    refuses(
        lambda: open_checkpoint(path),
        f"unsupported dialect {dialect!r}",
        f"model.safetensors: {GATE}",
        "AutoAWQ",
    )


def test_no_quantized_module(tmp_path: Path) -> None:
    built = make_checkpoint(tmp_path, {})
    refuses(lambda: open_checkpoint(built.path), "no tensor is named *.qweight", "", "AutoAWQ")
    built = make_checkpoint(tmp_path, {}, {"a.weight_packed": ("F16", (1,))})
    refuses(lambda: open_checkpoint(built.path), "compressed-tensors tensors", "", "AutoAWQ")


def test_symmetric(tmp_path: Path) -> None:
    path = rewritten(make_checkpoint(tmp_path, quant={"zero_point": False}), {"qzeros": None})
    refuses(lambda: open_checkpoint(path), "symmetric weights", GATE, "zero_point true")


# notes


def notes(path: Path, **arguments: Any) -> list[str]:
    return open_checkpoint(make_checkpoint(path, **arguments).path).notes


def test_notes(tmp_path: Path) -> None:
    assert notes(tmp_path / "0") == []
    (note,) = notes(tmp_path / "1", group_size=128)
    assert "group_size 128; by the headers it is 32 in 3 of 3 modules, the first model.l" in note
    (note,) = notes(tmp_path / "2", quant={"modules_to_not_convert": ["gate", "lm_head"]})
    assert f"modules_to_not_convert matches 1 modules that are quantized, the first {GATE}" in note
    (note,) = notes(tmp_path / "3", quant={"zero_point": False})
    assert "zero_point false, but all modules have qzeros" in note
    (note,) = notes(tmp_path / "4", config_overrides={"tie_word_embeddings": True})
    assert "lm_head.weight is stored, but tie_word_embeddings is true" in note
    (note,) = notes(tmp_path / "5", other={})
    assert "tie_word_embeddings is false, but there is no lm_head" in note
    (note,) = notes(tmp_path / "6", other={**OTHERS, f"{GATE}.weight": ("F16", (64, 128))})
    assert f"1 modules have a weight beside qweight, the first {GATE}" in note


def test_total_size_notes(sharded: Built) -> None:
    total = sum(array.nbytes for _, array in sharded.tensors.values())
    edit_json(sharded.path / INDEX, lambda index: index["metadata"].update(total_size=7))
    assert open_checkpoint(sharded.path).notes == [
        f"{INDEX} has total_size 7; the tensors take {total} bytes."
    ]
    edit_json(sharded.path / INDEX, lambda index: index.pop("metadata"))
    assert open_checkpoint(sharded.path).notes == [
        f"{INDEX} has no total_size; the tensors take {total} bytes."
    ]


# checkpoints of real tools


@pytest.mark.parametrize(
    ("name", "modules", "others", "groups"),
    [
        ("llama-tiny-awq-gemm-g128", 14, 7, {128}),
        ("llama-tiny-awq-gemm-g32", 14, 7, {32}),
        ("llama-tiny-awq-sharded", 14, 7, {128}),
        ("mixtral-tiny-awq", 32, 9, {128}),
        ("qwen3moe-tiny-awq", 32, 13, {64}),
        ("smollm2-135m-instruct-awq-g64", 210, 62, {64}),
    ],
)
def test_real(models: Path, name: str, modules: int, others: int, groups: set[int]) -> None:
    checkpoint = open_checkpoint(models / name)
    assert len(checkpoint.modules) == modules
    assert len(checkpoint.others) == others
    assert {module.g for module in checkpoint.modules.values()} == groups
    assert checkpoint.notes == []
    for shard in checkpoint.shards:
        with safe_open(models / name / shard, "np") as library:
            for key in library.keys():  # noqa: SIM118
                part, tensor = library.get_slice(key), checkpoint.tensors[key]
                assert (part.get_dtype(), part.get_shape()) == (tensor.dtype, list(tensor.shape))
            assert (library.metadata() or {}) == checkpoint.metadata[shard]


@pytest.mark.parametrize(
    ("name", "what", "as_gemm"),
    [
        ("llama-tiny-awq-gemv", "unsupported AWQ dialect 'gemv'", "unsupported dialect 'gemv'"),
        ("llama-tiny-awq-gemv-fast", "dialect 'gemv_fast'", "unsupported dialect 'gemv_fast'"),
        ("llama-tiny-awq-marlin", "dialect 'marlin'", "unsupported dialect 'marlin'"),
        ("llama-tiny-ct-w4a16-asym", "'compressed-tensors' is not", "compressed-tensors tensors"),
        ("llama-tiny-fp16", "the model is not quantized", "no tensor is named *.qweight"),
    ],
)
def test_real_refused(models: Path, tmp_path: Path, name: str, what: str, as_gemm: str) -> None:
    refuses(lambda: open_checkpoint(models / name), what, "config.json", "AutoAWQ")
    for file in (models / name).iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "version": "gemm"}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    refuses(lambda: open_checkpoint(tmp_path), as_gemm, "", "AutoAWQ")

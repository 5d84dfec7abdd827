"""What the short property tests and the long fuzzer share: inputs, mutations, and the oracle.

An input is a small checkpoint as bytes: the parts config.json, index and two shards, each shard
being 8 bytes of data size, then the file up to its data, which is taken as zeros.
"""

import json
import random
import time
import tracemalloc
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from checkpoints import make_checkpoint
from safetensors import deserialize

from awqconv.checkpoint.header import read_header
from awqconv.checkpoint.reader import INDEX, open_checkpoint
from awqconv.errors import AwqconvError

CONFIG = "config.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BREAK = b"\n\xff\xfe\n"
MAX_DATA = 1 << 16
MAX_SECONDS = 1.0


def bound(data: bytes) -> int:
    """Bytes that reading an input may allocate at its peak."""
    return 32 * len(data) + (1 << 18)


class Memory:
    """A source of files in memory, with zeros after the bytes given."""

    name = "memory"

    in_order = False

    def __init__(self, files: dict[str, bytes], sizes: dict[str, int]) -> None:
        self._files, self._sizes = files, sizes

    def files(self) -> dict[str, int]:
        return self._sizes

    def read(self, file: str, start: int, stop: int) -> bytes:
        part = self._files[file][start:stop]
        return part + bytes(stop - start - len(part))

    def readinto(self, file: str, start: int, buffer: memoryview) -> None:
        buffer[:] = self.read(file, start, start + len(buffer))

    def fingerprint(self, file: str) -> tuple[int, ...]:
        return (self._sizes[file],)

    def close(self) -> None:
        pass


def source(data: bytes) -> Memory:
    """The checkpoint of an input; parts that are not there are files that are not there."""
    files = dict(zip((CONFIG, INDEX, *SHARDS), data.split(BREAK), strict=False))
    sizes = {file: len(content) for file, content in files.items()}
    for shard in SHARDS:
        if shard in files:
            size = int.from_bytes(files[shard][:8], "little") % MAX_DATA
            files[shard] = files[shard][8:]
            sizes[shard] = len(files[shard]) + size
    return Memory(files, sizes)


def seeds() -> list[bytes]:
    """Valid inputs of different kinds."""
    kinds: list[dict[str, Any]] = [
        {},
        {"bias": True, "scale_dtype": "BF16", "quant": {"modules_to_not_convert": ["lm_head"]}},
        {"modules": {"m.experts.0.w1": (64, 16, -1), "m.w2": (32, 8, 16, 3)}},
        {"modules": {"a": (8, 8, 8)}, "other": {}, "quant": {"quant_method": "awqconv"}},
        {"modules": {"a": (8, 8, 8)}, "other": {"b": ("F32", (0, 7)), "c": ("F16", ())}},
    ]
    found = []
    for kind in kinds:
        with TemporaryDirectory() as folder:
            path = make_checkpoint(Path(folder), shards=2, **kind).path
            parts = [
                json.dumps(json.loads((path / f).read_text())).encode() for f in (CONFIG, INDEX)
            ]
            for shard in SHARDS:
                content = (path / shard).read_bytes()
                end = 8 + int.from_bytes(content[:8], "little")
                parts.append((len(content) - end).to_bytes(8, "little") + content[:end])
            found.append(BREAK.join(parts))
    return found


@dataclass
class Result:
    """Of one input: whether a checkpoint was read, seconds, and the peak of allocated bytes."""

    accepted: bool
    seconds: float
    peak: int


def run(data: bytes, trace: bool = True) -> Result:
    """Reads an input; the peak is 0 without `trace`, which takes ten times as long.

    Raises whatever but AwqconvError the reader raises, and AssertionError where it disagrees
    with the safetensors library, takes too long or allocates too much.
    """
    memory = source(data)
    if trace:
        tracemalloc.start()
    start = time.perf_counter()
    agreed = []
    for shard in SHARDS:
        try:
            agreed.append((shard, read_header(memory, shard)))
        except AwqconvError as error:
            check_message(error)
    try:
        accepted = bool(open_checkpoint(memory).tensors)
    except AwqconvError as error:
        check_message(error)
        accepted = False
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < MAX_SECONDS, f"{seconds:.2f} s"
    assert peak < bound(data), f"{peak} bytes allocated for an input of {len(data)}"
    for shard, (tensors, _) in agreed:
        library = deserialize(memory.read(shard, 0, memory.files()[shard]))
        theirs = {name: (info["dtype"], tuple(info["shape"])) for name, info in library}
        assert theirs == {name: (info.dtype, info.shape) for name, info in tensors.items()}
    return Result(accepted, seconds, peak)


def check_message(error: AwqconvError) -> None:
    """A refusal is complete and printable, whatever the input held."""
    assert error.what
    assert error.where
    assert error.fix
    assert len(str(error)) < 2000
    assert str(error).replace("\n", "").isprintable()


# mutations

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 4, 7, 8, 64, 128, 2**31, 2**32, 2**63, 2**64, 10**30,
    0.5, 4.0, float("nan"), float("inf"), "", ".", "..", "/x", "a\\b", "x.safetensors", *SHARDS,
    "gemm", "gemv", "awq", "gptq", "awqconv", "F16", "I32", "I16", "F4", "BF16", "\x1b[2J", "\x00",
    "\ud800", "\u202e", "n" * 5000, [], {}, [0, 0], [0, 8], [8, 0], [[]], {"": {}}, [0] * 70,
]  # fmt: skip
KEYS = [
    "dtype", "shape", "data_offsets", "__metadata__", "weight_map", "metadata", "total_size",
    "quantization_config", "text_config", "quant_method", "version", "format", "bits", "w_bit",
    "group_size", "zero_point", "modules_to_not_convert", "backend", "target",
    "tie_word_embeddings",
    "a.qweight", "a.qzeros", "a.scales", "a.bias", "a.g_idx", "a.weight_packed", "", "\n",
]  # fmt: skip


class Pairs(list[Any]):
    """A JSON object as [key, value] pairs, so that keys can repeat."""


def dump(value: Any) -> str:
    """JSON text of a value whose objects are Pairs."""
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{dump(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The input with a few changes, in the structure of a part or in its bytes."""
    parts = data.split(BREAK)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(parts))
        head = 16 if at >= 2 else 0
        first, text = parts[at][:head], parts[at][head:]
        if rng.random() < 0.75:
            text = _structure(text, rng)
            if head:
                exact = len(text).to_bytes(8, "little")
                first = first[:8] + (exact if rng.random() < 0.95 else rng.randbytes(8))
        else:
            text = _bytes(text, rng)
        if head and rng.random() < 0.05:
            first = _bytes(first, rng)
        parts[at] = first + text
        if rng.random() < 0.01:
            parts.pop(at)
            parts = parts or [b""]
    return BREAK.join(parts)


def _structure(text: bytes, rng: random.Random) -> bytes:
    try:
        root = json.loads(text, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))
    except (ValueError, RecursionError):
        return _bytes(text, rng)
    slots: list[tuple[list[Any], int]] = []  # every place of a value
    todo = [root]
    while todo:
        node = todo.pop()
        for i, item in enumerate(node if isinstance(node, list) else ()):
            place = (item, 1) if isinstance(node, Pairs) else (node, i)
            slots.append(place)
            todo.append(place[0][place[1]])
    if not slots:
        return dump(deepcopy(rng.choice(VALUES))).encode()
    holder, i = rng.choice(slots)
    value = holder[i]
    match rng.randrange(8):
        case 0:
            holder[i] = deepcopy(rng.choice(VALUES))
        case 1:
            other, j = rng.choice(slots)
            holder[i], other[j] = other[j], value
        case 2 if type(value) is int:
            holder[i] = value + rng.choice((-8, -2, -1, 1, 2, 8)) * rng.choice((1, 1, 64))
        case 3 if type(value) is int:
            holder[i] = rng.choice((value * 2, value // 2, -value, float(value)))
        case 4 if isinstance(value, list) and value:
            value.pop(rng.randrange(len(value)))
        case 5 if isinstance(value, Pairs):
            key = rng.choice(KEYS) if rng.random() < 0.7 or not value else rng.choice(value)[0]
            value.insert(rng.randint(0, len(value)), [key, rng.choice(slots)[0][-1]])
        case 6 if isinstance(value, Pairs) and value:
            pair = rng.choice(value)
            pair[0] = rng.choice((rng.choice(KEYS), pair[0][:-1], pair[0] + "x"))
        case 7 if isinstance(value, list) and not isinstance(value, Pairs):
            value.append(rng.choice((0, 1, deepcopy(rng.choice(VALUES)))))
        case _:
            holder[i] = rng.choice(slots)[0][-1]
    try:
        return dump(root).encode()
    except RecursionError:  # a swap made a loop, or a copy a tower
        return b"[" * rng.choice((10, 1000, 50_000))


def _bytes(text: bytes, rng: random.Random) -> bytes:
    changed = bytearray(text)
    at = rng.randint(0, len(changed))
    size = rng.choice((1, 1, 1, 2, 8, 100))
    match rng.randrange(5):
        case 0 if at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        case 1:
            del changed[at : at + size]
        case 2:
            changed[at:at] = rng.randbytes(size)
        case 3:
            changed[at:at] = changed[at : at + size] * rng.choice((1, 1, 20))
        case _:
            tokens = (
                b"{",
                b"}",
                b"[",
                b"]",
                b",",
                b":",
                b'"',
                b"-0",
                b"1e9",
                b"\\ud800",
                b"NaN",
                b" ",
            )
            changed[at:at] = rng.choice(tokens) * rng.choice((1, 1, 1, 500))
    return bytes(changed)

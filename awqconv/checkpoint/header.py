"""safetensors headers: read as hostile input, written as the library writes them.

A file is an 8-byte little-endian length, that many bytes of JSON, then the tensors' bytes without
holes. What `parse_header` accepts, the safetensors library accepts with the same meaning; it
refuses a little more (repeated keys, unprintable names, unknown fields).
Source: https://github.com/huggingface/safetensors, safetensors/src/tensor.rs.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from awqconv.checkpoint.source import Source
from awqconv.checkpoint.strict import parse_json, shown
from awqconv.errors import AwqconvError

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip

MAX_HEADER = 100_000_000  # the library's own limit
MAX_NAME, MAX_DIMENSIONS = 4096, 64
_TOO_LARGE = 1 << 64  # sizes must fit the library's usize
_ENTRY = {"dtype", "shape", "data_offsets"}
_AGAIN = "The file is damaged or incomplete: download it again."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor where it lies: bytes `start` to `stop` of `file`, counted from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start

    @property
    def where(self) -> str:
        """File and tensor, for messages."""
        return f"{self.file}: {shown(self.name)}"


Header = tuple[dict[str, TensorInfo], dict[str, str]]


def tensor_size(dtype: object, shape: object) -> int:
    """Bytes of a tensor. Raises ValueError that says what is wrong with either."""
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise ValueError(f"unknown dtype {shown(str(dtype), 40)!r}")
    if not isinstance(shape, list | tuple) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a shape must be a list of at most {MAX_DIMENSIONS} lengths")
    count = 1
    for length in shape:
        if type(length) is not int or not 0 <= length < _TOO_LARGE:
            raise ValueError(f"a dimension of {shown(str(length), 40)} in its shape")
        count *= length
        if count >= _TOO_LARGE:
            break
    count *= bits
    if count >= _TOO_LARGE:
        raise ValueError(f"its shape {shown(str(shape))} has more than 2**64 bits")
    if count % 8:
        raise ValueError(f"shape {shown(str(shape))} of {dtype} does not end at a byte")
    return count // 8


def _entry(name: str, entry: object, data_size: int) -> tuple[int, int]:
    """Data offsets of one header entry. Raises ValueError that says what is wrong with it."""
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"a tensor name must be 1 to {MAX_NAME} printable characters")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise ValueError("an entry must be an object of dtype, shape and data_offsets")
    size = tensor_size(entry["dtype"], entry["shape"])
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        raise ValueError(f"data_offsets {shown(str(offsets), 60)} are no pair of integers")
    start, stop = offsets
    if not 0 <= start <= stop <= data_size:
        raise ValueError(
            f"data offsets {shown(str(offsets))} in a file with {data_size} data bytes"
        )
    if stop - start != size:
        raise ValueError(
            f"{stop - start} bytes (data offsets {start} to {stop}) where {entry['dtype']} "
            f"{shown(str(entry['shape']))} takes {size}"
        )
    return start, stop


def parse_header(raw: bytes, data_size: int, file: str) -> Header:
    """Tensors in the order they lie in, and the metadata, of the JSON part `raw` of a header.

    Raises AwqconvError(where=file or "file: tensor") unless the entries are well formed and the
    tensors fill the `data_size` bytes behind the header exactly, without overlap.
    """
    header = parse_json(raw, file, _AGAIN, floats=False)
    if not isinstance(header, dict):
        raise AwqconvError("the header is no JSON object", file, _AGAIN)
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AwqconvError("__metadata__ must be an object of strings", file, _AGAIN)
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        try:
            spans.append((*_entry(name, entry, data_size), name))
        except ValueError as error:
            raise AwqconvError(str(error), f"{file}: {shown(name)}", _AGAIN) from None
    spans.sort(key=lambda span: span[:2])
    tensors: dict[str, TensorInfo] = {}
    base, end, last = 8 + len(raw), 0, ""
    for start, stop, name in spans:
        if start != end:
            what = f"overlaps {end - start} bytes of" if start < end else "leaves a hole after"
            raise AwqconvError(
                f"starts at data offset {start} and {what} {shown(last) or 'the header'}, "
                f"which ends at {end}",
                f"{file}: {shown(name)}",
                _AGAIN,
            )
        entry = header[name]
        tensors[name] = TensorInfo(
            name, entry["dtype"], tuple(entry["shape"]), file, base + start, base + stop
        )
        end, last = stop, name
    if end != data_size:
        raise AwqconvError(
            f"{data_size} data bytes, of which the tensors take {end}: {data_size - end} too many",
            file,
            _AGAIN,
        )
    return tensors, metadata


def read_header(source: Source, file: str) -> Header:
    """`parse_header` of a file. Raises AwqconvError also for a length that cannot be."""
    size = source.files().get(file, 0)
    if size < 8:
        raise AwqconvError(f"{size} bytes are too few for a safetensors file", file, _AGAIN)
    start = source.read(file, 0, 8)
    if start == b"version ":
        raise AwqconvError("a Git LFS pointer, not the file itself", file, "Run: git lfs pull")
    length = int.from_bytes(start, "little")
    if length > min(MAX_HEADER, size - 8):
        raise AwqconvError(
            f"a header of {length:,} bytes in a file of {size:,} (limit {MAX_HEADER:,})",
            file,
            _AGAIN,
        )
    return parse_header(source.read(file, 8, 8 + length), size - 8 - length, file)


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
    file: str = "",
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The first bytes of a file, length included, and where each (name, dtype, shape) will lie.

    Tensors lie in the given order. Where that would put one at an offset its dtype does not
    divide (torch cannot view such bytes), all lie by falling dtype size instead, as the library
    writes them. The data starts at a multiple of 8. `metadata` is {"format": "pt"} unless given.

    Raises ValueError for a repeated name, an unknown dtype or an impossible shape.
    """
    given = [(name, dtype, shape, tensor_size(dtype, shape)) for name, dtype, shape in tensors]
    if len({name for name, *_ in given}) != len(given):
        raise ValueError("a tensor name is there twice")
    end = 0
    for _, dtype, _, size in given:
        if end % max(1, DTYPE_BITS[dtype] // 8):
            given.sort(key=lambda tensor: -DTYPE_BITS[tensor[1]])
            break
        end += size
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, dtype, shape, size in given:
        start, end = end, end + size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, parse_header(text, end, file)[0]

"""Golden bytes of the vendors' packers, as raw tensors by case."""

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

GOLDEN = Path(__file__).parent / "golden"


class Raw(NamedTuple):
    """A tensor as it stands in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def array(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.data, np.uint8)


def raw_tensors(path: Path) -> dict[str, Raw]:
    """All tensors of a file, by a reader that shares nothing with the package's."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: Raw(e["dtype"], tuple(e["shape"]), data[start + first : start + last])
        for name, e in header.items()
        for first, last in [e["data_offsets"]]
    }


@cache
def cases(file: str) -> dict[str, dict[str, Raw]]:
    """Tensors by case, then by `section/name`."""
    found: dict[str, dict[str, Raw]] = defaultdict(dict)
    for name, raw in raw_tensors(GOLDEN / f"{file}.safetensors").items():
        case, _, rest = name.partition("/")
        found[case][rest] = raw
    return dict(found)


def awq_inputs(case: str) -> dict[str, Raw]:
    """qweight, qzeros, scales of a case in AutoAWQ GEMM form."""
    return {name.removeprefix("in/"): raw for name, raw in cases("awq_inputs")[case].items()}

"""Hostile bytes: only AwqconvError comes out, quickly and in little memory. See fuzzing.py.

`benchmarks/fuzz.py` runs the same for as long as wanted.
"""

import json
import random
from typing import Any

import pytest
from fuzzing import BREAK, mutate, run, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from awqconv.checkpoint.header import DTYPE_BITS, build_header, parse_header
from awqconv.checkpoint.strict import parse_json
from awqconv.errors import AwqconvError

SEEDS = seeds()
LENGTHS = st.one_of(st.integers(0, 9), st.integers(), st.booleans(), st.floats(), st.none())
VALUES = st.recursive(
    st.one_of(LENGTHS, st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
SHAPES = st.lists(st.integers(0, 5), max_size=4)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F17"]),
        "shape": SHAPES | st.lists(LENGTHS, max_size=3),
        "data_offsets": st.lists(st.integers(-1, 30), min_size=2, max_size=2).map(sorted),
    }
)


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds_are_valid(seed: bytes) -> None:
    assert run(seed).accepted


@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(SEEDS), st.integers(0, 2**32), st.integers(1, 4))
def test_mutated_checkpoints(data: bytes, seed: int, times: int) -> None:
    rng = random.Random(seed)
    for _ in range(times):
        data = mutate(data, rng)
    run(data)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=5).map(BREAK.join))
def test_any_bytes(data: bytes) -> None:
    run(data)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.text(max_size=4), ENTRIES | VALUES, max_size=4), st.integers(0, 40))
def test_accepted_headers_are_the_library_s(header: dict[str, Any], size: int) -> None:
    raw = json.dumps(header).encode()
    try:
        tensors, _ = parse_header(raw, size, "f")
    except AwqconvError:
        return
    library = dict(deserialize(len(raw).to_bytes(8, "little") + raw + bytes(size)))
    assert {name: (info["dtype"], tuple(info["shape"])) for name, info in library.items()} == {
        name: (info.dtype, info.shape) for name, info in tensors.items()
    }


@settings(max_examples=500, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8),
        st.tuples(st.sampled_from([d for d in DTYPE_BITS if DTYPE_BITS[d] >= 8]), SHAPES),
        max_size=6,
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
def test_built_headers_are_read_alike_by_both(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    header, places = build_header(
        [(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()], metadata
    )
    size = max((place.stop for place in places.values()), default=len(header)) - len(header)
    ours, read = parse_header(header[8:], size, "")
    assert (ours, read) == (places, metadata or {"format": "pt"})
    try:
        library = dict(deserialize(header + bytes(size)))
    except SafetensorError as error:  # pragma: no cover
        pytest.fail(str(error))
    assert {name: (info["dtype"], info["shape"]) for name, info in library.items()} == tensors
    assert all(
        (place.start % max(1, DTYPE_BITS[place.dtype] // 8)) == 0 for place in places.values()
    )


@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_json_is_read_as_python_reads_it(value: Any) -> None:
    text = json.dumps(value).encode()
    try:
        assert json.dumps(parse_json(text, "", "")) == json.dumps(json.loads(text))
    except AwqconvError as error:
        assert "surrogate" in error.what  # noqa: PT017

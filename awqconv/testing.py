"""Laws that every target obeys, to be run by the tests of a package that adds one.

    from awqconv.testing import check_target
    from my_package import TARGET

    def test_laws():
        check_target(TARGET)

Codes, zero points and scales are random and differ from column to column, so that a wrong order
is found wherever two elements can change places. A law that does not hold raises LawBrokenError
with the law, the layer and the first element that is wrong. What laws cannot find is an order that
is wrong and consistent: for that, compare with bytes of the vendor's own packer.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awqconv.checkpoint.header import DTYPE_BITS, build_header
from awqconv.errors import AwqconvError
from awqconv.repack import reference
from awqconv.repack.axes import Layout
from awqconv.repack.encode import NIBBLES, recode
from awqconv.repack.floats import RAW, caster, from_float32
from awqconv.repack.layouts import AWQ
from awqconv.targets.base import Linear, Mixture, Part, Rule, Target, layout

Arrays = Mapping[str, NDArray[Any]]  # q, z uint8 and s raw, in logical order
Bytes = NDArray[np.uint8]

LINEARS = tuple(
    Linear(K, N, g, scales)
    for K, N, g, scales in (
        (256, 128, 64, "F16"), (512, 192, 128, "BF16"), (256, 64, 32, "F32"),
        (128, 256, 128, "F16"),
        (384, 320, 48, "F16"), (192, 96, 96, "BF16"), (512, 64, 256, "F16"), (384, 64, 192, "F16"),
        (64, 8, 16, "F16"), (96, 24, 32, "F16"),
    )
)  # fmt: skip


class LawBrokenError(AwqconvError, AssertionError):
    """A target does not obey a law."""


def check_target(
    target: Target, linears: Iterable[Linear] = LINEARS, *, conversion: bool = True
) -> Counter[str]:
    """Check every law over those `linears` that the target takes; how often each was checked.

    With `conversion`, and where the target is known to awqconv by its entry point, a whole
    checkpoint is converted, verified and turned back as well.

    Raises LawBrokenError for the first law that does not hold.
    """
    checked: Counter[str] = Counter()
    _check_tables(target)
    checked["tables"] += 1
    taken = [x for kind in ("dense", "expert") for linear in linears
             if _takes(target, x := replace(linear, kind=kind))]  # fmt: skip
    if not taken:
        raise _broken(target, "takes a layer", None, "rules refuse all of the layers tried")
    for linear in taken:
        arrays = random_arrays(linear)
        whole = encode(target, linear, arrays)
        _check_sizes(target, linear, whole)
        _check_order(target, linear, arrays, whole)
        _check_back(target, linear, arrays, whole)
        checked.update(("sizes", "order", "there and back"))
        for dim, start, stop in _cuts(target, linear):
            _check_slice(target, linear, arrays, whole, dim, start, stop)
            checked["slice"] += 1
        if fused := _check_fusion(target, linear, arrays):
            checked["fusion"] += fused
    try:
        known = layout(target.name) is target
    except AwqconvError:
        known = False
    if conversion and known and target.name != "bf16":
        _check_conversion(target, taken)
        checked["conversion"] += 1
    return checked


def random_arrays(linear: Linear, seed: int = 0) -> Arrays:
    """Random q [K, N], z [G, N] uint8 and s [G, N], raw elements of the scales' dtype."""
    rng = np.random.default_rng([seed, linear.K, linear.N, linear.g])
    scales = rng.uniform(1e-3, 1e-1, linear.shape("s")).astype(np.float32)
    return {
        "q": rng.integers(0, 16, linear.shape("q"), np.uint8),
        "z": rng.integers(0, 16, linear.shape("z"), np.uint8),
        "s": from_float32(scales, linear.scales),
    }


def _plain(of: str, linear: Linear) -> tuple[Part, Layout]:
    """An array in rows: nibbles two to a byte, scales as they are."""
    if of == "s":
        part = Part("", "s", layout("awq").parts(linear)[2].pattern, linear.scales)
    else:
        part = Part("", "q" if of == "q" else "z", NIBBLES, "U8")
    return part, part.pattern.bind(linear.shape(of))


def encode(target: Target, linear: Linear, arrays: Arrays) -> dict[str, Bytes]:
    """The bytes of every part, padding derived, by the engine that conversion uses."""
    out: dict[str, Bytes] = {}
    for part in target.parts(linear):
        array = arrays[part.of]
        flat = array if part.of == "s" else reference.pack_nibbles(array)
        source = np.ascontiguousarray(flat).reshape(-1).view(np.uint8)
        buffer = np.zeros(part.nbytes(linear), np.uint8)
        plain, at = _plain(part.of, linear)
        scales = linear.scales if part.of == "s" else "F32"
        recode(source, plain, at, buffer, part, part.layout(linear), scales)
        if part.pattern.pad:
            target.derive(part, linear, buffer, arrays["z"])
        out[part.suffix] = buffer
    return out


def decode(part: Part, linear: Linear, data: Bytes, at: Layout | None = None) -> NDArray[Any]:
    """An array in logical order from a part's bytes, or from those of a slice `at` of it."""
    at = at or part.layout(linear)
    shaped = replace(linear, K=at.shape[0] if part.of == "q" else linear.K)
    plain = _plain(part.of, shaped)[0]
    size = at.shape[0] * at.shape[1] * plain.bits // 8
    rows = np.zeros(size, np.uint8)
    scales = linear.scales if part.of == "s" else "F32"
    recode(data, part, at, rows, plain, plain.pattern.bind(at.shape), scales)
    if part.of == "s":
        return rows.view(RAW[linear.scales]).reshape(at.shape)
    return reference.unpack_nibbles(rows.reshape(at.shape[0], -1))


# --- the laws


def _broken(target: Target, law: str, linear: object, what: str) -> LawBrokenError:
    where = f"target {target.name}" + (f", {linear}" if linear else "")
    return LawBrokenError(f"law '{law}': {what}", where, "Mend the target's parts or patterns.")


def _same(target: Target, law: str, linear: Linear, a: NDArray[Any], b: NDArray[Any]) -> None:
    if a.shape != b.shape or not np.array_equal(a, b):
        at = np.argwhere(a != b)[0].tolist() if a.shape == b.shape else []
        raise _broken(target, law, linear, f"element {at} of {list(a.shape)} and {list(b.shape)}")


def _takes(target: Target, linear: Linear) -> bool:
    if linear.kind == "expert" and target.expert_rules is not None:
        # Gate and up [H, I] and down [I, H] alike: a layer that fits as either.
        shapes = (linear.K, linear.N), (linear.N, linear.K)
        return all(
            H % linear.g == I % linear.g == 0 and not target.broken(Mixture(H, I, linear.g, 2))
            for H, I in shapes  # noqa: E741
        )
    return not target.broken(linear)


def _check_tables(target: Target) -> None:
    """Name, title, fallbacks and rules are there and mean something."""

    def need(holds: object, what: str) -> None:
        if not holds:
            raise _broken(target, "tables", None, what)

    need(target.name and target.name == target.name.lower(), "the name must be lower case")
    need(target.title, "a title says what reads the layout")
    for name in (target.fallback, target.expert_fallback):
        need(name is None or name == target.name or layout(name), f"fallback {name} is not known")
    mixture = Mixture(256, 128, 64, 2)
    rules: list[tuple[Rule, Linear | Mixture]] = [(rule, LINEARS[0]) for rule in target.rules]
    rules += [(rule, mixture) for rule in target.expert_rules or ()]
    for rule, layer in rules:
        need(rule.source, f"rule {rule.text} has no source")
        try:
            rule.broken(layer)
        except Exception as error:
            raise _broken(target, "tables", layer, f"rule {rule.text}: {error!r}") from error


def _check_sizes(target: Target, linear: Linear, whole: Mapping[str, Bytes]) -> None:
    """The parts hold q, z and s once each, and their shapes and dtypes make up their bytes."""
    parts = target.parts(linear)
    if sorted(part.of for part in parts) not in (["q", "s", "z"], ["w"]) or len(whole) != len(
        parts
    ):
        raise _broken(target, "sizes", linear, f"parts {[(p.suffix, p.of) for p in parts]}")
    for part in parts:
        size = int(np.prod(part.shape(linear))) * DTYPE_BITS[part.dtype] // 8
        if size != whole[part.suffix].size:
            raise _broken(target, "sizes", linear, f"{part.suffix}: {size} bytes by its shape")


def _check_order(
    target: Target, linear: Linear, arrays: Arrays, whole: Mapping[str, Bytes]
) -> None:
    """The engine's bytes are those of the pattern by reshape and transpose."""
    for part in target.parts(linear):
        pattern, data = part.pattern, whole[part.suffix]
        if part.coded:
            codes = (arrays[part.of] ^ part.xor).astype(np.uint8)
            expected: NDArray[Any] = reference.pack(codes, pattern)
            if pattern.pad:
                data = data.reshape(*expected.shape[:-2], -1)[..., : -pattern.pad // 2]
        else:
            expected = reference.arrange(_numbers(part, linear, arrays), pattern)
            expected = np.ascontiguousarray(expected)
        flat = expected.reshape(-1).view(np.uint8)
        _same(target, "order", linear, data.reshape(-1), flat)


def _numbers(part: Part, linear: Linear, arrays: Arrays) -> NDArray[Any]:
    if part.of == "z":
        values = part.offset + part.sign * arrays["z"].astype(np.float32)
        return from_float32(values, part.dtype)
    raw = arrays["s"]
    if part.dtype == linear.scales:
        return raw
    return caster(linear.scales, part.dtype)(raw)


def _check_back(target: Target, linear: Linear, arrays: Arrays, whole: Mapping[str, Bytes]) -> None:
    """decode(encode(x)) = x, and encode(decode(y)) = y with its derived sections."""
    back = {str(p.of): decode(p, linear, whole[p.suffix]) for p in target.parts(linear)}
    for of, array in back.items():
        _same(target, "there and back", linear, array, arrays[of])
    for suffix, data in encode(target, linear, back).items():
        _same(target, "there and back", linear, data, whole[suffix])


def _grain(target: Target, linear: Linear, dim: int) -> int:
    """The smallest step along K or N at which all parts can be cut."""
    steps = [8] if dim else [linear.g]
    for part in target.parts(linear):
        axes = [a for a in part.layout(linear).axes if a.dim == dim]
        steps.append(max(a.logical for a in axes) * (1 if dim or part.of == "q" else linear.g))
    return lcm(*steps)


def _cut(linear: Linear, dim: int, size: int) -> Linear:
    return replace(linear, N=size) if dim else replace(linear, K=size)


def _cuts(target: Target, linear: Linear) -> Iterator[tuple[int, int, int]]:
    """Slices of both dimensions at the layout's granule, that the target takes by themselves."""
    for dim, size in enumerate((linear.K, linear.N)):
        grain = _grain(target, linear, dim)
        for start, stop in ((0, grain), (grain, size), (size - grain, size)):
            if 0 <= start < stop <= size and stop - start < size:
                part = _cut(linear, dim, stop - start)
                if linear.kind == "expert" or _takes(target, part):
                    yield dim, start, stop


def _check_slice(
    target: Target, linear: Linear, arrays: Arrays, whole: Mapping[str, Bytes],
    dim: int, start: int, stop: int,
) -> None:  # fmt: skip
    """Convert, then cut = cut, then convert; and a slice of the bytes holds the slice's elements.

    A slice that keeps one group may have its scales in another order: then they are read from the
    one and written in the other.
    """
    cut = _cut(linear, dim, stop - start)
    pieces: dict[str, NDArray[Any]] = {}
    for part in target.parts(linear):
        unit = linear.g if dim == 0 and part.of != "q" else 1
        span = slice(start // unit, stop // unit)
        at = part.layout(linear).slice(dim, span.start, span.stop)
        pieces[part.of] = decode(part, linear, whole[part.suffix], at)
        logical = arrays[part.of][span] if dim == 0 else arrays[part.of][:, span]
        _same(target, "slice", cut, pieces[part.of], logical)
    first = encode(target, cut, {of: a[_span(of, linear, dim, start, stop)]
                                 for of, a in arrays.items()})  # fmt: skip
    for suffix, data in encode(target, cut, pieces).items():
        _same(target, "slice", cut, data, first[suffix])


def _span(of: str, linear: Linear, dim: int, start: int, stop: int) -> tuple[slice, slice]:
    unit = linear.g if dim == 0 and of != "q" else 1
    span = slice(start // unit, stop // unit)
    return (span, slice(None)) if dim == 0 else (slice(None), span)


def _check_fusion(target: Target, linear: Linear, arrays: Arrays) -> int:
    """Layers joined along N: each part, written in its columns of the whole, makes the whole."""
    grain = _grain(target, linear, 1)
    if linear.N // grain < 2:
        return 0
    halves = [(0, grain), (grain, linear.N)]
    whole = encode(target, linear, arrays)
    for part in target.parts(linear):
        buffer = np.zeros_like(whole[part.suffix])
        for start, stop in halves:
            one = replace(linear, N=stop - start)
            mine = {p.suffix: p for p in target.parts(one)}[part.suffix]
            data = encode(target, one, {of: a[:, start:stop] for of, a in arrays.items()})
            into = part.layout(linear).slice(1, start, stop)
            recode(data[part.suffix], mine, mine.layout(one), buffer, part, into)
        if part.pattern.pad:
            target.derive(part, linear, buffer, arrays["z"])
        _same(target, "fusion", linear, buffer, whole[part.suffix])
    return 1


def _check_conversion(target: Target, linears: Iterable[Linear]) -> None:
    """A checkpoint converts, verifies, and turns back to its bytes."""
    from awqconv.conversion import convert
    from awqconv.verification import verify

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        tensors = write_checkpoint(path / "m", linears)
        convert(path / "m", path / "out", target=target.name)
        found = verify(path / "out", source=path / "m")
        if not found.ok:
            raise _broken(target, "conversion", None, str(found.problems[0]))
        convert(path / "out", path / "back", target="awq")
        back = (path / "back/model.safetensors").read_bytes()
        for name, data in tensors.items():
            if data not in back:
                raise _broken(target, "conversion", None, f"{name} does not turn back")


def write_checkpoint(path: Path, linears: Iterable[Linear]) -> dict[str, bytes]:
    """An AWQ checkpoint of random layers, one for each of `linears`; its tensors' bytes by name."""
    specs, data = [], {}
    for number, linear in enumerate(linears):
        name = f"model.layers.{number}.mlp." + (
            "experts.0.down_proj" if linear.kind == "expert" else "down_proj"
        )
        arrays = random_arrays(linear, seed=number + 1)
        for part in layout("awq").parts(linear):
            array = arrays[part.of]
            raw = reference.pack(array, AWQ) if part.of in "qz" else array
            specs.append((f"{name}.{part.suffix}", part.dtype, part.shape(linear)))
            data[f"{name}.{part.suffix}"] = np.ascontiguousarray(raw).tobytes()
    header, places = build_header(specs)
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(header + b"".join(data[name] for name in places))
    quant = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    (path / "config.json").write_text(json.dumps({"quantization_config": quant}))
    return data

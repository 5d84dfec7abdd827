"""What a target is: the tensors of one module as parts, the rules its kernels ask, a fallback.

A third-party package adds a target by an entry point in the group `awqconv.targets` that names
a `Target` instance. Everything else (planning, streaming, verification, kernels, the command
line) reads these tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from math import prod
from pkgutil import iter_modules
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from awqconv.errors import AwqconvError
from awqconv.repack.axes import Layout, Pattern

CODED = {"I32": 8, "I16": 4, "U8": 2}  # nibbles of one storage word, by safetensors dtype
NUMBER_BITS = {"I8": 8, "F16": 16, "BF16": 16, "F32": 32}


@dataclass(frozen=True, slots=True)
class Linear:
    """One quantized linear layer as a kernel sees it: y = x [M, K] @ w [K, N] (+ bias).

    `g` is the number of rows of w that share a scale (K where channelwise); `scales` and `bias`
    are safetensors dtypes; `kind` is "dense" or "expert" (one expert of a mixture).
    """

    K: int
    N: int
    g: int
    scales: str = "F16"
    bias: str | None = None
    kind: str = "dense"

    @property
    def G(self) -> int:
        """Number of groups, the rows of scales and zero points."""
        return self.K // self.g

    def shape(self, of: str) -> tuple[int, int]:
        """Logical shape of the array `of`: [K, N] for q, [G, N] for z and s."""
        return (self.K, self.N) if of in "qw" else (self.G, self.N)


@dataclass(frozen=True, slots=True)
class Mixture:
    """The experts of one layer as a kernel sees them: y = (silu(x @ w1) * (x @ w3)) @ w2, E times.

    w1 and w3 are [H, I], w2 is [I, H]: H hidden, I intermediate (of one rank), `g` group size.
    """

    H: int
    I: int  # noqa: E741
    g: int
    E: int


@dataclass(frozen=True)
class Rule:
    """A condition a kernel sets, written as the expression it is checked by, and where it is from.

    The expression sees K, N, g, G and kind of a linear layer, or H, I, g and E of a mixture.
    """

    text: str
    source: str

    def broken(self, layer: Linear | Mixture) -> str | None:
        """None where the rule holds, else the rule with the numbers seen."""
        names = [*layer.__dataclass_fields__, *(("G",) if isinstance(layer, Linear) else ())]
        values = {name: getattr(layer, name) for name in names}
        if eval(self.text, {"__builtins__": {}, "max": max, "min": min}, values):
            return None
        seen = [f"{n} = {values[n]}" for n in names if re.search(rf"\b{n}\b", self.text)]
        return f"{self.text} ({', '.join(seen)})"


@dataclass(frozen=True)
class Part:
    """One stored tensor of a module: the array it holds, the order and the form of its elements.

    `of`: "q" codes, "z" zero points, "s" scales, "w" the dequantized weight. Codes and zero points
    in an integer `dtype` of CODED are nibbles, each xor `xor`; zero points in another dtype are
    numbers `offset + sign * z`.
    """

    suffix: str
    of: Literal["q", "z", "s", "w"]
    pattern: Pattern
    dtype: str
    xor: int = 0
    sign: int = 1
    offset: int = 0

    @property
    def coded(self) -> bool:
        """Whether the elements are nibbles."""
        return self.of in "qz" and self.dtype in CODED

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return 4 if self.coded else NUMBER_BITS[self.dtype]

    def layout(self, linear: Linear) -> Layout:
        """The pattern bound to this layer's shape."""
        return self.pattern.bind(linear.shape(self.of))

    def shape(self, linear: Linear) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        stored = self.layout(linear).stored
        if not self.coded:
            return stored
        if stored[-1] != CODED[self.dtype]:
            raise ValueError(f"{self.pattern} has words of {stored[-1]} nibbles, not {self.dtype}")
        return (*stored[:-2], stored[-2] + self.pattern.pad // stored[-1])

    def nbytes(self, linear: Linear) -> int:
        """Bytes of the stored tensor."""
        word = 4 * CODED[self.dtype] if self.coded else self.bits
        return prod(self.shape(linear)) * word // 8


class Target:
    """One layout family and the engine that reads it. Subclasses live one to a file.

    `fallback` names the layout of a module that breaks a rule: "awq" keeps it as it is, "bf16"
    dequantizes it to a plain `weight` [N, K]; `lossy` layouts cannot be turned back, so the
    original tensors are kept beside the converted ones. Engines decide for all experts of a layer
    together, by `expert_rules`, and write them as `expert_fallback` if one is broken. None means
    that each expert is asked `rules`, as other layers are, and that the fallback is theirs.
    """

    name: str
    title: str  # what reads it, one line
    version: int = 1  # of the layout; raised whenever a byte of the output changes
    rules: tuple[Rule, ...] = ()
    fallback: str = "awq"
    expert_rules: tuple[Rule, ...] | None = None
    expert_fallback: str | None = None
    lossy: bool = False
    note: str = ""

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        """The packed tensors of a module in this layout."""
        raise NotImplementedError

    def constants(self, linear: Linear) -> Mapping[str, NDArray[np.generic]]:
        """Tensors that depend on the shape alone, by suffix."""
        return {}

    def bias(self, linear: Linear) -> str | None:
        """The dtype the bias is stored in."""
        return linear.bias

    def derive(
        self, part: Part, linear: Linear, rows: NDArray[np.uint8], z: NDArray[np.uint8]
    ) -> None:
        """Fill the padding of `rows` (the stored rows of a slice of N, with padding) in place.

        `z`: zero points 0..15, uint8 [G, columns of the slice]. Called for patterns with `pad`.
        """
        raise NotImplementedError

    def quantization_config(self, common: dict[str, Any]) -> dict[str, Any]:
        """The `quantization_config` of the written config.json, from awqconv's own entries."""
        return common

    def broken(self, layer: Linear | Mixture) -> str | None:
        """The first rule that the layer breaks, with numbers, or None if the kernels take it."""
        rules = self.rules if isinstance(layer, Linear) else self.expert_rules or ()
        return next((said for rule in rules if (said := rule.broken(layer))), None)

    def __repr__(self) -> str:
        return f"<target {self.name}>"


class Dense(Target):
    """bf16 `weight` [N, K], (q - z) * s rounded to nearest even: what engines do with the rest.

    Source: SGLang AWQAscendLinearKernel.process_weights_after_loading, the slow path.
    """

    name = "bf16"
    title = "a plain linear layer (dequantized)"
    lossy = True

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        return (Part("weight", "w", Pattern("k n -> n k"), "BF16"),)


@cache
def _own() -> dict[str, Target]:
    """The targets of this package, and the fallback layout."""
    found: dict[str, Target] = {"bf16": Dense()}
    package = import_module("awqconv.targets")
    for entry in iter_modules(package.__path__):
        if entry.name != "base":
            target = import_module(f"awqconv.targets.{entry.name}").TARGET
            found[target.name] = target
    return found


@cache
def _registry() -> dict[str, Target]:
    from importlib.metadata import entry_points  # slow to import, and to run

    found = dict(_own())
    for point in entry_points(group="awqconv.targets"):
        target = point.load()
        if not isinstance(target, Target) or target.name in found:
            raise AwqconvError(
                f"{target!r} is no new awqconv target",
                f"entry point {point.name} = {point.value}",
                "remove that package, or have its author fix it",
            )
        found[target.name] = target
    return found


def layout(name: str) -> Target:
    """The target or fallback layout of this name. Raises AwqconvError with the known names."""
    try:
        return _own().get(name) or _registry()[name]
    except KeyError:
        known = ", ".join(target.name for target in targets())
        raise AwqconvError(f"no target is named {name!r}", fix=f"known targets: {known}") from None


def targets() -> Iterator[Target]:
    """All targets that can be converted to, by name; the internal fallback layout left out."""
    return (target for name, target in sorted(_registry().items()) if name != "bf16")

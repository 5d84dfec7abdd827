"""How far a kernel may be from y = x @ w + b, derived from what it rounds; no tolerance is chosen.

For a sum of products with at most n roundings from a product to y, each of relative error u,

    |y' - y| <= gamma(n) |x| @ |w|,    gamma(n) = n u / (1 - n u)

(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1 and section 3.1; any
order of summation: section 4.2.) To it come, each elementwise,

    a weight rounded to a dtype of unit v      |w' - w| <= v |w| + eta
    activations in 8 bits, a step A by row     |x' - x| as it is, at most A / 2 + 4u |x|
    y rounded to a dtype of unit v             |y' - y| <= v |y| + eta

where eta is half the least subnormal number. Units: float32 2^-24, float16 2^-11, bfloat16 2^-8.
One rounding more than a kernel has is allowed for the float64 product that it is held to. Tensor
cores truncate each addition: unit 2^-23 (Fasi, Higham, Mikaitis and Pranesh, Numerical behavior of
NVIDIA tensor cores, PeerJ Computer Science 7:e330, 2021). Overflow has no bound: y must be finite
wherever the exact value is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from awqconv.kernels.cpu import quantize_rows, roundings
from awqconv.repack.floats import lossless
from awqconv.targets.base import Linear, Target

Doubles = NDArray[np.float64]

UNIT = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
ETA = {"F32": 2.0**-150, "F16": 2.0**-25, "BF16": 2.0**-134}


@dataclass(frozen=True)
class Arithmetic:
    """What a kernel rounds, as safetensors dtypes in turn: the weight, then y.

    `roundings` in a sum have relative errors of `unit`; `int8`: activations are cut to 8 bits.
    """

    roundings: int
    unit: float = UNIT["F32"]
    weight: tuple[str, ...] = ()
    output: tuple[str, ...] = ()
    int8: bool = False

    @property
    def gamma(self) -> float:
        """n u / (1 - n u). Raises ValueError where n u >= 1: there is no bound."""
        share = (self.roundings + 1) * self.unit
        if share >= 1:
            raise ValueError(f"{self.roundings} roundings of {self.unit} have no error bound")
        return share / (1 - share)


def cpu(target: Target, linear: Linear, scales: str | None = None) -> Arithmetic:
    """What `kernels.cpu.gemm` rounds. `scales`: their dtype in the exact weight, if another."""
    parts = {part.of: part for part in target.parts(linear)}
    if "w" in parts:
        weight: tuple[str, ...] = (parts["w"].dtype,)
    else:
        stored = parts["s"].dtype
        weight = () if lossless(scales or linear.scales, stored) else (stored,)
    int8 = "q" in parts and parts["q"].pattern.pad > 0
    return Arithmetic(roundings(target, linear), weight=weight, int8=int8)


def gpu(target: Target, linear: Linear, dtype: str, scales: str | None = None) -> Arithmetic:
    """What a kernel rounds that has weights, activations and y in F16 or BF16, sums in float32.

    Weights are rounded once, from a float32 product, after any rounding on storage.
    """
    stored = cpu(target, linear, scales).weight
    count = linear.K + (linear.bias is not None)
    return Arithmetic(count, 2.0**-23, weight=(*stored, dtype), output=(dtype,))


def activations(M: int, K: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Integers of -127..127, a 127 in each row, float32 [M, K]: every kernel holds them exactly.

    With them the bound of a kernel with 8-bit activations is as narrow as that of any other.
    """
    x = random.integers(-127, 128, (M, K)).astype(np.float32)
    x[np.arange(M), random.integers(0, K, M)] = 127
    return x


def product(x: NDArray[Any], w: NDArray[Any]) -> Doubles:
    """x [M, K] @ w [K, n] in float64.

    In pieces that BLAS gives to no threads of its own: its threads wait for one another, and
    modules are verified in threads already.
    """
    step = max(1, 200_000 // max(1, len(x) * w.shape[1]))
    total = np.zeros((len(x), w.shape[1]))
    for k in range(0, len(w), step):
        part = w[k : k + step].astype(np.float64, copy=False)
        total += x[:, k : k + step].astype(np.float64) @ part
    return total


def elementwise(
    x: NDArray[Any], w: NDArray[Any], arithmetic: Arithmetic, bias: NDArray[Any] | None = None
) -> Doubles:
    """The bound on |y - (x @ w + bias)|, float64 [M, n], for x [M, K], w [K, n], bias [n]."""
    size_x, size_w = np.abs(x, dtype=np.float64), np.abs(w, dtype=np.float64)
    size = product(size_x, size_w)  # of the terms summed
    error: Doubles = np.zeros_like(size)
    if arithmetic.int8:
        codes, step = quantize_rows(np.asarray(x, np.float32))
        rounded = (codes.astype(np.float64) - 128) * step[:, None]
        moved = np.minimum(abs(rounded - x), step[:, None] / 2 + 4 * UNIT["F32"] * size_x)
        error += product(moved, size_w)
    for dtype in arithmetic.weight:
        error += UNIT[dtype] * (size + error) + ETA[dtype] * size_x.sum(1, keepdims=True)
    if bias is not None:
        size += np.abs(bias)
    error += arithmetic.gamma * (size + error)
    error += 2 * ETA["F32"] * x.shape[1] * (1 + size_x.max(1, keepdims=True))
    if arithmetic.output:
        exact = np.abs(product(x, w) + (0 if bias is None else bias))
    for dtype in arithmetic.output:
        error += UNIT[dtype] * (exact + error) + ETA[dtype]
    return error


class Verdict(NamedTuple):
    """A product against the exact one."""

    error: float  # ||y - exact|| / ||exact||, Frobenius
    bound: float  # ||elementwise bound|| / ||exact||
    worst: float  # largest |y - exact|
    beyond: str  # the element that exceeds its bound the most, or "" where all keep theirs


def judge(
    y: NDArray[Any],
    exact: Doubles,
    x: NDArray[Any],
    w: NDArray[Any],
    target: Target,
    linear: Linear,
    *,
    bias: NDArray[Any] | None = None,
    arithmetic: Arithmetic | None = None,
) -> Verdict:
    """Hold y [M, n] to exact = x @ w + bias in float64, elementwise; by default as `kernels.cpu`.

    Where the exact value is NaN or infinite (a scale is), y has to be NaN or infinite: the order
    of the factors decides which. Anywhere else y has to be finite. Norms are over finite elements.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        allowed = elementwise(x, w, arithmetic or cpu(target, linear), bias)
        finite = np.isfinite(exact)
        difference = np.where(finite, np.abs(y - exact), 0)
        kept = np.where(finite, difference <= allowed, ~np.isfinite(y))
        norm = np.linalg.norm(exact[finite])
        beyond = ""
        if not kept.all():
            ratio = np.where(kept, 0, np.nan_to_num(difference / allowed, nan=np.inf))
            at = np.unravel_index(np.argmax(np.where(kept, -1, ratio)), ratio.shape)
            beyond = (
                f"row {at[0]}, column {at[1]} is {y[at]:.6g} and not {exact[at]:.6g}, "
                f"within {allowed[at]:.3g} ({np.count_nonzero(~kept):,} of {y.size:,} are beyond)"
            )
    return Verdict(
        _ratio(float(np.linalg.norm(difference)), float(norm)),
        _ratio(float(np.linalg.norm(allowed[finite])), float(norm)),
        float(difference.max(initial=0)),
        beyond,
    )


def _ratio(value: float, norm: float) -> float:
    return value / norm if norm else (0.0 if value == 0 else float("inf"))

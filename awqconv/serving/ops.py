"""One packed layer on a device, and what multiplies by it there.

`multiplier` takes the platform's own op for the layout where the platform has one, Triton on CUDA,
and awqconv's CPU kernels on a host. Its result is a function of x [M, K] alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from awqconv import kernels
from awqconv.errors import AwqconvError
from awqconv.targets import Linear, Target, layout

Packed = Mapping[str, Tensor]
Multiply = Callable[[Tensor], Tensor]

DTYPES = {
    "I32": torch.int32, "I64": torch.int64, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Rows from which one dequantization and a BLAS product beat the kernel that unpacks as it goes.
DENSE_ROWS = 128


def multiplier(packed: Packed, target: Target, linear: Linear) -> Multiply:
    """x [M, K] -> x @ ((q - z) * s) [M, N] in x's dtype, for tensors on one device.

    The tensors must stay as they are. Raises AwqconvError on a device that nothing is known for.
    """
    device = next(iter(packed.values())).device.type
    own = PLATFORMS.get((target.name, device))
    if own is not None and (multiply := own(packed, linear)) is not None:
        return multiply
    if device == "cpu":
        return _host(packed, target, linear)
    if device == "cuda":
        return lambda x: kernels.gemm(x, packed, target, linear)
    raise AwqconvError(
        f"nothing here multiplies the layout {target.name} on the device {device!r}",
        fix="Convert to the target of that device (awqconv targets lists them), or use the CPU.",
    )


def dequantize(packed: Packed, target: Target, linear: Linear) -> Tensor:
    """The weight (q - z) * s as float32 [K, N], on the device of the packed tensors."""
    device = next(iter(packed.values())).device
    if device.type == "cuda":
        weight: Tensor = kernels.dequantize(packed, target, linear, torch.float32)
        return weight
    host = {suffix: tensor.cpu() for suffix, tensor in packed.items()}
    return torch.from_numpy(_weight(host, target, linear).dequantize()).to(device)


def as_bytes(tensor: Tensor) -> Any:
    """A host tensor of any dtype as a NumPy array of its bytes, not copied."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _weight(packed: Packed, target: Target, linear: Linear) -> Any:
    from awqconv.kernels import cpu

    return cpu.Weight({name: as_bytes(t) for name, t in packed.items()}, target, linear)


def _host(packed: Packed, target: Target, linear: Linear) -> Multiply:
    from awqconv.kernels.cpu import quantize_rows

    weight = _weight(packed, target, linear)
    int8 = any(part.pattern.pad for part in target.parts(linear))

    def multiply(x: Tensor) -> Tensor:
        rows = x.detach().float().contiguous().numpy()
        if len(rows) < DENSE_ROWS:
            return torch.from_numpy(weight.gemm(rows, torch.get_num_threads())).to(x.dtype)
        if int8:  # W4A8: the activations are those the layout's own kernel multiplies
            integers, alpha = quantize_rows(rows)
            rows = (integers - 128) * alpha[:, None]
        return (torch.from_numpy(rows) @ torch.from_numpy(weight.dequantize())).to(x.dtype)

    return multiply


def _same_dtype(x: Tensor, scales: Tensor) -> None:
    if x.dtype != scales.dtype:
        raise AwqconvError(
            f"activations are {x.dtype} and the scales {scales.dtype}; this op wants one dtype",
            fix="Load the model in the scales' dtype, or convert it with --scale-dtype.",
        )


def _npu(packed: Packed, linear: Linear) -> Multiply | None:
    """torch_npu's npu_weight_quant_batchmatmul: y = x @ ((w + offset) * scale)."""
    op = import_module("torch_npu").npu_weight_quant_batchmatmul
    words, offsets, scales = packed["qweight"], packed["qzeros"], packed["scales"]

    def multiply(x: Tensor) -> Tensor:
        _same_dtype(x, scales)
        y: Tensor = op(
            x, words, antiquant_scale=scales, antiquant_offset=offsets,
            antiquant_group_size=linear.g,
        )  # fmt: skip
        return y

    return multiply


def _xpu(packed: Packed, linear: Linear) -> Multiply | None:
    """aten::_weight_int4pack_mm_with_scales_and_zeros: y = x @ ((q - z) * s)."""
    op = torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros
    words, zeros, scales = packed["qweight"], packed["qzeros"], packed["scales"]

    def multiply(x: Tensor) -> Tensor:
        _same_dtype(x, scales)
        y: Tensor = op(x, words, linear.g, scales, zeros)
        return y

    return multiply


def amx_op() -> Any:
    """int4_scaled_mm_cpu(x, weight, zeros, scales, bias) of SGLang or vLLM, None where it is not.

    The op is there in their CPU builds, and runs on CPUs with AMX.
    """
    if not getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return None
    with suppress(ImportError):  # vLLM's build has the op too, loaded by vLLM
        import_module("sgl_kernel")
    for library in ("sgl_kernel", "_C"):
        op = getattr(getattr(torch.ops, library), "int4_scaled_mm_cpu", None)
        if op is not None:
            return op
    return None


def _amx(packed: Packed, linear: Linear) -> Multiply | None:
    """int4_scaled_mm_cpu for float16 and bfloat16, all it takes; float32 keeps to its own bound."""
    op = amx_op()
    if op is None:
        return None
    words, zeros, scales = packed["qweight"], packed["qzeros"], packed["scales"]
    single = _host(packed, layout("amx"), linear)

    def multiply(x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return single(x)
        y: Tensor = op(x.contiguous(), words, zeros, scales, None)
        return y

    return multiply


PLATFORMS: dict[tuple[str, str], Callable[[Packed, Linear], Multiply | None]] = {
    ("npu", "npu"): _npu,
    ("xpu", "xpu"): _xpu,
    ("amx", "cpu"): _amx,
}


class Held:
    """A function that a layer keeps for an op to find."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function


class Handles:
    """Functions by number, which compiled graphs call through ops that are opaque to them.

    The number is a tensor: a graph's constants would outlive the layer.
    """

    def __init__(self) -> None:
        self._held: WeakValueDictionary[int, Held] = WeakValueDictionary()
        self._next = 0

    def hold(self, function: Callable[..., Tensor]) -> tuple[Held, Tensor]:
        """What keeps the number alive, and the number."""
        held, number = Held(function), self._next
        self._held[number] = held
        self._next += 1
        return held, torch.tensor(number)

    def __getitem__(self, handle: Tensor) -> Callable[..., Tensor]:
        return self._held[int(handle)].function


HANDLES = Handles()


@torch.library.custom_op("awqconv::multiply", mutates_args=())
def multiply(x: Tensor, handle: Tensor, N: int) -> Tensor:
    """x [M, K] times the packed weight of `handle`: [M, N]."""
    return HANDLES[handle](x)


@multiply.register_fake
def _(x: Tensor, handle: Tensor, N: int) -> Tensor:
    return x.new_empty(x.shape[0], N)


@torch.library.custom_op("awqconv::mixture", mutates_args=())
def mixture(x: Tensor, weights: Tensor, experts: Tensor, handle: Tensor) -> Tensor:
    """sum over a row's experts [M, top] of weights [M, top] times expert(x [M, K]): [M, K]."""
    return HANDLES[handle](x, weights, experts)


@mixture.register_fake
def _(x: Tensor, weights: Tensor, experts: Tensor, handle: Tensor) -> Tensor:
    return torch.empty_like(x)


def gated_mixture(
    up: Sequence[Multiply], down: Sequence[Multiply], local: Tensor | None
) -> Callable[..., Tensor]:
    """Experts w2(silu(gate) * up), `up` giving gate and up side by side.

    `local` maps an expert's number to its place here, -1 where it is on another rank.
    """

    def run(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        places = experts if local is None else local[experts.long()]
        for place in torch.unique(places).tolist():
            if place < 0:
                continue
            rows, slots = torch.where(places == place)
            gate, value = up[place](x[rows]).chunk(2, -1)
            part = down[place](torch.nn.functional.silu(gate) * value)
            y.index_add_(0, rows, part.float() * weights[rows, slots, None].float())
        return y.to(x.dtype)

    return run

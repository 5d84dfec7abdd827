"""Kernels that read packed words in place, as the hardware would: `cpu`, and `triton` on GPUs.

They never call the code that packs. An element's position is separable, `off_k[k] + off_n[n]`
nibbles (`Layout.offsets`), so one generic kernel reads every layout. Nothing heavy is imported
before a kernel is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

KERNELS = {"cpu": "awqconv.kernels.cpu", "cuda": "awqconv.kernels.triton"}  # by torch device type


def on(device: str) -> Any:
    """The module whose `gemm` and `dequantize` run on a device type, "cpu" or "cuda".

    Raises KeyError for another device, ImportError where what its kernels need is not installed.
    """
    return import_module(KERNELS[device])


def _device(value: Any) -> str:
    return str(getattr(getattr(value, "device", None), "type", "cpu"))


def gemm(x: Any, packed: Any, target: Any, linear: Any, *args: Any, **options: Any) -> Any:
    """x [M, K] times the packed weight (+ bias), by the kernels of the device that x is on."""
    return on(_device(x)).gemm(x, packed, target, linear, *args, **options)


def dequantize(packed: Any, target: Any, linear: Any, *args: Any, **options: Any) -> Any:
    """The weight (q - z) * s, by the kernels of the device that the packed tensors are on."""
    device = _device(next(iter(packed.values())))
    return on(device).dequantize(packed, target, linear, *args, **options)

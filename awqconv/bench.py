"""How fast a layout is here: conversion rate and GEMM latency for a model's real shapes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from awqconv.repack.reference import restore, unpack_nibbles
from awqconv.targets.base import CODED, Linear, Part, Target

WORDS = {"I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}
NUMBERS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I8": torch.int8}


def random_module(target: Target, linear: Linear, device: str) -> dict[str, torch.Tensor]:
    """Packed tensors of one module by suffix: random codes and zero points, scales near 0.01."""
    packed = {}
    for part in target.parts(linear):
        shape = part.shape(linear)
        if part.coded:
            raw = torch.randint(0, 256, (part.nbytes(linear),), dtype=torch.uint8, device=device)
            packed[part.suffix] = raw.view(WORDS[part.dtype]).view(shape)
        elif part.of == "z":
            z = part.offset + part.sign * torch.randint(0, 16, shape, device=device)
            packed[part.suffix] = z.to(NUMBERS[part.dtype])
        else:
            numbers = 0.005 + 0.015 * torch.rand(shape, device=device)
            packed[part.suffix] = numbers.to(NUMBERS[part.dtype])
    return packed


def reference_weight(
    packed: Mapping[str, torch.Tensor], target: Target, linear: Linear
) -> NDArray[np.float64]:
    """w float64 [K, N] by reshape and transpose of unpacked elements: nothing of the kernels'."""
    parts = target.parts(linear)
    arrays = {part.of: _restored(packed[part.suffix].cpu(), part, linear) for part in parts}
    z, s = (arrays[of].repeat(linear.g, 0) for of in ("z", "s"))
    return np.asarray((arrays["q"] - z) * s)


def _restored(tensor: torch.Tensor, part: Part, linear: Linear) -> NDArray[np.float64]:
    """The logical array of one stored tensor."""
    layout = part.layout(linear)
    if part.coded:
        rows = tensor.contiguous().view(torch.uint8).numpy()
        rows = rows.reshape(-1, part.shape(linear)[-1] * CODED[part.dtype] // 2)
        if part.pattern.pad:
            rows = rows[:, : rows.shape[1] - part.pattern.pad // 2]
        stored = unpack_nibbles(rows) ^ part.xor
    else:
        stored = tensor.double().numpy()
    flat = np.ascontiguousarray(stored).reshape(-1)
    logical = restore(flat, part.pattern, layout.shape).astype(np.float64)
    if part.of == "z" and not part.coded:
        logical = (logical - part.offset) * part.sign
    return logical


def latency(calls: Sequence[Callable[[], object]], repeats: int = 15) -> float:
    """Median seconds of one call of several that do the same on different data.

    On a GPU all calls are one CUDA graph, timed by events; give it more data than the L2 holds.
    """
    times = []
    if not torch.cuda.is_available():
        for _ in range(repeats):
            start = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - start) / len(calls))
        return statistics.median(times)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        for i in range(repeats + 3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 3:
                times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)

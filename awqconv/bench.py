"""How fast a layout is here: conversion rate and GEMM latency for a model's real shapes."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from awqconv.checkpoint.model import Stored, open_model
from awqconv.errors import AwqconvError
from awqconv.kernels import on
from awqconv.repack.engine import aligned, repack
from awqconv.repack.reference import restore, unpack_nibbles
from awqconv.targets.base import CODED, Linear, Part, Target, layout

WORDS = {"I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}
NUMBERS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I8": torch.int8}


@dataclass(frozen=True)
class Row:
    """One layout of one shape. Rates in bytes a second, times in seconds.

    `conversion` is the rate of repacking codes from AWQ on all cores (input bytes); `seconds` the
    latency of x [M, K] @ w for each M; `nbytes` what a kernel must read of the weight.
    """

    target: str
    K: int
    N: int
    g: int
    modules: int  # of the model, that have this shape
    nbytes: int
    conversion: float
    seconds: dict[int, float]


@dataclass(frozen=True)
class BenchResult:
    """What `bench` measured. `bandwidth` is the device's own, of a large elementwise kernel."""

    model: str
    device: str
    bandwidth: float
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows of text."""
        batches = sorted({M for row in self.rows for M in row.seconds})
        heads = ["layout", "K x N", "g", "modules", "repack GB/s", *(f"M {M} us" for M in batches)]
        body = []
        for row in self.rows:
            times = [f"{row.seconds[M] * 1e6:.1f}" if M in row.seconds else "" for M in batches]
            shape = [row.target, f"{row.K} x {row.N}", str(row.g), str(row.modules)]
            body.append([*shape, f"{row.conversion / 1e9:.2f}", *times])
        return heads, body

    def plot(self, path: str | os.PathLike[str]) -> None:
        """A roofline, FLOP/s over FLOP per byte, as .png or .svg. Needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise AwqconvError(
                "the plot needs matplotlib", str(path), "pip install matplotlib"
            ) from None
        if Path(path).suffix not in (".png", ".svg"):
            raise AwqconvError("a plot is .png or .svg", str(path), "name a file with one of these")
        figure = Figure(figsize=(8, 5))
        axes = figure.subplots()
        reach: list[float] = []
        for target in dict.fromkeys(row.target for row in self.rows):
            points = []
            for row in self.rows:
                for M, seconds in row.seconds.items() if row.target == target else ():
                    flops = 2 * M * row.K * row.N
                    points.append((flops / (row.nbytes + 2 * M * (row.K + row.N)), flops / seconds))
            reach += [x for x, _ in points]
            axes.scatter([x for x, _ in points], [y for _, y in points], s=14, label=target)
        ends = [min(reach), max(reach)]
        axes.plot(ends, [x * self.bandwidth for x in ends], "k--", label="memory bandwidth")
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="FLOP/s")
        axes.set_title(self.device)
        axes.legend()
        figure.savefig(path)


def bench(
    model: str | os.PathLike[str],
    targets: Sequence[str] = ("marlin",),
    batches: Sequence[int] = (1, 16, 64, 256),
    device: str = "auto",
    progress: Callable[[str], None] = lambda text: None,
) -> BenchResult:
    """Measure each target for each shape of a model's quantized modules, on this machine.

    Weights are random: only the model's headers are read. A target that cannot hold a shape is
    left out for it. `device`: "auto", "cpu" or "cuda". Raises AwqconvError where no module is
    quantized.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    modules = [item for item in open_model(model).items() if isinstance(item, Stored)]
    if not modules:
        raise AwqconvError("no module is quantized", str(model), "pass an AWQ checkpoint")
    shapes = Counter[Linear]()
    for module in modules:
        shapes[module.linear] += module.experts
    rows = []
    for linear, count in sorted(shapes.items(), key=lambda item: (item[0].K, item[0].N)):
        for target in map(layout, targets):
            if target.broken(linear):
                continue
            progress(f"{target.name} {linear.K} x {linear.N}")
            parts = target.parts(linear)
            nbytes = sum(part.nbytes(linear) for part in parts)
            seconds = _latencies(target, linear, nbytes, batches, device)
            rate = conversion_rate(target, linear)
            shape = (linear.K, linear.N, linear.g, count)
            rows.append(Row(target.name, *shape, nbytes, rate, seconds))
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"
    return BenchResult(str(model), name, bandwidth(device), tuple(rows))


def _latencies(
    target: Target, linear: Linear, nbytes: int, batches: Sequence[int], device: str
) -> dict[int, float]:
    kernels, numpy = on(device), device == "cpu"
    count = 3 if numpy else max(3, 220_000_000 // nbytes + 1)
    weights: list[dict[str, Any]] = [random_module(target, linear, device) for _ in range(count)]
    dtype = torch.bfloat16 if linear.scales == "BF16" and not numpy else torch.float16
    out = {}
    for M in batches:
        xs: list[Any] = [torch.randn(M, linear.K, device=device).to(dtype) for _ in weights]
        if numpy:
            xs = [x.float().numpy() for x in xs]
        calls = [
            lambda x=x, p=p: kernels.gemm(x, p, target, linear)
            for x, p in zip(xs, weights, strict=True)
        ]
        out[M] = latency(calls, 3 if numpy else 15, device)
    return out


def conversion_rate(target: Target, linear: Linear, repeats: int = 3) -> float:
    """Bytes of AWQ codes repacked a second, every core on its own module; the median."""
    source = layout("awq").parts(linear)[0]
    part = target.parts(linear)[0]
    jobs = []
    for _ in range(os.cpu_count() or 1):
        src = np.random.default_rng(0).integers(0, 256, source.nbytes(linear), dtype=np.uint8)
        jobs.append((src, aligned(part.nbytes(linear))))
    layouts, xor = (source.layout(linear), part.layout(linear)), source.xor ^ part.xor
    rates = []
    with ThreadPoolExecutor(len(jobs)) as pool:
        for _ in range(repeats + 1):  # the first compiles
            start = time.perf_counter()
            list(
                pool.map(lambda job: repack(job[0], layouts[0], job[1], layouts[1], xor=xor), jobs)
            )
            rates.append(len(jobs) * source.nbytes(linear) / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def bandwidth(device: str) -> float:
    """Bytes read and written a second by a large elementwise kernel."""
    size = 1 << (28 if device == "cuda" else 24)
    a, b = (torch.ones(size, dtype=torch.int32, device=device) for _ in "ab")
    return 8 * size / latency([lambda: torch.neg(a, out=b)], 5, device)


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


def latency(
    calls: Sequence[Callable[[], object]], repeats: int = 15, device: str = "cuda"
) -> float:
    """Median seconds of one call of several that do the same on different data.

    On "cuda" all calls are one CUDA graph, timed by events; give it more data than the L2 holds.
    """
    times = []
    if device != "cuda":
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

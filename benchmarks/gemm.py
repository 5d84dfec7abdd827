"""The GPU kernels against float64, cuBLAS and the memory floor; writes a Markdown table.

    python benchmarks/gemm.py --out benchmarks/gemm_h100.md

Every layout, g = 128. Latency: one CUDA graph over calls on different weights and activations,
more of them than the L2 holds, timed by events; medians. cuBLAS is timed in the same run on fp16
weights of the same shape, and so is SGLang's CUDA Marlin (sglang.jit_kernel.gptq_marlin) where it
can be imported, once its result is ours. `--check` stops after small calls of every kernel (for
compute-sanitizer).
"""

# ruff: noqa: E501, T201

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from awqconv.bench import latency, random_module, reference_weight
from awqconv.kernels.triton import dequantize, gemm, grouped_gemm
from awqconv.repack import layouts
from awqconv.targets import Linear, Part, Target, layout

SHAPES = [(4096, 6144), (4096, 28672), (14336, 4096), (8192, 8192)]
FEW, MANY = (1, 16, 64), (256, 1024, 4096)
ROWS = (*FEW, *MANY)
# Microseconds of the CUDA Marlin kernel on an H200, and of cuBLAS beside it, measured earlier, by
# events around each call and not in a graph: shown where the GPU is one.
MARLIN = {
    (4096, 6144): (15.0, 15.1, 33.2, 48.9, 156.6),
    (4096, 28672): (36.9, 37.8, 57.3, 184.4, 728.9),
    (14336, 4096): (22.8, 23.7, 50.2, 96.6, 347.0),
    (8192, 8192): (22.9, 23.5, 41.7, 107.9, 410.2),
}
CUBLAS = {
    (4096, 6144): (23.4, 22.8, 22.2, 29.6, 75.8),
    (4096, 28672): (67.8, 67.6, 68.9, 104.5, 367.6),
    (14336, 4096): (43.7, 41.7, 43.4, 53.6, 171.2),
    (8192, 8192): (47.6, 48.5, 43.9, 54.5, 206.3),
}


class Gptq(Target):
    """No target of this package: its kernel comes from the patterns alone."""

    name = "gptq"

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        return (
            Part("qweight", "q", layouts.GPTQ, "I32"),
            Part("qzeros", "z", layouts.ROWS, "I32"),
            Part("scales", "s", layouts.PLAIN, linear.scales),
        )


class Wna16(Target):
    """moe_wna16's bytes, one expert."""

    name = "wna16"

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        return (
            Part("qweight", "q", layouts.WNA16, "U8"),
            Part("qzeros", "z", layouts.WNA16_ZEROS, "U8"),
            Part("scales", "s", layouts.TRANSPOSED, linear.scales),
        )


TARGETS: list[Target] = [
    *map(layout, ("marlin", "awq", "npu", "amx", "xpu", "compressed-tensors")),
    Gptq(),
    Wna16(),
]
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def error(y: torch.Tensor, want: torch.Tensor) -> float:
    """Relative Frobenius error; infinite where y is not finite."""
    if not y.isfinite().all():
        return float("inf")
    return float((y.double() - want).norm() / want.norm())


def check(
    index: int, rows: tuple[int, ...] = (1, 5, 16, 32, 64, 200), K: int = 1024, N: int = 16384
) -> list[str]:
    """Rows of the table of errors for one layout; compiles its kernels on the way."""
    target, lines = TARGETS[index], []
    for scales, dtype in DTYPES.items():
        errors = []
        for g in (128, 32):
            linear = Linear(K, N, g, scales=scales)
            packed = random_module(target, linear, "cuda")
            w = torch.from_numpy(reference_weight(packed, target, linear)).cuda()
            for M in rows if g == 128 else [M for M in rows if M in (1, 16, 64)]:
                x = torch.randn(M, K, device="cuda").to(dtype)
                errors.append(error(gemm(x, packed, target, linear), x.double() @ w))
            if g == 128:
                for M in (16, 64):  # scales of another dtype than x
                    other = next(d for d in DTYPES.values() if d != dtype)
                    x = torch.randn(M, K, device="cuda").to(other)
                    errors.append(error(gemm(x, packed, target, linear), x.double() @ w))
            errors.append(error(dequantize(packed, target, linear, dtype), w))
        linear = Linear(K, N, 128, scales=scales, kind="expert")
        experts = [random_module(target, linear, "cuda") for _ in range(4)]
        packed = {name: torch.stack([one[name] for one in experts]) for name in experts[0]}
        offsets = torch.tensor([0, 3, 3, 40, 61], device="cuda")
        x = torch.randn(61, K, device="cuda").to(dtype)
        want = torch.zeros(61, N, device="cuda", dtype=torch.float64)
        for e, one in enumerate(experts):
            w = torch.from_numpy(reference_weight(one, target, linear)).cuda()
            want[offsets[e] : offsets[e + 1]] = x[offsets[e] : offsets[e + 1]].double() @ w
        errors.append(error(grouped_gemm(x, packed, target, linear, offsets), want))
        cells = " | ".join(f"{value:.1e}" for value in errors)
        lines.append(f"| {target.name} | {str(dtype)[6:]} | {cells} |")
    return lines


def copies(nbytes: int) -> int:
    """How many weights of this size are well beyond the L2."""
    return max(3, 220_000_000 // nbytes + 1)


def time_dense(K: int, N: int, rows: tuple[int, ...]) -> list[float]:
    """Microseconds of cuBLAS, x fp16 [M, K] @ w fp16 [K, N], for each M."""
    count, out = copies(2 * K * N), []
    weights = [torch.randn(K, N, device="cuda", dtype=torch.float16) for _ in range(count)]
    for M in rows:
        xs = [torch.randn(M, K, device="cuda", dtype=torch.float16) for _ in range(count)]
        calls = [lambda x=x, w=w: x @ w for x, w in zip(xs, weights, strict=True)]
        out.append(latency(calls) * 1e6)
    return out


def cuda_marlin() -> Callable[[torch.Tensor, dict[str, torch.Tensor], Linear], torch.Tensor] | None:
    """SGLang's GEMM as its awq_marlin layers call it, or None where it is not installed."""
    try:
        from sgl_kernel.scalar_type import scalar_types
        from sglang.jit_kernel.gptq_marlin import gptq_marlin_gemm
    except ImportError:
        return None
    count = torch.cuda.get_device_properties().multi_processor_count
    workspace = torch.zeros(count, dtype=torch.int32, device="cuda")
    none = torch.empty(0, dtype=torch.int32, device="cuda")

    def call(x: torch.Tensor, packed: dict[str, torch.Tensor], linear: Linear) -> torch.Tensor:
        return gptq_marlin_gemm(
            a=x, c=None, b_q_weight=packed["qweight"], b_scales=packed["scales"],
            global_scale=None, b_zeros=packed["qzeros"], g_idx=none, perm=none,
            workspace=workspace, b_q_type=scalar_types.uint4, size_m=len(x), size_n=linear.N,
            size_k=linear.K, is_k_full=True, use_atomic_add=False, use_fp32_reduce=True,
            is_zp_float=False,
        )  # fmt: skip

    return call


def time_peer(K: int, N: int, rows: tuple[int, ...]) -> list[float]:
    """Microseconds of CUDA Marlin for each M, nothing if it is not there."""
    peer, linear = cuda_marlin(), Linear(K, N, 128)
    if peer is None:
        return []
    target, out = layout("marlin"), []
    modules = [random_module(target, linear, "cuda") for _ in range(copies(K * N // 2))]
    for M in rows:
        some = modules if M <= 64 else modules[:4]
        xs = [torch.randn(M, K, device="cuda", dtype=torch.float16) for _ in some]
        ours = gemm(xs[0], some[0], target, linear).double()
        if error(peer(xs[0], some[0], linear), ours) > 1e-3:
            raise SystemExit(f"CUDA Marlin differs from ours at M {M}")
        calls = [lambda x=x, p=p: peer(x, p, linear) for x, p in zip(xs, some, strict=True)]
        out.append(latency(calls) * 1e6)
    return out


def time_layout(target: Target, K: int, N: int, g: int, rows: tuple[int, ...]) -> list[float]:
    """Microseconds of `gemm` for each M."""
    linear = Linear(K, N, g)
    modules = [random_module(target, linear, "cuda") for _ in range(copies(K * N // 2))]
    out = []
    for M in rows:
        some = modules if M <= 64 else modules[:4]
        xs = [torch.randn(M, K, device="cuda", dtype=torch.float16) for _ in some]
        calls = [lambda x=x, p=p: gemm(x, p, target, linear) for x, p in zip(xs, some, strict=True)]
        out.append(latency(calls) * 1e6)
    return out


def time_pass(target: Target, K: int, N: int) -> float:
    """Microseconds of `dequantize`."""
    linear = Linear(K, N, 128)
    modules = [random_module(target, linear, "cuda") for _ in range(4)]
    return latency([lambda p=p: dequantize(p, target, linear) for p in modules]) * 1e6


def in_turn(K: int, N: int, M: int, times: int = 5) -> tuple[float, float]:
    """Microseconds of cuBLAS and of marlin, timed one after the other; medians.

    Many rows draw so much power that the clock of the one depends on what ran before it.
    """
    target, linear, count = layout("marlin"), Linear(K, N, 128), 4
    xs = [torch.randn(M, K, device="cuda", dtype=torch.float16) for _ in range(count)]
    weights = [torch.randn(K, N, device="cuda", dtype=torch.float16) for _ in xs]
    modules = [random_module(target, linear, "cuda") for _ in xs]
    dense = [lambda x=x, w=w: x @ w for x, w in zip(xs, weights, strict=True)]
    ours = [lambda x=x, p=p: gemm(x, p, target, linear) for x, p in zip(xs, modules, strict=True)]
    pairs = [(latency(dense, 5) * 1e6, latency(ours, 5) * 1e6) for _ in range(times)]
    return statistics.median(d for d, _ in pairs), statistics.median(o for _, o in pairs)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large elementwise kernel."""
    a, b = (torch.randint(0, 9, (1 << 28,), dtype=torch.int32, device="cuda") for _ in range(2))
    return 8 * a.numel() / latency([lambda: torch.neg(a, out=b)])


def ratio(value: float, base: float | None) -> str:
    return f"{value:.1f} ({value / base:.2f})" if base else f"{value:.1f}"


def row(name: str, values: Sequence[float], bases: Sequence[float | None] = ()) -> str:
    """A line of a table, each value with its ratio to a base where there is one."""
    cells = [ratio(v, b) for v, b in itertools.zip_longest(values, bases[: len(values)])]
    return f"| {name} | {' | '.join(cells)} |" + " |" * (len(ROWS) + 1 - len(values))


def measure() -> tuple[dict[tuple[int, int, str], list[float]], dict[str, list[float]]]:
    """Microseconds by K, N and what was timed; and of groups of 32, few rows, the last shape.

    Few rows first, of everything: products of thousands of rows lower the clock for a while.
    """
    times: dict[tuple[int, int, str], list[float]] = {}
    for K, N in SHAPES:
        times[K, N, "cuBLAS"] = time_dense(K, N, FEW)
        times[K, N, "peer"] = time_peer(K, N, FEW)
        for target in TARGETS:
            times[K, N, target.name] = time_layout(target, K, N, 128, FEW)
    small = {target.name: time_layout(target, *SHAPES[-1], 32, FEW) for target in TARGETS}
    for K, N in SHAPES:
        times[K, N, "peer"] += time_peer(K, N, MANY)
        for M in MANY:
            dense, ours = in_turn(K, N, M)
            times[K, N, "cuBLAS"].append(dense)
            times[K, N, "marlin"].append(ours)
        for target in TARGETS:
            if target.name != "marlin":
                times[K, N, target.name] += time_layout(target, K, N, 128, MANY)
            times[K, N, target.name].append(time_pass(target, K, N))
    return times, small


def report(errors: list[str], command: str) -> str:
    """The Markdown table; times every layout."""
    bandwidth = copy_bandwidth()
    times, small = measure()
    quotes = "H200" in torch.cuda.get_device_name()
    heads = [f"M {M}" for M in ROWS]
    lines = [
        "# GPU kernels",
        "",
        f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {triton.__version__}, {time.strftime('%Y-%m-%d')}: `{command}`",
        "",
        f"An elementwise kernel moves {bandwidth / 1e12:.2f} TB/s. Times in microseconds, fp16, g = 128, "
        "median of CUDA graph replays over weights that exceed the L2; all of few rows before those of "
        "many, which lower the clock; of many rows cuBLAS and marlin in turn. `floor`: packed weight, "
        "zero points and scales read once at that rate.",
        "",
    ]
    for K, N in SHAPES:
        dense, peer = times[K, N, "cuBLAS"], times[K, N, "peer"]
        quoted = MARLIN[K, N] if quotes else ()
        base = peer or [*quoted, *[None] * (len(ROWS) - len(quoted))]
        lines += [
            f"## K {K}, N {N}",
            "",
            f"| | {' | '.join(heads)} | dequantize |",
            "|---" * (len(heads) + 2) + "|",
            *([row("CUDA Marlin, quoted", quoted)] if quoted else []),
            *([row("CUDA Marlin, this run", peer, quoted)] if peer else []),
            *([row("cuBLAS, quoted", CUBLAS[K, N])] if quoted else []),
            row("cuBLAS, this run", dense),
        ]
        *marlin, _ = times[K, N, "marlin"]
        for target in TARGETS:
            *own, plain = times[K, N, target.name]
            parts = target.parts(Linear(K, N, 128))
            nbytes = sum(part.nbytes(Linear(K, N, 128)) for part in parts)
            floor, pass_floor = (n / bandwidth * 1e6 for n in (nbytes, nbytes + 2 * K * N))
            lines.append(row(target.name, [*own, plain], [*base, pass_floor]))
            if target.name == "marlin":
                extra = [d + pass_floor for d in dense]
                lines.append(row("marlin / (cuBLAS + floor of one pass)", own, extra))
                lines.append(row("marlin / cuBLAS", own, dense))
                shares = " | ".join(f"{floor / t:.0%}" for t in own)
                lines.append(f"| floor / marlin | {shares} | |")
            else:
                lines.append(row(f"{target.name} / marlin", own, marlin))
        lines.append("")
        print("\n".join(lines[lines.index(f"## K {K}, N {N}") :]), flush=True)
    K, N = SHAPES[-1]
    lines += [
        "## Groups of 32",
        "",
        f"K {K}, N {N}; in brackets over g = 128 above.",
        "",
        f"| | {' | '.join(heads[: len(FEW)])} |",
        "|---" * (len(FEW) + 1) + "|",
    ]
    for name, own in small.items():
        cells = (ratio(t, base) for t, base in zip(own, times[K, N, name], strict=False))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "In brackets: over CUDA Marlin (this run's where it ran, else the quoted time), or what the row",
        "names; for dequantize, over its floor (packed read once, w written once).",
        "",
        "## Relative Frobenius error against float64",
        "",
        "K 1024, N 16384, random codes, zero points and scales; w from the reference implementation.",
        "",
        "`x other`: x in the other dtype of the two than scales, y in x's.",
        "",
        "| layout | scales | M 1 | M 5 | M 16 | M 32 | M 64 | M 200 | x other, M 16 | x other, M 64 | w | g 32, M 1 | g 32, M 16 | g 32, M 64 | g 32, w | 4 experts |",
        "|---" * 16 + "|",
        *errors,
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--check", nargs="*", metavar="LAYOUT", help="one small call of every kernel, or of some"
    )
    options = parser.parse_args()
    if options.check is not None:
        for index, target in enumerate(TARGETS):
            if options.check and target.name not in options.check:
                continue
            print(*check(index, (1, 16, 32, 64), 256, 256), sep="\n", flush=True)
            print(*check(index, (32, 64), 256, 16384), sep="\n", flush=True)  # wide tiles
        return 0
    workers = min(len(TARGETS), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        errors = [line for lines in pool.map(check, range(len(TARGETS))) for line in lines]
    print(*errors, sep="\n", flush=True)
    text = report(errors, f"python benchmarks/gemm.py --out {options.out}")
    if options.out:
        options.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The GPU kernels against float64, cuBLAS and the memory floor; writes a Markdown table.

    python benchmarks/gemm.py --out benchmarks/gemm_h200.md

Every layout, g = 128. Latency: one CUDA graph over calls on different weights and activations,
more of them than the L2 holds, timed by events; medians. cuBLAS is timed in the same run on fp16
weights of the same shape, and so is SGLang's CUDA Marlin (sglang.jit_kernel.gptq_marlin) where it
can be imported, once its result is ours. `--check` stops after one small call of every kernel (for
compute-sanitizer).
"""

# ruff: noqa: E501, T201

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
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
ROWS = (1, 16, 64, 256, 1024, 4096)
# Microseconds of the CUDA Marlin kernel on an H200, and of cuBLAS beside it, measured earlier, by
# events around each call and not in a graph.
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
    index: int, rows: tuple[int, ...] = (1, 5, 16, 64, 200), K: int = 1024, N: int = 1536
) -> list[str]:
    """Rows of the table of errors for one layout; compiles its kernels on the way."""
    target, lines = TARGETS[index], []
    for scales, dtype in DTYPES.items():
        errors = []
        for g in (128, 32):
            linear = Linear(K, N, g, scales=scales)
            packed = random_module(target, linear, "cuda")
            w = torch.from_numpy(reference_weight(packed, target, linear)).cuda()
            for M in rows if g == 128 else rows[:2]:
                x = torch.randn(M, K, device="cuda").to(dtype)
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


def time_dense(K: int, N: int) -> list[float]:
    """Microseconds of cuBLAS, x fp16 [M, K] @ w fp16 [K, N], for each M."""
    count, out = copies(2 * K * N), []
    weights = [torch.randn(K, N, device="cuda", dtype=torch.float16) for _ in range(count)]
    for M in ROWS:
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


def time_peer(K: int, N: int) -> list[float]:
    """Microseconds of CUDA Marlin for each M, nothing if it is not there."""
    peer, linear = cuda_marlin(), Linear(K, N, 128)
    if peer is None:
        return []
    target, out = layout("marlin"), []
    modules = [random_module(target, linear, "cuda") for _ in range(copies(K * N // 2))]
    for M in ROWS:
        some = modules if M <= 64 else modules[:4]
        xs = [torch.randn(M, K, device="cuda", dtype=torch.float16) for _ in some]
        ours = gemm(xs[0], some[0], target, linear).double()
        if error(peer(xs[0], some[0], linear), ours) > 1e-3:
            raise SystemExit(f"CUDA Marlin differs from ours at M {M}")
        calls = [lambda x=x, p=p: peer(x, p, linear) for x, p in zip(xs, some, strict=True)]
        out.append(latency(calls) * 1e6)
    return out


def time_layout(
    target: Target, K: int, N: int, g: int = 128, rows: tuple[int, ...] = ROWS
) -> list[float]:
    """Microseconds of `gemm` for each M, then of `dequantize`."""
    linear = Linear(K, N, g)
    modules = [random_module(target, linear, "cuda") for _ in range(copies(K * N // 2))]
    out = []
    for M in rows:
        some = modules if M <= 64 else modules[:4]
        xs = [torch.randn(M, K, device="cuda", dtype=torch.float16) for _ in some]
        calls = [lambda x=x, p=p: gemm(x, p, target, linear) for x, p in zip(xs, some, strict=True)]
        out.append(latency(calls) * 1e6)
    out.append(latency([lambda p=p: dequantize(p, target, linear) for p in modules[:4]]) * 1e6)
    return out


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large elementwise kernel."""
    a, b = (torch.randint(0, 9, (1 << 28,), dtype=torch.int32, device="cuda") for _ in range(2))
    return 8 * a.numel() / latency([lambda: torch.neg(a, out=b)])


def ratio(value: float, base: float | None) -> str:
    return f"{value:.1f} ({value / base:.2f})" if base else f"{value:.1f}"


def row(name: str, values: Sequence[float], bases: Sequence[float] = ()) -> str:
    """A line of a table, each value with its ratio to a base where there is one."""
    cells = [ratio(v, b) for v, b in itertools.zip_longest(values, bases[: len(values)])]
    return f"| {name} | {' | '.join(cells)} |" + " |" * (len(ROWS) + 1 - len(values))


def report(errors: list[str], command: str) -> str:
    """The Markdown table; times every layout."""
    bandwidth = copy_bandwidth()
    heads = [f"M {M}" for M in ROWS]
    lines = [
        "# GPU kernels",
        "",
        f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {triton.__version__}, 2026-11-22: `{command}`",
        "",
        f"An elementwise kernel moves {bandwidth / 1e12:.2f} TB/s. Times in microseconds, fp16, g = 128, "
        "median of CUDA graph replays over weights that exceed the L2. `floor`: packed weight, zero "
        "points and scales read once at that rate.",
        "",
    ]
    for K, N in SHAPES:
        dense, peer = time_dense(K, N), time_peer(K, N)
        marlin: list[float] = []
        lines += [
            f"## K {K}, N {N}",
            "",
            f"| | {' | '.join(heads)} | dequantize |",
            "|---" * (len(heads) + 2) + "|",
            row("CUDA Marlin, quoted", MARLIN[K, N]),
            *([row("CUDA Marlin, this run", peer, MARLIN[K, N])] if peer else []),
            row("cuBLAS, quoted", CUBLAS[K, N]),
            row("cuBLAS, this run", dense),
        ]
        for target in TARGETS:
            *times, plain = time_layout(target, K, N)
            parts = target.parts(Linear(K, N, 128))
            nbytes = sum(part.nbytes(Linear(K, N, 128)) for part in parts)
            floor, pass_floor = (n / bandwidth * 1e6 for n in (nbytes, nbytes + 2 * K * N))
            lines.append(row(target.name, [*times, plain], [*MARLIN[K, N], None, pass_floor]))
            if target.name == "marlin":
                marlin = times
                if peer:
                    lines.append(row("marlin / CUDA Marlin, this run", times, peer))
                extra = [d + pass_floor for d in dense]
                lines.append(row("marlin / (cuBLAS + floor of one pass)", times, extra))
                lines.append(row("marlin / cuBLAS", times, dense))
                shares = " | ".join(f"{floor / t:.0%}" for t in times)
                lines.append(f"| floor / marlin | {shares} | |")
            else:
                lines.append(row(f"{target.name} / marlin", times, marlin))
        lines.append("")
        print("\n".join(lines[lines.index(f"## K {K}, N {N}") :]), flush=True)
    lines += [
        "## Groups of 32",
        "",
        "Chunks of words of these layouts reach over several such groups: each weight is scaled.",
        "",
        f"| | {' | '.join(heads[:3])} |",
        "|---" * 4 + "|",
    ]
    for name in ("marlin", "compressed-tensors"):
        times = time_layout(layout(name), 8192, 8192, 32, ROWS[:3])[:3]
        cells = " | ".join(f"{t:.1f}" for t in times)
        lines.append(f"| {name}, K 8192, N 8192 | {cells} |")
    lines += [
        "",
        "In brackets: over the quoted Marlin time, or what the row names; for dequantize, over its",
        "floor (packed read once, w written once).",
        "",
        "## Relative Frobenius error against float64",
        "",
        "K 1024, N 1536, random codes, zero points and scales; w from the reference implementation.",
        "",
        "| layout | dtype | M 1 | M 5 | M 16 | M 64 | M 200 | w | g 32, M 1 | g 32, M 5 | g 32, w | 4 experts |",
        "|---" * 12 + "|",
        *errors,
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true", help="one small call of every kernel")
    options = parser.parse_args()
    if options.check:
        for index in range(len(TARGETS)):
            print(*check(index, (1, 16, 64), 256, 256), sep="\n", flush=True)
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

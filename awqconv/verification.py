"""Prove a conversion: whole, exact, and right when multiplied.

Three levels, in one pass over the files:
  integrity   every file is there with its size and header, every tensor has its digest, nothing
              is there that the manifest does not name;
  exactness   the layout is inverted: q, z and s of every module are the source's, byte for byte,
              or have the digests that its AWQ bytes had when it was converted; sections derived
              from them (AMX compensation, bf16 fallback weights) are derived again and compared;
  product     a kernel that addresses the packed words itself multiplies random activations with
              some rows and columns of every module; the error against a float64 product of the AWQ
              weight is held to a bound derived from dtype and K (`awqconv.kernels.bounds`).

The product level shares no code with the packer: positions come from `Layout.offsets`, one
element at a time, and the reference weight from AutoAWQ's own order by reshape and transpose, of
the source's bytes where it is given.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from math import lcm, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awqconv.checkpoint.config import MANIFEST
from awqconv.checkpoint.header import TensorInfo
from awqconv.checkpoint.model import Model, Pieces, Stored, open_model, read_manifest
from awqconv.checkpoint.source import Folder
from awqconv.digest import Hasher, digest
from awqconv.encoder import Encoder
from awqconv.errors import AwqconvError
from awqconv.feed import TILE, Reader
from awqconv.hub import open_source
from awqconv.hub.ranges import READERS, Ranges
from awqconv.jobs import largest_first
from awqconv.repack import layouts, reference
from awqconv.repack.floats import RAW, caster, lossless, to_float32
from awqconv.targets.base import Linear, Part, Target, layout

Bytes = NDArray[np.uint8]
SHARE = 128 << 20  # bytes of memory a thread may use
WORKERS = 8  # more wait for the interpreter's lock: 16 on 16 cores are slower
COLUMNS = 64
ROWS = 1024
ACTIVATIONS = 4


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong: `where` names the file, tensor or module."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What was found of one module.

    `error` is the relative Frobenius error of the product, ||y - y64|| / ||y64||, `bound` what it
    was held to, `max_error` the largest |y - y64|; None where no product was made.
    """

    module: str
    layout: str
    exact: bool
    error: float | None = None
    bound: float | None = None
    max_error: float | None = None

    @property
    def ok(self) -> bool:
        """Whether both levels passed."""
        within = self.error is None or self.bound is None or self.error <= self.bound
        return self.exact and within


@dataclass(frozen=True)
class Verification:
    """The result: it holds if there is no problem. Sizes in bytes, `seconds` of wall time."""

    dest: str
    target: str
    source: str | None
    files: int
    tensors: int
    nbytes: int
    modules: list[ModuleReport]
    problems: list[Problem]
    sampled: str
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything that was looked at is right."""
        return not self.problems

    @property
    def nearest(self) -> ModuleReport | None:
        """The module whose error came nearest to its bound."""
        with_bound = [m for m in self.modules if m.bound]
        return max(with_bound, key=lambda m: (m.error or 0) / (m.bound or 1), default=None)


def verify(
    dest: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    modules: str | None = None,
    columns: int = COLUMNS,
    rows: int = ROWS,
    device: str = "auto",
    kernel: str = "auto",
    jobs: int | None = None,
    token: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Verify a folder that `convert` wrote.

    `source`: the AWQ checkpoint, to compare with its bytes instead of the manifest's digests.
    `modules`: a regular expression; only modules it finds, and no other tensors, are looked at.
    `columns`: output columns a module's product is made for, 0 for none, at random; `rows` of K
    that are summed, likewise. More are taken where a layout or a group cannot be cut so small.
    `device` it is made on, cpu or cuda, and `kernel` it is made by, cpu or triton; auto takes a
    GPU where there is one.
    `token` opens a source on the hub, instead of HF_TOKEN; `progress` is as in `convert`.

    Raises AwqconvError for input that is no converted folder, a source that is not its source or
    a bad expression. What is found to be wrong is in the result, not raised.
    """
    began = time.perf_counter()
    try:
        chosen = re.compile(modules) if modules else None
    except re.error as error:
        raise AwqconvError(
            f"{modules!r} is no regular expression: {error}", fix="Correct --modules."
        ) from None
    folder = Folder(dest)
    manifest = read_manifest(folder)
    problems = list(_files(folder, manifest))
    reports: list[ModuleReport] = []
    counts = (0, 0)
    model = multiply = origin = None
    ranges: Ranges | None = None
    if not problems:
        model = open_model(folder)
        workers = jobs or min(len(os.sched_getaffinity(0)), WORKERS)
        progress = progress or (lambda n: None)
        if source is not None:
            origin = open_model(open_source(os.fspath(source), token=token))
            ranges = getattr(origin.checkpoint.source, "ranges", None)
            if ranges:
                ranges.follow({}, lambda name, entry: None, progress)
                workers = min(workers, READERS) if ranges.scarce() else workers
        multiply = choose_kernel(device, kernel) if columns else None
        kind: type[Check] = Check
        if model.ranks:
            from awqconv.forms.check import ShardedCheck

            kind = ShardedCheck
        check = kind(model, manifest, origin, (rows, columns), multiply, progress)
        reports, found, counts = check.run(chosen, workers)
        if ranges:
            ranges.prove(progress)
        problems += found
        if chosen and not reports:
            raise AwqconvError(
                f"{modules!r} is in the name of none of {len(model.modules)} modules",
                str(dest),
                "Give another --modules.",
            )
        if origin:
            origin.checkpoint.source.close()
    folder.close()
    return Verification(
        str(dest),
        manifest["target"],
        None if source is None else str(source),
        len(manifest["files"]),
        *counts,
        reports,
        problems,
        f"{ACTIVATIONS} random activations, {rows:,} of K rows and {columns:,} of N columns "
        f"of each module, {multiply.title}"
        if multiply
        else "",
        time.perf_counter() - began,
        (model.notes if model else []) + (ranges.notes if ranges else []),
    )


def _files(folder: Folder, manifest: dict[str, Any]) -> Iterator[Problem]:
    """Files that are missing, have another size, header or content, or do not belong."""
    present = folder.files()
    for name, entry in manifest["files"].items():
        size = present.get(name)
        if size is None:
            yield Problem(name, "the file is missing")
        elif size != entry["size"]:
            yield Problem(name, f"{size:,} bytes, {entry['size']:,} when it was written")
        elif "header" in entry:
            length = 8 + int.from_bytes(folder.read(name, 0, 8), "little")
            if length > size or digest(folder.read(name, 0, length)) != entry["header"]:
                yield Problem(name, "its header is not as it was written")
        elif digest(folder.read(name, 0, size)) != entry["digest"]:
            yield Problem(name, "its content is not as it was written")
    for name in present:
        if name.endswith(".safetensors") and name not in manifest["files"]:
            yield Problem(name, f"{MANIFEST} does not name this file of tensors")


class Check:
    """Tensors and modules of one folder."""

    def __init__(
        self,
        model: Model,
        manifest: dict[str, Any],
        origin: Model | None,
        window: tuple[int, int],
        multiply: Kernel | None,
        progress: Callable[[int], None],
    ) -> None:
        self.model, self.manifest, self.origin = model, manifest, origin
        self.window, self.multiply, self.progress = window, multiply, progress
        self.reader = Reader(model.checkpoint.source)
        self.encoder = Encoder(self.reader, SHARE)
        self.origin_reader = Reader(origin.checkpoint.source) if origin else None
        self.digests = {
            (file, name): value
            for file, entry in manifest["files"].items()
            for name, value in entry.get("tensors", {}).items()
        }
        if origin:
            self._same_modules(origin)

    def _same_modules(self, origin: Model) -> None:
        for name, module in self.model.modules.items():
            other = origin.modules.get(name)
            mine = (module.linear.K, module.linear.N, module.linear.g, module.experts)
            if other is None or other.layout != "awq":
                raise AwqconvError(
                    f"it has no AWQ module {name}",
                    origin.checkpoint.source.name,
                    "Give the checkpoint that was converted as --source.",
                )
            theirs = (other.linear.K, other.linear.N, other.linear.g, other.experts)
            if mine != theirs:
                raise AwqconvError(
                    f"{name} has K, N, g = {theirs[:3]} here and {mine[:3]} in the conversion",
                    origin.checkpoint.source.name,
                    "Give the checkpoint that was converted as --source.",
                )

    def run(
        self, chosen: re.Pattern[str] | None, workers: int
    ) -> tuple[list[ModuleReport], list[Problem], tuple[int, int]]:
        """Reports and problems, and the number and bytes of the tensors looked at."""
        items = [
            item
            for item in self.items()
            if not chosen or (isinstance(item, Stored) and chosen.search(item.name))
        ]
        reports, problems, tensors, nbytes = [], [], 0, 0
        with ThreadPoolExecutor(workers) as pool:
            order: Sequence[int] = range(len(items))
            if not (self.origin or self.model).checkpoint.source.in_order:
                order = largest_first([_nbytes(item) for item in items], workers)
            futures = {i: pool.submit(self._look, items[i]) for i in order}
            try:
                for future in as_completed(futures.values()):
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            for i in range(len(items)):
                report, found, count, size = futures[i].result()
                reports += [report] if report else []
                problems += found
                tensors += count
                nbytes += size
        return reports, problems, (tensors, nbytes)

    def _look(
        self, item: TensorInfo | Stored
    ) -> tuple[ModuleReport | None, list[Problem], int, int]:
        return self._module(item) if isinstance(item, Stored) else self._other(item)

    def items(self) -> Iterator[TensorInfo | Stored]:
        """What is looked at: modules and other tensors."""
        return self.model.items()

    def _digest(self, info: TensorInfo, hasher: Hasher | None = None) -> list[Problem]:
        """Compare a tensor's digest with the manifest's; `hasher` has taken in its beginning."""
        value = self.digests.get((info.file, info.name))
        if self.reader.digest(info, hasher) == value:
            return []
        said = "its bytes are not those that were written" if value else "the manifest lacks it"
        return [Problem(info.name, said)]

    def _other(self, info: TensorInfo) -> tuple[None, list[Problem], int, int]:
        problems = self._digest(info)
        if self.origin and not problems:
            problems = self._same_bytes(info, info.dtype)
        self.progress(info.nbytes)
        return None, problems, 1, info.nbytes

    def _same_bytes(self, info: TensorInfo, was: str) -> list[Problem]:
        """Compare a tensor with the source's tensor of its name, of dtype `was` there."""
        assert self.origin
        assert self.origin_reader
        theirs = self.origin.checkpoint.tensors.get(info.name)
        if theirs is None or (theirs.dtype, theirs.shape) != (was, info.shape):
            return [Problem(info.name, "the source has no such tensor")]
        mine = self.reader.chunks(info)
        for chunk in self.origin_reader.chunks(theirs):
            if was != info.dtype:
                raw = np.frombuffer(self.reader.source.read(info.file, info.start, info.stop), "u1")
                cast = caster(was, info.dtype)(chunk.view(RAW[was]))
                same = np.array_equal(raw, cast.view(np.uint8))
            else:
                same = _same(chunk, next(mine))
            if not same:
                return [Problem(info.name, "its bytes are not the source's")]
        return []

    def _module(self, module: Stored) -> tuple[ModuleReport, list[Problem], int, int]:
        name = module.name
        sample = self._sample(module) if self.multiply else None
        hashers: dict[TensorInfo, Hasher] = dict(sample.stored) if sample else {}
        try:
            found = list(self._exact(module, hashers, sample))
        except AwqconvError as wrong:  # a zero point that is none
            found, sample = [wrong.what], None
        infos = [*module.tensors.values(), *module.kept.values()]
        infos += [module.bias] if module.bias else []
        constants = layout(module.layout).constants(module.linear)
        infos += [self.model.checkpoint.tensors[f"{name}.{suffix}"] for suffix in constants]
        damaged = [p for info in infos for p in self._digest(info, hashers.get(info))]
        if module.bias and self.origin and module.linear.bias:
            damaged += self._same_bytes(module.bias, module.linear.bias)
        problems = [Problem(f"module {name}", p.what + f" ({p.where})") for p in damaged]
        problems += [Problem(f"module {name}", what) for what in found]
        report = ModuleReport(name, module.layout, not problems)
        if sample:
            error, bound, worst, beyond = self._product(module, sample)
            report = replace(report, error=error, bound=bound, max_error=worst)
            if beyond:
                problems.append(Problem(f"module {name}", beyond))
        size = sum(info.nbytes for info in infos)
        self.progress(size)
        return report, problems, len(infos), size

    # --- exactness

    def _exact(
        self, module: Stored, hashers: dict[TensorInfo, Hasher], sample: _Sample | None
    ) -> Iterator[str]:
        """What is not as it was in AWQ form. Shows the AWQ bytes to the sample."""
        original, awq = module.original(), layout("awq")
        linear = original.linear
        expected = self.manifest["modules"][module.name]["awq"]
        theirs = self.origin.modules[module.name] if self.origin else None
        wrong = False
        for part in awq.parts(linear):
            hasher, same = sample.awq[part.of] if sample else Hasher(), True
            info = theirs.tensors[part.suffix] if theirs else None
            for e in range(module.experts):
                for tile in self._tiles(awq, part, linear, original, e, hashers):
                    right = self._source_tile(info, hasher.position, tile) if info else tile
                    same &= right is tile or _same(right, tile)
                    hasher.update(hasher.position, right)
            if not same or (not info and hasher.hexdigest() != expected[part.suffix]):
                wrong = True
                if not info:
                    yield (
                        f"its {part.suffix}, turned back to AWQ, is not what was converted "
                        "(give --source to see where)"
                    )
        if wrong and theirs:
            yield self._explain(module, original, theirs)
        if not wrong:
            yield from self._follows(module, self.model.pieces(original), linear.scales)

    def _follows(self, module: Stored, experts: Sequence[Pieces], scales: str) -> Iterator[str]:
        """Parts whose bytes their elements do not determine by place alone, made again.

        `experts`: what to make each expert from, with scales of dtype `scales`.
        """
        target, linear = layout(module.layout), module.linear
        for part in target.parts(linear):
            # An int8 zero point is one of 16 values, each written in one way.
            placed = part.coded or part.dtype == (scales if part.of == "s" else "I8")
            if placed and not part.pattern.pad:
                continue
            info = module.tensors[part.suffix]
            for at in self._wrong(target, part, linear, experts, info, placed, scales):
                yield (
                    f"its {part.suffix} does not follow from its AWQ form: byte "
                    f"{at - info.start:,} is wrong"
                )
                break

    def _wrong(
        self,
        target: Target,
        part: Part,
        linear: Linear,
        experts: Sequence[Pieces],
        info: TensorInfo,
        placed: bool,
        scales: str,
    ) -> Iterator[int]:
        """Offsets in its file of wrong bytes of a part."""
        if part.of == "s" and lossless(scales, part.dtype):
            yield from self._widened(part, info, scales)
            return
        again, size = self._padding if placed else self._whole, part.nbytes(linear)
        for e, pieces in enumerate(experts):
            yield from again(target, part, linear, pieces, info, info.start + e * size)

    def _widened(self, part: Part, info: TensorInfo, scales: str) -> Iterator[int]:
        """The same of numbers that are right when rounded to `scales`: they are no more precise."""
        narrow, widen = caster(part.dtype, scales), caster(scales, part.dtype)
        at = info.start
        for chunk in self.reader.chunks(info):
            right = widen(narrow(chunk.view(RAW[part.dtype]))).view(np.uint8)
            if not _same(chunk, right):
                yield at + int((chunk != right).argmax())
            at += len(chunk)

    def _whole(
        self, target: Target, part: Part, linear: Linear, pieces: Pieces, info: TensorInfo, at: int
    ) -> Iterator[int]:
        """Offsets in its file of wrong bytes of one expert's part, which begins at `at`."""
        for tile in self.encoder.tiles(target, part, linear, pieces, {}):
            stored = self._stored(info, at, len(tile))
            if not _same(stored, tile):
                yield at + int((stored != tile).argmax())
            at += len(tile)

    def _padding(
        self, target: Target, part: Part, linear: Linear, pieces: Pieces, info: TensorInfo, at: int
    ) -> Iterator[int]:
        """The same where only the padding can be wrong."""
        zeros = self.encoder.zeros(pieces, linear, {})
        bound = part.layout(linear)
        outer, codes = bound.axes[0], prod(bound.stored[-2:])
        unit, block = (n * part.bits // 8 for n in (outer.stored, codes + part.pattern.pad))
        padding = codes * part.bits // 8
        step = max(1, TILE // unit)
        for start in range(0, outer.size, step):
            stop = min(start + step, outer.size)
            stored = self._stored(info, at + start * unit, (stop - start) * unit)
            blocks = stored.reshape(-1, block)[:, padding:]
            before = blocks.copy()
            columns = zeros[:, start * outer.logical : stop * outer.logical]
            target.derive(part, linear, stored, columns)
            if not np.array_equal(before, blocks):
                row, byte = np.argwhere(before != blocks)[0]
                yield at + start * unit + int(row * block + padding + byte)

    def _stored(self, info: TensorInfo, at: int, size: int) -> Bytes:
        buffer = self.reader.arena.take("compare", size)
        self.reader.source.readinto(info.file, at, buffer.data)
        return buffer

    def _tiles(
        self, target: Any, part: Any, linear: Linear, module: Stored, e: int, hashers: Any
    ) -> Iterator[Bytes]:
        return self.encoder.tiles(target, part, linear, self.model.pieces(module)[e], hashers)

    def _source_tile(self, info: TensorInfo, offset: int, tile: Bytes) -> Bytes:
        assert self.origin_reader
        buffer = self.origin_reader.arena.take("source", len(tile))
        self.origin_reader.source.readinto(info.file, info.start + offset, buffer.data)
        return buffer

    def _explain(self, module: Stored, original: Stored, theirs: Stored) -> str:
        """The first element that differs from the source, and the worst error of a weight."""
        linear, first, worst = original.linear, "", 0.0
        assert self.origin
        assert self.origin_reader
        awq = layout("awq")
        for e in range(module.experts):
            arrays = []
            for reader, pieces in (
                (self.reader, self.model.pieces(original)[e]),
                (self.origin_reader, self.origin.pieces(theirs)[e]),
            ):
                encoder = Encoder(reader, SHARE)
                rows = {
                    str(part.of): np.concatenate(
                        [t.copy() for t in encoder.tiles(awq, part, linear, pieces, {})]
                    )
                    for part in awq.parts(linear)
                }
                arrays.append(_weight(rows, linear, linear.scales))
            for of, title in (("q", "code"), ("z", "zero point"), ("s", "scale")):
                mine, source = arrays[0][of], arrays[1][of]
                differ = np.argwhere(mine != source)
                if len(differ) and not first:
                    i, n = differ[0]
                    row = "k" if of == "q" else "group"
                    first = (
                        f"the {title} at {row} {i}, column {n} is {mine[i, n]}, the source has "
                        f"{source[i, n]} ({len(differ):,} of {mine.size:,} differ)"
                    )
            with np.errstate(invalid="ignore"):
                difference = np.abs(arrays[0]["w"] - arrays[1]["w"])
            worst = max(worst, float(np.nanmax(difference, initial=0)))
        return f"{first or 'bits of its scales differ'}; worst error of a weight {worst:.3g}"

    # --- product

    def _sample(self, module: Stored, *, alone: bool = False) -> _Sample:
        """Which window of a module to multiply: one that its layouts and groups can be cut at.

        `alone`: it is shown the AWQ bytes of its own expert, and not those of all.
        """
        target, linear, original = layout(module.layout), module.linear, module.original().linear
        awq, stored = layout("awq").parts(original), replace(module, kept={}).arrays().values()
        parts = [*awq, *(part for part, _ in stored)]
        random = np.random.default_rng(int(digest(module.name.encode())[:8], 16))

        def span(dim: int, wanted: int) -> tuple[int, int]:
            size, grain = (linear.K, linear.N)[dim], lcm(*(_grain(p, linear, dim) for p in parts))
            length = min(size, -(-wanted // grain) * grain)
            start = int(random.integers(0, (size - length) // grain + 1)) * grain
            return start, start + length

        def cut() -> Linear:
            K = k[1] - k[0]
            return replace(linear, K=K, N=n[1] - n[0], g=min(linear.g, K), bias=None)

        k, n = (span(dim, wanted) for dim, wanted in enumerate(self.window))
        if target.parts(cut()) != target.parts(linear):  # a single group may have its own layout
            k = 0, linear.K
        expert = int(random.integers(0, module.experts))
        shown = 0 if alone else expert
        return _Sample(
            cut(),
            expert,
            random,
            {info: _Window(info.start, part, linear, expert, k, n) for part, info in stored},
            {part.of: _Window(0, part, original, shown, k, n) for part in awq},
        )

    def _product(self, module: Stored, sample: _Sample) -> tuple[float, float, float, str]:
        """Relative error, its bound, the largest error, and what is beyond the bound, if any."""
        from awqconv.kernels import bounds

        assert self.multiply
        linear, target = sample.linear, layout(module.layout)
        packed = {
            part.suffix: sample.stored[module.tensors[part.suffix]].kept.reshape(-1)
            for part in target.parts(module.linear)
        }
        x = bounds.activations(ACTIVATIONS, linear.K, sample.random)
        was = replace(linear, scales=module.original().linear.scales)
        rows = {of: window.kept.reshape(-1) for of, window in sample.awq.items()}
        weight = _weight(rows, was, linear.scales)["w"]
        y, x, arithmetic = self.multiply(x, packed, target, linear)
        exact = bounds.product(x, weight)
        return bounds.judge(y, exact, x, weight, target, linear, arithmetic=arithmetic)


class Kernel:
    """The kernel that products are made by. Called with x, it returns y, x as it was, and what
    was rounded (None: what `kernels.cpu` rounds)."""

    def __init__(self, device: str, name: str) -> None:
        self.device, self.name = device, name
        self.title = f"by the {name} kernel on {device}"
        self._lock = threading.Lock()

    def __call__(
        self, x: NDArray[np.float32], packed: Mapping[str, Bytes], target: Target, linear: Linear
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], Any]:
        from awqconv.kernels import bounds, cpu

        if self.name == "cpu":
            return cpu.sample(x, packed, target, linear), x, None
        import torch

        from awqconv.kernels import triton

        kinds = {"I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "F32": torch.float32,
                 "F16": torch.float16, "BF16": torch.bfloat16}  # fmt: skip
        tensors = {
            part.suffix: torch.from_numpy(packed[part.suffix])
            .to(self.device)
            .view(kinds[part.dtype])
            .reshape(part.shape(linear))
            for part in target.parts(linear)
        }
        x = x / np.float32(128)  # still exact in float16, and y does not overflow
        own = torch.from_numpy(x).to(self.device, torch.float16)
        with self._lock:
            y = triton.gemm(own, tensors, target, linear)
        return y.float().cpu().numpy(), x, bounds.gpu(target, linear, "F16")


def choose_kernel(device: str, kernel: str) -> Kernel:
    """The kernel for a device, by name. Raises AwqconvError for one that cannot run here."""
    if device not in ("auto", "cpu", "cuda") or kernel not in ("auto", "cpu", "triton"):
        raise AwqconvError(
            f"no device {device!r} or no kernel {kernel!r}",
            fix="Use --device auto, cpu or cuda, and --kernel auto, cpu or triton.",
        )
    there = any(os.path.exists(f"/dev/{node}") for node in ("nvidiactl", "dxg"))
    if device == "auto":
        device = "cuda" if there and kernel != "cpu" and _cuda() else "cpu"
    if device == "cuda" and not _cuda():
        raise AwqconvError("PyTorch finds no CUDA GPU here", fix="Use --device cpu.")
    if kernel == "auto":
        kernel = "triton" if device == "cuda" else "cpu"
    if kernel == "cpu" and device == "cuda":
        raise AwqconvError("the CPU kernel does not run on a GPU", fix="Use --kernel triton.")
    if kernel == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise AwqconvError(
            "Triton has no kernels for CPUs",
            fix="Use --kernel cpu, or set TRITON_INTERPRET=1 (slow) to run it interpreted.",
        )
    return Kernel(device, kernel)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _grain(part: Part, linear: Linear, dim: int) -> int:
    """What a window must begin and end at in K (`dim` 0) or N (1), so that it is a layout."""
    axes = part.layout(linear).axes
    if axes[0].dim == axes[1].dim != dim:
        return linear.K if dim == 0 else linear.N
    rows = linear.g if dim == 0 and part.of in "zs" else 1
    return rows * max(axis.logical for axis in axes if axis.dim == dim)


class _Window(Hasher):
    """A digest of a stored tensor, of bytes from `start` on, that keeps a window of one expert.

    Of rows `k` and columns `n` of the weight, each (first, end); what belongs to them is `kept`,
    uint8 [any, any], and is itself in the layout.
    """

    def __init__(
        self, start: int, part: Part, linear: Linear, expert: int, k: tuple[int, int], n: Any
    ) -> None:
        super().__init__(start)
        rows = linear.g if part.of in "zs" else 1
        ranges = ((k[0] // rows, -(-k[1] // rows)), n)
        outer, second = part.layout(linear).axes[:2]
        self._unit, each = (axis.stored * part.bits // 8 for axis in (outer, second))
        first, end = (i // outer.logical for i in ranges[outer.dim])
        self._low, self._high = 0, self._unit
        if second.dim != outer.dim:
            self._low, self._high = (i // second.logical * each for i in ranges[second.dim])
        self._base = start + expert * part.nbytes(linear) + first * self._unit
        self.kept = np.empty((end - first, self._high - self._low), np.uint8)

    def update(self, offset: int, data: Bytes) -> None:
        """Take in bytes at an offset; ignored where they are not the next ones."""
        if offset == self.position:
            before = max(0, self._base - offset)
            self._keep(offset + before - self._base, data[before:])
        super().update(offset, data)

    def _keep(self, at: int, data: Bytes) -> None:
        low, high, unit = self._low, self._high, self._unit
        while len(data) and at < len(self.kept) * unit:
            row, begin = divmod(at, unit)
            if begin or len(data) < unit:  # a part of a unit
                size = min(unit - begin, len(data))
                first, end = max(low, begin), min(high, begin + size)
                if first < end:
                    self.kept[row, first - low : end - low] = data[first - begin : end - begin]
            else:
                rows = min(len(data) // unit, len(self.kept) - row)
                size = rows * unit
                self.kept[row : row + rows] = data[:size].reshape(rows, unit)[:, low:high]
            at, data = at + size, data[size:]


@dataclass(frozen=True)
class _Sample:
    """A window of one expert, `linear` its shape: its arrays as stored, and in AWQ form."""

    linear: Linear
    expert: int
    random: np.random.Generator
    stored: dict[TensorInfo, _Window]
    awq: dict[str, _Window]


def _weight(rows: Mapping[str, Bytes], linear: Linear, scales: str) -> dict[str, NDArray[Any]]:
    """Codes, zero points, scales and the float64 weight [K, N] of AWQ bytes, by plain numpy.

    The weight is that of scales rounded to the dtype `scales`.
    """
    found: dict[str, NDArray[Any]] = {}
    for of in "qz":
        found[of] = reference.unpack(rows[of], layouts.AWQ, linear.shape(of))
    raw = rows["s"].view(RAW[linear.scales])
    rounded = caster(linear.scales, scales)(raw.reshape(linear.shape("s")))
    found["s"] = to_float32(rounded, scales)
    groups = found["q"].astype(np.float64).reshape(linear.G, linear.g, -1)
    groups -= found["z"][:, None]
    groups *= found["s"][:, None]
    found["w"] = groups.reshape(linear.K, -1)
    return found


def _same(a: Bytes, b: Bytes) -> bool:
    """Whether two tiles have the same bytes."""
    whole = len(a) // 8 * 8
    return np.array_equal(a[:whole].view("u8"), b[:whole].view("u8")) and bool(
        (a[whole:] == b[whole:]).all()
    )


def _nbytes(item: TensorInfo | Stored) -> int:
    return sum(t.nbytes for t in (item.tensors.values() if isinstance(item, Stored) else (item,)))

"""Reading a sharded folder back: the checkpoint it was made from, as pieces of the ranks' tensors.

The manifest lists that checkpoint's tensors (name, dtype, shape). The form is applied to these
names again, as when the folder was written, and turned round: where a job put piece A of a source
module at place B of a rank's module, piece B of that now lies at A of the source. What several
ranks hold must be the same in all.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from awqconv.checkpoint.config import MANIFEST, quant_config, read_config
from awqconv.checkpoint.header import TensorInfo, read_header, tensor_size
from awqconv.checkpoint.model import (
    AGAIN,
    KEPT,
    Gathered,
    Model,
    Piece,
    Pieces,
    Run,
    Stored,
    awq_model,
    read_manifest,
)
from awqconv.checkpoint.reader import Checkpoint, find_modules
from awqconv.checkpoint.source import Source
from awqconv.checkpoint.views import Views
from awqconv.errors import AwqconvError
from awqconv.forms import sglang
from awqconv.jobs import Copy, Job, Pack, Spec, outputs
from awqconv.targets.base import layout

MAX_RANKS = 4096


def source_specs(model: Model) -> list[Spec]:
    """Tensors of the AWQ checkpoint that a model is, or was converted from."""
    found: list[Spec] = []
    for item in model.items():
        if isinstance(item, TensorInfo):
            found.append((item.name, item.dtype, item.shape))
            continue
        linear = item.original().linear
        lead = (item.experts,) if item.experts > 1 else ()
        for part in layout("awq").parts(linear):
            found.append((f"{item.name}.{part.suffix}", part.dtype, (*lead, *part.shape(linear))))
        if item.bias and linear.bias:
            found.append((item.bias.name, linear.bias, item.bias.shape))
    return found


def open_sharded(source: Source) -> Model:
    """The model that a sharded folder was made from. Raises AwqconvError where it is damaged."""
    manifest = read_manifest(source)
    config = read_config(source)
    files = source.files()
    try:
        target, tp = layout(manifest["target"]), int(manifest["tp"])
        quantization = dict(manifest["source"]["quantization_config"])
        specs = [(str(name), dtype, tuple(shape)) for name, dtype, shape in manifest["tensors"]]
        # Each tensor of the source is a file of its own: a range of bytes names its tensor.
        tensors = {
            name: TensorInfo(name, dtype, shape, name, 0, tensor_size(dtype, shape))
            for name, dtype, shape in specs
        }
        written = [str(name) for name in manifest["files"]]
        version = manifest["layout_version"]
        group_size = int(manifest["group_size"])
        unconverted = tuple(manifest["modules_to_not_convert"])
        said = {str(name): entry["layout"] for name, entry in manifest["modules"].items()}
        if not 1 <= tp <= MAX_RANKS:
            raise ValueError(f"tp {tp}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AwqconvError(f"the manifest is incomplete: {error!r}", MANIFEST, AGAIN) from None
    if version != target.version:
        raise AwqconvError(
            f"layout version {version} of {target.name}, this awqconv writes {target.version}",
            source.name,
            "Use the awqconv version that wrote it, or convert the checkpoint again.",
        )
    config = {**config, "quantization_config": quantization}
    views = Views(source)
    shards = tuple(name for name in written if name.endswith(".safetensors") and name != KEPT)
    quant = replace(
        quant_config(config, source),
        group_size=group_size,
        modules_to_not_convert=unconverted,
    )
    checkpoint = Checkpoint(views, config, quant, files, shards, tensors, {})
    checkpoint.modules = find_modules(checkpoint)
    model = awq_model(checkpoint)
    if missing := sorted(model.modules.keys() - said.keys()):
        raise AwqconvError(f"the manifest does not name {missing[0]}", MANIFEST, AGAIN)
    sharded = sglang.shard(model, model.modules, target, tp)
    found: dict[tuple[int, str], TensorInfo] = {}
    for name in (*shards, *((KEPT,) if KEPT in written else ())):
        match = re.fullmatch(r"model-rank-(\d{1,4})-part-\d+\.safetensors", name)
        rank = int(match[1]) if match else -1
        found.update(((rank, info.name), info) for info in read_header(source, name)[0].values())
    turned = _Turned(tensors, found, views)
    for rank, jobs in [*enumerate(sharded.ranks), (-1, sharded.kept)]:
        turned.take(rank, jobs)
    return replace(
        model,
        layout=target.name,
        manifest=manifest,
        scattered={name: turned.module(module) for name, module in model.modules.items()},
        gathered={info.name: turned.tensor(info) for info in model.others.values()}
        | {m.bias.name: turned.tensor(m.bias) for m in model.modules.values() if m.bias},
        ranks=turned.ranks,
        derived=turned.derived(),
        plain=tuple(turned.plain),
    )


class _Turned:
    """Jobs turned round: by source module and expert its pieces, by source tensor its ranges."""

    def __init__(
        self,
        sources: Mapping[str, TensorInfo],
        found: Mapping[tuple[int, str], TensorInfo],
        views: Views,
    ) -> None:
        self.sources, self.found, self.views = sources, found, views
        self.pieces: dict[tuple[str, int], list[Piece]] = defaultdict(list)
        self.ranges: dict[str, list[tuple[int, int, Run]]] = defaultdict(list)
        self.originals: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        self.ranks: dict[str, Stored] = {}
        self.lossy: dict[str, tuple[Pieces, ...]] = {}
        self.plain: list[TensorInfo] = []

    def _written(self, rank: int, wanted: TensorInfo) -> TensorInfo:
        info = self.found.get((rank, wanted.name))
        if info is None or (info.dtype, info.shape) != (wanted.dtype, wanted.shape):
            seen = f"{info.dtype} {list(info.shape)}" if info else "missing"
            raise AwqconvError(
                f"{seen}, where the manifest means {wanted.dtype} {list(wanted.shape)}",
                f"rank {rank}: {wanted.name}" if rank >= 0 else f"{KEPT}: {wanted.name}",
                AGAIN,
            )
        return info

    def take(self, rank: int, jobs: Iterable[Job]) -> None:
        """Take in the jobs of a rank, or of the originals kept beside (rank -1)."""
        for job in jobs:
            written = [self._written(rank, info) for info in outputs(job)]
            if isinstance(job, Copy) or rank < 0:
                self.plain += written
            if isinstance(job, Copy):
                self._copy(rank, job, written[0])
            elif rank < 0:
                self.originals[job.name].update(zip(job.outputs, written, strict=True))
            else:
                name, parts = (
                    f"rank {rank}: {job.name}",
                    dict(zip(job.outputs, written, strict=True)),
                )
                stored = Stored(name, job.layout, job.linear, parts, experts=len(job.experts))
                self.ranks[name] = stored
                if layout(job.layout).lossy:
                    self.lossy[name] = job.experts
                else:
                    self._pack(job, stored)

    def _copy(self, rank: int, job: Copy, written: TensorInfo) -> None:
        file, at = written.file, written.start
        if job.blocks:
            file, at = f"rank {rank}: {written.name}", 0
            self.views.add(file, written, job.blocks)
        for run in job.runs:
            if run.file:
                here = Run(file, at, run.length, run.count, run.length)
                self.ranges[run.file].append((run.start, run.stride, here))
            at += run.length * run.count

    def _pack(self, job: Pack, stored: Stored) -> None:
        for expert, pieces in enumerate(job.experts):
            for piece in pieces:
                (k, n), (rows, cols) = piece.at, (piece.rows, piece.cols)
                self.pieces[piece.source.name, piece.expert].append(
                    Piece(
                        stored,
                        (k, k + rows[1] - rows[0]),
                        (n, n + cols[1] - cols[0]),
                        (rows[0], cols[0]),
                        expert,
                    )
                )

    def derived(self) -> dict[str, tuple[Pieces, ...]]:
        """What lossy modules of ranks were made from: pieces of the originals kept beside."""
        return {
            name: tuple(
                tuple(replace(p, source=self._original(p.source)) for p in pieces)
                for pieces in experts
            )
            for name, experts in self.lossy.items()
        }

    def _original(self, module: Stored) -> Stored:
        return replace(module, tensors=self.originals[module.name], bias=None)

    def module(self, module: Stored) -> tuple[Pieces, ...]:
        """The pieces of each expert of a source module."""
        linear = module.linear
        if module.name in self.originals:
            stored = self._original(module)
            rows, cols = (0, linear.K), (0, linear.N)
            return tuple((Piece(stored, rows, cols, expert=e),) for e in range(module.experts))
        experts = []
        for expert in range(module.experts):
            pieces: dict[Any, Piece] = {}
            again: list[Piece] = []
            for piece in self.pieces[module.name, expert]:
                size = piece.rows[1] - piece.rows[0], piece.cols[1] - piece.cols[0]
                if pieces.setdefault((piece.at, size), piece) is not piece:
                    again.append(replace(piece, again=True))
            if sum(K * N for _, (K, N) in pieces) != linear.K * linear.N:
                raise AwqconvError("the ranks do not hold all of it", module.name, AGAIN)
            experts.append((*pieces.values(), *again))
        return tuple(experts)

    def tensor(self, info: TensorInfo) -> Gathered:
        """Where the ranges of a source tensor lie now."""
        copies: dict[tuple[int, int], list[Run]] = defaultdict(list)
        strides: dict[int, int] = {}
        for start, stride, run in self.ranges[info.name]:
            copies[start, run.length * run.count].append(run)
            strides[start] = stride if run.count > 1 else 0
        order = sorted(copies)
        first = tuple(copies[key][0] for key in order)
        if sum(size for _, size in order) != info.nbytes:
            raise AwqconvError("the ranks do not hold all of it", info.name, AGAIN)
        spare = max((len(runs) for runs in copies.values()), default=1)
        again = tuple(
            tuple(copies[key][min(i, len(copies[key]) - 1)] for key in order)
            for i in range(1, spare)
        )
        return Gathered(first, any(strides.values()), again)

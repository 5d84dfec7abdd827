"""From headers and a target to everything a conversion will do, before it does any of it.

A plan is data: for every output file its header, for every output tensor the source ranges it is
made of. Jobs are independent and name only files and ranges, so any executor can run them in any
order; `convert.py` runs them in threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from awqconv._version import __version__
from awqconv.checkpoint.header import DTYPE_BITS, TensorInfo, build_header
from awqconv.checkpoint.model import KEPT, Model, Stored
from awqconv.errors import AwqconvError
from awqconv.repack.floats import lossless
from awqconv.targets.base import Linear, Target, layout

Spec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True, slots=True)
class Run:
    """`count` ranges of `length` bytes of a source file, `stride` bytes apart; zeros if no file."""

    file: str
    start: int
    length: int
    count: int = 1
    stride: int = 0


@dataclass(frozen=True, slots=True)
class Copy:
    """An output tensor whose bytes are source bytes, `cast` from one float dtype to another, or
    literal `data`. `whole` names the source tensor if its bytes are read whole and in order."""

    output: TensorInfo
    runs: tuple[Run, ...] = ()
    cast: tuple[str, str] | None = None
    data: bytes | None = None
    whole: str | None = None

    @property
    def name(self) -> str:
        return self.output.name


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `rows` and columns `cols` of a source module, which land at (k, n) of an output."""

    source: Stored
    rows: tuple[int, int]
    cols: tuple[int, int]
    at: tuple[int, int] = (0, 0)
    expert: int = 0

    @property
    def whole(self) -> bool:
        """Whether it is all of its source module."""
        linear = self.source.linear
        return self.rows == (0, linear.K) and self.cols == (0, linear.N)


@dataclass(frozen=True, slots=True)
class Pack:
    """An output module: `experts` times a linear layer put together from pieces of source modules.

    `outputs` are the tensors by part suffix; with several experts each tensor holds them one after
    another.
    """

    name: str
    layout: str
    linear: Linear
    outputs: Mapping[str, TensorInfo]
    experts: tuple[tuple[Piece, ...], ...]


Job = Copy | Pack


@dataclass(frozen=True, slots=True)
class OutFile:
    """A safetensors file to be written: its first bytes, its size, its tensors in order."""

    name: str
    header: bytes
    size: int
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a source module: its layout in the output, and the rule it breaks if any."""

    module: str
    linear: Linear
    layout: str
    rule: str | None = None


@dataclass(frozen=True)
class Plan:
    """All of a conversion. `copies` are the other files, `config` the config.json to write."""

    model: Model
    target: Target
    scale_dtype: str
    files: tuple[OutFile, ...]
    jobs: tuple[Job, ...]
    verdicts: tuple[Verdict, ...]
    config: dict[str, Any]
    copies: tuple[str, ...]
    index: dict[str, Any] | None
    form: str = "hf"
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all safetensors files to be written."""
        return sum(file.size for file in self.files)

    @property
    def fallbacks(self) -> list[Verdict]:
        """The modules that the target's kernels do not take."""
        return [verdict for verdict in self.verdicts if verdict.rule]

    def identity(self) -> dict[str, Any]:
        """What must be the same for an interrupted run to be continued."""
        source = self.model.checkpoint.source
        return {
            "awqconv": __version__,
            "target": self.target.name,
            "layout version": self.target.version,
            "form": self.form,
            "scale dtype": self.scale_dtype,
            "shards": [[file.name, file.size] for file in self.files],
            "source": source.name,
            "source files": {
                name: list(source.fingerprint(name))
                for name in (*self.model.files_read, *self.copies)
            },
        }


SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str | int) -> int:
    """Bytes of "5GB", "200MB", "1GiB" or a number. Raises AwqconvError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    if not match:
        raise AwqconvError(f"{text!r} is no size", fix="Write it as 5GB, 500MB or 1GiB.")
    unit = SIZES[match[2].upper()]
    if match[3]:
        unit = 1 << 10 * list(SIZES).index(match[2].upper())
    return int(float(match[1]) * unit)


def verdict(module: Stored, target: Target, scales: str) -> Verdict:
    """Whether the target's kernels take a module, and in what layout it will be written if not."""
    linear = module.linear if scales == "keep" else replace(module.linear, scales=scales)
    rule = target.broken(linear)
    return Verdict(module.name, linear, target.fallback if rule else target.name, rule)


DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "keep": "keep"}


def make_plan(
    model: Model,
    target: Target,
    *,
    scale_dtype: str = "keep",
    max_shard_size: str | int = "5GB",
    strict: bool = False,
) -> Plan:
    """Plan the conversion of an opened model. Reads nothing but what `model` holds.

    `scale_dtype`: keep, float16, bfloat16 or float32. `strict` refuses modules that the target's
    kernels do not take instead of writing them in the fallback layout.

    Raises AwqconvError for a module that breaks a rule under `strict`, names that collide and bad
    arguments.
    """
    if scale_dtype not in DTYPES:
        raise AwqconvError(
            f"scale dtype {scale_dtype!r} is not known", fix=f"Use one of {', '.join(DTYPES)}."
        )
    if target.name == "awq" and scale_dtype != "keep":
        raise AwqconvError(
            "turning back to AWQ restores the scales as they were",
            fix="Leave --scale-dtype out with --target awq.",
        )
    sources = {name: module.original() for name, module in model.modules.items()}
    verdicts = {
        name: verdict(module, target, DTYPES[scale_dtype]) for name, module in sources.items()
    }
    broken = [v for v in verdicts.values() if v.rule]
    if broken and (strict or target.fallback == target.name):
        first = broken[0]
        raise AwqconvError(
            f"{target.name} does not take {len(broken)} of {len(verdicts)} modules; "
            f"the first breaks {first.rule}",
            first.module,
            f"Leave --strict out to write them as {target.fallback}, or choose another target.",
        )
    jobs = list(_jobs(model, target, sources, verdicts))
    kept = list(_kept(sources, verdicts))
    files, jobs = _lay_out(jobs, kept, parse_size(max_shard_size))
    main = [file for file in files if file.name != KEPT]
    index: dict[str, Any] | None = None
    if len(main) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for f in main for t in f.tensors.values())},
            "weight_map": {name: file.name for file in main for name in file.tensors},
        }
    plan = Plan(
        model,
        target,
        scale_dtype,
        tuple(files),
        tuple(jobs),
        tuple(verdicts.values()),
        {},
        tuple(model.other_files),
        index,
        notes=list(model.notes),
    )
    plan.config.update(_config(plan))
    return plan


def _whole(info: TensorInfo) -> tuple[Run, ...]:
    return (Run(info.file, info.start, info.nbytes),)


def _jobs(
    model: Model, target: Target, sources: Mapping[str, Stored], verdicts: Mapping[str, Verdict]
) -> Iterator[Job]:
    """The jobs in source order, with outputs that have a name, dtype and shape but no place yet."""
    for item in model.items():
        if isinstance(item, TensorInfo):
            yield Copy(_unplaced(item.name, item.dtype, item.shape), _whole(item), whole=item.name)
            continue
        name = item.name
        source, decided = sources[name], verdicts[name]
        out, linear = layout(decided.layout), decided.linear
        outputs = {
            part.suffix: _unplaced(
                f"{name}.{part.suffix}", part.dtype, _stack(source, part.shape(linear))
            )
            for part in out.parts(linear)
        }
        yield Pack(name, decided.layout, linear, outputs, _experts(source))
        for suffix, value in out.constants(linear).items():
            dtype = {"i8": "I64", "i4": "I32"}[value.dtype.str[1:]]
            info = _unplaced(f"{name}.{suffix}", dtype, value.shape)
            yield Copy(info, data=value.tobytes())
        if source.bias:
            was, dtype = source.bias, out.bias(linear) or source.bias.dtype
            cast = (was.dtype, dtype) if was.dtype != dtype else None
            info = _unplaced(was.name, dtype, was.shape)
            yield Copy(info, _whole(was), cast, whole=was.name)


def _kept(sources: Mapping[str, Stored], verdicts: Mapping[str, Verdict]) -> Iterator[Job]:
    """Original tensors that the written ones do not determine."""
    for name, source in sources.items():
        decided = verdicts[name]
        awq = layout("awq")
        lossy = layout(decided.layout).lossy
        rounded = not lossless(source.linear.scales, decided.linear.scales)
        for part in awq.parts(source.linear):
            if lossy or (rounded and part.of == "s"):
                shape = _stack(source, part.shape(source.linear))
                info = _unplaced(f"{name}.{part.suffix}", part.dtype, shape)
                yield Pack(name, "awq", source.linear, {part.suffix: info}, _experts(source))


def _stack(source: Stored, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (source.experts, *shape) if source.experts > 1 else shape


def _experts(source: Stored) -> tuple[tuple[Piece, ...], ...]:
    """Each expert of a source module (one, where it is no stack) as one whole piece."""
    rows, cols = (0, source.linear.K), (0, source.linear.N)
    return tuple((Piece(source, rows, cols, expert=e),) for e in range(source.experts))


def _unplaced(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, dtype, shape, "", 0, 0)


def _outputs(job: Job) -> tuple[TensorInfo, ...]:
    return (job.output,) if isinstance(job, Copy) else tuple(job.outputs.values())


def _specs(jobs: Iterable[Job]) -> list[Spec]:
    return [(t.name, t.dtype, t.shape) for job in jobs for t in _outputs(job)]


def _lay_out(jobs: list[Job], kept: list[Job], limit: int) -> tuple[list[OutFile], list[Job]]:
    """Cut the jobs into shards of at most `limit` bytes and give every output tensor its place."""
    shards: list[list[Job]] = [[]]
    room = limit
    for job in jobs:
        size = sum(_nbytes(spec) for spec in _specs([job]))
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(job)
        room -= size
    total = len(shards)
    names = [
        "model.safetensors" if total == 1 else f"model-{i:05}-of-{total:05}.safetensors"
        for i in range(1, total + 1)
    ]
    if kept:
        shards.append(kept)
        names.append(KEPT)
    files: list[OutFile] = []
    placed: list[Job] = []
    seen: set[str] = set()
    for file, shard in zip(names, shards, strict=True):
        specs = _specs(shard)
        for name, _, _ in specs if file != KEPT else ():
            if name in seen:
                raise AwqconvError(
                    "two tensors of the converted checkpoint would have this name",
                    name,
                    "Rename the one in the source that belongs to no quantized module.",
                )
            seen.add(name)
        header, where = build_header(specs, file=file)
        size = max((info.stop for info in where.values()), default=len(header))
        files.append(OutFile(file, header, size, where))
        for job in shard:
            if isinstance(job, Copy):
                placed.append(replace(job, output=where[job.output.name]))
            else:
                outputs = {suffix: where[info.name] for suffix, info in job.outputs.items()}
                placed.append(replace(job, outputs=outputs))
    return files, placed


def _nbytes(spec: Spec) -> int:
    return prod(spec[2]) * DTYPE_BITS[spec[1]] // 8


def _config(plan: Plan) -> dict[str, Any]:
    """The output's config.json: the source's, with the quantization it now has."""
    model, quant = plan.model, plan.model.quantization
    common = {
        "quant_method": "awqconv",
        "target": plan.target.name,
        "layout_version": plan.target.version,
        "form": plan.form,
        "bits": 4,
        "group_size": quant.group_size,
        "zero_point": True,
        "modules_to_not_convert": list(quant.modules_to_not_convert) or None,
        "fallback": {v.module: {"layout": v.layout, "rule": v.rule} for v in plan.fallbacks},
        "source": {
            "layout": model.layout,
            "quantization_config": model.source_quantization,
        },
    }
    common["unquantized"] = model.unquantized()
    written = plan.target.quantization_config(common)
    written.pop("unquantized", None)
    return {**model.checkpoint.config, "quantization_config": written}

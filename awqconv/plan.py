"""From headers and a target to everything a conversion will do, before it does any of it.

A plan is data: for every output file its header, for every output tensor the source ranges it is
made of. Jobs are independent and name only files and ranges, so any executor can run them in any
order; `convert.py` runs them in threads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from awqconv._version import __version__
from awqconv.checkpoint.header import DTYPE_BITS, TensorInfo, build_header
from awqconv.checkpoint.model import KEPT, Model, Piece, Run, Stored
from awqconv.errors import AwqconvError
from awqconv.forms import hf, sglang
from awqconv.forms.experts import misread, mixtures
from awqconv.jobs import Copy, Job, Pack, Spec, Verdict, specs
from awqconv.serving.config import METHOD, NEEDS_LOADER, WEIGHTS
from awqconv.targets.base import Target, layout

__all__ = ["Copy", "Job", "OutFile", "Pack", "Piece", "Plan", "Run", "Verdict", "make_plan"]


@dataclass(frozen=True, slots=True)
class OutFile:
    """A safetensors file to be written: its first bytes, its size, its tensors in order."""

    name: str
    header: bytes
    size: int
    tensors: Mapping[str, TensorInfo]


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
    tp: int = 1
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
            "tp": self.tp,
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
    """What becomes of one module alone; `verdicts` also knows that experts go together."""
    return verdicts({module.name: module}, target, scales)[module.name]


def verdicts(sources: Mapping[str, Stored], target: Target, scales: str) -> dict[str, Verdict]:
    """For every module, whether the target's kernels take it, and in what layout it is written.

    `scales` is the safetensors dtype that scales are written in, or keep.
    """
    linears = {
        name: module.linear if scales == "keep" else replace(module.linear, scales=scales)
        for name, module in sources.items()
    }
    return hf.decide(sources, linears, target)


DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "keep": "keep"}
FORMS = ("hf", "sglang-sharded")


def make_plan(
    model: Model,
    target: Target,
    *,
    form: str = "hf",
    tp: int = 1,
    scale_dtype: str = "keep",
    max_shard_size: str | int = "5GB",
    strict: bool = False,
) -> Plan:
    """Plan the conversion of an opened model. Reads nothing but what `model` holds.

    `form`: hf, every module under its own name, or sglang-sharded, a set of files for each of `tp`
    tensor-parallel ranks. `scale_dtype`: keep, float16, bfloat16 or float32. `strict` refuses
    modules that the target's kernels do not take instead of writing them in the fallback layout.

    Raises AwqconvError for a module that breaks a rule under `strict`, names that collide, a model
    that the form does not know, and bad arguments.
    """
    _check_arguments(model, target, form, tp, scale_dtype)
    sources = {name: module.original() for name, module in model.modules.items()}
    notes = list(model.notes)
    groups: list[tuple[Namer, list[Job]]]
    if form == "hf":
        decided = verdicts(sources, target, DTYPES[scale_dtype])
        groups = [(_shard_name, list(hf.jobs(model, sources, decided)))]
        kept = list(hf.kept(model, sources, decided))
    else:
        sglang.check_target(target)
        sharded = sglang.shard(model, sources, target, tp)
        decided, kept = sharded.verdicts, sharded.kept
        notes += sharded.notes
        groups = [(_rank_namer(rank), jobs) for rank, jobs in enumerate(sharded.ranks)]
    broken = [v for v in decided.values() if v.rule]
    if broken and (strict or target.fallback == target.name):
        first = broken[0]
        raise AwqconvError(
            f"{target.name} does not take {len(broken)} of {len(decided)} modules; "
            f"the first breaks {first.rule}",
            first.module,
            f"Leave --strict out to write them as {first.layout}, or choose another target.",
        )
    if target.name == "marlin":
        notes += _scale_order(sources, tp if form != "hf" else None)
    files, jobs = _lay_out([*groups, (lambda part, parts: KEPT, kept)], parse_size(max_shard_size))
    main = [file for file in files if file.name != KEPT] if form == "hf" else []
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
        tuple(decided.values()),
        {},
        tuple(model.other_files),
        index,
        form,
        tp,
        notes,
    )
    plan.config.update(_config(plan))
    return plan


def _check_arguments(model: Model, target: Target, form: str, tp: int, scale_dtype: str) -> None:
    """Refuse arguments that do not go together."""
    if scale_dtype not in DTYPES:
        raise AwqconvError(
            f"scale dtype {scale_dtype!r} is not known", fix=f"Use one of {', '.join(DTYPES)}."
        )
    if target.name == "awq" and scale_dtype != "keep":
        raise AwqconvError(
            "turning back to AWQ restores the scales as they were",
            fix="Leave --scale-dtype out with --target awq.",
        )
    if form not in FORMS:
        raise AwqconvError(f"no form is named {form!r}", fix=f"Use one of {', '.join(FORMS)}.")
    if tp < 1:
        raise AwqconvError(f"{tp} tensor-parallel ranks", fix="Give --tp 1 or more.")
    if form == "hf":
        if tp != 1:
            raise AwqconvError(
                "the form hf is the same for every number of ranks",
                fix="Leave --tp out, or add --form sglang-sharded.",
            )
        return
    if scale_dtype != "keep":
        raise AwqconvError(
            "the engine casts scales to the model's dtype when it loads the form sglang-sharded",
            fix="Leave --scale-dtype out with --form sglang-sharded.",
        )
    if model.scattered:
        raise AwqconvError(
            "the folder is sharded for tensor-parallel ranks already",
            model.checkpoint.source.name,
            "Turn it back first: awqconv convert FOLDER --target awq",
        )


def _scale_order(sources: Mapping[str, Stored], tp: int | None) -> list[str]:
    """A note that names the mixtures that engines load wrongly from AWQ, at which ranks."""
    counts = [tp] if tp else [1, 2, 4, 8, 16]
    marlin = layout("marlin")
    found: dict[tuple[int, ...], list[str]] = {}
    for group in mixtures(sources):
        wrong = tuple(
            n
            for n in counts
            if group.mixture
            and misread(group.mixture, n)
            and not marlin.broken(replace(group.mixture, I=group.mixture.I // n))
        )
        if wrong:
            found.setdefault(wrong, []).append(group.prefix)
    return [
        f"With {' or '.join(map(str, wrong))} tensor-parallel rank(s), SGLang (to 0.5.23) and vLLM "
        f"put the w13 scales of {len(names)} mixtures, the first {names[0]}, in a wrong order when "
        "they load the AWQ checkpoint itself. Here they are right, so outputs will differ."
        for wrong, names in found.items()
    ]


Namer = Callable[[int, int], str]  # of part i (from 1) of n


def _shard_name(part: int, parts: int) -> str:
    return "model.safetensors" if parts == 1 else f"model-{part:05}-of-{parts:05}.safetensors"


def _rank_namer(rank: int) -> Namer:
    return lambda part, parts: sglang.FILE.format(rank=rank, part=part - 1)


def _cut(jobs: Sequence[Job], limit: int) -> list[list[Job]]:
    """Jobs in order, as shards of at most `limit` bytes."""
    shards: list[list[Job]] = [[]]
    room = limit
    for job in jobs:
        size = sum(map(_nbytes, specs([job])))
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(job)
        room -= size
    return shards


def _lay_out(groups: list[tuple[Namer, list[Job]]], limit: int) -> tuple[list[OutFile], list[Job]]:
    """Cut each group of jobs into shards and give every output tensor its place."""
    files: list[OutFile] = []
    placed: list[Job] = []
    for namer, jobs in groups:
        seen: set[str] = set()
        one = namer(1, 1) == KEPT
        shards = [jobs] if one else _cut(jobs, limit)
        for part, shard in enumerate(shards, 1):
            if one and not shard:
                continue
            file = namer(part, len(shards))
            wanted = specs(shard)
            for name, _, _ in wanted:
                if name in seen:
                    raise AwqconvError(
                        "two tensors of the converted checkpoint would have this name",
                        name,
                        "Rename the one in the source that belongs to no quantized module.",
                    )
                seen.add(name)
            header, where = build_header(wanted, file=file)
            size = max((info.stop for info in where.values()), default=len(header))
            files.append(OutFile(file, header, size, where))
            for job in shard:
                if isinstance(job, Copy):
                    placed.append(replace(job, output=where[job.output.name]))
                else:
                    infos = {suffix: where[info.name] for suffix, info in job.outputs.items()}
                    placed.append(replace(job, outputs=infos))
    return files, placed


def _nbytes(spec: Spec) -> int:
    return prod(spec[2]) * DTYPE_BITS[spec[1]] // 8


def _config(plan: Plan) -> dict[str, Any]:
    """The output's config.json: the source's, with the quantization it now has."""
    model, quant = plan.model, plan.model.quantization
    config = {k: v for k, v in model.checkpoint.config.items() if (k, v) != (WEIGHTS, NEEDS_LOADER)}
    if plan.form != "hf":  # what the engine picks its own layers by
        return _placed(config, model.source_quantization)
    common = {
        "quant_method": METHOD,
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
    if written.get("quant_method") == METHOD:
        config.setdefault(WEIGHTS, NEEDS_LOADER)
    return _placed(config, written)


def _placed(config: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """The config with another quantization_config, where it has one: a multimodal model may have
    it in a part."""
    entry = {"quantization_config": written}
    parts = {
        key: {**part, **entry}
        for key, part in config.items()
        if key.endswith("_config") and isinstance(part, dict) and part.get("quantization_config")
    }
    return {**config, **parts, **(entry if "quantization_config" in config or not parts else {})}

"""The form sglang-sharded: for each tensor-parallel rank, every parameter as SGLang holds it after
loading, so that `--load-format sharded_state` copies it in as it is.

Names and shares come from `architectures`, layouts from the target, whose rules are asked of what
one rank has: a shard with one group of scales has them in the one-group order, and what does not
fit at this number of ranks takes the engine's fallback. Source: sglang 0.5.15,
srt/model_loader/loader.py ShardedStateLoader (files and keys), srt/layers/linear.py,
vocab_parallel_embedding.py, moe/fused_moe_triton/layer.py (shares).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from awqconv.checkpoint.header import DTYPE_BITS, TensorInfo
from awqconv.checkpoint.model import Model, Piece, Pieces, Run, Stored
from awqconv.errors import AwqconvError
from awqconv.forms import hf
from awqconv.forms.architectures import Entry, architecture
from awqconv.forms.experts import ROLES, mixtures, split
from awqconv.jobs import Copy, Job, Pack, Verdict, copied, unplaced
from awqconv.repack import layouts
from awqconv.repack.blocks import Blocks
from awqconv.repack.floats import RAW
from awqconv.targets.base import Linear, Mixture, Target, layout

FILE = "model-rank-{rank}-part-{part}.safetensors"
PADDING = 64  # vocab_parallel_embedding.py DEFAULT_VOCAB_PADDING_SIZE


@dataclass(frozen=True, slots=True)
class Device:
    """What SGLang does on the device of a target.

    `names` are the engine's of dense parts, where they differ. `marlin`: its quantization method is
    awq_marlin, which has fused experts and a quantized head; elsewhere it is awq. `falls_back`:
    a module that the kernels do not take is loaded in another way, not refused. `cpu`: float
    weights are packed as well, biases are float32, and what ranks cannot share is padded.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    marlin: bool = False
    falls_back: bool = False
    cpu: bool = False


# Source: hardware_backend/*/quantization/awq_kernels.py process_weights_after_loading. On a CPU
# layers/amx_utils.py and configs/update_config.py adjust_config_with_unaligned_cpu_tp; a bias
# beside AWQ weights loads there from 0.5.18 on. XPU has kernels for AWQ from 0.5.19 on.
DEVICES: Mapping[str, Device] = {
    "marlin": Device(marlin=True, falls_back=True),
    "npu": Device({"qweight": "weight", "qzeros": "zeros"}, falls_back=True),
    "amx": Device(cpu=True),
    "xpu": Device({"qzeros": "xpu_zero_points", "scales": "xpu_scales"}),
}
MARLIN_GROUPS = (-1, 32, 64, 128)  # marlin_utils.py check_marlin_supported; else the method is awq

Span = tuple[int, int]
Tensors = Stored | TensorInfo


@dataclass
class Sharded:
    """The jobs of each rank, originals of what those do not determine, and what became of what."""

    ranks: list[list[Job]]
    kept: list[Job] = field(default_factory=list)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Unit:
    """A module of the engine: the stored modules, or plain weights, that it is made of, by part,
    for experts by (number, role); and their biases."""

    entry: Entry
    name: str
    parts: dict[Any, Tensors] = field(default_factory=dict)
    biases: dict[Any, TensorInfo] = field(default_factory=dict)


def check_target(target: Target) -> None:
    """Refuse a target whose parameters in the running engine are not known."""
    if target.name not in DEVICES:
        raise AwqconvError(
            f"the form sglang-sharded is not there for {target.name}: no SGLang engine is known to "
            "hold its tensors",
            fix=f"Use --form hf, or --target {' or '.join(DEVICES)}.",
        )


def shard(model: Model, sources: Mapping[str, Stored], target: Target, tp: int) -> Sharded:
    """The jobs of all ranks for a model in the default form.

    Raises AwqconvError for an architecture that is not known, tensors that the engine's parameters
    need and the checkpoint lacks, and sizes that the engine cannot share among so many ranks.
    """
    return _Sharder(model, sources, target, tp, range(tp)).run()


def try_first(
    model: Model, sources: Mapping[str, Stored], target: Target, tp: int
) -> tuple[Sharded, list[AwqconvError]]:
    """The jobs of the first rank, as far as they can be, and what stands in the way of others."""
    problems: list[AwqconvError] = []
    return _Sharder(model, sources, target, tp, (0,), problems).run(), problems


def packed_float(weight: TensorInfo) -> tuple[TensorInfo, Blocks | None]:
    """A float weight [N, K] as the engine holds it on a CPU, and its order there, if not plain.

    Source: layers/amx_utils.py dim_is_supported; sgl-kernel/csrc/cpu/gemm.cpp
    convert_weight_packed.
    """
    if len(weight.shape) != 2 or weight.dtype not in RAW:
        return weight, None
    N, K = weight.shape
    if K % 32 or (N > 16 and N % 16):
        return weight, None
    if N < 16:  # for a product by fused multiply and add: float32 [K, N]
        blocks = Blocks((N, K), N, layouts.TRANSPOSED, weight.dtype, "F32")
        return unplaced(weight.name, "F32", (K, N)), blocks
    return weight, Blocks((N, K), 32, layouts.VNNI, weight.dtype, weight.dtype)


class _Sharder:
    def __init__(
        self,
        model: Model,
        sources: Mapping[str, Stored],
        target: Target,
        tp: int,
        ranks: Sequence[int],
        problems: list[AwqconvError] | None = None,
    ) -> None:
        self.model, self.sources, self.target, self.tp = model, sources, target, tp
        self.config = model.checkpoint.config
        self.device = DEVICES.get(target.name, DEVICES["marlin"])
        self.group_size = model.quantization.group_size
        self.marlin = self.device.marlin
        if target.name == "marlin":
            self.marlin = self.group_size in MARLIN_GROUPS
        self.architecture = architecture(self.config, marlin=self.marlin)
        self.ranks, self.problems = ranks, problems
        self.out = Sharded([[] for _ in ranks])
        self.tied = self.architecture.ties and bool(self.config.get("tie_word_embeddings"))
        self.layers = self._number("num_hidden_layers")
        self.heads = self._number("num_attention_heads")
        self.kv_heads = self._number("num_key_value_heads", self.heads)
        self.mixtures = {group.prefix: group for group in mixtures(sources)}
        self.inner: dict[str, tuple[Entry, str]] = {}
        self.outer: dict[str, tuple[Entry, str]] = {}
        for entry in self.architecture.entries:
            inside, path = entry.name.startswith("model.layers.#."), entry.name
            path = path.removeprefix("model.layers.#.")
            if entry.split == "experts":
                self.inner[path] = entry, ""
                continue
            place, dot, leaf = path.rpartition(".")
            for part in entry.parts or (leaf,):
                (self.inner if inside else self.outer)[f"{place}{dot}{part}"] = entry, part

    def _number(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key, default)
        if not isinstance(value, int) or value < 1:
            self._refuse(f"{key} is {value!r}", "config.json", "Correct it.")
        return value

    def _refuse(self, what: str, where: str, fix: str = "") -> NoReturn:
        raise AwqconvError(what, where, fix or "Use another --tp, or --form hf, which has none.")

    # --- which tensor belongs where

    def run(self) -> Sharded:
        """All units, in the order of their first tensor."""
        if self.group_size < 1 and not self.device.marlin:
            self._refuse(
                "the engine divides by the group size, -1, on this device (AWQLinearScheme)",
                "config.json: quantization_config",
                "Use --form hf, or write the number of rows there where all modules have it.",
            )
        units, dropped = self._units()
        self._check_complete(units)
        for unit in units.values():
            try:
                self._unit(unit, dropped)
            except AwqconvError as error:
                if self.problems is None:
                    raise
                self.problems.append(error)
        self._keep(dropped)
        return self.out

    def _unit(self, unit: _Unit, dropped: list[Tensors]) -> None:
        if unit.entry.split == "heads":
            self._check_heads(unit)
        if self.device.cpu:
            self._check_padding(unit)
        self._check_biases(unit, dropped)
        quantized = {isinstance(part, Stored) for part in unit.parts.values()}
        if len(quantized) > 1:
            some = next(p.name for p in unit.parts.values() if isinstance(p, TensorInfo))
            self._refuse(f"its part {some} is not quantized, others are", unit.name)
        self._check_skipped(unit, True in quantized)
        if unit.entry.split == "experts":
            (self._experts if True in quantized else self._plain_experts)(unit)
        elif True in quantized:
            self._linear(unit)
        else:
            self._plain(unit)
        if unit.biases:
            self._bias(unit)

    def _units(self) -> tuple[dict[str, _Unit], list[Tensors]]:
        units: dict[str, _Unit] = {}
        dropped: list[Tensors] = []
        for item in self.model.items():
            module, suffix = item.name, ""
            if isinstance(item, TensorInfo):
                module, _, suffix = item.name.rpartition(".")
            found = self._place(units, module) if suffix in ("", "weight", "bias") else None
            if not found:
                dropped.append(self.sources[item.name] if isinstance(item, Stored) else item)
                continue
            unit, key = found
            if isinstance(item, Stored):
                unit.parts[key] = self.sources[item.name]
                if item.bias:
                    unit.biases[key] = item.bias
            else:
                (unit.biases if suffix == "bias" else unit.parts)[key] = item
        return units, dropped

    def _place(self, units: dict[str, _Unit], module: str) -> tuple[_Unit, Any] | None:
        """The unit that a checkpoint's module is part of, and as which part."""
        layer, key, rest = None, None, module
        known = self.outer
        if module.startswith("model.layers."):
            number, _, rest = module.removeprefix("model.layers.").partition(".")
            if not number.isdecimal() or int(number) >= self.layers:
                return None
            layer, known = int(number), self.inner
            if rest not in known and (expert := split(rest)):
                rest = expert[0]
                key = (expert[1], expert[2])
        if rest not in known or (self.tied and module == "lm_head"):
            return None
        entry, part = known[rest]
        if entry.split == "experts":
            if key is None or key[0] is None or key[1] not in entry.parts:
                return None
            key = (key[0], ROLES[key[1]])
        name = entry.name.replace("#", str(layer))
        if self.tied and name == "model.embed_tokens":
            # One parameter under two names: the loader knows it by the first in the alphabet.
            name = "lm_head"
        unit = units.setdefault(name, _Unit(entry, name))
        return unit, key if entry.split == "experts" else part

    def _check_complete(self, units: Mapping[str, _Unit]) -> None:
        """Refuse a checkpoint that lacks a parameter of the engine: its loader would."""
        for entry in self.architecture.entries:
            for layer in range(self.layers) if "#" in entry.name else (None,):
                name = entry.name.replace("#", str(layer))
                if self.tied and name == "model.embed_tokens":
                    continue
                unit = units.get(name)
                wanted = set(entry.parts) if entry.split != "experts" else set()
                missing = wanted - set(unit.parts) if unit else {name}
                if unit is None or missing or not unit.parts:
                    self._refuse(
                        f"the engine has this module, the checkpoint lacks {sorted(missing)[0]}",
                        name,
                        "Download the model again, whole, or use --form hf.",
                    )

    def _check_heads(self, unit: _Unit) -> None:
        for count, title in ((self.heads, "attention heads"), (self.kv_heads, "kv heads")):
            repeats = title == "kv heads" and not self.device.cpu and self.tp % count == 0
            if count % self.tp and not repeats:
                self._refuse(f"{count} {title} cannot be shared by {self.tp} ranks", unit.name)

    def _check_padding(self, unit: _Unit) -> None:
        """Refuse intermediate features that the engine pads before it shares them."""
        if unit.entry.split != "columns":
            return  # experts and rows of input features must be whole groups in any case
        for part in unit.parts.values():
            N = part.linear.N if isinstance(part, Stored) else part.shape[0]
            if N % (self.tp * self.group_size):
                self._refuse(
                    f"N = {N} is no multiple of {self.tp} ranks x group size {self.group_size}; on "
                    "a CPU the engine pads it",
                    unit.name,
                )

    def _check_biases(self, unit: _Unit, dropped: list[Tensors]) -> None:
        has = self.architecture.bias.get(unit.name.rpartition(".")[2])
        if has is not None and has(self.config):
            if len(unit.biases) != len(unit.parts):
                self._refuse("the engine has a bias here, the checkpoint none", unit.name)
        else:
            dropped += unit.biases.values()
            unit.biases.clear()

    def _check_skipped(self, unit: _Unit, quantized: bool) -> None:
        """Refuse what the engine takes as quantized and is not, or the reverse."""
        kind = unit.entry.split
        if kind == "vocab":
            head = unit.name == "lm_head" and not self.tied and self.marlin
            wanted = head and bool(self.model.source_quantization.get("lm_head"))
        else:
            wanted = kind != "all" and not self.model.quantization.skips(unit.name)
        if wanted != quantized:
            state = "quantized" if quantized else "not quantized"
            self._refuse(
                f"the checkpoint has it {state}; by its own tables and the config's "
                "modules_to_not_convert and lm_head the engine takes it the other way, and cannot "
                "load the checkpoint either",
                unit.name,
                "Correct the quantization_config in config.json.",
            )

    def _keep(self, dropped: list[Tensors]) -> None:
        """Tensors without a place in the engine: kept beside, so that nothing is lost."""
        for item in dropped:
            info = item if isinstance(item, TensorInfo) else item.bias
            if isinstance(item, Stored):
                said = "the engine has no such module"
                self.out.verdicts[item.name] = Verdict(item.name, item.linear, "awq", said)
                self.out.kept += hf.originals(self.model, item)
            if info:
                output = unplaced(info.name, info.dtype, info.shape)
                self.out.kept.append(copied(output, self.model.bytes_of(info), info.name, None))
        if dropped:
            self.out.notes.append(
                f"{len(dropped)} tensors or modules that the engine does not load, the first "
                f"{dropped[0].name}, are kept in awq-originals."
            )

    # --- shares

    def _even(self, size: int, rank: int, what: str, unit: _Unit) -> Span:
        if size % self.tp:
            self._refuse(f"{what} = {size} cannot be shared by {self.tp} ranks", unit.name)
        share = size // self.tp
        return rank * share, (rank + 1) * share

    def _share(self, unit: _Unit, index: int, K: int, N: int, rank: int) -> tuple[Span, Span]:
        """Rows and columns of w [K, N] that a rank has of part `index` of a unit."""
        rows, cols = (0, K), (0, N)
        kind = unit.entry.split
        if kind == "rows":
            rows = self._even(K, rank, "K", unit)
        elif kind == "heads" and index and self.tp > self.kv_heads:
            head = rank // (self.tp // self.kv_heads)
            cols = (head * N // self.kv_heads, (head + 1) * N // self.kv_heads)
        elif kind in ("columns", "heads", "vocab"):
            cols = self._even(N, rank, "N", unit)
        return rows, cols

    def _group(self, source: Linear, K: int, unit: _Unit) -> int:
        """Group size of a rank's K rows: all of them where the source is channelwise."""
        if source.g == source.K:
            if K < source.K and not any("channelwise" in note for note in self.out.notes):
                self.out.notes.append(
                    "Channelwise weights: every rank has all scales. Engines that share them by "
                    "rows make none of them (K / tp // K) and cannot load this."
                )
            return K
        if K % source.g:
            self._refuse(
                f"K = {K} of a rank is no multiple of the group size {source.g}",
                unit.name,
            )
        return source.g

    # --- quantized modules

    def _ordered(self, unit: _Unit) -> list[Stored]:
        leaf = unit.name.rpartition(".")[2]
        parts = [unit.parts[part] for part in unit.entry.parts or (leaf,)]
        return [part for part in parts if isinstance(part, Stored)]

    def _linear(self, unit: _Unit) -> None:
        sources = self._ordered(unit)
        first = sources[0].linear
        for source in sources:
            if source.experts > 1 or (source.linear.K, source.linear.g, source.linear.scales) != (
                first.K, first.g, first.scales,
            ):  # fmt: skip
                self._refuse(f"{source.name} has another K, group size or scale dtype", unit.name)
        if unit.entry.split == "vocab" and first.N % PADDING:
            self._refuse(f"N = {first.N} of the head is no multiple of {PADDING}", unit.name)
        for rank, jobs in zip(self.ranks, self.out.ranks, strict=True):
            pieces: list[Piece] = []
            N = 0
            for index, source in enumerate(sources):
                rows, cols = self._share(unit, index, source.linear.K, source.linear.N, rank)
                if cols[0] % 8 or cols[1] % 8:
                    self._refuse(
                        f"columns {cols[0]} to {cols[1]} of {source.name} are no whole words of 8",
                        unit.name,
                    )
                pieces.append(Piece(source, rows, cols, (0, N)))
                N += cols[1] - cols[0]
            K = rows[1] - rows[0]
            linear = Linear(K, N, self._group(first, K, unit), first.scales)
            rule = hf.broken(self.target, linear)
            if rule and not self.device.falls_back:
                self._refuse(f"{self.target.name} does not take it: {rule}", unit.name)
            name = self.target.fallback if rule else self.target.name
            names = {} if rule else self.device.names
            if self._has(unit, rank):
                jobs.append(self._pack(unit, name, linear, "", names, (tuple(pieces),)))
        self._decide(sources, name, rule)

    def _has(self, unit: _Unit, rank: int) -> bool:
        """Whether a rank has the module at all: experts that lie apart are shared whole."""
        if unit.entry.split != "apart":
            return True
        number = int(unit.name.split(".")[-2])
        each, more = divmod(self._number("num_local_experts", 8), self.tp)
        if not each:
            self._refuse(f"{more} experts are fewer than {self.tp} ranks", unit.name)
        cut = more * (each + 1)
        return rank == (number // (each + 1) if number < cut else more + (number - cut) // each)

    def _pack(
        self,
        unit: _Unit,
        name: str,
        linear: Linear,
        stem: str,
        suffixes: Mapping[str, str],
        experts: tuple[Pieces, ...],
    ) -> Pack:
        lead = (len(experts),) if stem else ()
        outputs = {
            suffix: unplaced(
                f"{unit.name}.{stem}{suffixes.get(suffix, suffix)}", dtype, (*lead, *shape)
            )
            for suffix, dtype, shape in hf.stored(name, linear)
        }
        return Pack(f"{unit.name}.{stem.rstrip('_')}".rstrip("."), name, linear, outputs, experts)

    def _decide(self, sources: Sequence[Stored], name: str, rule: str | None) -> None:
        for source in sources:
            self.out.verdicts[source.name] = Verdict(source.name, source.linear, name, rule)
            if layout(name).lossy:
                self.out.kept += hf.originals(self.model, source)

    def _numbers(self, unit: _Unit) -> int:
        """How many experts; all must be there, from 0 on, each with gate, up and down."""
        count = 1 + max(int(number) for number, _ in unit.parts)
        keys = ("num_local_experts", "num_experts")
        said = next((self.config[key] for key in keys if key in self.config), count)
        if len(unit.parts) != 3 * count or count != said:
            self._refuse(f"{len(unit.parts)} projections of {count} experts, not 3 x {said}",
                         unit.name)  # fmt: skip
        if self.tp > count:
            self._refuse(f"{count} experts are fewer than {self.tp} ranks", unit.name)
        return count

    def _experts(self, unit: _Unit) -> None:
        count = self._numbers(unit)
        group = self.mixtures[unit.name]
        if group.mixture is None:
            self._refuse(f"not {group.uneven}", unit.name)
        whole = group.mixture
        parts: dict[Any, Stored] = {k: p for k, p in unit.parts.items() if isinstance(p, Stored)}
        scales = parts[0, "down"].linear.scales
        for rank, jobs in zip(self.ranks, self.out.ranks, strict=True):
            low, high = self._even(whole.I, rank, "I", unit)
            mixture = replace(whole, I=high - low)
            rule = self._expert_rule(mixture)
            if rule and not self.target.expert_fallback:
                self._refuse(f"{self.target.name} does not take the experts: {rule}", unit.name)
            if not self.marlin and self.device.marlin:
                self._refuse(f"the engine has no experts of group size {whole.g}", unit.name)
            name = (self.target.expert_fallback or "") if rule else self.target.name
            g = self._halved(mixture, unit) if name == "moe_wna16" else whole.g
            if mixture.I % g or low % 8:
                self._refuse(f"I = {mixture.I} of a rank is no multiple of {max(g, 8)}", unit.name)
            w13 = Linear(whole.H, 2 * mixture.I, g, scales, kind="expert")
            w2 = Linear(mixture.I, whole.H, g, scales, kind="expert")
            rows, span = (0, whole.H), (low, high)
            fused = tuple(
                (
                    Piece(parts[e, "gate"], rows, span),
                    Piece(parts[e, "up"], rows, span, (0, mixture.I)),
                )
                for e in range(count)
            )
            down = tuple((Piece(parts[e, "down"], span, rows),) for e in range(count))
            jobs.append(self._pack(unit, name, w13, "w13_", {}, fused))
            jobs.append(self._pack(unit, name, w2, "w2_", {}, down))
        self._decide([*parts.values()], name, rule)

    def _expert_rule(self, mixture: Mixture) -> str | None:
        if self.target.expert_rules is not None:
            return hf.broken(self.target, mixture)
        shapes = (mixture.H, 2 * mixture.I), (mixture.I, mixture.H)
        linears = [Linear(K, N, mixture.g, kind="expert") for K, N in shapes]
        return next((said for x in linears if (said := hf.broken(self.target, x))), None)

    def _halved(self, mixture: Mixture, unit: _Unit) -> int:
        """The group size that moe_wna16 halves until it divides: MoeWNA16Method.create_weights."""
        g = mixture.g
        while mixture.I % g or mixture.H % g:
            g //= 2
            if g < 32:
                self._refuse(
                    f"H = {mixture.H} and I = {mixture.I} of a rank have no group size of 32 or "
                    f"more that divides {mixture.g}",
                    unit.name,
                )
        return g

    # --- plain tensors

    def _slice(self, info: TensorInfo, rows: Span, cols: Span | None = None) -> Run:
        """Rows, and columns, of a plain tensor."""
        width = info.nbytes // info.shape[0]
        start = info.start + rows[0] * width
        if cols is None or cols == (0, info.shape[1]):
            return Run(info.file, start, (rows[1] - rows[0]) * width)
        size = DTYPE_BITS[info.dtype] // 8
        length = (cols[1] - cols[0]) * size
        return Run(info.file, start + cols[0] * size, length, rows[1] - rows[0], width)

    def _plain(self, unit: _Unit) -> None:
        """A module of plain weights [N, K] (or [N])."""
        leaf = unit.name.rpartition(".")[2]
        infos = [
            part
            for key in unit.entry.parts or dict.fromkeys((leaf, "embed_tokens"))
            if isinstance(part := unit.parts.get(key), TensorInfo)
        ]
        if len({(info.dtype, info.shape[1:]) for info in infos}) > 1:
            self._refuse("its parts have other dtypes or widths", unit.name)
        for rank, jobs in zip(self.ranks, self.out.ranks, strict=True):
            if self._has(unit, rank):
                job = self._fuse(f"{unit.name}.weight", unit, infos, rank)
                if self.device.cpu and "embed_tokens" not in unit.entry.name:
                    output, blocks = packed_float(job.output)
                    job = replace(job, output=output, blocks=blocks)
                jobs.append(job)

    def _fuse(self, name: str, unit: _Unit, infos: Sequence[TensorInfo], rank: int) -> Copy:
        """A rank's share of plain tensors, one after another."""
        runs: list[Run] = []
        shape = list(infos[0].shape)
        shape[0] = 0
        for index, info in enumerate(infos):
            if unit.entry.split == "vocab":
                runs += self._vocabulary(unit, info, rank)
                shape[0] = self._padded(info.shape[0]) // self.tp
                continue
            K = info.shape[1] if len(info.shape) > 1 else 1
            if len(info.shape) == 1 and unit.entry.split == "rows":
                rows, cols = (0, 1), (0, info.shape[0])  # a bias, which every rank has
            else:
                rows, cols = self._share(unit, index, K, info.shape[0], rank)
            runs.append(self._slice(info, cols, rows if len(info.shape) > 1 else None))
            shape[0] += cols[1] - cols[0]
            if len(shape) > 1:
                shape[1] = rows[1] - rows[0]
        whole = infos[0].name if len(runs) == 1 and runs[0].length == infos[0].nbytes else None
        output = unplaced(name, infos[0].dtype, tuple(shape))
        return Copy(output, tuple(runs), whole=whole)

    def _vocabulary(self, unit: _Unit, info: TensorInfo, rank: int) -> Iterator[Run]:
        """A rank's rows of an embedding, then zeros: padded to 64, then shared."""
        rows = info.shape[0]
        if self._number("vocab_size") != rows:
            self._refuse(f"{rows} rows, vocab_size is {self.config['vocab_size']}", info.name)
        padded = self._padded(rows)
        low, high = self._even(padded, rank, "padded rows", unit)
        span = (min(low, rows), min(high, rows))
        if span[1] > span[0]:
            yield self._slice(info, span)
        if span[1] - span[0] < high - low:
            missing = high - low - (span[1] - span[0])
            yield Run("", 0, missing * (info.nbytes // rows))

    def _padded(self, rows: int) -> int:
        """Rows of an embedding as the engine has them on all ranks."""
        padded = -(-rows // PADDING) * PADDING
        if self.device.cpu and padded % self.tp:
            padded = -(-rows // (PADDING * self.tp)) * PADDING * self.tp
        return padded

    def _bias(self, unit: _Unit) -> None:
        leaf = unit.name.rpartition(".")[2]
        keys = unit.entry.parts or (leaf,)
        infos = [unit.biases[key] for key in keys]
        part, stored = unit.parts[keys[0]], infos[0].dtype
        original = (part.linear.bias if isinstance(part, Stored) else None) or stored
        for rank, jobs in zip(self.ranks, self.out.ranks, strict=True):
            weight, job = jobs[-1], self._fuse(f"{unit.name}.bias", unit, infos, rank)
            packed = isinstance(weight, Pack) or weight.blocks
            wanted = "F32" if packed and self.device.cpu else original
            if wanted != stored:
                shape = job.output.shape
                blocks = Blocks((1, shape[0]), 1, layouts.PLAIN, stored, wanted)
                job = replace(job, output=unplaced(job.name, wanted, shape), blocks=blocks)
            jobs.append(job)

    def _plain_experts(self, unit: _Unit) -> None:
        """Experts that are not quantized: w13_weight [E, 2I, H], w2_weight [E, H, I]."""
        if not self.device.falls_back:
            self._refuse(
                "the engine has no experts on this device that are not quantized", unit.name
            )
        count = self._numbers(unit)
        parts: dict[Any, TensorInfo] = {
            k: p for k, p in unit.parts.items() if isinstance(p, TensorInfo)
        }
        first = parts[0, "gate"]
        if {(p.dtype, sorted(p.shape)) == (first.dtype, sorted(first.shape))
                for p in parts.values()} != {True}:  # fmt: skip
            self._refuse("its experts have other dtypes or shapes", unit.name)
        I, H = first.shape  # noqa: E741
        for rank, jobs in zip(self.ranks, self.out.ranks, strict=True):
            span = self._even(I, rank, "I", unit)
            share = span[1] - span[0]
            gate_up = [self._slice(parts[e, r], span) for e in range(count) for r in ("gate", "up")]
            down = [self._slice(parts[e, "down"], (0, H), span) for e in range(count)]
            for stem, shape, runs in (
                ("w13", (count, 2 * share, H), gate_up),
                ("w2", (count, H, share), down),
            ):
                output = unplaced(f"{unit.name}.{stem}_weight", first.dtype, shape)
                jobs.append(Copy(output, tuple(runs)))

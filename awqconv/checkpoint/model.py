"""A checkpoint as quantized modules and other tensors, whichever layout they are stored in.

AutoAWQ checkpoints are read from their headers alone. A converted folder is read with its
manifest, awqconv.json, which names each module's layout and shape; the headers must agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from awqconv.checkpoint.config import MANIFEST, QuantConfig
from awqconv.checkpoint.header import TensorInfo, read_header
from awqconv.checkpoint.reader import Checkpoint, open_checkpoint
from awqconv.checkpoint.source import Source
from awqconv.checkpoint.strict import parse_json
from awqconv.errors import AwqconvError
from awqconv.targets.base import Linear, Part, layout

KEPT = "awq-originals/model.safetensors"
FORMAT = 1
CONFIGS = ("config.json", "quant_config.json", "model.safetensors.index.json", MANIFEST, KEPT)
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".tflite")
AGAIN = "The folder is damaged: convert the checkpoint again."


@dataclass(frozen=True, slots=True)
class Stored:
    """One quantized module as it lies in a checkpoint.

    `tensors` are its packed tensors by part suffix; `kept` the AWQ originals of those whose bytes
    the packed ones do not determine, `kept_scales` the dtype that the scales had there, and
    `stored_scales` the dtype they are stored in where `linear` is about the original ones.
    """

    name: str
    layout: str
    linear: Linear
    tensors: Mapping[str, TensorInfo]
    bias: TensorInfo | None = None
    kept: Mapping[str, TensorInfo] = field(default_factory=dict)
    kept_scales: str = ""
    experts: int = 1
    stored_scales: str = ""

    def arrays(self) -> dict[str, tuple[Part, TensorInfo]]:
        """The stored tensor of each logical array q, z, s (or w)."""
        stored = replace(self.linear, scales=self.stored_scales or self.linear.scales)
        parts = layout(self.layout).parts(stored)
        found = {part.of: (part, self.tensors[part.suffix]) for part in parts}
        if self.kept:
            awq = layout("awq").parts(self.linear)
            found.update((p.of, (p, self.kept[p.suffix])) for p in awq if p.suffix in self.kept)
        return {str(of): pair for of, pair in found.items()}

    def original(self) -> Stored:
        """The module with the scales it came with: what to convert from."""
        if self.kept_scales in ("", self.linear.scales):
            return self
        linear = replace(self.linear, scales=self.kept_scales)
        return replace(self, linear=linear, stored_scales=self.linear.scales)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `rows` and columns `cols` of a stored module, which land at (k, n) of another.

    `again`: another piece has put the same elements there; this one must equal it.
    """

    source: Stored
    rows: tuple[int, int]
    cols: tuple[int, int]
    at: tuple[int, int] = (0, 0)
    expert: int = 0
    again: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is all of its source module."""
        linear = self.source.linear
        return self.rows == (0, linear.K) and self.cols == (0, linear.N)


Pieces = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """`count` ranges of `length` bytes of a source file, `stride` bytes apart; zeros if no file."""

    file: str
    start: int
    length: int
    count: int = 1
    stride: int = 0


@dataclass(frozen=True, slots=True)
class Gathered:
    """The bytes of a tensor that lies in several places: `runs` in order, or, `interleaved`, the
    first range of each run, then the second of each. `again` are whole copies that must equal it.
    """

    runs: tuple[Run, ...]
    interleaved: bool = False
    again: tuple[tuple[Run, ...], ...] = ()


@dataclass
class Model:
    """A checkpoint's modules and the rest. `layout` is the layout of most modules.

    `source_quantization` is the quantization_config of the AWQ checkpoint it came from;
    `manifest` is None for a checkpoint that awqconv did not write. Where a folder holds shares of
    tensor-parallel ranks, `modules` and `others` are those of the checkpoint it was made from,
    `scattered` says of which pieces an expert of a module is made, `gathered` where the bytes of
    another tensor lie; `ranks` are the ranks' own modules, `derived` what those of them were made
    from that cannot be turned back, `plain` all other tensors of the files.
    """

    checkpoint: Checkpoint
    layout: str
    modules: dict[str, Stored]
    others: dict[str, TensorInfo]
    quantization: QuantConfig
    source_quantization: dict[str, Any]
    notes: list[str]
    manifest: dict[str, Any] | None = None
    scattered: Mapping[str, tuple[Pieces, ...]] = field(default_factory=dict)
    gathered: Mapping[str, Gathered] = field(default_factory=dict)
    ranks: Mapping[str, Stored] = field(default_factory=dict)
    derived: Mapping[str, tuple[Pieces, ...]] = field(default_factory=dict)
    plain: tuple[TensorInfo, ...] = ()

    def pieces(self, module: Stored) -> tuple[Pieces, ...]:
        """Of what pieces each expert of a module is made (one expert, where it is no stack)."""
        if module.name in self.scattered:
            return self.scattered[module.name]
        rows, cols = (0, module.linear.K), (0, module.linear.N)
        return tuple((Piece(module, rows, cols, expert=e),) for e in range(module.experts))

    def bytes_of(self, info: TensorInfo) -> Gathered:
        """Where the bytes of a tensor that belongs to no packed part lie."""
        if info.name in self.gathered:
            return self.gathered[info.name]
        return Gathered((Run(info.file, info.start, info.nbytes),))

    @property
    def other_files(self) -> list[str]:
        """Files that come along as they are: tokenizer, templates, licence."""
        skip = {*CONFIGS, *self.checkpoint.shards}
        return [
            name
            for name in self.checkpoint.files
            if name not in skip and not name.lower().endswith(OTHER_WEIGHTS)
        ]

    @property
    def files_read(self) -> list[str]:
        """Files that say what the model is: tensors, configuration, index, manifest."""
        return [n for n in self.checkpoint.files if n in CONFIGS or n in self.checkpoint.shards]

    def items(self) -> Iterator[TensorInfo | Stored]:
        """Modules and other tensors, in the order they lie in."""
        of_module = {
            info.name: module
            for module in self.modules.values()
            for info in module.tensors.values()
        }
        done: set[str] = set()
        for info in self.checkpoint.tensors.values():
            if info.name in self.others:
                yield info
            elif (module := of_module.get(info.name)) and module.name not in done:
                done.add(module.name)
                yield module

    def unquantized(self) -> list[str]:
        """Linear modules that are not quantized, a head tied to the embedding among them."""
        names = [
            name.removesuffix(".weight")
            for name, info in self.others.items()
            if name.endswith(".weight") and len(info.shape) == 2 and "embed" not in name
        ]
        heads = [name for name in (*self.modules, *names) if name.endswith("lm_head")]
        return names if heads else [*names, "lm_head"]


def open_model(model: str | os.PathLike[str] | Source) -> Model:
    """Open a checkpoint that `convert` can start from: AutoAWQ GEMM, or a converted folder.

    Reads headers, index, config and manifest. Raises AwqconvError for anything that is not right.
    """
    from awqconv.hub import open_source

    source = open_source(os.fspath(model)) if isinstance(model, str | os.PathLike) else model
    try:
        if MANIFEST in source.files() and read_manifest(source).get("form") == "sglang-sharded":
            from awqconv.forms.gather import open_sharded

            return open_sharded(source)
        return _open(source)
    except BaseException:
        if source is not model:
            source.close()
        raise


def _open(source: Source) -> Model:
    checkpoint = open_checkpoint(source)
    if MANIFEST in checkpoint.files:
        return _converted(checkpoint)
    return awq_model(checkpoint)


def awq_model(checkpoint: Checkpoint) -> Model:
    """The modules of an AutoAWQ GEMM checkpoint."""
    modules = {}
    for module in checkpoint.modules.values():
        tensors = {"qweight": module.qweight, "qzeros": module.qzeros, "scales": module.scales}
        bias = module.bias.dtype if module.bias else None
        linear = Linear(module.K, module.N, module.g, module.scales.dtype, bias, _kind(module.name))
        modules[module.name] = Stored(
            module.name, "awq", linear, tensors, module.bias, experts=module.E
        )
    return Model(
        checkpoint,
        "awq",
        modules,
        _others(checkpoint, modules),
        checkpoint.quant,
        checkpoint.quant.raw,
        list(checkpoint.notes),
    )


def _kind(name: str) -> str:
    return "expert" if ".experts." in name else "dense"


def _others(checkpoint: Checkpoint, modules: Mapping[str, Stored]) -> dict[str, TensorInfo]:
    taken: set[str] = set()
    for module in modules.values():
        taken.update(info.name for info in module.tensors.values())
        taken.update(
            f"{module.name}.{suffix}" for suffix in layout(module.layout).constants(module.linear)
        )
        if module.bias:
            taken.add(module.bias.name)
    return {name: info for name, info in checkpoint.tensors.items() if name not in taken}


def read_manifest(source: Source) -> dict[str, Any]:
    """The manifest of a converted folder. Raises AwqconvError where it is missing or unreadable."""
    size = source.files().get(MANIFEST)
    if size is None:
        raise AwqconvError(
            f"no {MANIFEST}: this is no folder that awqconv convert wrote",
            source.name,
            f"Convert it first: awqconv convert {source.name} --target marlin",
        )
    manifest = parse_json(source.read(MANIFEST, 0, size), MANIFEST, AGAIN)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise AwqconvError(
            f"manifest format {found!r}, this version reads {FORMAT}",
            f"{source.name}/{MANIFEST}",
            "Use the awqconv version that wrote it, or convert the checkpoint again.",
        )
    return manifest


def _converted(checkpoint: Checkpoint) -> Model:
    source = checkpoint.source
    manifest = read_manifest(source)
    kept = read_header(source, KEPT)[0] if KEPT in checkpoint.files else {}
    try:
        target = layout(manifest["target"])
        if manifest["layout_version"] != target.version:
            raise AwqconvError(
                f"layout version {manifest['layout_version']} of {target.name}, "
                f"this awqconv writes {target.version}",
                source.name,
                "Use the awqconv version that wrote it, or convert the checkpoint again.",
            )
        modules = {
            name: _stored(name, entry, checkpoint.tensors, kept)
            for name, entry in manifest["modules"].items()
        }
        quantization = manifest["source"]["quantization_config"]
        quant = replace(
            checkpoint.quant,
            group_size=manifest["group_size"],
            modules_to_not_convert=tuple(manifest["modules_to_not_convert"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AwqconvError(f"the manifest is incomplete: {error!r}", MANIFEST, AGAIN) from None
    return Model(
        checkpoint,
        target.name,
        modules,
        _others(checkpoint, modules),
        quant,
        quantization,
        list(checkpoint.notes),
        manifest,
    )


def _stored(
    name: str,
    entry: dict[str, Any],
    tensors: Mapping[str, TensorInfo],
    kept: Mapping[str, TensorInfo],
) -> Stored:
    linear = Linear(*(entry[key] for key in ("K", "N", "g", "scales", "bias", "kind")))
    if min(linear.K, linear.N, linear.g) < 1 or linear.K % linear.g:
        raise AwqconvError(f"K = {linear.K}, N = {linear.N}, g = {linear.g}", name, AGAIN)

    def find(
        suffix: str, dtype: str, shape: tuple[int, ...], where: Mapping[str, TensorInfo]
    ) -> TensorInfo:
        info = where.get(f"{name}.{suffix}")
        if info is None or (info.dtype, info.shape) != (dtype, shape):
            seen = f"{info.dtype} {list(info.shape)}" if info else "missing"
            raise AwqconvError(
                f"{seen}, where the manifest means {dtype} {list(shape)}", f"{name}.{suffix}", AGAIN
            )
        return info

    stored = layout(entry["layout"])
    original = replace(linear, scales=entry.get("kept_scales", linear.scales))
    experts = entry["experts"]
    stack = (experts,) if experts > 1 else ()
    packed = {
        p.suffix: find(p.suffix, p.dtype, (*stack, *p.shape(linear)), tensors)
        for p in stored.parts(linear)
    }
    bias = stored.bias(linear)
    return Stored(
        name,
        stored.name,
        linear,
        packed,
        find("bias", bias, (*stack, linear.N), tensors) if bias else None,
        {
            p.suffix: find(p.suffix, p.dtype, (*stack, *p.shape(original)), kept)
            for p in layout("awq").parts(original)
            if f"{name}.{p.suffix}" in kept
        },
        original.scales,
        experts,
    )

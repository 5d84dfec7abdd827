"""A checkpoint from its headers: files, index, tensors, and the quantized modules among them.

No tensor is read. What is accepted here is coherent: every tensor of the index is in its shard
and in no other, every file of tensors is in the index, every quantized module has its three
tensors, wherever they lie, with shapes that agree.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from awqconv.checkpoint.config import QuantConfig, quant_config, read_config, read_json
from awqconv.checkpoint.header import TensorInfo, read_header
from awqconv.checkpoint.source import Source
from awqconv.checkpoint.strict import shown
from awqconv.errors import AwqconvError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PARTS = ("qweight", "qzeros", "scales")
FLOATS = ("F16", "BF16", "F32")

_AGAIN = "Download the model again, whole."
_QUANTIZE = "Quantize the float model again with AutoAWQ, quant_config version 'GEMM'."


@dataclass(frozen=True, slots=True)
class Module:
    """One quantized linear in AutoAWQ GEMM form, or E of them stacked.

    qweight I32 [K, N/8], qzeros I32 [G, N/8], scales [G, N], bias [N]; stacked, all with a
    leading E. `g` is rows per group by the headers: K / G, whatever the config says.
    """

    name: str
    K: int
    N: int
    g: int
    qweight: TensorInfo
    qzeros: TensorInfo
    scales: TensorInfo
    bias: TensorInfo | None = None
    E: int = 1

    @property
    def G(self) -> int:
        """Groups along K."""
        return self.K // self.g

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Its tensors, bias last if there is one."""
        return (self.qweight, self.qzeros, self.scales, *((self.bias,) if self.bias else ()))


@dataclass
class Checkpoint:
    """A checkpoint as its headers describe it.

    `files` are all files with sizes, `shards` those that hold tensors, `tensors` all tensors by
    name, in shard order and by offset, `metadata` each shard's. `modules` is empty where
    `quant.method` is "awqconv". `notes` are disagreements that stop nothing, one sentence each.
    """

    source: Source
    config: dict[str, Any]
    quant: QuantConfig
    files: dict[str, int]
    shards: tuple[str, ...]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, dict[str, str]]
    modules: dict[str, Module] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def others(self) -> dict[str, TensorInfo]:
        """The tensors that belong to no quantized module."""
        taken = {tensor.name for module in self.modules.values() for tensor in module.tensors}
        return {name: tensor for name, tensor in self.tensors.items() if name not in taken}


def open_checkpoint(model: str | os.PathLike[str] | Source) -> Checkpoint:
    """Reads config, index and headers of a folder, of hf://REPO[@REVISION] or another source.

    Raises AwqconvError for whatever does not hold together. Two disagreements between config and
    headers are notes instead, because the headers alone decide what the bytes mean: a module
    with another group size than the config's, and a quantized module that modules_to_not_convert
    names.
    """
    from awqconv.hub import open_source

    source = open_source(os.fspath(model)) if isinstance(model, str | os.PathLike) else model
    try:
        config = read_config(source)
        quant = quant_config(config, source)
        shards, index = _shards(source)
        checkpoint = Checkpoint(source, config, quant, source.files(), shards, {}, {})
        for shard in shards:
            tensors, checkpoint.metadata[shard] = read_header(source, shard)
            for name, tensor in tensors.items():
                if name in checkpoint.tensors:
                    raise AwqconvError(
                        f"the tensor is also in {checkpoint.tensors[name].file}",
                        tensor.where,
                        "Remove the file that does not belong to the model.",
                    )
                checkpoint.tensors[name] = tensor
        if index is not None:
            checkpoint.notes += _compare(index, checkpoint.tensors)
        elif shards != (SINGLE,):
            checkpoint.notes.append(
                f"{shards[0]} is the only file of tensors; transformers looks for {SINGLE}."
            )
        if quant.method == "awq":
            checkpoint.modules = find_modules(checkpoint)
            checkpoint.notes += _config_notes(checkpoint)
    except BaseException:
        if source is not model:
            source.close()
        raise
    return checkpoint


def _shards(source: Source) -> tuple[tuple[str, ...], dict[str, Any] | None]:
    """The files of tensors in name order, and the index where there is one."""
    files = source.files()
    stored = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    if INDEX in files:
        index = read_json(source, INDEX, _AGAIN)
        weights = index.get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise AwqconvError("weight_map must be an object of tensor: file", INDEX, _AGAIN)
        for name, file in weights.items():
            _check_name(name, file)
        shards = dict.fromkeys(sorted(weights.values()))
        missing = [shown(shard) for shard in shards if shard not in files]
        if missing:
            raise AwqconvError(
                f"{len(missing)} of {len(shards)} shards are missing, the first {missing[0]}",
                INDEX,
                f"Download {' '.join(missing[:8])}{' ...' if missing[8:] else ''} into the folder.",
            )
        stray = [file for file in stored if file not in shards]
        if stray:
            raise AwqconvError(
                f"{INDEX} does not name this file of tensors",
                shown(stray[0]),
                "Move it out of the folder if it is no part of the model, else download the "
                "model again.",
            )
        return tuple(shards), index
    if len(stored) == 1:
        return tuple(stored), None
    if SINGLE in stored:
        stray = [file for file in stored if file != SINGLE]
        raise AwqconvError(
            f"a file of tensors beside {SINGLE}, and no {INDEX} that names it",
            shown(stray[0]),
            "Move it out of the folder if it is no part of the model, else download the index.",
        )
    if stored:
        raise AwqconvError(
            f"{len(stored)} files of tensors and no {INDEX}", shown(source.name), "Download it."
        )
    kinds = {".gguf": "GGUF", ".bin": "pickled PyTorch", ".pt": "pickled PyTorch"}
    for file in files:
        kind = kinds.get(os.path.splitext(file)[1])
        if kind and "/" not in file:
            raise AwqconvError(
                f"the weights are {kind} files; only safetensors are read"
                + (", because opening a pickle runs the code in it" if "pick" in kind else ""),
                shown(file),
                "Save the model again with save_pretrained(..., safe_serialization=True)."
                if "pick" in kind
                else _QUANTIZE,
            )
    raise AwqconvError("no safetensors files", shown(source.name), _AGAIN)


def _check_name(name: str, file: object) -> None:
    """Refuses index entries whose file is no plain name in the model's own folder."""
    where = f"{INDEX}: {shown(name)}"
    if not isinstance(file, str):
        raise AwqconvError(f"its file is {shown(repr(file))}, not a name", where, _AGAIN)
    if not file.isprintable() or set(file) & set("/\\:") or file in ("", ".", ".."):
        raise AwqconvError(
            f"{shown(file)!r} is no file name in the model's own folder",
            where,
            "Do not trust this model; if it is yours, correct the index.",
        )
    if not file.endswith(".safetensors"):
        raise AwqconvError(f"{shown(file)!r} is no safetensors file", where, _AGAIN)


def _compare(index: dict[str, Any], tensors: dict[str, TensorInfo]) -> Iterator[str]:
    """Refuses an index and headers that list different tensors; notes a total_size that is off."""
    weights: dict[str, str] = index["weight_map"]
    for name, file in weights.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.file != file:
            raise AwqconvError(
                f"{INDEX} says the tensor is in {file}, "
                + (f"but it is in {tensor.file}" if tensor else "but no file has it"),
                f"{file}: {shown(name)}",
                _AGAIN,
            )
    for name, tensor in tensors.items():
        if name not in weights:
            raise AwqconvError(f"{INDEX} does not list this tensor", tensor.where, _AGAIN)
    metadata = index.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(tensor.nbytes for tensor in tensors.values())
    if size != total:
        said = "no total_size" if size is None else f"total_size {shown(str(size))}"
        yield f"{INDEX} has {said}; the tensors take {total} bytes."


def find_modules(checkpoint: Checkpoint) -> dict[str, Module]:
    """Every quantized module, in the order of `tensors`.

    Scales alone make none: AutoAWQ keeps those of scaled activations under the same name.
    """
    tensors = checkpoint.tensors
    names = dict.fromkeys(
        name.rpartition(".")[0] for name in tensors if name.endswith((".qweight", ".qzeros"))
    )
    modules = {name: _module(name, tensors, checkpoint.quant) for name in names}
    if not modules:
        dialect = _foreign(tensors)
        raise AwqconvError(
            "the config says AWQ, but no tensor is named *.qweight"
            + (f": these are {dialect} tensors" if dialect else ""),
            shown(checkpoint.source.name),
            _QUANTIZE,
        )
    return modules


_FOREIGN = {
    "weight_packed": "compressed-tensors",
    "g_idx": "GPTQ",
    "scaled_zeros": "llm-awq v2",
    "B": "Marlin (IST-DASLab)",
    "weight_scale": "FP8 or compressed-tensors",
}


def _foreign(names: Any) -> str:
    """The format that a tensor name without place in AutoAWQ GEMM belongs to, or nothing."""
    return next((_FOREIGN[end] for n in names if (end := n.rpartition(".")[2]) in _FOREIGN), "")


def _module(name: str, tensors: dict[str, TensorInfo], quant: QuantConfig) -> Module:
    """One module from its three tensors. Raises AwqconvError where they are no AWQ GEMM module."""
    found = {part: tensors.get(f"{name}.{part}") for part in PARTS}
    present = {part: tensor for part, tensor in found.items() if tensor}
    first = next(iter(present.values()))
    where = f"{first.file}: {shown(name)}"
    dialect = _foreign([f"{name}.{p}" for p in _FOREIGN if f"{name}.{p}" in tensors]) or _dialect(
        present
    )
    if dialect:
        shapes = ", ".join(f"{p} {t.dtype} {list(t.shape)}" for p, t in present.items())
        raise AwqconvError(
            f"{dialect} tensors ({shapes}), while the config says AWQ version {quant.version!r}: "
            f"unsupported dialect {dialect!r}",
            where,
            _QUANTIZE,
        )
    missing = [part for part in PARTS if part not in present]
    if missing == ["qzeros"] and not quant.zero_point:
        raise AwqconvError(
            "no qzeros, and the config says zero_point false: symmetric weights, which are no "
            "AutoAWQ GEMM form",
            where,
            "Quantize the float model again with AutoAWQ and zero_point true.",
        )
    if missing:
        raise AwqconvError(
            f"it has {' and '.join(present)} but no {' and no '.join(missing)}",
            where,
            _AGAIN,
        )
    qweight, qzeros, scales = (present[part] for part in PARTS)
    bias = tensors.get(f"{name}.bias")
    wants = {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS}
    for part, tensor in present.items():
        if tensor.dtype not in wants[part]:
            raise AwqconvError(
                f"dtype {tensor.dtype}, where {part} must be {' or '.join(wants[part])}",
                tensor.where,
                _AGAIN,
            )

    def shapes_say(what: str) -> AwqconvError:
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in present.items())
        return AwqconvError(f"{what} ({shapes})", where, _AGAIN)

    ranks = {len(tensor.shape) for tensor in present.values()}
    if ranks not in ({2}, {3}):
        raise shapes_say("qweight, qzeros and scales must all have 2 dimensions, or all 3")
    if not all(all(tensor.shape) for tensor in present.values()):
        raise shapes_say("a dimension of 0")
    *stack, K, words = qweight.shape
    *_, G, _ = qzeros.shape
    N = 8 * words
    if qzeros.shape != (*stack, G, words):
        raise shapes_say(f"qzeros must have the {words} columns of qweight")
    if scales.shape != (*stack, G, N):
        raise shapes_say(f"scales must be [G, N] = {[*stack, G, N]} by qweight and qzeros")
    if K % G:
        raise shapes_say(f"K = {K} does not divide into the G = {G} groups of qzeros and scales")
    if bias and (bias.shape != (*stack, N) or bias.dtype not in FLOATS):
        raise AwqconvError(
            f"bias {bias.dtype} {list(bias.shape)}, where {' or '.join(FLOATS)} {[*stack, N]} "
            "belongs to the qweight",
            bias.where,
            _AGAIN,
        )
    return Module(name, K, N, K // G, qweight, qzeros, scales, bias, *stack)


def _dialect(parts: dict[str, TensorInfo]) -> str:
    """The dialect that dtypes and shapes of a module's tensors show, if not AutoAWQ GEMM's."""
    shapes = {part: tensor.shape for part, tensor in parts.items()}
    qweight, qzeros, scales = (shapes.get(part, ()) for part in PARTS)
    if "qweight" in parts and parts["qweight"].dtype == "I16":
        return "gemv_fast"
    if len(qweight) != 2 or len(scales) != 2:
        return ""
    rows, words = qweight
    if not qzeros:
        return "marlin" if words == 2 * scales[1] else ""
    if len(qzeros) == 2 and words != qzeros[1]:
        if rows == qzeros[0] == scales[0] and scales[1] == 8 * qzeros[1]:
            return "gemv"
        if words == scales[1] == 8 * qzeros[1]:
            return "GPTQ"
    return ""


def _config_notes(checkpoint: Checkpoint) -> Iterator[str]:
    """Disagreements of config and headers that stop nothing."""
    quant, modules = checkpoint.quant, checkpoint.modules
    other: dict[int, list[str]] = {}
    for module in modules.values():
        if module.g != (module.K if quant.group_size == -1 else quant.group_size):
            other.setdefault(module.g, []).append(module.name)
    for g, names in sorted(other.items()):
        yield (
            f"config.json says group_size {quant.group_size}; by the headers it is {g} in "
            f"{len(names)} of {len(modules)} modules, the first {shown(names[0])}. The headers "
            "are followed; an engine that follows the config cannot load them."
        )
    skipped = [name for name in modules if quant.skips(name)]
    if skipped:
        yield (
            f"modules_to_not_convert matches {len(skipped)} modules that are quantized, the first "
            f"{shown(skipped[0])}. Engines will not load these as quantized."
        )
    if not quant.zero_point:
        yield "config.json says zero_point false, but all modules have qzeros, which are used."
    double = [name for name in modules if f"{name}.weight" in checkpoint.tensors]
    if double:
        yield f"{len(double)} modules have a weight beside qweight, the first {shown(double[0])}."
    config = checkpoint.config
    text = config.get("text_config")
    tied = (text if isinstance(text, dict) else config).get("tie_word_embeddings")
    heads = [name for name in checkpoint.tensors if name.startswith("lm_head.")]
    if tied is True and heads:
        yield f"{shown(heads[0])} is stored, but tie_word_embeddings is true: engines ignore it."
    elif tied is False and not heads:
        yield "tie_word_embeddings is false, but there is no lm_head."

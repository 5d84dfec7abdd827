"""Tiny AWQ checkpoints, random but valid, the same for the same arguments."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awqconv.checkpoint.header import build_header

Array = NDArray[Any]
Tensor = tuple[str, Array]  # safetensors dtype and the elements; bf16 as uint16

MODULES = {f"model.layers.0.mlp.{name}_proj": (128, 64, 32) for name in ("gate", "up")} | {
    "model.layers.0.mlp.down_proj": (64, 128, 32)
}
OTHERS = {
    "model.embed_tokens.weight": ("F16", (24, 128)),
    "model.norm.weight": ("F16", (128,)),
    "lm_head.weight": ("F16", (24, 128)),
}
NUMPY = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32, "I32": np.int32}


@dataclass
class Built:
    """What was written: `codes` by module (q uint8, z uint8, s as stored), `tensors` by name."""

    path: Path
    codes: dict[str, tuple[Array, Array, Array]]
    tensors: dict[str, Tensor]


def pack_awq(codes: Array) -> Array:
    """AutoAWQ GEMM words, written out by hand: nibble p of a word holds column order[p] of 8."""
    words = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.uint32)
    packed = np.zeros(words.shape[:-1], np.uint32)
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        packed |= words[..., column] << np.uint32(4 * nibble)
    return packed.view(np.int32)


def floats(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Array:
    """Normal positive numbers of about 0.01, as the dtype's own bytes."""
    values = rng.uniform(0.002, 0.02, shape).astype(np.float32)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(NUMPY[dtype])


def make_checkpoint(
    path: Path,
    modules: Mapping[str, tuple[int, ...]] = MODULES,
    other: Mapping[str, tuple[str, tuple[int, ...]]] = OTHERS,
    *,
    shards: int = 1,
    group_size: int | None = None,
    scale_dtype: str = "F16",
    bias: bool | Iterable[str] = False,
    quant: Mapping[str, Any] | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Built:
    """Writes a checkpoint into the folder `path`, which it makes.

    `modules` maps a name to (K, N, g) or, stacked, (K, N, g, E); g = -1 is channelwise. `other`
    maps a name to (dtype, shape). Tensors go to `shards` files in turn, so with three or more the
    tensors of a module lie in different files; one shard is model.safetensors without an index.
    `bias` is for all modules or the named ones. The config's group_size is the first module's g
    unless given; `quant` updates quantization_config, `config_overrides` the whole config.
    """
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    biased = set(modules if bias is True else bias or ())
    codes: dict[str, tuple[Array, Array, Array]] = {}
    tensors: dict[str, Tensor] = {}
    for name, (K, N, g, *stack) in modules.items():
        rows = K // (K if g == -1 else g)
        q = rng.integers(0, 16, (*stack, K, N), np.uint8)
        z = rng.integers(0, 16, (*stack, rows, N), np.uint8)
        s = floats(rng, scale_dtype, z.shape)
        codes[name] = q, z, s
        tensors[f"{name}.qweight"] = "I32", pack_awq(q)
        tensors[f"{name}.qzeros"] = "I32", pack_awq(z)
        tensors[f"{name}.scales"] = scale_dtype, s
        if name in biased:
            tensors[f"{name}.bias"] = scale_dtype, floats(rng, scale_dtype, (*stack, N))
    for name, (dtype, shape) in other.items():
        tensors[name] = dtype, floats(rng, dtype, shape)

    if group_size is None:
        group_size = next(iter(modules.values()))[2] if modules else 128
    quantization = {
        "quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True,
        "version": "gemm", "modules_to_not_convert": None,
    }  # fmt: skip
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16",
        "tie_word_embeddings": False, "quantization_config": {**quantization, **(quant or {})},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps({**config, **(config_overrides or {})}, indent=2))
    (path / "tokenizer.json").write_text('{"version": "1.0"}\n')
    write_tensors(path, tensors, shards)
    return Built(path, codes, tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """The tensors in turn to `shards` files, and an index if there are several."""
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    files = names if shards > 1 else ["model.safetensors"]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        header, places = build_header((name, d, a.shape) for name, (d, a) in part.items())
        (path / file).write_bytes(header + b"".join(part[name][1].tobytes() for name in places))
    if shards > 1:
        total = sum(array.nbytes for _, array in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

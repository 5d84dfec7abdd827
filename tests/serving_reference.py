"""What a loader is compared with: the AWQ source dequantized by hand, run by transformers alone."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds column 0, 1, ... of eight


def unpack(words: torch.Tensor) -> torch.Tensor:
    """AutoAWQ GEMM words, int32 [R, C / 8], as numbers 0..15, int32 [R, C]."""
    columns = [(words >> (4 * nibble)) & 15 for nibble in COLUMNS]
    return torch.stack(columns, -1).flatten(1)


def dequantized(model: Path) -> dict[str, torch.Tensor]:
    """All tensors of an AWQ checkpoint in float32, with each packed one as its weight [N, K]."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors.update(load_file(file))
    weights = {}
    for name, value in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            scales = tensors[f"{module}.scales"].float()
            repeat = value.shape[0] // len(scales)
            zeros = unpack(tensors[f"{module}.qzeros"]).repeat_interleave(repeat, 0)
            weight = (unpack(value) - zeros).float() * scales.repeat_interleave(repeat, 0)
            weights[f"{module}.weight"] = weight.T.contiguous()
        elif suffix not in ("qzeros", "scales"):
            weights[name] = value.float()
    return weights


def plain_model(model: Path, folder: Path) -> Any:
    """The dequantized checkpoint as a float32 model of transformers, written to `folder` first."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder.mkdir(exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    save_file(dequantized(model), folder / "model.safetensors", {"format": "pt"})
    for extra in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / extra).write_bytes((model / extra).read_bytes())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

"""The SGLang plugin against SGLang's own parameter and loader classes, on a host without a GPU.

Where sglang can be imported: its linear layers are made at each rank, loaded by their own weight
loaders, and their state compared with what the running engine held (golden state of 0.5.15), and
their products with the dequantized weights.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS
from safetensors.torch import load_file
from serving_reference import dequantized
from torch import nn

import awqconv
from awqconv.errors import AwqconvError

pytest.importorskip("sglang.srt.layers.linear", reason="sglang is not installed")

from sglang.srt.layers import quantization
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

import awqconv.serving.sglang as plugin

GOLDEN = MODELS.parent / "golden" / "sglang_sharded_state"
LLAMA, MIXTRAL, QWEN = "llama-tiny-awq-gemm-g128", "mixtral-tiny-awq", "qwen3moe-tiny-awq"
H, HEADS, KV = 256, 4, 2
FAMILY = {
    MIXTRAL: ("block_sparse_moe", {"w1": "w1", "w3": "w3", "w2": "w2"}),
    QWEN: ("mlp", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
}
pytestmark = pytest.mark.skipif(
    not MODELS.is_dir(), reason="no real checkpoints: set AWQCONV_MODELS"
)


@pytest.fixture(autouse=True)
def registered() -> None:
    plugin.register()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sglang")


def opened(work: Path, name: str, target: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The plugin's config of a converted folder, and its tensors."""
    folder = work / f"{name}-{target}"
    if not folder.exists():
        awqconv.convert(MODELS / name, folder, target=target)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    found = quantization.get_quantization_config("awqconv").from_config(config)
    return found, load_file(folder / "model.safetensors")


def layers(config: Any, rank: int, ranks: int, mlp: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """SGLang's linear layers of a decoder layer, with the modules each is joined of."""
    common: dict[str, Any] = {
        "bias": False, "quant_config": config, "params_dtype": torch.float16,
        "tp_rank": rank, "tp_size": ranks,
    }  # fmt: skip
    at = "model.layers.0"
    qkv = QKVParallelLinear(H, H // HEADS, HEADS, KV, prefix=f"{at}.self_attn.qkv_proj", **common)
    out = RowParallelLinear(H, H, prefix=f"{at}.self_attn.o_proj", **common)
    found: dict[str, tuple[Any, dict[str, Any]]] = {
        "self_attn.qkv_proj": (qkv, {f"self_attn.{n}_proj": n for n in "qkv"}),
        "self_attn.o_proj": (out, {"self_attn.o_proj": None}),
    }
    if mlp:
        up = MergedColumnParallelLinear(H, [mlp, mlp], prefix=f"{at}.mlp.gate_up_proj", **common)
        down = RowParallelLinear(mlp, H, prefix=f"{at}.mlp.down_proj", **common)
        found["mlp.gate_up_proj"] = (up, {"mlp.gate_proj": 0, "mlp.up_proj": 1})
        found["mlp.down_proj"] = (down, {"mlp.down_proj": None})
    return found


def load(layer: Any, modules: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Load by the layer's own weight loaders, as SGLang's models do."""
    for module, shard in modules.items():
        for name, param in list(layer.named_parameters()):
            arguments = [] if shard is None else [shard]
            tensor = tensors[f"model.layers.0.{module}.{name}"]
            param.weight_loader(param, tensor, *arguments)
    layer.quant_method.process_weights_after_loading(layer)


def golden(name: str, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    file = GOLDEN / f"{name}-tp{ranks}" / f"model-rank-{rank}-part-0.safetensors"
    return load_file(file)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", [LLAMA, MIXTRAL, QWEN])
def test_linear_layers_hold_what_the_running_engine_held(work: Path, name: str, ranks: int) -> None:
    config, tensors = opened(work, name, "marlin")
    for rank in range(ranks):
        state = golden(name, rank, ranks)
        made = layers(config, rank, ranks, 512 if name == LLAMA else 0)
        for path, (layer, modules) in made.items():
            load(layer, modules, tensors)
            for suffix, param in layer.named_parameters():
                expected = state[f"model.layers.0.{path}.{suffix}"]
                assert param.dtype == expected.dtype, (path, suffix)
                assert torch.equal(param.data, expected), (path, suffix, rank)


class Experts(nn.Module):
    """What the plugin asks of SGLang's FusedMoE layer."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.moe_tp_rank, self.moe_tp_size = rank, ranks

    def _map_global_expert_id_to_local_expert_id(self, expert: int) -> int:
        return expert


def experts(config: Any, target: str, name: str, rank: int, ranks: int, tensors: Any) -> Any:
    """The experts of a decoder layer on one rank, loaded, and their method."""
    block, shards = FAMILY[name]
    layer = Experts(rank, ranks)
    prefix = f"model.layers.0.{block}.experts"
    method = plugin.AwqconvMoEMethod(config.quantization, config._experts(prefix), prefix)
    inner = 256 if name == MIXTRAL else 128
    method.create_weights(layer, 4, H, inner // ranks, torch.float16)
    method.runner = None
    for expert in range(4):
        for module, shard in shards.items():
            for suffix in ("qweight", "qzeros", "scales"):
                stack = "w2" if shard == "w2" else "w13"
                param = getattr(layer, f"{stack}_{suffix}")
                tensor = tensors[f"{prefix}.{expert}.{module}.{suffix}"]
                param.weight_loader(param, tensor, f"{stack}_{suffix}", shard, expert)
    method.process_weights_after_loading(layer)
    return layer, method


@pytest.mark.parametrize(("name", "ranks"), [(MIXTRAL, 1), (MIXTRAL, 2), (QWEN, 1)])
def test_experts_hold_what_the_running_engine_held(work: Path, name: str, ranks: int) -> None:
    config, tensors = opened(work, name, "marlin")
    block, _ = FAMILY[name]
    for rank in range(ranks):
        state = golden(name, rank, ranks)
        layer, _ = experts(config, "marlin", name, rank, ranks, tensors)
        for suffix, param in layer.named_parameters():
            if (suffix, ranks) == ("w13_scales", 2):
                continue  # the engine's own error: this order is not the one its kernel reads
            expected = state[f"model.layers.0.{block}.experts.{suffix}"]
            assert torch.equal(param.data, expected), (suffix, rank)


@pytest.mark.parametrize(
    ("target", "ranks"),
    [(t, n) for t in ("marlin", "amx", "xpu") for n in (1, 2)] + [("npu", 1)],
)
def test_products_of_all_ranks_are_the_dequantized_product(
    work: Path, target: str, ranks: int
) -> None:
    config, tensors = opened(work, LLAMA, target)
    plain = dequantized(MODELS / LLAMA)
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    total: dict[str, list[torch.Tensor]] = {}
    for rank in range(ranks):
        for path, (layer, modules) in layers(config, rank, ranks, 512).items():
            load(layer, modules, tensors)
            whole = x[:, : H if "down" not in path else 512]
            row = isinstance(layer, RowParallelLinear)
            mine = whole.chunk(ranks, 1)[rank] if row else whole
            total.setdefault(path, []).append(layer.quant_method.apply(layer, mine))
    limit = 0.02 if target == "amx" else 1e-5
    for path, parts in total.items():
        made = layers(config, 0, ranks, 512)[path]
        names = [f"model.layers.0.{module}.weight" for module in made[1]]
        whole = x[:, : plain[names[0]].shape[1]]
        if len(names) == 1:
            found, expected = sum(parts), whole @ plain[names[0]].T
        else:  # every rank holds its share of each joined module
            found = torch.cat(parts, 1)
            shares = [
                torch.cat([plain[n].chunk(ranks)[rank] for n in names]) for rank in range(ranks)
            ]
            expected = whole @ torch.cat(shares).T
        assert (found - expected).abs().max() <= limit * expected.abs().max(), path


@pytest.mark.parametrize("target", ["marlin", "amx"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_mixtures_of_all_ranks_are_the_dequantized_mixture(
    work: Path, target: str, ranks: int
) -> None:
    config, tensors = opened(work, MIXTRAL, target)
    plain = dequantized(MODELS / MIXTRAL)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, H, generator=generator)
    weights = torch.rand(6, 2, generator=generator)
    chosen = torch.tensor([[0, 1], [1, 3], [3, 0], [2, 1], [0, 3], [1, 0]])
    found = sum(
        experts(config, target, MIXTRAL, rank, ranks, tensors)[1].mixture(x, weights, chosen)
        for rank in range(ranks)
    )
    expected = torch.zeros_like(x)
    for row in range(len(x)):
        for weight, expert in zip(weights[row], chosen[row].tolist(), strict=True):
            w1, w3, w2 = (
                plain[f"model.layers.0.block_sparse_moe.experts.{expert}.{n}.weight"]
                for n in ("w1", "w3", "w2")
            )
            inner = nn.functional.silu(x[row] @ w1.T) * (x[row] @ w3.T)
            expected[row] += weight * (inner @ w2.T)
    limit = 0.05 if target == "amx" else 1e-5
    assert (found - expected).abs().max() <= limit * expected.abs().max()


def test_a_split_that_does_not_fit_is_refused(work: Path) -> None:
    config, _ = opened(work, LLAMA, "npu")
    with pytest.raises(AwqconvError, match=r"o_proj: a rank breaks g < K \(K = 128, g = 128\)"):
        layers(config, 0, 2, 512)
    config, _ = opened(work, QWEN, "marlin")
    with pytest.raises(AwqconvError, match=r"K % 128 == 0"):
        experts(config, "marlin", QWEN, 0, 2, {})


def test_another_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awqconv.serving.config.metadata.version", lambda name: "0.4.9")
    with pytest.raises(AwqconvError, match=r"sglang 0\.4\.9 is not one of the versions"):
        plugin.register()

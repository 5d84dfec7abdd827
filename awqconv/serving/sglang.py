"""SGLang: quantization "awqconv", found through the entry point group `sglang.srt.plugins`.

Layers allocate SGLang's own parameter classes in the target's layout, which its loader cuts and
joins. After loading nothing is repacked: Marlin gets its workspace, and the one-group scale order
on a rank that is left with one group. Products are the engine's: gptq_marlin_gemm and its mixture
on CUDA, int4_scaled_mm_cpu on AMX, torch_npu's and torch's ops on Ascend and XPU; awqconv's kernels
elsewhere. Mixtures on Ascend are not served: SGLang 0.5.15 reads another layout for them there.

Run with SGLang 0.5.15: its engine on an H200 (marlin; Llama, Mixtral, Qwen3-MoE; one rank), its
parameter and loader classes on a host (several ranks). Ascend and XPU were not run, and of AMX only
the op by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers import linear as sglang_linear
from sglang.srt.layers import quantization as sglang_quantization
from sglang.srt.layers.parameter import PackedColumnParameter, PackedvLLMParameter
from sglang.srt.layers.quantization.base_config import (
    FusedMoEMethodBase,
    LinearMethodBase,
    QuantizationConfig,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.utils import is_cpu, is_cuda
from torch import Tensor, nn

from awqconv.errors import AwqconvError
from awqconv.serving import ops
from awqconv.serving.config import METHOD, Quantization, version_of
from awqconv.serving.slicing import Cut, check_rank, copy_expert, cut, release, single_group
from awqconv.targets import Target

VERSIONS = {"at_least": "0.5.15", "below": "0.5.16"}
JOINED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
UP, DOWN = ("gate_proj", "up_proj", "w1", "w3"), ("down_proj", "w2")


def register() -> None:
    """Entry point: put the config into SGLang's tables.

    Raises AwqconvError for an SGLang that this plugin does not know.
    """
    version_of("sglang", **VERSIONS)
    for table in ("BASE_QUANTIZATION_METHODS", "CPU_QUANTIZATION_METHODS", "QUANTIZATION_METHODS"):
        getattr(sglang_quantization, table)[METHOD] = AwqconvConfig
    supported = sglang_linear.WEIGHT_LOADER_V2_SUPPORTED
    if AwqconvLinearMethod.__name__ not in supported:
        supported.append(AwqconvLinearMethod.__name__)


class AwqconvConfig(QuantizationConfig):  # type: ignore[misc]
    """What a converted folder says."""

    def __init__(self, quantization: Quantization, joined: dict[str, Any]) -> None:
        super().__init__()
        self.quantization = quantization
        flat = {name: parts for name, parts in joined.items() if isinstance(parts, list)}
        self.joined = {**JOINED, **flat}

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_scaled_act_names(self) -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AwqconvConfig:
        return cls(Quantization.read(config), config.get("packed_modules_mapping") or {})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

        if isinstance(layer, sglang_linear.LinearBase):
            path, _, name = prefix.rpartition(".")
            parts = [f"{path}.{part}".lstrip(".") for part in self.joined.get(name, [name])]
            target = self.layout(parts, prefix)
            if target is None:
                return UnquantizedLinearMethod()
            return AwqconvLinearMethod(self.quantization, target, prefix)
        if isinstance(layer, FusedMoE):
            target = self._experts(prefix)
            return target and AwqconvMoEMethod(self.quantization, target, prefix)
        return None

    def layout(self, modules: list[str], prefix: str) -> Target | None:
        """The one layout of joined modules, None where they are plain weights."""
        fallback = self.quantization.fallback
        found = {
            None
            if self.quantization.skips(name) or fallback.get(name) == "bf16"
            else self.quantization.named(fallback.get(name))
            for name in modules
        }
        if len(found) > 1:
            said = ", ".join(sorted(target.name if target else "plain" for target in found))
            raise AwqconvError(
                f"SGLang joins {len(modules)} modules that are stored as {said}",
                prefix,
                "Serve this folder with transformers, or convert to a target that takes them all.",
            )
        return found.pop()

    def _experts(self, prefix: str) -> Target | None:
        """The layout of all experts under a prefix. A fallback names each expert's modules."""
        listed = [name for name in self.quantization.fallback if name.startswith(f"{prefix}.")]
        kinds = {name.rpartition(".")[2] for name in listed}
        if listed and not (kinds & set(UP) and kinds & set(DOWN)):
            raise AwqconvError(
                f"of the experts only {', '.join(sorted(kinds))} are on a fallback layout",
                prefix,
                "Serve this folder with transformers.",
            )
        return self.layout(listed or [prefix], prefix)


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
        scales, N = ops.NAMES[params_dtype], sum(output_partition_sizes)
        whole = self.quantization.linear(input_size, output_size, scales)
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
        self.multiply: ops.Multiply | None = None
        if marlin and is_cuda():
            from sglang.srt.layers.quantization import marlin_utils

            device = packed["qweight"].device
            self.workspace = marlin_utils.marlin_make_workspace(device)
            self.no_index = marlin_utils.marlin_make_empty_g_idx(device)
        else:
            self.multiply = ops.multiplier(packed, self.target, self.linear)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] @ w [K, N] + bias."""
        if self.multiply is None:
            return self._marlin(layer, x, bias)
        y = self.multiply(x.reshape(-1, self.linear.K))
        if bias is not None:
            y = (y + bias).to(x.dtype)
        return y.reshape(*x.shape[:-1], self.linear.N)

    def _marlin(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        from sglang.srt.layers.quantization.marlin_utils import apply_awq_marlin_linear
        from sglang.srt.layers.quantization.utils import get_scalar_types

        y: Tensor = apply_awq_marlin_linear(
            input=x,
            weight=layer.qweight,
            weight_scale=layer.scales,
            weight_zp=layer.qzeros,
            g_idx=self.no_index,
            g_idx_sort_indices=self.no_index,
            workspace=self.workspace,
            quant_type=get_scalar_types()[1].uint4,
            output_size_per_partition=self.linear.N,
            input_size_per_partition=self.linear.K,
            bias=bias,  # plain: SGLang adds it after the kernel
        )
        return y


class AwqconvMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Experts in a target's layout: each tensor [E, ...] of gate over up (w13) and of down (w2)."""

    def __init__(self, quantization: Quantization, target: Target, prefix: str) -> None:
        if target.name == "npu":
            raise AwqconvError(
                "SGLang reads experts on Ascend in a layout that this target does not write",
                prefix,
                "Serve the AWQ checkpoint itself there: awqconv convert --target awq.",
            )
        self.quantization, self.target, self.prefix = quantization, target, prefix

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Parameters w13_* and w2_* of this rank's shapes, with loaders that cut by `cut`."""
        H, mine, ranks = hidden_size, intermediate_size_per_partition, layer.moe_tp_size
        scales = ops.NAMES[params_dtype]
        self.linears = {
            "w13": self.quantization.linear(H, 2 * mine, scales),
            "w2": self.quantization.linear(mine, H, scales),
        }
        whole = self.quantization.linear(ranks * mine, H, scales)
        self.down_groups = whole.G
        if ranks > 1:
            check_rank(self.target, whole, self.linears["w2"], [H], self.prefix)
            both = self.quantization.linear(H, 2 * mine * ranks, scales)
            check_rank(self.target, both, self.linears["w13"], [mine, mine], self.prefix)
        for name, linear in self.linears.items():
            for part in self.target.parts(linear):
                data = torch.empty(num_experts, *part.shape(linear), dtype=ops.DTYPES[part.dtype])
                parameter = nn.Parameter(data, requires_grad=False)
                parameter.weight_loader = expert_loader(  # type: ignore[attr-defined]
                    layer, cut(part, linear), layer.moe_tp_rank
                )
                layer.register_parameter(f"{name}_{part.suffix}", parameter)

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:
        if moe_runner_config.activation != "silu":
            raise AwqconvError(
                f"experts with the activation {moe_runner_config.activation}",
                self.prefix,
                "Serve this folder with transformers.",
            )
        self.runner = None
        if self.target.name == "marlin" and is_cuda():
            from sglang.srt.layers.moe import MoeRunner, MoeRunnerBackend

            self.runner = MoeRunner(MoeRunnerBackend.MARLIN, moe_runner_config)

    def process_weights_after_loading(self, layer: Any) -> None:
        """One multiplier an expert, or the empty index that Marlin's mixture takes."""
        packed = {
            name: release(layer, [f"{name}_{p.suffix}" for p in self.target.parts(linear)])
            for name, linear in self.linears.items()
        }
        # Ranks split the rows of w2 only.
        if self.target.name == "marlin" and self.linears["w2"].G == 1 < self.down_groups:
            scales = packed["w2"]["w2_scales"]
            scales.copy_(single_group(scales))
        if self.runner is not None:
            for name in self.linears:
                shape = (len(packed[name][f"{name}_qweight"]), 0)
                index = torch.empty(shape, dtype=torch.int32, device=layer.w13_qweight.device)
                setattr(layer, f"{name}_g_idx_sort_indices", nn.Parameter(index, False))
            return
        self.amx = ops.amx_op() if self.target.name == "amx" and is_cpu() else None
        if self.amx is None:
            multipliers = {
                name: [
                    ops.multiplier(
                        {n.removeprefix(f"{name}_"): t[e] for n, t in tensors.items()},
                        self.target,
                        self.linears[name],
                    )
                    for e in range(len(tensors[f"{name}_qweight"]))
                ]
                for name, tensors in packed.items()
            }
            self.mixture = ops.gated_mixture(multipliers["w13"], multipliers["w2"], None)

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """The routed experts' sum, in the engine's own form."""
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

        if self.runner is not None:
            return self.runner.run(dispatch_output, self._quant_info(layer))
        x = dispatch_output.hidden_states
        weights, experts, _ = dispatch_output.topk_output
        if self.amx is not None:
            from sglang.srt.layers.amx_utils import CPUQuantMethod

            y = torch.ops.sgl_kernel.fused_experts_cpu(
                x, layer.w13_qweight, layer.w2_qweight, weights, experts, False,
                CPUQuantMethod.INT4_W4A8, layer.w13_scales, layer.w2_scales, layer.w13_qzeros,
                layer.w2_qzeros, None, None, None, None, None, True,
            )  # fmt: skip
        else:
            y = self.mixture(x, weights, experts)
        return StandardCombineInput(hidden_states=y)

    def _quant_info(self, layer: Any) -> Any:
        from sglang.srt.layers.moe.moe_runner.marlin import MarlinMoeQuantInfo

        return MarlinMoeQuantInfo(
            w13_qweight=layer.w13_qweight,
            w2_qweight=layer.w2_qweight,
            w13_scales=layer.w13_scales,
            w2_scales=layer.w2_scales,
            w13_g_idx_sort_indices=layer.w13_g_idx_sort_indices,
            w2_g_idx_sort_indices=layer.w2_g_idx_sort_indices,
            w13_qzeros=layer.w13_qzeros,
            w2_qzeros=layer.w2_qzeros,
            weight_bits=4,
        )


def expert_loader(layer: Any, at: Cut, rank: int) -> Callable[..., None]:
    """Copies this rank's part of one expert's tensor, w1 and w3 by columns and w2 by rows."""

    def load(
        param: nn.Parameter, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int
    ) -> None:
        place = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if place == -1:
            return
        copy_expert(param.data[place], loaded_weight, shard_id, at, rank)

    return load

"""What SGLang's models are made of: its modules, the checkpoint's modules fused into each, and how
tensor-parallel ranks share them.

Read from sglang/srt/models/*.py of version 0.5.15: the constructors say what a module is
(QKVParallelLinear, RowParallelLinear, ...), `stacked_params_mapping` and
`FusedMoE.make_expert_params_mapping` in `load_weights` say what is fused into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from awqconv.errors import AwqconvError

Config = Mapping[str, Any]

SPLITS = {
    "all": "every rank has all of it (ReplicatedLinear, RMSNorm)",
    "vocab": "rows, padded with zeros to a multiple of 64 in all (VocabParallelEmbedding)",
    "columns": "output features, of each fused part alike (MergedColumnParallelLinear)",
    "heads": "attention heads; kv heads repeat where ranks outnumber them (QKVParallelLinear)",
    "rows": "input features, the bias on every rank (RowParallelLinear)",
    "experts": "intermediate features: columns of gate and up, rows of down (FusedMoE)",
    "apart": "whole experts, in order, as np.array_split shares them (QuantMixtralForCausalLM)",
}
MAX_EXPERTS = 4096


@dataclass(frozen=True, slots=True)
class Entry:
    """A module of the engine; # in its name is a layer's number.

    `parts` are the checkpoint's modules beside it that it is fused from, in order; none if it is
    one of them itself.
    """

    name: str
    split: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """`bias`: for a module's last name, whether the engine gives it a bias. `ties`: whether
    tie_word_embeddings makes lm_head and embed_tokens one parameter."""

    entries: tuple[Entry, ...]
    source: str
    bias: Mapping[str, Callable[[Config], bool]] = field(default_factory=dict)
    ties: bool = False


def _attention_bias(config: Config) -> bool:
    return bool(config.get("attention_bias"))


def _llama_bias(config: Config) -> bool:
    return bool(config.get("attention_bias") or config.get("bias"))


_L = "model.layers.#."
_BODY = (
    Entry("model.embed_tokens", "vocab"),
    Entry(_L + "input_layernorm", "all"),
    Entry(_L + "self_attn.qkv_proj", "heads", ("q_proj", "k_proj", "v_proj")),
    Entry(_L + "self_attn.o_proj", "rows"),
    Entry(_L + "post_attention_layernorm", "all"),
    Entry("model.norm", "all"),
    Entry("lm_head", "vocab"),
)
_QK_NORM = (
    Entry(_L + "self_attn.q_norm", "all"),
    Entry(_L + "self_attn.k_norm", "all"),
)
_MLP = (
    Entry(_L + "mlp.gate_up_proj", "columns", ("gate_proj", "up_proj")),
    Entry(_L + "mlp.down_proj", "rows"),
)
_MIXTRAL = (
    Entry(_L + "block_sparse_moe.gate", "all"),
    Entry(_L + "block_sparse_moe.experts", "experts", ("w1", "w3", "w2")),
)
# Every layer is one of experts: the engine does not look at mlp_only_layers or decoder_sparse_step.
_QWEN_MOE = (
    Entry(_L + "mlp.gate", "all"),
    Entry(_L + "mlp.experts", "experts", ("gate_proj", "up_proj", "down_proj")),
)
_SHARED = (
    Entry(_L + "mlp.shared_expert.gate_up_proj", "columns", ("gate_proj", "up_proj")),
    Entry(_L + "mlp.shared_expert.down_proj", "rows"),
    Entry(_L + "mlp.shared_expert_gate", "all"),
)

_LLAMA = Architecture(
    _BODY + _MLP, "llama.py LlamaForCausalLM",
    {"qkv_proj": _llama_bias, "o_proj": _llama_bias}, ties=True,
)  # fmt: skip
ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": Architecture(
        _LLAMA.entries, "mistral.py MistralForCausalLM, a LlamaForCausalLM", _LLAMA.bias, ties=True
    ),
    "Qwen2ForCausalLM": Architecture(
        _BODY + _MLP, "qwen2.py Qwen2ForCausalLM", {"qkv_proj": lambda config: True}, ties=True
    ),
    "Qwen3ForCausalLM": Architecture(
        _BODY + _QK_NORM + _MLP, "qwen3.py Qwen3ForCausalLM",
        {"qkv_proj": _attention_bias, "o_proj": _attention_bias}, ties=True,
    ),
    "MixtralForCausalLM": Architecture(_BODY + _MIXTRAL, "mixtral.py MixtralForCausalLM"),
    "Qwen2MoeForCausalLM": Architecture(
        _BODY + _QWEN_MOE + _SHARED, "qwen2_moe.py Qwen2MoeForCausalLM",
        {"qkv_proj": lambda config: bool(config.get("qkv_bias", True))},
    ),
    "Qwen3MoeForCausalLM": Architecture(
        _BODY + _QK_NORM + _QWEN_MOE, "qwen3_moe.py Qwen3MoeForCausalLM",
        {"qkv_proj": _attention_bias, "o_proj": _attention_bias},
    ),
}  # fmt: skip


def _apart(config: Config) -> Architecture:
    """Mixtral where the method is awq: model_loader/utils.py get_model_architecture."""
    count = config.get("num_local_experts", 8)
    if not isinstance(count, int) or not 1 <= count <= MAX_EXPERTS:
        raise AwqconvError(f"num_local_experts is {count!r}", "config.json", "Correct it.")
    at = _L + "block_sparse_moe."
    experts = (
        Entry(f"{at}experts.{e}.{part}", "apart")
        for e in range(count)
        for part in ("w1", "w2", "w3")
    )
    return Architecture(
        (*_BODY, Entry(at + "gate", "all"), *experts),
        "mixtral_quant.py QuantMixtralForCausalLM",
    )


def architecture(config: Config, *, marlin: bool) -> Architecture:
    """The table for a model's config, `marlin`: where the engine's quantization method is
    awq_marlin, not awq. Raises AwqconvError with what is known for another architecture."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if name == "MixtralForCausalLM" and not marlin:
        return _apart(config)
    if isinstance(name, str) and name in ARCHITECTURES:
        return ARCHITECTURES[name]
    raise AwqconvError(
        f"how SGLang names and shares the tensors of {name or 'a model without architectures'} is "
        "not known to the form sglang-sharded",
        "config.json: architectures",
        f"Use --form hf, which fits every model, or one of {', '.join(ARCHITECTURES)}.",
    )

"""Tiny checkpoints of whole models, and what a rank of SGLang holds of them, written out by hand.

The state is made the way the engine's own loaders do it: logical matrices are cut and joined by
numpy, one parameter class at a time, and only then packed, by the reference implementation. It
shares no table and no byte arithmetic with `awqconv.forms`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import Array, Built, make_checkpoint

from awqconv.repack import layouts, reference
from awqconv.repack.axes import Pattern

Linear = tuple[Array, Array, Array]  # q [K, N], z [G, N], s [G, N]
H, HEAD = 256, 32

# architecture: extra config, per-layer MLP, whether qkv has a bias, q and k norms
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"head_dim": 32},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"attention_bias": False},
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen2MoeForCausalLM": {"num_experts": 4},
    "Qwen3MoeForCausalLM": {"num_experts": 4},
}


def make_model(
    path: Path,
    architecture: str,
    *,
    g: int = 32,
    I: int = 512,  # noqa: E741
    heads: int = 8,
    kv_heads: int = 4,
    vocab: int = 100,
    tied: bool = False,
    attention_bias: bool = False,
    skip: tuple[str, ...] = (),
    extra: Mapping[str, Any] | None = None,
    other: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
) -> tuple[Built, dict[str, Any]]:
    """A checkpoint of two layers and its config. `skip`: modules left as plain weights."""
    moe = "num_local_experts" in MODELS[architecture] or "num_experts" in MODELS[architecture]
    config = {
        "architectures": [architecture], "hidden_size": H, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "tie_word_embeddings": tied, "head_dim": HEAD, "attention_bias": attention_bias,
        **MODELS[architecture], **(extra or {}),
    }  # fmt: skip
    modules: dict[str, tuple[int, ...]] = {}
    others: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("F16", (vocab, H)),
        "model.norm.weight": ("F16", (H,)),
    }
    if not tied:
        others["lm_head.weight"] = ("F16", (vocab, H))
    bias = []
    for layer in range(2):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            others[f"{at}{name}.weight"] = ("F16", (H,))
        for name, N in (("q", heads * HEAD), ("k", kv_heads * HEAD), ("v", kv_heads * HEAD)):
            modules[f"{at}self_attn.{name}_proj"] = (H, N, g)
            if "Qwen2" in architecture or attention_bias:
                bias.append(f"{at}self_attn.{name}_proj")
        modules[f"{at}self_attn.o_proj"] = (heads * HEAD, H, g)
        if attention_bias:
            bias.append(f"{at}self_attn.o_proj")
        if "Qwen3" in architecture:
            for name in ("q_norm", "k_norm"):
                others[f"{at}self_attn.{name}.weight"] = ("F16", (HEAD,))
        if architecture == "MixtralForCausalLM":
            others[f"{at}block_sparse_moe.gate.weight"] = ("F16", (4, H))
            for e in range(4):
                expert = f"{at}block_sparse_moe.experts.{e}."
                modules[f"{expert}w1"] = modules[f"{expert}w3"] = (H, I, g)
                modules[f"{expert}w2"] = (I, H, g)
        elif moe and layer not in config.get("mlp_only_layers", ()):
            others[f"{at}mlp.gate.weight"] = ("F16", (4, H))
            for e in range(4):
                _mlp(modules, f"{at}mlp.experts.{e}.", I, g)
            if "Qwen2" in architecture:
                _mlp(modules, f"{at}mlp.shared_expert.", 2 * I, g)
                others[f"{at}mlp.shared_expert_gate.weight"] = ("F16", (1, H))
        else:
            _mlp(modules, f"{at}mlp.", I, g)
    plain = {n: modules.pop(n) for n in list(modules) if any(part in n for part in skip)}
    others |= {f"{n}.weight": ("F16", (N, K)) for n, (K, N, _) in plain.items()}
    others |= {f"{n}.bias": ("F16", (plain[n][1],)) for n in bias if n in plain}
    built = make_checkpoint(
        path, modules, others | dict(other or {}), shards=3, group_size=g,
        bias=[n for n in bias if n in modules],
        quant={"modules_to_not_convert": list(skip)}, config_overrides=config,
    )  # fmt: skip
    return built, config


def _mlp(modules: dict[str, tuple[int, ...]], at: str, I: int, g: int) -> None:  # noqa: E741
    modules[f"{at}gate_proj"] = modules[f"{at}up_proj"] = (H, I, g)
    modules[f"{at}down_proj"] = (I, H, g)


class Rank:
    """What rank `rank` of `tp` holds of a model, as logical matrices and plain arrays."""

    def __init__(self, built: Built, config: dict[str, Any], tp: int, rank: int) -> None:
        self.built, self.config, self.tp, self.rank = built, config, tp, rank
        self.kv = config["num_key_value_heads"]

    # --- linear.py, vocab_parallel_embedding.py, fused_moe_triton/layer.py

    def cut(
        self, array: Array, axis: int, index: int | None = None, of: int | None = None
    ) -> Array:
        return np.split(array, of or self.tp, axis)[self.rank if index is None else index]

    def columns(self, *names: str, replicas: tuple[int, ...] = ()) -> Any:
        """MergedColumnParallelLinear; parts in `replicas` are kv heads."""
        parts = []
        for i, name in enumerate(names):
            arrays = self.built.codes.get(name)
            few = i in replicas and self.kv < self.tp
            index, of = (self.rank * self.kv // self.tp, self.kv) if few else (self.rank, self.tp)
            if arrays is None:
                parts.append((self.cut(self.plain(f"{name}.weight"), 0, index, of),))
            else:
                parts.append(tuple(self.cut(array, 1, index, of) for array in arrays))
        axis = 1 if len(parts[0]) == 3 else 0
        joined = tuple(np.concatenate(arrays, axis) for arrays in zip(*parts, strict=True))
        return joined if len(joined) == 3 else joined[0]

    def bias(self, *names: str, replicas: tuple[int, ...] = ()) -> Array | None:
        found = []
        for i, name in enumerate(names):
            if f"{name}.bias" not in self.built.tensors:
                return None
            few = i in replicas and self.kv < self.tp
            index, of = (self.rank * self.kv // self.tp, self.kv) if few else (self.rank, self.tp)
            found.append(self.cut(self.plain(f"{name}.bias"), 0, index, of))
        return np.concatenate(found)

    def rows(self, name: str) -> Any:
        """RowParallelLinear."""
        arrays = self.built.codes.get(name)
        if arrays is None:
            return self.cut(self.plain(f"{name}.weight"), 1)
        q, z, s = arrays
        if len(z) == 1:  # channelwise: every rank has the one group
            return self.cut(q, 0), z, s
        return tuple(self.cut(array, 0) for array in arrays)

    def vocabulary(self, name: str) -> Array:
        table = self.plain(name)
        padded = np.zeros((-(-len(table) // 64) * 64, table.shape[1]), table.dtype)
        padded[: len(table)] = table
        return self.cut(padded, 0)

    def experts(self, at: str, gate: str, up: str, down: str) -> tuple[Linear, Linear]:
        """FusedMoE: w13 and w2, with a leading dimension of experts; scales by group of 32 up."""
        w13, w2 = [], []
        for e in range(4):
            w13.append(self.columns(f"{at}.{e}.{gate}", f"{at}.{e}.{up}"))
            q, z, s = self.built.codes[f"{at}.{e}.{down}"]
            each = len(q) // self.tp
            g = len(q) // len(z)
            fine = g
            while each % fine:
                fine //= 2
            z, s = (np.repeat(a, g // fine, 0) for a in (z, s))
            w2.append((self.cut(q, 0), self.cut(z, 0), self.cut(s, 0)))
            if fine != g:  # moe_wna16 repeats those of w13 alike
                q, z, s = w13[-1]
                w13[-1] = q, np.repeat(z, g // fine, 0), np.repeat(s, g // fine, 0)
        stacks = [tuple(np.stack(a) for a in zip(*w, strict=True)) for w in (w13, w2)]
        return stacks[0], stacks[1]

    def plain(self, name: str) -> Array:
        return self.built.tensors[name][1]

    # --- models/*.py

    def parameters(self, target: str) -> Iterator[tuple[str, Any]]:
        """Names with logical matrices (q, z, s) or arrays; experts as name + w13_ and w2_."""
        architecture = self.config["architectures"][0]
        if self.config["tie_word_embeddings"] and "Moe" not in architecture:
            yield "lm_head.weight", self.vocabulary("model.embed_tokens.weight")
        else:
            yield "model.embed_tokens.weight", self.vocabulary("model.embed_tokens.weight")
            yield "lm_head.weight", self.vocabulary("lm_head.weight")
        yield "model.norm.weight", self.plain("model.norm.weight")
        for layer in range(2):
            at = f"model.layers.{layer}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"{at}{name}.weight", self.plain(f"{at}{name}.weight")
            qkv = [f"{at}self_attn.{x}_proj" for x in "qkv"]
            yield f"{at}self_attn.qkv_proj", self.columns(*qkv, replicas=(1, 2))
            yield f"{at}self_attn.qkv_proj.bias", self.bias(*qkv, replicas=(1, 2))
            yield f"{at}self_attn.o_proj", self.rows(f"{at}self_attn.o_proj")
            if f"{at}self_attn.o_proj.bias" in self.built.tensors:
                yield f"{at}self_attn.o_proj.bias", self.plain(f"{at}self_attn.o_proj.bias")
            for name in ("q_norm", "k_norm"):
                if "Qwen3" in architecture:
                    yield f"{at}self_attn.{name}.weight", self.plain(f"{at}self_attn.{name}.weight")
            if architecture == "MixtralForCausalLM":
                moe = f"{at}block_sparse_moe"
                yield f"{moe}.gate.weight", self.plain(f"{moe}.gate.weight")
                if target != "marlin":  # mixtral_quant.py MixtralMoE
                    for e in np.array_split(range(4), self.tp)[self.rank]:
                        for name in (f"{moe}.experts.{e}.{w}" for w in ("w1", "w2", "w3")):
                            yield name, self.built.codes[name]
                    continue
                w13, w2 = self.experts(f"{moe}.experts", "w1", "w3", "w2")
                yield f"{moe}.experts.w13_", w13
                yield f"{moe}.experts.w2_", w2
            elif "Moe" in architecture:
                moe = f"{at}mlp"
                yield f"{moe}.gate.weight", self.plain(f"{moe}.gate.weight")
                w13, w2 = self.experts(f"{moe}.experts", "gate_proj", "up_proj", "down_proj")
                yield f"{moe}.experts.w13_", w13
                yield f"{moe}.experts.w2_", w2
                if "Qwen2" in architecture:
                    yield from self.mlp(f"{moe}.shared_expert")
                    name = f"{moe}.shared_expert_gate.weight"
                    yield name, self.plain(name)
            else:
                yield from self.mlp(f"{at}mlp")

    def mlp(self, at: str) -> Iterator[tuple[str, Any]]:
        yield f"{at}.gate_up_proj", self.columns(f"{at}.gate_proj", f"{at}.up_proj")
        yield f"{at}.down_proj", self.rows(f"{at}.down_proj")

    def state(self, target: str) -> dict[str, bytes]:
        """Every parameter's bytes."""
        found: dict[str, bytes] = {}
        packs = set()  # linear layers that have their own order on a CPU
        for name, value in self.parameters(target):
            if value is None:
                continue
            if isinstance(value, np.ndarray):
                plain = name if name.endswith(("weight", "bias")) else f"{name}.weight"
                module, _, kind = plain.rpartition(".")
                held = value
                if target == "amx" and kind == "bias" and module in packs:
                    held = value.astype(np.float32)
                elif target == "amx" and value.ndim == 2 and not self.embeds(module):
                    held = amx_floats(value)
                    packs |= {module} if held is not value else set()
                found[plain] = np.ascontiguousarray(held).tobytes()
                continue
            packs.add(name)
            stacked = value[0].ndim == 3
            how = self.moe_layout(target, value) if stacked else dense_layout(target, *value)
            for suffix, data in packed(how, *(a if stacked else a[None] for a in value)).items():
                named = (
                    NAMES[target].get(suffix, suffix) if how == target and not stacked else suffix
                )
                found[f"{name}{named}" if stacked else f"{name}.{named}"] = data
        return found

    def embeds(self, module: str) -> bool:
        return module == "model.embed_tokens" or (
            module == "lm_head" and self.config["tie_word_embeddings"]
        )

    def moe_layout(self, target: str, value: Linear) -> str:
        """AWQMarlinConfig.get_quant_method: check_moe_marlin_supports_layer, else moe_wna16."""
        if target != "marlin":
            return target
        names = [
            n for n in self.built.codes if n.endswith((".w2", ".down_proj")) and "experts" in n
        ]
        q, z, _ = self.built.codes[names[0]]
        g, each = len(q) // len(z), len(q) // self.tp
        fits = H % 128 == 0 and each % max(64, g) == 0 and g in (32, 64, 128)
        return "marlin" if fits else "moe_wna16"


NAMES: dict[str, dict[str, str]] = {
    "marlin": {}, "amx": {}, "npu": {"qweight": "weight", "qzeros": "zeros"},
    "xpu": {"qzeros": "xpu_zero_points", "scales": "xpu_scales"},
}  # fmt: skip


def amx_floats(w: Array) -> Array:
    """convert_weight_packed of a float weight [N, K], or itself where it does not fit."""
    N, K = w.shape
    if K % 32 or (N > 16 and N % 16):
        return w
    if N < 16:
        return np.ascontiguousarray(w.T).astype(np.float32)
    blocks = [w[i : i + 32] for i in range(0, N, 32)]
    return np.concatenate([b.reshape(-1, K // 2, 2).swapaxes(0, 1).reshape(-1) for b in blocks])


def dense_layout(target: str, q: Array, z: Array, s: Array) -> str:
    """check_marlin_supports_layer, else plain AWQ; AWQAscendLinearKernel, else bf16."""
    (K, N), g = q.shape, len(q) // len(z)
    if target in ("amx", "xpu"):
        return target
    if target == "npu":
        return "npu" if g % 32 == 0 and g < K else "bf16"
    return "marlin" if N % 64 == 0 and K % 128 == 0 and g in (32, 64, 128, K) else "awq"


def packed(how: str, q: Array, z: Array, s: Array) -> dict[str, bytes]:
    """Parts of E linears [E, K, N] in a layout, by the reference."""
    g = q.shape[1] // z.shape[1]

    def each(of: Array, pattern: Pattern) -> bytes:
        return b"".join(reference.pack(x, pattern).tobytes() for x in of)

    def numbers(of: Array, pattern: Pattern) -> bytes:
        return b"".join(reference.arrange(x, pattern).tobytes() for x in of)

    if how == "bf16":
        w = (q.astype(np.float32) - np.repeat(z, g, 1)) * np.repeat(s, g, 1).astype(np.float32)
        bits = np.ascontiguousarray(w.transpose(0, 2, 1)).view(np.uint32)
        return {"weight": ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()}
    if how == "npu":
        offsets = (8 - z.astype(np.float32)).astype(s.dtype)
        return {"qweight": each(q ^ 8, layouts.ROWS), "qzeros": offsets.tobytes(),
                "scales": np.ascontiguousarray(s).tobytes()}  # fmt: skip
    if how == "amx":
        b = min(g, 128)
        E, K, N = q.shape
        words = [reference.pack(x, layouts.amx(b)).reshape(N // 32, K // b, -1) for x in q]
        less = (q.astype(np.int32) - np.repeat(z, g, 1)).reshape(E, K // b, b, N // 32, 32).sum(2)
        comp = np.ascontiguousarray(less.transpose(0, 2, 1, 3).astype("<i4")).view(np.uint8)
        return {"qweight": np.concatenate((np.stack(words), comp), -1).tobytes(),
                "qzeros": numbers(z.astype(np.int8), layouts.AMX_COLUMNS),
                "scales": numbers(s.astype(np.float32), layouts.AMX_COLUMNS)}  # fmt: skip
    if how == "xpu":
        return {"qweight": each(q, layouts.COLUMNS), "qzeros": z.astype(np.int8).tobytes(),
                "scales": np.ascontiguousarray(s).tobytes()}  # fmt: skip
    order = layouts.MARLIN_SCALES if z.shape[1] > 1 else layouts.MARLIN_SCALES_SINGLE
    weight, zeros, scales = {
        "marlin": (layouts.MARLIN, layouts.MARLIN_ZEROS, order),
        "moe_wna16": (layouts.WNA16, layouts.WNA16_ZEROS, layouts.TRANSPOSED),
        "awq": (layouts.AWQ, layouts.AWQ, layouts.PLAIN),
    }[how]
    return {"qweight": each(q, weight), "qzeros": each(z, zeros), "scales": numbers(s, scales)}

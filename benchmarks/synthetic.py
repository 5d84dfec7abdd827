"""Make a synthetic AWQ checkpoint of a known model's shape: random but valid, deterministic.

    python benchmarks/synthetic.py llama-8b /tmp/llama-8b
    python benchmarks/synthetic.py llama-70b /tmp/cut --layers 8
    python benchmarks/synthetic.py llama-8b /tmp/small --layers 4 --vocabulary 32768

Codes and zero points are any bits, scales are positive float16, other tensors float16.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from awqconv.checkpoint.header import build_header

# hidden, intermediate, heads, kv heads, head size, layers, vocabulary, architecture
DENSE = {
    "llama-1b": (2048, 8192, 32, 8, 64, 16, 128256, "LlamaForCausalLM"),
    "llama-8b": (4096, 14336, 32, 8, 128, 32, 128256, "LlamaForCausalLM"),
    "qwen2.5-7b": (3584, 18944, 28, 4, 128, 28, 152064, "Qwen2ForCausalLM"),
    "llama-70b": (8192, 28672, 64, 8, 128, 80, 128256, "LlamaForCausalLM"),
}
# the same, and experts and intermediate size of one
MOE = {"qwen3-30b-a3b": (2048, 6144, 32, 4, 128, 48, 151936, "Qwen3MoeForCausalLM", 128, 768)}

Spec = tuple[str, str, tuple[int, ...]]
CHUNK = 1 << 26


def linear(name: str, K: int, N: int, g: int) -> Iterator[Spec]:
    yield f"{name}.qweight", "I32", (K, N // 8)
    yield f"{name}.qzeros", "I32", (K // g, N // 8)
    yield f"{name}.scales", "F16", (K // g, N)


def tensors(model: str, layers: int | None, vocabulary: int | None, g: int) -> Iterator[Spec]:
    shape = (DENSE | MOE)[model]
    hidden, middle, heads, kv, size, depth, words, _ = shape[:8]
    vocabulary = vocabulary or words
    yield "model.embed_tokens.weight", "F16", (vocabulary, hidden)
    for i in range(layers or depth):
        layer = f"model.layers.{i}"
        yield from linear(f"{layer}.self_attn.q_proj", hidden, heads * size, g)
        for part in "kv":
            yield from linear(f"{layer}.self_attn.{part}_proj", hidden, kv * size, g)
        yield from linear(f"{layer}.self_attn.o_proj", heads * size, hidden, g)
        if model in MOE:
            experts, middle = shape[8:]
            yield f"{layer}.mlp.gate.weight", "F16", (experts, hidden)
            for e in range(experts):
                for part in ("gate", "up"):
                    yield from linear(f"{layer}.mlp.experts.{e}.{part}_proj", hidden, middle, g)
                yield from linear(f"{layer}.mlp.experts.{e}.down_proj", middle, hidden, g)
            for part in "qk":
                yield f"{layer}.self_attn.{part}_norm.weight", "F16", (size,)
        else:
            for part in ("gate", "up"):
                yield from linear(f"{layer}.mlp.{part}_proj", hidden, middle, g)
            yield from linear(f"{layer}.mlp.down_proj", middle, hidden, g)
        for part in ("input", "post_attention"):
            yield f"{layer}.{part}_layernorm.weight", "F16", (hidden,)
    yield "model.norm.weight", "F16", (hidden,)
    yield "lm_head.weight", "F16", (vocabulary, hidden)


def make(
    model: str,
    dest: Path,
    *,
    layers: int | None,
    g: int,
    shard: int,
    seed: int,
    zeros: bool = False,
    vocabulary: int | None = None,
) -> int:
    """Write the checkpoint; the number of bytes of its tensors. `zeros`: holes instead of data."""
    dest.mkdir(parents=True)
    shards: list[list[Spec]] = [[]]
    room = shard
    total = 0
    for spec in tensors(model, layers, vocabulary, g):
        size = int(np.prod(spec[2])) * {"I32": 4, "F16": 2}[spec[1]]
        if size > room and shards[-1]:
            shards.append([])
            room = shard
        shards[-1].append(spec)
        room -= size
        total += size
    rng = np.random.Generator(np.random.SFC64(seed))
    index = {}
    for i, specs in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        header, places = build_header(specs)
        with (dest / name).open("wb") as file:
            file.write(header)
            for tensor, info in places.items():
                index[tensor] = name
                if zeros:
                    file.truncate(info.stop)
                    continue
                for start in range(0, info.nbytes, CHUNK):
                    count = min(CHUNK, info.nbytes - start)
                    if info.dtype == "I32":
                        file.write(rng.bytes(count))
                    else:  # float16 of 2^-8 to 2^-6: exponent bits 7 and 8, any mantissa
                        bits = rng.integers(7 << 10, 9 << 10, count // 2, np.uint16)
                        file.write(bits.tobytes())
    shape = (DENSE | MOE)[model]
    config = {
        "architectures": [shape[7]],
        "model_type": {"L": "llama", "Q": "qwen2"}[shape[7][0]],
        "hidden_size": shape[0], "intermediate_size": shape[1], "num_attention_heads": shape[2],
        "num_key_value_heads": shape[3], "head_dim": shape[4], "hidden_act": "silu",
        "num_hidden_layers": layers or shape[5], "vocab_size": vocabulary or shape[6],
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "torch_dtype": "float16",
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": g,
                                "zero_point": True, "version": "gemm"},
    }  # fmt: skip
    if model in MOE:
        config |= {"model_type": "qwen3_moe", "num_experts": shape[8], "num_experts_per_tok": 8,
                   "moe_intermediate_size": shape[9], "norm_topk_prob": True,
                   "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip
    (dest / "config.json").write_text(json.dumps(config, indent=2))
    whole = {"metadata": {"total_size": total}, "weight_map": index}
    (dest / "model.safetensors.index.json").write_text(json.dumps(whole))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=[*DENSE, *MOE])
    parser.add_argument("dest", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--shard-size", type=int, default=5 * 10**9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zeros", action="store_true", help="Tensors of zeros, files of holes.")
    args = parser.parse_args()
    total = make(args.model, args.dest, layers=args.layers, vocabulary=args.vocabulary,
                 g=args.group_size, shard=args.shard_size, seed=args.seed,
                 zeros=args.zeros)  # fmt: skip
    print(f"{total:,} bytes of tensors in {args.dest}")  # noqa: T201


if __name__ == "__main__":
    main()

"""How fast plans are made: headers shaped like a very large mixture of experts, no tensor bytes.

    python benchmarks/planner.py [--tensors 130000] [--repeat 3] [--json]

The checkpoint is DeepSeek-V3's shape (61 layers, 3 of them dense, 256 experts, AWQ g = 128) in
163 shards, read through a source that holds headers only. Timed apart: opening (parsing and
checking headers, finding modules), planning for each target, and writing the manifest's inputs.
The same for Qwen3-MoE names in the form sglang-sharded at 8 ranks, and for capacity.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator

from awqconv.capacity import capacity
from awqconv.checkpoint.header import build_header
from awqconv.checkpoint.model import open_model
from awqconv.plan import make_plan
from awqconv.targets import layout

Spec = tuple[str, str, tuple[int, ...]]
H, I, DENSE, GROUP = 7168, 2048, 18432, 128  # noqa: E741


class Headers:
    """A source of files that are all header."""

    name, in_order = "headers", False

    def __init__(self, shards: list[list[Spec]], config: dict[str, object]) -> None:
        self.data: dict[str, bytes] = {"config.json": json.dumps(config).encode()}
        self.sizes: dict[str, int] = {}
        weights: dict[str, str] = {}
        total = 0
        for i, specs in enumerate(shards, 1):
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
            header, where = build_header(specs)
            self.data[file] = header
            self.sizes[file] = max(info.stop for info in where.values())
            total += self.sizes[file] - len(header)
            weights.update(dict.fromkeys(where, file))
        index = {"metadata": {"total_size": total}, "weight_map": weights}
        self.data["model.safetensors.index.json"] = json.dumps(index).encode()

    def files(self) -> dict[str, int]:
        return {name: self.sizes.get(name, len(data)) for name, data in sorted(self.data.items())}

    def read(self, file: str, start: int, stop: int) -> bytes:
        return self.data[file][start:stop]

    def readinto(self, file: str, start: int, buffer: memoryview) -> None:
        buffer[:] = self.read(file, start, start + len(buffer))

    def fingerprint(self, file: str) -> tuple[int, ...]:
        return (self.files()[file],)

    def close(self) -> None:
        pass


def linear(name: str, K: int, N: int) -> Iterator[Spec]:
    yield f"{name}.qweight", "I32", (K, N // 8)
    yield f"{name}.qzeros", "I32", (K // GROUP, N // 8)
    yield f"{name}.scales", "F16", (K // GROUP, N)


def mlp(name: str, width: int) -> Iterator[Spec]:
    for part in ("gate_proj", "up_proj"):
        yield from linear(f"{name}.{part}", H, width)
    yield from linear(f"{name}.down_proj", width, H)


def deepseek(layers: int) -> Iterator[Spec]:
    yield "model.embed_tokens.weight", "F16", (129280, H)
    for i in range(layers):
        at = f"model.layers.{i}"
        for name, K, N in (
            ("q_a_proj", H, 1536),
            ("q_b_proj", 1536, 24576),
            ("kv_b_proj", 512, 32768),
            ("o_proj", 16384, H),
        ):
            yield from linear(f"{at}.self_attn.{name}", K, N)
        yield f"{at}.self_attn.kv_a_proj_with_mqa.weight", "F16", (576, H)
        for name, size in (("q_a_layernorm", 1536), ("kv_a_layernorm", 512)):
            yield f"{at}.self_attn.{name}.weight", "F16", (size,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{name}.weight", "F16", (H,)
        if i < 3:
            yield from mlp(f"{at}.mlp", DENSE)
            continue
        yield f"{at}.mlp.gate.weight", "F16", (256, H)
        yield f"{at}.mlp.gate.e_score_correction_bias", "F32", (256,)
        yield from mlp(f"{at}.mlp.shared_experts", I)
        for e in range(256):
            yield from mlp(f"{at}.mlp.experts.{e}", I)
    yield "model.norm.weight", "F16", (H,)
    yield "lm_head.weight", "F16", (129280, H)


def qwen(layers: int) -> Iterator[Spec]:
    """The same experts under an architecture whose shards are known."""
    yield "model.embed_tokens.weight", "F16", (151936, H)
    for i in range(layers):
        at = f"model.layers.{i}"
        for part, N in (("q", 8192), ("k", 1024), ("v", 1024)):
            yield from linear(f"{at}.self_attn.{part}_proj", H, N)
        yield from linear(f"{at}.self_attn.o_proj", 8192, H)
        for name, size in (
            ("self_attn.q_norm", 128), ("self_attn.k_norm", 128), ("input_layernorm", H),
            ("post_attention_layernorm", H),
        ):  # fmt: skip
            yield f"{at}.{name}.weight", "F16", (size,)
        yield f"{at}.mlp.gate.weight", "F16", (256, H)
        for e in range(256):
            yield from mlp(f"{at}.mlp.experts.{e}", I)
    yield "model.norm.weight", "F16", (H,)
    yield "lm_head.weight", "F16", (151936, H)


def source(specs: list[Spec], architecture: str, layers: int) -> Headers:
    """The tensors in 163 shards, as even as names go."""
    step = -(-len(specs) // 163)
    config = {
        "architectures": [architecture], "num_hidden_layers": layers, "num_attention_heads": 64,
        "num_key_value_heads": 8, "num_experts": 256, "vocab_size": 151936, "hidden_size": H,
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": GROUP,
                                "zero_point": True, "modules_to_not_convert": ["mlp.gate."]},
    }  # fmt: skip
    return Headers([specs[i : i + step] for i in range(0, len(specs), step)], config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--tensors", type=int, default=130_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    layers = max(4, round(options.tensors / 2330) + 3)
    specs, known = list(deepseek(layers)), list(qwen(layers))
    headers = source(specs, "DeepseekV3ForCausalLM", layers)
    sharded = source(known, "Qwen3MoeForCausalLM", layers)
    model, qwen_model = open_model(headers), open_model(sharded)
    marlin = layout("marlin")
    steps = {
        "open": (len(specs), lambda: open_model(headers)),
        **{
            f"plan {name}": (len(specs), lambda name=name: make_plan(model, layout(name)))
            for name in ("marlin", "npu", "amx")
        },
        "plan marlin, sglang-sharded, 8 ranks": (
            len(known),
            lambda: make_plan(qwen_model, marlin, form="sglang-sharded", tp=8),
        ),
        "capacity marlin, 1 to 16 ranks": (len(known), lambda: capacity(qwen_model, marlin)),
    }
    results = {}
    for name, (count, step) in steps.items():
        walls, times = [], []
        for _ in range(options.repeat):
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            walls.append(time.perf_counter() - wall)
            times.append(time.process_time() - cpu)
        seconds = statistics.median(times)
        results[name] = {"tensors": count, "seconds": round(statistics.median(walls), 3),
                         "cpu seconds": round(seconds, 3),
                         "tensors per cpu second": round(count / seconds)}  # fmt: skip
    if options.json:
        print(json.dumps(results, indent=2))  # noqa: T201
        return
    for name, row in results.items():
        print(  # noqa: T201
            f"{name:40} {row['tensors']:>8,} tensors {row['seconds']:>8.2f} s"
            f" {row['cpu seconds']:>8.2f} s of CPU {row['tensors per cpu second']:>10,} a second"
        )


if __name__ == "__main__":
    main()

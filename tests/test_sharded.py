"""The form sglang-sharded against the running engine, against its loaders by hand, and back."""

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash
from checkpoints import Built
from engine_models import MODELS, Rank, make_model
from golden_cases import GOLDEN, Raw, raw_tensors

import awqconv
from awqconv.capacity import capacity
from awqconv.checkpoint.model import open_model
from awqconv.errors import AwqconvError
from awqconv.plan import make_plan
from awqconv.repack import layouts, reference
from awqconv.targets import layout

STATE = json.loads((GOLDEN / "sglang_sharded_state.json").read_text())
CPU_STATE = json.loads((GOLDEN / "sglang_sharded_state_cpu.json").read_text())


def rank_tensors(path: Path, rank: int) -> dict[str, Raw]:
    found: dict[str, Raw] = {}
    for file in sorted(path.glob(f"model-rank-{rank}-part-*.safetensors")):
        part = raw_tensors(file)
        assert not found.keys() & part.keys()
        found.update(part)
    return found


def sharded(source: Path, dest: Path, tp: int, target: str = "marlin", **options) -> None:
    awqconv.convert(source, dest, target=target, form="sglang-sharded", tp=tp, **options)


def back(path: Path, dest: Path) -> dict[str, Raw]:
    awqconv.convert(path, dest, target="awq")
    found: dict[str, Raw] = {}
    for file in dest.glob("*.safetensors"):
        found.update(raw_tensors(file))
    return found


def source_tensors(path: Path) -> dict[str, Raw]:
    found: dict[str, Raw] = {}
    for file in path.glob("*.safetensors"):
        found.update(raw_tensors(file))
    return found


@pytest.mark.parametrize("case", STATE)
def test_the_shards_are_the_state_of_the_running_engine(models, tmp_path, case):
    name, tp = case.rsplit("-tp", 1)
    sharded(models / name, tmp_path / "out", int(tp))
    wrong = set()
    for rank, state in enumerate(STATE[case]):
        mine = rank_tensors(tmp_path / "out", rank)
        assert {n: [r.dtype, list(r.shape)] for n, r in mine.items()} == {
            n: [dtype, shape] for n, (dtype, shape, _) in state.items()
        }
        for tensor, (_, _, digest) in state.items():
            if xxhash.xxh3_128_hexdigest(mine[tensor].data) != digest:
                wrong.add(tensor)
                # The engine's error: scales of several groups in the order of one.
                raw = mine[tensor]
                s = raw.array.view("<u2").reshape(raw.shape)
                plain = [reference.restore(x, layouts.MARLIN_SCALES, x.shape) for x in s]
                single = [reference.arrange(x, layouts.MARLIN_SCALES_SINGLE) for x in plain]
                assert xxhash.xxh3_128_hexdigest(np.stack(single).tobytes()) == digest
    expected = tp == "2" and "llama" not in name
    assert {n.rpartition(".")[2] for n in wrong} == ({"w13_scales"} if expected else set())
    assert back(tmp_path / "out", tmp_path / "back") == source_tensors(models / name)


@pytest.mark.parametrize("case", CPU_STATE)
def test_the_shards_are_the_state_of_the_engine_on_a_cpu(models, tmp_path, case):
    name, tp = case.rsplit("-tp", 1)
    sharded(models / name, tmp_path / "out", int(tp), "amx")
    for rank, state in enumerate(CPU_STATE[case]):
        assert {
            tensor: [raw.dtype, list(raw.shape), xxhash.xxh3_128_hexdigest(raw.data)]
            for tensor, raw in rank_tensors(tmp_path / "out", rank).items()
        } == state


def check(source: Built, config: dict, path: Path, tp: int, target: str = "marlin") -> None:
    """Rank files hold exactly what the engine's loaders make, and turn back to the source."""
    sharded(source.path, path / "out", tp, target, max_shard_size="200kB")
    for rank in range(tp):
        mine = rank_tensors(path / "out", rank)
        engine = Rank(source, config, tp, rank).state(target)
        assert mine.keys() == engine.keys()
        for name, raw in mine.items():
            assert raw.data == engine[name], (rank, name)
    assert back(path / "out", path / "back") == source_tensors(source.path)


DENSE = [name for name in MODELS if "Mixtral" not in name and "Moe" not in name]
CASES = [(name, tp) for name in MODELS for tp in (1, 2, 4)] + [(name, 8) for name in DENSE]


@pytest.mark.parametrize("target", ["npu", "amx", "xpu"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("architecture", MODELS)
def test_every_parameter_is_as_the_engine_shares_it_elsewhere(tmp_path, architecture, tp, target):
    source, config = make_model(tmp_path / "m", architecture)
    if target == "xpu" and "Moe" in architecture:
        with pytest.raises(AwqconvError, match="xpu does not take the experts"):
            sharded(source.path, tmp_path / "out", tp, target)
    else:
        check(source, config, tmp_path, tp, target)


@pytest.mark.parametrize(("architecture", "tp"), CASES)
def test_every_parameter_is_as_the_engine_shares_it(tmp_path, architecture, tp):
    # kv heads are repeated at 4 and 8 ranks; at 4, I of a rank still has 4 groups of 32.
    check(*make_model(tmp_path / "m", architecture, kv_heads=2), tmp_path, tp)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_npu_parameters_with_a_fallback_by_rank(tmp_path, architecture, tp):
    # g = 64: at 4 ranks o_proj has one group, and becomes bf16 with its original kept.
    check(*make_model(tmp_path / "m", architecture, g=64), tmp_path, tp, "npu")


@pytest.mark.parametrize(
    "options",
    [
        {"tied": True},
        {"attention_bias": True},
        {"attention_bias": True, "skip": ("self_attn.q", "self_attn.k", "self_attn.v", "o_proj")},
        {"skip": ("layers.1.",)},
        {"kv_heads": 1, "vocab": 64},
        {"g": 128, "extra": {"num_attention_heads": 8}},
        {"g": 16},
    ],
    ids=lambda o: ",".join(o) + str(o.get("g", "")),
)
@pytest.mark.parametrize("target", ["marlin", "amx", "xpu"])
def test_options_of_a_dense_model(tmp_path, target, options):
    options = dict(options)
    if "self_attn.q" in options.get("skip", ()):
        options["skip"] = ("self_attn",)
    source, config = make_model(tmp_path / "m", "LlamaForCausalLM", **options)
    if target == "xpu" and options.get("g") == 16:
        with pytest.raises(AwqconvError, match="xpu does not take it: g in"):
            sharded(source.path, tmp_path / "out", 2, target)
    elif target == "amx" and options.get("kv_heads") == 1:
        with pytest.raises(AwqconvError, match="1 kv heads cannot be shared by 2 ranks"):
            sharded(source.path, tmp_path / "out", 2, target)
    else:
        check(source, config, tmp_path, 2, target)


@pytest.mark.parametrize(
    ("g", "I", "tp", "how"),
    [
        (64, 192, 2, "moe_wna16"),  # a rank's 96 rows end inside a group: halved to 32, repeated
        (128, 384, 2, "moe_wna16"),  # 192: halved to 64
        (128, 256, 2, "marlin"),
        (32, 160, 1, "moe_wna16"),
    ],
)
def test_experts_fall_back_a_layer_at_a_time_by_what_a_rank_has(tmp_path, g, I, tp, how):  # noqa: E741
    for architecture in ("MixtralForCausalLM", "Qwen3MoeForCausalLM"):
        path = tmp_path / architecture
        source, config = make_model(path / "m", architecture, g=g, I=I, heads=8 * g // 32)
        check(source, config, path, tp)
        plan = make_plan(open_model(source.path), layout("marlin"), form="sglang-sharded", tp=tp)
        assert {v.layout for v in plan.verdicts if ".experts." in v.module} == {how}


def test_tensors_the_engine_does_not_load_are_kept_beside(tmp_path):
    source, config = make_model(
        tmp_path / "m", "LlamaForCausalLM", tied=True,
        other={"lm_head.weight": ("F16", (100, 256)),
               "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (16,)),
               "model.layers.0.self_attn.o_proj.bias": ("F16", (256,))},
    )  # fmt: skip
    source.tensors.pop("model.layers.0.self_attn.o_proj.bias")
    check(source, config, tmp_path, 2)
    kept = raw_tensors(tmp_path / "out/awq-originals/model.safetensors")
    assert set(kept) == {
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.o_proj.bias",
    }


def test_channelwise_ranks_have_all_scales(tmp_path):
    source, config = make_model(tmp_path / "m", "LlamaForCausalLM", g=-1)
    path = source.path / "config.json"
    text = json.loads(path.read_text())
    text["quantization_config"]["group_size"] = -1
    path.write_text(json.dumps(text))
    check(source, config, tmp_path, 2)
    plan = make_plan(open_model(source.path), layout("marlin"), form="sglang-sharded", tp=2)
    assert any("Channelwise" in note for note in plan.notes)


def test_plain_weights_of_shards_come_from_any_layout(tmp_path):
    # One group a rank: npu dequantizes all; k and v are cut inside Marlin's granule.
    source, _ = make_model(tmp_path / "m", "LlamaForCausalLM", g=256, heads=8, kv_heads=2)
    awqconv.convert(source.path, tmp_path / "marlin", target="marlin")
    sharded(source.path, tmp_path / "a", 2, "npu")
    sharded(tmp_path / "marlin", tmp_path / "b", 2, "npu")
    for rank in range(2):
        mine = rank_tensors(tmp_path / "a", rank)
        assert mine == rank_tensors(tmp_path / "b", rank)
        assert mine["model.layers.0.self_attn.qkv_proj.weight"].dtype == "BF16"
    assert back(tmp_path / "b", tmp_path / "back") == source_tensors(source.path)


def test_a_sharded_folder_converts_to_any_target_as_its_source_does(tmp_path):
    source, _ = make_model(tmp_path / "m", "MixtralForCausalLM", kv_heads=2, I=384)
    sharded(source.path, tmp_path / "shards", 4)
    for target in ("marlin", "npu", "amx", "xpu", "compressed-tensors", "moe_wna16"):
        awqconv.convert(source.path, tmp_path / f"{target}-a", target=target)
        awqconv.convert(tmp_path / "shards", tmp_path / f"{target}-b", target=target)
        assert source_tensors(tmp_path / f"{target}-a") == source_tensors(tmp_path / f"{target}-b")


@pytest.mark.parametrize("first", ["marlin", "npu", "amx", "xpu", "compressed-tensors"])
def test_shards_of_a_conversion_are_those_of_its_source(tmp_path, first):
    # k and v of a rank are 32 columns: less than Marlin's granule, in the source and in the shards.
    source, _ = make_model(tmp_path / "m", "MixtralForCausalLM", kv_heads=2, I=384)
    awqconv.convert(source.path, tmp_path / "first", target=first)
    for target, tp in (("marlin", 2), ("marlin", 4), ("npu", 2), ("amx", 2), ("xpu", 4)):
        a, b = (tmp_path / f"{target}{tp}-{x}" for x in "ab")
        sharded(source.path, a, tp, target)
        sharded(tmp_path / "first", b, tp, target)
        for rank in range(tp):
            assert rank_tensors(a, rank) == rank_tensors(b, rank)
    assert back(b, tmp_path / "back") == source_tensors(source.path)


@pytest.mark.parametrize(
    ("architecture", "target", "tp", "options"),
    [
        ("MixtralForCausalLM", "marlin", 4, {"I": 384, "g": 128, "heads": 32}),
        ("Qwen2MoeForCausalLM", "npu", 2, {"skip": ("layers.0.mlp.shared_expert",)}),
        ("Qwen2ForCausalLM", "npu", 4, {"g": 64, "tied": True}),
        ("Qwen2MoeForCausalLM", "amx", 2, {"skip": ("layers.0.mlp.shared_expert",)}),
        ("MixtralForCausalLM", "xpu", 2, {}),
    ],
)
def test_a_sharded_folder_is_verified_and_every_damage_found(
    tmp_path, architecture, target, tp, options
):
    source, _ = make_model(tmp_path / "m", architecture, **options)
    sharded(source.path, tmp_path / "out", tp, target)
    for origin in (None, source.path):
        found = awqconv.verify(tmp_path / "out", source=origin, columns=64)
        assert found.ok, found.problems
    names = {m.module for m in found.modules}
    assert {"rank 0: model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.q_proj"} < names
    random = np.random.default_rng(0)
    for file in sorted((tmp_path / "out").rglob("*.safetensors")):
        good = file.read_bytes()
        tensors = raw_tensors(file)
        for name in random.choice(sorted(tensors), 4, replace=False):
            data = bytearray(good)
            at = data.index(tensors[name].data) + int(random.integers(len(tensors[name].data)))
            data[at] ^= 1 << int(random.integers(8))
            file.write_bytes(data)
            assert not awqconv.verify(tmp_path / "out", columns=0).ok, name
        file.write_bytes(good)


def test_verification_says_where_shards_are_not_their_sources(tmp_path):
    source, _ = make_model(tmp_path / "m", "LlamaForCausalLM")
    sharded(source.path, tmp_path / "out", 2)
    name = "model.layers.0.mlp.up_proj.qweight"
    file = next(f for f in source.path.glob("*.safetensors") if name in raw_tensors(f))
    data = bytearray(file.read_bytes())
    data[data.index(raw_tensors(file)[name].data)] ^= 1
    file.write_bytes(data)
    found = awqconv.verify(tmp_path / "out", source=source.path)
    assert [p.where for p in found.problems] == ["module model.layers.0.mlp.up_proj"]
    assert "code at k 0, column 0" in found.problems[0].what


@pytest.mark.parametrize(
    "tensor", ["model.norm.weight", "model.layers.0.self_attn.qkv_proj.qzeros"]
)
def test_ranks_that_hold_the_same_must_agree(tmp_path, tensor):
    source, _ = make_model(tmp_path / "m", "LlamaForCausalLM", kv_heads=1)
    sharded(source.path, tmp_path / "out", 2)
    file = tmp_path / "out/model-rank-1-part-0.safetensors"
    info = raw_tensors(file)[tensor]
    data = bytearray(file.read_bytes())
    data[data.index(info.data) + len(info.data) - 1] ^= 0x10
    file.write_bytes(data)
    with pytest.raises(AwqconvError, match=r"ranks .*differ"):
        back(tmp_path / "out", tmp_path / "back")


REFUSALS = [
    ({"extra": {"architectures": ["PhiForCausalLM"]}}, 1, "PhiForCausalLM.*not known"),
    ({}, 3, "cannot be shared by 3 ranks"),
    ({"g": 64}, 8, "no multiple of the group size"),
    ({"extra": {"num_hidden_layers": 3}}, 1, "the checkpoint lacks"),
    ({"extra": {"attention_bias": True}}, 1, "bias here, the checkpoint none"),
    ({"extra": {"vocab_size": 99}}, 1, "vocab_size is 99"),
    ({"extra": {"num_attention_heads": 0}}, 1, "num_attention_heads is 0"),
]


REFUSALS = [("LlamaForCausalLM", "marlin", *refusal) for refusal in REFUSALS] + [
    ("LlamaForCausalLM", "amx", {"g": 96, "I": 480}, 5, "8 attention heads"),
    ("LlamaForCausalLM", "amx", {"kv_heads": 2}, 4, "2 kv heads cannot be shared by 4 ranks"),
    ("LlamaForCausalLM", "amx", {"I": 384, "g": 128, "skip": ("mlp.down_proj",)}, 2,
     "N = 384 is no multiple of 2 ranks x group size 128"),
    ("LlamaForCausalLM", "amx", {"g": -1}, 1, "divides by the group size"),
    ("LlamaForCausalLM", "amx", {"I": 40, "g": 8}, 1, "amx does not take it: N % 32"),
    ("Qwen3MoeForCausalLM", "amx", {"skip": ("mlp.experts",)}, 1, "that are not quantized"),
    ("Qwen3MoeForCausalLM", "marlin", {"g": 16}, 1, "no experts of group size 16"),
    ("Qwen2MoeForCausalLM", "marlin", {"extra": {"mlp_only_layers": [1]}}, 1,
     "the engine has this module, the checkpoint lacks model.layers.1.mlp.gate"),
    ("MixtralForCausalLM", "npu", {"extra": {"num_local_experts": 0}}, 1, "num_local_experts is 0"),
    ("MixtralForCausalLM", "npu", {}, 8, "4 experts are fewer than 8 ranks"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "target", "options", "tp", "says"), REFUSALS,
                         ids=[r[4] for r in REFUSALS])  # fmt: skip
def test_what_the_engine_could_not_load_is_refused(
    tmp_path, architecture, target, options, tp, says
):
    source, _ = make_model(tmp_path / "m", architecture, **options)
    if options.get("g") == -1:
        path = source.path / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"]["group_size"] = -1
        path.write_text(json.dumps(config))
    with pytest.raises(AwqconvError, match=says) as error:
        sharded(source.path, tmp_path / "out", tp, target)
    assert error.value.where
    assert error.value.fix
    assert not (tmp_path / "out").exists()


def test_arguments_that_do_not_go_together_are_refused(tmp_path):
    source, _ = make_model(tmp_path / "m", "LlamaForCausalLM")
    model = open_model(source.path)
    for target, options, says in [
        ("compressed-tensors", {"form": "sglang-sharded"}, "not there for compressed-tensors"),
        ("marlin", {"tp": 2}, "same for every number of ranks"),
        ("marlin", {"form": "gguf"}, "no form is named 'gguf'"),
        ("marlin", {"form": "sglang-sharded", "tp": 0}, "0 tensor-parallel ranks"),
        ("marlin", {"form": "sglang-sharded", "scale_dtype": "float32"}, "casts scales"),
    ]:
        with pytest.raises(AwqconvError, match=says):
            make_plan(model, layout(target), **options)
    sharded(source.path, tmp_path / "out", 2)
    with pytest.raises(AwqconvError, match="sharded for tensor-parallel ranks already"):
        sharded(tmp_path / "out", tmp_path / "again", 4)


def test_a_module_the_engine_would_take_the_other_way_is_refused(tmp_path):
    source, _ = make_model(tmp_path / "m", "LlamaForCausalLM")
    path = source.path / "config.json"
    config = json.loads(path.read_text())
    # The engine looks for the part in the fused name: mlp.gate is also in mlp.gate_up_proj.
    config["quantization_config"]["modules_to_not_convert"] = ["mlp.gate"]
    path.write_text(json.dumps(config))
    with pytest.raises(AwqconvError, match="takes it the other way") as error:
        sharded(source.path, tmp_path / "out", 1)
    assert error.value.where == "model.layers.0.mlp.gate_up_proj"


def test_a_damaged_sharded_folder_is_refused(tmp_path):
    source, _ = make_model(tmp_path / "m", "LlamaForCausalLM")
    sharded(source.path, tmp_path / "out", 2)
    manifest = tmp_path / "out/awqconv.json"
    good = json.loads(manifest.read_text())
    for change, says in [
        ({"tp": 4}, "rank 0: .*manifest means"),
        ({"tensors": good["tensors"][1:]}, "no qweight|lacks"),
        ({"tensors": "x"}, "incomplete"),
        ({"target": 1}, "no target is named 1"),
        ({"layout_version": 99}, "layout version 99"),
        ({"tp": None}, "incomplete"),
        ({"modules": {}}, "does not name model.layers.0.mlp.down_proj"),
        ({"modules": []}, "incomplete"),
    ]:
        manifest.write_text(json.dumps({**good, **change}))
        with pytest.raises(AwqconvError, match=says):
            open_model(tmp_path / "out")


def test_the_engines_scale_error_is_named_where_it_strikes(tmp_path):
    source, _ = make_model(tmp_path / "m", "MixtralForCausalLM", g=64, I=128)
    model = open_model(source.path)
    hf = make_plan(model, layout("marlin")).notes
    assert any(
        "With 2 tensor" in note and "layers.0.block_sparse_moe.experts" in note for note in hf
    )
    by_rank = {tp: make_plan(model, layout("marlin"), form="sglang-sharded", tp=tp).notes
               for tp in (1, 2)}  # fmt: skip
    assert not by_rank[1]
    assert "w13 scales of 2 mixtures" in by_rank[2][0]


def test_capacity_by_number_of_ranks(tmp_path):
    source, _ = make_model(tmp_path / "m", "MixtralForCausalLM", g=64, I=256)
    model = open_model(source.path)
    found = {c.tp: c for c in capacity(model, layout("marlin"))}
    assert list(found) == [1, 2, 4, 8, 16]
    assert [c.loads for c in found.values()] == [True, True, True, False, False]
    assert not found[1].fallbacks
    assert found[1].nbytes > found[2].nbytes > found[4].nbytes
    assert {(v.module.rpartition(".")[2], v.layout) for v in found[4].fallbacks} == {
        ("o_proj", "awq")
    }
    assert "4 experts are fewer than 8 ranks" in dict(found[8].refused).values()
    sharded(source.path, tmp_path / "out", 4)
    written = sum(len(r.data) for r in rank_tensors(tmp_path / "out", 1).values())
    assert found[4].nbytes == written


def test_inspection_of_a_sharded_folder_tells_its_layouts_and_bytes(tmp_path):
    source, _ = make_model(tmp_path / "m", "Qwen3MoeForCausalLM", g=64, I=192)
    sharded(source.path, tmp_path / "out", 2)
    found = awqconv.inspect(tmp_path / "out")
    assert {k.layout for k in found.kinds if ".experts." in k.name} == {"moe_wna16"}
    assert {k.layout for k in found.kinds if ".experts." not in k.name} == {"marlin"}
    held = [raw for rank in range(2) for raw in rank_tensors(tmp_path / "out", rank).items()]
    parts = (".qweight", ".qzeros", ".scales", "_qweight", "_qzeros", "_scales")
    assert found.quantized_bytes == sum(len(r.data) for n, r in held if n.endswith(parts))
    assert found.nbytes == sum(len(r.data) for _, r in held)

"""Mixtures of experts in the default form: vendors' bytes, layers decided whole, round trips."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_checkpoint, write_tensors
from golden_cases import Raw, cases, raw_tensors

import awqconv
from awqconv.checkpoint.model import open_model
from awqconv.errors import AwqconvError
from awqconv.forms.experts import misread, mixtures
from awqconv.plan import make_plan, verdicts
from awqconv.targets import Mixture, layout, targets

NAMES = [target.name for target in targets()]
NUMPY = {"F16": "<f2", "I32": "<i4"}
AT = "model.layers.0.block_sparse_moe.experts"


def tensors(path: Path) -> dict[str, Raw]:
    found: dict[str, Raw] = {}
    for file in path.glob("*.safetensors"):
        found.update(raw_tensors(file))
    return found


def array(raw: Raw) -> np.ndarray:
    return np.frombuffer(raw.data, NUMPY.get(raw.dtype, np.uint8)).reshape(*raw.shape, -1)[..., 0]


def golden_checkpoint(path: Path, case: str) -> int:
    """Experts of a golden case as a checkpoint names them; how many they are."""
    given = {name[3:]: r for name, r in cases("moe")[case].items() if name.startswith("in/")}
    stored: dict[str, Any] = {}
    for name, raw in given.items():
        which, _, suffix = name.partition("_")
        whole = array(raw)
        halves = np.split(whole, 2, 2) if which == "w13" else [whole]
        for part, half in zip(("w1", "w3") if which == "w13" else ("w2",), halves, strict=True):
            for e, expert in enumerate(half):
                stored[f"{AT}.{e}.{part}.{suffix}"] = raw.dtype, expert
    path.mkdir()
    write_tensors(path, stored)
    quant = {"quant_method": "awq", "group_size": int(case.rpartition("g")[2])}
    (path / "config.json").write_text(json.dumps({"quantization_config": quant}))
    return len(halves[0])


def stacked(out: dict[str, Raw], count: int, which: str, suffix: str, axis: int) -> bytes:
    """Experts' tensors one after another, gate and up joined as the engine joins them."""
    experts = []
    for e in range(count):
        raws = [out[f"{AT}.{e}.{part}.{suffix}"] for part in which]
        whole = [np.frombuffer(r.data, np.uint8).reshape(*r.shape, -1) for r in raws]
        experts.append(np.concatenate(whole, axis).tobytes())
    return b"".join(experts)


# file of the packer, target, the axis along which it joins gate and up by tensor
GOLDENS = [
    ("marlin_awq", "marlin", 1),
    ("ascend_awq", "npu", 1),
    ("amx_sgl_int4", "amx", 0),
    ("moe_wna16", "moe_wna16", 0),
]


PACKED = [
    pytest.param(case, *golden, id=f"{golden[1]}-{case}")
    for golden in GOLDENS
    for case, found in cases("moe").items()
    if any(name.startswith(f"{golden[0]}/") for name in found)
]


@pytest.mark.parametrize(("case", "file", "target", "axis"), PACKED)
def test_experts_are_the_vendors_bytes(tmp_path, case, file, target, axis):
    golden = {n.removeprefix(f"{file}/"): r for n, r in cases("moe")[case].items()}
    golden = {n: r for n, r in golden.items() if n.startswith(("out/", "fixed/"))}
    count = golden_checkpoint(tmp_path / "m", case)
    result = awqconv.convert(tmp_path / "m", tmp_path / "out", target=target)
    assert not result.fallbacks
    out = tensors(tmp_path / "out")
    for name, raw in golden.items():
        section, _, tensor = name.partition("/")
        which, _, suffix = tensor.partition("_")
        mine = stacked(out, count, ("w1", "w3") if which == "w13" else ("w2",), suffix, axis)
        if section == "out" and f"fixed/{tensor}" in golden:
            assert mine != raw.data  # the engine's error
        else:
            assert mine == raw.data, name
    awqconv.convert(tmp_path / "out", tmp_path / "back", target="awq")
    assert tensors(tmp_path / "back") == tensors(tmp_path / "m")


def mixture(path: Path, H: int, I: int, g: int, **options: Any) -> Path:  # noqa: E741
    """A DeepSeek-like checkpoint: a dense layer, a layer of experts, shared experts, attention."""
    modules: dict[str, tuple[int, ...]] = {}

    def mlp(at: str, width: int) -> None:
        modules[f"{at}.gate_proj"] = modules[f"{at}.up_proj"] = (H, width, g)
        modules[f"{at}.down_proj"] = (width, H, g)

    mlp("model.layers.0.mlp", 2 * H)
    for e in range(3):
        mlp(f"model.layers.1.mlp.experts.{e}", I)
    mlp("model.layers.1.mlp.shared_experts", 2 * H)
    modules["model.layers.1.self_attn.o_proj"] = (H, H, g)
    modules |= options.pop("more", {})
    return make_checkpoint(path, modules, shards=2, group_size=g, **options).path


def kinds(path: Path, target: str) -> dict[str, set[str]]:
    model = open_model(path)
    found: dict[str, set[str]] = {"dense": set(), "expert": set()}
    for verdict in verdicts(model.modules, layout(target), "keep").values():
        found[verdict.linear.kind].add(verdict.layout)
    return found


@pytest.mark.parametrize(
    ("H", "I", "g", "target", "experts"),
    [
        (256, 64, 64, "marlin", "marlin"),  # I = 64 is enough for experts, no K for a dense layer
        (256, 96, 32, "marlin", "moe_wna16"),
        (192, 128, 64, "marlin", "moe_wna16"),
        (256, 256, 256, "marlin", "moe_wna16"),
        (256, 128, 128, "npu", "npu"),  # one group: the mixture kernel takes it
        (192, 96, 48, "npu", "bf16"),
        (64, 32, 32, "amx", "amx"),
        (64, 48, 16, "amx", "bf16"),
        (256, 64, 64, "xpu", "bf16"),
        (256, 64, 64, "awq", "awq"),
        (256, 64, 64, "compressed-tensors", "compressed-tensors"),
        (256, 64, 64, "moe_wna16", "moe_wna16"),
    ],
)
def test_experts_of_a_layer_are_decided_together(tmp_path, H, I, g, target, experts):  # noqa: E741
    path = mixture(tmp_path / "m", H, I, g)
    assert kinds(path, target)["expert"] == {experts}
    if target == "moe_wna16":
        assert kinds(path, target)["dense"] == {"awq"}


def test_one_expert_that_differs_takes_the_layer_with_it(tmp_path):
    more = {"model.layers.1.mlp.experts.2.down_proj": (64, 256, 32)}
    path = mixture(tmp_path / "m", 256, 64, 64, more=more)
    (group,) = mixtures(open_model(path).modules)
    assert group.mixture is None
    assert kinds(path, "marlin")["expert"] == {"moe_wna16"}
    plan = make_plan(open_model(path), layout("marlin"))
    rule = plan.fallbacks[-1].rule
    assert rule == (
        "all experts of a layer alike (model.layers.1.mlp.experts.0.gate_proj H = 256, I = 64, "
        "g = 64; model.layers.1.mlp.experts.2.down_proj H = 256, I = 64, g = 32)"
    )
    with pytest.raises(AwqconvError, match="all experts of a layer alike"):
        make_plan(open_model(path), layout("marlin"), strict=True)


def test_fused_experts_stay_stacked(tmp_path):
    modules = {
        "model.layers.0.mlp.experts.gate_up_proj": (256, 256, 32, 3),
        "model.layers.0.mlp.experts.down_proj": (128, 256, 32, 3),
    }
    source = make_checkpoint(tmp_path / "m", modules, bias=True).path
    (group,) = mixtures(open_model(source).modules)
    assert group.mixture == Mixture(H=256, I=128, g=32, E=3)
    for target in NAMES:
        awqconv.convert(source, tmp_path / target, target=target)
        back = tmp_path / f"{target}-back"
        awqconv.convert(tmp_path / target, back, target="awq")
        assert tensors(back) == tensors(source)
    marlin = tensors(tmp_path / "marlin")
    assert marlin["model.layers.0.mlp.experts.gate_up_proj.qweight"].shape == (3, 16, 512)


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize(("H", "I", "g"), [(128, 64, 32), (192, 96, 48), (128, 128, 128)])
def test_mixtures_turn_back_to_the_sources_bytes(tmp_path, target, H, I, g):  # noqa: E741
    path = mixture(tmp_path / "m", H, I, g)
    awqconv.convert(path, tmp_path / "out", target=target, max_shard_size="60kB")
    awqconv.convert(tmp_path / "out", tmp_path / "back", target="awq")
    assert tensors(tmp_path / "back") == tensors(path)


def test_where_the_engines_order_scales_wrongly():
    """The engine's own expression against the number of scale rows, over a grid."""
    wrong = [
        (H, I, g, tp)
        for H in (128, 256, 2048)
        for I in (64, 128, 256, 768, 1024)  # noqa: E741
        for g in (32, 64, 128)
        for tp in (1, 2, 4, 8)
        if I % tp == 0 and misread(Mixture(H, I, g, 8), tp)
    ]
    assert (2048, 1024, 128, 8) in wrong
    assert (256, 128, 128, 1) in wrong
    assert (128, 256, 128, 1) in wrong  # H = g: one row, ordered as several
    assert (2048, 1024, 128, 4) not in wrong
    assert all(I // tp <= g or g == H for H, I, g, tp in wrong)  # noqa: E741


CHECKPOINTS = ("mixtral-tiny-awq", "qwen3moe-tiny-awq")
SHARDED = [(target, "sglang-sharded", tp) for target in ("marlin", "npu", "amx", "xpu")
           for tp in (1, 2, 4)]  # fmt: skip
# At four ranks Mixtral's o_proj has half a group, and Qwen3's experts too, which only moe_wna16
# halves; on a CPU the engine would pad two kv heads; on XPU it has no fused experts.
NO = {
    "mixtral-tiny-awq": {(target, 4): "of a rank" for target in ("marlin", "npu", "xpu")}
    | {("amx", 4): "2 kv heads"},
    "qwen3moe-tiny-awq": {(target, 4): "of a rank" for target in ("npu", "amx")}
    | {("xpu", tp): "does not take the experts" for tp in (1, 2, 4)},
}


@pytest.mark.parametrize(("target", "form", "tp"), [*((name, "hf", 1) for name in NAMES), *SHARDED])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_real_mixtures_in_every_form(models, tmp_path, name, target, form, tp):
    def run() -> None:
        awqconv.convert(models / name, tmp_path / "out", target=target, form=form, tp=tp)

    says = NO[name].get((target, tp)) if form != "hf" else None
    if says:
        with pytest.raises(AwqconvError, match=says):
            run()
        return
    run()
    for source in (None, models / name):
        assert awqconv.verify(tmp_path / "out", source=source).ok
    awqconv.convert(tmp_path / "out", tmp_path / "back", target="awq")
    assert tensors(tmp_path / "back") == tensors(models / name)

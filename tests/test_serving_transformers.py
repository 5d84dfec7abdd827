"""The transformers loader: the same text, logits and perplexity as the dequantized AWQ source."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from conftest import MODELS
from safetensors.torch import load_file
from serving_reference import plain_model

import awqconv
from awqconv.errors import AwqconvError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import AutoModelForCausalLM, AutoTokenizer

import awqconv.serving.transformers as serving

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores, each with its threads, crawl
    torch.set_num_threads(1)

SMOLLM = "smollm2-135m-instruct-awq-g64"
W4A16 = ("marlin", "npu", "xpu")
TARGETS = (*W4A16, "amx")
WHOLE_TEXT = os.environ.get("AWQCONV_TEST_FULL") == "1"
PROBE, WINDOW = 40, 256  # tokens of the text
PROMPT = "The capital of France is"
needs_models = pytest.mark.skipif(
    not MODELS.is_dir(), reason="no real checkpoints: set AWQCONV_MODELS"
)

Model = Any


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


def converted(work: Path, name: str, target: str) -> Path:
    """A real checkpoint, converted once."""
    dest = work / f"{name}-{target}"
    if not dest.exists():
        awqconv.convert(MODELS / name, dest, target=target)
    return dest


def load(folder: Path, **options: Any) -> Model:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


@dataclass
class Reference:
    """The dequantized SmolLM2 and what it says: in float32, and its logits in float64."""

    model: Model
    text: torch.Tensor
    tokens: list[int]
    logits: torch.Tensor
    exact: torch.Tensor
    perplexity: float


@pytest.fixture(scope="module")
def reference(work: Path) -> Reference:
    model = plain_model(MODELS / SMOLLM, work / "plain")
    tokenizer = AutoTokenizer.from_pretrained(MODELS / SMOLLM)
    text = eval_ids(tokenizer)
    tokens = greedy(model, tokenizer(PROMPT, return_tensors="pt").input_ids)
    found = logits(model, text[:, :PROBE])
    window = perplexity(model, text[:, :WINDOW])
    exact = logits(model.double(), text[:, :PROBE])
    return Reference(model.float(), text, tokens, found, exact, window)


def logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(ids).logits
    return found


def greedy(model: Model, ids: torch.Tensor, tokens: int = 12) -> list[int]:
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return [int(token) for token in out[0]]


def eval_ids(tokenizer: Any) -> torch.Tensor:
    text = (MODELS / "eval.txt").read_text()
    ids: torch.Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    return ids


def perplexity(model: Model, ids: torch.Tensor, context: int = 512) -> float:
    """exp of the mean loss of all tokens but the first, each seen in its window of `context`."""
    loss, count = 0.0, ids.shape[1] - 1
    for start in range(0, count, context):
        window = ids[:, start : start + context + 1]
        scores = logits(model, window[:, :-1])[0].double().log_softmax(-1)
        loss -= float(scores.gather(1, window[0, 1:, None]).sum())
    return exp(loss / count)


class LayerBound:
    """Holds each packed layer's product, in a run of the model, to its rounding error bound.

    float32: |y' - y| <= n u |x| @ |w| with n = 2K roundings, u = 2^-24; with W4A8 also the
    rounding of a row's activations to steps of max|x| / 127.
    """

    def __init__(self, model: Model, weights: dict[str, torch.Tensor]) -> None:
        self.worst = 0.0
        self.hooks = []
        for name, module in model.named_modules():
            if isinstance(module, serving.PackedLinear):
                check = self._check(weights[f"{name}.weight"])
                self.hooks.append(module.register_forward_hook(check))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _check(self, single: torch.Tensor) -> Any:
        def check(module: Any, args: Any, y: torch.Tensor) -> None:
            x, weight = args[0].double(), single.double()
            bound = 2 * weight.shape[1] * 2.0**-24 * (x.abs() @ weight.abs().T)
            if module.target.name == "amx":
                step = x.abs().amax(-1, keepdim=True) / 127
                bound = 1.001 * bound + 0.501 * step * weight.abs().sum(1)
            ratio = (y.double() - x @ weight.T).abs() / bound.clamp_min(1e-30)
            self.worst = max(self.worst, float(ratio.max()))

        return check


@needs_models
@pytest.mark.parametrize("target", TARGETS)
def test_smollm2_is_the_dequantized_source(
    work: Path, reference: Reference, target: str, record_property: Any
) -> None:
    model = load(converted(work, SMOLLM, target))
    packed = {n: m for n, m in model.named_modules() if isinstance(m, serving.PackedLinear)}
    assert len(packed) == 210
    plain = dict(reference.model.named_parameters())
    for name, module in packed.items():
        assert torch.equal(module.dense(torch.float32), plain[f"{name}.weight"]), name

    prompt = AutoTokenizer.from_pretrained(MODELS / SMOLLM)(PROMPT, return_tensors="pt").input_ids
    assert greedy(model, prompt) == reference.tokens

    bound = LayerBound(model, plain)
    ids = reference.text[:, :PROBE]
    found = logits(model, ids)
    bound.remove()
    assert 0 < bound.worst <= 1
    record_property("layer error over bound", bound.worst)
    if target != "amx":
        # As near to exact arithmetic as the plain float32 model is, up to a small factor.
        error, plain_error = ((y - reference.exact).abs().max() for y in (found, reference.logits))
        record_property("logits error, packed and plain", (float(error), float(plain_error)))
        assert error <= 4 * plain_error

    if WHOLE_TEXT or target == "marlin":  # the figure in the model's notes
        expected, measured = 15.8049, perplexity(model, reference.text)
        record_property("perplexity", measured)
    else:
        expected, measured = reference.perplexity, perplexity(model, reference.text[:, :WINDOW])
    assert measured == pytest.approx(expected, rel=1e-2 if target == "amx" else 2e-5)

    assert torch.equal(logits(model.dequantize(), ids), reference.logits)  # exactly


@needs_models
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name", ["llama-tiny-awq-gemm-g32", "llama-tiny-awq-sharded", "mixtral-tiny-awq",
             "qwen3moe-tiny-awq"]
)  # fmt: skip
def test_every_kind_of_model(work: Path, name: str, target: str) -> None:
    plain = plain_model(MODELS / name, work / f"{name}-plain")
    model = load(converted(work, name, target))
    ids = eval_ids(AutoTokenizer.from_pretrained(MODELS / name))[:, :64]
    scale = logits(plain, ids).abs().max()
    error = (logits(model, ids) - logits(plain, ids)).abs().max() / scale
    dense = "bf16" in {
        entry["layout"] for entry in model.config.quantization_config.fallback.values()
    }
    assert error <= (0.1 if target == "amx" else 1e-2 if dense else 1e-5)
    if target != "amx" and not dense:
        assert greedy(model, ids[:, :8]) == greedy(plain, ids[:, :8])
    if not dense:
        assert torch.equal(logits(model.dequantize(), ids), logits(plain, ids))


@needs_models
@pytest.mark.parametrize("name", ["llama-tiny-awq-gemm-g128", "mixtral-tiny-awq"])
@pytest.mark.parametrize("target", TARGETS)
def test_save_pretrained_writes_the_same_tensors(
    work: Path, tmp_path: Path, name: str, target: str
) -> None:
    folder = converted(work, name, target)
    model = load(folder, dtype="auto", device_map="cpu")
    model.save_pretrained(tmp_path)
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    for key, value in before.items():
        # A plain bf16 weight of a float16 model was cast as it was loaded; packed tensors never.
        dtype = model.dtype if key.endswith(".weight") else value.dtype
        assert after[key].dtype == dtype, key
        assert torch.equal(value.to(dtype), after[key]), key
    config = [json.loads((at / "config.json").read_text()) for at in (folder, tmp_path)]
    assert config[0]["quantization_config"] == config[1]["quantization_config"]
    ids = torch.arange(20)[None]
    assert torch.equal(logits(load(folder), ids), logits(load(tmp_path), ids))


@needs_models
def test_dtypes_and_casts_leave_the_packed_tensors_alone(work: Path) -> None:
    folder = converted(work, "llama-tiny-awq-gemm-g32", "amx")
    ids = torch.arange(20)[None]
    plain = logits(load(folder), ids)
    for dtype in (torch.float16, torch.bfloat16):
        model = load(folder, dtype=dtype, device_map="auto")
        assert model.dtype == dtype
        layer = model.model.layers[0].mlp.up_proj
        assert layer.qweight.dtype == torch.uint8
        assert layer.scales.dtype == torch.float32
        found = logits(model, ids)
        assert found.dtype == dtype
        assert (found.float() - plain).abs().max() < 0.05 * plain.abs().max()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    model.model.layers[0].float()
    assert all(torch.equal(before[n], b) for n, b in layer.named_buffers())
    assert layer(torch.ones(1, 256)).dtype == torch.float32


def biased(path: Path, **options: Any) -> Path:
    """A random Qwen2 of one layer, whose attention has biases."""
    layer = "model.layers.0."
    shapes = dict.fromkeys((f"{layer}self_attn.{n}_proj" for n in "qkvo"), (128, 128, 32))
    shapes |= dict.fromkeys((f"{layer}mlp.{n}_proj" for n in ("gate", "up")), (128, 256, 32))
    shapes[f"{layer}mlp.down_proj"] = (256, 128, 32)
    norms = ("model.norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm")
    others = {f"{name}.weight": ("F16", (128,)) for name in norms}
    others |= {f"{name}.weight": ("F16", (64, 128)) for name in ("model.embed_tokens", "lm_head")}
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 128,
        "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2,
        "num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 64,
    }  # fmt: skip
    make_checkpoint(
        path, shapes, others, bias=[f"{layer}self_attn.{n}_proj" for n in "qkv"],
        config_overrides=config, **options,
    )  # fmt: skip
    for extra in ("tokenizer_config.json", "generation_config.json"):
        (path / extra).write_text("{}")
    return path


@pytest.mark.parametrize("target", TARGETS)
def test_bias_is_added_after_the_product(tmp_path: Path, target: str) -> None:
    source = biased(tmp_path / "source")
    awqconv.convert(source, tmp_path / "dest", target=target)
    model, plain = load(tmp_path / "dest"), plain_model(source, tmp_path / "plain")
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    ids = torch.arange(20)[None]
    limit = 0.1 if target == "amx" else 1e-5
    expected = logits(plain, ids)
    assert (logits(model, ids) - expected).abs().max() <= limit * expected.abs().max()


def edited(folder: Path, tmp_path: Path, **entries: Any) -> Path:
    """A copy of a converted folder with other entries in its quantization_config."""
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"].update(entries)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"layout_version": 99}, "layout_version is 99"),
        ({"target": "tpu"}, "no target is named 'tpu'"),
        ({"bits": 8}, "bits is 8"),
        ({"form": "sglang-sharded"}, "form is 'sglang-sharded'"),
        ({"group_size": 64}, "qzeros is"),
        ({"target": "npu"}, "qweight is"),
        ({"fallback": {"model.layers.0.mlp.up_proj": {}}}, "fallback"),
    ],
)
def test_what_is_not_known_is_refused(
    tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    awqconv.convert(biased(tmp_path / "source"), tmp_path / "dest", target="marlin")
    with pytest.raises(AwqconvError, match=message):
        load(edited(tmp_path / "dest", tmp_path, **entries))


def test_another_transformers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    awqconv.convert(biased(tmp_path / "source"), tmp_path / "dest", target="marlin")
    monkeypatch.setattr("awqconv.serving.config.metadata.version", lambda name: "4.51.3")
    with pytest.raises(AwqconvError, match=r"transformers 4\.51\.3 is not one of the versions"):
        load(tmp_path / "dest")


def test_without_the_import_the_error_names_the_package(tmp_path: Path) -> None:
    """transformers would only warn of the quantization, and draw random weights."""
    awqconv.convert(biased(tmp_path / "source"), tmp_path / "dest", target="marlin")
    code = (
        "import transformers, sys; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "dest")]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode != 0
    assert "pip install awqconv, and import awqconv.serving.transformers" in run.stderr
    awqconv.convert(tmp_path / "dest", tmp_path / "back", target="awq")
    assert "transformers_weights" not in json.loads((tmp_path / "back/config.json").read_text())

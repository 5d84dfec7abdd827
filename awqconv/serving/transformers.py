"""transformers: `from_pretrained` on a converted folder, words packed as they are in the files.

transformers looks for no plugins, so this module is imported once, before the model is loaded:

    import awqconv.serving.transformers
    model = AutoModelForCausalLM.from_pretrained("model-marlin")

What is packed is read from the headers of the checkpoint files. A linear layer becomes a
`PackedLinear`. Experts that the model holds as one 3-D parameter become packed layers of their own,
one each, and the model's own expert code multiplies by them. Layers on the bf16 fallback stay
plain. Run with transformers 5.23.

    python -m awqconv.serving.transformers FOLDER "text to go on from"
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from awqconv.errors import AwqconvError
from awqconv.serving import ops
from awqconv.serving.config import (
    AGAIN,
    METHOD,
    NEEDS_LOADER,
    WEIGHTS,
    Quantization,
    version_of,
)
from awqconv.targets import Linear, Target

VERSIONS = {"at_least": "5.19", "below": "6"}
Header = tuple[str, tuple[int, ...]]  # dtype and shape


class PackedLinear(nn.Module):
    """A linear layer whose buffers are the module's tensors, by suffix, as the file stores them.

    Casting the model leaves them alone: their dtypes are part of the layout.
    """

    bias: Tensor | None

    def __init__(self, target: Target, linear: Linear) -> None:
        super().__init__()
        self.target, self.linear = target, linear
        self.in_features, self.out_features = linear.K, linear.N
        self.parts = [part.suffix for part in target.parts(linear)]
        for suffix, (dtype, shape) in stored(target, linear).items():
            self.register_buffer(suffix, torch.empty(shape, dtype=ops.DTYPES[dtype]))
        if "bias" not in self._buffers:
            self.register_buffer("bias", None)
        self._multiply: ops.Multiply | None = None

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors, by suffix."""
        return {suffix: self._buffers[suffix] for suffix in self.parts}  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self._multiply = None
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                cast = moved.dtype != buffer.dtype
                self._buffers[name] = buffer.to(moved.device) if cast else moved
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_buffers", ()):
            self._multiply = None
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_multiply": None}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] @ w [K, N] + bias, in x's dtype."""
        if self._multiply is None:
            linear = replace(self.linear, bias=None)
            self._multiply = ops.multiplier(self.packed(), self.target, linear)
        y = self._multiply(x.reshape(-1, self.in_features))
        if self.bias is not None:
            y = (y + self.bias).to(x.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] as a plain linear layer has it."""
        linear = replace(self.linear, bias=None)
        return ops.dequantize(self.packed(), self.target, linear).T.to(dtype).contiguous()

    def extra_repr(self) -> str:
        return f"{self.linear.K}, {self.linear.N}, g={self.linear.g}, target={self.target.name}"


def stored(target: Target, linear: Linear) -> dict[str, Header]:
    """dtype and shape of each tensor of a module, by suffix."""
    found = {part.suffix: (part.dtype, part.shape(linear)) for part in target.parts(linear)}
    for suffix, value in target.constants(linear).items():
        found[suffix] = ({"i8": "I64", "i4": "I32"}[value.dtype.str[1:]], value.shape)
    if bias := target.bias(linear):
        found["bias"] = (bias, (linear.N,))
    return found


class ExpertWeight:
    """Stands where a model's own code writes linear(x, weight) with one expert's [N, K] weight.

    The weight is that of `layers` one below the other: gate over up, or down alone.
    """

    def __init__(self, layers: list[PackedLinear]) -> None:
        self.layers = layers

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is not nn.functional.linear or kwargs:
            return NotImplemented
        x, weight, *bias = args
        y = torch.cat([layer(x) for layer in weight.layers], -1)
        return y + bias[0] if bias and bias[0] is not None else y


class ExpertStack:
    """Stands for a parameter [E, N, K]: `stack[e]` is the weight of expert e."""

    def __init__(self, experts: list[list[PackedLinear]]) -> None:
        self.experts = experts

    def __getitem__(self, expert: int | Tensor) -> ExpertWeight:
        return ExpertWeight(self.experts[int(expert)])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The parameter [E, N, K] itself."""
        return torch.stack(
            [torch.cat([layer.dense(dtype) for layer in layers]) for layers in self.experts]
        )


class Module(NamedTuple):
    """A quantized module of the checkpoint: its name there, tensors by suffix, places in the model.

    `path` is where its tensors go, `weight` the parameter it stands for, and where that is a stack
    of experts `expert` is its number and `row` its place among the parts of an expert.
    """

    name: str
    tensors: dict[str, Header]
    path: str
    weight: str
    expert: int | None
    row: int


def headers(files: Iterable[str]) -> dict[str, Header]:
    """dtype and shape of every tensor of safetensors files."""
    found: dict[str, Header] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                view = tensors.get_slice(name)
                found[name] = (str(view.get_dtype()), tuple(view.get_shape()))
    return found


@register_quantization_config(METHOD)
class AwqconvConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """quantization_config of a converted folder, kept as it is; `quantization` is its meaning."""

    def __init__(self, **entries: Any) -> None:
        self.__dict__.update(entries)
        self.quantization = Quantization.read(entries)

    def to_dict(self) -> dict[str, Any]:
        """The entries of config.json."""
        return {key: value for key, value in self.__dict__.items() if key != "quantization"}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __repr__(self) -> str:
        return f"AwqconvConfig(target={self.quantization.target.name!r})"


@register_quantizer(METHOD)
class AwqconvQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed layers into a model before its weights are loaded."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises AwqconvError for a transformers that this module does not know."""
        version_of("transformers", **VERSIONS)

    def update_attn_implementation(self, config: Any) -> Any:
        """Called with the model's config before any file is looked for: here is the loader."""
        if getattr(config, WEIGHTS, None) == NEEDS_LOADER:
            delattr(config, WEIGHTS)
        return config

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if not checkpoint_files or not str(checkpoint_files[0]).endswith(".safetensors"):
            raise AwqconvError(
                "packed layers are found in safetensors headers, and there is no such file",
                type(model).__name__,
                "Load the model from the folder that awqconv convert wrote.",
            )
        stacks: dict[str, list[Module]] = defaultdict(list)
        with torch.device("meta"):
            for module in _modules(model, headers(checkpoint_files), self._meaning):
                if module.expert is not None:
                    stacks[module.weight].append(module)
                    continue
                path = module.weight.rpartition(".")[0]
                plain = model.get_submodule(path)
                if not isinstance(plain, nn.Linear):
                    raise _refused(module, f"a {type(plain).__name__} in the model")
                shape = (plain.in_features, plain.out_features)
                model.set_submodule(path, self._layer(module, *shape))
            for weight, modules in stacks.items():
                self._stack(model, weight, modules)
        if stacks:
            model.set_experts_implementation("eager")
        return model

    @property
    def _meaning(self) -> Quantization:
        meaning: Quantization = self.quantization_config.quantization
        return meaning

    def _layer(self, module: Module, K: int, N: int) -> PackedLinear:
        """A packed layer for a module. Raises AwqconvError where its tensors do not fit it."""
        meaning = self._meaning
        target = meaning.named(meaning.fallback.get(module.name))
        scales = module.tensors.get("scales", ("F16", ()))[0]
        linear = meaning.linear(K, N, scales)
        if "bias" in module.tensors:
            linear = replace(linear, bias=module.tensors["bias"][0])
        wanted = stored(target, linear)
        for suffix, header in wanted.items():
            if module.tensors.get(suffix) != header:
                seen = module.tensors.get(suffix, "missing")
                raise _refused(module, f"{suffix} is {seen}, the layout has {header}")
        return PackedLinear(target, linear)

    def _stack(self, model: PreTrainedModel, weight: str, modules: list[Module]) -> None:
        """Replace a parameter [E, N, K] by packed layers."""
        path, _, name = weight.rpartition(".")
        owner = model.get_submodule(path)
        E, N, K = getattr(owner, name).shape
        rows = 1 + max(module.row for module in modules)
        if getattr(owner, "is_transposed", False) or not getattr(owner, "is_concatenated", True):
            raise _refused(modules[0], "experts stored transposed or interleaved")
        if len(modules) != E * rows:
            raise _refused(modules[0], f"{len(modules)} packed layers for {E} experts of {rows}")
        experts: list[list[PackedLinear]] = [[] for _ in range(E)]
        for module in sorted(modules, key=lambda module: module.row):
            layer = self._layer(module, K, N // rows)
            experts[module.expert or 0].append(layer)
            _add(model, module.path, layer)
        delattr(owner, name)
        setattr(owner, name, ExpertStack(experts))
        owner._is_hf_initialized = True  # what is left of it has nothing to draw at random

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        for module in list(model.modules()):
            for name, value in list(vars(module).items()):
                if isinstance(value, ExpertStack):
                    delattr(module, name)
                    setattr(module, name, nn.Parameter(value.dense(dtype), requires_grad=False))
                    for number in {str(expert) for expert in range(len(value.experts))}:
                        module._modules.pop(number, None)
        for path, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                plain = nn.Linear(module.in_features, module.out_features, False, device="meta")
                plain.weight = nn.Parameter(module.dense(dtype), requires_grad=False)
                if module.bias is not None:
                    plain.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
                model.set_submodule(path, plain)
        return model


def _modules(
    model: PreTrainedModel, tensors: dict[str, Header], meaning: Quantization
) -> list[Module]:
    """The quantized modules of the files, with their places under the names of the model."""
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    rows = {
        pattern: row for entry in converters for row, pattern in enumerate(entry.source_patterns)
    }
    names = model.state_dict()

    def rename(name: str) -> tuple[str, str | None]:
        new, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, names
        )
        return str(new), pattern

    by_module: dict[str, dict[str, Header]] = defaultdict(dict)
    for tensor, header in tensors.items():
        owner, _, suffix = tensor.rpartition(".")
        by_module[owner][suffix] = header
    found = []
    for name, suffixes in by_module.items():
        target = meaning.named(meaning.fallback.get(name))
        coded = [part.suffix for part in target.parts(meaning.linear(128, 128)) if part.of == "q"]
        if not coded or coded[0] not in suffixes:
            continue
        path = rename(f"{name}.{coded[0]}")[0].rpartition(".")[0]
        weight, pattern = rename(f"{name}.weight")
        number = None
        if pattern is not None:
            match = re.search(r"\.(\d+)\.[^.]*$", name)
            number = int(match[1]) if match else None
        module = Module(name, suffixes, path, weight, number, rows.get(pattern or "", 0))
        if weight not in names or (pattern is not None and number is None):
            raise _refused(module, f"no parameter {weight} in {type(model).__name__}")
        found.append(module)
    return found


def _add(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer at a path, with plain modules on the way to it."""
    *parents, name = path.split(".")
    at = model
    for parent in parents:
        if parent not in at._modules:
            at.add_module(parent, nn.Module())
        at = at.get_submodule(parent)
    at.add_module(name, layer)


def _refused(module: Module, what: str) -> AwqconvError:
    return AwqconvError(what, module.name, f"This model cannot be served from the folder. {AGAIN}")


def main(arguments: list[str]) -> None:
    """Print a greedy continuation: FOLDER [TEXT]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, *text = arguments
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    inputs = tokenizer(" ".join(text) or "Hello", return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))  # noqa: T201


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])

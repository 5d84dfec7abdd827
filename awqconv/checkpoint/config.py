"""config.json and what it says of quantization: dialects are refused here by name.

Accepted is AutoAWQ's GEMM form at 4 bits, as AutoAWQ, transformers and GPTQModel write it, and
what awqconv itself wrote. Keys and defaults follow transformers' AwqConfig.
"""

from dataclasses import dataclass
from typing import Any

from awqconv.checkpoint.source import Source
from awqconv.checkpoint.strict import parse_json, shown
from awqconv.errors import AwqconvError

CONFIG = "config.json"
MANIFEST = "awqconv.json"
MAX_JSON = 100_000_000

_EXPORT = "Quantize the float model with AutoAWQ, or with another tool's AutoAWQ GEMM export."
_GEMM = "Quantize the float model again with AutoAWQ, quant_config version 'GEMM'."

# What to do about other quant_methods; any other name gets _EXPORT.
_METHODS = {
    "auto-round": "Export it from AutoRound again with format 'auto_awq'.",
    "intel/auto-round": "Export it from AutoRound again with format 'auto_awq'.",
    "compressed-tensors": "It is in an exchange format already. " + _EXPORT,
}


@dataclass(frozen=True)
class QuantConfig:
    """What a checkpoint's config says of its quantization.

    `method` is "awq" or "awqconv", `version` the dialect, for awqconv the target's name, and
    `group_size` is -1 for channelwise. `raw` is the object as it stands in the file.
    """

    method: str
    bits: int
    group_size: int
    zero_point: bool
    version: str
    modules_to_not_convert: tuple[str, ...]
    raw: dict[str, Any]

    def skips(self, module: str) -> bool:
        """Whether an engine takes a module of this name as not quantized: any listed part in it.

        Source: SGLang and vLLM, is_layer_skipped_awq.
        """
        return any(part in module for part in self.modules_to_not_convert)


def read_json(source: Source, file: str, fix: str) -> dict[str, Any]:
    """A file that must be one JSON object. Raises AwqconvError(where=file, fix)."""
    size = source.files().get(file)
    if size is None:
        raise AwqconvError(f"{file} is not there", shown(source.name), fix)
    if size > MAX_JSON:
        raise AwqconvError(f"{size:,} bytes, more than {MAX_JSON:,}", file, fix)
    value = parse_json(source.read(file, 0, size), file, fix)
    if not isinstance(value, dict):
        raise AwqconvError(f"a JSON {type(value).__name__}, not an object", file, fix)
    return value


def read_config(source: Source) -> dict[str, Any]:
    """config.json. Raises AwqconvError where it is missing or no JSON object."""
    files = source.files()
    if CONFIG not in files:
        if any(file.endswith(".gguf") for file in files):
            raise AwqconvError("GGUF files, which are not AWQ", shown(source.name), _EXPORT)
        raise AwqconvError(
            f"no {CONFIG}",
            shown(source.name),
            "Give the folder that holds config.json and the safetensors files.",
        )
    return read_json(source, CONFIG, "Download it again.")


def quant_config(config: dict[str, Any], source: Source) -> QuantConfig:
    """The quantization of a model: config.json's quantization_config, else quant_config.json.

    A multimodal model may have it in a part (text_config). Raises AwqconvError for a model that
    is not quantized, for a method, dialect or bit width that is not AWQ GEMM at 4 bits, by its
    name, and for values of a wrong type.
    """
    raw, where = _find(config, source)
    if MANIFEST in source.files():  # whatever the config says, the manifest says what it is
        return QuantConfig("awqconv", 4, -1, True, "", (), raw)
    lower = {key: value.lower() if isinstance(value, str) else value for key, value in raw.items()}
    method = lower.get("quant_method")
    if not isinstance(method, str):
        raise AwqconvError(
            f"quant_method is {_value(method)}",
            where,
            'If AutoAWQ wrote this model, add "quant_method": "awq".',
        )
    if method not in ("awq", "awqconv"):
        fix = _METHODS.get(method, _EXPORT)
        raise AwqconvError(f"quant_method {shown(method)!r} is not AWQ", where, fix)

    def get(kind: type, default: Any, *keys: str) -> Any:
        given = [(key, lower[key]) for key in keys if lower.get(key) is not None]
        for key, value in given:
            if type(value) is not kind:
                raise AwqconvError(
                    f"{key} is {_value(value)}, not {kind.__name__}", where, "Correct it."
                )
            if value != given[0][1]:
                raise AwqconvError(
                    f"{given[0][0]} {_value(given[0][1])} and {key} {_value(value)} disagree",
                    where,
                    "Remove the wrong one.",
                )
        return given[0][1] if given else default

    version = get(str, "gemm", "version", "format", "checkpoint_format")
    if lower.get("backend") == "llm-awq":
        version = "llm-awq"
    quant = QuantConfig(
        method=method,
        bits=get(int, 4, "bits", "w_bit"),
        group_size=get(int, 128, "group_size", "q_group_size"),
        zero_point=get(bool, True, "zero_point"),
        version=version if method == "awq" else get(str, "", "target"),
        modules_to_not_convert=tuple(get(list, [], "modules_to_not_convert")),
        raw=raw,
    )
    for name in quant.modules_to_not_convert:
        if not isinstance(name, str):
            raise AwqconvError(
                f"modules_to_not_convert holds {_value(name)}, not a name", where, "Correct it."
            )
    if quant.bits != 4:
        raise AwqconvError(f"{_value(quant.bits)} bits; only 4 are supported", where, _EXPORT)
    if quant.version != "gemm" and method == "awq":
        raise AwqconvError(f"unsupported AWQ dialect {shown(quant.version)!r}", where, _GEMM)
    if quant.group_size != -1 and not 1 <= quant.group_size < 1 << 31:
        raise AwqconvError(
            f"group_size {_value(quant.group_size)} is neither -1 (channelwise) nor 1 to 2**31 - 1",
            where,
            "Correct it.",
        )
    return quant


def _value(value: object) -> str:
    """A JSON value as a message prints it."""
    return "missing" if value is None else shown(repr(value), 60)


def _find(config: dict[str, Any], source: Source) -> tuple[dict[str, Any], str]:
    """The object that describes the quantization, and where it stands.

    As in transformers, the one at the top counts before any in a part of the config.
    """
    parts = [(CONFIG, config)] + [
        (f"{CONFIG}: {shown(key)}", part)
        for key, part in config.items()
        if key.endswith("_config") and isinstance(part, dict)
    ]
    for place, part in parts:
        if part.get("quantization_config") is not None:
            raw, where = part["quantization_config"], f"{place}: quantization_config"
            break
    else:
        raw, where = _elsewhere(config, source)
    if not isinstance(raw, dict):
        raise AwqconvError(f"it is {_value(raw)}, not an object", where, "Correct it.")
    return raw, where


def _elsewhere(config: dict[str, Any], source: Source) -> tuple[dict[str, Any], str]:
    """The same where no quantization_config is: in files and keys of other or older tools."""
    files = source.files()
    if "quant_config.json" in files:
        older = read_json(source, "quant_config.json", "Download it again.")
        return {"quant_method": "awq", **older}, "quant_config.json"
    if "compression_config" in config:
        return {"quant_method": "compressed-tensors"}, f"{CONFIG}: compression_config"
    for file, method in (("quantize_config.json", "gptq"), ("hf_quant_config.json", "modelopt")):
        if file in files:
            return {"quant_method": method}, file
    raise AwqconvError("the model is not quantized: no quantization_config", CONFIG, _EXPORT)

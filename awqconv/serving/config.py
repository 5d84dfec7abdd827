"""The quantization_config of a converted folder as a loader reads it: known values or an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from awqconv._version import __version__
from awqconv.errors import AwqconvError
from awqconv.targets import Linear, Target, layout

METHOD = "awqconv"
WHERE = "config.json: quantization_config"
AGAIN = "Convert the checkpoint again with this awqconv."
# transformers only warns of a quantization that it knows no loader of, and goes on with random
# weights. This entry of config.json stops it: it names no safetensors file, and is quoted in the
# error (transformers 5, modeling_utils.py _get_resolved_checkpoint_files). Other engines ignore it.
WEIGHTS = "transformers_weights"
NEEDS_LOADER = f"pip install {METHOD}, and import {METHOD}.serving.transformers before loading"


@dataclass(frozen=True)
class Quantization:
    """How a folder's modules are stored.

    `target` is the layout of quantized modules, `skipped` the names of modules that are not
    quantized (a part of a name is enough), `fallback` the layout of each module that is stored
    otherwise, `group_size` -1 where one group spans all of K.
    """

    target: Target
    group_size: int
    skipped: tuple[str, ...]
    fallback: Mapping[str, str]

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Quantization:
        """Check a quantization_config. Raises AwqconvError for what this version does not know."""

        def expect(key: str, good: bool, fix: str) -> None:
            if not good:
                raise AwqconvError(f"{key} is {raw.get(key)!r}, unknown to {METHOD} {__version__}",
                                   WHERE, fix)  # fmt: skip

        update = f"Install the {METHOD} that wrote the folder, or convert the checkpoint again."
        expect("quant_method", raw.get("quant_method") == METHOD, AGAIN)
        expect("target", isinstance(raw.get("target"), str), AGAIN)
        target = layout(raw["target"])
        expect("layout_version", raw.get("layout_version") == target.version, update)
        expect("bits", raw.get("bits") == 4, AGAIN)
        expect("zero_point", raw.get("zero_point") is True, AGAIN)
        expect(
            "form",
            raw.get("form", "hf") == "hf",
            "Loaders read the form hf; the form sglang-sharded is for SGLang's own "
            "--load-format sharded_state.",
        )
        group = raw.get("group_size")
        expect("group_size", isinstance(group, int) and (group == -1 or group > 0), AGAIN)
        skipped, fallback = raw.get("modules_to_not_convert"), raw.get("fallback")
        expect("modules_to_not_convert", isinstance(skipped, list | None), AGAIN)
        expect("fallback", isinstance(fallback, dict | None), AGAIN)
        try:
            layouts = {str(name): layout(entry["layout"]).name for name, entry in
                       (fallback or {}).items()}  # fmt: skip
        except (KeyError, TypeError):
            raise AwqconvError("an entry of fallback names no layout", WHERE, AGAIN) from None
        return cls(target, int(raw["group_size"]), tuple(map(str, skipped or ())), layouts)

    def skips(self, module: str) -> bool:
        """Whether a module is not quantized, by its name alone.

        Source: SGLang and vLLM, is_layer_skipped_awq.
        """
        return any(part in module for part in self.skipped)

    def named(self, fallback: str | None) -> Target:
        """The layout of a quantized module, given its entry in `fallback`; bf16 has no words."""
        return layout(fallback) if fallback else self.target

    def linear(self, K: int, N: int, scales: str = "F16") -> Linear:
        """A quantized layer of this shape."""
        return Linear(K, N, K if self.group_size == -1 else self.group_size, scales)


def version_of(engine: str, *, at_least: str, below: str) -> str:
    """The installed version of an engine. Raises AwqconvError where its loader was never run there.

    `at_least` and `below` are dotted numbers.
    """
    found = metadata.version(engine)
    if not _numbers(at_least) <= _numbers(found) < _numbers(below):
        raise AwqconvError(
            f"{engine} {found} is not one of the versions {METHOD} {__version__} knows: "
            f"{at_least} and later, before {below}",
            fix=f'pip install "{engine}>={at_least},<{below}", or a newer {METHOD}',
        )
    return found


def _numbers(version: str) -> tuple[int, ...]:
    release = version.split("+", maxsplit=1)[0].split(".")
    return tuple(int(part) for part in release if part.isdigit())

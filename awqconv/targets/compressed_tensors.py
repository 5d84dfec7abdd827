"""compressed-tensors pack-quantized, asymmetric: the exchange format of vLLM and llm-compressor.

weight_packed int32 [N, K/8], weight_zero_point int32 [N/8, G], weight_scale [N, G],
weight_shape int64 [2] = (N, K). Source: PackedQuantizationCompressor.compress.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awqconv.repack import layouts
from awqconv.targets.base import Linear, Part, Rule, Target


class CompressedTensors(Target):
    name = "compressed-tensors"
    title = "compressed-tensors pack-quantized: vLLM, transformers, llm-compressor"
    rules = (Rule("K % 8 == 0", "compressed_tensors pack_to_int32"),)
    fallback = "bf16"

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        return (
            Part("weight_packed", "q", layouts.COLUMNS, "I32"),
            Part("weight_zero_point", "z", layouts.CT_ZEROS, "I32"),
            Part("weight_scale", "s", layouts.TRANSPOSED, linear.scales),
        )

    def constants(self, linear: Linear) -> Mapping[str, NDArray[np.generic]]:
        return {"weight_shape": np.array([linear.N, linear.K], "<i8")}

    def quantization_config(self, common: dict[str, Any]) -> dict[str, Any]:
        group = common["group_size"]
        return {
            "config_groups": {
                "config_group_0": {
                    "format": "pack-quantized",
                    "input_activations": None,
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {
                        "dynamic": False,
                        "group_size": group if group > 0 else None,
                        "num_bits": 4,
                        "strategy": "group" if group > 0 else "channel",
                        "symmetric": False,
                        "type": "int",
                    },
                }
            },
            "format": "pack-quantized",
            "global_compression_ratio": None,
            "ignore": common["unquantized"],
            "kv_cache_scheme": None,
            "moe_sparsity_config": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }


TARGET = CompressedTensors()

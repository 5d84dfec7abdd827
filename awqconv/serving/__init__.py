"""Loaders: a converted folder in transformers, vLLM and SGLang without a repack at load.

    config        what a converted folder's quantization_config says, checked
    ops           one packed layer on a device and what multiplies by it there
    slicing       how a packed tensor is cut and joined over tensor parallel ranks
    transformers  the quantizer; import it once before from_pretrained
    vllm, sglang  plugins that the engines find by themselves, through entry points
    launch        the commands that serve a converted folder

An engine is imported by its own module here and nowhere else. Without this package installed vLLM
and SGLang refuse a converted folder: "Unknown quantization method: awqconv". transformers would
only warn and draw random weights; an entry of config.json stops it, in an error that names the
package (config.NEEDS_LOADER).
"""

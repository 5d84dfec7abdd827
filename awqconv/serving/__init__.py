"""Loaders: a converted folder in transformers, vLLM and SGLang without a repack at load.

    config        what a converted folder's quantization_config says, checked
    ops           one packed layer on a device and what multiplies by it there
    transformers  the quantizer; import it once before from_pretrained
    vllm, sglang  plugins that the engines find by themselves, through entry points
    launch        the commands that serve a converted folder

An engine is imported by its own module here and nowhere else.
"""

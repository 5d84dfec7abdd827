"""Forms: which tensors a converted checkpoint holds, and under what names.

    hf              one file layout for any loader: every module under its own name
    sglang-sharded  a file for each tensor-parallel rank, as SGLang holds its parameters

A form turns a model and a target into jobs; it is data about names and shares, no bytes move here.
"""

"""Mixtures of experts by the names of their modules.

    block_sparse_moe.experts.N.w1 w3 w2               Mixtral
    mlp.experts.N.gate_proj up_proj down_proj         Qwen2-MoE, Qwen3-MoE, DeepSeek, OLMoE
    experts.gate_up_proj down_proj, stacked [E, ..]   fused checkpoints

Shared experts (mlp.shared_expert, mlp.shared_experts) are dense layers to the engines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from awqconv.checkpoint.model import Stored
from awqconv.targets.base import Mixture

ROLES = {
    "w1": "gate", "w3": "up", "w2": "down",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Experts:
    """The modules of one layer's experts. `mixture` is None where their names are not known, or
    where, as `uneven` says, they are not all of one shape."""

    prefix: str
    names: tuple[str, ...]
    mixture: Mixture | None
    uneven: str | None = None


def split(name: str) -> tuple[str, int | None, str] | None:
    """(prefix with .experts, number, projection) of an expert's module, None for other modules."""
    prefix, found, rest = name.partition(".experts.")
    if not found:
        return None
    number, dot, last = rest.partition(".")
    if dot and number.isdecimal():
        return f"{prefix}.experts", int(number), last
    return f"{prefix}.experts", None, rest


def mixtures(sources: Mapping[str, Stored]) -> Iterator[Experts]:
    """The expert modules of a checkpoint, a layer at a time."""
    layers: dict[str, list[tuple[int | None, str, Stored]]] = {}
    for name, source in sources.items():
        if found := split(name):
            prefix, number, last = found
            layers.setdefault(prefix, []).append((number, last, source))
    for prefix, members in layers.items():
        names = tuple(source.name for _, _, source in members)
        shapes: dict[tuple[int, int, int], str] = {}
        known = True
        for _, last, source in members:
            linear, role = source.linear, ROLES.get(last, "")
            known &= bool(role)
            if role == "down":
                shape = (linear.N, linear.K, linear.g)
            else:
                shape = (linear.K, linear.N // (2 if role == "gate_up" else 1), linear.g)
            shapes.setdefault(shape, source.name)
        numbers = {number for number, _, _ in members}
        count = members[0][2].experts if numbers == {None} else len(numbers)
        if known and len(shapes) == 1:
            yield Experts(prefix, names, Mixture(*next(iter(shapes)), count))
            continue
        uneven = None
        if known:
            seen = [f"{n} H = {s[0]}, I = {s[1]}, g = {s[2]}" for s, n in shapes.items()]
            uneven = f"all experts of a layer alike ({seen[0]}; {seen[1]})"
        yield Experts(prefix, names, None, uneven)


def misread(mixture: Mixture, tp: int) -> bool:
    """Whether engines that load the AWQ original over `tp` ranks put w13's Marlin scales in the
    wrong order: they ask g < I of a rank, where the rows there are follow from g < H.

    Source: SGLang AWQMoEKernel.process_weights_after_loading (to 0.5.23) and vLLM (PR 50196).
    """
    if mixture.I % tp:
        return False
    return (mixture.g < mixture.I // tp) != (mixture.g < mixture.H)

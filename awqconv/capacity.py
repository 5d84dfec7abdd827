"""How many tensor-parallel ranks a checkpoint can be shared by, from its headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from awqconv.checkpoint.header import DTYPE_BITS
from awqconv.checkpoint.model import Model, Stored
from awqconv.errors import AwqconvError
from awqconv.forms import hf, sglang
from awqconv.jobs import Verdict, specs
from awqconv.targets.base import Target

RANKS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Capacity:
    """What `tp` ranks make of a checkpoint in a target's layout.

    `fallbacks` are the modules of which a rank's share breaks a rule of the kernels, so that the
    engine takes its fallback; `refused` says of what cannot be shared at all, with the reason.
    `nbytes` are those of one rank's tensors, what is refused left out.
    """

    tp: int
    modules: int
    fallbacks: list[Verdict] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    nbytes: int = 0

    @property
    def loads(self) -> bool:
        """Whether an engine can be started with so many ranks."""
        return not self.refused


def capacity(model: Model, target: Target, tps: Sequence[int] = RANKS) -> list[Capacity]:
    """What each number of ranks would make of an opened model. Reads nothing but its headers.

    Ranks share tensors as SGLang shares them; of an architecture that is not known there, only a
    single rank is looked at. Raises AwqconvError for numbers below 1.
    """
    if min(tps, default=1) < 1:
        raise AwqconvError(f"{min(tps)} tensor-parallel ranks", fix="Give --tp 1 or more.")
    sources = {name: module.original() for name, module in model.modules.items()}
    return [_one(model, target, sources, tp) for tp in tps]


def _one(model: Model, target: Target, sources: dict[str, Stored], tp: int) -> Capacity:
    try:
        shared, problems = sglang.try_first(model, sources, target, tp)
        verdicts, jobs = shared.verdicts, shared.ranks[0]
    except AwqconvError as error:
        if tp > 1:
            return Capacity(tp, len(sources), refused=[(error.where, error.what)])
        linears = {name: source.linear for name, source in sources.items()}
        verdicts, problems = hf.decide(sources, linears, target), []
        jobs = list(hf.jobs(model, sources, verdicts))
    return Capacity(
        tp,
        len(sources),
        [verdict for verdict in verdicts.values() if verdict.rule],
        [(error.where, error.what) for error in problems],
        sum(prod(shape) * DTYPE_BITS[dtype] // 8 for _, dtype, shape in specs(jobs)),
    )

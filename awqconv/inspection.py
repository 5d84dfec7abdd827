"""What a checkpoint is and what a target would make of it, from headers alone."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from awqconv.capacity import Capacity, capacity
from awqconv.checkpoint.model import Model, Stored, open_model
from awqconv.checkpoint.source import Source
from awqconv.errors import AwqconvError
from awqconv.hub import PREFIX
from awqconv.plan import Verdict, verdicts
from awqconv.targets.base import layout


@dataclass(frozen=True, slots=True)
class Kind:
    """Modules that differ only by layer or expert number: `name` has * for each number."""

    name: str
    count: int
    K: int
    N: int
    g: int
    layout: str
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is. Sizes in bytes; `group_size` is the config's, -1 for channelwise.

    `to_download` is what a conversion of a model on the hub downloads, with its other files.
    `ranks` says what numbers of tensor-parallel ranks would make of it, where asked for.
    `verdicts` and `target` are there if a target was asked for: what it would do with each module.
    """

    path: str
    layout: str
    bits: int
    group_size: int
    quantized: int
    others: int
    quantized_bytes: int
    nbytes: int
    shards: int
    kinds: list[Kind]
    modules_to_not_convert: list[str]
    notes: list[str]
    target: str | None = None
    verdicts: list[Verdict] | None = None
    to_download: int = 0
    ranks: list[Capacity] = field(default_factory=list)

    @property
    def taken(self) -> int:
        """Number of modules that the target's kernels take."""
        return sum(not v.rule for v in self.verdicts or [])


def inspect(
    model: str | os.PathLike[str] | Source, *, target: str | None = None, tp: Sequence[int] = ()
) -> Inspection:
    """Inspect a checkpoint's headers; with `target`, say for each module what it would become.

    `tp`: numbers of tensor-parallel ranks to say what fits for, and the bytes of a rank.

    Raises AwqconvError for a checkpoint that `convert` would refuse to read, and for `tp` without
    a target.
    """
    if tp and not target:
        raise AwqconvError("--tp says nothing without a target", fix="Add --target.")
    opened = open_model(model)
    try:
        return _inspect(opened, target, tp)
    finally:
        opened.checkpoint.source.close()


def _inspect(opened: Model, target: str | None, tp: Sequence[int]) -> Inspection:
    counts: Counter[tuple[str, int, int, int, str]] = Counter()
    sizes: defaultdict[tuple[str, int, int, int, str], Fraction] = defaultdict(Fraction)
    for module in opened.modules.values():
        linear = module.linear
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", module.name)
        key = (name, linear.K, linear.N, linear.g, _layout(opened, module))
        counts[key] += module.experts
        sizes[key] += sum(
            (p.rows[1] - p.rows[0]) * (p.cols[1] - p.cols[0]) * _each(p.source)
            for pieces in opened.pieces(module)
            for p in pieces
        )
    tensors = [*opened.checkpoint.tensors.values()]
    if opened.ranks:
        tensors = [*opened.plain, *(i for m in opened.ranks.values() for i in m.tensors.values())]
    decided = None
    ranks: list[Capacity] = []
    if target:
        chosen = layout(target)
        sources = {name: module.original() for name, module in opened.modules.items()}
        decided = list(verdicts(sources, chosen, "keep").values())
        ranks = capacity(opened, chosen, tp) if tp else []
    name = opened.checkpoint.source.name
    return Inspection(
        name,
        opened.layout,
        4,
        opened.quantization.group_size,
        len(opened.modules),
        len(opened.others),
        round(sum(sizes.values())),
        sum(info.nbytes for info in tensors),
        len(opened.checkpoint.shards),
        [
            Kind(name, n, K, N, g, how, round(sizes[key]))
            for key, n in counts.items()
            for name, K, N, g, how in [key]
        ],
        list(opened.quantization.modules_to_not_convert),
        opened.notes,
        target,
        decided,
        sum(opened.checkpoint.files.values()) if name.startswith(PREFIX) else 0,
        ranks,
    )


def _layout(opened: Model, module: Stored) -> str:
    """A module's layout; in a sharded folder its shares', as the manifest has it."""
    if not opened.manifest:
        return module.layout
    said: str = opened.manifest["modules"][module.name]["layout"]
    return said


def _each(module: Stored) -> Fraction:
    """Stored bytes of a module for each element of its weight."""
    size = sum(info.nbytes for info in module.tensors.values())
    return Fraction(size, module.linear.K * module.linear.N * module.experts)

"""How an engine's loader may cut and join a packed tensor, read off its pattern.

The outermost axis of a logical dimension is the outermost axis of one stored dimension. A slice at
that axis' steps is a slice of the stored tensor, and slices joined along it are the join of their
weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from awqconv.errors import AwqconvError
from awqconv.repack import layouts
from awqconv.repack.axes import Pattern
from awqconv.targets import Linear, Part, Target


@dataclass(frozen=True)
class Cut:
    """Along which stored dimensions a tensor is cut, and at what steps.

    `rows`, `columns`: the stored dimensions of K (or G) and N. `factor`: columns of the weight to
    one step of the stored dimension. `row_step`, `column_step`: the least slice, in rows (or
    groups) and in columns.
    """

    rows: int
    columns: int
    factor: Fraction
    row_step: int
    column_step: int


def cut(part: Part, linear: Linear) -> Cut:
    """How a part's stored tensor may be cut. Raises ValueError where its pattern forbids it."""
    layout = part.layout(linear)
    places, steps = [], []
    for dim in (0, 1):
        outer = max((axis for axis in layout.axes if axis.dim == dim), key=lambda a: a.logical)
        place = next(i for i, group in enumerate(part.pattern.right) if outer.name in group)
        if part.pattern.right[place][0] != outer.name:
            raise ValueError(f"{part.pattern} is not outermost by {outer.name}: no slice is one")
        places.append(place)
        steps.append(outer.logical)
    factor = Fraction(linear.N, part.shape(linear)[places[1]])
    return Cut(places[0], places[1], factor, *steps)


def check_rank(target: Target, whole: Linear, rank: Linear, columns: list[int], name: str) -> None:
    """Refuse a tensor parallel split whose ranks do not hold whole tiles and groups.

    `columns` are the sizes along N of the modules that the engine joined into this layer. Raises
    AwqconvError.
    """
    fix = "Serve with fewer tensor parallel ranks: awqconv inspect says how many fit."
    if rank.K % rank.g:
        raise AwqconvError(f"K = {rank.K} of a rank is no multiple of g = {rank.g}", name, fix)
    for part in target.parts(whole):
        at = cut(part, whole)
        rows = rank.K if part.of == "q" else rank.G
        if rank.K != whole.K and rows % at.row_step:
            raise AwqconvError(
                f"{rows} rows of a rank's {part.suffix} are no multiple of {at.row_step}", name, fix
            )
        for count in columns:
            if count % at.column_step:
                raise AwqconvError(
                    f"{count} columns of a rank's {part.suffix} are no multiple of "
                    f"{at.column_step}", name, fix,
                )  # fmt: skip
    if rule := target.broken(rank):
        raise AwqconvError(f"a rank breaks {rule}", name, fix)


def reorder(scales: Tensor, was: Pattern, becomes: Pattern) -> Tensor:
    """Scales [..., N] of one group from one order along N to another."""
    shape = (1, scales.shape[-1])
    old, new = (torch.from_numpy(p.bind(shape).offsets(1)) for p in (was, becomes))
    order = torch.empty_like(old)
    order[new] = old
    return scales[..., order.to(scales.device)].contiguous()


def copy_expert(into: Tensor, loaded: Tensor, shard: str, at: Cut, rank: int) -> None:
    """Copy a rank's part of one expert's tensor: w1 (gate) and w3 (up) by columns, w2 by rows."""
    if shard == "w2":
        dim, size = at.rows, into.shape[at.rows]
    else:
        dim, size = at.columns, into.shape[at.columns] // 2
        into = into.narrow(dim, 0 if shard == "w1" else size, size)
    if loaded.shape[dim] != size:
        loaded = loaded.narrow(dim, rank * size, size)
    into.copy_(loaded)


def release(layer: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Put plain parameters in the place of the loader's; the tensors, by name."""
    packed: dict[str, Tensor] = {}
    for name in names:
        packed[name] = getattr(layer, name).data
        setattr(layer, name, nn.Parameter(packed[name], requires_grad=False))
    return packed


def single_group(scales: Tensor) -> Tensor:
    """Marlin scales [1, N] of a rank left with one of several groups, in the one-group order."""
    return reorder(scales, layouts.MARLIN_SCALES, layouts.MARLIN_SCALES_SINGLE)


def marlin_bias(bias: Tensor) -> Tensor:
    """A bias [N] in the order of vLLM's Marlin GEMM: marlin_utils.py marlin_permute_bias."""
    return reorder(bias, layouts.PLAIN, layouts.MARLIN_SCALES_SINGLE)

"""Axis patterns: a weight layout is a permutation of the index digits of one logical array.

    Pattern("k (nw pair odd) -> k nw (odd pair)", pair=4, odd=2)

The left side splits each logical dimension into axes, outermost first; the right side lists the
same axes in storage order, grouped as the stored tensor's dimensions. Elements lie in row-major
order of the right side, so an axis has one stride on each side and the position of an element is
a sum over its axes' digits. Everything the package knows of a layout (pack, unpack, repack, slice
rules, kernel addresses) is read off those strides.

    >>> p = Pattern("k (nw pair odd) -> k nw (odd pair)", pair=4, odd=2)
    >>> [axis.name for axis in p.bind((2, 16)).axes]
    ['k', 'nw', 'odd', 'pair']
    >>> p.bind((2, 16)).offsets(1)[:8].tolist()      # where columns 0..7 lie: AutoAWQ's 0 4 1 5 ...
    [0, 4, 1, 5, 2, 6, 3, 7]
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from awqconv.errors import AwqconvError

Group = tuple[str, ...]


class Axis(NamedTuple):
    """One digit of an index: `size` values, `dim`-th logical dimension, strides in elements."""

    name: str
    size: int
    dim: int
    logical: int  # stride within its logical dimension
    stored: int  # stride in storage


def _groups(side: str) -> tuple[Group, ...]:
    return tuple(
        tuple(token.strip("()").split()) for token in re.findall(r"\([^()]*\)|[^\s()]+", side)
    )


class Pattern:
    """A layout before shapes are known. Sizes are given for every axis but one per dimension.

    For packed codes the last group on the right is the nibbles of one storage word, lowest first,
    and `pad` counts the nibbles of other data after each row (the group before the last).

    Raises ValueError for a text that is no pattern: these are written by programmers.
    """

    def __init__(self, text: str, pad: int = 0, **sizes: int) -> None:
        left, arrow, right = text.partition("->")
        self.text, self.pad, self.sizes = text, pad, dict(sizes)
        self.left, self.right = _groups(left), _groups(right)
        names = [name for group in self.left for name in group]
        if not arrow or sorted(names) != sorted(name for group in self.right for name in group):
            raise ValueError(f"both sides of {text!r} must hold the same axes")
        if len(set(names)) != len(names) or not set(sizes) <= set(names):
            raise ValueError(f"axes of {text!r} are repeated, or a size names none of them")
        for group in self.left:
            if sum(name not in sizes for name in group) > 1:
                raise ValueError(f"{text!r} leaves two sizes of ({' '.join(group)}) open")
        self._key = text, pad, tuple(sorted(sizes.items()))

    def __repr__(self) -> str:
        return f"Pattern({self.text!r}, pad={self.pad}, {self.sizes})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def granule(self, dim: int) -> int:
        """Elements of logical dimension `dim` that the given sizes multiply to."""
        return prod(self.sizes.get(name, 1) for name in self.left[dim])

    def bind(self, shape: tuple[int, ...]) -> Layout:
        """The layout of an array of this shape. Raises AwqconvError if it does not divide."""
        return _bind(self, tuple(shape))


@lru_cache(maxsize=4096)
def _bind(pattern: Pattern, shape: tuple[int, ...]) -> Layout:
    if len(shape) != len(pattern.left):
        raise ValueError(f"{pattern.text!r} takes {len(pattern.left)} dimensions, not {shape}")
    sizes = dict(pattern.sizes)
    logical: dict[str, tuple[int, int]] = {}
    for dim, (group, length) in enumerate(zip(pattern.left, shape, strict=True)):
        known = pattern.granule(dim)
        open_axis = [name for name in group if name not in pattern.sizes]
        if length % known or (not open_axis and length != known):
            raise AwqconvError(
                f"a dimension of {length} does not split as ({' '.join(group)}), granule {known}",
                fix="this layout cannot hold the shape",
            )
        sizes.update(dict.fromkeys(open_axis, length // known))
        stride = 1
        for name in reversed(group):
            logical[name] = (dim, stride)
            stride *= sizes[name]
    axes: list[Axis] = []
    stride = 1
    for place, group in enumerate(reversed(pattern.right)):
        for name in reversed(group):
            axes.append(Axis(name, sizes[name], *logical[name], stride))
            stride *= sizes[name]
        if place == 1:
            stride += pattern.pad
    stored = tuple(prod(sizes[name] for name in group) for group in pattern.right)
    return Layout(shape, stored, tuple(reversed(axes)))


@lru_cache(maxsize=4096)
def _outermost(axes: tuple[Axis, ...], dim: int) -> Axis:
    return max((axis for axis in axes if axis.dim == dim), key=lambda axis: axis.logical)


class Layout(NamedTuple):
    """A pattern bound to a shape. `axes` are in storage order, outermost first.

    `shape` is the logical shape, `stored` the storage shape in elements (padding left out),
    `offset` the storage position of the logical element 0, not 0 only for a slice.
    """

    shape: tuple[int, ...]
    stored: tuple[int, ...]
    axes: tuple[Axis, ...]
    offset: int = 0

    def slice(self, dim: int, start: int, stop: int) -> Layout:
        """The part start..stop of one logical dimension, with the strides of the whole.

        Raises ValueError where the ends are no multiples of the dimension's granule.
        """
        outer = _outermost(self.axes, dim)
        if (
            start % outer.logical
            or stop % outer.logical
            or not 0 <= start < stop <= self.shape[dim]
        ):
            raise ValueError(f"{start}..{stop} is no slice of {self.shape} at {outer.logical}")
        part = outer._replace(size=(stop - start) // outer.logical)
        return Layout(
            tuple(stop - start if d == dim else n for d, n in enumerate(self.shape)),
            self.stored,
            tuple(part if axis == outer else axis for axis in self.axes),
            self.offset + start // outer.logical * outer.stored,
        )

    def offsets(self, dim: int) -> NDArray[np.int64]:
        """Storage offset of each index of one logical dimension, int64 [shape[dim]].

        An element's offset is the sum of its dimensions' offsets: positions are separable.
        """
        index = np.arange(self.shape[dim], dtype=np.int64)
        out = np.zeros_like(index)
        for axis in self.axes:
            if axis.dim == dim:
                out += index // axis.logical % axis.size * axis.stored
        return out

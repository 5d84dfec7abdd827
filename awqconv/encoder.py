"""Encoding: an output module from pieces of stored modules, as a stream of tiles.

Conversion writes the tiles, verification compares them: what a layout means is in one place. Only
a layout that stores columns together while its source stores rows (or the reverse) wants more than
a tile of memory: the source tensor is then held whole if there is room, and else read in strips.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import lcm

import numpy as np
from numpy.typing import NDArray

from awqconv.digest import Hasher
from awqconv.feed import TILE, Feed, Reader
from awqconv.plan import Piece
from awqconv.repack.axes import Layout
from awqconv.repack.encode import NIBBLES, dequantize, read_numbers, read_zeros, recode
from awqconv.repack.floats import caster, from_float32, to_float32
from awqconv.repack.reference import unpack_nibbles
from awqconv.targets.base import Linear, Part, Target

Bytes = NDArray[np.uint8]


class Encoder:
    """Encodes what `reader` reads; `share`: bytes of memory that one thread may use."""

    def __init__(self, reader: Reader, share: int) -> None:
        self.reader, self.share = reader, share

    def _tiles(self, part: Part, to: Layout, feeds: list[Feed]) -> tuple[int, range]:
        """The dimension to cut an output part along, and where the cuts are."""
        outer = to.axes[0]
        dim, row = outer.dim, outer.stored * part.bits // 8
        grain = outer.logical
        for feed in feeds:
            grain = lcm(grain, max(a.logical for a in feed.layout.axes if a.dim == dim))
        step = max(1, TILE * outer.logical // row // grain) * grain
        return dim, range(0, to.shape[dim], step)

    def tiles(
        self,
        target: Target,
        part: Part,
        linear: Linear,
        pieces: Sequence[Piece],
        hashers: dict[str, Hasher],
    ) -> Iterator[Bytes]:
        """The bytes of one part of one layer, in order, in buffers that the next tile reuses.

        `hashers` collects digests of the source tensors, by name, as far as they are read in order.
        """
        if part.of == "w":
            yield from self._dense(part, linear, pieces, hashers)
        else:
            yield from self._part(target, part, linear, pieces, hashers)

    def _feeds(
        self, pieces: Sequence[Piece], of: str, hashers: dict[str, Hasher], budget: int
    ) -> list[Feed]:
        budget //= len(pieces)
        return [
            Feed(self.reader, p.source, of, hashers, budget=budget, expert=p.expert, slot=slot)
            for slot, p in enumerate(pieces)
        ]

    def _part(
        self,
        target: Target,
        part: Part,
        linear: Linear,
        pieces: Sequence[Piece],
        hashers: dict[str, Hasher],
    ) -> Iterator[Bytes]:
        to = part.layout(linear)
        feeds = self._feeds(pieces, part.of, hashers, self.share - 3 * TILE)
        dim, cuts = self._tiles(part, to, feeds)
        unit = 1 if part.of == "q" else linear.g
        zeros = self._zeros(pieces, linear, hashers) if part.pattern.pad else None
        for start in cuts:
            stop = min(start + cuts.step, to.shape[dim])
            shape = tuple(stop - start if d == dim else n for d, n in enumerate(to.shape))
            tile = part.pattern.bind(shape)
            outer = tile.axes[0]
            buffer = self.reader.arena.take("output", outer.size * outer.stored * part.bits // 8)
            for piece, feed in zip(pieces, feeds, strict=True):
                first, into = _intersect(piece, tile, dim, start, stop, unit)
                if into is None:
                    continue
                source, at = feed.window(dim, *first)
                other = 1 - dim
                span = (piece.rows, piece.cols)[other]
                scale = unit if other == 0 else 1
                low, high = span[0] // scale, span[1] // scale
                if (low, high) != (0, at.shape[other]):
                    at = at.slice(other, low, high)
                scales = linear.scales if part.of == "s" else "F32"
                recode(source, feed.part, at, buffer, part, into, scales)
            if zeros is not None:
                target.derive(part, linear, buffer, zeros[:, start:stop])
            yield buffer

    def _zeros(self, pieces: Sequence[Piece], linear: Linear, hashers: dict[str, Hasher]) -> Bytes:
        """Zero points 0..15 of one expert, uint8 [G, N]."""
        zeros = np.empty(linear.shape("z"), np.uint8)
        for piece, feed in zip(pieces, self._feeds(pieces, "z", hashers, self.share), strict=True):
            source, at = feed.window(0, 0, feed.layout.shape[0])
            rows = unpack_nibbles(read_zeros(source, feed.part, at))
            g = piece.source.linear.g
            part = rows[piece.rows[0] // g : piece.rows[1] // g, slice(*piece.cols)]
            k, n = piece.at[0] // g, piece.at[1]
            zeros[k : k + part.shape[0], n : n + part.shape[1]] = part
        return zeros

    def _dense(
        self, part: Part, linear: Linear, pieces: Sequence[Piece], hashers: dict[str, Hasher]
    ) -> Iterator[Bytes]:
        """The dequantized weight [N, K], some columns of it at a time."""
        feeds = {of: self._feeds(pieces, of, hashers, self.share // 4) for of in "qzs"}
        grain = lcm(*(max(a.logical for a in f.layout.axes if a.dim == 1) for f in feeds["q"]), 8)
        step = max(1, TILE // 4 // linear.K // grain) * grain
        for start in range(0, linear.N, step):
            stop = min(start + step, linear.N)
            weight = np.empty((linear.K, stop - start), np.float32)
            for i, piece in enumerate(pieces):
                low, high = max(start, piece.at[1]), min(stop, piece.at[1] + _width(piece.cols))
                if low >= high:
                    continue
                cols = [c - piece.at[1] + piece.cols[0] for c in (low, high)]
                q, z, s = (feeds[of][i] for of in "qzs")
                source, at = q.window(1, *cols)
                nibbles = np.empty((at.shape[0], at.shape[1] // 2), np.uint8)
                as_rows = Part("", "q", NIBBLES, "U8")
                recode(source, q.part, at, nibbles.reshape(-1), as_rows, NIBBLES.bind(at.shape))
                zeros = read_zeros(*_args(z, cols))
                scales = read_numbers(*_args(s, cols))
                raw = caster(s.part.dtype, linear.scales)(scales)
                g = piece.source.linear.g
                block = dequantize(nibbles, zeros, to_float32(raw, linear.scales), g)
                k = piece.at[0]
                rows = block[slice(*piece.rows)]
                weight[k : k + rows.shape[0], low - start : high - start] = rows
            raw = from_float32(np.ascontiguousarray(weight.T), part.dtype)
            yield raw.reshape(-1).view(np.uint8)


def _width(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _args(feed: Feed, cols: list[int]) -> tuple[Bytes, Part, Layout]:
    source, at = feed.window(1, *cols)
    return source, feed.part, at


def _intersect(
    piece: Piece, tile: Layout, dim: int, start: int, stop: int, unit: int
) -> tuple[tuple[int, int], Layout | None]:
    """What a tile start..stop of `dim` takes of a piece, and its place in the tile."""
    scale = (unit, 1)
    spans = [
        (low // scale[d], high // scale[d])
        for d, (low, high) in enumerate((piece.rows, piece.cols))
    ]
    at = [place // scale[d] for d, place in enumerate(piece.at)]
    low, high = max(start, at[dim]), min(stop, at[dim] + _width(spans[dim]))
    if low >= high:
        return (0, 0), None
    shift = spans[dim][0] - at[dim]
    into = tile if (low, high) == (start, stop) else tile.slice(dim, low - start, high - start)
    other = 1 - dim
    width = _width(spans[other])
    if width != tile.shape[other]:
        into = into.slice(other, at[other], at[other] + width)
    return (low + shift, high + shift), into

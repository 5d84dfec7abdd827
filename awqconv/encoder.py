"""Encoding: an output module from pieces of stored modules, as a stream of tiles.

Conversion writes the tiles, verification compares them: what a layout means is in one place. Only
a layout that stores columns together while its source stores rows (or the reverse) wants more than
a tile of memory: the source tensor is then held whole if there is room, and else read in strips.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd, lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awqconv.checkpoint.header import TensorInfo
from awqconv.checkpoint.model import Piece
from awqconv.digest import Hasher
from awqconv.errors import AwqconvError
from awqconv.feed import TILE, Feed, Reader
from awqconv.repack.axes import Layout
from awqconv.repack.codegen import LINE
from awqconv.repack.encode import (
    NIBBLES,
    dequantize,
    read_numbers,
    read_zeros,
    recode,
    write_numbers,
    write_zeros,
)
from awqconv.repack.floats import RAW, caster, from_float32, to_float32
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
        # Where there is room for it, a cut is also one of cache lines of what lies along the cut:
        # in two tiles if need be where less would be read of each line of the source.
        line = lcm(grain, LINE * 8 // part.bits)
        room = TILE * outer.logical // row
        across = any(feed.layout.axes[0].dim != dim for feed in feeds)
        lines = room // line or (across and 2 * room // line)
        step = lines * line or max(1, room // grain) * grain
        return dim, range(0, to.shape[dim], step)

    def tiles(
        self,
        target: Target,
        part: Part,
        linear: Linear,
        pieces: Sequence[Piece],
        hashers: dict[TensorInfo, Hasher],
    ) -> Iterator[Bytes]:
        """The bytes of one part of one layer, in order, in buffers that the next tile reuses.

        `hashers` collects digests of the source tensors as far as they are read in order.
        """
        if part.of == "w":
            yield from self._dense(part, linear, pieces, hashers)
        else:
            yield from self._part(target, part, linear, pieces, hashers)

    def _feeds(
        self, pieces: Sequence[Piece], of: str, hashers: dict[TensorInfo, Hasher], budget: int
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
        hashers: dict[TensorInfo, Hasher],
    ) -> Iterator[Bytes]:
        to = part.layout(linear)
        feeds = self._feeds(pieces, part.of, hashers, self.share - 4 * TILE)
        dim, cuts = self._tiles(part, to, feeds)
        moves = _moves(pieces, part.of, linear.g)
        fits = all(_fits(move, feeds[move.slot].layout, to, dim) for move in moves)
        put = self._put if fits else self._put_loose
        zeros = self.zeros(pieces, linear, hashers) if part.pattern.pad else None
        for start in cuts:
            stop = min(start + cuts.step, to.shape[dim])
            shape = tuple(stop - start if d == dim else n for d, n in enumerate(to.shape))
            tile = part.pattern.bind(shape)
            outer = tile.axes[0]
            buffer = self.reader.arena.take("output", outer.size * outer.stored * part.bits // 8)
            here = [cut for move in moves if (cut := move.cut(dim, start, stop))]
            put(part, linear, dim, tile, buffer, here, feeds)
            if zeros is not None:
                target.derive(part, linear, buffer, zeros[:, start:stop])
            yield buffer

    def _put(
        self,
        part: Part,
        linear: Linear,
        dim: int,
        tile: Layout,
        buffer: Bytes,
        moves: Sequence[Move],
        feeds: Sequence[Feed],
    ) -> None:
        """Write the moves of a tile, each from its place in one layout to that in the other."""
        other = 1 - dim
        scales = linear.scales if part.of == "s" else "F32"
        for move in moves:
            feed = feeds[move.slot]
            low, size, rest = move.source[dim], move.shape[dim], move.shape[other]
            source, at = feed.window(dim, low, low + move.span(dim))
            steps = ((move.steps[0], move.steps[1]), (1, 1))  # along rows, along columns
            at = _slice(at, dim, 0, size, steps[dim][0])
            at = _slice(at, other, move.source[other], rest, steps[other][0])
            into = _slice(tile, dim, move.at[dim], size, steps[dim][1])
            into = _slice(into, other, move.at[other], rest, steps[other][1])
            if not move.again:
                recode(source, feed.part, at, buffer, part, into, scales)
                continue
            copy = buffer.copy()
            recode(source, feed.part, at, copy, part, into, scales)
            _check_again(feed, np.array_equal(copy, buffer))

    def _put_loose(
        self,
        part: Part,
        linear: Linear,
        dim: int,
        tile: Layout,
        buffer: Bytes,
        moves: Sequence[Move],
        feeds: Sequence[Feed],
    ) -> None:
        """The same where pieces begin or end inside a granule of a layout: by way of plain rows."""
        width = 1 if part.of == "s" else 2
        dtype = RAW[linear.scales] if part.of == "s" else np.dtype(np.uint8)
        rows = np.zeros((tile.shape[0], tile.shape[1] // width), dtype)
        for move in moves:
            feed = feeds[move.slot]
            grain = max(axis.logical for axis in feed.layout.axes if axis.dim == dim)
            low = move.source[dim] // grain * grain
            high = -(-(move.source[dim] + move.span(dim)) // grain) * grain
            plain = _plain(*feed.window(dim, low, high), feed.part, linear.scales)
            begin = [x - (low if d == dim else 0) for d, x in enumerate(move.source)]
            (k, n), (K, N) = begin, move.shape
            a, b = move.steps
            block = plain[k : k + K * a : a, n // width : (n + N) // width]
            k, n = move.at
            view = rows[k : k + K * b : b, n // width : (n + N) // width]
            if move.again:
                _check_again(feed, np.array_equal(view, block))
            view[...] = block
        if part.of == "q":
            as_rows = Part("", "q", NIBBLES, "U8")
            recode(rows.reshape(-1), as_rows, NIBBLES.bind(tile.shape), buffer, part, tile)
        elif part.of == "z":
            write_zeros(rows, buffer, part, tile)
        else:
            write_numbers(caster(linear.scales, part.dtype)(rows), buffer, part, tile)

    def zeros(
        self, pieces: Sequence[Piece], linear: Linear, hashers: dict[TensorInfo, Hasher]
    ) -> Bytes:
        """Zero points 0..15 of one expert, uint8 [G, N]."""
        zeros = np.empty(linear.shape("z"), np.uint8)
        feeds = self._feeds(pieces, "z", hashers, self.share)
        plain = [unpack_nibbles(_plain(*f.window(0, 0, f.layout.shape[0]), f.part)) for f in feeds]
        for move in _moves(pieces, "z", linear.g):
            (i, n), (G, N), (k, c), (a, b) = move.source, move.shape, move.at, move.steps
            rows = plain[move.slot][i : i + G * a : a, n : n + N]
            zeros[k : k + G * b : b, c : c + N] = rows
        return zeros

    def _dense(
        self, part: Part, linear: Linear, pieces: Sequence[Piece], hashers: dict[TensorInfo, Hasher]
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
                first = low - piece.at[1] + piece.cols[0]
                q, z, raw = (
                    _columns(feeds[of][i], first, first + high - low, linear.scales) for of in "qzs"
                )
                scales = to_float32(raw, linear.scales)
                block = dequantize(q, z, scales, piece.source.linear.g)
                k = piece.at[0]
                rows = block[slice(*piece.rows)]
                weight[k : k + rows.shape[0], low - start : high - start] = rows
            raw = from_float32(np.ascontiguousarray(weight.T), part.dtype)
            yield raw.reshape(-1).view(np.uint8)


def _width(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _columns(feed: Feed, low: int, high: int, scales: str) -> NDArray[Any]:
    """All rows of columns low..high, as `_plain` gives them, wherever granules lie."""
    grain = max(axis.logical for axis in feed.layout.axes if axis.dim == 1)
    first, last = low // grain * grain, -(-high // grain) * grain
    plain = _plain(*feed.window(1, first, last), feed.part, scales)
    width = 1 if feed.part.of == "s" else 2
    return plain[:, (low - first) // width : (high - first) // width]


@dataclass(frozen=True, slots=True)
class Move:
    """A block of one array of a source, `source` its first element, that lands at `at`."""

    slot: int
    source: tuple[int, int]
    shape: tuple[int, int]
    at: tuple[int, int]
    again: bool = False
    steps: tuple[int, int] = (1, 1)  # from row to row, in the source and where it lands

    def span(self, dim: int) -> int:
        """Rows or columns of the source from its first to its last."""
        return (self.shape[dim] - 1) * (1 if dim else self.steps[0]) + 1

    def cut(self, dim: int, start: int, stop: int) -> Move | None:
        """What a tile start..stop of `dim` takes of it, `at` counted from the tile's start."""
        a, b = (1, 1) if dim else self.steps
        first = max(0, -((self.at[dim] - start) // b))
        last = min(self.shape[dim], -((self.at[dim] - stop) // b))
        if first >= last:
            return None
        source, shape, at = list(self.source), list(self.shape), list(self.at)
        source[dim] += first * a
        shape[dim], at[dim] = last - first, at[dim] + first * b - start
        return Move(self.slot, _pair(source), _pair(shape), _pair(at), self.again, self.steps)


def _pair(values: list[int]) -> tuple[int, int]:
    return values[0], values[1]


def _moves(pieces: Sequence[Piece], of: str, g: int) -> list[Move]:
    """Where the elements of one array go: rows of codes; rows of scales and zero points, which may
    be fewer or more in a source whose groups are larger or smaller than the output's `g`: then
    every so many rows in one move, if groups begin together, else row by row."""
    moves: list[Move] = []
    seen: set[tuple[int, int]] = set()
    for slot, piece in enumerate(pieces):
        (low, high), (first, last), (k, n) = piece.rows, piece.cols, piece.at
        width, theirs = last - first, piece.source.linear.g
        if of == "q":
            moves.append(Move(slot, (low, first), (high - low, width), (k, n), piece.again))
        elif g == theirs:
            groups = (high - low) // g
            moves.append(Move(slot, (low // g, first), (groups, width), (k // g, n), piece.again))
        elif max(g, theirs) % min(g, theirs) == 0 and not any(
            x % max(g, theirs) for x in (low, high, k)
        ):
            fine, coarse = theirs // g, g // theirs  # one of them is 0
            count = (high - low) // max(g, theirs)
            for j in range(fine or coarse):
                source = (low // theirs + (0 if fine else j), first)
                place = (k // g + (j if fine else 0), n)
                steps = (1, fine) if fine else (coarse, 1)
                again = piece.again or bool(coarse and j)
                moves.append(Move(slot, source, (count, width), place, again, steps))
        else:
            pairs = dict.fromkeys(
                ((low + row) // theirs, (k + row) // g)
                for row in range(0, high - low, gcd(g, theirs, low, k))
            )
            for row, at in pairs:
                again = piece.again or (at, n) in seen
                seen.add((at, n))
                moves.append(Move(slot, (row, first), (1, width), (at, n), again))
    return moves


def _fits(move: Move, source: Layout, to: Layout, dim: int) -> bool:
    """Whether a move begins and ends at granules of both layouts, also where tiles are cut."""
    for d in (0, 1):
        mine, theirs = (max(a.logical for a in x.axes if a.dim == d) for x in (to, source))
        grain = lcm(mine, theirs) if d == dim else mine
        size = move.shape[d]
        if move.at[d] % grain or size % mine or move.source[d] % theirs or size % theirs:
            return False
    return True


def _slice(at: Layout, dim: int, start: int, size: int, step: int = 1) -> Layout:
    """`size` rows or columns from `start` on, every `step`-th of them."""
    if step == 1:
        return at if (start, size) == (0, at.shape[dim]) else at.slice(dim, start, start + size)
    (axis,) = (axis for axis in at.axes if axis.dim == dim)  # groups are one axis in every pattern
    wide = axis._replace(size=size, stored=axis.stored * step)
    return at._replace(
        shape=tuple(size if d == dim else n for d, n in enumerate(at.shape)),
        axes=tuple(wide if a is axis else a for a in at.axes),
        offset=at.offset + start * axis.stored,
    )


def _plain(source: Bytes, at: Layout, part: Part, scales: str = "") -> NDArray[Any]:
    """Elements in logical order: packed rows of codes or zero points, raw scales of a dtype."""
    if part.of == "s":
        return caster(part.dtype, scales)(read_numbers(source, part, at))
    if part.of == "z":
        return read_zeros(source, part, at)
    rows = np.empty((at.shape[0], at.shape[1] // 2), np.uint8)
    recode(source, part, at, rows.reshape(-1), Part("", "q", NIBBLES, "U8"), NIBBLES.bind(at.shape))
    return rows


def _check_again(feed: Feed, same: bool) -> None:
    if not same:
        raise AwqconvError(
            "what several ranks or groups hold alike differs",
            feed.info.where,
            "A file is damaged: run awqconv verify, and convert the checkpoint again.",
        )

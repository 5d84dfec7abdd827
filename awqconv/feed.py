"""Reading stored arrays slice by slice, and digesting what passes by."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from awqconv.checkpoint.header import TensorInfo
from awqconv.checkpoint.model import Run, Stored
from awqconv.checkpoint.source import Source
from awqconv.digest import Hasher
from awqconv.repack.axes import Axis, Layout
from awqconv.repack.engine import aligned

Bytes = NDArray[np.uint8]
TILE = 1 << 21  # bytes that are handled at a time
CALL = 1 << 14  # bytes that are copied in the time of one call to read a few


class Arena(threading.local):
    """A thread's buffers, by use: grown when needed, never given back while the run lasts."""

    def __init__(self) -> None:
        self.buffers: dict[str, Bytes] = {}

    def take(self, use: str, size: int) -> Bytes:
        buffer = self.buffers.get(use)
        if buffer is None or buffer.size < size:
            buffer = self.buffers[use] = aligned(size)
        return buffer[:size]


class Reader:
    """A source with each thread's buffers to read it into."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.arena = Arena()

    def chunks(self, info: TensorInfo, start: int | None = None) -> Iterator[Bytes]:
        """A tensor's bytes in order, from an offset of its file on, in one buffer of a thread."""
        for begin in range(info.start if start is None else start, info.stop, TILE):
            buffer = self.arena.take("chunk", min(TILE, info.stop - begin))
            self.source.readinto(info.file, begin, buffer.data)
            yield buffer

    def ranges(self, runs: Sequence[Run], interleaved: bool, use: str) -> Iterator[Bytes]:
        """The bytes of runs, one run after another, or range by range of all of them."""
        if interleaved:
            width = sum(run.length for run in runs)
            step = max(1, TILE // width)
            for i in range(0, runs[0].count, step):
                rows = min(step, runs[0].count - i)
                buffer = self.arena.take(use, rows * width)
                table, column = buffer.reshape(rows, width), 0
                for run in runs:
                    part = np.empty((rows, run.length), np.uint8)
                    begin = run.start + i * run.stride
                    self.source.readinto(run.file, begin, part.reshape(-1).data)
                    table[:, column : column + run.length] = part
                    column += run.length
                yield buffer
            return
        for run in runs:
            if not run.file:
                yield np.zeros(run.length * run.count, np.uint8)
            elif run.count == 1 or run.length > TILE:
                for i in range(run.count):
                    for start in range(0, run.length, TILE):
                        buffer = self.arena.take(use, min(TILE, run.length - start))
                        begin = run.start + i * run.stride + start
                        self.source.readinto(run.file, begin, buffer.data)
                        yield buffer
            else:
                step = TILE // run.length
                for i in range(0, run.count, step):
                    rows = min(step, run.count - i)
                    buffer = self.arena.take(use, rows * run.length)
                    for j in range(rows):
                        part = buffer[j * run.length : (j + 1) * run.length]
                        self.source.readinto(run.file, run.start + (i + j) * run.stride, part.data)
                    yield buffer

    def digest(self, info: TensorInfo, hasher: Hasher | None = None) -> str:
        """Digest of a tensor; `hasher` has taken in what comes before its position."""
        hasher = hasher or Hasher(info.start)
        for chunk in self.chunks(info, hasher.position):
            hasher.update(hasher.position, chunk)
        return hasher.hexdigest()


class Feed:
    """One array of one stored module: any slice of it, digested on the way when read in order.

    `budget`: bytes that may be held where a slice is not contiguous: the whole array, or a strip as
    wide as that. `slot` tells feeds of one array apart that a thread uses at the same time.
    """

    def __init__(
        self,
        reader: Reader,
        module: Stored,
        of: str,
        hashers: dict[TensorInfo, Hasher],
        *,
        budget: int,
        expert: int = 0,
        slot: int = 0,
    ) -> None:
        self.part, self.info = module.arrays()[of]
        self.linear = module.linear
        self.layout = self.part.layout(self.linear)
        self.size = self.part.nbytes(self.linear)
        self.base = self.info.start + expert * self.size
        self.budget, self._reader = budget, reader
        self._use = f"source {of} {slot}"
        self._hasher = hashers.setdefault(self.info, Hasher(self.info.start))
        self._strip: Bytes = np.empty(0, np.uint8)
        self._first = self._last = 0  # what the strip holds

    def _read(self, use: str, start: int, stop: int) -> Bytes:
        buffer = self._reader.arena.take(use, stop - start)
        self._reader.source.readinto(self.info.file, self.base + start, buffer.data)
        self._hasher.update(self.base + start, buffer)
        return buffer

    def window(self, dim: int, start: int, stop: int) -> tuple[Bytes, Layout]:
        """Bytes that hold start..stop of a logical dimension, and the layout of that slice."""
        outer, second = self.layout.axes[:2]
        if outer.dim == dim:
            unit = outer.stored * self.part.bits // 8
            low, high = start // outer.logical, stop // outer.logical
            piece = self.layout.slice(dim, start, stop)._replace(offset=0)
            return self._read(self._use, low * unit, high * unit), piece
        if not (self._first <= start and stop <= self._last):
            length = self.layout.shape[dim]
            fit = self.budget * length // self.size // second.logical * second.logical
            self._first, self._last = start, min(max(start + fit, stop), length)
            self._strip = self._across(outer, second, self._first, self._last)
        strip, last = self._strip, self._last - self._first
        shape = tuple(last if d == dim else n for d, n in enumerate(self.layout.shape))
        whole = self.part.pattern.bind(shape)
        if (start, stop) == (self._first, self._last):
            return strip, whole
        return strip, whole.slice(dim, start - self._first, stop - self._first)

    def _across(self, outer: Axis, second: Axis, start: int, stop: int) -> Bytes:
        """A strip: the same range of every unit of the outer axis, one after another."""
        unit, each = (axis.stored * self.part.bits // 8 for axis in (outer, second))
        low, high = start // second.logical * each, stop // second.logical * each
        if high - low == unit:
            return self._read(self._use, 0, self.size)
        strip = self._reader.arena.take(self._use, (high - low) * outer.size)
        table = strip.reshape(outer.size, high - low)
        if unit <= CALL:
            step = max(1, TILE // unit)
            for i in range(0, outer.size, step):
                rows = self._read("units", i * unit, min(i + step, outer.size) * unit)
                table[i : i + step] = rows.reshape(-1, unit)[:, low:high]
        else:
            for i in range(outer.size):
                at = self.base + i * unit + low
                self._reader.source.readinto(self.info.file, at, table[i].data)
        return strip

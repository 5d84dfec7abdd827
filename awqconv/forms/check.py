"""Verification of a sharded folder: the ranks' tensors, and what they make together.

Every module of the source is put together from its shares and compared as ever (exactness); what
several ranks hold must be the same in all. Of the ranks' own modules the digests are compared, the
parts that are no plain permutation are made again, and products are taken (integrity, product).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from awqconv.checkpoint.header import TensorInfo
from awqconv.checkpoint.model import Pieces, Stored
from awqconv.digest import Hasher
from awqconv.errors import AwqconvError
from awqconv.targets.base import layout
from awqconv.verification import Check, ModuleReport, Problem

Looked = tuple[ModuleReport, list[Problem], int, int]


class ShardedCheck(Check):
    """Modules of the source, modules of the ranks, and the other tensors of their files."""

    def items(self) -> Iterator[TensorInfo | Stored]:
        yield from self.model.modules.values()
        yield from self.model.ranks.values()
        yield from self.model.plain
        if self.origin:
            biases = (m.bias for m in self.model.modules.values() if m.bias)
            yield from (*self.model.others.values(), *biases)

    def _other(self, info: TensorInfo) -> tuple[None, list[Problem], int, int]:
        if info.file == info.name:  # of the source: it lies in ranges of others
            return None, list(self._gathered(info)), 0, 0
        problems = self._digest(info)
        self.progress(info.nbytes)
        return None, problems, 1, info.nbytes

    def _gathered(self, info: TensorInfo) -> Iterator[Problem]:
        """Compare a tensor of the source, put together from its shares."""
        assert self.origin
        assert self.origin_reader
        theirs = self.origin.checkpoint.tensors.get(info.name)
        if theirs is None or (theirs.dtype, theirs.shape) != (info.dtype, info.shape):
            yield Problem(info.name, "the source has no such tensor")
            return
        where = self.model.bytes_of(info)
        position = theirs.start
        for chunk in self.reader.ranges(where.runs, where.interleaved, "gathered"):
            right = self.origin_reader.arena.take("source", len(chunk))
            self.origin_reader.source.readinto(theirs.file, position, right.data)
            if not np.array_equal(chunk, right):
                yield Problem(info.name, "its bytes are not the source's")
                return
            position += len(chunk)

    def _module(self, module: Stored) -> Looked:
        if module.name in self.model.ranks:
            return self._share(module)
        try:
            found = list(self._exact(module, {}, None))
        except AwqconvError as wrong:
            found = [wrong.what]
        problems = [Problem(f"module {module.name}", what) for what in found]
        said = self.manifest["modules"][module.name]["layout"]
        return ModuleReport(module.name, said, not problems), problems, 0, 0

    def _share(self, module: Stored) -> Looked:
        """A module of a rank."""
        sample = self._sample(module, alone=True) if self.multiply else None
        hashers: dict[TensorInfo, Hasher] = dict(sample.stored) if sample else {}
        infos = list(module.tensors.values())
        found: list[str] = []
        try:
            found += self._follows(module, self._source(module), module.linear.scales)
            awq = layout("awq")
            for part in awq.parts(module.linear) if sample else ():
                assert sample
                window, pieces = sample.awq[part.of], self._source(module)[sample.expert]
                for tile in self.encoder.tiles(awq, part, module.linear, pieces, hashers):
                    window.update(window.position, tile)
        except AwqconvError as wrong:
            found, sample = [wrong.what], None
        problems = [p for info in infos for p in self._digest(info, hashers.get(info))]
        problems = [Problem(f"module {module.name}", f"{p.what} ({p.where})") for p in problems]
        problems += [Problem(f"module {module.name}", what) for what in found]
        report = ModuleReport(module.name, module.layout, not problems)
        if sample:
            error, bound, worst, beyond = self._product(module, sample)
            report = replace(report, error=error, bound=bound, max_error=worst)
            if beyond:
                problems.append(Problem(f"module {module.name}", beyond))
        size = sum(info.nbytes for info in infos)
        self.progress(size)
        return report, problems, len(infos), size

    def _source(self, module: Stored) -> tuple[Pieces, ...]:
        """What a rank's module is made of: itself, or where it is lossy the originals."""
        return self.model.derived.get(module.name) or self.model.pieces(module)

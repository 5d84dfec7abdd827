"""Plain float tensors that lie in another order: block after block of rows, each by a pattern."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from awqconv.repack.axes import Pattern
from awqconv.repack.floats import RAW, caster
from awqconv.repack.reference import arrange, restore

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Elements [N, K] of safetensors dtype `was`, stored as `dtype`: each `rows` rows (fewer in the
    last block) by `pattern`, which takes two dimensions."""

    shape: tuple[int, int]
    rows: int
    pattern: Pattern
    was: str
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of a block in plain order."""
        return self.rows * self.shape[1] * RAW[self.was].itemsize

    def arranged(self, chunks: Iterable[Bytes]) -> Iterator[Bytes]:
        """The stored bytes, a block at a time, of the tensor's bytes in plain order."""
        block, filled = np.empty(self.nbytes, np.uint8), 0
        for chunk in chunks:
            taken = 0
            while taken < len(chunk):
                some = chunk[taken : taken + len(block) - filled]
                block[filled : filled + len(some)] = some
                filled, taken = filled + len(some), taken + len(some)
                if filled == len(block):
                    yield self._arrange(block)
                    filled = 0
        if filled:
            yield self._arrange(block[:filled])

    def _arrange(self, block: Bytes) -> Bytes:
        plain = caster(self.was, self.dtype)(block.view(RAW[self.was]).reshape(-1, self.shape[1]))
        return np.ascontiguousarray(arrange(plain, self.pattern)).reshape(-1).view(np.uint8)

    def stored(self, number: int) -> tuple[int, int]:
        """Where a block is stored: its first byte and the one behind its last."""
        width = self.shape[1] * RAW[self.dtype].itemsize
        first = number * self.rows
        return first * width, min(first + self.rows, self.shape[0]) * width

    def restored(self, block: Bytes) -> Bytes:
        """The bytes of a block in plain order again; exact where `dtype` holds every `was`."""
        raw = block.view(RAW[self.dtype])
        shape = raw.size // self.shape[1], self.shape[1]
        plain = caster(self.dtype, self.was)(restore(raw, self.pattern, shape))
        return np.ascontiguousarray(plain).reshape(-1).view(np.uint8)

"""Tensors that lie in an order of their own, read as if they lay in plain order."""

from __future__ import annotations

import threading

import numpy as np

from awqconv.checkpoint.header import TensorInfo
from awqconv.checkpoint.source import Source
from awqconv.repack.blocks import Blocks, Bytes


class Views:
    """A source, and beside its files each tensor that was added, as a file in plain order."""

    def __init__(self, source: Source) -> None:
        self.source, self.name, self.in_order = source, source.name, source.in_order
        self.files, self.read = source.files, source.read
        self.fingerprint, self.close = source.fingerprint, source.close
        self._views: dict[str, tuple[TensorInfo, Blocks]] = {}
        self._last = threading.local()

    def add(self, file: str, info: TensorInfo, blocks: Blocks) -> None:
        """Make a stored tensor readable under the name of a file, which the source lacks."""
        self._views[file] = info, blocks

    def readinto(self, file: str, start: int, buffer: memoryview) -> None:
        """Fills `buffer` from byte `start` of a file or of a tensor in plain order."""
        view = self._views.get(file)
        if view is None:
            self.source.readinto(file, start, buffer)
            return
        done = 0
        while done < len(buffer):
            number, skip = divmod(start + done, view[1].nbytes)
            part = self._block(file, number)[skip : skip + len(buffer) - done]
            buffer[done : done + len(part)] = part.data
            done += len(part)

    def _block(self, file: str, number: int) -> Bytes:
        """A block in plain order; a thread remembers its last, as rows are asked for in order."""
        if getattr(self._last, "key", None) != (file, number):
            info, blocks = self._views[file]
            first, end = blocks.stored(number)
            stored = np.empty(end - first, np.uint8)
            self.source.readinto(info.file, info.start + first, stored.data)
            self._last.block, self._last.key = blocks.restored(stored), (file, number)
        block: Bytes = self._last.block
        return block

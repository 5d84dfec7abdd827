"""Digests: XXH3-128, as `xxhsum -H2` prints it. Fast enough to take while bytes pass by.

They find every accident. They are no signature: who can change a folder can change its manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import xxhash

NAME = "xxh3-128"


def digest(data: Any) -> str:
    """Digest of a buffer, 32 hexadecimal digits."""
    return str(xxhash.xxh3_128_hexdigest(data))


def combined(rows: Iterable[tuple[Any, ...]]) -> str:
    """Digest of a list of values, whatever their order: of their sorted JSON lines."""
    return digest("\n".join(sorted(json.dumps(row) for row in rows)).encode())


class Hasher:
    """A digest of bytes that arrive in order; `position` is the offset of the next."""

    def __init__(self, position: int = 0) -> None:
        self._state = xxhash.xxh3_128()
        self.position = position

    def update(self, offset: int, data: Any) -> None:
        """Take in bytes at an offset; ignored where they are not the next ones."""
        if offset == self.position:
            self._state.update(data)
            self.position += len(data)

    def hexdigest(self) -> str:
        """The digest so far."""
        return str(self._state.hexdigest())

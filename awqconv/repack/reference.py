"""The oracle: layouts by reshape and transpose of unpacked elements. Slow, obvious, numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from awqconv.repack.axes import Pattern


def arrange(logical: NDArray[np.generic], pattern: Pattern) -> NDArray[np.generic]:
    """Elements [logical shape] in storage order [stored shape], same dtype."""
    layout = pattern.bind(logical.shape)
    names = [axis.name for axis in layout.axes]
    sizes = {axis.name: axis.size for axis in layout.axes}
    left = [name for group in pattern.left for name in group]
    split = logical.reshape([sizes[name] for name in left])
    return split.transpose([left.index(name) for name in names]).reshape(layout.stored)


def restore(
    stored: NDArray[np.generic], pattern: Pattern, shape: tuple[int, ...]
) -> NDArray[np.generic]:
    """Inverse of `arrange`: elements in storage order back to [logical shape]."""
    layout = pattern.bind(shape)
    names = [axis.name for axis in layout.axes]
    left = [name for group in pattern.left for name in group]
    split = stored.reshape([axis.size for axis in layout.axes])
    return split.transpose([names.index(name) for name in left]).reshape(shape)


def pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes 0..15 [..., 2m] to bytes [..., m], the lower nibble first."""
    return codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)


def unpack_nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes [..., m] to codes 0..15 [..., 2m], the lower nibble first."""
    return np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:-1], -1)


def pack(codes: NDArray[np.uint8], pattern: Pattern) -> NDArray[np.uint8]:
    """Codes 0..15 [logical shape] to the layout's bytes, uint8 [stored shape, last / 2]."""
    return pack_nibbles(arrange(codes, pattern).astype(np.uint8))


def unpack(
    packed: NDArray[np.uint8], pattern: Pattern, shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Inverse of `pack`: the layout's bytes to codes 0..15 [logical shape]."""
    codes = restore(unpack_nibbles(packed.reshape(-1)), pattern, shape)
    return codes.astype(np.uint8, copy=False)

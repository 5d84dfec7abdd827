"""One array of a module from the form one layout stores it in to that of another.

Codes move as nibbles from place to place; zero points may also change between nibbles and
numbers, and scales between float dtypes. Between two forms that differ lies a plain one: nibbles
in row order for zero points, float rows for scales.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from awqconv.errors import AwqconvError
from awqconv.repack.axes import Layout, Pattern
from awqconv.repack.engine import repack
from awqconv.repack.floats import RAW, caster, from_float32, to_float32
from awqconv.repack.layouts import PLAIN
from awqconv.repack.reference import pack_nibbles, unpack_nibbles
from awqconv.targets.base import Part

Bytes = NDArray[np.uint8]
NIBBLES = Pattern("k (nw e) -> k nw (e)", e=2)


def recode(
    src: Bytes, a: Part, at: Layout, dst: Bytes, b: Part, to: Layout, scales: str = "F32"
) -> None:
    """Write the elements that `src` holds as part `a` into `dst` as part `b`.

    `at` and `to` are the parts' layouts, or slices of them, of one logical shape; `src` and `dst`
    are flat byte arrays. `scales` is the dtype that scales are rounded to on the way.

    Raises AwqconvError where stored zero points are no integers from 0 to 15.
    """
    if a.coded and b.coded:
        repack(src, at, dst, to, xor=a.xor ^ b.xor)
    elif (a.dtype, a.sign, a.offset) == (b.dtype, b.sign, b.offset) and scales in (a.dtype, "F32"):
        repack(src, at, dst, to, bits=b.bits)
    elif a.of == "z":
        write_zeros(read_zeros(src, a, at), dst, b, to)
    else:
        raw = read_numbers(src, a, at)
        raw = caster(scales, b.dtype)(caster(a.dtype, scales)(raw))
        write_numbers(raw, dst, b, to)


def read_numbers(src: Bytes, a: Part, at: Layout) -> NDArray[np.generic]:
    """Stored numbers in logical order, raw elements [logical shape]."""
    raw = np.empty(at.shape, RAW[a.dtype])
    repack(src, at, raw.reshape(-1).view(np.uint8), PLAIN.bind(at.shape), bits=a.bits)
    return raw


def write_numbers(raw: NDArray[np.generic], dst: Bytes, b: Part, to: Layout) -> None:
    """Inverse of `read_numbers`."""
    flat = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    repack(flat, PLAIN.bind(to.shape), dst, to, bits=b.bits)


def read_zeros(src: Bytes, a: Part, at: Layout) -> Bytes:
    """Stored zero points as packed rows, two to a byte, uint8 [G, N/2]."""
    groups, columns = at.shape
    if a.coded:
        rows = np.empty((groups, columns // 2), np.uint8)
        repack(src, at, rows.reshape(-1), NIBBLES.bind(at.shape), xor=a.xor)
        return rows
    numbers = to_float32(read_numbers(src, a, at), a.dtype)
    z = (numbers - np.float32(a.offset)) * np.float32(a.sign)
    with np.errstate(invalid="ignore"):
        codes = z.astype(np.uint8)
    if not (np.array_equal(codes, z) and codes.max(initial=0) < 16):
        bad = np.argwhere((codes != z) | (codes > 15))[0]
        raise AwqconvError(
            f"the zero point of group {bad[0]}, column {bad[1]} is {z[tuple(bad)]}, "
            "not an integer from 0 to 15",
            a.suffix,
            "The file is damaged: convert the checkpoint again.",
        )
    return pack_nibbles(codes)


def write_zeros(rows: Bytes, dst: Bytes, b: Part, to: Layout) -> None:
    """Inverse of `read_zeros`."""
    if b.coded:
        flat = np.ascontiguousarray(rows).reshape(-1)
        repack(flat, NIBBLES.bind(to.shape), dst, to, xor=b.xor)
        return
    values = (b.offset + b.sign * np.arange(16)).astype(np.float32)
    table = from_float32(values, b.dtype)[unpack_nibbles(np.arange(256, dtype=np.uint8)[:, None])]
    pairs = np.ascontiguousarray(table).view(f"u{2 * b.bits // 8}")[:, 0]
    write_numbers(pairs[rows].view(RAW[b.dtype]), dst, b, to)


def dequantize(q: Bytes, z: Bytes, s: NDArray[np.float32], g: int) -> NDArray[np.float32]:
    """(q - z) * s in float32 [K, N] from packed rows q [K, N/2], z [G, N/2] and scales s [G, N]."""
    codes = unpack_nibbles(q).reshape(-1, g, s.shape[1]).astype(np.float32)
    codes -= unpack_nibbles(z)[:, None]
    codes *= s[:, None]
    return codes.reshape(-1, s.shape[1])

"""Two Linux calls that Python's os module lacks; both may be missing."""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from pathlib import Path
from typing import Any

AT_FDCWD = -100
RENAME_EXCHANGE = 2
SYNC_FILE_RANGE_WRITE = 2
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@cache
def _call(name: str, *kinds: Any) -> Any:
    """A function of the C library, or None."""
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if call is not None:
        call.argtypes = kinds
    return call


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step: renameat2(2) with RENAME_EXCHANGE.

    False where the kernel or the file system cannot. Raises OSError for other failures.
    """
    path = (ctypes.c_int, ctypes.c_char_p)
    call = _call("renameat2", *path, *path, ctypes.c_uint)
    if call is None:
        return False
    names = AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other)
    if call(*names, RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))


def start_writing(file: int) -> None:
    """Have the kernel start to write a file's dirty pages: sync_file_range(2).

    Waits where the disk's queue is full, not for the disk. Only saves time: its failures show in
    the fsync that follows.
    """
    call = _call("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    if call is not None:
        call(file, 0, 0, SYNC_FILE_RANGE_WRITE)

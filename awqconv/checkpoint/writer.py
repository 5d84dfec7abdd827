"""A staging folder that becomes the destination in one rename, or is left to be continued.

    DEST.partial/journal.jsonl   line 1 what the run is, then one line for each finished job
    DEST.partial/...             files at their final size, written anywhere in any order

The journal is locked while a run lasts, so a second run on the same destination refuses. What the
journal says is finished is checked against its digests before it is believed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from awqconv.checkpoint.config import MANIFEST
from awqconv.errors import AwqconvError

JOURNAL = "journal.jsonl"


def disk_error(error: OSError, where: object) -> AwqconvError:
    """What an OSError while writing means to a user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return AwqconvError(
            f"no space left ({error.strerror})",
            str(where),
            "Free some space, or choose another destination, and run the same command again: "
            "it goes on where it stopped.",
        )
    return AwqconvError(
        f"writing failed: {error.strerror or error}",
        str(where),
        "Check the disk, then run the same command again: it goes on where it stopped.",
    )


class Staging:
    """Files under construction for one destination.

    Raises AwqconvError where the destination is taken, locked by another run, or begun by a run
    that was not the same.
    """

    def __init__(self, dest: Path, identity: dict[str, Any], *, overwrite: bool = False) -> None:
        self.dest = dest
        self.path = dest.with_name(dest.name + ".partial")
        self.done: dict[str, dict[str, Any]] = {}
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        check_destination(dest, overwrite=overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._journal = os.open(
                self.path / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
            )
        except OSError as error:
            raise disk_error(error, self.path) from None
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._begin(identity)
        except BlockingIOError:
            os.close(self._journal)
            raise AwqconvError(
                "another awqconv is writing here",
                str(self.path),
                "Wait for it to end, or choose another destination.",
            ) from None
        except BaseException:
            os.close(self._journal)
            raise

    def _begin(self, identity: dict[str, Any]) -> None:
        """Start the journal, or read what an earlier run of the same kind finished."""
        identity = json.loads(json.dumps(identity))
        lines = (self.path / JOURNAL).read_bytes().split(b"\n")
        entries = []
        for line in lines[:-1]:  # a line cut off by a kill was never finished
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
        good = sum(len(json.dumps(entry)) + 1 for entry in entries)
        if not entries:
            os.ftruncate(self._journal, 0)
            self._write(identity)
            return
        began = entries[0]
        keys = [key for key in identity if began.get(key) != identity[key]]
        if keys:
            key = keys[0]
            was, now = began.get(key), identity[key]
            if isinstance(was, dict) and isinstance(now, dict):
                name = next(n for n in {**was, **now} if was.get(n) != now.get(n))
                key, was, now = f"{key}, {name}", was.get(name), now.get(name)
            raise AwqconvError(
                f"an interrupted run is here with another {key}: {was} then, {now} now",
                str(self.path),
                f"Give the same arguments to continue it, or start anew: rm -r {self.path}",
            )
        os.ftruncate(self._journal, good)
        self.done = {entry["job"]: entry for entry in entries[1:]}

    def _write(self, entry: dict[str, Any]) -> None:
        with self._lock:
            os.write(self._journal, (json.dumps(entry) + "\n").encode())

    def record(self, job: str, entry: dict[str, Any]) -> None:
        """Note a finished job in the journal."""
        self._write({"job": job, **entry})

    def create(self, name: str, size: int, head: bytes) -> None:
        """Make a file of its final size, or open the one there is, and write its first bytes."""
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._files[name] = file
            if os.fstat(file).st_size != size:
                os.ftruncate(file, size)
            if size:
                os.posix_fallocate(file, 0, size)
        except OSError as error:
            raise disk_error(error, path) from None
        self.write(name, 0, memoryview(head))

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write all of `data` at an offset of a created file. Thread safe."""
        file, done = self._files[name], 0
        try:
            while done < len(data):
                done += os.pwrite(file, data[done:], offset + done)
        except OSError as error:
            raise disk_error(error, self.path / name) from None

    def readinto(self, name: str, offset: int, buffer: memoryview) -> None:
        """Read back bytes of a created file."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._files[name], [buffer[done:]], offset + done)
            if not count:
                raise AwqconvError(
                    "a staged file is shorter than it was made", str(self.path / name)
                )
            done += count

    def sync(self, name: str) -> None:
        """Force a file to the disk."""
        try:
            os.fsync(self._files[name])
        except OSError as error:
            raise disk_error(error, self.path / name) from None

    def put(self, name: str, data: bytes) -> None:
        """Write a small file whole."""
        self.create(name, len(data), data)
        self.sync(name)

    def close(self) -> None:
        """Close all files and give up the lock; what is staged stays."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])
            if self._journal >= 0:
                os.close(self._journal)
                self._journal = -1

    def commit(self, keep: Iterable[str]) -> None:
        """Make the staging folder the destination, with exactly the files `keep`."""
        wanted = {self.path / name for name in keep}
        try:
            for folder, _, names in os.walk(self.path):
                for name in names:
                    if (path := Path(folder, name)) not in wanted and name != JOURNAL:
                        path.unlink()
                _sync_folder(Path(folder))
            replaced = None
            if self.dest.exists():
                replaced = self.dest.with_name(f"{self.dest.name}.replaced.{os.getpid()}")
                self.dest.rename(replaced)
            (self.path / JOURNAL).unlink()
            self.path.rename(self.dest)
            _sync_folder(self.dest.parent)
            if replaced:
                shutil.rmtree(replaced)
        except OSError as error:
            raise disk_error(error, self.dest) from None
        self.close()


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_destination(dest: Path, *, overwrite: bool) -> None:
    """Refuse a destination that holds something; `overwrite` allows one that awqconv wrote."""
    if not dest.is_dir():
        if dest.exists():
            raise AwqconvError("a file is there", str(dest), "Choose another destination.")
        return
    if not any(dest.iterdir()):
        return
    if not overwrite:
        raise AwqconvError(
            "it exists already", str(dest), "Add --overwrite, or choose another destination."
        )
    if not (dest / MANIFEST).is_file():
        raise AwqconvError(
            f"it holds files and no {MANIFEST}: --overwrite replaces only what awqconv wrote",
            str(dest),
            "Remove it yourself, or choose another destination.",
        )

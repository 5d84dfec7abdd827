"""A staging folder that becomes the destination in one rename, or is left to be continued.

    DEST.partial/journal.jsonl   line 1 what the run is, then one line for each finished job
    DEST.partial/...             files at their final size, written anywhere in any order

Folder and journal are locked while a run lasts, so a second run on the same destination refuses.
What the journal says is finished is checked against its digests before it is believed.

Power loss: every file and every folder is forced to the disk before the rename, and the folder
around it after, so DEST is what it was before or complete, whichever of these the disk kept. The
journal is not forced: a lost line costs its job again, and a line whose bytes were lost fails its
digest.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from awqconv.checkpoint import system
from awqconv.checkpoint.config import MANIFEST
from awqconv.digest import digest
from awqconv.errors import AwqconvError

JOURNAL = "journal.jsonl"
SYNC = True  # False only to measure what syncing costs
WRITEBACK = 64 << 20  # bytes of a file after which the disk is set to work on them


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
        self.dest = Path(os.path.realpath(dest))
        self.path = self.dest.with_name(self.dest.name + ".partial")
        self.replaced = self.dest.with_name(self.dest.name + ".replaced")
        self.overwrite = overwrite
        self.done: dict[str, dict[str, Any]] = {}
        self._files: dict[str, int] = {}
        self._unsent: dict[str, int] = {}
        self._locks: list[int] = []
        self._journal = -1
        self._lock = threading.Lock()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="awqconv-writeback")
        check_destination(self.dest, overwrite=overwrite)
        try:
            self._claim()
            self._begin(identity)
        except OSError as error:
            self.close()
            raise disk_error(error, self.path) from None
        except BaseException:
            self.close()
            raise

    # --- who may write, and from where

    def _claim(self) -> None:
        """Make and lock the folder and its journal, mend what a killed commit left."""
        parents = [path for path in self.path.parents if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        for path in parents:
            _sync_folder(path.parent)
        self._hold(self.path)
        if not self.dest.exists() and (self.replaced / MANIFEST).is_file():
            self.replaced.rename(self.dest)  # killed between two renames
        try:  # again, and now for sure: a run may have ended since the first look
            check_destination(self.dest, overwrite=self.overwrite)
        except AwqconvError:
            with suppress(OSError):
                self.path.rmdir()
            raise
        names = os.listdir(self.path)
        if names and JOURNAL not in names and MANIFEST not in names:
            raise AwqconvError(
                f"it holds files and no {JOURNAL}: awqconv did not begin it",
                str(self.path),
                "Move it away, or choose another destination.",
            )
        self._journal = os.open(
            self.path / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
        )
        _lock(self._journal, self.path)
        _sync_folder(self.path)  # files without a journal would be taken for someone else's

    def _hold(self, folder: Path) -> None:
        """Lock a folder. It stays locked under the name it is given later."""
        while True:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._locks.append(descriptor)
            with suppress(OSError):  # network file systems lock only files: the journal's counts
                _lock(descriptor, folder)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                    return
            folder.mkdir(exist_ok=True)  # another run gave it its final name meanwhile

    def _begin(self, identity: dict[str, Any]) -> None:
        """Start the journal, or read what an earlier run of the same kind finished."""
        identity = json.loads(json.dumps(identity))
        entries, good = [], 0
        for line in (self.path / JOURNAL).read_bytes().split(b"\n")[:-1]:
            if line[:32] != digest(line[33:]).encode():
                break  # cut off by a kill, or damaged: this and what follows is done again
            entries.append(json.loads(line[33:]))
            good += len(line) + 1
        os.ftruncate(self._journal, good)
        if not entries:
            _clear(self.path)
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
        self.done = {entry["job"]: entry for entry in entries[1:]}

    def _write(self, entry: dict[str, Any]) -> None:
        text = json.dumps(entry).encode()
        line = memoryview(digest(text).encode() + b" " + text + b"\n")
        with self._lock:
            while line:
                line = line[os.write(self._journal, line) :]

    # --- files

    def record(self, job: str, entry: dict[str, Any]) -> None:
        """Note a finished job in the journal."""
        try:
            self._write({"job": job, **entry})
        except OSError as error:
            raise disk_error(error, self.path / JOURNAL) from None

    def forget(self) -> None:
        """Have the next run begin anew: what is staged cannot be told right from wrong."""
        with suppress(OSError):
            os.ftruncate(self._journal, 0)

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
        self._unsent[name] = self._unsent.get(name, 0) + done
        if self._unsent[name] >= WRITEBACK and SYNC:
            self._unsent[name] = 0
            self._background.submit(system.start_writing, file)

    def readinto(self, name: str, offset: int, buffer: memoryview) -> None:
        """Read back bytes of a created file."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._files[name], [buffer[done:]], offset + done)
            except OSError as error:
                raise disk_error(error, self.path / name) from None
            if not count:
                raise AwqconvError(
                    "a staged file is shorter than it was made", str(self.path / name)
                )
            done += count

    def sync(self, name: str) -> None:
        """Force a file to the disk. If that fails it is removed.

        The kernel may then call its pages clean, so that reading them and syncing again would
        both succeed with nothing on the disk.
        """
        if not SYNC:
            return
        try:
            os.fsync(self._files[name])
        except OSError as error:
            with suppress(OSError):
                os.unlink(self.path / name)
            raise disk_error(error, self.path / name) from None

    def put(self, name: str, data: bytes) -> None:
        """Write a small file whole."""
        self.create(name, len(data), data)
        self.sync(name)

    def close(self) -> None:
        """Close all files and give up the locks; what is staged stays."""
        self._background.shutdown(cancel_futures=True)
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])
            if self._journal >= 0:
                os.close(self._journal)
                self._journal = -1
            while self._locks:
                os.close(self._locks.pop())

    # --- the end

    def commit(self, keep: Iterable[str]) -> None:
        """Make the staging folder the destination, with exactly the files `keep`."""
        check_destination(self.dest, overwrite=self.overwrite)
        try:
            self._tidy({self.path / name for name in keep})
            os.unlink(self.path / JOURNAL)
            _sync_folder(self.path)
            old = self._swap()
            _sync_folder(self.dest.parent)
        except OSError as error:
            raise disk_error(error, self.dest) from None
        try:
            if old:
                _remove(old)
        except OSError as error:
            raise AwqconvError(
                f"the folder that was replaced cannot be removed: {error.strerror or error}",
                str(old),
                f"{self.dest} is complete. Remove the other yourself: rm -r {old}",
            ) from None
        self.close()

    def _tidy(self, wanted: set[Path]) -> None:
        """Remove what is not wanted, and force all folders to the disk."""
        for folder, _, names in os.walk(self.path, topdown=False):
            for name in names:
                if (path := Path(folder, name)) not in wanted and name != JOURNAL:
                    path.unlink()
            if not os.listdir(folder):
                os.rmdir(folder)
            else:
                _sync_folder(Path(folder))

    def _swap(self) -> Path | None:
        """Give the staging folder its final name; where the folder that had it is now."""
        if not (self.dest.is_dir() and any(self.dest.iterdir())):
            self.path.rename(self.dest)
            return None
        self._hold(self.dest)  # its next name is the one that a run which starts now wants
        if system.exchange(self.path, self.dest):
            return self.path
        if self.replaced.exists():
            shutil.rmtree(self.replaced)
        self.dest.rename(self.replaced)
        self.path.rename(self.dest)
        return self.replaced


def _lock(file: int, where: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AwqconvError(
            "another awqconv is writing here",
            str(where),
            "Wait for it to end, or choose another destination.",
        ) from None


def _clear(folder: Path) -> None:
    """Remove all that is in a folder but the journal."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name != JOURNAL:
                os.unlink(entry.path)


def _remove(folder: Path) -> None:
    """Remove a folder of awqconv's, which is known as such to the last moment."""
    os.close(os.open(folder / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
    (folder / MANIFEST).unlink()
    _clear(folder)
    (folder / JOURNAL).unlink()
    folder.rmdir()


def _sync_folder(path: Path) -> None:
    if not SYNC:
        return
    folder = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
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
    if dest.is_mount():
        raise AwqconvError(
            "it is a mount point, and no folder can be renamed to it",
            str(dest),
            "Choose a destination inside it.",
        )
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

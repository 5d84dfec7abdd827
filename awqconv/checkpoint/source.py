"""Where a checkpoint's bytes come from: a folder here, anything with range reads later."""

import os
import stat
import threading
from pathlib import Path
from typing import Protocol

from awqconv.checkpoint.strict import shown
from awqconv.errors import AwqconvError

MAX_FILES = 100_000


class Source(Protocol):
    """Named files that can be read at any offset. Names are posix paths relative to the source."""

    name: str
    in_order: bool  # whether files should be read one after the other, since each is fetched whole

    def files(self) -> dict[str, int]:
        """Size in bytes of every file, by name, in name order."""
        ...

    def read(self, file: str, start: int, stop: int) -> bytes:
        """The bytes start..stop of a file."""
        ...

    def readinto(self, file: str, start: int, buffer: memoryview) -> None:
        """Fills `buffer` from byte `start` of a file. Thread safe."""
        ...

    def fingerprint(self, file: str) -> tuple[int, ...]:
        """Numbers that change when the file does."""
        ...

    def close(self) -> None:
        """Frees what reading holds open; reading again reopens it."""
        ...


class Folder:
    """The regular files of a folder and its subfolders, links to files included.

    Hidden subfolders (.git, .cache) and links to folders are left out, and so is what is no file
    (sockets, pipes). Sizes are those of the first look; files are opened once and stay open.

    Raises AwqconvError, in every method, for what cannot be read, with the system's reason.
    """

    in_order = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.name = str(path)
        self._files: dict[str, int] | None = None
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()
        if not os.path.isdir(self.path):
            kind = "a file" if os.path.exists(self.path) else "not there"
            raise AwqconvError(
                f"{kind}, where a model folder should be",
                shown(self.name),
                "Give the folder that holds config.json and the safetensors files.",
            )

    def files(self) -> dict[str, int]:
        """Size in bytes of every file. Raises AwqconvError also for a link to nothing."""
        with self._lock:
            if self._files is None:
                found: dict[str, int] = {}
                self._walk("", found)
                self._files = dict(sorted(found.items()))
            return self._files

    def _walk(self, folder: str, found: dict[str, int]) -> None:
        try:
            with os.scandir(self.path / folder) as entries:
                for entry in entries:
                    name = folder + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        if not entry.name.startswith("."):
                            self._walk(name + "/", found)
                        continue
                    info = entry.stat()
                    if stat.S_ISREG(info.st_mode):
                        name.encode()
                        found[name] = info.st_size
                    if len(found) > MAX_FILES:
                        raise AwqconvError(
                            f"more than {MAX_FILES:,} files",
                            shown(self.name),
                            "Give the folder of one model.",
                        )
        except UnicodeEncodeError:
            raise AwqconvError("a file name that is not UTF-8", ascii(name), "Rename it.") from None
        except OSError as error:
            raise self._error(shown(str(error.filename or folder)), "listed", error) from None

    def _error(self, where: str, verb: str, error: OSError) -> AwqconvError:
        if isinstance(error, FileNotFoundError):
            fix = "It is gone, or a link to nothing. Download the model again, then rerun."
        else:
            fix = "Check the disk and the file's permissions, then rerun."
        return AwqconvError(f"cannot be {verb}: {error.strerror or error}", where, fix)

    def _descriptor(self, file: str) -> int:
        size = self.files().get(file)
        with self._lock:
            if file not in self._open:
                if size is None:
                    raise AwqconvError("no such file in the model", shown(file), "Download it.")
                try:
                    self._open[file] = os.open(self.path / file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise self._error(shown(file), "opened", error) from None
            return self._open[file]

    def read(self, file: str, start: int, stop: int) -> bytes:
        """The bytes start..stop of a file, which the file must have."""
        size = self.files().get(file, stop)
        if not 0 <= start <= stop <= size:
            raise AwqconvError(
                f"bytes {start} to {stop} of a file of {size}",
                shown(file),
                "The file is incomplete: download it again.",
            )
        buffer = bytearray(stop - start)
        self.readinto(file, start, memoryview(buffer))
        return bytes(buffer)

    def readinto(self, file: str, start: int, buffer: memoryview) -> None:
        """Fills `buffer`, or raises AwqconvError: a file that ends early changed under the run."""
        descriptor = self._descriptor(file)
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], start + done)
            except OSError as error:
                raise self._error(shown(file), f"read at byte {start + done}", error) from None
            if not count:
                raise AwqconvError(
                    f"ends at byte {start + done}, before byte {start + len(buffer)}: it was cut "
                    "off or changed while being read",
                    shown(file),
                    "Let nothing write to the model, download the file again, then rerun.",
                )
            done += count

    def fingerprint(self, file: str) -> tuple[int, ...]:
        """Size, modification time in ns and inode of the file that now has this name."""
        try:
            info = os.stat(self.path / file)
        except OSError as error:
            raise self._error(shown(file), "read", error) from None
        return info.st_size, info.st_mtime_ns, info.st_ino

    def close(self) -> None:
        """Closes all files."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

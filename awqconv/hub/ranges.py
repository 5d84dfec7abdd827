"""Files on the hub read by ranges, where no disk has room for them, and the proof of what was read.

A range cannot be checked when it comes: the hub records the SHA-256 of whole files only. So the
digest of every block that is handed out is noted, in the journal of a conversion too, and `prove`
reads each file once more from end to end: if all of it has the SHA-256 that the hub records, and
every block the digest that it had when it was handed out, then what was handed out was right.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from awqconv.checkpoint.strict import shown
from awqconv.digest import digest
from awqconv.hub.failures import WrongSourceError

if TYPE_CHECKING:
    from awqconv.hub.repository import Repository

BLOCK = 1 << 23  # bytes of a request: 80 MB/s where the hub allows 3,000 requests in five minutes
KEPT = 8  # blocks in memory
READERS = 3  # threads that can read on, each with the block ahead, without losing others' blocks
MEMORY = (KEPT + READERS) * BLOCK  # bytes that all this takes


class Ranges:
    """Blocks of a repository's files. Thread safe.

    `scarce` says whether some file will be read so, as the disk is now. `fetched` counts the bytes
    that came; `files` holds the files that are read so, with their sizes, and `digests` XXH3-128
    of the blocks handed out, by file and number.
    """

    def __init__(self, repository: Repository, scarce: Callable[[], bool]) -> None:
        self.repository, self.scarce = repository, scarce
        self.fetched = 0
        self.files: dict[str, int] = {}
        self.digests: dict[str, dict[int, str]] = {}
        self._proved: set[str] = set()
        self._blocks: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.RLock()
        self._record: Callable[[str, dict[str, Any]], None] = lambda name, entry: None
        self._expect: Callable[[int, str], None] = lambda nbytes, why: None

    def follow(
        self,
        done: Mapping[str, Mapping[str, Any]],
        record: Callable[[str, dict[str, Any]], None],
        progress: Callable[[int], None],
    ) -> None:
        """Takes up the journal `done` of a run that was killed, and tells `record` of each block
        before it is handed out, the method `expect` of `progress`, if it has one, of the bytes that
        `prove` will read."""
        for entry in done.values():
            if "block" in entry:
                self.digests.setdefault(entry["file"], {})[entry["block"]] = entry["digest"]
        self._record, self._expect = record, getattr(progress, "expect", self._expect)
        for file in self.digests:
            self.begin(file, f"{file} was read by ranges before: it is fetched again to check it")

    def begin(self, file: str, why: str) -> None:
        """Notes that a file is read by ranges, and why."""
        with self._lock:
            if file not in self.files:
                self.files[file] = self.repository.files[file].size
                self._expect(self.files[file], why)

    def readinto(self, file: str, start: int, view: memoryview) -> None:
        """Fills `view` from byte `start` of a file that has all these bytes."""
        done = 0
        while done < len(view):
            number, offset = divmod(start + done, BLOCK)
            part = memoryview(self._block(file, number))[offset : offset + len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)

    def prove(self, progress: Callable[[int], None]) -> None:
        """Reads all files through once more. `progress` takes numbers of bytes.

        Raises WrongSourceError where what was handed out is not what the hub records.
        """
        for file in sorted(self.digests.keys() - self._proved):
            remote = self.repository.files[file]
            hasher = remote.hasher()
            for number in range(-(-remote.size // BLOCK)):
                block = self._block(file, number)
                hasher.update(block)
                progress(len(block))
            if hasher.hexdigest() != remote.etag:
                raise self._wrong(file, f"the hub records {remote.digest}, and its content is not")
            self._proved.add(file)

    @property
    def notes(self) -> list[str]:
        """What was read so, for the end of a run: one line, or none."""
        if not self.files:
            return []
        return [
            f"{len(self.files)} files of {sum(self.files.values()):,} bytes were read by ranges, "
            f"{self.fetched:,} bytes in all, and are what the hub records"
        ]

    def close(self) -> None:
        """Drops the blocks in memory and those on their way; the digests stay."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._blocks.clear()
        if pool:
            pool.shutdown(cancel_futures=True)

    def _block(self, file: str, number: int) -> bytes:
        """A block of a file; the one behind it sets out too."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="awqconv-ranges")
            for at in (number, number + 1):
                if (file, at) not in self._blocks and at * BLOCK < self.repository.files[file].size:
                    self._blocks[file, at] = self._pool.submit(self._fetch, file, at)
            self._blocks.move_to_end((file, number))
            block = self._blocks[file, number]
            while len(self._blocks) > KEPT:
                self._blocks.popitem(last=False)
        try:
            return block.result()
        except BaseException:
            with self._lock:
                self._blocks.pop((file, number), None)
            raise

    def _fetch(self, file: str, number: int) -> bytes:
        """A block from the hub, with its digest noted; one that differs now is asked for twice."""
        start = number * BLOCK
        stop = min(start + BLOCK, self.repository.files[file].size)
        for _ in range(2):
            block = self.repository.read(file, start, stop)
            value = digest(block)
            with self._lock:
                self.fetched += len(block)
                known = self.digests.setdefault(file, {})
                if number not in known:
                    entry = {"file": file, "block": number, "digest": value}
                    self._record(f"source {file} {number}", entry)
                if known.setdefault(number, value) == value:
                    return block
        raise self._wrong(file, f"its bytes from {start} on are not those that came before")

    def _wrong(self, file: str, what: str) -> WrongSourceError:
        return WrongSourceError(
            f"{what}; it was read by ranges, and nothing made of it is kept",
            f"{self.repository.pinned}: {shown(file)}",
            "Something between you and the hub changes files: check the proxy and HF_ENDPOINT, "
            "then run the same command again.",
        )

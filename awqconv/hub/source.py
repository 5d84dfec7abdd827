"""A repository on the hub as a checkpoint's source: headers by range, weights a shard at a time.

`read` serves headers, configs and tokenizers: small files whole and checked, safetensors headers
by range requests through a block cache. `readinto` serves tensors: the first read of a shard
downloads it into the spool, checks its SHA-256 and only then hands out bytes, so nothing is
converted that is not what the hub records; the next shard is downloaded meanwhile. A shard is
unlinked as soon as it is open, so the disk is free again when it is dropped, however the run ends.

A shard for which the spool's disk has no room is read by ranges (`awqconv.hub.ranges`): no disk at
all, its bytes fetched twice, and proved only at the end. Room is free space for all of the shard,
for what is still to come of shards on their way, and for `MARGIN`; the output of a conversion needs
none of it, because its space is allocated before the first tensor is read. Shards that are not in
use give way first, each once: one that is asked for again after that is read by ranges, so no shard
is downloaded over and over. A disk that fills up all the same has the same end.
"""

import fcntl
import os
import shutil
import threading
import uuid
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from awqconv.checkpoint.strict import shown
from awqconv.errors import AwqconvError, VerificationError
from awqconv.hub import PREFIX
from awqconv.hub.failures import (
    CutShortError,
    StoppedError,
    WrongSourceError,
    disk_full,
    explained,
)
from awqconv.hub.ranges import Ranges
from awqconv.hub.repository import WHOLE, RemoteFile, Repository

BLOCK = 1 << 16  # bytes of the first request of a header, and the unit of what is kept
KEEP = 3  # shards in the spool: the one before, the one in use, the next
MARGIN = 1 << 28  # bytes that stay free: for small files, and for others on the same disk


class _Shard:
    """An open, checked, unlinked file; its disk space is free when the last reader is done."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def readinto(self, start: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self.descriptor, [buffer[done:]], start + done)
            if not count:
                raise AwqconvError(f"ends at byte {start + done}", fix="Rerun.")
            done += count

    def __del__(self) -> None:
        os.close(self.descriptor)


class _Ranged:
    """A shard that is read by ranges."""

    def __init__(self, ranges: Ranges, file: str) -> None:
        self.ranges, self.file = ranges, file

    def readinto(self, start: int, buffer: memoryview) -> None:
        self.ranges.readinto(self.file, start, buffer)


class HubSource:
    """hf://organisation/name[@revision], pinned to the commit it has now. Thread safe.

    Only the files that a conversion needs are there. `spool` is the folder for shards in use, by
    default a folder in the hub's assets cache; at most `keep` of them lie there at a time. What is
    read of `ranges` is right only if `ranges.prove` says so.

    Raises AwqconvError, in every method, for whatever the hub refuses, and VerificationError for
    content that is not what it records.
    """

    in_order = True

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        spool: Path | None = None,
        keep: int = KEEP,
    ) -> None:
        self.repository = Repository.open(model, revision, token)
        self.name = PREFIX + self.repository.pinned
        self._spool, self._keep = spool, keep
        self._folder: Path | None = None
        self._guard = -1
        self._lock = threading.RLock()
        self._whole: dict[str, bytes] = {}
        self._blocks: dict[str, dict[int, bytes]] = {}
        self._shards: OrderedDict[str, Future[_Shard | _Ranged]] = OrderedDict()
        self._coming: dict[str, int] = {}  # bytes that downloads under way still need
        self._gave_way: set[str] = set()
        self.ranges = Ranges(self.repository, self._scarce)
        self._pool: ThreadPoolExecutor | None = None
        self._stop = threading.Event()
        self.downloads: list[str] = []

    @cached_property
    def wanted(self) -> dict[str, RemoteFile]:
        """The files that a conversion needs, as the hub records them."""
        return self.repository.needed()

    @cached_property
    def _after(self) -> dict[str, tuple[str]]:
        """Each shard but the last, with the one that follows it."""
        shards = [name for name in self.wanted if name.endswith(".safetensors")]
        return {name: (after,) for name, after in pairwise(shards)}

    def files(self) -> dict[str, int]:
        """Size in bytes of every needed file."""
        return {name: file.size for name, file in self.wanted.items()}

    def fingerprint(self, file: str) -> tuple[int, ...]:
        """Size and digest, in 60-bit numbers."""
        remote = self._file(file)
        etag = remote.etag
        return remote.size, *(int(etag[at : at + 15], 16) for at in range(0, len(etag), 15))

    def provenance(self) -> dict[str, Any]:
        """Where the bytes come from: repository, commit, and the digest of every needed file."""
        return {
            "repository": self.repository.name,
            "commit": self.repository.commit,
            "files": {name: file.digest for name, file in self.wanted.items()},
        }

    def read(self, file: str, start: int, stop: int) -> bytes:
        """The bytes start..stop of a file, which the file must have."""
        remote = self._file(file)
        if not 0 <= start <= stop <= remote.size:
            raise AwqconvError(
                f"bytes {start} to {stop} of a file of {remote.size}",
                f"{self.repository.pinned}: {shown(file)}",
                "The file is incomplete on the hub: use another revision.",
            )
        if remote.size <= WHOLE and not file.endswith(".safetensors"):
            return self._small(file)[start:stop]
        first, last = start // BLOCK, -(-stop // BLOCK)
        with self._lock:
            blocks = self._blocks.setdefault(file, {})
            missing = [at for at in range(first, last) if at not in blocks]
            if missing:
                begin, end = missing[0] * BLOCK, min((missing[-1] + 1) * BLOCK, remote.size)
                content = self.repository.read(file, begin, end)
                for at in range(missing[0], missing[-1] + 1):
                    blocks[at] = content[at * BLOCK - begin : (at + 1) * BLOCK - begin]
            joined = b"".join(blocks[at] for at in range(first, last))
        return joined[start - first * BLOCK : stop - first * BLOCK]

    def readinto(self, file: str, start: int, buffer: memoryview) -> None:
        """Fills `buffer` from byte `start` of a file, which is checked whole first, or, where it
        is read by ranges, by `ranges.prove` at the end."""
        remote = self._file(file)
        view = buffer.cast("B")
        if start < 0 or start + len(view) > remote.size:
            self.read(file, start, start + len(view))
        if remote.size <= WHOLE and not file.endswith(".safetensors"):
            view[:] = self._small(file)[start : start + len(view)]
        else:
            self._shard(file).result().readinto(start, view)

    def _scarce(self) -> bool:
        return any(
            not self._cached(file) and file.size + MARGIN > self._free()
            for file in self.wanted.values()
            if file.name.endswith(".safetensors")
        )

    def close(self) -> None:
        """Drops all shards, those on their way too, and the folder they came through."""
        with self._lock:
            self._stop.set()
            pool, self._pool = self._pool, None
            for shard in self._shards.values():
                shard.cancel()
            self._shards.clear()
        if pool:
            pool.shutdown(cancel_futures=True)
        self.ranges.close()
        with self._lock:
            if self._folder:
                shutil.rmtree(self._folder, ignore_errors=True)
                os.close(self._guard)
                self._folder, self._guard = None, -1

    def _file(self, file: str) -> RemoteFile:
        if file not in self.wanted:
            raise AwqconvError(
                "no such file among those that a conversion needs",
                f"{self.repository.pinned}: {shown(file)}",
                "Use another revision.",
            )
        return self.wanted[file]

    def _small(self, file: str) -> bytes:
        with self._lock:
            if file not in self._whole:
                self._whole[file] = self.repository.read(file)
            return self._whole[file]

    def _shard(self, file: str) -> Future[_Shard | _Ranged]:
        """A shard on its way or here; when it is here, the next one sets out if it has room."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(2, thread_name_prefix="awqconv-hub")
                self._stop = threading.Event()
            self._start(file)
            self._shards.move_to_end(file)
            if self._shards[file].done():  # the line is free for the next one
                for after in self._after.get(file, ()):
                    if after not in self._shards and self._room(self.wanted[after]):
                        self._start(after)
            while len(self._shards) > max(2, self._keep):
                self._shards.popitem(last=False)
            return self._shards[file]

    def _start(self, name: str) -> None:
        assert self._pool
        if name not in self._shards:
            self._shards[name] = self._pool.submit(self._bring, self.wanted[name], self._stop)

    def _bring(self, remote: RemoteFile, stop: threading.Event) -> _Shard | _Ranged:
        """A shard from the hub cache if it is there and right, else through the spool if there is
        room, else by ranges."""
        from huggingface_hub import constants

        cached = self._cached(remote)
        if cached and (shard := self._checked(remote, cached)):
            return shard
        if remote.name not in self._gave_way and self._room(remote, make=True):
            free = self._free()
            try:
                return self._download(remote, stop)
            except AwqconvError as error:
                if not disk_full(error):
                    raise
            finally:
                with self._lock:
                    del self._coming[remote.name]
        else:
            free = self._free()
        ranged = _Ranged(self.ranges, remote.name)
        self._same_header(remote, ranged)
        self.ranges.begin(
            remote.name,
            f"{remote.name} is read by ranges: it needs {remote.size + MARGIN:,} bytes of disk, "
            f"{self._spool or constants.HF_ASSETS_CACHE} has {free:,} free (HF_HOME names another "
            "place); its bytes are fetched twice, the second time to check them",
        )
        return ranged

    def _cached(self, remote: RemoteFile) -> Path | None:
        """Where the hub cache has a file."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self.repository.name, remote.name, revision=self.repository.commit
        )
        return Path(found) if isinstance(found, str) else None

    def _room(self, remote: RemoteFile, *, make: bool = False) -> bool:
        """Whether the spool has room for a file now; to `make` it, which also takes it, shards
        that are here give way, the one used longest ago first."""
        with self._lock:
            here = [n for n, shard in self._shards.items() if _on_disk(shard)] if make else []
            most = sum(self.wanted[name].size for name in here)
            need = remote.size + sum(self._coming.values()) + MARGIN
            while need > (free := self._free()):
                if not here or need > free + most:
                    return False
                name = here.pop(0)
                most -= self.wanted[name].size
                self._gave_way.add(name)
                del self._shards[name]
            if make:
                self._coming[remote.name] = remote.size
            return True

    def _free(self) -> int:
        """Bytes that are free in the spool."""
        try:
            return shutil.disk_usage(self._spool_folder()).free
        except AwqconvError as error:
            if disk_full(error):
                return 0
            raise

    def _download(self, remote: RemoteFile, stop: threading.Event) -> _Shard:
        """A whole file through the spool."""

        def count(nbytes: int) -> None:
            if stop.is_set():
                raise StoppedError
            self._coming[remote.name] -= nbytes

        for again in (False, True):
            self.downloads.append(remote.name)
            self._coming[remote.name] = remote.size
            try:
                path = self.repository.download(
                    remote.name, folder=self._spool_folder(), force=True, count=count
                )
            except CutShortError:
                if again:
                    raise
                continue
            shard = self._checked(remote, path)
            path.unlink(missing_ok=True)
            if shard:
                return shard
        raise VerificationError(
            f"its content is not {remote.digest}, which the hub records, twice in a row",
            f"{self.repository.pinned}: {shown(remote.name)}",
            "Something between you and the hub changes files: check the proxy and HF_ENDPOINT.",
        )

    def _checked(self, remote: RemoteFile, path: Path) -> _Shard | None:
        """The open file if it is right, and if its header is the one that was read by range."""
        shard = _Shard(path)
        with open(shard.descriptor, "rb", buffering=0, closefd=False) as content:
            if os.fstat(shard.descriptor).st_size != remote.size:
                return None
            if not remote.matches(content):
                return None
        self._same_header(remote, shard)
        return shard

    def _same_header(self, remote: RemoteFile, shard: _Shard | _Ranged) -> None:
        """Raises WrongSourceError where a file's header was another when the model was opened."""
        with self._lock:
            blocks = dict(self._blocks.get(remote.name, {}))
        for at, block in blocks.items():
            again = bytearray(len(block))
            shard.readinto(at * BLOCK, memoryview(again))
            if again != block:
                raise WrongSourceError(
                    f"its bytes from {at * BLOCK} on were others when its header was read",
                    f"{self.repository.pinned}: {shown(remote.name)}",
                    "Run the same command again.",
                )

    def _spool_folder(self) -> Path:
        """This run's folder, made when first needed; what dead runs left beside it is removed."""
        with self._lock, explained(self.repository.name, self.repository.commit):
            if self._folder is None:
                from huggingface_hub import cached_assets_path

                spool = self._spool or cached_assets_path(
                    "awqconv", self.repository.name.replace("/", "--"), self.repository.commit
                )
                for left in spool.glob("spool-*"):
                    _sweep(left)
                folder = spool / f"spool-{uuid.uuid4().hex[:12]}"
                folder.mkdir(parents=True)
                self._guard = _locked(folder / "lock")
                self._folder = folder
            return self._folder


def _on_disk(shard: Future[_Shard | _Ranged]) -> bool:
    """Whether a shard has come, to the disk."""
    return shard.done() and not shard.exception() and isinstance(shard.result(), _Shard)


def _locked(path: Path) -> int:
    """A descriptor that holds the lock of a spool folder. Raises OSError if a live run has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sweep(folder: Path) -> None:
    """Removes the spool folder of a run that is no longer alive."""
    try:
        descriptor = _locked(folder / "lock")
    except OSError:
        return
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)

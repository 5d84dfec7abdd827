"""Download what a conversion needs, and prove that it is what the hub records."""

import fnmatch
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from awqconv.checkpoint.reader import open_checkpoint
from awqconv.checkpoint.source import Folder
from awqconv.checkpoint.strict import shown
from awqconv.errors import AwqconvError, VerificationError
from awqconv.hub.failures import CutShortError, NoRangesError, explained
from awqconv.hub.repository import RemoteFile, Repository, split_name
from awqconv.hub.source import HubSource

Progress = Callable[[int, int], None]  # bytes that are here, bytes of all files

_PROXY = "Something between you and the hub changes files: check the proxy and HF_ENDPOINT."


@dataclass(frozen=True, slots=True)
class PulledFile:
    """A file of a pull. `digest` is the hub's record; None where nothing records it (offline).

    `cached`: it was here before. `refetched`: what was here or came first was corrupt.
    """

    name: str
    size: int
    digest: str | None
    cached: bool
    refetched: bool = False


@dataclass(frozen=True)
class PullResult:
    """Every file of `path` named in `files` has been read back and has its digest."""

    repo: str
    commit: str
    path: Path
    files: tuple[PulledFile, ...]
    left_out: tuple[str, ...]
    seconds: float
    dry_run: bool = False

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)

    @property
    def to_download(self) -> int:
        """Size of the files that were not here before."""
        return sum(file.size for file in self.files if not file.cached)

    def as_json(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        return asdict(self) | {
            "path": str(self.path),
            "nbytes": self.nbytes,
            "to_download": self.to_download,
        }


def pull(
    repo: str,
    *,
    revision: str | None = None,
    to: str | os.PathLike[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> PullResult:
    """Downloads an AWQ repository into the shared hub cache, or into folder `to`.

    The commit is pinned first; config, index and the safetensors headers are read and checked
    before any weight is downloaded. Then every file is compared with the digest the hub records
    (SHA-256 of LFS files, git's SHA-1 of others); one that differs is fetched once more.
    `include` and `exclude` are globs that narrow what a conversion needs. `force` downloads what
    is here already, and lets `to` be any folder. Files that are complete are never fetched twice.

    Raises AwqconvError for what is no AWQ checkpoint and for every refusal of the hub, and
    VerificationError for a file that differs twice; that file is removed.
    """
    started = time.monotonic()
    target = _target(to, force)
    cache = Path(cache_dir).expanduser() if cache_dir is not None else None
    if _offline():
        return _cached(repo, revision, target, cache, started)
    source = HubSource(repo, revision=revision, token=token)
    with suppress(NoRangesError):
        open_checkpoint(source)
    remote = source.repository
    wanted = [file for file in source.wanted.values() if _chosen(file.name, include, exclude)]
    if not wanted:
        raise AwqconvError(
            "no file is left to download", remote.name, "Widen --include or --exclude."
        )
    left_out = tuple(sorted(remote.files.keys() - {file.name for file in wanted}))
    fetch = _Fetch(remote, target, cache, force, progress, sum(file.size for file in wanted))
    if dry_run:
        here = {file.name for file in wanted if not force and fetch.here(file)}
        files = [PulledFile(f.name, f.size, f.digest, f.name in here) for f in wanted]
    else:
        with ThreadPoolExecutor(max_workers) as pool:
            jobs = [pool.submit(fetch.fetch, file) for file in wanted]
            try:
                files = [job.result() for job in as_completed(jobs)]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        files.sort(key=lambda file: file.name)
    return PullResult(
        remote.name,
        remote.commit,
        fetch.folder(),
        tuple(files),
        left_out,
        time.monotonic() - started,
        dry_run,
    )


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _chosen(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def among(globs: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in globs)

    return (not include or among(include)) and not among(exclude)


def _target(to: str | os.PathLike[str] | None, force: bool) -> Path | None:
    """The folder to download to. Raises AwqconvError for one that holds something else."""
    if to is None:
        return None
    target = Path(to).expanduser()
    if target.exists() and not target.is_dir():
        raise AwqconvError("a file, not a folder", shown(str(target)), "Name another: --to DIR")
    ours = target / ".cache" / "huggingface"
    if target.is_dir() and not force and not ours.exists() and any(target.iterdir()):
        raise AwqconvError(
            "not empty, and not an earlier download: its files could be overwritten",
            shown(str(target)),
            "Name another folder: --to DIR. To download into this one all the same: --force",
        )
    return target


class _Fetch:
    """The files of one pull: where they go, and whether they are right. Thread safe."""

    def __init__(
        self,
        remote: Repository,
        target: Path | None,
        cache: Path | None,
        force: bool,
        progress: Progress | None,
        total: int,
    ) -> None:
        self.remote, self.target, self.cache, self.force = remote, target, cache, force
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()

    def folder(self) -> Path:
        """Where the files are, or will be."""
        if self.target:
            return self.target
        from huggingface_hub import constants

        cache = self.cache or Path(constants.HF_HUB_CACHE)
        folder = "models--" + self.remote.name.replace("/", "--")
        return cache / folder / "snapshots" / self.remote.commit

    def here(self, file: RemoteFile) -> tuple[int, int] | None:
        """Inode and time of the file as an earlier run left it, if its size is right."""
        path = self.folder() / file.name
        if not path.is_file() or (info := path.stat()).st_size != file.size:
            return None
        return info.st_ino, info.st_mtime_ns

    def fetch(self, file: RemoteFile) -> PulledFile:
        """Brings one file here and checks it."""
        before = None if self.force else self.here(file)
        for again in (False, True):
            counted = self._meter()
            try:
                path = self._download(file, self.force or again, counted)
            except CutShortError:
                counted(-counted(0))
                if again:
                    raise
                continue
            with path.open("rb") as content:
                right = path.stat().st_size == file.size and file.matches(content)
            if right:
                counted(file.size - counted(0))
                cached = before is not None and before == self.here(file)
                return PulledFile(file.name, file.size, file.digest, cached, again)
            counted(-counted(0))
        self._discard(path)
        raise VerificationError(
            f"its content is not {file.digest}, which the hub records, twice in a row; "
            "it has been removed",
            f"{self.remote.pinned}: {shown(file.name)}",
            _PROXY,
        )

    def _download(self, file: RemoteFile, force: bool, counted: Callable[[int], int]) -> Path:
        path = self.remote.download(
            file.name,
            folder=self.target,
            cache=self.cache,
            force=force,
            count=counted if self._progress else None,
        )
        expected = self.folder() / file.name
        if not expected.exists() or not path.samefile(expected):
            raise AwqconvError(
                f"the hub answered with {shown(str(path))} for the pinned commit",
                f"{self.remote.pinned}: {shown(file.name)}",
                "The repository was rewritten meanwhile. Run the same command again.",
            )
        return path

    def _discard(self, path: Path) -> None:
        """Removes a wrong file: in the cache both the link and the content it names."""
        if path.is_symlink():
            (path.parent / os.readlink(path)).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def _meter(self) -> Callable[[int], int]:
        """A counter of one file's bytes, which also moves the progress of all."""
        mine = 0

        def count(n: int) -> int:
            nonlocal mine
            with self._lock:
                mine += n
                self._done += n
                if n and self._progress:
                    self._progress(self._done, self._total)
                return mine

        return count


def _cached(
    model: str, revision: str | None, target: Path | None, cache: Path | None, started: float
) -> PullResult:
    """What the cache holds, without a connection: complete, and checked by the names of blobs."""
    path = cached_snapshot(model, revision, cache)
    if target is not None:
        raise AwqconvError(
            "HF_HUB_OFFLINE is set: files stay where the cache has them",
            shown(str(path)),
            f"Convert them there: awqconv convert {path} --target TARGET",
        )
    source = Folder(path)
    try:
        open_checkpoint(source)
        files = []
        for name, size in source.files().items():
            blob = os.path.basename(os.readlink(path / name)) if (path / name).is_symlink() else ""
            sha256 = blob if len(blob) == 64 else None
            remote = RemoteFile(name, size, sha256, blob)
            if blob:
                with (path / name).open("rb") as content:
                    if not remote.matches(content):
                        raise VerificationError(
                            f"the cached file is not {remote.digest}, as its own name says",
                            shown(str(path / name)),
                            f"Run: HF_HUB_OFFLINE=0 awqconv pull {split_name(model)[0]}",
                        )
            files.append(PulledFile(name, size, remote.digest if blob else None, True))
    finally:
        source.close()
    seconds = time.monotonic() - started
    return PullResult(split_name(model)[0], path.name, path, tuple(files), (), seconds)


def cached_snapshot(model: str, revision: str | None = None, cache: Path | None = None) -> Path:
    """The folder of the hub cache that holds a repository. Raises AwqconvError if none does."""
    from huggingface_hub import snapshot_download

    repo, revision = split_name(model, revision)
    with explained(repo, revision):
        return Path(
            snapshot_download(repo, revision=revision, cache_dir=cache, local_files_only=True)
        )

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
from awqconv.hub.failures import CutShortError, NoRangesError, StoppedError, explained
from awqconv.hub.repository import RemoteFile, Repository, split_name
from awqconv.hub.source import HubSource

Progress = Callable[[int], None]  # bytes that came; negative if some must come again

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
    `progress` is called with numbers of bytes, from any thread.

    Raises AwqconvError for what is no AWQ checkpoint and for every refusal of the hub, and
    VerificationError for a file that differs twice; that file is removed.
    """
    prepared = prepare(
        repo,
        revision=revision,
        to=to,
        include=include,
        exclude=exclude,
        token=token,
        cache_dir=cache_dir,
        force=force,
    )
    return prepared.plan if dry_run else prepared.run(max_workers, progress)


def prepare(
    repo: str,
    *,
    revision: str | None = None,
    to: str | os.PathLike[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> "Pull":
    """Everything of `pull` that comes before the first weight."""
    target = _target(to, force)
    cache = Path(cache_dir).expanduser() if cache_dir is not None else None
    if offline():
        return _Cached(repo, revision, target, cache)
    source = HubSource(repo, revision=revision, token=token)
    with suppress(NoRangesError):
        open_checkpoint(source)
    wanted = [file for file in source.wanted.values() if _chosen(file.name, include, exclude)]
    if not wanted:
        raise AwqconvError(
            "no file is left to download",
            source.repository.name,
            "Widen --include, or leave out --exclude.",
        )
    return Pull(source.repository, wanted, target, cache, force)


def offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
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


class Pull:
    """The files of one pull: where they go, and whether they are right. Thread safe."""

    def __init__(
        self,
        remote: Repository,
        wanted: Sequence[RemoteFile],
        target: Path | None,
        cache: Path | None,
        force: bool,
    ) -> None:
        self.remote, self.wanted, self.target = remote, wanted, target
        self.cache, self.force = cache, force
        self._progress: Progress | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()

    @property
    def bars(self) -> bool:
        """Whether progress may be shown: HF_HUB_DISABLE_PROGRESS_BARS is not set."""
        from huggingface_hub import constants

        return not constants.HF_HUB_DISABLE_PROGRESS_BARS

    @property
    def plan(self) -> PullResult:
        """What would be downloaded, with what is here already by its size."""
        files = [
            PulledFile(f.name, f.size, f.digest, not self.force and self.here(f) is not None)
            for f in self.wanted
        ]
        return self._result(files, 0.0, dry_run=True)

    def run(self, max_workers: int = 8, progress: Progress | None = None) -> PullResult:
        """Downloads and checks every file."""
        began = time.monotonic()
        self._progress = progress
        with ThreadPoolExecutor(max_workers) as pool:
            jobs = [pool.submit(self.fetch, file) for file in self.wanted]
            try:
                files = [job.result() for job in as_completed(jobs)]
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if self.target is None:
            self._refer()
        return self._result(files, time.monotonic() - began)

    def _refer(self) -> None:
        """Notes what the branch was, as the hub cache does: other tools find it there offline."""
        asked = self.remote.asked or "main"
        if asked != self.remote.commit:
            ref = self.folder().parents[1] / "refs" / asked
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(self.remote.commit)

    def _result(
        self, files: Sequence[PulledFile], seconds: float, *, dry_run: bool = False
    ) -> PullResult:
        return PullResult(
            self.remote.name,
            self.remote.commit,
            self.folder(),
            tuple(sorted(files, key=lambda file: file.name)),
            tuple(sorted(self.remote.files.keys() - {file.name for file in files})),
            seconds,
            dry_run,
        )

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
            self._discard(path)
            counted(-counted(0))
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
            count=counted,
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
            if self._stop.is_set():
                raise StoppedError
            with self._lock:
                mine += n
                if n and self._progress:
                    self._progress(n)
                return mine

        return count


class _Cached(Pull):
    """What the hub cache holds, without a connection. A blob's name is the digest it must have."""

    def __init__(
        self, model: str, revision: str | None, target: Path | None, cache: Path | None
    ) -> None:
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
        finally:
            source.close()
        files = {
            name: RemoteFile(name, size, blob if len(blob) == 64 else None, blob)
            for name, size in source.files().items()
            for blob in [_blob(path / name)]
        }
        remote = Repository(split_name(model, revision)[0], revision, path.name, files)
        super().__init__(remote, list(files.values()), None, path.parents[2], force=False)

    def fetch(self, file: RemoteFile) -> PulledFile:
        if not file.blob:  # a cache without links does not record digests
            return PulledFile(file.name, file.size, None, True)
        path = self.folder() / file.name
        with path.open("rb") as content:
            if not file.matches(content):
                raise VerificationError(
                    f"the cached file is not {file.digest}, as its own name says",
                    shown(str(path)),
                    f"Fetch it again: HF_HUB_OFFLINE=0 awqconv pull {self.remote.name}",
                )
        return PulledFile(file.name, file.size, file.digest, True)


def _blob(path: Path) -> str:
    """Name of the blob that a snapshot's link leads to; empty where it is no link."""
    return os.path.basename(os.readlink(path)) if path.is_symlink() else ""


def cached_snapshot(model: str, revision: str | None = None, cache: Path | None = None) -> Path:
    """The folder of the hub cache that holds a repository. Raises AwqconvError if none does."""
    from huggingface_hub import snapshot_download

    repo, revision = split_name(model, revision)
    with explained(repo, revision):
        return Path(
            snapshot_download(repo, revision=revision, cache_dir=cache, local_files_only=True)
        )

"""A model repository on the hub, pinned to one commit: its files, and what their bytes must be."""

import hashlib
import io
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from awqconv._version import __version__
from awqconv.checkpoint.config import MANIFEST
from awqconv.checkpoint.model import OTHER_WEIGHTS
from awqconv.checkpoint.reader import INDEX, SINGLE
from awqconv.checkpoint.source import MAX_FILES
from awqconv.checkpoint.strict import parse_json, shown
from awqconv.errors import AwqconvError, VerificationError
from awqconv.hub import PREFIX
from awqconv.hub.failures import CutShortError, NoRangesError, explained, retried

CLIENT: dict[str, Any] = {"library_name": "awqconv", "library_version": __version__}
WHOLE = 1 << 26  # files up to this size that are no weights are read into memory whole

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def split_name(model: str, revision: str | None = None) -> tuple[str, str | None]:
    """Repository and revision of "[hf://]organisation/name[@revision]".

    Raises AwqconvError where two revisions are given.
    """
    repo, at, tail = model.removeprefix(PREFIX).strip("/").partition("@")
    if at and revision not in (None, tail):
        raise AwqconvError(
            f"two revisions: {shown(tail)!r} in the name, and {shown(str(revision))!r}",
            shown(model),
            "Give one of them.",
        )
    return repo, tail if at else revision


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub records it: `sha256` of the content if LFS keeps it, else None.

    `blob` is git's own digest, sha1("blob SIZE\\0" + content), of the content, or of the pointer
    where LFS keeps the content.
    """

    name: str
    size: int
    sha256: str | None
    blob: str

    @property
    def etag(self) -> str:
        """The digest the content must have, which is also its ETag."""
        return self.sha256 or self.blob

    @property
    def digest(self) -> str:
        """`etag` with its algorithm, as manifests and reports show it."""
        return f"{'sha256' if self.sha256 else 'git-sha1'}:{self.etag}"

    def hasher(self) -> "hashlib._Hash":
        """A hash that is `etag` after the whole content has passed through it."""
        if self.sha256:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    def matches(self, content: BinaryIO) -> bool:
        """Whether the rest of a stream is this file, to the last bit."""
        hasher = self.hasher()
        while chunk := content.read(1 << 20):
            hasher.update(chunk)
        return hasher.hexdigest() == self.etag


@dataclass
class Repository:
    """`name` at `commit`, whatever its branches do meanwhile. `asked` is the revision asked for."""

    name: str
    asked: str | None
    commit: str
    files: dict[str, RemoteFile]
    token: str | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls, model: str, revision: str | None = None, token: str | None = None
    ) -> "Repository":
        """Asks the hub what `model` is now. A renamed repository is followed to its new name.

        Raises AwqconvError for whatever the hub refuses, and for a repository whose file names
        could not be trusted on a disk.
        """
        from huggingface_hub import HfApi, constants

        repo, revision = split_name(model, revision)
        api = HfApi(token=token, **CLIENT)
        where = shown(f"{repo}@{revision}" if revision else repo)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with explained(repo, revision):
            try:
                info = retried(
                    lambda: api.model_info(
                        repo, revision=revision, files_metadata=True, timeout=timeout
                    )
                )
            except (AttributeError, KeyError, TypeError) as error:
                raise AwqconvError(
                    f"the hub's answer is not what a hub says ({error!r})",
                    where,
                    "Check HF_ENDPOINT and the proxy: echo $HF_ENDPOINT $HTTPS_PROXY",
                ) from None
        if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
            raise AwqconvError("the hub names no commit", where, "Check it: echo $HF_ENDPOINT")
        return cls(info.id, revision, info.sha, _files(info.siblings or (), where), token)

    @property
    def pinned(self) -> str:
        """Name and commit, for messages and manifests."""
        return f"{self.name}@{self.commit}"

    def read(self, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start..stop of a file, all of it without `stop`; all of it is checked.

        Every byte range must come from the pinned commit and the recorded content, by the
        response's headers. Raises AwqconvError where the server does not serve ranges, and
        VerificationError for a whole file that is not what the hub recorded, twice.
        """
        remote = self.files[file]
        if stop is not None:
            with explained(self.name, self.commit, file):
                return retried(lambda: self._get(remote, start, stop))
        for _ in range(2):
            with explained(self.name, self.commit, file), suppress(CutShortError):
                content = retried(lambda: self._get(remote, 0, remote.size))
                if remote.matches(io.BytesIO(content)):
                    return content
        raise VerificationError(
            f"its content is not {remote.digest}, which the hub records, twice in a row",
            f"{self.pinned}: {shown(file)}",
            "Something between you and the hub changes files: check the proxy and HF_ENDPOINT.",
        )

    def _get(self, remote: RemoteFile, start: int, stop: int) -> bytes:
        """One request, without retries."""
        from huggingface_hub import constants, get_session, hf_hub_url

        utils: Any = import_module("huggingface_hub.utils")
        if start == stop:
            return b""
        part = (start, stop) != (0, remote.size)
        headers = utils.build_hf_headers(token=self.token, **CLIENT) | {
            "Accept-Encoding": "identity"
        }
        if part:
            headers["Range"] = f"bytes={start}-{stop - 1}"
        with get_session().stream(
            "GET",
            hf_hub_url(self.name, remote.name, revision=self.commit),
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
        ) as response:
            utils.hf_raise_for_status(response)
            self._check(remote, [*response.history, response])
            span = f"bytes {start}-{stop - 1}/{remote.size}"
            where = f"{self.pinned}: {shown(remote.name)}"
            if part and response.status_code == 200:
                need = sum(file.size for file in self.needed().values())
                raise NoRangesError(
                    "the server sends whole files only, so no part of one can be read alone",
                    where,
                    f"Download the model first, {need:,} bytes into {constants.HF_HUB_CACHE} "
                    f"(HF_HOME names another place): awqconv pull {self.name}",
                )
            if part and (told := response.headers.get("Content-Range")) != span:
                raise AwqconvError(
                    f"asked for {span}, the server answers with {shown(str(told))}",
                    where,
                    f"Download the model first: awqconv pull {self.name}",
                )
            content = bytearray()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > stop - start:
                    break
        if len(content) != stop - start:
            raise CutShortError(
                f"{stop - start} bytes asked for, {len(content)} or more received",
                where,
                "Run the same command again.",
            )
        return bytes(content)

    def _check(self, remote: RemoteFile, responses: Iterable[Any]) -> None:
        """Whether the hub's own response speaks of the pinned commit and the recorded content."""
        for response in responses:
            commit = response.headers.get("X-Repo-Commit")
            if commit is None:
                continue
            etag = response.headers.get("X-Linked-Etag") or response.headers.get("ETag", "")
            etag = etag.removeprefix("W/").strip('"')
            if commit == self.commit and etag == remote.etag:
                return
            raise AwqconvError(
                f"the hub answers with commit {shown(commit)} and content {shown(etag)}, where "
                f"content {remote.etag} of the pinned commit was asked for",
                f"{self.pinned}: {shown(remote.name)}",
                "The repository was rewritten meanwhile. Run the same command again.",
            )
        raise AwqconvError(
            "the answer names no commit: it does not come from a hub",
            f"{self.pinned}: {shown(remote.name)}",
            "Check HF_ENDPOINT and the proxy: echo $HF_ENDPOINT $HTTPS_PROXY",
        )

    def download(
        self,
        file: str,
        *,
        folder: Path | None,
        cache: Path | None = None,
        force: bool = False,
        count: Callable[[int], object],
    ) -> Path:
        """A whole file in `folder`, or else in the hub cache. Its content is not checked here.

        `count` takes the numbers of bytes as they come, negative where some are fetched again;
        what it raises ends the download.
        """
        from huggingface_hub import hf_hub_download

        def call() -> Path:
            path: str = hf_hub_download(
                self.name,
                file,
                revision=self.commit,
                local_dir=folder,
                cache_dir=cache,
                token=self.token,
                force_download=force,
                tqdm_class=_bar(count),
                **CLIENT,
            )
            return Path(path)

        with explained(self.name, self.commit, file):
            return retried(call)

    def needed(self) -> dict[str, RemoteFile]:
        """The files that a conversion reads or copies, in name order.

        Left out are hidden files, weights in other formats, and safetensors that are no part of
        the model: outside the top folder, or beside the index's shards. A repository without
        safetensors keeps all its files, so that the reader can say what it holds instead; one
        that awqconv wrote needs them all.
        """
        if MANIFEST in self.files:
            return {name: file for name, file in self.files.items() if not name.startswith(".")}
        stored = {file for file in self.files if file.endswith(".safetensors") and "/" not in file}
        if INDEX in self.files:
            fix = f"Ask the authors to correct it: https://huggingface.co/{self.name}"
            index = parse_json(self.read(INDEX), INDEX, fix) if self._small(INDEX) else None
            weights = index.get("weight_map") if isinstance(index, dict) else None
            if isinstance(weights, dict):
                stored = {file for file in weights.values() if file in self.files}
        elif SINGLE in stored:
            stored = {SINGLE}
        if not stored:
            return self.files
        return {
            name: file
            for name, file in self.files.items()
            if name in stored
            or not (
                name.startswith(".")
                or "/." in name
                or name.endswith((".safetensors", *OTHER_WEIGHTS))
            )
        }

    def _small(self, file: str) -> bool:
        return self.files[file].size <= WHOLE


def _bar(count: Callable[[int], object]) -> type:
    """A progress bar as the client wants one, that shows nothing and passes its numbers on."""
    base: Any = import_module("huggingface_hub.utils").tqdm

    def init(self: Any, *args: Any, **options: Any) -> None:
        self.counts = not str(options.get("name")).endswith(".transfer")  # hf_xet has two bars
        base.__init__(self, *args, **options | {"disable": True})

    def update(self: Any, n: float | None = 1) -> None:
        if self.counts:
            count(int(n or 0))

    own = {"__init__": init, "update": update, "monitor_interval": 0}  # no thread to watch it
    return type("Bar", (base,), own)


def _files(siblings: Iterable[Any], where: str) -> dict[str, RemoteFile]:
    """Files by name, in name order. Raises AwqconvError for what no honest repository holds."""
    files: dict[str, RemoteFile] = {}
    for sibling in siblings:
        name, lfs = sibling.rfilename, sibling.lfs
        size = lfs.size if lfs else sibling.size
        sha256 = lfs.sha256 if lfs else None
        if not isinstance(name, str) or not _safe(name):
            raise AwqconvError(
                f"a file is named {shown(str(name))!r}, which is no path inside a folder",
                where,
                "Do not trust this repository; if it is yours, rename the file.",
            )
        if (
            type(size) is not int
            or not isinstance(sibling.blob_id, str)
            or not (_SHA256.fullmatch(str(sha256)) if lfs else _COMMIT.fullmatch(sibling.blob_id))
        ):
            raise AwqconvError(
                f"the hub records no size and digest of {shown(name)}, so it could not be checked",
                where,
                "Ask the hub itself instead of a mirror: unset HF_ENDPOINT",
            )
        files[name] = RemoteFile(name, size, sha256, sibling.blob_id)
    if len(files) > MAX_FILES:
        raise AwqconvError(
            f"{len(files):,} files, more than {MAX_FILES:,}", where, "Is it a model?"
        )
    return dict(sorted(files.items()))


def _safe(name: str) -> bool:
    """Whether a file name stays inside any folder it is written to, on any system."""
    parts = name.split("/")
    return (
        name.isprintable()
        and not set(name) & set("\\:")
        and all(0 < len(part.encode(errors="replace")) <= 255 for part in parts)
        and not {".", ".."} & set(parts)
        and len(name) <= 1024
        and not PurePosixPath(name).is_absolute()
    )

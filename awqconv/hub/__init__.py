"""Models on the Hugging Face Hub, through huggingface_hub, which is imported only when used."""

import os
import re
from typing import Any

from awqconv.checkpoint.source import Folder, Source

PREFIX = "hf://"

_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})/?$")


def open_source(model: str, *, revision: str | None = None, token: str | None = None) -> Source:
    """The source of a checkpoint: a folder by its path, a repository by hf://NAME[@REVISION].

    With HF_HUB_OFFLINE set, a repository is what the hub cache holds of it.
    """
    if not model.startswith(PREFIX):
        return Folder(model)
    from awqconv.hub.pull import cached_snapshot, offline

    if offline():
        return Folder(cached_snapshot(model, revision))
    from awqconv.hub.source import HubSource

    return HubSource(model, revision=revision, token=token)


def provenance(source: Source) -> dict[str, Any]:
    """Repository, commit and the files' digests of a source that is a repository, or a folder of
    the hub cache; nothing for any other source."""
    if not isinstance(source, Folder):
        told: dict[str, Any] = getattr(source, "provenance", dict)()
        return told
    found = _SNAPSHOT.search(os.path.abspath(source.path))
    if not found:
        return {}
    links = {name: source.path / name for name in source.files()}
    blobs = {name: os.path.basename(os.readlink(p)) for name, p in links.items() if p.is_symlink()}
    return {
        "repository": found[1].replace("--", "/"),
        "commit": found[2],
        "files": {
            name: f"{'sha256' if len(blob) == 64 else 'git-sha1'}:{blob}"
            for name, blob in blobs.items()
        },
    }


def local_name(model: str) -> str:
    """What a folder made of a model is called: beside it, but in the working folder for a model
    on the hub or in its cache."""
    if not model.startswith(PREFIX):
        found = _SNAPSHOT.search(os.path.abspath(model))
        return found[1].rpartition("--")[2] if found else model
    return model.removeprefix(PREFIX).partition("@")[0].strip("/").rpartition("/")[2]


__all__ = ["PREFIX", "local_name", "open_source", "provenance"]

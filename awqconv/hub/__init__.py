"""Models on the Hugging Face Hub, through huggingface_hub, which is imported only when used."""

from awqconv.checkpoint.source import Folder, Source
from awqconv.hub.repository import PREFIX


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


__all__ = ["PREFIX", "open_source"]

"""Upload a finished conversion, in one commit, with a model card that says what it is."""

import hashlib
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awqconv._version import __version__
from awqconv.checkpoint.config import MANIFEST
from awqconv.checkpoint.model import open_model
from awqconv.checkpoint.source import Folder
from awqconv.checkpoint.strict import shown
from awqconv.errors import AwqconvError, VerificationError
from awqconv.hub.failures import explained, retried
from awqconv.hub.pull import Progress
from awqconv.hub.repository import CLIENT, Repository, split_name

if TYPE_CHECKING:
    from awqconv.verification import Verification

CARD = "README.md"
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_MARK = re.compile(r"\n<!-- awqconv card ([0-9a-f]{16}) -->\n$")


@dataclass(frozen=True)
class PushResult:
    """Where it went. `card`: written, given (by the caller), or kept (the repository's own).

    `base_model` is what a written card names, if the manifest or the caller knows.
    """

    url: str
    repo: str
    commit: str
    files: int
    nbytes: int
    card: str
    base_model: str | None


def push(
    dest: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    base_model: str | None = None,
    card: str | os.PathLike[str] | None = None,
    message: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> PushResult:
    """Verifies a folder that `convert` wrote, and uploads it to a repository, made if need be.

    `create_pr` opens a pull request instead of writing to main. `base_model` is the repository
    the AWQ checkpoint came from, where the manifest does not know. `card` is a file to upload as
    README.md instead of the generated one; a README.md that people have written or edited in the
    repository is left alone. `progress` is called with numbers of bytes verified.

    Raises AwqconvError for a folder that is no finished conversion and for every refusal of the
    hub, VerificationError for a folder that does not verify; then nothing is uploaded.
    """
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token

    folder = Folder(dest)
    opened = open_model(folder)
    if opened.manifest is None:
        raise AwqconvError(
            "no awqconv.json: no finished conversion",
            shown(str(dest)),
            f"Convert first: awqconv convert MODEL {shlex.quote(str(dest))} --target TARGET",
        )
    if split_name(repo) != (repo, None):
        raise AwqconvError("only a repository can be named", shown(repo), "Leave out hf:// and @.")
    if not (token or get_token()):
        raise AwqconvError("you are not logged in to the hub", shown(repo), "Run: hf auth login")
    files = {name: size for name, size in folder.files().items() if not name.startswith(".")}
    verified = _verified(dest, progress)

    api = HfApi(token=token, **CLIENT)
    with explained(repo):
        created = retried(lambda: api.create_repo(repo, private=private, exist_ok=True))
        repo = created.repo_id
        if private and not api.model_info(repo).private:
            raise AwqconvError(
                "the repository is there already, and public",
                repo,
                f"Name another, or make it private: hf repos settings {repo} --private",
            )
    base_model = base_model or opened.manifest["source"].get("repository")
    kept = card is None and _has_own_card(repo, token)
    content: dict[str, str | bytes] = {name: str(folder.path / name) for name in files}
    if card is not None:
        content[CARD] = str(card)
    elif kept:
        content.pop(CARD, None)
    else:
        source = content.get(CARD)
        content[CARD] = model_card(
            opened.manifest,
            verified,
            repo,
            base_model=base_model,
            source_card=Path(str(source)) if source else None,
        ).encode()
    manifest = dict(opened.manifest)  # a card may change without being a flaw
    manifest["files"] = {name: it for name, it in manifest["files"].items() if name != CARD}
    content[MANIFEST] = (json.dumps(manifest, indent=1) + "\n").encode()

    def commit() -> CommitInfo:
        return api.create_commit(
            repo,
            [CommitOperationAdd(name, path) for name, path in content.items()],
            commit_message=message or f"{opened.layout} layout, by awqconv {__version__}",
            create_pr=create_pr,
        )

    with explained(repo):  # the same commit twice changes nothing; a pull request would be doubled
        done = commit() if create_pr else retried(commit)
    return PushResult(
        url=done.pr_url or str(done.repo_url),
        repo=repo,
        commit=done.oid,
        files=len(content),
        nbytes=sum(files.values()),
        card="given" if card is not None else "kept" if kept else "written",
        base_model=base_model,
    )


def _verified(dest: str | os.PathLike[str], progress: Progress | None) -> "Verification":
    from awqconv.verification import verify

    found = verify(dest, progress=progress)
    if not found.ok:
        raise VerificationError(
            f"it does not verify: {len(found.problems)} problems, the first {found.problems[0]}",
            shown(str(dest)),
            f"See all of them: awqconv verify {shlex.quote(str(dest))}",
        )
    return found


def _has_own_card(repo: str, token: str | None) -> bool:
    """Whether the repository has a README.md other than one that was generated and left alone."""
    remote = Repository.open(repo, token=token)
    if CARD not in remote.files:
        return False
    text = remote.read(CARD).decode(errors="replace")
    mark = _MARK.search(text)
    return mark is None or _mark(text[: mark.start()]) != mark[1]


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_card(
    manifest: Mapping[str, Any],
    verified: "Verification",
    repo: str,
    *,
    base_model: str | None = None,
    source_card: Path | None = None,
) -> str:
    """README.md of a conversion: metadata for the hub, how to serve it, what it is, what holds.

    Licence and language are taken over from the source's own card.
    """
    from huggingface_hub import ModelCardData, constants, metadata_load

    from awqconv.serving.launch import OWN, launch_command
    from awqconv.targets import layout

    target, source = layout(manifest["target"]), manifest["source"]
    form, tp = manifest.get("form", "hf"), manifest.get("tp", 1)
    commands = launch_command(target.name, repo, form, tp)
    inherited = (metadata_load(source_card) if source_card else None) or {}
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        library_name="transformers" if target.name in OWN else "awqconv",
        tags=["awqconv", "awq", "4-bit", target.name, *(name.lower() for name, _ in commands)],
        **{key: inherited[key] for key in INHERITED if key in inherited},
    )
    layouts = Counter(module["layout"] for module in manifest["modules"].values())
    others = ", ".join(f"{n} in {name}" for name, n in layouts.items() if name != target.name)
    link = f"[{base_model}]({constants.ENDPOINT}/{base_model})" if base_model else source["name"]
    exact = sum(module.exact for module in verified.modules)
    rows = {
        "source": link + (f" at commit `{source['commit']}`" if source.get("commit") else ""),
        "target": f"{target.name}, layout version {manifest['layout_version']}: {target.title}",
        "modules": f"{layouts[target.name]} of {layouts.total()} in this layout"
        + (f"; {others}" if others else ""),
        "form": form + (f", {tp} tensor parallel ranks" if tp > 1 else ""),
        "scales": scales if (scales := manifest["scale_dtype"]) != "keep" else "as in the source",
        "made by": f"awqconv {manifest['awqconv']}",
    }
    checks = [
        f"{verified.files} files and {verified.tensors} tensors have the digests that were "
        "recorded when they were written.",
        f"{exact} of {len(verified.modules)} modules hold, bit for bit, the zero points, scales "
        "and 4-bit weights of the source.",
    ]
    if verified.sampled and (nearest := verified.nearest):
        checks.append(
            f"Products with the packed words ({verified.sampled}): the largest error against its "
            f"bound is {nearest.error:.2e}, bound {nearest.bound:.2e}, in {nearest.module}."
        )
    install = "" if target.name in OWN else "pip install awqconv\n"
    serve = "\n\n".join(f"{name}:\n```\n{install}{line}\n```" for name, line in commands)
    text = "\n".join(
        [
            "---",
            data.to_yaml().rstrip(),
            "---",
            f"\n# {repo.rpartition('/')[2]}\n",
            f"The int4 weights of {link}, repacked ahead of time: nothing was quantized again.\n",
            f"## Serve it\n\n{serve}\n",
            "## What it is\n\n| | |\n|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            f"\n## Verified with awqconv {__version__} before the upload\n",
            *(f"- {line}" for line in checks),
            "\nTo check a copy, and to turn it back into AutoAWQ's layout, byte for byte:\n",
            f"```\nawqconv pull {repo} --to DIR\nawqconv verify DIR",
            "awqconv convert DIR --target awq\n```",
        ]
    )
    return f"{text}\n<!-- awqconv card {_mark(text)} -->\n"

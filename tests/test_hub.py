"""The hub over real HTTP: nothing wrong is ever kept, and every refusal says what to do."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from hub_server import Fault, HubServer, Repo, blob_id, sha256

from awqconv.checkpoint.reader import open_checkpoint
from awqconv.errors import AwqconvError
from awqconv.hub.pull import pull
from awqconv.hub.source import HubSource

SHARD = "model-00002-of-00003.safetensors"
FOREVER = 10**6
_sleep = time.sleep


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """The hub that a fresh import of the real client talks to."""
    environment = pytest.MonkeyPatch()
    with HubServer() as server:
        home = tmp_path_factory.mktemp("hf")
        for name, value in {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # this server speaks LFS; users keep xet
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_VERBOSITY": "error",
        }.items():
            environment.setenv(name, value)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
            environment.delenv(name, raising=False)
        _forget_client()
        yield server
        environment.undo()
        _forget_client()


def _forget_client() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


@pytest.fixture
def hub(_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty hub; the client's waits between tries are shortened, the server's are not."""
    monkeypatch.setattr(time, "sleep", lambda seconds: _sleep(min(seconds, 0.01)))
    yield _server
    _server.forget()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """An AWQ checkpoint of three shards as it lies in a repository, with what else lies there."""
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = {f"model.layers.{i}.mlp.up_proj": (512, 512, 128) for i in range(3)}
    make_checkpoint(folder, sizes, shards=3, bias=True)  # 4 tensors a module, 3 shards in turn
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found | {
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "README.md": b"# model\n",
        "LICENSE": b"free\n",
        "pytorch_model.bin": b"pickle" * 100,
        "onnx/model.safetensors": b"other" * 100,
        "templates/chat.jinja": b"{{ messages }}\n",
    }


@pytest.fixture
def repo(hub: HubServer, files: dict[str, bytes]) -> Repo:
    return hub.add("org/model", files)


def kept(folder: Path) -> dict[str, bytes]:
    """Every file that another tool would take for a downloaded one."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.relative_to(folder).parts
    }


def refusal(call: Callable[[], object], code: int = 2) -> AwqconvError:
    with pytest.raises(AwqconvError) as caught:
        call()
    assert caught.value.exit_code == code
    return told(caught.value)


def told(error: AwqconvError) -> AwqconvError:
    """An error that says all it must, in few words."""
    assert error.what
    assert error.where
    assert error.fix
    assert len(str(error)) < 1000
    return error


# --- pull


NEEDED = {
    "LICENSE",
    "README.md",
    "config.json",
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "templates/chat.jinja",
    "tokenizer.json",
}


def test_pull_into_the_shared_cache(repo: Repo, files: dict[str, bytes], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = pull("org/model", cache_dir=tmp_path, progress=lambda *at: seen.append(at))
    assert (result.repo, result.commit) == ("org/model", repo.refs["main"])
    assert result.path == tmp_path / "models--org--model" / "snapshots" / result.commit
    assert kept(result.path) == {name: files[name] for name in NEEDED}
    assert {file.name for file in result.files} == NEEDED
    assert set(result.left_out) == files.keys() - NEEDED
    for file in result.files:
        lfs = file.name.endswith(".safetensors")
        content = files[file.name]
        assert file.digest == (
            f"sha256:{sha256(content)}" if lfs else f"git-sha1:{blob_id(content)}"
        )
    assert result.to_download == result.nbytes == sum(len(files[name]) for name in NEEDED)
    assert seen[-1] == (result.nbytes, result.nbytes)
    open_checkpoint(result.path)
    json.dumps(result.as_json())

    from huggingface_hub import try_to_load_from_cache

    assert try_to_load_from_cache("org/model", SHARD, cache_dir=tmp_path) is None  # no ref to main
    found = try_to_load_from_cache("org/model", SHARD, cache_dir=tmp_path, revision=result.commit)
    assert found == str(result.path / SHARD)


def test_pull_again_downloads_nothing(repo: Repo, hub: HubServer, tmp_path: Path) -> None:
    pull("org/model", cache_dir=tmp_path)
    hub.log.clear()
    again = pull("org/model", cache_dir=tmp_path)
    assert again.to_download == 0
    assert all(file.cached for file in again.files)
    assert not [line for line in hub.log if "/cdn/" in line and "bytes=" not in line]
    assert pull("org/model", cache_dir=tmp_path, force=True).to_download == again.nbytes


def test_pull_to_a_folder(repo: Repo, files: dict[str, bytes], tmp_path: Path) -> None:
    for _ in range(2):
        result = pull("org/model", to=tmp_path / "model")
        assert result.path == tmp_path / "model"
        assert kept(result.path) == {name: files[name] for name in NEEDED}
    assert result.to_download == 0
    with (result.path / SHARD).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0" if files[SHARD][-1] else b"\1")
    os.utime(result.path / SHARD, (0, 0))  # so that the client believes it
    result = pull("org/model", to=tmp_path / "model")
    assert [file.name for file in result.files if file.refetched] == [SHARD]
    assert kept(result.path) == {name: files[name] for name in NEEDED}


def test_pull_leaves_other_folders_alone(repo: Repo, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    error = refusal(lambda: pull("org/model", to=tmp_path))
    assert "not empty" in error.what
    assert "--force" in error.fix
    assert kept(tmp_path) == {"config.json": b"mine"}
    pull("org/model", to=tmp_path, force=True)
    error = refusal(lambda: pull("org/model", to=tmp_path / "config.json"))
    assert "a file, not a folder" in error.what


def test_dry_run_downloads_nothing(repo: Repo, hub: HubServer, tmp_path: Path) -> None:
    result = pull("org/model", cache_dir=tmp_path, dry_run=True)
    assert {file.name for file in result.files} == NEEDED
    assert result.to_download == result.nbytes
    assert result.dry_run
    assert not kept(tmp_path)
    pull("org/model", cache_dir=tmp_path, include=["*.json"])
    result = pull("org/model", cache_dir=tmp_path, dry_run=True)
    assert {file.name for file in result.files if file.cached} == {
        name for name in NEEDED if name.endswith(".json")
    }


def test_include_and_exclude(repo: Repo, tmp_path: Path) -> None:
    result = pull("org/model", to=tmp_path / "a", include=["*.json"], exclude=["tok*"])
    assert set(kept(result.path)) == {"config.json", "model.safetensors.index.json"}
    error = refusal(lambda: pull("org/model", to=tmp_path / "b", include=["*.bin"]))
    assert "--include" in error.fix


@pytest.mark.parametrize("how", ["hf://org/model@v1", "org/model@v1", "org/model"])
def test_a_revision_is_pinned(
    repo: Repo, files: dict[str, bytes], tmp_path: Path, how: str
) -> None:
    old = repo.commit(files | {"README.md": b"old\n"}, "v1")
    revision = None if "@" in how else "v1"
    result = pull(how, revision=revision, to=tmp_path / "model")
    assert result.commit == old
    assert kept(result.path)["README.md"] == b"old\n"
    error = refusal(lambda: pull("org/model@v1", revision="main"))
    assert "two revisions" in error.what


def test_main_moves_in_mid_download(
    repo: Repo, hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    first = repo.refs["main"]

    def move(done: int, total: int) -> None:
        if repo.refs["main"] == first:
            repo.commit({name: content[::-1] for name, content in files.items()})

    result = pull("org/model", to=tmp_path / "model", max_workers=1, progress=move)
    assert repo.refs["main"] != first
    assert result.commit == first
    assert kept(result.path) == {name: files[name] for name in NEEDED}


def test_the_commit_goes_away_in_mid_download(repo: Repo, tmp_path: Path) -> None:
    """As after a force push: what is here is right, and the message names the revision."""

    def vanish(done: int, total: int) -> None:
        repo.commits.clear()

    error = refusal(
        lambda: pull("org/model", to=tmp_path / "model", max_workers=1, progress=vanish)
    )
    assert "no such revision" in error.what


def test_a_renamed_repository_is_followed(
    repo: Repo, hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repos["old/name"] = Repo("old/name", moved="org/model")
    result = pull("old/name", to=tmp_path / "model")
    assert result.repo == "org/model"
    assert kept(result.path) == {name: files[name] for name in NEEDED}


def test_the_token_stays_with_the_hub(repo: Repo, hub: HubServer, tmp_path: Path) -> None:
    repo.private = True
    pull("org/model", to=tmp_path / "model", token="hf_owner")
    with closing(HubSource("org/model", token="hf_owner")) as source:
        source.readinto(SHARD, 0, memoryview(bytearray(100)))
    assert hub.leaked == []
    assert any("/cdn/" in line for line in hub.log)


# --- faults


W = r"/cdn/\w+$"  # whole weights
H = r"/cdn/\w+ bytes"  # their headers, by range
C = "config.json"
INFO = "GET /api/models/org/model"
RECOVERED, REFUSED = "recovered", "refused"

FAULTS: list[tuple[Fault, str]] = [
    *((Fault("drop", W, at=at), RECOVERED) for at in (0, 1, 100, 70000, 130000)),
    *((Fault("drop", W, times=3, at=at), RECOVERED) for at in (1, 30000)),
    *((Fault("reset", W, times=t, at=at), RECOVERED) for t in (1, 3) for at in (0, 1, 70000)),
    *((Fault("drop", w, at=at), RECOVERED) for w in (INFO, C, H) for at in (0, 50)),
    *((Fault("reset", w, at=at), RECOVERED) for w in (INFO, C, H) for at in (0, 50)),
    *((Fault("drop", w, times=FOREVER, at=20), REFUSED) for w in (INFO, C, H, W)),
    *((Fault("refuse", w), RECOVERED) for w in (INFO, C, H, W)),
    *((Fault("refuse", w, times=FOREVER), REFUSED) for w in (INFO, C, H, W)),
    *((Fault("stall", w, at=10, seconds=1.5), RECOVERED) for w in (INFO, C, H, W)),
    *((Fault("slow", w, times=2, at=9000), RECOVERED) for w in (H, W)),
    *((Fault("wrong", W, at=at), RECOVERED) for at in (0, 9, 8000, 100000, -1)),
    *((Fault("wrong", W, times=FOREVER, at=at), REFUSED) for at in (0, 9, 8000, 100000, -1)),
    *((Fault("wrong", H, times=t, at=at), REFUSED) for t in (1, FOREVER) for at in (1, 9, 20)),
    *((Fault("wrong", where, at=3), RECOVERED) for where in (C, "tokenizer.json", "README")),
    *((Fault("wrong", w, times=FOREVER, at=-1), REFUSED) for w in (C, "tokenizer", "README")),
    *((Fault("short", where, at=30), RECOVERED) for where in (C, "README")),
    *((Fault("short", where, times=FOREVER, at=30), REFUSED) for where in (C, H, W)),
    *((Fault("status", w, status=s), RECOVERED) for w in (INFO, C, H, W) for s in (500, 503, 408)),
    *(
        (Fault("status", w, 2, status=429, headers={"Retry-After": "1"}), RECOVERED)
        for w in (INFO, W)
    ),
    *((Fault("status", w, FOREVER, status=429), REFUSED) for w in (INFO, C)),
    *((Fault("status", INFO, FOREVER, status=s), REFUSED) for s in (401, 403, 404, 500, 504)),
    *((Fault("status", W, FOREVER, status=s), REFUSED) for s in (401, 403, 404, 416, 502)),
    (Fault("other-range", H, times=1), REFUSED),
    *((Fault("other-commit", "resolve", times=t), REFUSED) for t in (1, FOREVER)),
    *((Fault("other-etag", "resolve", times=t), REFUSED) for t in (1, FOREVER)),
    *((Fault("html", w, times=FOREVER), REFUSED) for w in (INFO, C, W)),
]


def _name(fault: Fault) -> str:
    where = {W: "weights", H: "headers", INFO: "info"}.get(fault.where, fault.where)
    often = "forever" if fault.times == FOREVER else f"x{fault.times}"
    return (
        f"{fault.kind}{fault.status if fault.kind == 'status' else ''}-{where}-{fault.at}-{often}"
    )


CASES = [pytest.param(fault, outcome, id=_name(fault)) for fault, outcome in FAULTS]


@pytest.mark.parametrize(("fault", "outcome"), CASES)
def test_faults_while_pulling(
    hub: HubServer, repo: Repo, files: dict[str, bytes], tmp_path: Path, fault: Fault, outcome: str
) -> None:
    hub.faults.append(fault := replace(fault))
    right = {name: files[name] for name in NEEDED}
    target = tmp_path / "model"
    try:
        pull("org/model", to=target, max_workers=2)
        assert kept(target) == right
        ended = RECOVERED
    except AwqconvError as error:
        told(error)
        assert kept(target).items() <= right.items()
        ended = REFUSED
    assert fault.hits
    assert ended == outcome
    hub.faults.clear()
    assert kept(pull("org/model", to=target).path) == right


@pytest.mark.parametrize(("fault", "outcome"), CASES)
def test_faults_while_streaming(
    hub: HubServer, repo: Repo, files: dict[str, bytes], fault: Fault, outcome: str
) -> None:
    """Headers by range, then every tensor byte: what comes is right, or nothing comes."""
    hub.faults.append(fault := replace(fault))
    try:
        with closing(HubSource("org/model")) as source:
            open_checkpoint(source)
            for name, size in source.files().items():
                buffer = bytearray(size)
                source.readinto(name, 0, memoryview(buffer))
                assert buffer == files[name]
        ended = RECOVERED
    except AwqconvError as error:
        told(error)
        ended = REFUSED
    assert ended == outcome

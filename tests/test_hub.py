"""The hub over real HTTP: nothing wrong is ever kept, and every refusal says what to do."""

import _thread
import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint
from hub_server import Fault, HubServer, Repo, blob_id, sha256, sibling

from awqconv import convert, verify
from awqconv._version import __version__
from awqconv.checkpoint.model import open_model
from awqconv.checkpoint.reader import open_checkpoint
from awqconv.console import Meter
from awqconv.errors import AwqconvError
from awqconv.hub import open_source, ranges
from awqconv.hub import source as hub_source
from awqconv.hub.failures import explain
from awqconv.hub.pull import pull
from awqconv.hub.push import push
from awqconv.hub.source import MARGIN, HubSource

SHARD = "model-00002-of-00003.safetensors"
FOREVER = 10**6
COUNTS: Counter[str] = Counter()
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
    seen: list[int] = []
    result = pull("org/model", cache_dir=tmp_path, progress=seen.append)
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
    assert sum(seen) == result.nbytes
    open_checkpoint(result.path)
    json.dumps(result.as_json())
    assert not [thread for thread in threading.enumerate() if "tqdm" in thread.name]

    from huggingface_hub import try_to_load_from_cache

    for revision in (None, "main", result.commit):
        found = try_to_load_from_cache("org/model", SHARD, cache_dir=tmp_path, revision=revision)
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

    def move(count: int) -> None:
        if repo.refs["main"] == first:
            repo.commit({name: content[::-1] for name, content in files.items()})

    result = pull("org/model", to=tmp_path / "model", max_workers=1, progress=move)
    assert repo.refs["main"] != first
    assert result.commit == first
    assert kept(result.path) == {name: files[name] for name in NEEDED}


def test_the_commit_goes_away_in_mid_download(repo: Repo, tmp_path: Path) -> None:
    """As after a force push: what is here is right, and the message names the revision."""

    def vanish(count: int) -> None:
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
    hub.faults.append(fault := replace(fault))
    try:
        read_through(files)
        ended = RECOVERED
    except AwqconvError as error:
        told(error)
        ended = REFUSED
    assert ended == outcome


@pytest.mark.parametrize("seed", range(int(os.environ.get("AWQCONV_HUB_FAULTS", "30"))))
def test_random_faults(
    hub: HubServer,
    repo: Repo,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Several faults in one pull, stream, or stream by ranges, at random bytes.

    AWQCONV_HUB_FAULTS=1000 for a long run.
    """
    rng = random.Random(seed)
    if seed % 3 == 2:
        monkeypatch.setattr(HubSource, "_free", lambda self: 0)
        monkeypatch.setattr(ranges, "BLOCK", 1 << 15)
        monkeypatch.setattr(ranges, "KEPT", 4)
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(
            ["refuse", "drop", "reset", "wrong", "short", "status", "other-range", "other-etag"]
        )
        where = rng.choice([INFO, C, H, H if seed % 3 == 2 else W, "json", "resolve", ""])
        times = rng.choice([1, 1, 2, 5])
        at, status = rng.randrange(140_000), rng.choice([408, 429, 500, 502, 503, 504])
        hub.faults.append(Fault(kind, where, times, at, status=status))
    right, target = {name: files[name] for name in NEEDED}, tmp_path / "model"
    try:
        if seed % 3:
            read_through(files)
        else:
            pull("org/model", to=target)
            assert kept(target) == right
        ended = RECOVERED
    except AwqconvError as error:
        told(error)
        ended = REFUSED
    assert kept(target).items() <= right.items()
    COUNTS[ended] += 1
    COUNTS["faults"] += sum(fault.hits for fault in hub.faults)
    hub.faults.clear()
    assert kept(pull("org/model", to=target).path) == right
    if os.environ.get("AWQCONV_HUB_FAULTS") == str(seed + 1):
        print(dict(COUNTS))  # noqa: T201


def read_through(files: dict[str, bytes]) -> None:
    """Headers by range, then every byte of every file: what comes is right, or nothing comes."""
    with closing(HubSource("org/model")) as source:
        open_checkpoint(source)
        came = {name: bytearray(size) for name, size in source.files().items()}
        for name, buffer in came.items():
            source.readinto(name, 0, memoryview(buffer))
        source.ranges.prove(lambda count: None)
        assert came == {name: files[name] for name in came}


def test_interrupted_and_taken_up_again(
    repo: Repo, files: dict[str, bytes], tmp_path: Path
) -> None:
    right, target = {name: files[name] for name in NEEDED}, tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        pull("org/model", to=target, max_workers=1, progress=lambda n: _thread.interrupt_main())
    assert kept(target).items() < right.items()
    assert kept(pull("org/model", to=target).path) == right


# --- what the hub refuses


def _status(status: int, message: str = "", **headers: str) -> Fault:
    told = {"X-Error-Message": message} if message else {}
    return Fault("status", INFO, FOREVER, status=status, headers=told | headers)


REFUSALS: list[tuple[str, Callable[[HubServer, Repo], object], str, str]] = [
    ("missing", lambda hub, repo: hub.repos.clear(), "not found", "hf auth login"),
    ("private", lambda hub, repo: setattr(repo, "private", True), "private", "hf auth login"),
    ("gated", lambda hub, repo: setattr(repo, "gated", True), "gated", "/org/model"),
    ("disabled", lambda hub, repo: setattr(repo, "disabled", True), "disabled", "another"),
    ("limited", lambda hub, repo: hub.faults.append(_status(429)), "how often", "run"),
    (
        "limited for long",
        lambda hub, repo: hub.faults.append(_status(429, **{"Retry-After": "3600"})),
        "3600 s",
        "sleep 3600",
    ),
    (
        "limited by policy",
        lambda hub, repo: hub.faults.append(_status(429, ratelimit='"api";r=0;t=900')),
        "900 s",
        "sleep 900",
    ),
    ("down", lambda hub, repo: hub.faults.append(_status(503)), "HTTP 503", "status."),
    ("forbidden", lambda hub, repo: hub.faults.append(_status(403, "read me")), "read me", "hf"),
    ("odd", lambda hub, repo: hub.faults.append(_status(418)), "418", "again"),
    (
        "dropped",
        lambda hub, repo: hub.faults.append(Fault("refuse", INFO, FOREVER)),
        "broke the connection off",
        "curl",
    ),
    (
        "silent",
        lambda hub, repo: hub.faults.append(Fault("stall", INFO, FOREVER, at=5, seconds=1.2)),
        "stopped answering",
        "curl",
    ),
]


@pytest.mark.parametrize(
    ("arrange", "what", "fix"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS]
)
def test_refusals_of_the_hub(
    hub: HubServer,
    repo: Repo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arrange: Callable[[HubServer, Repo], object],
    what: str,
    fix: str,
) -> None:
    if what == "stopped answering":
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    arrange(hub, repo)
    for call in (
        lambda: pull("org/model", to=tmp_path / "model"),
        lambda: open_checkpoint(HubSource("org/model")),
    ):
        error = refusal(call)
        assert what in error.what
        assert fix in error.fix
        assert "org/model" in error.where
        assert not kept(tmp_path)


def test_bad_token_revision_name_and_address(
    hub: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refusal(lambda: pull("org/model", token="hf_stale"))
    assert "does not accept your token" in error.what
    assert "unset HF_TOKEN" in error.fix
    error = refusal(lambda: pull("org/model@nope"))
    assert "no such revision" in error.what
    assert error.where == "org/model@nope"
    assert "awqconv pull org/model" in error.fix
    for name in ("a/b/c", "org/mo del", "", "..", "hf://"):
        assert "not a repository name" in refusal(lambda: pull(name)).what  # noqa: B023

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    error = refusal(lambda: pull("org/model"))
    assert "cannot be reached" in error.what
    assert "curl -I http://127.0.0.1:9" in error.fix


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        (ValueError("The file is too large to be downloaded"), "above 50 GB", "pip install hf_xet"),
        (RuntimeError("CAS client: 503"), "CAS client: 503", "again"),
        (OSError(errno.ENOSPC, "No space left on device", "/d/x"), "No space left", "--to DIR"),
        (OSError(errno.EACCES, "Permission denied", "/d/x"), "Permission denied", "--to DIR"),
    ],
    ids=["50 GB", "xet", "full disk", "read-only"],
)
def test_failures_of_the_client(hub: HubServer, error: Exception, what: str, fix: str) -> None:
    found = explain(error, "org/model", "main", SHARD)
    assert found
    told(found)
    assert what in found.what
    assert fix in found.fix


def test_offline_uses_the_cache_and_says_what_is_missing(
    hub: HubServer, repo: Repo, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    pull("org/model")
    snapshot = cache / "models--org--model" / "snapshots" / repo.refs["main"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()

    named = f"org/model@{repo.refs['main']}"
    result = pull("org/model")
    assert result == replace(pull(named), seconds=result.seconds)
    assert result.path == snapshot
    assert result.to_download == 0
    assert {file.name for file in result.files} == NEEDED
    assert all(file.digest for file in result.files)
    with closing(open_source(f"hf://{named}")) as source:
        open_checkpoint(source)
        assert source.read("README.md", 0, 8) == files["README.md"]
    assert "HF_HUB_OFFLINE is set" in refusal(lambda: pull(named, to=cache / "x")).what

    blob = (snapshot / SHARD).resolve()
    content = bytearray(files[SHARD])
    content[-1] ^= 1
    blob.write_bytes(content)
    assert "HF_HUB_OFFLINE=0" in refusal(lambda: pull(named), code=1).fix
    blob.unlink()
    assert "missing" in refusal(lambda: pull(named)).what or not blob.exists()
    for name in ("org/other", f"org/model@{'a' * 40}"):
        error = refusal(lambda: pull(name))  # noqa: B023
        assert "cache" in error.what
        assert "HF_HUB_OFFLINE=0 awqconv pull" in error.fix
    assert hub.log == []
    shutil.rmtree(cache)


def test_a_real_process_obeys_the_environment(repo: Repo, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, as users set them."""

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        code = "from awqconv.hub.pull import pull; print(pull('org/model', revision='main').path)"
        environment = os.environ | {"HF_HOME": str(tmp_path)} | environment
        return subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    done = run()
    assert done.stdout.startswith(str(tmp_path / "hub" / "models--org--model")), done.stderr
    assert "Error" in run(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "none")).stderr


# --- repositories that nobody honest has made


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "a//b", "a/../b", "a\\b", "C:evil", "a\nb", "a/./b", "x" * 300],
)
def test_hostile_file_names(
    hub: HubServer, repo: Repo, files: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    repo.siblings = [sibling(n, c) for n, c in (files | {name: b"evil"}).items()]
    for call in (lambda: pull("org/model", to=tmp_path / "model"), lambda: HubSource("org/model")):
        error = refusal(call)
        assert "no path inside a folder" in error.what
        assert "Do not trust" in error.fix
    assert not kept(tmp_path)


def _index(files: dict[str, bytes], shard: object) -> dict[str, bytes]:
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"][next(iter(index["weight_map"]))] = shard
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


def _without_weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {n: c for n, c in files.items() if "safetensors" not in n}


def _config(files: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    return files | {"config.json": json.dumps(json.loads(files["config.json"]) | changes).encode()}


HOSTILE: list[tuple[str, Callable[[dict[str, bytes]], dict[str, bytes]], str]] = [
    ("index leaves", lambda f: _index(f, "../../etc/passwd.safetensors"), "own folder"),
    ("index absolute", lambda f: _index(f, "/etc/passwd.safetensors"), "own folder"),
    ("index into a folder", lambda f: _index(f, "onnx/model.safetensors"), "own folder"),
    ("index no name", lambda f: _index(f, 7), "not a name"),
    ("index names nothing", lambda f: _index(f, "none.safetensors"), "missing"),
    ("index names a pickle", lambda f: _index(f, "pytorch_model.bin"), "no safetensors file"),
    ("index no JSON", lambda f: f | {"model.safetensors.index.json": b"{"}, "not JSON"),
    ("index a list", lambda f: f | {"model.safetensors.index.json": b"[]"}, "list"),
    ("pickles only", _without_weights, "only safetensors are read"),
    (
        "a huge header",
        lambda f: f | {SHARD: (90_000_000_000).to_bytes(8, "little") + bytes(70_000)},
        "a header of 90,000,000,000 bytes",
    ),
    ("no header", lambda f: f | {SHARD: b"\xff" * 70_000}, "a header of"),
    ("no config", lambda f: {n: c for n, c in f.items() if n != "config.json"}, "no config.json"),
    ("not quantized", lambda f: _config(f, quantization_config=None), "not quantized"),
    ("gptq", lambda f: _config(f, quantization_config={"quant_method": "gptq"}), "gptq"),
    ("empty", lambda f: {}, "no config.json"),
]


@pytest.mark.parametrize(
    ("change", "what"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE]
)
def test_refused_before_any_weight(
    hub: HubServer,
    repo: Repo,
    files: dict[str, bytes],
    tmp_path: Path,
    change: Callable[[dict[str, bytes]], dict[str, bytes]],
    what: str,
) -> None:
    repo.commit(change(files))
    error = refusal(lambda: pull("org/model", to=tmp_path / "model"))
    assert what in error.what
    assert not kept(tmp_path)
    with closing(HubSource("org/model")) as source:
        assert refusal(lambda: open_checkpoint(source)).what == error.what
    assert hub.sent < 500_000
    assert not [line for line in hub.log if line.startswith("GET /cdn") and "bytes=" not in line]


def test_a_mirror_without_digests(hub: HubServer, repo: Repo, files: dict[str, bytes]) -> None:
    repo.siblings = [{"rfilename": name} for name in files]
    assert "no size and digest" in refusal(lambda: pull("org/model")).what


# --- a repository as a source


def test_a_source_reads_what_the_folder_reads(
    repo: Repo, hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    pull("org/model", to=tmp_path / "model")
    hub.log.clear()
    with closing(HubSource("hf://org/model")) as source:
        assert source.name == f"hf://org/model@{repo.refs['main']}"
        found, expected = open_checkpoint(source), open_checkpoint(tmp_path / "model")
        assert found.tensors == expected.tensors
        assert found.notes == expected.notes
        assert found.files == expected.files == {name: len(files[name]) for name in NEEDED}
        assert source.downloads == []
        provenance = source.provenance()
        assert provenance["repository"] == "org/model"
        assert provenance["commit"] == repo.refs["main"]
        assert provenance["files"][SHARD] == f"sha256:{sha256(files[SHARD])}"
        assert source.fingerprint(SHARD) == source.fingerprint(SHARD)
        assert source.fingerprint(SHARD) != source.fingerprint("model-00001-of-00003.safetensors")
        for start, stop in ((0, 0), (0, 8), (5, 65540), (65536, 65537), (70000, 137000)):
            assert source.read(SHARD, start, stop) == files[SHARD][start:stop]
        end = len(files[SHARD])
        assert source.read(SHARD, end - 3, end) == files[SHARD][-3:]
        for start, stop in ((0, end + 1), (-1, 3), (5, 4)):
            assert "incomplete" in refusal(lambda: source.read(SHARD, start, stop)).fix  # noqa: B023
        assert "no such file" in refusal(lambda: source.read("pytorch_model.bin", 0, 1)).what


def test_headers_cost_one_small_range_each(repo: Repo, hub: HubServer) -> None:
    with closing(HubSource("org/model")) as source:
        for _ in range(2):
            open_checkpoint(source)
    ranges = [line for line in hub.log if "/cdn/" in line]
    assert len(ranges) == 3
    assert all(line.endswith("bytes=0-65535") for line in ranges)


def test_shards_come_ahead_and_leave_nothing_behind(
    repo: Repo, hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    shards = [name for name in sorted(NEEDED) if name.endswith(".safetensors")]
    with closing(HubSource("org/model", spool=tmp_path)) as source:
        open_checkpoint(source)
        first = bytearray(10)
        source.readinto(shards[0], 100, memoryview(first))
        assert first == files[shards[0]][100:110]
        assert source.downloads == shards[:1]
        source.readinto(shards[0], 110, memoryview(first))
        source._shards[shards[1]].result()  # the next one is on its way already
        assert sorted(source.downloads) == shards[:2]
        assert not list(tmp_path.rglob("*.safetensors"))  # open, and unlinked
        (spool,) = tmp_path.iterdir()
        for name in (*shards, *reversed(shards)):
            buffer = bytearray(len(files[name]))
            source.readinto(name, 0, memoryview(buffer))
            assert buffer == files[name]
        assert sorted(source.downloads) == shards  # all three are kept
        source.close()
        assert not list(tmp_path.iterdir())
        source.readinto(shards[2], 0, memoryview(first))  # reopens
        assert first == files[shards[2]][:10]
    assert not list(tmp_path.iterdir())
    assert not spool.exists()


def test_few_shards_lie_on_the_disk_at_a_time(repo: Repo, files: dict[str, bytes]) -> None:
    with closing(HubSource("org/model", keep=2)) as source:
        for name in sorted(NEEDED):
            if name.endswith(".safetensors"):
                source.readinto(name, 0, memoryview(bytearray(10)))
                assert len(source._shards) <= 2


def test_what_a_dead_run_left_is_swept_and_a_live_one_is_not(repo: Repo, tmp_path: Path) -> None:
    dead = tmp_path / "spool-dead"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "half.incomplete").write_bytes(b"x" * 100)
    with closing(HubSource("org/model", spool=tmp_path)) as live:
        live.readinto(SHARD, 0, memoryview(bytearray(10)))
        assert not dead.exists()
        (spool,) = tmp_path.iterdir()
        with closing(HubSource("org/model", spool=tmp_path)) as other:
            other.readinto(SHARD, 0, memoryview(bytearray(10)))
            assert spool.exists()
        assert list(tmp_path.iterdir()) == [spool]


def test_a_source_takes_shards_from_the_cache(repo: Repo, hub: HubServer) -> None:
    from huggingface_hub import constants

    path = pull("org/model").path
    hub.log.clear()
    with closing(HubSource("org/model")) as source:
        source.readinto(SHARD, 0, memoryview(bytearray(10)))
        assert source.downloads == []
    assert (path / SHARD).exists()
    blob = (path / SHARD).resolve()
    blob.write_bytes(bytes(blob.stat().st_size))  # wrong: not taken
    with closing(HubSource("org/model")) as source:
        buffer = bytearray(10)
        source.readinto(SHARD, 0, memoryview(buffer))
        assert buffer == repo.files[SHARD][:10]
        assert SHARD in source.downloads
    shutil.rmtree(constants.HF_HUB_CACHE)


def test_a_header_that_changes_between_reading_and_download(
    repo: Repo, hub: HubServer, files: dict[str, bytes]
) -> None:
    """A range is believed only until the whole file is here."""
    flipped = len(files[SHARD][:2000].rstrip())  # among the tensors, in the first block
    hub.faults.append(Fault("wrong", H, times=3, at=flipped))
    with closing(HubSource("org/model")) as source:
        open_checkpoint(source)
        error = refusal(lambda: source.readinto(SHARD, 0, memoryview(bytearray(10))), code=1)
        assert "were others" in error.what


def test_many_threads_read_one_source(repo: Repo, files: dict[str, bytes]) -> None:
    shards = [name for name in sorted(NEEDED) if name.endswith(".safetensors")]
    with closing(HubSource("org/model")) as source, ThreadPoolExecutor(8) as pool:

        def read(i: int) -> bool:
            name, start = shards[i % 3], i * 997 % 100_000
            buffer = bytearray(3000)
            source.readinto(name, start, memoryview(buffer))
            head = source.read(name, i, i + 50)
            return buffer == files[name][start : start + 3000] and head == files[name][i : i + 50]

        assert all(pool.map(read, range(200)))
        assert sorted(source.downloads) == shards


def test_folders_are_opened_as_ever(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model")
    open_checkpoint(open_source(str(tmp_path / "model")))
    assert "not there" in refusal(lambda: open_source(str(tmp_path / "none"))).what


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, awqconv, awqconv.hub, awqconv.cli;"
        "heavy = {'huggingface_hub', 'httpx', 'httpx2', 'torch'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- push


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion to marlin, with a card that came from the source."""
    folder = tmp_path_factory.mktemp("push")
    make_checkpoint(folder / "model", {"model.layers.0.mlp.up_proj": (256, 128, 64)})
    (folder / "model" / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- theirs\n---\n# Their card\n"
    )
    convert(folder / "model", folder / "marlin", target="marlin")
    return folder / "marlin"


def test_push_pull_and_verify(hub: HubServer, converted: Path, tmp_path: Path) -> None:
    done = push(converted, "owner/marlin", base_model="org/model", token="hf_owner")
    assert done.card == "written"
    assert done.url == f"{hub.url}/owner/marlin"
    remote = hub.repos["owner/marlin"]
    assert done.commit == remote.refs["main"]
    assert not remote.private
    card = remote.files["README.md"].decode()
    for text in (
        "base_model: org/model",
        "base_model_relation: quantized",
        "library_name: awqconv",
        "- marlin",
        "- vllm",
        "license: apache-2.0",
        "vllm serve owner/marlin",
        "1 of 1 modules hold, bit for bit",
        "layout version",
        f"awqconv {__version__}",
    ):
        assert text in card, text
    assert "theirs" not in card
    assert "Their card" in (converted / "README.md").read_text()

    pull("owner/marlin", to=tmp_path / "copy")
    assert verify(tmp_path / "copy").ok
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (converted / name).read_bytes()
    assert open_model(tmp_path / "copy").layout == "marlin"


def test_push_again_and_leave_edited_cards_alone(
    hub: HubServer, converted: Path, tmp_path: Path
) -> None:
    def again(**options: Any) -> str:
        return push(converted, "owner/marlin", token="hf_owner", **options).card

    assert again() == "written"
    assert again(base_model="org/model") == "written"  # nobody has touched it
    remote = hub.repos["owner/marlin"]
    assert b"base_model" in remote.files["README.md"]
    mine = remote.files["README.md"].replace(b"# marlin", b"# My marlin")
    remote.commit(remote.files | {"README.md": mine})
    assert again() == "kept"
    assert remote.files["README.md"] == mine
    (tmp_path / "card.md").write_text("# Given\n")
    assert again(card=tmp_path / "card.md") == "given"
    assert remote.files["README.md"] == b"# Given\n"


def test_push_private_and_pull_requests(hub: HubServer, converted: Path) -> None:
    push(converted, "owner/secret", private=True, token="hf_owner", message="first")
    assert hub.repos["owner/secret"].private
    assert "COMMIT first" in hub.log
    hub.add("owner/open", {"config.json": b"{}"})
    before = hub.repos["owner/open"].refs["main"]
    error = refusal(lambda: push(converted, "owner/open", private=True, token="hf_owner"))
    assert "public" in error.what
    done = push(converted, "owner/open", create_pr=True, token="hf_owner")
    assert done.url.endswith("/owner/open/discussions/1")
    assert hub.repos["owner/open"].refs["main"] == before


def test_push_refuses(hub: HubServer, converted: Path, tmp_path: Path) -> None:
    def pushed(folder: Path, repo: str = "owner/x", token: str | None = "hf_owner") -> object:
        return push(folder, repo, token=token)

    make_checkpoint(tmp_path / "model")
    assert "awqconv convert" in refusal(lambda: pushed(tmp_path / "model")).fix
    assert "not logged in" in refusal(lambda: pushed(converted, token=None)).what
    assert "not accept" in refusal(lambda: pushed(converted, token="hf_stale")).what
    assert "rights" in refusal(lambda: pushed(converted, "org/x")).what
    assert "only a repository" in refusal(lambda: pushed(converted, "owner/x@main")).what
    broken = tmp_path / "broken"
    shutil.copytree(converted, broken)
    with (broken / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    error = refusal(lambda: pushed(broken), code=1)
    assert "does not verify" in error.what
    assert "awqconv verify" in error.fix
    assert not hub.repos


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Fault("status", "PUT /upload", status=503), RECOVERED),
        (Fault("reset", "PUT /upload"), RECOVERED),
        (Fault("reset", "POST .*/commit", at=5), RECOVERED),
        (Fault("drop", "POST .*/commit", times=2), RECOVERED),
        (Fault("status", "POST .*/commit", status=500), RECOVERED),
        (Fault("refuse", "POST /api/repos/create"), RECOVERED),
        (Fault("status", "PUT /upload", FOREVER, status=403), REFUSED),
        (Fault("status", "POST .*/batch", FOREVER, status=500), REFUSED),
        (Fault("status", "POST .*/commit", FOREVER, status=500), REFUSED),
        (Fault("refuse", "POST .*/commit", FOREVER), REFUSED),
        (Fault("refuse", "POST /api/repos/create", FOREVER), REFUSED),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.kind}-{value.where}",
)
def test_faults_while_pushing(hub: HubServer, converted: Path, fault: Fault, outcome: str) -> None:
    """All files are there after the one commit, or none."""
    hub.faults.append(fault := replace(fault))
    try:
        push(converted, "owner/marlin", token="hf_owner")
        ended = RECOVERED
    except AwqconvError as error:
        told(error)
        ended = REFUSED
    assert fault.hits
    assert ended == outcome
    remote = hub.repos.get("owner/marlin")
    there = {} if remote is None else {n: c for n, c in remote.files.items() if n[0] != "."}
    if ended == REFUSED:
        assert not there
        hub.faults.clear()
        push(converted, "owner/marlin", token="hf_owner")
        there = hub.repos["owner/marlin"].files
    name = "model.safetensors"
    assert there[name] == (converted / name).read_bytes()
    assert len(hub.repos["owner/marlin"].commits) == 2  # the empty one, and this


# --- conversion straight from a repository


def test_an_interrupted_conversion_goes_on(repo: Repo, hub: HubServer, tmp_path: Path) -> None:
    convert(HubSource("org/model"), tmp_path / "whole", target="marlin")
    left = 5

    def stop(count: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            hub.faults.append(Fault("status", W, FOREVER, status=404))

    refusal(lambda: convert(HubSource("org/model"), tmp_path / "m", target="marlin", progress=stop))
    assert not (tmp_path / "m").exists()
    hub.faults.clear()
    done = convert(HubSource("org/model"), tmp_path / "m", target="marlin")
    assert done.resumed
    assert kept(tmp_path / "m") == kept(tmp_path / "whole")


def test_convert_from_a_repository(repo: Repo, files: dict[str, bytes], tmp_path: Path) -> None:
    pull("org/model", to=tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "local", target="marlin")
    convert("hf://org/model", tmp_path / "remote", target="marlin")
    local, remote = kept(tmp_path / "local"), kept(tmp_path / "remote")
    assert local.keys() == remote.keys()
    for name in local.keys() - {"awqconv.json"}:
        assert local[name] == remote[name], name
    assert verify(tmp_path / "remote", source=tmp_path / "model").ok


# --- conversion where the spool's disk has no room


R = r"/cdn/\w+ bytes=(?!0-65535)"  # blocks of weights, by range
RESOLVED = r"resolve.*model.safetensors bytes=(?!0-65535)"  # the hub's own answer before them
ONE = "model.safetensors"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def used(disk: Path) -> int:
    info = os.statvfs(disk)
    return (info.f_blocks - info.f_bfree) * info.f_frsize


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests, and blocks that are fetched again, in a small file."""
    monkeypatch.setattr(ranges, "BLOCK", 1 << 17)
    monkeypatch.setattr(ranges, "KEPT", 4)


@pytest.fixture(scope="session")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AWQ checkpoint of 1 MB in a single file."""
    folder = tmp_path_factory.mktemp("one") / "model"
    make_checkpoint(folder, {f"model.layers.{i}.mlp.up_proj": (512, 512, 128) for i in range(6)})
    assert (folder / ONE).stat().st_size > 800_000
    return folder


@pytest.fixture
def one(hub: HubServer, one_file: Path) -> Repo:
    return hub.add("org/one", {path.name: path.read_bytes() for path in one_file.iterdir()})


@pytest.fixture
def whole(one: Repo, tmp_path: Path) -> Callable[[str], dict[str, bytes]]:
    """What a conversion with room for the shard writes."""

    def of(target: str) -> dict[str, bytes]:
        convert("hf://org/one", tmp_path / f"whole-{target}", target=target)
        return kept(tmp_path / f"whole-{target}")

    return of


def weights(files: dict[str, bytes]) -> int:
    """Bytes that a conversion reports as written."""
    return sum(len(content) for name, content in files.items() if name.endswith(".safetensors"))


@pytest.mark.parametrize("jobs", [1, 4])
@pytest.mark.parametrize("target", ["marlin", "amx", "xpu", "npu"])
@pytest.mark.usefixtures("small_blocks")
def test_a_file_larger_than_the_disk(
    hub: HubServer,
    whole: Callable[[str], dict[str, bytes]],
    small_disk: Path,
    tmp_path: Path,
    target: str,
    jobs: int,
) -> None:
    expected = whole(target)
    hub.log.clear()
    source = HubSource("org/one", spool=small_disk)
    before, most = used(small_disk), 0
    seen: list[int] = []
    said: list[tuple[int, str]] = []

    def look(count: int) -> None:
        nonlocal most
        most = max(most, used(small_disk))
        seen.append(count)

    meter = Meter(look, lambda nbytes, why: said.append((nbytes, why)))
    done = convert(source, tmp_path / "m", target=target, jobs=jobs, progress=meter)
    assert kept(tmp_path / "m") == expected
    assert most == before == used(small_disk)
    assert not list(small_disk.iterdir())
    size = source.files()[ONE]
    assert source.downloads == []
    assert source.ranges.files == {ONE: size}
    assert not [line for line in hub.log if "/cdn/" in line and "bytes=" not in line]
    ((more, why),) = said
    assert more == size
    assert sum(seen) == done.nbytes + size
    for text in (ONE, f"{size + MARGIN:,}", str(small_disk), "HF_HOME", "fetched twice"):
        assert text in why
    (note,) = done.notes
    assert f"{source.ranges.fetched:,} bytes in all" in note
    if jobs == 1:
        assert 2 * size - 3 * ranges.BLOCK <= source.ranges.fetched <= 2 * size + 2 * ranges.BLOCK


RANGE_FAULTS: list[tuple[Fault, str]] = [
    *((Fault("drop", R, t, at=at), RECOVERED) for t in (1, 3) for at in (0, 1, 70000, 131071)),
    *((Fault("reset", R, t, at=at), RECOVERED) for t in (1, 3) for at in (0, 1, 70000)),
    *((Fault(kind, R, at=9000), RECOVERED) for kind in ("refuse", "slow")),
    (Fault("stall", R, at=10, seconds=1.5), RECOVERED),
    *((Fault("status", R, status=s), RECOVERED) for s in (408, 500, 502, 503, 504)),
    (Fault("status", R, 2, status=429, headers={"Retry-After": "1"}), RECOVERED),
    *((Fault("status", R, FOREVER, status=s), REFUSED) for s in (403, 404, 416, 429, 500)),
    *((Fault(kind, R, FOREVER, at=5), REFUSED) for kind in ("drop", "reset", "refuse", "short")),
    *((Fault("wrong", R, t, at=at), REFUSED) for t in (1, FOREVER) for at in (-1, 100_000)),
    *((Fault(kind, R, at=5), REFUSED) for kind in ("other-range", "no-ranges", "html", "short")),
    (Fault("no-ranges", R, FOREVER), REFUSED),
    *((Fault(kind, RESOLVED), REFUSED) for kind in ("other-commit", "other-etag")),
]


@pytest.mark.parametrize("proving", [False, True], ids=["reading", "proving"])
@pytest.mark.parametrize(
    ("fault", "outcome"), [pytest.param(*case, id=_name(case[0])) for case in RANGE_FAULTS]
)
@pytest.mark.usefixtures("small_blocks")
def test_faults_while_reading_by_ranges(
    hub: HubServer,
    whole: Callable[[str], dict[str, bytes]],
    small_disk: Path,
    tmp_path: Path,
    fault: Fault,
    outcome: str,
    proving: bool,
) -> None:
    """In the first reading, or in the one that proves it: right or nothing, then and afterwards."""
    expected, dest = whole("marlin"), tmp_path / "m"
    left = weights(expected)

    def begin(count: int) -> None:
        nonlocal left
        left -= count
        if left <= 0 and not hub.faults:
            hub.faults.append(fault)

    fault = replace(fault)
    if not proving:
        hub.faults.append(fault)
    elif fault.kind == "wrong" and fault.times == 1:
        outcome = RECOVERED  # what is not as it came before is asked for once more
    try:
        source = HubSource("org/one", spool=small_disk)
        convert(source, dest, target="marlin", progress=begin)
        assert kept(dest) == expected
        ended = RECOVERED
    except AwqconvError as error:
        code = told(error).exit_code
        ended = REFUSED
        assert not dest.exists()
    assert fault.hits
    assert ended == outcome
    assert not list(small_disk.iterdir())
    hub.faults.clear()
    if ended == REFUSED:
        assert code == (1 if fault.kind in ("wrong", "short") else 2)
        again = convert(HubSource("org/one", spool=small_disk), dest, target="marlin")
        assert not (again.resumed and fault.kind == "wrong")
        assert again.resumed or not proving or fault.kind == "wrong"
        assert kept(dest) == expected


KILLED = """
import os, signal, sys
from awqconv import convert
from awqconv.hub import ranges, source
left = int(sys.argv[3])
def progress(count):
    global left
    left -= count
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
ranges.BLOCK = 1 << 17
model = source.HubSource("org/one", spool=source.Path(sys.argv[1]))
convert(model, sys.argv[2], target="marlin", progress=progress)
"""


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
@pytest.mark.parametrize("part", [0.5, 0.8, 1.2])
@pytest.mark.usefixtures("small_blocks")
def test_killed_while_reading_by_ranges(
    hub: HubServer,
    whole: Callable[[str], dict[str, bytes]],
    small_disk: Path,
    tmp_path: Path,
    part: float,
    wrong: bool,
) -> None:
    """A killed run goes on, and what it was handed is proved by the run that ends the work."""
    expected, dest = whole("marlin"), tmp_path / "m"
    if wrong:
        hub.faults.append(Fault("wrong", R, at=-1))
    count = str(int(part * weights(expected)))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, small_disk, dest, count],
        check=False,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -9, killed.stderr
    assert not dest.exists()

    def go_on() -> Any:
        return convert(HubSource("org/one", spool=small_disk), dest, target="marlin")

    if wrong:
        assert "by ranges" in refusal(go_on, code=1).what
        assert not dest.exists()
        assert not go_on().resumed
    else:
        assert go_on().resumed
    assert kept(dest) == expected
    assert not list(small_disk.iterdir())


@pytest.mark.usefixtures("small_blocks")
def test_what_was_read_by_ranges_is_proved_though_there_is_room_now(
    hub: HubServer, whole: Callable[[str], dict[str, bytes]], small_disk: Path, tmp_path: Path
) -> None:
    expected, dest = whole("marlin"), tmp_path / "m"
    hub.faults.append(Fault("wrong", R, at=-1))
    left = weights(expected) // 2

    def stop(count: int) -> None:
        nonlocal left
        left -= count
        if left < 0:
            raise KeyboardInterrupt

    source = HubSource("org/one", spool=small_disk)
    with pytest.raises(KeyboardInterrupt):
        convert(source, dest, target="marlin", jobs=1, progress=stop)
    error = refusal(lambda: convert("hf://org/one", dest, target="marlin"), code=1)
    assert "by ranges" in error.what
    convert("hf://org/one", dest, target="marlin")
    assert kept(dest) == expected


def test_only_what_does_not_fit_is_read_by_ranges(
    hub: HubServer, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"model.embed_tokens.weight": ("F16", (1024, 256)), "model.norm.weight": ("F16", (8,))}
    modules = {"model.layers.0.mlp.up_proj": (256, 256, 128)}
    make_checkpoint(tmp_path / "uneven", modules, large, shards=3)
    files = {path.name: path.read_bytes() for path in (tmp_path / "uneven").iterdir()}
    hub.add("org/uneven", files)
    convert("hf://org/uneven", tmp_path / "whole", target="marlin")
    monkeypatch.setattr(hub_source, "MARGIN", 0)
    source = HubSource("org/uneven", spool=small_disk)
    convert(source, tmp_path / "m", target="marlin")
    assert kept(tmp_path / "m") == kept(tmp_path / "whole")
    sizes = {name: len(content) for name, content in files.items() if "model-" in name}
    assert source.ranges.files == {n: size for n, size in sizes.items() if size > 300 * 1024}
    assert len(source.ranges.files) == 1
    assert sorted(source.downloads) == sorted(sizes.keys() - source.ranges.files.keys())


def test_shards_give_way_and_are_not_downloaded_twice(
    repo: Repo, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every module lies in all three shards, and the disk holds two."""
    convert("hf://org/model", tmp_path / "whole", target="amx")
    monkeypatch.setattr(hub_source, "MARGIN", 0)
    source = HubSource("org/model", spool=small_disk)
    convert(source, tmp_path / "m", target="amx")
    assert kept(tmp_path / "m") == kept(tmp_path / "whole")
    assert len(source.downloads) == len(set(source.downloads)) > 1
    assert source.ranges.files
    assert not list(small_disk.iterdir())


def test_a_disk_that_fills_up_in_mid_download(
    whole: Callable[[str], dict[str, bytes]],
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = whole("marlin")
    monkeypatch.setattr(hub_source, "MARGIN", -(10**9))
    source = HubSource("org/one", spool=small_disk)
    convert(source, tmp_path / "m", target="marlin")
    assert kept(tmp_path / "m") == expected
    assert source.downloads == [ONE]
    assert ONE in source.ranges.files
    assert not list(small_disk.iterdir())


def test_no_room_and_no_ranges(hub: HubServer, one: Repo, small_disk: Path, tmp_path: Path) -> None:
    hub.faults.append(Fault("no-ranges", "", FOREVER))
    need = sum(len(content) for content in one.files.values())
    source = HubSource("org/one", spool=small_disk)
    error = refusal(lambda: convert(source, tmp_path / "m", target="marlin"))
    for text in (f"{need:,} bytes", os.environ["HF_HOME"], "HF_HOME", "awqconv pull org/one"):
        assert text in error.fix


@pytest.mark.usefixtures("small_blocks")
def test_tokens_and_no_room_by_command(
    hub: HubServer,
    one: Repo,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A private repository through --token, and a disk without room, as people see it."""
    monkeypatch.setattr(HubSource, "_free", lambda self: 0)
    one.private = True
    model, dest, token = "hf://org/one", tmp_path / "m", ("--token", "hf_owner")
    assert cli(capsys, "inspect", model)[0] == 2
    assert cli(capsys, "inspect", model, *token)[0] == 0
    code, out, err = cli(capsys, "convert", model, dest, "-t", "marlin", *token)
    assert code == 0
    assert f"{ONE} is read by ranges" in err
    assert "read by ranges" in out
    code, out, err = cli(capsys, "verify", dest, "--source", model, *token, "--json")
    assert code == 0
    assert f"{ONE} is read by ranges" in err
    assert "read by ranges" in json.loads(out)["notes"][-1]
    hub.faults.append(Fault("wrong", R, FOREVER, at=-1))
    code, out, err = cli(capsys, "verify", dest, "--source", model, *token)
    assert code == 1
    assert "the hub records sha256:" in err
    assert hub.leaked == []


# --- the hub's xet storage


class Xet:
    """What the client calls of hf_xet; it writes `contents`, one after another, into files."""

    def __init__(self, *contents: bytes) -> None:
        self.contents = list(contents)

    def new_file_download_group(self, **options: Any) -> "Xet":
        return self

    def __enter__(self) -> "Xet":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start_download_file(self, info: Any, path: str) -> None:
        Path(path).write_bytes(self.contents.pop(0))


@pytest.mark.parametrize("way", ["pull", "stream"])
@pytest.mark.parametrize(("wrong", "outcome"), [(0, RECOVERED), (1, RECOVERED), (2, REFUSED)])
def test_what_comes_through_xet_is_checked_too(
    hub: HubServer,
    one: Repo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    wrong: int,
    outcome: str,
) -> None:
    """Whole shards come through hf_xet where it is installed; headers and ranges never do."""
    pytest.importorskip("hf_xet")
    from huggingface_hub import constants
    from huggingface_hub.utils import _xet

    right = one.files[ONE]
    xet = Xet(*[right[:-1] + bytes([right[-1] ^ 1])] * wrong, right)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(_xet, "get_xet_session", lambda: xet)
    monkeypatch.setattr(hub, "xet", True)

    def get() -> bytes:
        if way == "pull":
            return kept(pull("org/one", to=tmp_path / "model").path)[ONE]
        with closing(HubSource("org/one")) as source:
            open_checkpoint(source)
            buffer = bytearray(len(right))
            source.readinto(ONE, 0, memoryview(buffer))
            return bytes(buffer)

    if outcome == RECOVERED:
        assert get() == right
    else:
        assert "twice in a row" in refusal(get, code=1).what
        assert ONE not in kept(tmp_path / "model")
    assert len(xet.contents) == (outcome == REFUSED)
    assert not [line for line in hub.log if re.search(W, line)]
    assert [line for line in hub.log if re.search(H, line)]


# --- the command line


def cli(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one run."""
    from awqconv.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["awqconv", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_whole_way_by_command(
    repo: Repo,
    hub: HubServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    commit = repo.refs["main"]
    code, out, _ = cli(capsys, "pull", "org/model", "--to", "model", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["to_download"] == json.loads(out)["nbytes"]
    code, out, _ = cli(capsys, "pull", "org/model", "--to", "model")
    assert code == 0
    assert "9 files are what the hub records" in out
    assert "awqconv convert model" in out
    code, out, _ = cli(capsys, "pull", "org/model", "--to", "model", "--quiet")
    assert (code, out) == (0, "")

    hub.log.clear()
    ranks = ("--tp", "1", "--tp", "2")
    code, out, _ = cli(capsys, "inspect", "hf://org/model", "--target", "marlin", *ranks, "--json")
    assert [rank["tp"] for rank in json.loads(out)["ranks"]] == [1, 2]
    assert code == 0
    assert json.loads(out)["quantized"] == 3
    assert json.loads(out)["to_download"] == sum(len(repo.files[name]) for name in NEEDED)
    code, out, _ = cli(capsys, "convert", "hf://org/model", "--target", "marlin", "--dry-run")
    assert code == 0
    assert not [line for line in hub.log if "/cdn/" in line and "bytes=" not in line]

    code, out, _ = cli(capsys, "convert", "hf://org/model", "--target", "marlin")
    assert code == 0
    told = json.loads((tmp_path / "model-marlin" / "awqconv.json").read_text())["source"]
    assert (told["repository"], told["commit"]) == ("org/model", commit)
    assert told["files"][SHARD] == f"sha256:{sha256(repo.files[SHARD])}"
    for source in ("model", "hf://org/model"):
        code, _, err = cli(capsys, "verify", "model-marlin", "--source", source)
        assert code == 0, err

    code, out, _ = cli(capsys, "push", "model-marlin", "owner/m", "--token", "hf_owner", "--json")
    assert code == 0
    assert json.loads(out)["base_model"] == "org/model"
    card = hub.repos["owner/m"].files["README.md"].decode()
    assert "base_model: org/model" in card
    assert commit in card
    code, out, err = cli(capsys, "pull", "org/none", "--json")
    assert code == 2
    assert "hf auth login" in json.loads(out)["error"]["fix"]
    assert "error:" in err
    hub.faults.append(Fault("wrong", W, FOREVER, at=-1))
    code, _, err = cli(capsys, "pull", "org/model", "--to", "other")
    assert code == 1
    assert "sha256:" in err


def test_a_cached_model_is_converted_into_the_working_folder(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pull("org/model", cache_dir=tmp_path / "cache").path
    monkeypatch.chdir(tmp_path)
    done = convert(path, target="marlin")
    assert Path(done.dest).name == "model-marlin"
    source = json.loads((tmp_path / "model-marlin" / "awqconv.json").read_text())["source"]
    assert source["repository"] == "org/model"
    assert source["files"][SHARD] == f"sha256:{sha256(repo.files[SHARD])}"

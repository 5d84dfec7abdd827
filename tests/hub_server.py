"""A small hub on loopback: what huggingface_hub asks of the real one, and faults on demand.

    with HubServer() as hub:
        repo = hub.add("org/model", {"config.json": b"{}", "model.safetensors": b"..."})
        hub.faults.append(Fault("drop", "model.safetensors", at=1000))

Content that LFS keeps is served from another origin (localhost instead of 127.0.0.1), as the real
hub redirects to a content delivery network; a token that arrives there is recorded as leaked.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".bin", ".gguf", ".model")
_sleep = time.sleep  # tests that shorten the client's waits leave the server's alone


@dataclass
class Fault:
    """Something that goes wrong with the next `times` requests that match the pattern `where`.

    It is searched in "METHOD path", followed by " bytes=START-STOP" where a range is asked for.

    Kinds: refuse (closes without a word), drop (closes after `at` body bytes), reset (the same,
    with a TCP reset), stall (falls silent
    after `at` bytes for `seconds`), slow (`at` bytes every 10 ms), wrong (right size, one bit
    flipped at `at`), short (announces and sends only `at` bytes), status (answers `status` with
    `headers`), no-ranges (ignores Range), other-range (one byte further), other-commit and
    other-etag (lies in headers), html (a login page with status 200).
    """

    kind: str
    where: str = ""
    times: int = 1
    at: int = 0
    seconds: float = 0.0
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    hits: int = 0


@dataclass
class Repo:
    """Commits by id, branches by name; `moved` is the name it was renamed to."""

    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    disabled: bool = False
    moved: str | None = None
    siblings: list[dict[str, Any]] | None = None
    pulls: int = 0

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """A new commit of all these files, which `ref` then points to."""
        text = repr((len(self.commits), sorted((n, sha256(c)) for n, c in files.items())))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        """What is on main."""
        return self.commits[self.refs["main"]]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob_id(content: bytes) -> str:
    """Git's digest of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sibling(name: str, content: bytes) -> dict[str, Any]:
    """A file as model info lists it."""
    entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
    if name.endswith(LFS):
        entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
    return entry


class Quiet(ThreadingHTTPServer):
    """Clients that hang up are no news."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass


class HubServer:
    """Repositories, faults, and a log of every request; serves from the first `with` on."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.sent = 0  # body bytes
        self.leaked: list[str] = []
        self.tokens = {"hf_owner": "owner"}
        self.objects: dict[str, bytes] = {}
        self.xet = False  # whether content is offered through hf_xet too
        self.lock = threading.Lock()
        self.http = Quiet(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}"
        self._thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def add(self, name: str, files: Mapping[str, bytes], **options: Any) -> Repo:
        """A repository with one commit."""
        repo = self.repos[name] = Repo(name, **options)
        repo.commit(files)
        return repo

    def forget(self) -> None:
        """Back to an empty hub."""
        self.repos.clear()
        self.faults.clear()
        self.log.clear()
        self.leaked.clear()
        self.objects.clear()
        self.sent = 0

    def fault(self, request: str) -> Fault | None:
        """The fault this request meets, counted."""
        with self.lock:
            for fault in self.faults:
                if re.search(fault.where, request) and fault.hits < fault.times:
                    fault.hits += 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    # --- answers

    def answer(
        self, status: int, content: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        """A response, with whatever fault this request meets."""
        headers = {"Content-Length": str(len(content)), **(headers or {})}
        fault, cut, stop = self.fault, len(content), False
        kind = fault.kind if fault else ""
        at = fault.at if fault else 0
        if fault and kind == "wrong" and content:
            at %= len(content)
            content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        elif fault and kind in ("drop", "reset", "stall"):
            cut, stop = min(at, len(content)), True
        elif fault and kind == "short":
            content = content[:at]
            headers["Content-Length"] = str(len(content))
        elif fault and kind == "other-commit" and "X-Repo-Commit" in headers:
            headers["X-Repo-Commit"] = "f" * 40
        elif fault and kind == "other-etag":
            for name in ("ETag", "X-Linked-Etag"):
                if name in headers:
                    headers[name] = '"' + "e" * len(headers[name].strip('"')) + '"'
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with self.hub.lock:
            self.hub.sent += cut
        step = max(at, 1) if kind == "slow" else max(cut, 1)
        for begin in range(0, cut, step):
            self.wfile.write(content[begin : min(begin + step, cut)])
            self.wfile.flush()
            if kind == "slow":
                _sleep(0.01)
        if stop and fault:
            if kind == "stall":
                _sleep(fault.seconds)
            self.hang_up(reset=kind == "reset")

    def hang_up(self, *, reset: bool = False) -> None:
        """Closes the connection in the middle of whatever it is in."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.wfile = self.rfile = type(
            "Nowhere", (), {"flush": int, "close": int, "closed": True}
        )()

    def error(self, status: int, code: str = "", message: str = "") -> None:
        """A refusal as the hub words it."""
        headers = {"X-Error-Code": code} if code else {}
        if message:
            headers["X-Error-Message"] = message
        self.answer(status, json.dumps({"error": message or code}).encode(), headers)

    def json(self, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self.answer(200, json.dumps(value).encode(), headers)

    # --- requests

    def handle_request(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        request = f"{self.command} {path} {self.headers.get('Range', '')}".strip()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        with self.hub.lock:
            self.hub.log.append(request)
            if token and "localhost" in (self.headers.get("Host") or ""):
                self.hub.leaked.append(request)
        self.user = self.hub.tokens.get(token)
        self.fault = self.hub.fault(request)
        match self.fault:
            case Fault(kind="refuse"):
                return self.hang_up()
            case Fault(kind="status", status=status, headers=headers):
                return self.answer(status, b"{}", headers)
            case Fault(kind="html"):
                return self.answer(200, b"<html>Please log in</html>")
        if token and self.user is None:
            return self.error(401, message="Invalid credentials in Authorization header")
        if path.startswith("/cdn/"):
            content = self.hub.objects.get(path.removeprefix("/cdn/"))
            return self.error(404) if content is None else self.content(content)
        if path == "/xet-token":
            headers = {"X-Xet-Cas-Url": self.hub.url, "X-Xet-Access-Token": "t"}
            return self.answer(200, b"", headers | {"X-Xet-Token-Expiration": "9999999999"})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+(?:/pr/\d+)?)/(.+)", path):
            return self.resolve(*found.groups())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.info(found[1], found[2] or "main", blobs="blobs" in query)
        return self.write(path, query)

    def repo(self, name: str) -> Repo | None:
        """A repository that this request may see; else it has been answered."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.user):
            self.error(404 if self.user else 401, "RepoNotFound", "Repository not found")
        elif repo.disabled:
            self.error(403, message="Access to this resource is disabled.")
        elif repo.moved:
            self.answer(307, b"", {"Location": self.path.replace(name, repo.moved)})
        else:
            return repo
        return None

    def commit(self, repo: Repo, revision: str) -> str | None:
        """The commit a revision names; else the request has been answered."""
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha

    def info(self, name: str, revision: str, *, blobs: bool) -> None:
        if (repo := self.repo(name)) is None or (sha := self.commit(repo, revision)) is None:
            return
        listed = repo.siblings
        if listed is None:
            listed = [sibling(n, c) for n, c in repo.commits[sha].items()]
        if not blobs:
            listed = [{"rfilename": entry["rfilename"]} for entry in listed]
        self.json({"id": repo.name, "sha": sha, "siblings": listed, "private": repo.private})

    def resolve(self, name: str, revision: str, file: str) -> None:
        if (repo := self.repo(name)) is None or (sha := self.commit(repo, revision)) is None:
            return
        if repo.gated and not self.user:
            self.error(401, "GatedRepo", f"Access to model {name} is restricted.")
            return
        content = repo.commits[sha].get(file)
        if content is None:
            self.error(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob_id(content)}"'}
        if not file.endswith(LFS):
            self.content(content, headers)
            return
        key = sha256(content)
        self.hub.objects[key] = content
        headers |= {
            "X-Linked-Etag": f'"{key}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.hub.cdn}/cdn/{key}?file={file}",
        }
        if self.hub.xet:
            route = f"{self.hub.url}/xet-token"
            headers |= {"X-Xet-Hash": key, "X-Xet-Refresh-Route": route}
        self.answer(302, b"", headers)

    def content(self, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        """A file, or the range of it that is asked for."""
        kind = self.fault.kind if self.fault else ""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked or kind == "no-ranges":
            self.answer(200, content, headers)
            return
        start = int(asked[1]) + (kind == "other-range")
        stop = min(int(asked[2]) + 1 if asked[2] else len(content), len(content))
        span = f"bytes {start}-{stop - 1}/{len(content)}"
        self.answer(206, content[start:stop], {**(headers or {}), "Content-Range": span})

    # --- uploads

    def write(self, path: str, query: Mapping[str, list[str]]) -> None:
        hub = self.hub
        if path.startswith("/upload/") and self.command == "PUT":
            good = sha256(self.body) == path.removeprefix("/upload/")
            if good:
                hub.objects[sha256(self.body)] = self.body
            return self.answer(200 if good else 400)
        if path == "/api/validate-yaml":
            return self.json({"warnings": [], "errors": []})
        if not self.user:
            return self.error(401, message="Invalid username or password.")
        if path == "/api/whoami-v2":
            return self.json({"name": self.user, "type": "user", "orgs": []})
        sent = (
            json.loads(self.body) if self.body.startswith(b"{") and b"\n{" not in self.body else {}
        )
        if path == "/api/repos/create":
            name = f"{sent.get('organization') or self.user}/{sent['name']}"
            if name.partition("/")[0] != self.user:
                return self.error(403, message="You don't have the rights to create a model here")
            if name in hub.repos:
                told = {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
                return self.answer(409, json.dumps(told).encode())
            hub.add(
                name,
                {".gitattributes": b""},
                private=sent.get("visibility") == "private" or sent.get("private", False),
            )
            return self.json({"url": f"{hub.url}/{name}", "name": name})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            if (repo := self.repo(found[1])) is None:
                return None
            files = [
                {
                    "path": entry["path"],
                    "uploadMode": "lfs" if entry["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(repo, entry["path"]),
                }
                for entry in sent["files"]
            ]
            return self.json({"files": files})
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.json(
                {"transfer": "basic", "objects": [self.batch(o) for o in sent["objects"]]}
            )
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            if (repo := self.repo(found[1])) is None:
                return None
            if repo.name.partition("/")[0] != self.user:
                return self.error(403, message="You don't have the rights to push here")
            files = dict(repo.files)
            for line in map(json.loads, self.body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
                elif line["key"] == "header":
                    self.hub.log.append(f"COMMIT {value['summary']}")
            ref = "main"
            if "create_pr" in query:
                repo.pulls += 1
                ref = f"refs/pr/{repo.pulls}"
            sha = repo.commit(files, ref)
            answer = {"commitUrl": f"{hub.url}/{repo.name}/commit/{sha}", "commitOid": sha}
            if "create_pr" in query:
                answer["pullRequestUrl"] = f"{hub.url}/{repo.name}/discussions/{repo.pulls}"
            return self.json(answer)
        return self.error(404, message=f"nothing at {path}")

    def batch(self, entry: dict[str, Any]) -> dict[str, Any]:
        """What to do to upload an LFS object."""
        if entry["oid"] in self.hub.objects:
            return entry
        return {**entry, "actions": {"upload": {"href": f"{self.hub.url}/upload/{entry['oid']}"}}}


def _oid(repo: Repo, path: str) -> str | None:
    content = repo.files.get(path)
    if content is None:
        return None
    return sha256(content) if path.endswith(LFS) else blob_id(content)

"""Faults at system calls: conversions in forked processes that die or fail at the n-th of them.

The layer wraps the calls of `os` that change files, and `preadv`, for paths below one folder. The
forking process must be single-threaded; its children inherit compiled kernels, so a conversion of
a tiny model takes some 20 ms.
"""

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awqconv import cli
from awqconv.checkpoint import system

NAMED = ("open", "mkdir", "rename", "unlink", "rmdir")  # take a path first
OPENED = ("write", "pwrite", "ftruncate", "posix_fallocate", "fsync", "preadv")  # a descriptor
WRITES = ("write", "pwrite")
READ_ONLY = ("preadv",)

Act = Callable[["Call"], None]


@dataclass
class Call:
    """One call about to be made: on `path`, for writes with offset and length."""

    number: int
    name: str
    path: str
    real: Callable[..., Any]
    args: tuple[Any, ...]


class Layer:
    """Wraps the calls in this process. `act` sees each, before it happens, and may raise or kill.

    `log`: a file that gets one JSON line for each call.
    """

    def __init__(self, root: Path, act: Act, log: Path | None = None) -> None:
        self.root, self.act = str(root), act
        self.count = 0
        self.paths: dict[int, str] = {}
        self.lock = threading.RLock()
        self.write = os.write
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666) if log else -1
        for name in (*NAMED, *OPENED):
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        system.exchange = self._wrapped("exchange", system.exchange)

    def _path(self, name: str, args: tuple[Any, ...], keys: dict[str, Any]) -> str:
        if name in OPENED:
            return self.paths.get(args[0], "")
        path = os.fsdecode(args[0])
        if keys.get("dir_fd") is not None:
            path = os.path.join(self.paths.get(keys["dir_fd"], ""), path)
        return path if path.startswith(self.root) else ""

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keys: Any) -> Any:
            with self.lock:
                path = self._path(name, args, keys)
                if path and not (name == "open" and not args[1] & os.O_CREAT):
                    self.count += 1
                    self._note(name, path, args)
                    self.act(Call(self.count, name, path, real, args))
                result = real(*args, **keys)
                if name == "open":
                    self.paths[result] = path
                return result

        return call

    def _note(self, name: str, path: str, args: tuple[Any, ...]) -> None:
        if self.log < 0:
            return
        entry: dict[str, Any] = {"call": name, "path": path}
        if name == "pwrite":
            entry |= {"offset": args[2], "length": len(args[1])}
        if name in ("rename", "exchange"):
            entry["to"] = os.fsdecode(args[1])
        self.write(self.log, (json.dumps(entry) + "\n").encode())


def kill_at(number: int, torn: bool = False) -> Act:
    """Kill this process before its n-th changing call, or half way through it if it is a write."""

    def act(call: Call) -> None:
        if call.number == number:
            if torn and call.name in WRITES:
                target, data, *rest = call.args
                call.real(target, data[: len(data) // 2], *rest)
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def fail_at(number: int, code: int, *, once: bool, calls: Sequence[str] = ()) -> Act:
    """Raise OSError at the n-th call (of the named ones), and at all later ones unless `once`."""
    count = 0

    def act(call: Call) -> None:
        nonlocal count
        if not calls or call.name in calls:
            count += 1
            if count == number or (count > number and not once):
                raise OSError(code, os.strerror(code), call.path)

    return act


def do_at(number: int, name: str, work: Callable[[], None]) -> Act:
    """Do something before the n-th call of a name."""
    count = 0

    def act(call: Call) -> None:
        nonlocal count
        if call.name == name:
            count += 1
            if count == number:
                work()

    return act


def nothing(call: Call) -> None:
    """Let every call happen."""


def command(*args: object) -> int:
    """`awqconv ARGUMENTS` in this process; its exit status."""
    sys.argv = ["awqconv", *map(str, args)]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    return 0


class Run:
    """`awqconv ARGUMENTS` in a forked process. `prepare` runs in it first."""

    def __init__(self, *args: object, prepare: Callable[[], object] = lambda: None) -> None:
        self.result, theirs = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            os.close(theirs)
            return
        code = 99
        try:
            os.dup2(theirs, 1)
            os.dup2(theirs, 2)
            prepare()
            code = command(*args)
        except BaseException as error:
            import traceback

            traceback.print_exception(error)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> tuple[int, str]:
        """Its exit status (-9 if it was killed) and what it said."""
        with os.fdopen(self.result, "rb") as pipe:
            said = pipe.read().decode(errors="replace")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), said


def lose_power(log: Path, rng: random.Random) -> list[str]:
    """Undo, at random, what a run that was killed never forced to the disk; the files touched.

    Written ranges that no fsync of their file followed become zeros. A file whose folder was not
    synced after it was made may be gone. Bytes of the journal are cut off and overwritten.
    """
    ranges: dict[str, list[tuple[int, int]]] = {}
    made: set[str] = set()
    for entry in map(json.loads, log.read_text().splitlines()):
        call, path = entry["call"], entry["path"]
        if call == "pwrite":
            ranges.setdefault(path, []).append((entry["offset"], entry["length"]))
        elif call == "write":
            ranges.setdefault(path, []).append((0, -1))
        elif call == "open":
            made.add(path)
        elif call == "fsync":
            ranges.pop(path, None)
            made = {p for p in made if os.path.dirname(p) != path}
        elif call in ("rename", "exchange"):
            one, to = path + "/", entry["to"] + "/"
            ranges = {p.replace(one, to, 1): r for p, r in ranges.items()}
            made = {p.replace(one, to, 1) for p in made}
    touched = []
    for path, written in ranges.items():
        if not os.path.exists(path):
            continue
        touched.append(path)
        size = os.path.getsize(path)
        with open(path, "r+b") as file:
            if written[0][1] < 0:  # the journal
                file.truncate(rng.randint(0, size))
                if size and rng.random() < 0.5:
                    file.seek(rng.randrange(size))
                    file.write(bytes(rng.randint(1, 50)))
                continue
            for offset, length in written:
                if rng.random() < 0.5:
                    file.seek(offset)
                    file.write(bytes(length))
    for path in made:
        if rng.random() < 0.3 and os.path.isfile(path):
            touched.append(path)
            os.unlink(path)
    return touched


def unsynced(log: Path, dest: Path) -> list[str]:
    """What had not been forced to the disk when the staging folder became `dest`, or ever after."""
    dirty: set[str] = set()
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    end = next(i for i, entry in enumerate(entries) if entry.get("to") == str(dest))
    staging = entries[end]["path"]
    for entry in entries[:end]:
        call, path = entry["call"], entry["path"]
        if call in ("pwrite", "ftruncate", "posix_fallocate"):
            dirty.add(path)
        elif call == "fsync":
            dirty.discard(path)
        elif call in ("open", "mkdir", "unlink", "rmdir"):
            dirty.add(os.path.dirname(path))
            if call in ("unlink", "rmdir"):
                dirty.discard(path)
    found = [f"{path} before the rename" for path in dirty if path.startswith(staging)]
    after = [entry["path"] for entry in entries[end:] if entry["call"] == "fsync"]
    return found + ([] if str(dest.parent) in after else [f"{dest.parent} after the rename"])

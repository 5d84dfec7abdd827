"""Conversions under faults: killed, out of space, unreadable, without power, source changed.

    python benchmarks/faults.py [--runs N] [--seed S] [--model tiny|synthetic|FOLDER] [--dir DIR]
                                [--target T] [--only KIND ...] [--json]

After each fault the destination must be absent, or what it was, or complete; the same command must
then go on and end with the bytes of an uninterrupted run. Kinds:

    boundary    killed before each call that changes a file, and half way through each write
    power       the same, and what was not synced is lost
    random      killed at random moments by a second process, again and again until it is done
    process     the same with `python -m awqconv`, not a fork
    error       EIO or ENOSPC at each call, once or from then on
    read        EIO at each read of the source
    source      the source is cut off, or rewritten, at each write; then restored
    twice       two runs at once
    space       a file system that is too small: tmpfs, and ext4 in a file (needs root)
    order       at the rename all files and folders are synced

boundary, power and error run for a new destination, for --overwrite, and for --overwrite where the
kernel cannot exchange two names. N bounds the runs of each kind and mode, drawn at random; all
boundaries if it is 0.
"""

import argparse
import contextlib
import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import faulting  # noqa: E402
import synthetic  # noqa: E402
from checkpoints import OTHERS, make_checkpoint  # noqa: E402
from faulting import Act, Layer, Run  # noqa: E402

from awqconv.checkpoint import system  # noqa: E402
from awqconv.digest import Hasher  # noqa: E402

KINDS = ("order", "boundary", "power", "random", "process", "error", "read", "source", "twice",
         "space")  # fmt: skip
MODES = ("new", "overwrite", "no exchange")
SHAPES = {"a": (256, 192, 32), "b": (128, 64, -1), "c": (512, 128, 128), "d": (64, 8, 16)}
CHUNK = 1 << 22
MEMORY = Path("/dev/shm")
TRIES = 60  # kills of one conversion before it is let go on

State = dict[str, str]


class FaultError(Exception):
    """A conversion did not hold what it promises."""


def state(path: Path) -> State | None:
    """Digest of every file, None where no folder is."""
    if not path.is_dir():
        return None
    found = {}
    for file in sorted(p for p in path.rglob("*") if not p.is_dir()):
        hasher = Hasher()
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                hasher.update(hasher.position, chunk)
        found[str(file.relative_to(path))] = hasher.hexdigest()
    return found


class Harness:
    """Faults on conversions of one model, in a folder of its own."""

    def __init__(self, source: Path, room: Path, target: str, runs: int, seed: int) -> None:
        self.source, self.room, self.runs = source, room, runs
        self.rng = random.Random(seed)
        self.work, self.log = room / "work", room / "log"
        self.dest = self.work / "out"
        self.target = target
        self.counts: Counter[str] = Counter()
        self.table: dict[str, dict[str, float]] = {}
        other = "npu" if target != "npu" else "marlin"
        for name, of in (("first", target), ("old", other)):  # loads and compiles for the forks
            command = ["convert", source, room / name, "-t", of, "--json"]
            with contextlib.redirect_stdout(io.StringIO()):
                if faulting.command(*command):
                    raise FaultError(f"{command} does not run")
        self.whole, self.old = state(room / "first"), state(room / "old")
        shutil.rmtree(room / "first")
        self.seconds = min(self._time() for _ in range(3))

    def _time(self) -> float:
        self.reset("new")
        began = time.perf_counter()
        self.finish("new")
        return time.perf_counter() - began

    # --- one conversion

    def reset(self, mode: str) -> None:
        """An empty folder, with an older conversion at the destination unless it is a new one."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        if mode != "new":
            shutil.copytree(self.room / "old", self.dest)

    def args(self, mode: str, jobs: int = 1) -> list[object]:
        args = ["convert", self.source, self.dest, "-t", self.target, "--json", "-j", jobs]
        return [*args, *(["--overwrite"] if mode != "new" else [])]

    def start(self, mode: str, act: Act | None = None, jobs: int = 1) -> Run:
        """A conversion in a fork, under a fault."""

        def prepare() -> None:
            if mode == "no exchange":
                system.exchange = lambda one, other: False
            if act:
                Layer(self.work, act, self.log)

        return Run(*self.args(mode, jobs), prepare=prepare)

    def check(self, mode: str, code: int, said: str) -> bool:
        """Whether the conversion is done. Raises FaultError if the destination is neither this nor
        that, or a failure was not reported as one."""
        self.counts[f"exit {code}"] += 1
        found = state(self.dest)
        if "Traceback" in said or code not in (0, 2, -9):
            raise FaultError(f"exit {code}: {said}")
        if code == 2 and "\n" not in said.strip():
            raise FaultError(f"an error without a remedy: {said}")
        allowed = [self.whole]
        allowed += [None] if mode != "overwrite" else []
        allowed += [self.old] if mode != "new" else []
        if found not in allowed:
            raise FaultError(f"exit {code}, and an incomplete destination: {said}")
        if code == 0 and found != self.whole:
            raise FaultError(f"exit 0, and the destination is not complete: {said}")
        return found == self.whole

    def finish(self, mode: str) -> None:
        """Run without faults; the end must be as if there had never been one."""
        code, said = self.start(mode).wait()
        done = self.check(mode, code, said)
        if not done:
            raise FaultError(f"could not be continued, exit {code}: {said}")
        if code == 0:
            self.counts["jobs resumed"] += json.loads(said[said.index("{") :])["resumed"]
            left = sorted(set(os.listdir(self.work)) - {"out"})
            if left:
                raise FaultError(f"left behind: {left}")

    def under(self, mode: str, act: Act) -> tuple[int, str]:
        """A conversion under a fault, and its state checked."""
        code, said = self.start(mode, act).wait()
        self.check(mode, code, said)
        return code, said

    def chosen(self, count: int) -> Iterable[int]:
        """1..count, or a sample of it."""
        every = range(1, count + 1)
        return sorted(self.rng.sample(every, self.runs)) if 0 < self.runs < count else every

    def calls(self, mode: str) -> list[str]:
        """The names of the calls of an uninterrupted run."""
        self.reset(mode)
        code, said = self.start(mode, faulting.nothing).wait()
        if not self.check(mode, code, said):
            raise FaultError(said)
        return [json.loads(line)["call"] for line in self.log.read_text().splitlines()]

    # --- kinds: each yields once for each fault tried

    def boundary(self) -> Iterator[str]:
        for mode in MODES:
            calls = self.calls(mode)
            for n in self.chosen(len(calls)):
                for torn in {False, calls[n - 1] in faulting.WRITES}:
                    self.reset(mode)
                    yield f"{mode}, killed at call {n} ({calls[n - 1]}){' torn' * torn}"
                    self.under(mode, faulting.kill_at(n, torn))
                    self.finish(mode)

    def power(self) -> Iterator[str]:
        for mode in MODES:
            calls = self.calls(mode)
            for n in self.chosen(len(calls)):
                self.reset(mode)
                yield f"{mode}, power lost at call {n} ({calls[n - 1]})"
                self.under(mode, faulting.kill_at(n))
                lost = faulting.lose_power(self.log, self.rng)
                self.counts["files damaged"] += len(lost)
                self.check(mode, -9, f"damaged: {lost}")
                self.finish(mode)

    def random(self) -> Iterator[str]:
        for i in range(self.runs or 200):
            mode = MODES[i % 2]
            self.reset(mode)
            yield f"{mode}, killed at random, run {i}"
            done = False
            for _ in range(TRIES):
                run = self.start(mode, jobs=2)
                time.sleep(self.rng.uniform(0, self.seconds * 1.2))
                run.kill()
                code, said = run.wait()
                self.counts["kills"] += code == -9
                if done := self.check(mode, code, said):
                    break
            if not done:
                self.finish(mode)
            elif code == -9:
                self.finish("overwrite")  # tidies what the killed end left

    def process(self) -> Iterator[str]:
        command = [sys.executable, "-m", "awqconv", *map(str, self.args("new", 2))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        seconds = 0.0
        for i in range(min(self.runs or 20, 20)):
            self.reset("new")
            yield f"process, run {i}"
            for _ in range(TRIES):
                with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, text=True) as run:  # fmt: skip
                    partial = self.work / "out.partial"
                    while not partial.exists() and run.poll() is None:
                        time.sleep(0.001)
                    began = time.perf_counter()
                    if seconds:
                        time.sleep(self.rng.uniform(0, seconds * 1.2))
                        run.kill()
                    said = run.communicate()[0]
                    seconds = seconds or time.perf_counter() - began
                self.counts["kills"] += run.returncode == -9
                if self.check("new", run.returncode, said):
                    break
            else:
                self.finish("new")

    def error(self) -> Iterator[str]:
        for mode in MODES:
            calls = self.calls(mode)
            writes = [name for name in calls if name not in faulting.READ_ONLY]
            kinds = tuple(set(writes))
            for n in self.chosen(len(writes)):
                code = self.rng.choice((errno.EIO, errno.ENOSPC))
                once = self.rng.random() < 0.5
                self.reset(mode)
                yield f"{mode}, {errno.errorcode[code]} at change {n} ({writes[n - 1]}) {once=}"
                act = faulting.fail_at(n, code, once=once, calls=kinds)
                found = self.under(mode, act)[0]
                if found == 0 and writes[n - 1] in faulting.WRITES:
                    raise FaultError("a failed write went unnoticed")
                self.finish(mode)

    def read(self) -> Iterator[str]:
        self.calls("new")  # reads of the source are outside of the folder that is counted
        for n in self.chosen(self._reads()):
            self.reset("new")
            yield f"EIO at read {n}"
            act = faulting.fail_at(n, errno.EIO, once=True, calls=("preadv",))
            prepare = partial(Layer, self.source, act)
            code, said = Run(*self.args("new"), prepare=prepare).wait()
            if self.check("new", code, said) or code != 2:
                raise FaultError(f"a failed read went unnoticed, exit {code}: {said}")
            self.finish("new")

    def _reads(self) -> int:
        self.reset("new")
        prepare = partial(Layer, self.source, faulting.nothing, self.log)
        self.check("new", *Run(*self.args("new"), prepare=prepare).wait())
        return self.log.read_text().count('"preadv"')

    def source_(self) -> Iterator[str]:
        shard = max(self.source.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        data, times = shard.read_bytes(), shard.stat()
        writes = self.calls("new").count("pwrite")

        def cut() -> None:
            os.truncate(shard, len(data) // 2)

        def rewrite() -> None:
            with shard.open("r+b") as file:
                file.seek(len(data) // 3)
                file.write(bytes(len(data) // 2))

        for n in self.chosen(writes - 1):
            for work in (cut, rewrite):
                self.reset("new")
                yield f"source {work.__name__} at write {n}"
                try:
                    code, said = self.under("new", faulting.do_at(n, "pwrite", work))
                    if code != 2:
                        raise FaultError(f"a changed source went unnoticed, exit {code}: {said}")
                finally:
                    with shard.open("r+b") as file:
                        file.write(data)
                    if self.rng.random() < 0.5:
                        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
                self.finish("new")

    def twice(self) -> Iterator[str]:
        for i in range(self.runs or 100):
            mode = MODES[i % 2]
            self.reset(mode)
            yield f"{mode}, two at once, run {i}"
            first = self.start(mode)
            time.sleep(self.rng.choice((0, self.rng.uniform(0, self.seconds * 1.2))))
            second = self.start(mode)
            ends = [run.wait() for run in (first, second)]
            codes = sorted(code for code, _ in ends)
            for code, said in ends:
                self.check("new" if 0 in codes and mode == "new" else mode, code, said)
                if code == 2 and not ("another awqconv" in said or "exists already" in said):
                    raise FaultError(f"refused for another reason: {said}")
            self.counts["refused"] += codes.count(2)
            if codes not in ([0, 2], [0, 0]) or (mode == "new" and codes == [0, 0]):
                raise FaultError(f"exits {codes}: {ends}")
            if state(self.dest) != self.whole:
                raise FaultError("not complete")
            if left := sorted(set(os.listdir(self.work)) - {"out"}):
                raise FaultError(f"left behind: {left}")

    def space(self) -> Iterator[str]:
        need = sum(os.path.getsize(self.room / "old" / name) for name in self.old or {})
        need = max(need, sum(f.stat().st_size for f in self.source.iterdir()))
        for system_ in ("tmpfs", "ext4"):
            for i in range(min(self.runs or 20, 20)):
                shutil.rmtree(self.work, ignore_errors=True)
                self.work.mkdir()
                with mounted(system_, self.work, 3 * need + (1 << 20), self.room) as why:
                    if why:
                        print(f"skipped: {system_} cannot be mounted: {why}", file=sys.stderr)  # noqa: T201
                        break
                    yield f"{system_} too small, run {i}"
                    ballast = self.work / "ballast"
                    left = self.rng.randint(0, int(1.3 * need))
                    fill(ballast, left)
                    code, said = self.start("new").wait()
                    self.counts["disk full"] += code == 2
                    self.check("new", code, said)
                    if code == 2 and "Free some space" not in said:
                        raise FaultError(said)
                    # Let it begin, then take the space away.
                    ballast.unlink()
                    n = self.rng.randint(1, 8)
                    act = faulting.do_at(n, "pwrite", partial(fill, ballast, 0))
                    code, said = self.under("new", act)
                    self.counts["disk full"] += code == 2
                    ballast.unlink(missing_ok=True)
                    for path in self.work.iterdir():
                        if path.name == "lost+found":
                            path.rmdir()
                    self.finish("new")

    def order(self) -> Iterator[str]:
        for mode in MODES:
            yield f"{mode}, order of syncing"
            self.calls(mode)
            if late := faulting.unsynced(self.log, self.dest):
                raise FaultError(f"not synced: {late}")

    def run(self, kinds: Iterable[str], say: Callable[[str], None]) -> list[str]:
        """Faults of these kinds; the failures."""
        failures = []
        for kind in kinds:
            began, tried, failed = time.perf_counter(), 0, len(failures)
            before = self.counts.copy()
            faults = getattr(self, "source_" if kind == "source" else kind)()
            what = ""
            while True:
                try:
                    what = next(faults)
                except StopIteration:
                    break
                except FaultError as failure:
                    failures.append(f"{kind}: {what}: {failure}")
                    say(failures[-1])
                    break
                tried += 1
            row = {
                "tried": tried,
                "failed": len(failures) - failed,
                "seconds": round(time.perf_counter() - began, 1),
            }
            seen = dict(sorted((self.counts - before).items()))
            self.table[kind] = row | seen
            text = ", ".join(f"{n} {name}" for name, n in seen.items())
            seconds = f"{row['seconds']:6.1f} s"
            say(f"{kind:9}{tried:6} faults, {row['failed']} failed, {seconds}  {text}")
        return failures


def fill(ballast: Path, left: int) -> None:
    """Take all but `left` bytes of a file system."""
    usage = os.statvfs(ballast.parent)
    size = max(0, usage.f_bavail * usage.f_frsize - left)
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        if size:
            os.posix_fallocate(file.fileno(), 0, size)


@contextlib.contextmanager
def mounted(kind: str, at: Path, size: int, room: Path) -> Iterator[str]:
    """A small file system at a folder; yields why not, where that is refused."""
    if kind == "tmpfs":
        commands = [["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(at)]]
    else:
        image = room / "image"
        with image.open("wb") as file:
            file.truncate(size + (4 << 20))
        commands = [["mkfs.ext4", "-q", "-m", "0", str(image)],
                    ["mount", "-o", "loop", str(image), str(at)]]  # fmt: skip
    why = ""
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            why = str(error)
            break
        if done.returncode:
            why = (done.stderr or done.stdout).strip()
            break
    try:
        yield why
    finally:
        if not why:
            subprocess.run(["umount", str(at)], check=True)


def make_source(name: str, room: Path) -> Path:
    """The model's folder: a copy, for some kinds change it."""
    path = room / "model"
    if name == "tiny":
        make_checkpoint(path, SHAPES, OTHERS, shards=2, bias=("a",))
    elif name == "synthetic":
        synthetic.make("llama-1b", path, layers=4, g=128, shard=10**9, seed=0)
    else:
        shutil.copytree(name, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--target", default="amx")
    parser.add_argument("--dir", type=Path, help="Where to work: in memory if there is room.")
    parser.add_argument("--only", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    folder = args.dir or (MEMORY if args.model == "tiny" and MEMORY.is_dir() else None)
    room = Path(tempfile.mkdtemp(prefix="faults-", dir=folder))
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731, T201
    try:
        source = make_source(args.model, room)
        harness = Harness(source, room, args.target, args.runs, args.seed)
        failures = harness.run(args.only, say)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    tried = sum(int(row["tried"]) for row in harness.table.values())
    say(f"{tried} faults, {len(failures)} failed; an undisturbed run takes {harness.seconds:.2f} s")
    if args.json:
        figures = {
            "model": args.model,
            "target": args.target,
            "seed": args.seed,
            "faults": tried,
            "failed": len(failures),
            "kinds": harness.table,
            "failures": failures,
        }
        print(json.dumps(figures, indent=1))  # noqa: T201
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

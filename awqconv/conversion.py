"""Run a plan: stream every job tile by tile into a staging folder, then commit it.

Each worker thread holds one tile of source and one of output. Only a layout that stores columns
together while its source stores rows (or the reverse) wants more: the source tensor is then held
whole if the worker's share of memory has room, and else read in strips.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awqconv._version import __version__
from awqconv.checkpoint.config import MANIFEST
from awqconv.checkpoint.header import TensorInfo
from awqconv.checkpoint.model import FORMAT, open_model
from awqconv.checkpoint.source import Source
from awqconv.checkpoint.writer import Staging, check_destination
from awqconv.digest import NAME as DIGEST
from awqconv.digest import Hasher, combined, digest
from awqconv.encoder import Encoder
from awqconv.errors import AwqconvError, VerificationError
from awqconv.feed import TILE, Reader
from awqconv.forms.gather import source_specs
from awqconv.hub import local_name, provenance
from awqconv.hub.failures import WrongSourceError
from awqconv.hub.ranges import MEMORY, READERS, Ranges
from awqconv.jobs import Copy, Job, Pack, Verdict, largest_first
from awqconv.plan import Plan, make_plan, parse_size
from awqconv.repack.floats import RAW, caster
from awqconv.targets.base import layout

Bytes = NDArray[np.uint8]
BASE = 160 << 20  # resident bytes of the interpreter, its libraries and the plan of a large model
DEFAULT_MEMORY = 400_000_000
INDEX = "model.safetensors.index.json"
DAMAGED = "A file is damaged: run awqconv verify, and convert the checkpoint again."

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did. Sizes in bytes, `seconds` of wall time."""

    source: str
    dest: str
    target: str
    converted: int
    fallbacks: list[Verdict]
    unquantized: int
    source_bytes: int
    nbytes: int
    seconds: float
    resumed: int = 0
    notes: list[str] = field(default_factory=list)


def default_dest(model: str | os.PathLike[str], target: str, form: str = "hf", tp: int = 1) -> Path:
    """`<model>-<target>`, beside the model; `<model>-<target>-tp<n>` for shares of ranks.

    Of a model on the hub it is in the working folder.
    """
    path = Path(os.path.abspath(local_name(os.fspath(model))))
    return path.with_name(f"{path.name}-{target}" + (f"-tp{tp}" if form != "hf" else ""))


def convert(
    model: str | os.PathLike[str] | Source,
    dest: str | os.PathLike[str] | None = None,
    *,
    target: str,
    form: str = "hf",
    tp: int = 1,
    scale_dtype: str = "keep",
    max_shard_size: str | int = "5GB",
    strict: bool = False,
    overwrite: bool = False,
    jobs: int | None = None,
    max_memory: str | int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint into a target's layout.

    `model` is a folder (or an opened source), `dest` the folder to write, `<model>-<target>` if
    None. `form` and `tp` are as in `make_plan`. `jobs` is the number of threads, `max_memory` the
    most bytes of resident memory, as "400MB". `progress` is called with numbers of bytes written,
    from any thread, and with those that are read again where a model on the hub is read by ranges;
    if it has a method `expect`, that is told first how many these will be, and why.

    Raises AwqconvError for a bad checkpoint, a bad destination, a full disk; then nothing that
    looks finished is at `dest`, and the same call continues the work.
    """
    opened = open_model(model)
    try:
        plan = make_plan(
            opened,
            layout(target),
            form=form,
            tp=tp,
            scale_dtype=scale_dtype,
            max_shard_size=max_shard_size,
            strict=strict,
        )
        path = Path(dest) if dest else default_dest(opened.checkpoint.source.name, target, form, tp)
        return run(
            plan, path, overwrite=overwrite, jobs=jobs, max_memory=max_memory, progress=progress
        )
    finally:
        opened.checkpoint.source.close()


def check(plan: Plan, dest: Path, *, overwrite: bool = False) -> None:
    """Refuse a destination that the plan cannot be written to. Raises AwqconvError."""
    check_destination(dest, overwrite=overwrite)
    source = Path(os.path.realpath(plan.model.checkpoint.source.name))
    real = Path(os.path.realpath(dest))
    if real == source or source in real.parents or real in source.parents:
        raise AwqconvError(
            f"the destination and the source {source} lie inside one another",
            str(dest),
            "Choose a destination outside the model folder.",
        )
    parent = next(path for path in real.parents if path.is_dir())
    staged = real.with_name(real.name + ".partial")
    here = sum(f.stat().st_blocks * 512 for f in staged.rglob("*")) if staged.is_dir() else 0
    free = shutil.disk_usage(parent).free + here
    need = plan.nbytes + sum(plan.model.checkpoint.files[name] for name in plan.copies)
    if need > free:
        raise AwqconvError(
            f"{need:,} bytes to write, {free:,} free",
            str(parent),
            "Free some space, or choose another destination.",
        )


def run(
    plan: Plan,
    dest: Path,
    *,
    overwrite: bool = False,
    jobs: int | None = None,
    max_memory: str | int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Run a plan into `dest`; see `convert`."""
    began = time.perf_counter()
    check(plan, dest, overwrite=overwrite)
    workers = jobs or min(len(os.sched_getaffinity(0)), 8)
    memory = (parse_size(max_memory) if max_memory else DEFAULT_MEMORY) - BASE
    staging = Staging(dest, plan.identity(), overwrite=overwrite)
    try:
        executor = _Executor(plan, staging, progress or (lambda count: None))
        executor.create()
        if executor.ranges and executor.ranges.scarce():
            workers, memory = _by_ranges(plan, workers, memory)
        try:
            executor.run(workers, max(memory // workers, 2 * TILE))
            manifest = executor.finish()
        except WrongSourceError:
            staging.forget()
            raise
        finally:  # also where a read failed because of it
            executor.check_source()
        staging.commit(manifest)
    finally:
        staging.close()
    source = plan.model.checkpoint
    return Conversion(
        source.source.name,
        str(dest),
        plan.target.name,
        len(plan.verdicts) - len(plan.fallbacks),
        plan.fallbacks,
        len(plan.model.others),
        sum(tensor.nbytes for tensor in source.tensors.values()),
        plan.nbytes,
        time.perf_counter() - began,
        executor.resumed,
        plan.notes + (executor.ranges.notes if executor.ranges else []),
    )


def _by_ranges(plan: Plan, workers: int, memory: int) -> tuple[int, int]:
    """Threads, and bytes of memory for them, with which a source that is read by ranges is fetched
    once: each can hold the largest array, and reads on without losing the others' blocks."""
    arrays = (
        sum(max(i.nbytes for i in p.source.tensors.values()) // p.source.experts for p in pieces)
        for job in plan.jobs
        if isinstance(job, Pack)
        for pieces in job.experts
    )
    largest = max(arrays, default=0)
    memory -= MEMORY
    return max(1, min(workers, READERS, memory // (largest + 4 * TILE))), memory


class StoppedError(Exception):
    """A worker noticed that the run is over."""


class _Out:
    """An output tensor that is written from its start on, and digested on the way."""

    def __init__(self, run: _Executor, info: TensorInfo) -> None:
        self.hasher = Hasher()
        self._run, self._info = run, info

    def put(self, data: Bytes) -> None:
        """Write the next bytes."""
        self._run.check_stop()
        offset = self._info.start + self.hasher.position
        self.hasher.update(self.hasher.position, data)
        self._run.staging.write(self._info.file, offset, data.data)
        self._run.progress(len(data))


class _Executor:
    """The state of one run."""

    def __init__(self, plan: Plan, staging: Staging, progress: Progress) -> None:
        self.plan, self.staging = plan, staging
        self.source = plan.model.checkpoint.source
        self.progress = progress
        self.began = plan.identity()["source files"]
        self.reader = Reader(self.source)
        self.ranges: Ranges | None = getattr(self.source, "ranges", None)
        self.results: dict[str, dict[str, dict[str, str]]] = {}
        self.resumed, self.workers = 0, 1
        self.stop = threading.Event()

    # --- running jobs

    def create(self) -> None:
        """Make the files, with all the disk space they take."""
        for file in self.plan.files:
            self.staging.create(file.name, file.size, file.header)
            self.progress(len(file.header))

    def run(self, workers: int, share: int) -> None:
        """Run all jobs that the journal does not hold; `share`: bytes of memory of each worker."""
        if self.ranges:
            self.ranges.follow(self.staging.done, self.staging.record, self.progress)
        self.encoder = Encoder(self.reader, share)
        self.workers = workers
        pool = ThreadPoolExecutor(workers, thread_name_prefix="awqconv")
        pending: dict[str, int] = {}
        for job in self.plan.jobs:
            pending[_file(job)] = pending.get(_file(job), 0) + 1
        lock = threading.Lock()
        jobs: Sequence[Job] = self.plan.jobs
        if not self.source.in_order:
            jobs = [jobs[i] for i in largest_first([_nbytes(job) for job in jobs], workers)]

        def work(job: Job) -> None:
            self._work(job)
            with lock:
                pending[_file(job)] -= 1
                last = not pending[_file(job)]
            if last:
                self.staging.sync(_file(job))

        try:
            futures = [pool.submit(work, job) for job in jobs]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            self.stop.set()
            for future in done:
                future.result()
        finally:
            self.stop.set()
            pool.shutdown(cancel_futures=True)

    def _work(self, job: Job) -> None:
        key = _key(job)
        entry = self.staging.done.get(key)
        if entry and self._still_there(job, entry):
            self.resumed += 1
        else:
            entry = self._copy(job) if isinstance(job, Copy) else self._pack(job)
            self.staging.record(key, entry)
        self.results[key] = entry

    def check_stop(self) -> None:
        """Raises StoppedError where another job failed or the user interrupted."""
        if self.stop.is_set():
            raise StoppedError

    def _still_there(self, job: Job, entry: dict[str, Any]) -> bool:
        """Whether the staged bytes of a job that the journal calls finished have their digests."""
        for info in _outputs(job):
            hasher = Hasher()
            for start in range(0, info.nbytes, TILE):
                self.check_stop()
                buffer = self.reader.arena.take("check", min(TILE, info.nbytes - start))
                try:
                    self.staging.readinto(info.file, info.start + start, buffer.data)
                except AwqconvError:
                    return False  # unreadable: it is written again
                hasher.update(start, buffer)
            if hasher.hexdigest() != entry["outputs"].get(info.name):
                return False
        self.progress(_nbytes(job))
        return True

    def _copy(self, job: Copy) -> dict[str, Any]:
        """An output tensor made of source ranges, or of literal bytes."""
        out = _Out(self, job.output)
        same = not (job.cast or job.blocks)
        source = out.hasher if same else Hasher()

        def plain() -> Iterator[Bytes]:
            for chunk in self._chunks(job):
                if not same:
                    source.update(source.position, chunk)
                yield _cast(chunk, *job.cast) if job.cast else chunk

        for data in job.blocks.arranged(plain()) if job.blocks else plain():
            out.put(data)
        entry: dict[str, Any] = {"outputs": {job.output.name: out.hasher.hexdigest()}}
        if job.whole:
            entry["sources"] = {job.whole: source.hexdigest()}
            self._check_known(self.plan.model.checkpoint.tensors[job.whole], source.hexdigest())
        return entry

    def _chunks(self, job: Copy) -> Iterator[Bytes]:
        """The bytes a copy takes from its source, a tile at a time."""
        if job.data is not None:
            yield np.frombuffer(job.data, np.uint8)
        others = [self.reader.ranges(runs, job.interleaved, f"again {i}")
                  for i, runs in enumerate(job.again)]  # fmt: skip
        for chunk in self.reader.ranges(job.runs, job.interleaved, "copy"):
            if any(not np.array_equal(chunk, next(other)) for other in others):
                raise AwqconvError(
                    "its copies in the files of several ranks differ", job.name, DAMAGED
                )
            yield chunk

    def _pack(self, job: Pack) -> dict[str, Any]:
        """An output module, part by part, each a sequence of tiles of its outermost axis."""
        target = layout(job.layout)
        hashers: dict[TensorInfo, Hasher] = {}
        digests: dict[str, str] = {}
        for part in target.parts(job.linear):
            info = job.outputs.get(part.suffix)
            if info is None:
                continue
            out = _Out(self, info)
            for pieces in job.experts:
                for tile in self.encoder.tiles(target, part, job.linear, pieces, hashers):
                    out.put(tile)
            digests[info.name] = out.hasher.hexdigest()
        entry: dict[str, Any] = {"outputs": digests}
        if all(piece.whole for pieces in job.experts for piece in pieces):
            sources = self._source_digests(job, hashers)
            if not self.plan.model.manifest:
                entry["sources"] = sources
        self._check_back(job, digests)
        return entry

    def _check_back(self, job: Pack, digests: Mapping[str, str]) -> None:
        """Refuse to turn back a converted folder that is no longer what was converted."""
        manifest = self.plan.model.manifest
        if not manifest or self.plan.target.name != "awq" or job.name not in manifest["modules"]:
            return
        for suffix, expected in manifest["modules"][job.name]["awq"].items():
            if digests.get(job.outputs[suffix].name) != expected:
                raise VerificationError(
                    f"its {suffix}, turned back to AWQ, is not what was converted",
                    job.name,
                    DAMAGED,
                )

    def _check_known(self, info: TensorInfo, value: str) -> None:
        """Refuse a tensor of a converted folder that is not as it was written."""
        manifest = self.plan.model.manifest
        if manifest and not self.plan.model.scattered:
            entry = manifest["files"].get(info.file, {})
            if entry.get("tensors", {}).get(info.name) != value:
                raise VerificationError(
                    "its bytes are not those that were written", info.where, DAMAGED
                )

    def _source_digests(self, job: Pack, hashers: dict[TensorInfo, Hasher]) -> dict[str, str]:
        """Digests of the source tensors that a job read, from what passed by or a second look."""
        infos = {
            info.name: info
            for pieces in job.experts
            for piece in pieces
            for _, info in piece.source.arrays().values()
        }
        found: dict[str, str] = {}
        for name, info in infos.items():
            self.check_stop()
            found[name] = self.reader.digest(info, hashers.get(info))
            self._check_known(info, found[name])
        return found

    # --- after the jobs

    def finish(self) -> list[str]:
        """Copy the other files, write index, config and, last, the manifest; all file names."""
        plan, model = self.plan, self.plan.model
        files: dict[str, Any] = {}
        for name in plan.copies:
            files[name] = self._copy_file(name, model.checkpoint.files[name])
        texts = {"config.json": plan.config} | ({INDEX: plan.index} if plan.index else {})
        for name, value in texts.items():
            data = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
            self.staging.put(name, data)
            files[name] = {"size": len(data), "digest": digest(data)}
        outputs: dict[tuple[str, str], str] = {}
        sources: dict[str, str] = {}
        for job in plan.jobs:
            entry = self.results[_key(job)]
            outputs.update(((_file(job), name), value) for name, value in entry["outputs"].items())
            sources.update(entry.get("sources", {}))
        if not model.manifest:
            missing = [i for i in model.checkpoint.tensors.values() if i.name not in sources]
            with ThreadPoolExecutor(self.workers) as pool:
                digests = pool.map(self.reader.digest, missing)
                sources.update((i.name, d) for i, d in zip(missing, digests, strict=True))
        for file in plan.files:
            files[file.name] = {
                "size": file.size,
                "header": digest(file.header),
                "tensors": {name: outputs[file.name, name] for name in file.tensors},
            }
        manifest = self._manifest(files, sources)
        if self.ranges:
            self.ranges.prove(self.progress)
        self.staging.put(MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        return [*files, MANIFEST]

    def _copy_file(self, name: str, size: int) -> dict[str, Any]:
        """Copy a file that is no checkpoint; its entry in the manifest."""
        hasher = Hasher()
        self.staging.create(name, size, b"")
        for start in range(0, size, TILE):
            buffer = self.reader.arena.take("copy", min(TILE, size - start))
            self.source.readinto(name, start, buffer.data)
            hasher.update(start, buffer)
            self.staging.write(name, start, buffer.data)
        self.staging.sync(name)
        return {"size": size, "digest": hasher.hexdigest()}

    def check_source(self) -> None:
        """Raises AwqconvError where a source file is not as it was when the run began.

        What was made of it may be wrong then, so the next run begins anew.
        """
        for name, was in self.began.items():
            if list(self.source.fingerprint(name)) != was:
                self.staging.forget()
                raise AwqconvError(
                    "the file changed while it was being converted",
                    f"{self.source.name}/{name}",
                    "Let nothing write to the model, then run the same command again.",
                )

    def _manifest(self, files: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
        plan, model = self.plan, self.plan.model
        before = model.manifest["modules"] if model.manifest else {}
        modules: dict[str, Any] = {}
        for verdict in plan.verdicts:
            name, stored, linear = verdict.module, model.modules[verdict.module], verdict.linear
            if before:
                awq = before[name]["awq"]
            else:
                awq = {suffix: sources[info.name] for suffix, info in stored.tensors.items()}
            entry = {
                "layout": verdict.layout,
                **{key: getattr(linear, key) for key in ("K", "N", "g", "scales", "bias", "kind")},
                "experts": stored.experts,
                "awq": awq,
            }
            if stored.original().linear.scales != linear.scales:
                entry["kept_scales"] = stored.original().linear.scales
            if verdict.rule:
                entry["rule"] = verdict.rule
            modules[name] = entry
        if model.manifest:
            origin = model.manifest["source"]
        else:
            origin = {
                "name": Path(self.source.name).name,
                "layout": model.layout,
                "digest": combined(
                    (i.name, i.dtype, i.shape, sources[i.name])
                    for i in model.checkpoint.tensors.values()
                ),
                "quantization_config": model.source_quantization,
                **provenance(self.source),
            }
        # A sharded folder is read back by applying the form to these names again.
        sharded = {"tp": plan.tp, "tensors": source_specs(model)} if plan.form != "hf" else {}
        return {
            "awqconv": __version__,
            "format": FORMAT,
            "target": plan.target.name,
            "layout_version": plan.target.version,
            "form": plan.form,
            **sharded,
            "scale_dtype": plan.scale_dtype,
            "group_size": model.quantization.group_size,
            "modules_to_not_convert": list(model.quantization.modules_to_not_convert),
            "source": origin,
            "digests": DIGEST,
            "files": dict(files),
            "modules": modules,
        }


def _cast(raw: Bytes, was: str, dtype: str) -> Bytes:
    return np.ascontiguousarray(caster(was, dtype)(raw.view(RAW[was]))).view(np.uint8)


def _outputs(job: Job) -> tuple[TensorInfo, ...]:
    return (job.output,) if isinstance(job, Copy) else tuple(job.outputs.values())


def _nbytes(job: Job) -> int:
    return sum(info.nbytes for info in _outputs(job))


def _file(job: Job) -> str:
    return _outputs(job)[0].file


def _key(job: Job) -> str:
    """A job's name in the journal: its first output tensor, with its file."""
    first = _outputs(job)[0]
    return f"{first.file}:{first.name}"

"""What a plan is made of: jobs, each an output tensor or module and the source pieces it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from awqconv.checkpoint.header import TensorInfo
from awqconv.checkpoint.model import Gathered, Pieces, Run
from awqconv.repack.blocks import Blocks
from awqconv.targets.base import Linear

LARGE = 16  # a job is large from one part in so many of a worker's share on

Spec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True, slots=True)
class Copy:
    """An output tensor whose bytes are source bytes, `cast` from one float dtype to another or
    stored in `blocks`, or literal `data`. `whole` names the source tensor if its bytes are read
    whole and in order.

    `interleaved` and `again` are as in `Gathered`.
    """

    output: TensorInfo
    runs: tuple[Run, ...] = ()
    cast: tuple[str, str] | None = None
    data: bytes | None = None
    whole: str | None = None
    interleaved: bool = False
    again: tuple[tuple[Run, ...], ...] = ()
    blocks: Blocks | None = None

    @property
    def name(self) -> str:
        return self.output.name


@dataclass(frozen=True, slots=True)
class Pack:
    """An output module: `experts` times a linear layer put together from pieces of source modules.

    `outputs` are the tensors by part suffix; with several experts each tensor holds them one after
    another.
    """

    name: str
    layout: str
    linear: Linear
    outputs: Mapping[str, TensorInfo]
    experts: tuple[Pieces, ...]


Job = Copy | Pack


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a source module: its layout in the output, and the rule it breaks if any."""

    module: str
    linear: Linear
    layout: str
    rule: str | None = None


def unplaced(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    """An output tensor that has no place in a file yet."""
    return TensorInfo(name, dtype, shape, "", 0, 0)


def outputs(job: Job) -> tuple[TensorInfo, ...]:
    """The tensors a job writes."""
    return (job.output,) if isinstance(job, Copy) else tuple(job.outputs.values())


def specs(jobs: Iterable[Job]) -> list[Spec]:
    """Name, dtype and shape of every tensor that jobs write."""
    return [(t.name, t.dtype, t.shape) for job in jobs for t in outputs(job)]


def copied(output: TensorInfo, of: Gathered, whole: str, cast: tuple[str, str] | None) -> Copy:
    """A copy of all of a source tensor."""
    return Copy(output, of.runs, cast, None, whole, of.interleaved, of.again)


def largest_first(sizes: Sequence[int], workers: int) -> list[int]:
    """The order in which `workers` begin jobs of `sizes` bytes: the largest first, lest one worker
    be left with one of them when all else is done; the others as they come."""
    large = sum(sizes) // (LARGE * workers)
    return sorted(range(len(sizes)), key=lambda i: -max(sizes[i], large))

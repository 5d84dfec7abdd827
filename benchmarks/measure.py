"""What the benchmarks of whole conversions share: processes that are measured, models, tables."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

UNSYNCED = (
    "from awqconv.checkpoint import writer; writer.SYNC = False; "
    "from awqconv.cli import main; main()"
)
CHUNK = 1 << 23


@dataclass(frozen=True)
class Usage:
    """Wall and processor seconds, and the peak of resident bytes."""

    wall: float
    cpu: float
    peak: int


def measured(command: Sequence[object]) -> Usage:
    """Run a command to its end. Raises RuntimeError with what it said if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    with tempfile.TemporaryFile("w+") as said:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=said, stderr=said, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            said.seek(0)
            raise RuntimeError(f"{command}: exit {process.returncode}\n{said.read()}")
    return Usage(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10)


def awqconv(*args: object, sync: bool = True) -> list[object]:
    """The command line of awqconv, with or without forcing what it writes to the disk."""
    start = ("-m", "awqconv") if sync else ("-c", UNSYNCED)
    return [sys.executable, *start, *args]


def files(folder: Path) -> list[Path]:
    """All files of a folder and its subfolders."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def size(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in files(folder))


def warm(folder: Path) -> float:
    """Read all files once, by one thread into one buffer; the seconds it took."""
    buffer = bytearray(CHUNK)
    began = time.perf_counter()
    for path in files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def sync(folder: Path) -> None:
    """Force all files of a folder, and the folder, to the disk."""
    for path in (*files(folder), folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def model(
    name: str,
    layers: int | None,
    room: Path,
    *,
    vocabulary: int | None = None,
    zeros: bool = False,
) -> Path:
    """A synthetic checkpoint in a folder, made unless it is there; see `synthetic.make`."""
    words = f"-{vocabulary}" if vocabulary else ""
    path = room / f"{name}-{layers or 'whole'}{words}{'-zeros' * zeros}"
    if not path.exists():  # by a process of its own: children would inherit the peak of its memory
        command = [sys.executable, ROOT / "benchmarks" / "synthetic.py", name, path]
        more = ["--layers", str(layers)] * bool(layers) + ["--zeros"] * zeros
        more += ["--vocabulary", str(vocabulary)] * bool(vocabulary)
        subprocess.run([*command, *more], check=True, stdout=subprocess.DEVNULL)
        sync(path)
    return path


def machine() -> str:
    """The processor, its cores, the memory, the system, as one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split("\t:", 1) for line in lines if "\t:" in line)
    name, model_ = fields.get("model name", "?").strip(), fields.get("model", "?").strip()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{name} (family {fields.get('cpu family', '?').strip()}, model {model_}), "
        f"{len(os.sched_getaffinity(0))} cores, {memory:.1f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def medians(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The median of each column."""
    rows = list(rows)
    return {key: median(row[key] for row in rows) for key in rows[0]}


def show(title: str, rows: Sequence[Mapping[str, Any]], as_json: bool, **more: Any) -> None:
    """Print rows as a Markdown table, or everything as JSON."""
    if as_json:
        print(json.dumps({"machine": machine(), **more, "rows": rows}, indent=1))  # noqa: T201
        return
    keys = list(rows[0])
    cells = [keys, *([_cell(row[key]) for key in keys] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(keys))]
    print(f"{title}\n{machine()}\n")  # noqa: T201
    for n, row in enumerate(cells):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")  # noqa: T201
        if not n:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")  # noqa: T201


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)

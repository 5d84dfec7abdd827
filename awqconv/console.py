"""What a run shows: results on stdout, progress on stderr. Rich is used here and nowhere else."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from awqconv.errors import AwqconvError

PLAIN_SECONDS = 5.0  # between two progress lines where there is no terminal


def size(nbytes: float) -> str:
    """Bytes in decimal units with three figures: 4.51 GB."""
    unit = "B"
    for unit in ("B", "kB", "MB", "GB"):  # noqa: B007
        if nbytes < 1000:
            break
        nbytes /= 1000
    else:
        unit = "TB"
    return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.3g} {unit}"


@dataclass(frozen=True)
class Meter:
    """Called with numbers of bytes done; `expect` takes how many more will be, and says why."""

    advance: Callable[[int], None]
    expect: Callable[[int, str], None]

    def __call__(self, count: int) -> None:
        self.advance(count)


class Console:
    """One run's output: for people, as one JSON value (`json_mode`), or none (`quiet`)."""

    def __init__(self, *, json_mode: bool = False, quiet: bool = False) -> None:
        self.json_mode, self.quiet = json_mode, quiet
        self.people = not json_mode and not quiet

    def say(self, text: str = "", style: str = "") -> None:
        """A line for people."""
        if self.people:
            self._rich().print(
                text, style=style or None, highlight=False, markup=False, soft_wrap=True
            )

    def facts(self, rows: Iterable[tuple[str, object]]) -> None:
        """Names and values in two columns."""
        for name, value in rows:
            self.say(f"{name:<14} {value}")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table for people; columns whose name begins with > are set to the right."""
        if not self.people:
            return
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            right = column.startswith(">")
            table.add_column(
                column.lstrip(">"), justify="right" if right else "left", overflow="fold"
            )
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        self._rich().print(table, markup=False)

    def emit(self, value: Any) -> None:
        """The result for machines, on stdout if that is what was asked for."""
        if self.json_mode:
            print(dumps(value))  # noqa: T201

    def error(self, error: AwqconvError) -> None:
        """What went wrong, on stderr; for machines on stdout too."""
        self.emit({"error": {"what": error.what, "where": error.where, "fix": error.fix}})
        where = f"{error.where}: " if error.where else ""
        self._stderr().print(
            f"[bold red]error:[/] {_escape(where + error.what)}"
            + (f"\n  {_escape(error.fix)}" if error.fix else ""),
            highlight=False,
            soft_wrap=True,
        )

    def hint(self, text: str) -> None:
        """A line on stderr, not shown when quiet."""
        if not self.quiet:
            self._stderr().print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Meter]:
        """A function that takes numbers of bytes done: bar, rate and time left on a terminal,
        a line every few seconds where stderr is no terminal, nothing when quiet."""
        if self.quiet:
            yield Meter(lambda count: None, lambda nbytes, why: None)
        elif sys.stderr.isatty():
            yield from self._bar(title, total)
        else:
            yield from self._lines(title, total)

    def _bar(self, title: str, total: int) -> Iterator[Meter]:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._stderr()) as bar:
            task = bar.add_task(title, total=total)

            def expect(nbytes: int, why: str) -> None:
                bar.update(task, total=(bar.tasks[0].total or 0) + nbytes)
                bar.console.print(why, highlight=False, markup=False, soft_wrap=True)

            yield Meter(lambda count: bar.advance(task, count), expect)

    def _lines(self, title: str, total: int) -> Iterator[Meter]:
        began = last = time.monotonic()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            now = time.monotonic()
            if now - last >= PLAIN_SECONDS:
                last = now
                rate = done / (now - began)
                left = (total - done) / rate if rate else 0
                self.hint(
                    f"{title}: {size(done)} of {size(total)}, {size(rate)}/s, {left:.0f} s left"
                )

        def expect(nbytes: int, why: str) -> None:
            nonlocal total
            total += nbytes
            self.hint(why)

        yield Meter(advance, expect)

    def _rich(self) -> Any:
        from rich.console import Console as Rich

        width = None if sys.stdout.isatty() else 120
        return Rich(width=width)

    def _stderr(self) -> Any:
        from rich.console import Console as Rich

        return Rich(stderr=True)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def dumps(value: Any) -> str:
    """A result as JSON text: dataclasses as objects, paths as strings."""

    def plain(item: Any) -> Any:
        if is_dataclass(item) and not isinstance(item, type):
            return asdict(item)
        return str(item)

    return json.dumps(value, default=plain, indent=1)

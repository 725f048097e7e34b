"""One shared progress display for long jobs: what is running and how long is left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from mechhier.text import printable

SECONDS_BETWEEN_LINES = 30.0
"""Where there is neither a terminal nor a notebook, one line of progress is written at most this often."""


def write(message: str, *, style: str = "") -> None:
    """Write a message to standard error, above the progress rows where there are any, with nothing in it interpreted."""
    console = _active.console if isinstance(_active, _Bars) else Console(stderr=True)
    # Of a plain string rich would take :names: for emoji.
    console.print(Text(printable(message), style=style), soft_wrap=True)


def announce(message: str) -> None:
    """Write one line to standard error, above the progress rows where there are any; nothing within `quiet`."""
    if _first_process() and not _quiet:
        write(message)


@contextmanager
def quiet() -> Iterator[None]:
    """A block without progress and announcements, in all threads; errors and warnings stay."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


@contextmanager
def track(description: str, *, total: int, completed: int = 0) -> Iterator[Callable[..., None]]:
    """Show one row of progress while the block runs; rows of nested blocks share a display.

    Where there is neither a terminal nor a notebook, a line for all rows is written at most every 30 seconds, and one at
    the end of a block that had any. Everything goes to standard error, of the first process only.

    Args:
        description: What is running, for instance ``"training pool"``.
        total: Number of units of work.
        completed: Units already done when the block starts (a resumed job).

    Yields:
        ``advance(n=1, note="")``: report ``n`` more units; ``note`` is shown at the end of the row.
    """
    global _active
    if _quiet or not _first_process():
        yield _nothing
        return
    owner = _active is None
    if _active is None:
        _active = _display()
    display = _active
    row = display.add(printable(description), total, completed)

    def advance(n: int = 1, *, note: str = "") -> None:
        display.advance(row, n, printable(note))

    try:
        yield advance
    finally:
        if owner:
            _active = None
            display.stop()
        else:
            display.remove(row)


def _nothing(n: int = 1, *, note: str = "") -> None:
    """Advance a row that nobody sees."""


def _first_process() -> bool:
    """Whether this process is alone, or the first of those that a launcher (`accelerate launch`, `torchrun`) started."""
    # A rank without a size is not a launcher's: a cluster's script left it.
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def _display() -> _Bars | _Lines:
    console = Console(stderr=True)
    drawn = console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)
    return _Bars(console) if drawn else _Lines()


class _Bars:
    """Rows that are drawn over and over, in a terminal or a notebook."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            # In a narrow terminal the note is cut, never the times.
            TimeElapsedColumn(table_column=Column(min_width=7)),
            TextColumn("left", table_column=Column(min_width=4)),
            TimeRemainingColumn(table_column=Column(min_width=7)),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            transient=True,
        )
        self.progress.start()

    def add(self, description: str, total: int, completed: int) -> int:
        return self.progress.add_task(description, total=total, completed=completed, note="")

    def advance(self, row: int, n: int, note: str) -> None:
        self.progress.update(TaskID(row), advance=n, note=note)

    def remove(self, row: int) -> None:
        self.progress.remove_task(TaskID(row))

    def stop(self) -> None:
        self.progress.stop()


@dataclass
class _Row:
    description: str
    total: int
    done: int
    done_before: int
    note: str = ""
    start: float = field(default_factory=lambda: time.monotonic())

    def __str__(self) -> str:
        elapsed = time.monotonic() - self.start
        parts = [f"{self.description} {self.done:,}/{self.total:,}", f"{_clock(elapsed)} elapsed"]
        if self.done_before < self.done < self.total:
            parts.append(f"{_clock(elapsed * (self.total - self.done) / (self.done - self.done_before))} left")
        return ", ".join([*parts, self.note] if self.note else parts)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


class _Lines:
    """Rows that are written as lines, seldom enough for a log."""

    # Of the last line of any display, and of the end of the last display: many short blocks in a row are one job.
    last_line = -float("inf")
    last_end = -float("inf")

    def __init__(self) -> None:
        self.rows: dict[int, _Row] = {}
        self.written = ""
        now = time.monotonic()
        if now - _Lines.last_end > SECONDS_BETWEEN_LINES:
            _Lines.last_line = now

    def add(self, description: str, total: int, completed: int) -> int:
        row = max(self.rows, default=0) + 1
        self.rows[row] = _Row(description, total, completed, completed)
        return row

    def advance(self, row: int, n: int, note: str) -> None:
        self.rows[row].done += n
        self.rows[row].note = note
        if time.monotonic() - _Lines.last_line >= SECONDS_BETWEEN_LINES:
            self._write()

    def remove(self, row: int) -> None:
        del self.rows[row]

    def stop(self) -> None:
        _Lines.last_end = time.monotonic()
        if self.written:
            self._write()

    def _write(self) -> None:
        line = " > ".join(map(str, self.rows.values()))
        if line != self.written:
            write(line)
        self.written, _Lines.last_line = line, time.monotonic()


_active: _Bars | _Lines | None = None
_quiet = False

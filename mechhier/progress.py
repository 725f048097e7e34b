"""One shared progress display for long jobs: what is running and how long is left."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

_active: Progress | None = None


def _first_process() -> bool:
    """Whether this process is alone, or the first of those that a launcher (`accelerate launch`, `torchrun`) started."""
    # A rank without a size is not a launcher's: a cluster's script left it.
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def _display() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        # In a narrow terminal the note is cut, never the times.
        TimeElapsedColumn(table_column=Column(min_width=7)),
        TextColumn("left", table_column=Column(min_width=4)),
        TimeRemainingColumn(table_column=Column(min_width=7)),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console,
        transient=True,
        disable=not (_first_process() and (console.is_terminal or console.is_jupyter)),
    )


def announce(message: str) -> None:
    """Write one line to standard error, above the progress rows where there are any."""
    if not _first_process():
        return
    console = _active.console if _active else Console(stderr=True)
    console.print(message, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def track(description: str, *, total: int, completed: int = 0) -> Iterator[Callable[..., None]]:
    """Show one row of progress while the block runs; rows of nested blocks share a display.

    Nothing is shown where there is neither a terminal nor a notebook.

    Args:
        description: What is running, for instance ``"training pool"``.
        total: Number of units of work.
        completed: Units already done when the block starts (a resumed job).

    Yields:
        ``advance(n=1, note="")``: report ``n`` more units; ``note`` is shown at the end of the row.
    """
    global _active
    owner = _active is None
    progress = _active or _display()
    if owner:
        _active = progress
        progress.start()
    task = progress.add_task(description, total=total, completed=completed, note="")

    def advance(n: int = 1, *, note: str = "") -> None:
        progress.update(task, advance=n, note=note)

    try:
        yield advance
    finally:
        if owner:
            progress.stop()
            _active = None
        else:
            progress.remove_task(task)

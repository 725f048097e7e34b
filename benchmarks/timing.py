"""Interleaved timing: every contender runs once a round, so that a busy machine slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
from rich.console import Console
from rich.table import Table


def interleaved(contenders: Mapping[str, Callable[[], object]], *, rounds: int = 7) -> dict[str, np.ndarray]:
    """Seconds of each contender in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for counted in [False] + [True] * rounds:
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if counted:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def report(
    title: str, seconds: Mapping[str, np.ndarray], *, baseline: str, work: Mapping[str, str] | None = None
) -> None:
    """Print median seconds and the median ratio of the baseline to each contender, paired by round."""
    table = Table(title=title)
    for column in ("", "median s", f"faster than {baseline}", "work"):
        table.add_column(column)
    for name, values in seconds.items():
        ratio = float(np.median(seconds[baseline] / values))
        table.add_row(name, f"{np.median(values):.4f}", f"{ratio:.2f} x", (work or {}).get(name, ""))
    Console().print(table)

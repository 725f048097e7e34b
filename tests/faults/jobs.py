"""A work under test, where it begins, and what it leaves when nothing disturbs it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from faults.calls import Call, Record
from faults.work import OUT, Disturbance, Ending, contents, do


@dataclass(frozen=True)
class Job:
    """A work, where it begins, and where it was done undisturbed.

    Attributes:
        work: The function of `faults.work`.
        done: Folder of the undisturbed work.
        start: Folder from which it goes on; None where it begins with nothing.
    """

    work: Callable[[], None]
    done: Path
    start: Path | None = None

    @cached_property
    def contents(self) -> dict[str, str]:
        """What is there when all went well."""
        return contents(self.done / OUT)

    @cached_property
    def calls(self) -> list[Call]:
        """The calls on files that it makes."""
        return Record.read(self.done)

    @cached_property
    def seconds(self) -> float:
        """How long it takes."""
        began = time.monotonic()
        self.begun(self.done.with_name(f"{self.done.name}-timed"))
        do(self.work, self.done.with_name(f"{self.done.name}-timed"))
        return time.monotonic() - began

    def begun(self, folder: Path) -> Path:
        """A folder in which it can go on."""
        folder.mkdir(parents=True)
        if self.start is not None:
            shutil.copytree(self.start / OUT, folder / OUT, symlinks=True)
        return folder

    def after(self, folder: Path, disturbance: Disturbance) -> Ending:
        """Its ending with a disturbance."""
        return do(self.work, self.begun(folder), disturbance)

    def wrong_after_going_on(self, folder: Path) -> str:
        """What the same command without disturbance leaves that is not as it must be; empty if all is."""
        ending = do(self.work, folder)
        if ending.code != 0:
            return f"the same command ended with {ending.code}: {ending.said[-600:]}"
        return self.wrong_in(folder)

    def wrong_in(self, folder: Path) -> str:
        """Which files of a folder are not as they must be."""
        found = contents(folder / OUT)
        other = sorted(name for name in {*found, *self.contents} if found.get(name) != self.contents.get(name))
        return f"other files: {', '.join(other)}" if other else ""

"""A power cut, as a disk may answer it: what was never synced may be gone.

The model of a disk:

- A file's bytes are on it when the file was synced and has not been changed since. Otherwise the file is empty, cut
  anywhere, or whole.
- A name in a folder is on it as it was when the folder was last synced (a new folder is empty), or as it is now: for each
  name one or the other. So what was added may be missing, what was removed may be there, and a name may mean the file
  that it meant before. A rename is a removal and an addition, and both names may be left, or none.

The process under test notes each sync that it makes: of a file, its size and time, and a hard link keeps its bytes if it
is removed later; of a folder, its names. It is killed, and `disk_after` builds one of the folders that it may have left.
Inode numbers stand for files and folders: those that are noted are held, so that no number is given out twice.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from faults.calls import Call, Calls, Journal
from faults.work import OUT

SYNCS = "syncs.jsonl"
KEPT = "kept"
_UNSYNCED = ("empty", "empty", "cut", "whole")


@dataclass(frozen=True)
class Cut:
    """Kills a process without notice at the n-th of its calls, or never, and notes what it has synced until then.

    What is there when the process begins is on the disk.
    """

    number: int | None = None

    def install(self) -> None:
        """Begin to count and to note."""
        syncs, counter = _Syncs(), itertools.count()

        def before(_: Call) -> None:
            if next(counter) == self.number:
                os.kill(os.getpid(), signal.SIGKILL)

        def after(call: Call) -> None:
            if call.name == "fsync" and call.descriptor is not None:
                syncs.note(call.path)

        for folder, _, names in os.walk(OUT):
            for name in (folder, *(os.path.join(folder, name) for name in names)):
                syncs.note(name)
        Calls(before, after).install()


class _Syncs:
    def __init__(self) -> None:
        self.journal = Journal(SYNCS)
        self.kept = os.path.abspath(KEPT)
        self.held: list[int] = []
        self.link, self.open = os.link, os.open
        os.makedirs(self.kept, exist_ok=True)

    def note(self, path: str) -> None:
        status = os.stat(path)
        if os.path.isdir(path):
            names = {entry.name: [entry.inode(), entry.is_dir()] for entry in os.scandir(path)}
            self.held.append(self.open(path, os.O_RDONLY))
            self.journal.write("folder", status.st_ino, names)
            return
        with suppress(FileExistsError):
            self.link(path, os.path.join(self.kept, str(status.st_ino)))
        self.journal.write("file", status.st_ino, [status.st_size, status.st_mtime_ns])


class _Entry(NamedTuple):
    inode: int
    is_folder: bool


@dataclass
class _Disk:
    random: random.Random
    survival: float
    """Probability that a change of names that was not synced is on the disk."""
    files: dict[int, list[int]] = field(default_factory=dict)
    folders: dict[int, dict[str, _Entry]] = field(default_factory=dict)
    places: dict[int, Path] = field(default_factory=dict)

    def build(self, inode: int, present: Path | None, target: Path) -> None:
        target.mkdir()
        before = self.folders.get(inode, {})
        now = _names(present) if present else {}
        for name in sorted({*before, *now}):
            old, new = before.get(name), now.get(name)
            entry = new if self.random.random() < self.survival else old
            if entry is None:
                continue
            if entry.is_folder:
                self.build(entry.inode, self.places.get(entry.inode), target / name)
            else:
                (target / name).write_bytes(self.content(entry.inode))

    def content(self, inode: int) -> bytes:
        place = self.places.get(inode)
        if place is None:  # a name that the folder had, of a file that was never synced and is gone
            return b""
        content, status = place.read_bytes(), place.stat()
        if self.files.get(inode) == [status.st_size, status.st_mtime_ns]:
            return content
        kind = self.random.choice(_UNSYNCED)
        return {"empty": b"", "whole": content}.get(kind, content[: self.random.randrange(len(content) + 1)])


def disk_after(folder: Path, target: Path, *, seed: int, survival: float) -> None:
    """Build in `target` what a disk may hold of `folder` after a power cut.

    Args:
        folder: Where a process worked with a `Cut`.
        target: A new folder.
        seed: Which of the possible disks.
        survival: Probability of each change of names that was not synced to be on the disk.
    """
    disk = _Disk(random.Random(seed), survival)
    for kind, inode, what in Journal.read(folder / SYNCS):
        if kind == "file":
            disk.files[inode] = what
        else:
            disk.folders[inode] = {name: _Entry(*entry) for name, entry in what.items()}
    for path in [*(folder / KEPT).iterdir(), folder / OUT, *(folder / OUT).rglob("*")]:
        if path.exists():
            disk.places[path.stat().st_ino] = path
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    if (folder / OUT).exists():
        disk.build((folder / OUT).stat().st_ino, folder / OUT, target / OUT)


def _names(folder: Path) -> dict[str, _Entry]:
    return {entry.name: _Entry(entry.inode(), entry.is_dir()) for entry in os.scandir(folder)}

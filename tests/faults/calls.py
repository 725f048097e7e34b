"""Every call by which Python changes a file, seen before and after it is made; and faults and kills at a chosen one.

What C code writes by itself (HDF5, safetensors, torch's own writer) is not seen here: `strace.py` reaches that, and a
limit on the size of files does (`Limit`).
"""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from faults.work import OUT

SPACE = ("open", "write", "mkdir", "fsync", "close")
"""Calls that a full disk or a quota refuses, some of them late."""
ERRORS = {"ENOSPC": SPACE, "EDQUOT": SPACE, "EIO": (*SPACE, "rename", "unlink", "rmdir"), "short": ("write",)}
"""What can happen in which call; "short": one byte is written, and then the disk is full."""
HIT = "hit.jsonl"
_real = {name: getattr(os, name) for name in ("open", "write", "close", "fsync", "unlink", "link")}
_real_open = io.open


class Call(NamedTuple):
    """A call that is about to be made, or has been."""

    name: str
    path: str
    descriptor: int | None = None


class Calls:
    """Watches all calls of this process on files in `./out`.

    Args:
        before: Is told of each call before it is made; what it raises is the call's failure, and a number that it
            returns is how many bytes a `write` may write.
        after: Is told of each call that has succeeded.
    """

    def __init__(
        self, before: Callable[[Call], int | None] = lambda _: None, after: Callable[[Call], None] = lambda _: None
    ) -> None:
        self.before = before
        self.after = after
        self.inside = os.path.join(os.getcwd(), OUT)
        self.paths: dict[int, str] = {}
        self.written: set[int] = set()

    def install(self) -> None:
        """Watch from now on until the process ends."""
        for name, call in {
            "rename": "rename",
            "replace": "rename",
            "mkdir": "mkdir",
            "unlink": "unlink",
            "remove": "unlink",
            "rmdir": "rmdir",
        }.items():
            setattr(os, name, self._of_path(call, getattr(os, name)))
        os.open, os.close, os.write, os.fsync = self._open, self._close, self._write, self._fsync
        io.open = builtins.open = self._open_file  # pyright: ignore[reportAttributeAccessIssue]

    def make(self, name: str, path: str, make: Callable[[], Any], descriptor: int | None = None) -> Any:
        """Make a call, watched if its file is inside."""
        if path != self.inside and not path.startswith(self.inside + os.sep):
            return make()
        call = Call(name, path, descriptor)
        self.before(call)
        made = make()
        self.after(call)
        return made

    def absolute(self, path: Any, dir_fd: int | None = None) -> str:
        """A path as the system takes it."""
        folder = os.getcwd() if dir_fd is None else self.paths.get(dir_fd, "")
        return os.path.normpath(os.path.join(folder, os.fsdecode(path)))

    def _of_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **keywords: Any) -> Any:
            dir_fd = keywords.get("dir_fd", keywords.get("src_dir_fd"))
            return self.make(name, self.absolute(path, dir_fd), lambda: real(path, *args, **keywords))

        return call

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        absolute, writes = self.absolute(path, dir_fd), flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)

        def opened() -> int:
            descriptor = _real["open"](path, flags, mode, dir_fd=dir_fd)
            self.paths[descriptor] = absolute
            if writes:
                self.written.add(descriptor)
            return descriptor

        return self.make("open", absolute, opened) if writes else opened()

    def _close(self, descriptor: int) -> None:
        path, writes = self.paths.pop(descriptor, ""), descriptor in self.written
        self.written.discard(descriptor)
        try:
            if writes:
                self.make("close", path, lambda: None)
        finally:  # a file whose closing fails is closed
            _real["close"](descriptor)

    def _write(self, descriptor: int, content: Any) -> int:
        return self.write(
            self.paths.get(descriptor, ""), content, lambda content: _real["write"](descriptor, content), descriptor
        )

    def write(self, path: str, content: Any, real: Callable[[Any], int], descriptor: int) -> int:
        """Write what the watcher lets pass."""
        if not path.startswith(self.inside + os.sep):
            return real(content)
        call = Call("write", path, descriptor)
        allowed = self.before(call)
        written = real(memoryview(content).cast("B")[:allowed])
        self.after(call)
        return written

    def _fsync(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        self.make("fsync", self.paths.get(number, ""), lambda: _real["fsync"](number), number)

    def _open_file(  # the arguments are io.open's
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not set(mode) & set("wax+"):
            return _real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        path = self.paths.get(file, "") if isinstance(file, int) else self.absolute(file)
        raw_mode = mode.replace("t", "").replace("b", "")
        raw = self.make("open", path, lambda: _Raw(self, path, file, raw_mode, closefd, opener))
        self.paths[raw.fileno()] = path
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)


class _Raw(io.FileIO):
    def __init__(self, calls: Calls, path: str, *args: Any) -> None:
        self.calls = calls
        self.path = path
        super().__init__(*args)

    def write(self, content: Any) -> int:
        return self.calls.write(self.path, content, super().write, self.fileno())

    def close(self) -> None:
        if self.closed:
            return
        self.calls.paths.pop(self.fileno(), None)
        try:
            self.calls.make("close", self.path, lambda: None)
        finally:
            super().close()


class AtCall:
    """Does something to a process at the n-th of its calls on files in `./out`, and leaves a note of what that was."""

    number: int

    def install(self) -> None:
        """Begin to count."""
        counter, lock = itertools.count(), threading.Lock()
        note = Journal(HIT)

        def before(call: Call) -> int | None:
            with lock:
                number = next(counter)
                if number == self.number:
                    note.write(call.name, call.path)
            return None if number < self.number else self.happen(call, number - self.number)

        Calls(before).install()

    def happen(self, call: Call, later: int) -> int | None:
        """Do it; `later` is the number of calls since the first that was hit."""
        raise NotImplementedError


@dataclass(frozen=True)
class Fault(AtCall):
    """A call that fails, and if it `lasts` all later ones too that the error can happen in."""

    number: int
    error: str
    lasts: bool = False

    def happen(self, call: Call, later: int) -> int | None:
        lasts = self.lasts or self.error == "short"
        if call.name not in ERRORS[self.error] or (later and not lasts):
            return None
        if self.error == "short" and not later:
            return 1
        number = getattr(errno, "ENOSPC" if self.error == "short" else self.error)
        named = (call.path,) if call.descriptor is None and call.name != "close" else ()
        raise OSError(number, os.strerror(number), *named)


@dataclass(frozen=True)
class Kill(AtCall):
    """A signal just before a call."""

    number: int
    signal: int

    def happen(self, call: Call, later: int) -> None:
        if not later:
            os.kill(os.getpid(), self.signal)


@dataclass(frozen=True)
class Limit:
    """No file may grow beyond a size, whoever writes it: `write` fails as it does on a full disk (with EFBIG)."""

    size: int

    def install(self) -> None:
        """Set the limit."""
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class Journal:
    """A file of a line of JSON for each thing that happens, beside `./out`, and complete whenever the process ends."""

    def __init__(self, name: str) -> None:
        self.descriptor = _real["open"](name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, *line: Any) -> None:
        """Add a line."""
        _real["write"](self.descriptor, (json.dumps(line) + "\n").encode())

    @staticmethod
    def read(path: Path) -> list[list[Any]]:
        """The lines so far."""
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Record:
    """Lists the calls of an undisturbed process."""

    FILE = "calls.jsonl"

    def install(self) -> None:
        """Begin to list."""
        journal = Journal(self.FILE)
        Calls(lambda call: journal.write(call.name, call.path)).install()

    @classmethod
    def read(cls, folder: Path) -> list[Call]:
        """The calls of the process that worked in a folder."""
        return [Call(*line) for line in Journal.read(folder / cls.FILE)]

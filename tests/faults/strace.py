"""Faults in system calls, which strace injects, whoever makes them: HDF5, safetensors, torch and Python."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from faults.work import OUT

LOG = "strace.txt"
CALLS = {
    "openat": ("ENOSPC", "EDQUOT", "EIO"),
    "write": ("ENOSPC", "EDQUOT", "EIO"),
    "pwrite64": ("ENOSPC", "EDQUOT", "EIO"),
    "read": ("EIO",),
    "pread64": ("EIO",),
    "ftruncate": ("ENOSPC", "EIO"),
    "fsync": ("ENOSPC", "EDQUOT", "EIO"),
    "close": ("EDQUOT", "EIO"),
    "rename": ("ENOSPC", "EIO"),
    "renameat2": ("ENOSPC", "EIO"),
    "mkdir": ("ENOSPC", "EDQUOT"),
    "unlink": ("EIO",),
    "unlinkat": ("EIO",),
}
_ANY_TRACER = 0x59616D61, ctypes.c_ulong(-1)
_LINE = re.compile(r"(\d+)\s+(\w+)\((.*)")
_READ_ONLY = re.compile(r"O_RDONLY.* = (\d+)<")
_SECONDS = 20


@dataclass(frozen=True)
class Strace:
    """Follows a process, and fails the n-th call of one kind that its main thread makes, if one is given."""

    call: str = ""
    number: int = 0
    error: str = ""

    def install(self) -> None:
        """Attach strace to this process, and wait until it is."""
        ctypes.CDLL(None).prctl(*_ANY_TRACER, 0, 0, 0)
        status, text = os.open("/proc/self/status", os.O_RDONLY), bytearray(4096)
        inject = ["-e", f"inject={self.call}:error={self.error}:when={self.number}"] if self.call else []
        subprocess.Popen(
            [
                *("strace", "-f", "-y", "-s", "0", "-o", LOG, "-e", f"trace={','.join(CALLS)}", *inject),
                *("-p", str(os.getpid())),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + _SECONDS
        # Read by a call that is not among those that are counted.
        while os.preadv(status, [text], 0) and b"TracerPid:\t0\n" in text:
            if time.monotonic() > deadline:
                raise RuntimeError("strace could not be attached")
            time.sleep(0.002)

    @classmethod
    def read(cls, folder: Path) -> list[Strace]:
        """The calls on files in `./out` that were made by the main thread of a process that was followed."""
        calls, counted = [], Counter()
        lines = (folder / LOG).read_text(errors="replace").splitlines()
        main = lines[0].split()[0]
        read_only: set[str] = set()
        for thread, call, rest in (found.groups() for line in lines if (found := _LINE.match(line))):
            if thread != main:
                continue
            counted[call] += 1
            if opened := _READ_ONLY.search(rest):
                read_only.add(opened[1])
            descriptor = rest.partition("<")[0]
            # What fails in a file that is only read is `read`.
            fails = call not in ("openat", "close") or (not opened and descriptor not in read_only)
            if call == "close":
                read_only.discard(descriptor)
            if fails and (f"/{folder.name}/{OUT}" in rest or f'"{OUT}' in rest):
                calls.append(cls(call, counted[call]))
        return calls

    @staticmethod
    def hits(folder: Path) -> list[str]:
        """The lines of strace's log that say which calls were made to fail: one of each thread that came so far."""
        lines = (folder / LOG).read_text(errors="replace").splitlines() if (folder / LOG).exists() else []
        return [line for line in lines if "(INJECTED)" in line]


def available() -> bool:
    """Whether this machine has an strace that can follow a process and inject faults."""
    if shutil.which("strace") is None:
        return False
    tried = subprocess.run(
        ["strace", "-o", "/dev/null", "-e", "inject=mkdir:error=ENOSPC", "mkdir", "/nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    return "No space left" in tried.stderr

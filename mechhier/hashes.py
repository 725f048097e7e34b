"""Lists of SHA-256 hashes, taken of what was written when it was written, in the form that `sha256sum --check` reads too.

A line is a hash, two spaces and a file's name relative to the list's folder. Where work goes on, lines are appended, so that
of a name the last line counts; a line that a cut has left in half counts for nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from mechhier.files import append_durably, errors_name, write_whole

LIST = "files.sha256"
"""Name of the list in a folder."""

_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)\n")


def of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes.

    Raises:
        OSError: It cannot be read; the error names it.
    """
    digest = hashlib.sha256()
    with errors_name(path), path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def of_folder(folder: Path, *, inside: Path | None = None) -> dict[str, str]:
    """The hash of every file in a folder and its subfolders, by its name relative to `inside` (the folder itself if None).

    The folder's own list is left out.
    """
    return {
        path.relative_to(inside or folder).as_posix(): of_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / LIST
    }


def read(path: Path) -> dict[str, str]:
    """The hashes of a list by name; empty if there is no list."""
    try:
        with errors_name(path):
            content = path.read_bytes()
        text = content.decode("utf-8", "replace")
    except FileNotFoundError:
        return {}
    return {found[2]: found[1] for line in text.splitlines(keepends=True) if (found := _LINE.fullmatch(line))}


def write(path: Path, hashes: Mapping[str, str]) -> None:
    """Write a list, whole or not at all, sorted by name."""
    write_whole(path, _lines(dict(sorted(hashes.items()))))


def append(path: Path, hashes: Mapping[str, str]) -> None:
    """Add lines to a list; they are on the disk when this returns. What they speak of must be there before."""
    append_durably(path, _lines(hashes))


def changed(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """The names whose files are absent from a folder, cannot be read, or are others than those that were written."""
    return [name for name, digest in hashes.items() if not _is(folder / name, digest)]


def is_as_written(folder: Path, written: Mapping[str, str], *, inside: Path | None = None) -> bool:
    """Whether a folder has the files that were written, as they were written, and no others; at least one.

    Args:
        folder: The folder.
        written: Hashes by name.
        inside: What the names are relative to; the folder itself if None.
    """
    try:
        return bool(written) and of_folder(folder, inside=inside) == written
    except OSError:
        return False


def _is(path: Path, digest: str) -> bool:
    try:
        return of_file(path) == digest
    except OSError:
        return False


def _lines(hashes: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in hashes.items())

"""Files and folders that are written whole or not at all, and folders that one process works in at a time.

Whole means: a reader sees what was there before or all of what is new, after a crash and after a power cut too. So the
bytes are on the disk (`fsync`) before the name is, and the name is (`fsync` of the folder) before anything is built on it.
Every temporary name is its writer's own: two writers of one file both succeed, and the last one's stays.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from mechhier.specs import shown

LOCK = ".lock"
"""Name of the file in a folder that the process working there holds. It stays: without it two could hold one each."""

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}
"""What file systems answer that cannot sync a folder; their names are durable by themselves, or never."""


def absolute(path: str | os.PathLike[str]) -> Path:
    """A path that names the same place wherever the process goes; `~` is the user's home.

    Raises:
        TypeError: It is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"a path is text or a Path, not {shown(path)}")
    return Path(path).expanduser().absolute()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path` to write to; it becomes `path` when the block ends well, and is removed otherwise.

    Its permissions are those of any new file (the umask's), whatever wrote to it.

    Raises:
        OSError: It cannot be written; the error names `path`.
    """
    temporary = _temporary(path)
    with errors_name(path, temporary):
        try:
            # Neither a file nor a link that someone put there is written to.
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            mode = os.fstat(descriptor).st_mode
            os.close(descriptor)
            yield temporary
            temporary.chmod(mode)
            _sync(temporary)
            temporary.replace(path)
            _sync_names(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder beside `path` to fill; it becomes `path` when the block ends well, and is removed otherwise.

    Files in it get the permissions of any new file (the umask's), whatever wrote them.

    Raises:
        OSError: It cannot be written, or `path` is there already with something in it; the error names a file.
    """
    temporary = _temporary(path)
    with errors_name(path, temporary):
        try:
            temporary.mkdir()
            yield temporary
            mode = temporary.stat().st_mode & 0o666
            for parent, _, names in os.walk(temporary, topdown=False):
                for name in names:
                    (Path(parent) / name).chmod(mode)
                    _sync(Path(parent) / name)
                _sync_names(Path(parent))
            temporary.rename(path)
            _sync_names(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def append_durably(path: Path, text: str) -> None:
    """Add text (UTF-8) to the end of a file, which must be there; it is on the disk when this returns.

    A cut can leave a part of it: a reader must know a whole line from half of one.
    """
    content = text.encode()
    with errors_name(path), path.open("ab", buffering=0) as file:
        if file.write(content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, if they are absent; their names are on the disk when this returns."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        try:
            _sync_names(folder.parent)
        except OSError as error:  # which names the folder above
            raise OSError(error.errno, error.strerror, str(folder)) from error


@contextmanager
def only_process_in(folder: Path, *, otherwise: Exception) -> Iterator[None]:
    """Hold a folder's lock, which the system gives back when a process dies; make the folder if it is absent.

    Whoever holds it is alone in the folder, so what killed writers left there is removed.

    Args:
        folder: Where to work.
        otherwise: What to raise when another process (or thread) holds it.
    """
    make_folder(folder)
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise otherwise from None
    try:
        remove_leftovers(folder)
        yield
    finally:
        lock.release()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that killed writers left in a folder; only for the holder of its lock.

    Those in its subfolders stay: others may work there.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_leftover(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether a path is named as the temporary files and folders of this module are."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def errors_name(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Make the system's errors name a file where they name none, and not by the temporary name that it is written under."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        if error.filename is None:
            named = path
        elif (
            temporary is not None and isinstance(error.filename, str) and Path(error.filename).is_relative_to(temporary)
        ):
            named = path / Path(error.filename).relative_to(temporary)
        else:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(named)) from error


def _sync(file: Path) -> None:
    # Windows syncs only what is open for writing.
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    if os.name == "nt":  # which cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with errors_name(folder):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)

"""The files of a model's folder before any library opens one: whether they are files, may be read, and are of a size.

The libraries that read a folder trust it: they wait for a pipe, follow an index to other folders, parse what no memory
holds, and leave out what they cannot read. So every file that they would open is looked at here first.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechhier.models.errors import ModelLoadError, UnreadableFileError

MOST_SETTINGS = 20_000
"""Values in one file of settings. The longest are lists of layers and of classes; libraries copy them many times."""
_MEGABYTE = 2**20
_MOST_BYTES = {"model.safetensors.index.json": 32, "tokenizer_config.json": 16, "added_tokens.json": 16}
"""In megabytes; four to ten times the largest files that are published. Other settings: 4."""
_MOST_TEMPLATES = 100


@dataclass(frozen=True)
class ModelFiles:
    """A folder with a model in it, and how messages speak of it."""

    folder: Path
    what: str
    """What it is called."""
    original: str
    """The arguments with which transformers' `from_pretrained` would find it."""
    repair: str = "copy or download the folder once more"
    """What to do when files in it are absent or damaged."""


class _Unreadable(Exception):
    """The reason, and what to do where copying anew is not the answer."""

    def __init__(self, reason: str, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.remedy = remedy


def is_there(files: ModelFiles, name: str, *, most: int | None = None) -> bool:
    """Whether there is a file of that name that can be read; False where there is nothing.

    Raises:
        UnreadableFileError: There is something else: a folder, a pipe, a link that leads nowhere, a file of more than
            `most` bytes, or one that this user may not read.
    """
    try:
        return _size(files.folder / name, most) is not None
    except _Unreadable as error:
        raise _refusal(files, name, error, UnreadableFileError) from None


def read_settings(
    files: ModelFiles, name: str, *, error: type[ModelLoadError] = UnreadableFileError
) -> dict[str, Any] | None:
    """The contents of a JSON file; None where there is none.

    Raises:
        UnreadableFileError: As `is_there`.
        ModelLoadError: Of the class `error`: it is no JSON object in UTF-8, or holds more than any such file.
    """
    if not is_there(files, name, most=_MOST_BYTES.get(name, 4) * _MEGABYTE):
        return None
    try:
        return parse(
            (files.folder / name).read_bytes(), most=10 * MOST_SETTINGS if name in _MOST_BYTES else MOST_SETTINGS
        )
    except _Unreadable as reason:
        raise _refusal(files, name, reason, error) from None


def tokenizer_problem(files: ModelFiles, names: list[str], *, most: int) -> str | None:
    """What is wrong with the files that a tokenizer is read from, before any is read; None where nothing is.

    Args:
        files: The folder.
        names: Of files that are there.
        most: Bytes that a file with a vocabulary may have.

    Raises:
        UnreadableFileError: One may not be read by this user.
    """
    for name in names:
        small = name in _MOST_BYTES or name in ("special_tokens_map.json", "chat_template.jinja", "config.json")
        limit = _MOST_BYTES.get(name, 4) * _MEGABYTE if small or name.endswith(".jinja") else most
        path = files.folder / name
        try:
            if _size(path, limit) is not None and path.suffix == ".json":
                content = parse(path.read_bytes(), most=None)
                if name.startswith("tokenizer") and _growth(content.get("normalizer")) > _MOST_GROWTH:
                    raise _Unreadable("its normalizer makes a text thousands of times as long")
        except _Unreadable as error:
            if error.remedy is not None:
                raise _refusal(files, name, error, UnreadableFileError) from None
            return f"{name} {error}"
    return None


_MOST_GROWTH = 10_000


def _growth(part: Any) -> float:
    """How many times as long a normalizer can make a text; those of real tokenizers write one character for another."""
    growth = 1.0
    parts = [part]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts.extend(part)
        elif isinstance(part, dict):
            parts.extend(part.values())
            pattern, content = part.get("pattern"), part.get("content")
            if isinstance(content, str):
                found = pattern.get("String") if isinstance(pattern, dict) else None
                growth *= max(1.0, len(content) / max(1, len(found) if isinstance(found, str) else 1))
    return growth


def parse(content: bytes, *, most: int | None) -> dict[str, Any]:
    """A JSON object of at most `most` values.

    Raises:
        _Unreadable: It is none.
    """
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise _Unreadable("cannot be read: it is no text in UTF-8") from None
    except RecursionError:
        raise _Unreadable("cannot be read: it is nested too deep") from None
    except ValueError as error:  # json says where, without a word of the content
        found = "it is empty" if not content.strip(b" \0\r\n\t") else str(error).partition(";")[0]
        raise _Unreadable(f"cannot be read: {found}") from None
    if not isinstance(value, dict):
        raise _Unreadable(
            f"cannot be read: it holds {_KINDS.get(type(value), 'a value')} instead of an object, {{...}}"
        )
    if most is not None and _more_than(value, most):
        raise _Unreadable(f"has more than {most:,} values, more than any model's")
    return value


_KINDS = {list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


def _more_than(value: Any, most: int) -> bool:
    left, count = [value], 0
    while left and count <= most:
        part = left.pop()
        count += 1
        if isinstance(part, (dict, list)):
            if count + len(part) > most:
                return True
            left.extend(part.values() if isinstance(part, dict) else part)
    return count > most


def extra_templates(files: ModelFiles) -> list[str]:
    """Names of the chat templates beside the first one, which transformers reads too."""
    found: Iterator[Path] = (files.folder / "additional_chat_templates").glob("*.jinja")
    return [f"additional_chat_templates/{path.name}" for path, _ in zip(found, range(_MOST_TEMPLATES), strict=False)]


def _size(path: Path, most: int | None) -> int | None:
    """A file's size in bytes; None where nothing has that name."""
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            with open(path, "rb"):  # the one way to know whether it may be read
                pass
    except FileNotFoundError:
        if os.path.islink(path):
            raise _Unreadable("is a link that leads nowhere") from None
        return None
    except PermissionError:
        raise _Unreadable(
            "may not be read by this user",
            "ask its owner for the right to read it (chmod a+r), or make a copy that is yours",
        ) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _Unreadable("is a link that leads nowhere") from None
        raise _Unreadable(f"cannot be read: {os.strerror(error.errno or 0)}") from None
    if stat.S_ISDIR(found.st_mode):
        raise _Unreadable("is a folder, not a file")
    if not stat.S_ISREG(found.st_mode):
        raise _Unreadable("is no file, but a pipe, a socket or a device")
    if most is not None and found.st_size > most:
        raise _Unreadable(f"has {found.st_size:,} bytes, of which a model like this needs at most {most:,}")
    return found.st_size


def _refusal(files: ModelFiles, name: str, error: _Unreadable, kind: type[ModelLoadError]) -> ModelLoadError:
    return kind(f"cannot load {files.what}: {name} {error}. What to do: {error.remedy or files.repair}")

"""Text files as plain values: UTF-8 text, JSON and YAML, each bounded before it is worked on, errors in one line."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from mechhier.text import printable

MOST_SPEC_BYTES = 2**20
"""Largest YAML file: ten thousand rules of a grammar are half of it."""
MOST_VALUES = 200_000
"""Most values of a YAML document, what an alias stands for counted wherever it stands."""
MOST_LEVELS = 32
"""Most lists and mappings inside one another."""
_MOST_DIGITS = 64  # of a number: more than any that is meant
_QUOTED = 200  # characters of a library's message
_CHARACTERS_PER_VALUE = 100  # long text counts as several values

# libyaml where it is there, which is some twenty times faster.
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_OTHER_ENCODINGS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class ReadError(ValueError):
    """A file that cannot be read as what it should be; the message says where and why."""


def read_text(path: str | os.PathLike[str], *, most_bytes: int) -> str:
    """The text of a UTF-8 file; a byte order mark is left out.

    Raises:
        FileNotFoundError: There is no such file.
        ReadError: It is a folder or no regular file, cannot be opened, is larger than `most_bytes`, or is not UTF-8.
    """
    path = Path(path)
    if path.is_dir():
        raise ReadError(f"{path} is a folder, not a file")
    if path.exists() and not path.is_file():
        raise ReadError(f"{path} is not a regular file")
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
            size = max(len(content), path.stat().st_size)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > most_bytes:
        raise ReadError(f"{path} has {size:,} bytes; at most {most_bytes:,} are read")
    return decoded(content, str(path))


def decoded(content: bytes, name: str) -> str:
    """Text of UTF-8 bytes, without a byte order mark.

    Raises:
        ReadError: They are not UTF-8; the message says which encoding it seems to be, and where.
    """
    for mark, encoding in _OTHER_ENCODINGS.items():
        if content.startswith(mark):
            raise ReadError(f"{name} is written in {encoding}: save it as UTF-8")
    if len(content) > 1 and 0 in content[:2]:
        raise ReadError(f"{name} begins with a zero byte: it is UTF-16 without a mark, or no text; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ReadError(
            f"{name} is not UTF-8: byte 0x{content[error.start]:02x} in line {line}; if it is written in Latin-1 or "
            "Windows-1252, save it as UTF-8"
        ) from None


def read_json(text: str, name: str) -> Any:
    """The value of a JSON text.

    Raises:
        ReadError: It is not JSON, is nested too deeply, gives a key twice, or holds NaN or a number beyond all sense.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_decimal, parse_constant=_constant
        )
    except json.JSONDecodeError as error:
        raise ReadError(f"{name} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError:
        raise ReadError(f"{name} is nested too deeply") from None
    except ReadError as error:
        raise ReadError(f"{name}: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in result if keys.count(key) > 1)
        raise ReadError(f"the key {twice[:60]!r} is given twice")
    return result


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ReadError(f"a number of {len(digits):,} digits")
    return int(digits)


def _decimal(digits: str) -> float:
    if len(digits) > _MOST_DIGITS:
        raise ReadError(f"a number of {len(digits):,} characters")
    return float(digits)


def _constant(word: str) -> float:
    raise ReadError(f"{word} is not a number")


def read_yaml(text: str, name: str) -> Any:
    """The value of a YAML text: mappings, lists, text, numbers, true, false and null; anchors, aliases and `<<` work.

    Words have the values that YAML 1.2 and JSON give them, so that `yes`, `1:30`, `1_000`, `0x10` and dates are text
    (whose field then refuses it); `1e-3` is a number. What YAML 1.1 reads as octal (`010`) is refused.

    Raises:
        ReadError: It is not YAML; a key twice or that is not text; a tag, an alias without its anchor, several documents;
            more than `MOST_VALUES` values or `MOST_LEVELS` levels. The message has the line.
    """
    try:
        return _Builder(name).value(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        what = ", ".join(each for each in (error.context, error.problem) if each)
        raise ReadError(f"{name} is not YAML: line {line}: {printable(what[:_QUOTED])}") from error
    except yaml.reader.ReaderError as error:
        raise ReadError(f"{name} is not YAML: it holds the character {chr(error.character)!r}") from error
    except yaml.YAMLError as error:
        raise ReadError(f"{name} is not YAML: {printable(str(error).splitlines()[0][:_QUOTED])}") from error
    except RecursionError:
        raise ReadError(f"{name} is nested too deeply; at most {MOST_LEVELS} levels are read") from None


class _Collection:
    """A list or a mapping that is being read."""

    def __init__(self, value: list[Any] | dict[str, Any], anchor: str | None) -> None:
        self.value = value
        self.anchor = anchor
        self.n_values = 1
        self.key: str | None = None  # of a mapping: the key whose value is next
        self.merged: Any = None


class _Builder:
    """Makes a value of YAML's events, without recursion and counting as it goes."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: list[_Collection] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._n_values = 0
        self._root: Any = None
        self._line = 1

    def value(self, text: str) -> Any:
        n_documents = 0
        for event in yaml.parse(text, Loader=_Parser):
            self._line = event.start_mark.line + 1
            if isinstance(event, yaml.DocumentStartEvent):
                n_documents += 1
                if n_documents > 1:
                    raise self._error("a second document begins (---); one is read")
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor not in self._anchors:
                    raise self._error(f"*{event.anchor[:60]} stands for nothing: no &{event.anchor[:60]} ends above it")
                self._add(*self._anchors[event.anchor])
            elif isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent):
                if event.tag is not None:
                    tag = printable(event.tag[:60]).replace("tag:yaml.org,2002:", "!!")
                    raise self._error(f"the tag {tag}: tags are not read; what is meant as text is put in quotes")
                if isinstance(event, yaml.ScalarEvent):
                    self._add_scalar(event)
                else:
                    self._begin([] if isinstance(event, yaml.SequenceStartEvent) else {}, event.anchor)
            elif isinstance(event, yaml.CollectionEndEvent):
                self._end()
        if n_documents == 0:
            raise ReadError(f"{self._name} is empty")
        return self._root

    def _error(self, what: str) -> ReadError:
        return ReadError(f"{self._name}, line {self._line}: {what}")

    def _begin(self, value: list[Any] | dict[str, Any], anchor: str | None) -> None:
        if self._open and isinstance(self._open[-1].value, dict) and self._open[-1].key is None:
            raise self._error("a list or a mapping as a key; a key is text")
        if len(self._open) == MOST_LEVELS:
            raise self._error(f"nested more than {MOST_LEVELS} levels deep")
        self._open.append(_Collection(value, anchor))

    def _end(self) -> None:
        ended = self._open.pop()
        if isinstance(ended.value, dict):
            own = dict(ended.value)
            ended.value.clear()
            for merged in (*reversed(ended.merged or ()), own):
                ended.value.update(merged)
        if ended.anchor is not None:
            self._anchors[ended.anchor] = ended.value, ended.n_values
        self._add(ended.value, ended.n_values)

    def _add_scalar(self, event: yaml.ScalarEvent) -> None:
        text, n_values = event.value, 1 + len(event.value) // _CHARACTERS_PER_VALUE
        inside = self._open[-1] if self._open else None
        if inside is not None and isinstance(inside.value, dict) and inside.key is None:
            self._add_key(inside, text, plain=not event.style)
            value = text
        else:
            value = text if event.style else self._meaning(text)
            self._add(value, n_values)
        if event.anchor is not None:
            self._anchors[event.anchor] = value, n_values

    def _add_key(self, mapping: _Collection, key: str, *, plain: bool) -> None:
        if plain and not isinstance(self._meaning(key), str):
            raise self._error(f"the key {key[:60]!r} is not text; put it in quotes if it is meant")
        given = key in mapping.value or (key == "<<" and mapping.merged is not None)
        if given:
            raise self._error(f"the key {key[:60]!r} is given twice")
        mapping.key = key

    def _add(self, value: Any, n_values: int) -> None:
        if not self._open:
            self._root = value
            return
        into = self._open[-1]
        into.n_values += n_values
        if into.n_values > MOST_VALUES:
            raise self._error(f"more than {MOST_VALUES:,} values, counting what aliases stand for")
        if isinstance(into.value, list):
            into.value.append(value)
        elif into.key is None:
            if not isinstance(value, str):
                raise self._error("an alias as a key stands for no text; a key is text")
            self._add_key(into, value, plain=False)
        elif into.key == "<<":
            into.merged = value if isinstance(value, list) else [value]
            if not all(isinstance(each, dict) for each in into.merged):
                raise self._error("<< takes a mapping, or a list of mappings")
            into.key = None
        else:
            into.value[into.key] = value
            into.key = None

    def _meaning(self, text: str) -> Any:
        """The value of a word without quotes."""
        if text in _WORDS:
            return _WORDS[text]
        if len(text) > _MOST_DIGITS:
            if _DECIMAL.fullmatch(text[: 10 * _MOST_DIGITS]):
                raise self._error(f"a number of {len(text):,} digits")
            return text
        if _AMBIGUOUS.fullmatch(text):
            raise self._error(
                f"{text} may be meant as octal: leave out the leading zero, or put it in quotes if it is text"
            )
        if _WHOLE.fullmatch(text):
            return int(text)
        return float(text) if _DECIMAL.fullmatch(text) else text

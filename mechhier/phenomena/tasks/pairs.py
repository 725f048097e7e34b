"""Lists of words with the value of a function for each: built in, or in files of the public function-vector format."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mechhier.reading import read_json, read_text
from mechhier.specs import SpecError, shown, unreadable

_BUILT_IN = Path(__file__).parent / "words"
_MOST_BYTES = 2**24
_MOST_PAIRS = 100_000
_LONGEST = 200  # characters of a word, or of a few


@dataclass(frozen=True)
class Pairs:
    """A function given by its values.

    Attributes:
        name: Of the built-in list, or of the file without its ending.
        outputs: The output of every input, in the order of the file.
        repeated: Rows whose input stands above them, as `"input -> output: ..."`; they do not count.
    """

    name: str
    outputs: dict[str, str]
    repeated: tuple[str, ...]


def built_in_tasks() -> list[str]:
    """Names of the word lists that come with the package, at least 60 pairs each.

    Lists of one family have their inputs in common: those that begin alike, `antonym` with the adjectives, and
    `capitalize` and `singular-plural` with the nouns of `english-...`.

    Example:
        >>> "country-capital" in built_in_tasks()
        True
    """
    return sorted(file.stem for file in _BUILT_IN.glob("*.json"))


def read_pairs(task: str | os.PathLike[str]) -> Pairs:
    """A built-in list by its name, or a file by its path, `[{"input": "...", "output": "..."}, ...]` (Todd et al. 2024).

    Blanks at the ends of a word do not count. A row may hold more than the two; an input that stands twice counts once.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No built-in list of that name; a file that is no UTF-8 or no JSON, has over 100,000 pairs, or is not
            such a list: by its row (the first is 1), such as one with words of over 200 characters or with line breaks.
    """
    if not isinstance(task, str | os.PathLike):
        raise SpecError(f"a word task is the name of a built-in list or the path of a file, not {shown(task)}")
    if isinstance(task, str) and not task.endswith(".json"):
        if task not in built_in_tasks():
            raise SpecError(
                f"no built-in task {shown(task)}: there are {', '.join(built_in_tasks())}; the path of a list of pairs ends "
                "with .json"
            )
        return _read(_BUILT_IN / f"{task}.json", task)
    path = Path(task)
    try:
        return _read(path, path.stem)
    except FileNotFoundError:
        raise FileNotFoundError(f"no list of pairs at {path}") from None


def _read(file: Path, name: str) -> Pairs:
    rows = read_json(read_text(file, most_bytes=_MOST_BYTES), str(file))
    if not isinstance(rows, list):
        raise SpecError(f'{file} must hold a list of {{"input": "...", "output": "..."}}, not {shown(rows)}')
    if not 0 < len(rows) <= _MOST_PAIRS:
        raise SpecError(f"{file} holds {len(rows):,} pairs; 1 to {_MOST_PAIRS:,} are read")
    outputs: dict[str, str] = {}
    repeated = []
    for number, row in enumerate(rows, start=1):
        x, y = (_word(row, key, f"{file}, row {number}") for key in ("input", "output"))
        if x in outputs:
            repeated.append(f"{x} -> {y}: its input is given before")
        else:
            outputs[x] = y
    return Pairs(name, outputs, tuple(repeated))


def _word(row: object, key: str, where: str) -> str:
    word = row.get(key) if isinstance(row, dict) else None
    if not isinstance(word, str) or not word.strip():
        got = f"{shown(word)} as {key!r}" if isinstance(row, dict) and key in row else shown(row)
        missing = f" without {key!r}" if isinstance(row, dict) and key not in row else ""
        raise SpecError(
            f'{where}: expected {{"input": "...", "output": "..."}} with text that is not empty, got {got}{missing}'
        )
    word = word.strip()
    if len(word) > _LONGEST:
        raise SpecError(f"{where}: {key!r} has {len(word):,} characters; at most {_LONGEST} are a word or a few")
    if len(word.splitlines()) > 1 or "\t" in word:
        raise SpecError(f"{where}: {key!r} has a line break or a tab, {shown(word)}; words stand in one line")
    if problem := unreadable(word):
        raise SpecError(f"{where}: {key!r} {problem.what}")
    return word

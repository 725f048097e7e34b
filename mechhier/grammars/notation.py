"""Grammars as text: NLTK's notation, and the rule tables published with cfg3b and its relatives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from mechhier.grammars.rules import Rule
from mechhier.specs import shown

Parts = tuple[str, tuple[str, ...], tuple[Rule, ...]]
"""Start symbol, terminals, rules."""

_FORM = "a rule reads A -> B 'b' [0.4] | C [0.6]"
_CFG3 = "it has `all`, a list of levels, each a list of symbols with `id` and `children` (lists of indices into the next level)"
_TERMINALS = "# terminals:"
_PRINTED = re.compile(r"Grammar with \d+ productions? \(start state = (\S+)\)")  # as NLTK prints a grammar
_NAME = re.compile(r"(?![#%])[^\s|\[\]'\"]+")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_RULE = re.compile(r"^\s*(?P<lhs>\S+)\s*->\s*(?P<rhs>.*)$")
_PART = re.compile(
    r"""(?P<terminal>'[^']*'|"[^"]*")|(?P<probability>\[[^\]]*\])|(?P<bar>\|)|(?P<symbol>[^\s|\[\]'"]+)"""
)


def read(text: str) -> Parts:
    """Read NLTK's notation; see :meth:`PCFG.from_string`."""
    rules: list[Rule] = []
    terminals: dict[str, None] = {}
    listed: tuple[str, ...] | None = None
    start = ""
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if line.startswith(_TERMINALS) and not _QUOTED.sub("", line.removeprefix(_TERMINALS)).strip():
            listed = tuple(found[0][1:-1] for found in _QUOTED.finditer(line))
        if not line or line.startswith("#"):
            continue
        if line.startswith("%start"):
            start = line.removeprefix("%start").strip()
            continue
        if printed := _PRINTED.fullmatch(line):
            start = printed[1]
            continue
        parsed = _RULE.match(line)
        if parsed is None:
            raise ValueError(f"line {number}, {shown(line)}: {_FORM}")
        for rhs, probability in _alternatives(parsed["rhs"], number, line):
            terminals |= dict.fromkeys(symbol for symbol, is_terminal in rhs if is_terminal)
            rules.append(Rule(parsed["lhs"], tuple(symbol for symbol, _ in rhs), probability))
    if not rules:
        raise ValueError(f"the text has no rules; {_FORM}")
    if listed is not None:
        if other := sorted(terminals.keys() ^ set(listed)) or [t for i, t in enumerate(listed) if t in listed[:i]]:
            raise ValueError(
                f"the line {_TERMINALS!r} must list every terminal of the rules once, and {shown(other[0])} is missing "
                "there or has no use; mend it, or leave it out: they are numbered in order of appearance then"
            )
        return start or rules[0].lhs, listed, tuple(rules)
    return start or rules[0].lhs, tuple(terminals), tuple(rules)


def write(start: str, terminals: Sequence[str], rules: Sequence[Rule]) -> str:
    """Write NLTK's notation; see :meth:`PCFG.to_string`."""
    for name in dict.fromkeys(rule.lhs for rule in rules):
        if not _NAME.fullmatch(name) or "->" in name:
            raise ValueError(f"the symbol {shown(name)} cannot be written in NLTK's notation; rename it")
    lines = [f"%start {start}"]
    is_terminal = dict.fromkeys(terminals)
    if list(dict.fromkeys(x for rule in rules for x in rule.rhs if x in is_terminal)) != list(terminals):
        lines.append(" ".join([_TERMINALS, *map(quoted, terminals)]))
    for lhs, its in groupby(rules, key=lambda rule: rule.lhs):
        alternatives = [
            " ".join([*(quoted(x) if x in is_terminal else x for x in rule.rhs), f"[{rule.probability!r}]"])
            for rule in its
        ]
        lines.append(f"{lhs} -> {' | '.join(alternatives)}")
    return "\n".join(lines)


def quoted(terminal: str) -> str:
    """Return a terminal in quotes."""
    if "'" not in terminal:
        return f"'{terminal}'"
    if '"' in terminal:
        raise ValueError(
            f"the terminal {shown(terminal)} holds both kinds of quotes, which NLTK's notation cannot write"
        )
    return f'"{terminal}"'


def read_cfg3(table: dict[str, Any]) -> Parts:
    """Read a published rule table; see :meth:`PCFG.from_cfg3`."""
    if not isinstance(table, Mapping) or not isinstance(table.get("all"), list) or not table["all"]:
        raise ValueError(f"not a cfg3 table: {_CFG3}")
    levels = [list(_symbols_of_level(level, depth)) for depth, level in enumerate(table["all"])]
    if not levels[0]:
        raise ValueError(f"not a cfg3 table: level 0 has no symbol; {_CFG3}")
    rules: list[Rule] = []
    for depth, level in enumerate(levels):
        below = [name for name, _ in levels[depth + 1]] if depth + 1 < len(levels) else []
        for name, alternatives in level:
            for children in alternatives:
                if not isinstance(children, list):
                    raise ValueError(f"not a cfg3 table: a rule of {shown(name)} is {shown(children)}; {_CFG3}")
                for i in children:
                    if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < len(below):
                        raise ValueError(
                            f"not a cfg3 table: a rule of {shown(name)} names symbol {shown(i)} of level {depth + 1}, which "
                            f"has {len(below)}; {_CFG3}"
                        )
                rules.append(Rule(name, tuple(below[i] for i in children), 1 / len(alternatives)))
    terminals = tuple(name for name, alternatives in levels[-1] if not alternatives)
    return levels[0][0][0], terminals, tuple(rules)


def _symbols_of_level(level: Any, depth: int) -> Iterator[tuple[str, list[Any]]]:
    if not isinstance(level, list):
        raise ValueError(f"not a cfg3 table: level {depth} is {shown(level)}; {_CFG3}")
    for symbol in level:
        name = symbol.get("id") if isinstance(symbol, Mapping) else None
        children = (symbol.get("children") or []) if isinstance(symbol, Mapping) else None
        if not isinstance(name, str | int) or isinstance(name, bool) or not isinstance(children, list):
            raise ValueError(f"not a cfg3 table: a symbol of level {depth} is {shown(symbol)}; {_CFG3}")
        yield str(name), children


def _alternatives(text: str, number: int, line: str) -> Iterator[tuple[list[tuple[str, bool]], float]]:
    """Yield the alternatives of a rule's right side: symbols with whether they are terminals, and the probability."""
    rhs: list[tuple[str, bool]] = []
    probability: float | None = None
    if _PART.sub("", text).strip():
        raise ValueError(f"line {number}, {shown(line)}: not understood; {_FORM}")
    for part in [*_PART.finditer(text), None]:
        if part is None or part["bar"]:
            if probability is None:
                raise ValueError(
                    f"line {number}, {shown(line)}: every alternative ends with its probability, as in A -> B [0.4]"
                )
            yield rhs, probability
            rhs, probability = [], None
        elif probability is not None:
            raise ValueError(
                f"line {number}, {shown(line)}: {shown(part[0])} follows a probability; write | between alternatives"
            )
        elif part["probability"]:
            try:
                probability = float(part["probability"][1:-1])
            except ValueError:
                raise ValueError(
                    f"line {number}, {shown(line)}: {shown(part['probability'])} is not a probability"
                ) from None
        elif part["terminal"]:
            rhs.append((part["terminal"][1:-1], True))
        else:
            rhs.append((part["symbol"], False))

"""Grammars as text: NLTK's notation, and the rule tables published with cfg3b and its relatives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from mechhier.grammars.rules import Rule
from mechhier.specs import shown

Parts = tuple[str, tuple[str, ...], tuple[Rule, ...]]
"""Start symbol, terminals, rules."""

_FORM = "a rule reads A -> B 'b' [0.4] | C [0.6]"
_RULE = re.compile(r"^\s*(?P<lhs>\S+)\s*->\s*(?P<rhs>.*)$")
_PART = re.compile(
    r"""(?P<terminal>'[^']*'|"[^"]*")|(?P<probability>\[[^\]]*\])|(?P<bar>\|)|(?P<symbol>[^\s|\[\]'"]+)"""
)


def read(text: str) -> Parts:
    """Read NLTK's notation; see :meth:`PCFG.from_string`."""
    rules: list[Rule] = []
    terminals: dict[str, None] = {}
    start = ""
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("%start"):
            start = line.removeprefix("%start").strip()
            continue
        parsed = _RULE.match(line)
        if parsed is None:
            raise ValueError(f"line {number}, {shown(line)}: {_FORM}")
        for rhs, probability in _alternatives(parsed["rhs"], number, line):
            terminals |= dict.fromkeys(symbol for symbol, is_terminal in rhs if is_terminal)
            rules.append(Rule(parsed["lhs"], tuple(symbol for symbol, _ in rhs), probability))
    if not rules:
        raise ValueError(f"the text has no rules; {_FORM}")
    return start or rules[0].lhs, tuple(terminals), tuple(rules)


def write(start: str, terminals: Sequence[str], rules: Sequence[Rule]) -> str:
    """Write NLTK's notation; see :meth:`PCFG.to_string`."""
    lines = [f"%start {start}"]
    for lhs in dict.fromkeys(rule.lhs for rule in rules):
        alternatives = [
            " ".join([*(quoted(x) if x in terminals else x for x in rule.rhs), f"[{rule.probability!r}]"])
            for rule in rules
            if rule.lhs == lhs
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
    try:
        levels = [[(str(symbol["id"]), symbol.get("children") or []) for symbol in level] for level in table["all"]]
        rules = tuple(
            Rule(name, tuple(levels[depth + 1][i][0] for i in children), 1 / len(alternatives))
            for depth, level in enumerate(levels)
            for name, alternatives in level
            for children in alternatives
        )
        terminals = tuple(name for name, alternatives in levels[-1] if not alternatives)
        return levels[0][0][0], terminals, rules
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            "not a cfg3 table: it needs `all`, a list of levels, each a list of symbols with `id` and `children` "
            f"(lists of indices into the next level); {type(error).__name__}: {str(error)[:100]}"
        ) from error


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

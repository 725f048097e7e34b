"""Rules of a context-free grammar, and what makes them one: defined, productive, reachable, summing to one, ending."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from graphlib import TopologicalSorter
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.sparse.csgraph import connected_components

from mechhier.specs import Number

EOS = "<eos>"
_UNKNOWN = "<unk>"  # what a tokenizer makes of other words

MOST_RULES = 100_000
"""Most rules of a grammar."""
_MOST_CHILDREN = 10**6  # symbols in right sides
_MOST_SYMBOLS = 2**14  # the table of which expands to which is 2 GiB
_SUM_TOLERANCE = 1e-6  # probabilities written with seven digits pass
_MARGIN = 1e-9  # of the spectral radius, for rounding


class Rule(NamedTuple):
    """One rule: a nonterminal, what it expands to (nothing at all for an empty rule), and how probably."""

    lhs: str
    rhs: tuple[str, ...]
    probability: Number

    def __str__(self) -> str:
        return f"{self.lhs} -> {' '.join(self.rhs) or 'ε'} [{self.probability:g}]"


def totals(rules: Iterable[Rule]) -> dict[str, float]:
    """Return the sum of the probabilities of every symbol's rules."""
    sums: dict[str, float] = {}
    for rule in rules:
        sums[rule.lhs] = sums.get(rule.lhs, 0.0) + rule.probability
    return sums


def mean_children(rules: Iterable[Rule], names: Sequence[str]) -> Float[np.ndarray, "symbol child"]:
    """Return the expected number of each named symbol (column) in one expansion of each (row, 0 for a terminal)."""
    number = {name: i for i, name in enumerate(names)}
    means = np.zeros((len(names), len(names)))
    for rule in rules:
        for symbol in rule.rhs:
            if symbol in number:
                means[number[rule.lhs], number[symbol]] += rule.probability
    return means


def is_recursive(mean_matrix: Float[np.ndarray, "symbol child"]) -> bool:
    """Return whether a symbol can contain itself."""
    n_groups, _ = connected_components(mean_matrix > 0, directed=True, connection="strong")
    return n_groups < len(mean_matrix) or bool(np.diag(mean_matrix).any())


def bottom_up(rules: Iterable[Rule]) -> Iterator[tuple[str, list[Rule]]]:
    """Yield every symbol with its rules after all that occur in them, in a grammar where none can contain itself."""
    rules_of: dict[str, list[Rule]] = {}
    for rule in rules:
        rules_of.setdefault(rule.lhs, []).append(rule)
    inside = {lhs: {x for rule in its for x in rule.rhs if x in rules_of} for lhs, its in rules_of.items()}
    yield from ((lhs, rules_of[lhs]) for lhs in TopologicalSorter(inside).static_order())


def check_size(n_symbols: int, n_rules: int, n_children: int) -> None:
    """Refuse what is too large to be worked on.

    Args:
        n_symbols: Number of nonterminals and terminals.
        n_rules: Number of rules.
        n_children: Number of symbols in their right sides.

    Raises:
        ValueError: One of them is too large; the message has the limits.
    """
    if n_symbols > _MOST_SYMBOLS or n_rules > MOST_RULES or n_children > _MOST_CHILDREN:
        raise ValueError(
            f"a grammar of {n_symbols:,} symbols and {n_rules:,} rules with {n_children:,} symbols in them; at most "
            f"{_MOST_SYMBOLS:,} symbols and {MOST_RULES:,} rules with {_MOST_CHILDREN:,} are accepted"
        )


def check(start: str, terminals: Sequence[str], rules: Sequence[Rule]) -> None:
    """Refuse what is not a consistent grammar, or has parts that no string uses.

    Raises:
        ValueError: With the rule or the symbol at fault.
    """
    for part in (_check_symbols, _check_probabilities, _check_use, _check_ends):
        part(start, terminals, rules)


def _check_symbols(start: str, terminals: Sequence[str], rules: Sequence[Rule]) -> None:
    if len(set(terminals)) < len(terminals):
        twice = next(t for t, times in Counter(terminals).items() if times > 1)
        raise ValueError(f"the terminal {twice!r} is listed twice")
    for terminal in terminals:
        if terminal in ("", EOS, _UNKNOWN):
            raise ValueError(f"{terminal!r} cannot be a terminal: it is the end of a string, or no word at all")
        if any(character.isspace() for character in terminal):
            raise ValueError(f"{terminal!r} cannot be a terminal: text is written with spaces between tokens")
    defined = {rule.lhs for rule in rules}
    if both := sorted(defined.intersection(terminals)):
        raise ValueError(f"{both[0]!r} is a terminal and has rules; it must be one or the other")
    if start not in defined:
        raise ValueError(f"the start symbol {start!r} has no rule")
    known = defined.union(terminals)
    for rule in rules:
        if undefined := [symbol for symbol in rule.rhs if symbol not in known]:
            raise ValueError(f"in {rule}: {undefined[0]!r} has no rule and is not a terminal")


def _check_probabilities(start: str, terminals: Sequence[str], rules: Sequence[Rule]) -> None:
    seen = set()
    for rule in rules:
        if not 0 < rule.probability <= 1:
            raise ValueError(f"{rule}: a probability is above 0 and at most 1; leave out a rule that is never used")
        if rule[:2] in seen:
            raise ValueError(f"{rule}: the rule is listed twice")
        seen.add(rule[:2])
    for symbol, total in totals(rules).items():
        if abs(total - 1) > _SUM_TOLERANCE:
            of_symbol = "; ".join(str(rule) for rule in rules if rule.lhs == symbol)
            raise ValueError(f"the probabilities of {symbol!r} sum to {total:.8g}, not 1: {of_symbol}")


def _check_use(start: str, terminals: Sequence[str], rules: Sequence[Rule]) -> None:
    productive = _productive(terminals, rules)
    for rule in rules:
        if idle := [symbol for symbol in (rule.lhs, *rule.rhs) if symbol not in productive]:
            raise ValueError(f"in {rule}: {idle[0]!r} is unproductive, it never becomes a string of terminals")
    rules_of: dict[str, list[Rule]] = {}
    for rule in rules:
        rules_of.setdefault(rule.lhs, []).append(rule)
    reached, frontier = {start}, {start}
    while frontier:
        frontier = {x for lhs in frontier for rule in rules_of.get(lhs, ()) for x in rule.rhs} - reached
        reached |= frontier
    for rule in rules:
        if rule.lhs not in reached:
            raise ValueError(f"{rule}: {rule.lhs!r} is unreachable from the start symbol {start!r}")
    if unused := [terminal for terminal in terminals if terminal not in reached]:
        raise ValueError(f"the terminal {unused[0]!r} is unreachable from the start symbol {start!r}")


def _productive(terminals: Sequence[str], rules: Sequence[Rule]) -> set[str]:
    """Symbols that become strings of terminals; each rule is looked at once for each of its symbols."""
    waits = [len(set(rule.rhs)) for rule in rules]
    with_symbol: dict[str, list[int]] = {}
    for i, rule in enumerate(rules):
        for symbol in set(rule.rhs):
            with_symbol.setdefault(symbol, []).append(i)
    productive = set(terminals)
    found = [*terminals, *{rule.lhs for rule in rules if not rule.rhs}]
    productive.update(found)
    while found:
        for i in with_symbol.get(found.pop(), ()):
            waits[i] -= 1
            if waits[i] == 0 and rules[i].lhs not in productive:
                productive.add(rules[i].lhs)
                found.append(rules[i].lhs)
    return productive


def _check_ends(start: str, terminals: Sequence[str], rules: Sequence[Rule]) -> None:
    """Refuse a spectral radius of M at or above 1, naming a rule of the recursion at fault."""
    names = list(dict.fromkeys(rule.lhs for rule in rules))
    means = mean_children(rules, names)
    n_groups, group = connected_components(means > 0, directed=True, connection="strong")
    for g in range(n_groups):
        members = np.flatnonzero(group == g)
        radius = float(np.abs(np.linalg.eigvals(means[np.ix_(members, members)])).max())
        if radius >= 1 - _MARGIN:
            inside = {names[i] for i in members}
            rule = max(
                (rule for rule in rules if rule.lhs in inside),
                key=lambda rule: rule.probability * sum(x in inside for x in rule.rhs),
            )
            raise ValueError(
                f"the recursion of {', '.join(sorted(inside))} does not end: one expansion yields {radius:.4g} of these "
                f"symbols on average (spectral radius), and it must be below 1; lower the probability of {rule}"
            )

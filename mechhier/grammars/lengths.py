"""How long the strings of a context-free grammar are: exact laws of the length, from the shortest on.

The law of a rule's right side is the convolution of those of its symbols. What has n tokens consists of shorter parts,
but for the symbols all of whose tokens are one part's: these are a linear system, the same for every n.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from mechhier.grammars.empty import Rules, empty_probabilities
from mechhier.grammars.sampling import compiled


class _Places(NamedTuple):
    """The symbols in the right sides of all rules, one after the other, as arrays."""

    lhs: np.ndarray
    """Left side of every rule."""
    probability: np.ndarray
    """Its probability."""
    start: np.ndarray
    """Where its symbols begin, and their number."""
    symbol: np.ndarray
    """The symbols."""

    @classmethod
    def of(cls, rules: Rules) -> _Places:
        """Make the arrays."""
        return cls(
            np.array([lhs for lhs, _, _ in rules], dtype=np.int64),
            np.array([probability for _, _, probability in rules], dtype=np.float64),
            np.cumsum([0] + [len(rhs) for _, rhs, _ in rules]),
            np.array([x for _, rhs, _ in rules for x in rhs], dtype=np.int64),
        )


def length_laws(rules: Rules, n_nonterminals: int, longest: int) -> Float[np.ndarray, "symbol length"]:
    """Return P(a nonterminal's string has n tokens) for n = 0 .. ``longest``.

    Cost: longest^2 / 2 for every symbol of every rule, in compiled code.
    """
    empty = empty_probabilities(rules, n_nonterminals)
    laws = np.zeros((n_nonterminals, longest + 1))
    laws[:, 0] = empty
    members, closure = _whole_closure(rules, empty)
    _fill_laws(laws, _Places.of(rules), members, closure)
    return laws


def terminal_counts(
    rules: Rules, n_nonterminals: int, n_terminals: int, longest: int
) -> Float[np.ndarray, "terminal length"]:
    """Return E[number of a terminal; length n] of the start symbol's strings, for n = 0 .. ``longest``.

    Divided by the probability of the length it is the expected number in a string of that length. From the expected
    number of every symbol with m tokens around it, which is computed from the root down.
    """
    laws = length_laws(rules, n_nonterminals, longest)
    members, closure = _whole_closure(rules, laws[:, 0])
    places = [
        (lhs, x, probability * beside)
        for lhs, rhs, probability in rules
        for x, beside in zip(rhs, _laws_beside(rhs, laws), strict=True)
    ]
    inner = [place for place in places if place[1] < n_nonterminals]
    outside = np.zeros((n_nonterminals, longest + 1))
    _fill_outside(
        outside,
        np.array([lhs for lhs, _, _ in inner], dtype=np.int64),
        np.array([x for _, x, _ in inner], dtype=np.int64),
        np.array([beside for _, _, beside in inner]).reshape(len(inner), longest + 1),
        members,
        np.ascontiguousarray(closure.T),
    )
    counts = np.zeros((n_terminals, longest + 1))
    for lhs, x, beside in places:
        if x >= n_nonterminals:
            counts[x - n_nonterminals, 1:] += np.convolve(outside[lhs], beside)[:longest]
    return counts


def _whole_closure(rules: Rules, empty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (I - U)^-1 with U[A, B] the expected number of B beside which all of an A's expansion is empty.

    Only for the symbols of which there is any, and their numbers.
    """
    cells: dict[tuple[int, int], float] = {}
    for lhs, rhs, probability in rules:
        own = np.array([empty[x] if x < len(empty) else 0.0 for x in rhs])
        before = np.cumprod([probability, *own[:-1]])
        after = np.cumprod([1.0, *own[:0:-1]])[::-1]
        for x, beside in zip(rhs, before * after, strict=False):  # of an empty rule there is one without a symbol
            if x < len(empty) and beside > 0:
                cells[lhs, x] = cells.get((lhs, x), 0.0) + beside
    members = sorted({symbol for cell in cells for symbol in cell})
    number = {symbol: i for i, symbol in enumerate(members)}
    whole = np.zeros((len(members), len(members)))
    for (a, b), weight in cells.items():
        whole[number[a], number[b]] = weight
    return np.array(members, dtype=np.int64), np.linalg.inv(np.eye(len(members)) - whole)


def _laws_beside(rhs: tuple[int, ...], laws: Float[np.ndarray, "symbol length"]) -> Iterator[np.ndarray]:
    """Yield, for every symbol of a right side, the law of the number of tokens of all others."""
    if not rhs:
        return
    n = laws.shape[1]
    one, token = np.eye(2, n)
    own = [laws[x] if x < len(laws) else token for x in rhs]
    after = [one]
    for law in reversed(own[1:]):
        after.append(np.convolve(law, after[-1])[:n])
    before = one
    for law, rest in zip(own, reversed(after), strict=True):
        yield np.convolve(before, rest)[:n]
        before = np.convolve(before, law)[:n]


@compiled
def _fill_laws(laws: np.ndarray, places: _Places, members: np.ndarray, closure: np.ndarray) -> None:
    """Fill in the laws from length 1 on."""
    n_nonterminals, n = laws.shape
    # Law of every rule's symbols up to a place, and the part of it at the present length that is known already.
    part = np.zeros((len(places.symbol), n))
    known = np.zeros(len(places.symbol))
    for r in range(len(places.lhs)):
        product = 1.0
        for d in range(places.start[r], places.start[r + 1]):
            x = places.symbol[d]
            product *= laws[x, 0] if x < n_nonterminals else 0.0
            part[d, 0] = product
    new = np.zeros(n_nonterminals)
    for length in range(1, n):
        new[:] = 0.0
        for r in range(len(places.lhs)):
            total = 0.0
            for d in range(places.start[r], places.start[r + 1]):
                x, is_first = places.symbol[d], d == places.start[r]
                if x >= n_nonterminals:
                    total = part[d - 1, length - 1] if not is_first else 1.0 * (length == 1)
                elif is_first:
                    total = 0.0
                else:
                    total *= laws[x, 0]
                    for m in range(1, length):
                        total += part[d - 1, m] * laws[x, length - m]
                known[d] = total
            new[places.lhs[r]] += places.probability[r] * total
        _close(new, members, closure)
        laws[:, length] = new
        for r in range(len(places.lhs)):
            for d in range(places.start[r], places.start[r + 1]):
                x, is_first = places.symbol[d], d == places.start[r]
                if x >= n_nonterminals:
                    part[d, length] = known[d]
                elif is_first:
                    part[d, length] = laws[x, length]
                else:
                    # What was left out: all of the tokens before the place, or in it.
                    unknown = part[d - 1, length] - known[d - 1]
                    part[d, length] = known[d] + unknown * laws[x, 0] + part[d - 1, 0] * laws[x, length]


@compiled
def _fill_outside(
    outside: np.ndarray,
    lhs: np.ndarray,
    symbol: np.ndarray,
    beside: np.ndarray,
    members: np.ndarray,
    closure: np.ndarray,
) -> None:
    """Fill in the expected number of each symbol with m tokens around it."""
    n_nonterminals, n = outside.shape
    new = np.zeros(n_nonterminals)
    for m in range(n):
        new[:] = 0.0
        if m == 0:
            new[0] = 1.0
        for place in range(len(lhs)):
            total = 0.0
            for k in range(1, m + 1):
                total += outside[lhs[place], m - k] * beside[place, k]
            new[symbol[place]] += total
        _close(new, members, closure)
        outside[:, m] = new


@compiled
def _close(values: np.ndarray, members: np.ndarray, closure: np.ndarray) -> None:
    """Multiply the values of the members by a matrix."""
    if len(members) == 0:
        return
    own = np.empty(len(members))
    for i in range(len(members)):
        own[i] = values[members[i]]
    for i in range(len(members)):
        total = 0.0
        for k in range(len(members)):
            total += closure[i, k] * own[k]
        values[members[i]] = total

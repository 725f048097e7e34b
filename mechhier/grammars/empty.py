"""What of a grammar can be empty, and the rules that derive the same nonempty strings without an empty rule."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.sparse import coo_array, eye_array
from scipy.sparse.linalg import spsolve

from mechhier.grammars.rules import Rule

Rules = Sequence[tuple[int, tuple[int, ...], float]]
"""(left side, right side, probability); symbols from 0 are nonterminals, then terminals."""

MOST_VARIANTS = 2**15
"""Most rules that a grammar may have without its empty ones."""
_MOST_WORK = 10**7  # symbols in beginnings of such rules
_MOST_STEPS = 100
_CONVERGED = 1e-16


def empty_probabilities(rules: Rules, n_nonterminals: int) -> Float[np.ndarray, " nonterminal"]:
    """Return the probability that each nonterminal derives the empty string.

    The least solution of a system of polynomials, by Newton's method from 0, which rises to it (Etessami & Yannakakis
    2009): a dozen steps however close to critical a grammar is.
    """
    empty = np.zeros(n_nonterminals)
    can_be = most_probable_empty(rules, n_nonterminals) > 0
    writes = _writing(rules, n_nonterminals)
    empty[~writes] = 1.0
    unknown = np.flatnonzero(can_be & writes)
    number = {int(symbol): i for i, symbol in enumerate(unknown)}
    of_unknown = [
        rule for rule in rules if rule[0] in number and all(x < n_nonterminals and can_be[x] for x in rule[1])
    ]
    for _ in range(_MOST_STEPS if len(unknown) else 0):
        value = np.zeros(len(unknown))
        cells: list[tuple[int, int, float]] = []
        for lhs, rhs, probability in of_unknown:
            factors = empty[list(rhs)]
            ahead = np.concatenate([[1.0], np.cumprod(factors)])
            behind = np.concatenate([np.cumprod(factors[::-1])[::-1], [1.0]])
            value[number[lhs]] += probability * ahead[-1]
            cells += [
                (number[lhs], number[x], probability * ahead[i] * behind[i + 1])
                for i, x in enumerate(rhs)
                if x in number
            ]
        step = value - empty[unknown]
        if cells:
            row, col, slope = zip(*cells, strict=True)
            slopes = coo_array((slope, (row, col)), shape=(len(unknown),) * 2)
            solution: Any = spsolve((eye_array(len(unknown)) - slopes).tocsc(), step)
            step = np.atleast_1d(solution)
        empty[unknown] = np.clip(empty[unknown] + step, 0.0, 1.0)
        if np.abs(step).max() < _CONVERGED:
            break
    return empty


def most_probable_empty(rules: Rules, n_nonterminals: int) -> Float[np.ndarray, " nonterminal"]:
    """Return the probability of each nonterminal's most probable empty derivation; 0 for none.

    By Knuth's (1977) generalisation of Dijkstra's algorithm: every symbol of every rule is looked at once.
    """
    best = np.zeros(n_nonterminals)
    value = [probability for _, _, probability in rules]
    waits = [len(rhs) if all(x < n_nonterminals for x in rhs) else -1 for _, rhs, _ in rules]
    with_symbol: dict[int, list[int]] = {}
    for r, (_, rhs, _) in enumerate(rules):
        if waits[r] > 0:
            for x in rhs:
                with_symbol.setdefault(x, []).append(r)
    heap = [(-value[r], rules[r][0]) for r in range(len(rules)) if waits[r] == 0]
    heapq.heapify(heap)
    while heap:
        negative, symbol = heapq.heappop(heap)
        if best[symbol] > 0:
            continue
        best[symbol] = -negative
        for r in with_symbol.get(symbol, ()):
            waits[r] -= 1
            value[r] *= best[symbol]
            if waits[r] == 0 and value[r] > 0:
                heapq.heappush(heap, (-value[r], rules[r][0]))
    return best


def without_empty(
    rules: Rules,
    names: Sequence[str],
    keep: Float[np.ndarray, " nonterminal"],
    leave: Float[np.ndarray, " nonterminal"],
    join: Callable[[float, float], float],
) -> dict[tuple[int, tuple[int, ...]], float]:
    """Return the weights of the rules in which each symbol that can be empty is there or not.

    Args:
        rules: The rules.
        names: Of all symbols.
        keep: Factor for a nonterminal that is there.
        leave: Factor for one that is left out; 0: it cannot be.
        join: What the weights of equal rules make together.

    Raises:
        ValueError: There are too many; the message names a rule.
    """
    variants: dict[tuple[int, tuple[int, ...]], float] = {}
    work = 0
    for lhs, rhs, probability in rules:
        begun: dict[tuple[int, ...], float] = {(): probability}
        run: list[int] = []  # symbols that are always there
        for x in (*rhs, -1):
            if x >= len(keep) or (x >= 0 and leave[x] == 0.0 and keep[x] == 1.0):
                run.append(x)
                continue
            if run:
                begun = {(*rest, *run): weight for rest, weight in begun.items()}
                run = []
            if x < 0:
                break
            longer: dict[tuple[int, ...], float] = {}
            for rest, weight in begun.items():
                work += len(rest) + 1
                for extended, factor in (((*rest, x), keep[x]), (rest, leave[x])):
                    if factor > 0.0:
                        made = weight * float(factor)
                        longer[extended] = join(longer[extended], made) if extended in longer else made
            begun = longer
            if len(begun) + len(variants) > MOST_VARIANTS or work > _MOST_WORK:
                rule = Rule(names[lhs], tuple(names[y] for y in rhs), probability)
                n_empty = sum(y < len(leave) and leave[y] > 0 for y in rhs)
                raise ValueError(
                    f"{rule}: {n_empty} symbols of it can be empty, and with each of them there or not the grammar has over "
                    f"{MOST_VARIANTS:,} rules, too many to predict or parse with. Split it, as A -> B C D E into A -> B C X "
                    "and X -> D E"
                )
        for rest, weight in begun.items():
            if rest and weight > 0:
                variants[lhs, rest] = join(variants[lhs, rest], weight) if (lhs, rest) in variants else weight
    return variants


def _writing(rules: Rules, n_nonterminals: int) -> np.ndarray:
    """Return whether each nonterminal can derive any token."""
    writes = np.zeros(n_nonterminals, dtype=bool)
    inside: dict[int, set[int]] = {}
    for lhs, rhs, _ in rules:
        for x in rhs:
            if x < n_nonterminals:
                inside.setdefault(x, set()).add(lhs)
            else:
                writes[lhs] = True
    found = np.flatnonzero(writes).tolist()
    while found:
        for lhs in inside.get(found.pop(), ()):
            if not writes[lhs]:
                writes[lhs] = True
                found.append(lhs)
    return writes

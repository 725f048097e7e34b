"""The most probable derivation of a string of a context-free grammar (Viterbi parse), bottom up over its spans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from mechhier.grammars.derivation import MOST_CHART_BYTES
from mechhier.grammars.empty import Rules, most_probable_empty, without_empty
from mechhier.grammars.sampling import compiled
from mechhier.grammars.trees import Tree

_LEXICAL = -1


class _Tables(NamedTuple):
    """Rules without empty ones as arrays, with logarithms of probabilities; terminals are numbered from 0."""

    emission: np.ndarray
    """Of the rules A -> a, ``[nonterminal, terminal]``; -inf for none."""
    unary: np.ndarray
    """Left and right side of the rules A -> B."""
    unary_log: np.ndarray
    """Their logarithms."""
    several_log: np.ndarray
    """Logarithms of the rules with several symbols."""
    item_rule: np.ndarray
    """Rule of every dotted rule; those of a rule follow each other, with 1, 2, .. all symbols before the dot."""
    item_symbol: np.ndarray
    """Symbol before its dot; terminals from the number of nonterminals on."""
    item_place: np.ndarray
    """How many symbols are before its dot: 1, 2, ..; negative if all are."""
    lhs: np.ndarray
    """Left side of every rule with several symbols."""


def most_probable_tree(
    rules: Rules, names: Sequence[str], n_terminals: int, tokens: Int[np.ndarray, " position"]
) -> tuple[Tree | None, float]:
    """Return the tree of a string's most probable derivation, and the derivation's log-probability in nats.

    Args:
        rules: The grammar's; the start symbol is 0.
        names: Of all symbols.
        n_terminals: Number of terminals.
        tokens: The string; not empty.

    Returns:
        None and -inf if the grammar does not derive the string. Constituents without a token are left out of the tree.

    Raises:
        ValueError: The string is too long, or the grammar too large.
    """
    n_nonterminals = len(names) - n_terminals
    empty = most_probable_empty(rules, n_nonterminals)
    weights = without_empty(rules, names, np.ones(n_nonterminals), empty, max)
    variants = [(lhs, rhs, math.log(weight)) for (lhs, rhs), weight in weights.items()]
    several = [rule for rule in variants if len(rule[1]) > 1]
    unary = [rule for rule in variants if len(rule[1]) == 1 and rule[1][0] < n_nonterminals]
    emission = np.full((n_nonterminals, n_terminals), -np.inf)
    for lhs, rhs, log_probability in variants:
        if len(rhs) == 1 and rhs[0] >= n_nonterminals:
            emission[lhs, rhs[0] - n_nonterminals] = log_probability
    places = [
        (r, x, d + 1 if d + 1 < len(rhs) else -(d + 1))
        for r, (_, rhs, _) in enumerate(several)
        for d, x in enumerate(rhs)
    ]
    tables = _Tables(
        emission=emission,
        unary=np.array([(lhs, rhs[0]) for lhs, rhs, _ in unary], dtype=np.int64).reshape(-1, 2),
        unary_log=np.array([p for _, _, p in unary], dtype=np.float64),
        several_log=np.array([p for _, _, p in several], dtype=np.float64),
        item_rule=np.array([r for r, _, _ in places], dtype=np.int64),
        item_symbol=np.array([x for _, x, _ in places], dtype=np.int64),
        item_place=np.array([d for _, _, d in places], dtype=np.int64),
        lhs=np.array([lhs for lhs, _, _ in several], dtype=np.int64),
    )
    n_bytes = 12 * (len(tokens) + 1) ** 2 * (n_nonterminals + len(places))
    if n_bytes > MOST_CHART_BYTES:
        raise ValueError(
            f"the trees of {len(tokens):,} tokens take {n_bytes / 2**30:,.1f} GiB with a grammar of {n_nonterminals:,} symbols "
            f"and {len(places):,} dotted rules; at most {MOST_CHART_BYTES // 2**30} GiB are accepted: give a shorter string"
        )
    best, how, split = _parse(np.asarray(tokens, dtype=np.int64), tables)
    if best[0, len(tokens), 0] == -np.inf:
        return None, -math.inf

    first_item = np.cumsum([0] + [len(rhs) for _, rhs, _ in several])

    # From the root down, without recursion: derivations may be as deep as strings are long.
    root = Tree(names[0])
    unfinished = [(root, 0, 0, len(tokens))]
    while unfinished:
        tree, symbol, start, stop = unfinished.pop()
        rule = int(how[start, stop, symbol])
        if rule == _LEXICAL:
            tree.children.append(names[n_nonterminals + int(tokens[start])])
            continue
        rhs = several[rule][1] if rule < len(several) else unary[rule - len(several)][1]
        end = stop
        for place in range(len(rhs) - 1, -1, -1):
            begin = int(split[start, end, first_item[rule] + place]) if place else start
            if rhs[place] >= n_nonterminals:
                tree.children.append(names[rhs[place]])
            else:
                child = Tree(names[rhs[place]])
                tree.children.append(child)
                unfinished.append((child, rhs[place], begin, end))
            end = begin
        tree.children.reverse()
    return root, float(best[0, len(tokens), 0])


@compiled
def _parse(tokens: np.ndarray, tables: _Tables) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the best derivation of every symbol over every span.

    Returns:
        ``[start, stop, nonterminal]``: its log-probability, and by which rule (unary rules after those with several
        symbols, or lexical); ``[start, stop, dotted rule]``: where the symbol before the dot begins.
    """
    n = len(tokens)
    n_nonterminals = len(tables.emission)
    n_items = len(tables.item_rule)
    best = np.full((n + 1, n + 1, n_nonterminals), -np.inf)
    how = np.zeros((n + 1, n + 1, n_nonterminals), dtype=np.int32)
    part = np.full((n + 1, n + 1, n_items), -np.inf)  # of a rule's symbols up to the dot
    split = np.zeros((n + 1, n + 1, n_items), dtype=np.int32)
    for length in range(1, n + 1):
        for start in range(n - length + 1):
            stop = start + length
            if length == 1:
                for a in range(n_nonterminals):
                    best[start, stop, a] = tables.emission[a, tokens[start]]
                    how[start, stop, a] = _LEXICAL
            # Dotted rules with two or more symbols before the dot; all of these spans' parts are shorter.
            for item in range(n_items):
                if tables.item_place[item] == 1:
                    continue
                symbol = tables.item_symbol[item]
                value, where = -np.inf, 0
                if symbol >= n_nonterminals:
                    if length > 1 and tokens[stop - 1] == symbol - n_nonterminals:
                        value, where = part[start, stop - 1, item - 1], stop - 1
                else:
                    for m in range(start + 1, stop):
                        candidate = part[start, m, item - 1] + best[m, stop, symbol]
                        if candidate > value:
                            value, where = candidate, m
                part[start, stop, item], split[start, stop, item] = value, where
                if tables.item_place[item] < 0:
                    rule = tables.item_rule[item]
                    if value > best[start, stop, tables.lhs[rule]]:
                        best[start, stop, tables.lhs[rule]] = value
                        how[start, stop, tables.lhs[rule]] = rule
            changed = True
            while changed:  # a probability of a rule is at most 1, so no cycle makes a derivation more probable
                changed = False
                for u in range(len(tables.unary)):
                    a, b = tables.unary[u]
                    candidate = tables.unary_log[u] + best[start, stop, b]
                    if candidate > best[start, stop, a]:
                        best[start, stop, a] = candidate
                        how[start, stop, a] = len(tables.lhs) + u
                        changed = True
            for item in range(n_items):
                if tables.item_place[item] == 1:
                    symbol = tables.item_symbol[item]
                    log_probability = tables.several_log[tables.item_rule[item]]
                    if symbol < n_nonterminals:
                        part[start, stop, item] = log_probability + best[start, stop, symbol]
                    elif length == 1 and tokens[start] == symbol - n_nonterminals:
                        part[start, stop, item] = log_probability
    return best, how, split

"""Derivations of a context-free grammar in compiled loops: drawn as sequences of rules, read again for labels.

A text is drawn with the rules that were used, in the order of the leftmost derivation. From them everything else
follows: which symbol wrote a token, and the constituents around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mechhier.grammars.sampling import alias_table, compiled, draw

MOST_CHART_BYTES = 2**32
"""Most memory of what is known of one string, or of the trees of a sample."""


class Rules(NamedTuple):
    """The rules of a grammar as arrays; symbols from 0 are nonterminals, those from ``n_nonterminals`` terminals."""

    first: np.ndarray
    """First rule of every nonterminal, and the number of rules at the end."""
    threshold: np.ndarray
    """Alias table over the rules of a nonterminal, ``[nonterminal, rule]``."""
    alias: np.ndarray
    """See ``threshold``."""
    start: np.ndarray
    """Where a rule's right side begins in ``symbols``, and their number at the end."""
    symbols: np.ndarray
    """All right sides, end to end."""

    @classmethod
    def of(cls, rules: Sequence[tuple[int, tuple[int, ...], float]], n_nonterminals: int) -> Rules:
        """Pack rules that are ordered by their left sides."""
        lhs = np.array([rule[0] for rule in rules])
        first = np.searchsorted(lhs, np.arange(n_nonterminals + 1))
        counts = np.diff(first)
        threshold = np.ones((n_nonterminals, counts.max()))
        alias = np.zeros((n_nonterminals, counts.max()), dtype=np.int32)
        for symbol, (i, n) in enumerate(zip(first, counts, strict=False)):
            law = np.array([rule[2] for rule in rules[i : i + n]])
            threshold[symbol, :n], alias[symbol, :n] = alias_table(law)
        start = np.cumsum([0] + [len(rule[1]) for rule in rules])
        symbols = np.array([symbol for rule in rules for symbol in rule[1]], dtype=np.int64)
        return cls(first, threshold, alias, start, symbols)


@compiled
def grown(array: np.ndarray) -> np.ndarray:
    """Return an array of twice the length that begins with the given one."""
    larger = np.empty(2 * len(array), dtype=array.dtype)
    larger[: len(array)] = array
    return larger


@compiled
def derive(
    rng: np.random.Generator,
    n_rows: int,
    context: int,
    rules: Rules,
    shortest: int,
    longest: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw rows of strings, each followed by the number of terminals as ``<eos>``; the last of a row is cut.

    Args:
        rng: Source of randomness.
        n_rows: Number of rows.
        context: Tokens in a row.
        rules: The grammar.
        shortest: Strings below this length are drawn again.
        longest: Strings above this length are drawn again; -1: none are, of any length.

    Returns:
        Tokens ``[row, position]``; the rules used, row after row; where each row's rules end.
    """
    n_nonterminals = len(rules.first) - 1
    eos = 0  # terminals are numbered without gaps and all are used
    for symbol in rules.symbols:
        eos = max(eos, symbol - n_nonterminals + 1)
    any_length = longest < 0
    tokens = np.empty((n_rows, context), dtype=np.int32)
    ends = np.empty(n_rows, dtype=np.int64)
    used = np.empty(2 * n_rows * context + 16, dtype=np.int32)
    stack = np.empty(64, dtype=np.int64)
    string = np.empty(context if any_length else longest, dtype=np.int32)
    n_used = 0
    for row in range(n_rows):
        t = 0
        while t < context:
            before = n_used
            length, height = 0, 1
            stack[0] = 0
            limit = context - t if any_length else longest
            while height > 0:
                height -= 1
                symbol = stack[height]
                if symbol >= n_nonterminals:
                    if length == limit:  # one token too many, of a row or of a string
                        length += 1
                        break
                    string[length] = symbol - n_nonterminals
                    length += 1
                    if any_length and length == limit:
                        break
                    continue
                first = rules.first[symbol]
                n_rules = rules.first[symbol + 1] - first
                rule = first
                if n_rules > 1:
                    rule += draw(rng, rules.threshold[symbol, :n_rules], rules.alias[symbol, :n_rules])
                if n_used == len(used):
                    used = grown(used)
                used[n_used] = rule
                n_used += 1
                for i in range(rules.start[rule + 1] - 1, rules.start[rule] - 1, -1):
                    if height == len(stack):
                        stack = grown(stack)
                    stack[height] = rules.symbols[i]
                    height += 1
            if not any_length and not shortest <= length <= longest:
                n_used = before
                continue
            for i in range(min(length, context - t)):
                tokens[row, t] = string[i]
                t += 1
            if t < context:
                tokens[row, t] = eos
                t += 1
        ends[row] = n_used
    return tokens, used[:n_used].copy(), ends


@compiled
def relabel(
    used: np.ndarray,
    ends: np.ndarray,
    n_rows: int,
    context: int,
    rules: Rules,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read the derivations of rows again, for every token's labels, each ``[row, position]``.

    Returns:
        The nonterminal that wrote the token (their number for ``<eos>``); its number of ancestors; how many of them it
        shares with the token before it; how many of them are not complete after it; its document in the row; its
        position in the document.
    """
    n_nonterminals = len(rules.first) - 1
    labels = np.zeros((6, n_rows, context), dtype=np.int64)
    category, depth, shared, unfinished, document, position = labels
    stack = np.empty(64, dtype=np.int64)  # symbols still to be expanded,
    level = np.empty(64, dtype=np.int64)  # their numbers of ancestors,
    parent = np.empty(64, dtype=np.int64)  # and the last of these
    k = 0
    for row in range(n_rows):
        t, number = 0, 0
        while t < context:
            height, begin, least = 1, t, 0
            stack[0], level[0], parent[0] = 0, 0, -1
            while height > 0 and t < context:
                height -= 1
                symbol, its_level = stack[height], level[height]
                least = min(least, its_level)
                if symbol >= n_nonterminals:
                    category[row, t] = parent[height]
                    depth[row, t] = its_level
                    shared[row, t] = least
                    unfinished[row, t] = level[height - 1] if height > 0 else 0
                    document[row, t], position[row, t] = number, t - begin
                    least = its_level
                    t += 1
                    continue
                rule = used[k]
                k += 1
                for i in range(rules.start[rule + 1] - 1, rules.start[rule] - 1, -1):
                    if height == len(stack):
                        stack, level, parent = grown(stack), grown(level), grown(parent)
                    stack[height], level[height], parent[height] = rules.symbols[i], its_level + 1, symbol
                    height += 1
            if t < context:
                category[row, t] = n_nonterminals
                document[row, t], position[row, t] = number, t - begin
                number += 1
                t += 1
        k = ends[row]  # of a string that the row cuts, more rules may have been used
    return category, depth, shared, unfinished, document, position


@compiled
def ancestors(
    used: np.ndarray,
    ends: np.ndarray,
    context: int,
    max_depth: int,
    rules: Rules,
) -> np.ndarray:
    """Read the derivations of rows again, for every token's ancestors ``[row, position, depth]``, -1 as padding."""
    n_nonterminals = len(rules.first) - 1
    n_rows = len(ends)
    result = np.full((n_rows, context, max_depth), -1, dtype=np.int32)
    path = np.empty(64, dtype=np.int64)
    stack = np.empty(64, dtype=np.int64)
    level = np.empty(64, dtype=np.int64)
    k = 0
    for row in range(n_rows):
        t = 0
        while t < context:
            height = 1
            stack[0], level[0] = 0, 0
            while height > 0 and t < context:
                height -= 1
                symbol, its_level = stack[height], level[height]
                if symbol >= n_nonterminals:
                    result[row, t, :its_level] = path[:its_level]
                    t += 1
                    continue
                if its_level == len(path):
                    path = grown(path)
                path[its_level] = symbol
                rule = used[k]
                k += 1
                for i in range(rules.start[rule + 1] - 1, rules.start[rule] - 1, -1):
                    if height == len(stack):
                        stack, level = grown(stack), grown(level)
                    stack[height], level[height] = rules.symbols[i], its_level + 1
                    height += 1
            t += 1  # <eos>
        k = ends[row]
    return result

"""Exact sums over the derivations of a context-free grammar: strings, prefixes, next tokens, posterior states.

Stolcke's (1995) probabilistic Earley recursion, left to right over the positions of a string. Three quantities:

- ``inside[k, m, A -> B . C]``: probability that the part of a rule before the dot derives the tokens k .. m - 1;
- ``predicted[k, A]``: probability of the tokens before k followed by an A that begins at k, whatever comes after. Where
  several A begin at k, one inside the other, they all count, by the left-corner closure (I - P_L)^-1 of Jelinek &
  Lafferty (1991);
- from ``predicted`` the probability of every next token.

Everything is scaled so that the probability of the prefix read so far is 1: nothing underflows however long a string
is. Only what is predicted is computed, and only what is not 0 is kept, so that a string with one derivation costs
about n^2 steps and an ambiguous one at most n^3 / 6 times the number of dotted rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mechhier.grammars.derivation import grown
from mechhier.grammars.sampling import compiled

_Rule = tuple[int, tuple[int, ...], float]

_CONVERGED = 1e-16
_MAX_ROUNDS = 100_000


class Prediction(NamedTuple):
    """What follows each prefix of a string; fewer prefixes if the grammar does not allow one of its tokens."""

    tokens: Float[np.ndarray, "prefix vocab"]
    """Probability of the next token, ``<eos>`` last."""
    categories: Float[np.ndarray, "prefix category"]
    """Probability of the nonterminal that writes it; last, of ``<eos>``."""
    states: Float[np.ndarray, "prefix state"]
    """Expected number of the next token's ancestors in the state of each dotted rule; no rows unless asked for."""
    log_prefix: Float[np.ndarray, " prefix"]
    """Log-probability of the prefix."""


class _Tables(NamedTuple):
    """A grammar without empty rules as arrays; symbols from 0 are nonterminals, then terminals."""

    emission: np.ndarray
    """Probability of the rules A -> a, ``[nonterminal, terminal]``."""
    unary_closure: np.ndarray
    """(I - P_U)^-1 with P_U the rules A -> B."""
    corner_closure: np.ndarray
    """(I - P_L)^-1 with P_L[A, B] the probability that an A's expansion begins with B."""
    rules_of: np.ndarray
    """The rules with several symbols stand side by side by left side: first of each nonterminal, and their number."""
    lhs: np.ndarray
    """Left side of every such rule."""
    probability: np.ndarray
    """Its probability."""
    first_symbol: np.ndarray
    """First symbol of its right side."""
    first_item: np.ndarray
    """Its dotted rule with one symbol before the dot; those with more follow."""
    item_lhs: np.ndarray
    """Left side of every dotted rule that has symbols on both sides of its dot."""
    item_next: np.ndarray
    """Symbol after its dot."""
    item_last: np.ndarray
    """Whether that is the rule's last symbol."""


class _Chart(NamedTuple):
    """What is known of a string read so far."""

    predicted: np.ndarray
    """``[position, nonterminal]``."""
    cell: np.ndarray
    """Where the entries of the span k .. m begin and end, ``[k, m, 2]``."""
    item: np.ndarray
    """Dotted rule of every entry."""
    inside: np.ndarray
    """Its inside probability, over the conditional probabilities of the span's tokens."""


@dataclass(frozen=True)
class Predictor:
    """The exact predictor of one grammar."""

    tables: _Tables
    p_empty: float
    """Probability of the empty string."""
    dotted_rules: list[tuple[int, tuple[int, ...], int]]
    """(left side, right side, number of symbols before the dot) of every state."""
    state_of_item: np.ndarray
    """State of every dotted rule of the tables."""
    begun: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    """Of the states with nothing before the dot: number, left side, first symbol, probability."""

    @classmethod
    def of(cls, rules: Sequence[_Rule], n_nonterminals: int, n_terminals: int) -> Predictor:
        """Prepare the rules of a grammar: (left side, right side, probability), terminals after the nonterminals."""
        empty = _empty_probabilities(rules, n_nonterminals)
        rules = _without_empty(rules, empty)
        emission = np.zeros((n_nonterminals, n_terminals))
        unary, corner = np.zeros((2, n_nonterminals, n_nonterminals))
        for lhs, rhs, probability in rules:
            if rhs[0] < n_nonterminals:
                corner[lhs, rhs[0]] += probability
            if len(rhs) == 1 and rhs[0] < n_nonterminals:
                unary[lhs, rhs[0]] += probability
            elif len(rhs) == 1:
                emission[lhs, rhs[0] - n_nonterminals] += probability
        several = [rule for rule in rules if len(rule[1]) > 1]
        items = [(lhs, rhs, dot) for lhs, rhs, _ in several for dot in range(1, len(rhs))]
        states = [(lhs, rhs, dot) for lhs, rhs, _ in rules for dot in range(len(rhs))]
        number = {state: i for i, state in enumerate(states)}
        integers = np.int64
        lhs_of = np.array([lhs for lhs, _, _ in several], dtype=integers)
        tables = _Tables(
            emission=emission,
            unary_closure=np.linalg.inv(np.eye(n_nonterminals) - unary),
            corner_closure=np.linalg.inv(np.eye(n_nonterminals) - corner),
            rules_of=np.searchsorted(lhs_of, np.arange(n_nonterminals + 1)),
            lhs=lhs_of,
            probability=np.array([p for _, _, p in several], dtype=np.float64),
            first_symbol=np.array([rhs[0] for _, rhs, _ in several], dtype=integers),
            first_item=np.cumsum([0] + [len(rhs) - 1 for _, rhs, _ in several])[:-1],
            item_lhs=np.array([lhs for lhs, _, _ in items], dtype=integers),
            item_next=np.array([rhs[dot] for _, rhs, dot in items], dtype=integers),
            item_last=np.array([dot + 1 == len(rhs) for _, rhs, dot in items], dtype=np.bool_),
        )
        begun = (
            np.array([number[lhs, rhs, 0] for lhs, rhs, _ in rules], dtype=integers),
            np.array([lhs for lhs, _, _ in rules], dtype=integers),
            np.array([rhs[0] for _, rhs, _ in rules], dtype=integers),
            np.array([p for _, _, p in rules], dtype=np.float64),
        )
        state_of_item = np.array([number[item] for item in items], dtype=integers)
        return cls(tables, float(empty[0]), states, state_of_item, begun)

    def predict(self, tokens: Int[np.ndarray, " position"], *, states: bool = False) -> Prediction:
        """Predict what follows each prefix of a string, up to the first token that the grammar does not allow.

        Args:
            tokens: The string without ``<eos>``.
            states: Whether the states are computed too.
        """
        tokens = np.asarray(tokens, dtype=np.int64)
        next_tokens, categories, conditional, chart = _read(tokens, self.tables, self.p_empty)
        log_prefix = np.concatenate([[0.0], np.cumsum(np.log(conditional))])
        found = np.zeros((len(next_tokens) if states else 0, len(self.dotted_rules)))
        if states:
            _weigh_states(found, chart, self.tables, self.state_of_item, *self.begun)
            found[0] *= 1 - self.p_empty
        return Prediction(next_tokens, categories, found, log_prefix)

    def string(self, tokens: Int[np.ndarray, " position"]) -> tuple[Float[np.ndarray, " prefix"], float]:
        """Return the log-probabilities of all prefixes of a string and of the string itself; -inf for none."""
        prediction = self.predict(tokens)
        log_prefix = np.full(len(tokens) + 1, -np.inf)
        log_prefix[: len(prediction.log_prefix)] = prediction.log_prefix
        with np.errstate(divide="ignore"):
            return log_prefix, float(log_prefix[-1] + np.log(prediction.tokens[-1, -1]))


@compiled
def _read(tokens: np.ndarray, tables: _Tables, p_empty: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, _Chart]:
    """Read a string from left to right, predicting each token before it is read.

    Returns:
        Probabilities of next tokens and of their categories, by prefix; the conditional probability of every token
        read; the chart.
    """
    n = len(tokens)
    n_nonterminals, n_terminals = tables.emission.shape
    n_items = len(tables.item_next)
    next_tokens = np.zeros((n + 1, n_terminals + 1))
    categories = np.zeros((n + 1, n_nonterminals + 1))
    conditional = np.zeros(n)

    predicted = np.zeros((n + 1, n_nonterminals))
    predicted[0] = tables.corner_closure[0]
    cell = np.zeros((n + 1, n + 1, 2), dtype=np.int64)
    item = np.empty(1024, dtype=np.int32)
    inside = np.empty(1024)
    n_entries = 0

    complete = np.zeros((n + 1, n_nonterminals))  # inside probability of a nonterminal over k .. j, for the present j
    found = np.zeros(n_nonterminals)  # the same without the closure over unary rules
    advanced = np.zeros(n_items)  # inside probability of every dotted rule over k .. j
    touched = np.empty(n_items, dtype=np.int64)

    for i in range(n + 1):
        # What follows the first i tokens.
        for a in range(n_nonterminals):
            if predicted[i, a] == 0.0:
                continue
            for v in range(n_terminals):
                p = predicted[i, a] * tables.emission[a, v]
                next_tokens[i, v] += p
                categories[i, a] += p
            for rule in range(tables.rules_of[a], tables.rules_of[a + 1]):
                if tables.first_symbol[rule] >= n_nonterminals:
                    p = predicted[i, a] * tables.probability[rule]
                    next_tokens[i, tables.first_symbol[rule] - n_nonterminals] += p
                    categories[i, a] += p
        for k in range(i):
            for e in range(cell[k, i, 0], cell[k, i, 1]):
                if tables.item_next[item[e]] >= n_nonterminals:
                    p = predicted[k, tables.item_lhs[item[e]]] * inside[e]
                    next_tokens[i, tables.item_next[item[e]] - n_nonterminals] += p
                    categories[i, tables.item_lhs[item[e]]] += p
        conditional_here = next_tokens[i, tokens[i]] if i < n else 0.0
        p_end = p_empty if i == 0 else complete[0, 0]
        if i == 0:
            next_tokens[0] *= 1.0 - p_empty
            categories[0] *= 1.0 - p_empty
        next_tokens[i, n_terminals] = p_end
        categories[i, n_nonterminals] = p_end
        if i == n or conditional_here <= 0.0:
            chart = _Chart(predicted[: i + 1], cell, item[:n_entries], inside[:n_entries])
            return next_tokens[: i + 1], categories[: i + 1], conditional[:i], chart
        conditional[i] = next_tokens[i, tokens[i]]
        scale = 1.0 / conditional_here

        # Read token i: everything that ends at j = i + 1, the short spans first.
        j = i + 1
        read = n_nonterminals + tokens[i]
        complete[: i + 1] = 0.0
        for k in range(i, -1, -1):
            found[:] = 0.0
            n_touched = 0
            if k == i:
                for a in range(n_nonterminals):
                    if predicted[i, a] > 0.0:
                        found[a] = tables.emission[a, tokens[i]] * scale
            for m in range(k, i + 1):
                for e in range(cell[k, m, 0], cell[k, m, 1]):
                    symbol = tables.item_next[item[e]]
                    if symbol >= n_nonterminals:
                        p = inside[e] * scale if symbol == read and m == i else 0.0
                    else:
                        p = inside[e] * complete[m, symbol]
                    if p == 0.0:
                        continue
                    if tables.item_last[item[e]]:
                        found[tables.item_lhs[item[e]]] += p
                    else:
                        further = item[e] + 1
                        if advanced[further] == 0.0:
                            touched[n_touched] = further
                            n_touched += 1
                        advanced[further] += p
            for b in range(n_nonterminals):
                if found[b] > 0.0:
                    for a in range(n_nonterminals):
                        complete[k, a] += tables.unary_closure[a, b] * found[b]
            for a in range(n_nonterminals):
                if predicted[k, a] == 0.0:
                    continue
                for rule in range(tables.rules_of[a], tables.rules_of[a + 1]):
                    symbol = tables.first_symbol[rule]
                    if symbol < n_nonterminals:
                        p = tables.probability[rule] * complete[k, symbol]
                    else:
                        p = tables.probability[rule] * scale if k == i and symbol == read else 0.0
                    if p > 0.0:
                        first = tables.first_item[rule]
                        if advanced[first] == 0.0:
                            touched[n_touched] = first
                            n_touched += 1
                        advanced[first] += p
            cell[k, j, 0] = n_entries
            for e in range(n_touched):
                if n_entries == len(item):
                    item, inside = grown(item), grown(inside)
                item[n_entries], inside[n_entries] = touched[e], advanced[touched[e]]
                n_entries += 1
                advanced[touched[e]] = 0.0
            cell[k, j, 1] = n_entries
        # What may begin at j.
        for k in range(j):
            for e in range(cell[k, j, 0], cell[k, j, 1]):
                symbol = tables.item_next[item[e]]
                if symbol < n_nonterminals:
                    p = predicted[k, tables.item_lhs[item[e]]] * inside[e]
                    for a in range(n_nonterminals):
                        predicted[j, a] += p * tables.corner_closure[symbol, a]
    raise AssertionError  # the loop returns


@compiled
def _weigh_states(
    states: np.ndarray,
    chart: _Chart,
    tables: _Tables,
    state_of_item: np.ndarray,
    begun_state: np.ndarray,
    begun_lhs: np.ndarray,
    begun_symbol: np.ndarray,
    begun_probability: np.ndarray,
) -> None:
    """Add up, for every prefix, the expected number of the next token's ancestors in every state."""
    n_nonterminals = tables.emission.shape[0]
    # open[m, A]: probability that an A that begins at m derives what has been read from there on, and goes on.
    is_open = np.zeros((len(states), n_nonterminals))
    direct = np.zeros(n_nonterminals)
    for i in range(len(states)):
        is_open[i] = 1.0
        for m in range(i - 1, -1, -1):
            direct[:] = 0.0
            for split in range(m + 1, i + 1):
                for e in range(chart.cell[m, split, 0], chart.cell[m, split, 1]):
                    symbol = tables.item_next[chart.item[e]]
                    if split == i:
                        p = chart.inside[e]
                    elif symbol < n_nonterminals:
                        p = chart.inside[e] * is_open[split, symbol]
                    else:
                        p = 0.0
                    direct[tables.item_lhs[chart.item[e]]] += p
                    states[i, state_of_item[chart.item[e]]] += p * chart.predicted[m, tables.item_lhs[chart.item[e]]]
            is_open[m] = tables.corner_closure @ direct
        for m in range(i + 1):
            for s in range(len(begun_state)):
                goes_on = 1.0 if m == i else 0.0
                if begun_symbol[s] < n_nonterminals:
                    goes_on = is_open[m, begun_symbol[s]]
                states[i, begun_state[s]] += chart.predicted[m, begun_lhs[s]] * begun_probability[s] * goes_on


def _empty_probabilities(rules: Sequence[_Rule], n_nonterminals: int) -> Float[np.ndarray, " nonterminal"]:
    """Return the probability that each nonterminal derives the empty string: the least solution, by iteration from 0."""
    writes = np.zeros(n_nonterminals, dtype=bool)  # whether a symbol can derive any token
    for _ in range(n_nonterminals):
        for lhs, rhs, _ in rules:
            writes[lhs] |= any(x >= n_nonterminals or writes[x] for x in rhs)
    empty = np.where(writes, 0.0, 1.0)
    for _ in range(_MAX_ROUNDS):
        new = np.where(writes, 0.0, 1.0)
        for lhs, rhs, probability in rules:
            if writes[lhs] and all(x < n_nonterminals for x in rhs):
                new[lhs] += probability * empty[list(rhs)].prod()
        change = np.abs(new - empty).max()
        empty = new
        if change < _CONVERGED:
            break
    return empty


def _without_empty(rules: Sequence[_Rule], empty: Float[np.ndarray, " nonterminal"]) -> list[_Rule]:
    """Return the grammar of the nonempty strings, given that they are not empty: no rule is empty.

    Each symbol of a rule that can be empty is there or not. A rule keeps its probability times those of what is left
    out being empty and of the rest not, over the probability that its left side is not.
    """
    new: dict[tuple[int, tuple[int, ...]], float] = {}
    for lhs, rhs, probability in rules:
        choices = [(True, False) if x < len(empty) and empty[x] > 0 else (True,) for x in rhs]
        for kept in product(*choices):
            rest = tuple(x for x, keep in zip(rhs, kept, strict=True) if keep)
            weight = probability
            for x, keep in zip(rhs, kept, strict=True):
                if x < len(empty):
                    weight *= 1 - empty[x] if keep else empty[x]
            if rest and weight > 0:
                new[lhs, rest] = new.get((lhs, rest), 0.0) + weight / (1 - empty[lhs])
    return sorted((lhs, rhs, p) for (lhs, rhs), p in new.items())

"""Exact sums over the derivations of a context-free grammar: strings, prefixes, next tokens, posterior states.

Stolcke's (1995) probabilistic Earley recursion, left to right over the positions of a string. Three quantities:

- ``inside[k, m, A -> B . C]``: probability that the part of a rule before the dot derives the tokens k .. m - 1;
- ``predicted[k, A]``: probability of the tokens before k followed by an A that begins at k, whatever comes after. Where
  several A begin at k, one inside the other, they all count, by the left-corner closure (I - P_L)^-1 of Jelinek &
  Lafferty (1991);
- from ``predicted`` the probability of every next token.

Everything is scaled so that the probability of the prefix read so far is 1: nothing underflows however long a string
is. Only what is predicted is computed, and only what is not 0 is kept and looked at: what is complete is handed to the
dotted rules that wait for it where it begins. So a string with one derivation costs about n^2 steps, an ambiguous one at
most n^3 / 6 times the number of dotted rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mechhier.grammars.base import MOST_BYTES
from mechhier.grammars.derivation import grown
from mechhier.grammars.sampling import compiled

_Rule = tuple[int, tuple[int, ...], float]

_CONVERGED = 1e-16
_MAX_ROUNDS = 100_000
_MOST_ENTRIES = 2 * 10**7


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
    by_first: np.ndarray
    """Those rules by their first symbols."""
    first_of: np.ndarray
    """Where in `by_first` those of each symbol begin, and their number."""
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
    column: np.ndarray
    """Where the entries of the spans that end at each position begin, and their number."""
    begin: np.ndarray
    """Where the span of every entry begins."""
    item: np.ndarray
    """Its dotted rule."""
    inside: np.ndarray
    """Its inside probability, over the conditional probabilities of the span's tokens."""
    waiting: np.ndarray
    """The last entry that ends at a position and has a symbol after its dot, ``[position, symbol]``, from 1; 0: none."""
    before: np.ndarray
    """For every entry the one before it of the same position and symbol, likewise."""


class _Column(NamedTuple):
    """What is known of the spans k .. j for the present j."""

    found: np.ndarray
    """Inside probability of every nonterminal, without the closure over unary rules, ``[k, nonterminal]``."""
    advanced: np.ndarray
    """That of every dotted rule, ``[k, dotted rule]``."""
    active: np.ndarray
    """Whether there is any, ``[k]``."""
    last: np.ndarray
    """The dotted rule that was the last to have one, ``[k]``, from 1; 0: none has."""
    before: np.ndarray
    """The one before it, ``[k, dotted rule]``, likewise."""

    @classmethod
    def empty(cls, n: int, n_nonterminals: int, n_items: int) -> _Column:
        """Make zeros for n positions: where the system gives out memory when it is written to, little of it is."""
        return cls(
            np.zeros((n, n_nonterminals)),
            np.zeros((n, n_items)),
            np.zeros(n, dtype=np.bool_),
            np.zeros(n, dtype=np.int32),
            np.zeros((n, n_items), dtype=np.int32),
        )


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
        first_symbol = np.array([rhs[0] for _, rhs, _ in several], dtype=integers)
        tables = _Tables(
            emission=emission,
            unary_closure=np.linalg.inv(np.eye(n_nonterminals) - unary),
            corner_closure=np.linalg.inv(np.eye(n_nonterminals) - corner),
            rules_of=np.searchsorted(lhs_of, np.arange(n_nonterminals + 1)),
            lhs=lhs_of,
            probability=np.array([p for _, _, p in several], dtype=np.float64),
            first_symbol=first_symbol,
            by_first=np.argsort(first_symbol, kind="stable"),
            first_of=np.searchsorted(np.sort(first_symbol), np.arange(n_nonterminals + n_terminals + 1)),
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

        Raises:
            ValueError: The string takes too much memory.
        """
        tokens = np.asarray(tokens, dtype=np.int64)
        n_nonterminals, n_terminals = self.tables.emission.shape
        n, n_items = len(tokens) + 1, len(self.tables.item_next)
        n_bytes = n * (36 * n_nonterminals + 12 * n_terminals + 12 * n_items + 8 * states * len(self.dotted_rules))
        if n_bytes > MOST_BYTES:
            raise ValueError(
                f"a string of {n - 1:,} tokens takes {n_bytes / 2**30:,.1f} GiB with a grammar of {n_nonterminals:,} symbols "
                f"and {n_items:,} dotted rules; at most {MOST_BYTES // 2**30} GiB are accepted: give shorter strings"
            )
        column = _Column.empty(n, n_nonterminals, n_items)
        waiting = np.zeros((n, n_nonterminals + n_terminals), dtype=np.int32)
        next_tokens, categories, conditional, chart = _read(tokens, self.tables, self.p_empty, column, waiting)
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
def _read(
    tokens: np.ndarray, tables: _Tables, p_empty: float, column_j: _Column, waiting: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, _Chart]:
    """Read a string from left to right, predicting each token before it is read.

    Returns:
        Probabilities of next tokens and of their categories, by prefix; the conditional probability of every token
        read; the chart.
    """
    n = len(tokens)
    n_nonterminals, n_terminals = tables.emission.shape
    next_tokens = np.zeros((n + 1, n_terminals + 1))
    categories = np.zeros((n + 1, n_nonterminals + 1))
    conditional = np.zeros(n)

    predicted = np.zeros((n + 1, n_nonterminals))
    predicted[0] = tables.corner_closure[0]
    column = np.zeros(n + 2, dtype=np.int64)
    begin = np.empty(1024, dtype=np.int32)
    item = np.empty(1024, dtype=np.int32)
    inside = np.empty(1024)
    before = np.empty(1024, dtype=np.int32)
    n_entries = 0
    complete = np.zeros(n_nonterminals)  # inside probability of a nonterminal over k .. j
    wanted = np.zeros(n_nonterminals)

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
        for e in range(column[i], column[i + 1]):
            if tables.item_next[item[e]] >= n_nonterminals:
                p = predicted[begin[e], tables.item_lhs[item[e]]] * inside[e]
                next_tokens[i, tables.item_next[item[e]] - n_nonterminals] += p
                categories[i, tables.item_lhs[item[e]]] += p
        conditional_here = next_tokens[i, tokens[i]] if i < n else 0.0
        p_end = p_empty if i == 0 else complete[0]  # the longest span comes last
        if i == 0:
            next_tokens[0] *= 1.0 - p_empty
            categories[0] *= 1.0 - p_empty
        next_tokens[i, n_terminals] = p_end
        categories[i, n_nonterminals] = p_end
        if i == n or conditional_here <= 0.0:
            chart = _Chart(
                predicted[: i + 1], column, begin[:n_entries], item[:n_entries], inside[:n_entries], waiting, before
            )
            return next_tokens[: i + 1], categories[: i + 1], conditional[:i], chart
        conditional[i] = next_tokens[i, tokens[i]]
        scale = 1.0 / conditional_here

        # Read token i: everything that ends at j = i + 1, the short spans first.
        j = i + 1
        read = n_nonterminals + tokens[i]
        for a in range(n_nonterminals):
            if predicted[i, a] > 0.0:
                column_j.found[i, a] = tables.emission[a, tokens[i]] * scale
        _begin_rules(read, scale, i, predicted[i], tables, column_j)
        _hand_on(waiting[i, read], scale, begin, item, inside, before, tables, column_j)
        for k in range(i, -1, -1):
            complete[:] = 0.0
            if k < i and not column_j.active[k]:
                continue
            for b in range(n_nonterminals):
                if column_j.found[k, b] > 0.0:
                    for a in range(n_nonterminals):
                        complete[a] += tables.unary_closure[a, b] * column_j.found[k, b]
                    column_j.found[k, b] = 0.0
            for symbol in range(n_nonterminals):
                if complete[symbol] > 0.0:
                    _begin_rules(symbol, complete[symbol], k, predicted[k], tables, column_j)
                    _hand_on(waiting[k, symbol], complete[symbol], begin, item, inside, before, tables, column_j)
            node = column_j.last[k]
            while node > 0:
                entry = node - 1
                if n_entries == len(item):
                    if n_entries > _MOST_ENTRIES:
                        raise ValueError(
                            "a string is too ambiguous for its length: it has over 20 million parts of derivations, and no "
                            "more are kept; give shorter strings"
                        )
                    begin, item, inside, before = grown(begin), grown(item), grown(inside), grown(before)
                begin[n_entries], item[n_entries] = k, entry
                inside[n_entries] = column_j.advanced[k, entry]
                before[n_entries] = waiting[j, tables.item_next[entry]]
                n_entries += 1
                waiting[j, tables.item_next[entry]] = n_entries
                column_j.advanced[k, entry] = 0.0
                node = column_j.before[k, entry]
            column_j.last[k] = 0
            column_j.active[k] = False
        column[j + 1] = n_entries
        # What may begin at j.
        wanted[:] = 0.0
        for e in range(column[j], n_entries):
            symbol = tables.item_next[item[e]]
            if symbol < n_nonterminals:
                wanted[symbol] += predicted[begin[e], tables.item_lhs[item[e]]] * inside[e]
        for symbol in range(n_nonterminals):
            if wanted[symbol] > 0.0:
                predicted[j] += wanted[symbol] * tables.corner_closure[symbol]
    raise AssertionError  # the loop returns


@compiled
def _begin_rules(
    symbol: int, probability: float, k: int, predicted: np.ndarray, tables: _Tables, column: _Column
) -> None:
    """Put the dot behind the first symbol of the rules that are predicted at k and begin with a symbol over k .. j."""
    for place in range(tables.first_of[symbol], tables.first_of[symbol + 1]):
        rule = tables.by_first[place]
        p = tables.probability[rule] * probability
        if p > 0.0 and predicted[tables.lhs[rule]] > 0.0:
            _advance(tables.first_item[rule], p, k, column)


@compiled
def _hand_on(
    entry: int,
    probability: float,
    begin: np.ndarray,
    item: np.ndarray,
    inside: np.ndarray,
    before: np.ndarray,
    tables: _Tables,
    column: _Column,
) -> None:
    """Put the dot behind a symbol over k .. j in all rules that wait for it at k; the last of them is given."""
    while entry > 0:
        e = entry - 1
        p = inside[e] * probability
        if p > 0.0:
            if tables.item_last[item[e]]:
                column.found[begin[e], tables.item_lhs[item[e]]] += p
                column.active[begin[e]] = True
            else:
                _advance(item[e] + 1, p, begin[e], column)
        entry = before[e]


@compiled
def _advance(item: int, probability: float, k: int, column: _Column) -> None:
    if column.advanced[k, item] == 0.0:
        column.before[k, item] = column.last[k]
        column.last[k] = item + 1
        column.active[k] = True
    column.advanced[k, item] += probability


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
    direct = np.zeros((len(states), n_nonterminals))  # the same of an A that holds no other that begins there
    for i in range(len(states)):
        is_open[i] = 1.0
        for e in range(chart.column[i], chart.column[i + 1]):
            m, lhs = chart.begin[e], tables.item_lhs[chart.item[e]]
            direct[m, lhs] += chart.inside[e]
            states[i, state_of_item[chart.item[e]]] += chart.inside[e] * chart.predicted[m, lhs]
        for split in range(i - 1, -1, -1):
            is_open[split] = 0.0
            for a in range(n_nonterminals):
                if direct[split, a] > 0.0:
                    is_open[split] += tables.corner_closure[:, a] * direct[split, a]
                    direct[split, a] = 0.0
            for symbol in range(n_nonterminals):
                if is_open[split, symbol] == 0.0:
                    continue
                entry = chart.waiting[split, symbol]
                while entry > 0:
                    e = entry - 1
                    p = chart.inside[e] * is_open[split, symbol]
                    m, lhs = chart.begin[e], tables.item_lhs[chart.item[e]]
                    direct[m, lhs] += p
                    states[i, state_of_item[chart.item[e]]] += p * chart.predicted[m, lhs]
                    entry = chart.before[e]
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

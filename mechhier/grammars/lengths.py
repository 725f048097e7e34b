"""How long the strings of a context-free grammar are: exact laws of the length, by convolution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

Rules = Sequence[tuple[int, tuple[int, ...], float]]
"""(left side, right side, probability); symbols from 0 are nonterminals, then terminals."""

_CONVERGED = 1e-15
_MOST_ROUNDS = 20_000
_SELDOM = "symbols become themselves again almost surely, as in A -> A [0.999]; lower such a probability"


def length_laws(rules: Rules, n_nonterminals: int, longest: int) -> Float[np.ndarray, "symbol length"]:
    """Return P(a nonterminal's string has n tokens) for n = 0 .. ``longest``.

    The least solution of L_A = sum over rules of p (L_X1 * .. * L_Xk), with * convolution, by iteration from 0: after
    i rounds it is right for derivations of depth i.

    Raises:
        ValueError: Symbols become themselves again so often that 20,000 rounds are too few.
    """
    laws = np.zeros((n_nonterminals, longest + 1))
    for _ in range(_MOST_ROUNDS):
        new = np.zeros_like(laws)
        for lhs, rhs, probability in rules:
            new[lhs] += probability * _product(rhs, laws)
        change = np.abs(new - laws).max()
        laws = new
        if change < _CONVERGED:
            return laws
    raise ValueError(f"the probabilities of lengths do not settle in {_MOST_ROUNDS:,} rounds: {_SELDOM}")


def terminal_counts(
    rules: Rules, n_nonterminals: int, n_terminals: int, longest: int
) -> Float[np.ndarray, "terminal length"]:
    """Return E[number of a terminal; length n] of the start symbol's strings, for n = 0 .. ``longest``.

    Divided by the probability of the length it is the expected number in a string of that length. The derivative of
    the equations of :func:`length_laws` with respect to a weight on the terminal.
    """
    laws = length_laws(rules, n_nonterminals, longest)
    one_token = np.zeros(longest + 1)
    one_token[1:2] = 1.0
    counts = np.zeros((n_nonterminals, n_terminals, longest + 1))
    for _ in range(_MOST_ROUNDS):
        new = np.zeros_like(counts)
        for lhs, rhs, probability in rules:
            for i, symbol in enumerate(rhs):
                others = probability * _product(rhs[:i] + rhs[i + 1 :], laws)
                if symbol >= n_nonterminals:
                    new[lhs, symbol - n_nonterminals] += np.convolve(others, one_token)[: longest + 1]
                    continue
                for terminal in np.flatnonzero(counts[symbol].any(axis=1)):
                    new[lhs, terminal] += np.convolve(others, counts[symbol, terminal])[: longest + 1]
        change = np.abs(new - counts).max()
        counts = new
        if change < _CONVERGED * (longest + 1):
            return counts[0]
    raise ValueError(f"the expected tokens of lengths do not settle in {_MOST_ROUNDS:,} rounds: {_SELDOM}")


def _product(symbols: tuple[int, ...], laws: Float[np.ndarray, "symbol length"]) -> Float[np.ndarray, " length"]:
    """Return the law of the length of several symbols in a row."""
    n = laws.shape[1]
    product = np.zeros(n)
    product[sum(x >= len(laws) for x in symbols) :][:1] = 1.0
    for symbol in symbols:
        if symbol < len(laws):
            product = np.convolve(product, laws[symbol])[:n]
    return product

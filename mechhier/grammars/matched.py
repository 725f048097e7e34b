"""The document language's arms side by side: with and without hierarchy, with and without a latent lexicon."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from mechhier.grammars.clauses import CONNECTOR, EOS
from mechhier.grammars.document import DocumentGrammar

if TYPE_CHECKING:
    import pandas as pd


def matched_arms(grammar: DocumentGrammar, *, n_rows: int = 64) -> pd.DataFrame:
    """Return what the matched arms of a language share and where they differ, a row per arm.

    The arms are hierarchical and flat text, each with a fixed lexicon, with per-document lexicons and, if the grammar
    has a pool, with that pool.

    Lexicons are permutations, so two arms need not give a token the same frequency: what is matched is the law of
    every document given its lexicon. ``unigram_difference`` therefore compares the frequencies of categories and, in
    each category, of ranks, given the lexicon. They come from each arm's own definition: from the mean number of
    clauses, or from the stationary law of the chain of categories and ranks.

    Args:
        grammar: One of the arms; the others have its sizes, laws, context and seed.
        n_rows: Rows of held-out text whose loss is measured, at least 2.

    Returns:
        Indexed by ``structure`` and ``lexicon``, with columns ``grammar``; ``unigram_difference``, the largest from
        the first arm; ``entropy_rate_lower`` and ``entropy_rate_upper``, nats per token of whole documents, in closed
        form; ``floor``, the ideal predictor's mean loss in nats over positions 1 and later of a row of
        ``default_context`` tokens, with its 95 % interval over rows ``floor_low`` and ``floor_high``; and ``method``,
        how the floor was computed.
    """
    import pandas as pd

    kinds = ["fixed", "per_document", *([grammar.lexicon] if isinstance(grammar.lexicon, int) else [])]
    rows, reference = [], None
    for hierarchical in (True, False):
        for lexicon in kinds:
            repetitions = grammar.repetitions if lexicon == "per_document" else 1
            changes = {"hierarchical": hierarchical, "lexicon": lexicon, "repetitions": repetitions}
            arm = grammar.model_copy(update=changes)
            frequencies = _frequencies(arm)
            reference = frequencies if reference is None else reference
            lower, upper = arm.entropy_rate_bounds()
            floor = arm.corpus(arm.default_context).floor(n_rows)
            rows.append(
                {
                    "structure": "hierarchical" if hierarchical else "flat",
                    "lexicon": f"pool of {lexicon}" if isinstance(lexicon, int) else lexicon,
                    "grammar": arm,
                    "unigram_difference": float(np.abs(frequencies - reference).max()),
                    "entropy_rate_lower": lower,
                    "entropy_rate_upper": upper,
                    "floor": float(floor["floor_mean"]),
                    "floor_low": float(floor["floor_mean_low"]),
                    "floor_high": float(floor["floor_mean_high"]),
                    "method": floor.attrs["method"],
                }
            )
    return pd.DataFrame(rows).set_index(["structure", "lexicon"])


def _frequencies(grammar: DocumentGrammar) -> Float[np.ndarray, " category_and_rank"]:
    """Frequencies of every rank of subjects, verbs and objects, of the connectors together, and of ``<eos>``."""
    if grammar.hierarchical:
        return _join(grammar.category_frequencies, grammar.rank_probabilities)
    category = _stationary(grammar.category_transitions)
    if grammar.binding == 0:
        return _join(category, grammar.rank_probabilities)
    # The chain of (category, rank), its rows the states: a word takes the rank of the word before it, or draws one.
    law, b = grammar.rank_probabilities[0], grammar.binding
    free = np.tile(law, (len(law), 1))
    tied = b * np.eye(len(law)) + (1 - b) * free
    n, transitions = len(law), grammar.category_transitions
    chain = np.zeros((3 * n + 2, 3 * n + 2))
    for before in range(3):
        here = slice(before * n, (before + 1) * n)
        for after in range(3):
            chain[here, after * n : (after + 1) * n] = transitions[before, after] * tied
        chain[here, 3 * n :] = transitions[before, CONNECTOR:]
    for before in (CONNECTOR, EOS):
        here = 3 * n + before - CONNECTOR
        chain[here, : 3 * n] = (transitions[before, :CONNECTOR, None] * law).ravel()
        chain[here, 3 * n :] = transitions[before, CONNECTOR:]
    return _stationary(chain)


def _join(
    category: Float[np.ndarray, " category"], laws: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> Float[np.ndarray, " category_and_rank"]:
    words = [frequency * law for frequency, law in zip(category, laws, strict=False)]
    return np.concatenate([*words, category[CONNECTOR:]])


def _stationary(transitions: Float[np.ndarray, "state state"]) -> Float[np.ndarray, " state"]:
    """Return the law that a chain leaves as it is: the solution of p T = p, sum p = 1."""
    n = len(transitions)
    equations = transitions.T - np.eye(n)
    equations[-1] = 1.0  # one of the others says nothing new
    return np.linalg.solve(equations, np.eye(n)[-1])

"""Text of the document language, drawn for all rows at once as an array of clauses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mechhier.grammars.base import Sample
from mechhier.grammars.clauses import CONNECTOR, EOS, TOKENS_PER_CLAUSE, VERB

if TYPE_CHECKING:
    from mechhier.grammars.document import DocumentGrammar


def generate(grammar: DocumentGrammar, n_rows: int, context: int, rng: np.random.Generator) -> Sample:
    """Draw rows that each begin a document; see :meth:`Grammar.generate`."""
    n_clauses = -(-context // TOKENS_PER_CLAUSE)
    total = n_rows * n_clauses

    # Sentences: as many as fit into a row if every one has a single clause; the rest is not used.
    chain = rng.random((n_rows, n_clauses)) < grammar.p_chain
    length = np.where(chain, rng.integers(1, grammar.max_clauses + 1, (n_rows, n_clauses)), 1)
    start = np.cumsum(length, axis=1) - length
    used = start < n_clauses
    shown = np.minimum(length, n_clauses - start)[used]

    # From here on one entry per clause, row after row.
    chain, length = np.repeat(chain[used], shown), np.repeat(length[used], shown)
    clause = np.tile(np.arange(n_clauses), n_rows) - np.repeat(start[used], shown)
    number = np.repeat(np.nonzero(used)[1], shown)
    document, sentence = np.divmod(number, grammar.sentences_per_document)

    new_document = (sentence == 0) & (clause == 0)
    lexicons, per_document = _lexicons_of_documents(grammar, int(new_document.sum()), rng)
    lexicon = per_document[np.cumsum(new_document) - 1]

    ranks = np.stack([_draw(law, total, rng) for law in grammar.rank_probabilities], axis=1)
    if grammar.binding > 0:
        ranks[:, VERB:] = np.where((rng.random(total) < grammar.binding)[:, None], ranks[:, :1], ranks[:, VERB:])
    words = lexicons[lexicon[:, None], np.arange(3), ranks]
    swap = ~chain
    for columns in (words, ranks):
        columns[swap, :2] = columns[swap, 1::-1]

    connectors = rng.integers(grammar.offsets[CONNECTOR], grammar.offsets[EOS], total)
    terminator = np.where(clause + 1 < length, connectors, grammar.eos_token_id)
    tokens = np.concatenate([words, terminator[:, None]], axis=1)

    def rows(per_token: np.ndarray) -> np.ndarray:
        return per_token.reshape(n_rows, n_clauses * TOKENS_PER_CLAUSE)[:, :context]

    def spread(per_clause: np.ndarray) -> np.ndarray:
        return rows(np.repeat(per_clause, TOKENS_PER_CLAUSE))

    tokens = rows(tokens)
    labels = {
        "category": grammar.token_categories[tokens],
        "rank": rows(np.concatenate([ranks, np.full((total, 1), -1)], axis=1)),
        "lexicon": spread(lexicon),
        "document": spread(document),
        "section": spread(sentence // (grammar.n_paragraphs * grammar.n_sentences)),
        "paragraph": spread(sentence // grammar.n_sentences),
        "sentence": spread(sentence),
        "clause": spread(clause),
        "n_clauses": spread(length),
    }
    return Sample(tokens, labels)


def _lexicons_of_documents(grammar: DocumentGrammar, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return lexicons ``[L, 3, rank]`` and, for each of ``n`` documents, which of them it uses."""
    if grammar.lexicon == "per_document":
        n_lexicons = -(-n // grammar.repetitions)
        shares = np.repeat(np.arange(n_lexicons), grammar.repetitions)[:n]
        return grammar.draw_lexicons(n_lexicons, rng), rng.permutation(shares) if grammar.repetitions > 1 else shares
    return grammar.lexicons, rng.integers(0, len(grammar.lexicons), n)


def _draw(law: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw ``n`` ranks from a law over ranks."""
    cumulative = np.cumsum(law)
    cumulative[-1] = 1.0
    return np.searchsorted(cumulative, rng.random(n), side="right")

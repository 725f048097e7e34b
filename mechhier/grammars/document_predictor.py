"""Ideal next-token prediction for the document language and its flat counterpart: read a text, weigh the lexicons.

Both languages are predicted alike once a text is read: for every token, what its category can be given the tokens
before it, and how its rank is tied to the ranks of the words right before it. With binding b and Zipf law z:

* tie 0: the rank is drawn from z;
* tie 1: it is the rank of the word before with probability b, else from z;
* tie 2 (third word of a clause): if the two words before agree in a rank r, it is r with probability
  b / (b + (1 - b) z(r)), else from z. This is the law of one coin per clause, P(r1, r2, r3) = z(r1) [b 1(r1 = r2 = r3)
  + (1 - b) z(r2) z(r3)], which is symmetric in the order of subject and verb.

Given a lexicon, that is everything. A fixed lexicon or a pool is a Bayesian mixture over the language's lexicons; what
a text says about a lexicon drawn afresh is in :mod:`mechhier.grammars.lexicon_inference`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from mechhier.grammars import lexicon_inference
from mechhier.grammars.base import IdealLoss, Sample, check_tokens
from mechhier.grammars.clauses import CONNECTOR, EOS, OBJECT, SUBJECT, TOKENS_PER_CLAUSE, VERB

if TYPE_CHECKING:
    from mechhier.grammars.document import DocumentGrammar

MAX_ENUMERATION = 2**22
"""Lexicons times tokens of a row up to which a sum over all fresh lexicons is taken one by one: 60 bytes each, 40 ns."""


@dataclass(frozen=True)
class Reading:
    """What is known of the tokens of rows that begin a document; every array has an entry per token.

    Attributes:
        tokens: Token ids.
        category: Category ids.
        category_probabilities: P(category of the token | the tokens before it), for each of the five categories.
        tie: How the rank of a word at this place depends on the words before it: 0, 1 or 2 (see the module).
        document_start: Whether a document begins here.
    """

    tokens: Int[np.ndarray, "row position"]
    category: Int[np.ndarray, "row position"]
    category_probabilities: Float[np.ndarray, "row position 5"]
    tie: Int[np.ndarray, "row position"]
    document_start: Bool[np.ndarray, "row position"]

    def rows(self, which: Bool[np.ndarray, " row"] | slice) -> Reading:
        """Return some of the rows."""
        return Reading(*(getattr(self, field.name)[which] for field in fields(self)))


def read(grammar: DocumentGrammar, tokens: Int[np.ndarray, "row position"]) -> Reading:
    """Read rows that begin a document.

    Raises:
        ValueError: The grammar does not allow a token where it stands; the message names the first such place.
    """
    tokens = check_tokens(tokens, grammar.vocab_size)
    category = grammar.token_categories[tokens]
    before = np.full(category.shape, EOS)
    before[:, 1:] = category[:, :-1]
    sentence_start = before == EOS
    sentence = np.cumsum(sentence_start, axis=1) - 1
    if grammar.hierarchical:
        probabilities, tie = _read_clauses(grammar, category, sentence_start)
    else:
        probabilities, tie = grammar.category_transitions[before], (before < CONNECTOR).astype(np.int64)
    wrong = np.take_along_axis(probabilities, category[:, :, None], axis=2)[:, :, 0] == 0
    if wrong.any():
        row, position = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"row {row}, position {position}: the grammar does not allow {grammar.vocabulary[tokens[row, position]]} "
            "here. Rows must begin a document (packed=False) and be text of this language"
        )
    return Reading(
        tokens=tokens,
        category=category,
        category_probabilities=probabilities,
        tie=tie if grammar.binding > 0 else np.zeros_like(tie),
        document_start=sentence_start & (sentence % grammar.sentences_per_document == 0),
    )


def _read_clauses(
    grammar: DocumentGrammar,
    category: Int[np.ndarray, "row position"],
    sentence_start: Bool[np.ndarray, "row position"],
) -> tuple[Float[np.ndarray, "row position 5"], Int[np.ndarray, "row position"]]:
    """Return category probabilities and ties of hierarchical text; behind an impossible token they mean nothing."""
    position = np.broadcast_to(np.arange(category.shape[1]), category.shape)
    slot = position % TOKENS_PER_CLAUSE
    start = np.maximum.accumulate(np.where(sentence_start, position, 0), axis=1)
    chain = np.take_along_axis(category == SUBJECT, start, axis=1)
    clauses_left = np.where(chain, np.maximum(grammar.max_clauses - (position - start) // TOKENS_PER_CLAUSE, 1), 1)
    # A sentence's first token decides whether it is a chain; every later clause is one of a chain.
    p_subject = np.where(sentence_start, grammar.p_chain, 1.0)

    probabilities = np.zeros((*category.shape, 5))
    probabilities[:, :, SUBJECT] = np.select([slot == 0, slot == 1], [p_subject, ~chain], 0.0)
    probabilities[:, :, VERB] = np.select([slot == 0, slot == 1], [1 - p_subject, chain], 0.0)
    probabilities[:, :, OBJECT] = slot == 2
    probabilities[:, :, EOS] = np.where(slot == 3, 1 / clauses_left, 0.0)
    probabilities[:, :, CONNECTOR] = np.where(slot == 3, 1 - 1 / clauses_left, 0.0)
    return probabilities, np.where(slot == 3, 0, slot)


def _structure_losses(grammar: DocumentGrammar, reading: Reading) -> Float[np.ndarray, "row position"]:
    """Loss in nats of every token's category, and of the connector within its category."""
    observed = np.take_along_axis(reading.category_probabilities, reading.category[:, :, None], axis=2)[:, :, 0]
    return np.where(reading.category == CONNECTOR, np.log(grammar.n_connectors), 0.0) - np.log(observed)


def _tied(
    grammar: DocumentGrammar, reading: Reading, ranks: Int[np.ndarray, "row position lexicon"]
) -> Float[np.ndarray, "row position lexicon"]:
    """Probability that a word at this place takes the rank of the word before it, given the ranks under a lexicon."""
    b, before, two_before = grammar.binding, _shifted(ranks, 1), _shifted(ranks, 2)
    tie = reading.tie[:, :, None]
    result = np.where(tie == 1, b, np.zeros(ranks.shape))
    if (reading.tie == 2).any():
        law = grammar.rank_probabilities[0]
        result += np.where((tie == 2) & (before == two_before), b / (b + (1 - b) * law[before]), 0.0)
    return result


def _shifted(ranks: Int[np.ndarray, "row position lexicon"], by: int) -> Int[np.ndarray, "row position lexicon"]:
    """Return the ranks ``by`` tokens earlier, 0 where there are none."""
    result = np.zeros_like(ranks)
    result[:, by:] = ranks[:, :-by]
    return result


def _rank_probability(
    grammar: DocumentGrammar, reading: Reading, ranks: Int[np.ndarray, "row position lexicon"]
) -> Float[np.ndarray, "row position lexicon"]:
    """Probability of the observed ranks, each given those before it; 1 for a token without a rank."""
    laws = np.zeros((3, max(grammar.sizes)))
    for category, law in enumerate(grammar.rank_probabilities):
        laws[category, : len(law)] = law
    category = reading.category[:, :, None]
    result = laws[np.minimum(category, OBJECT), ranks]
    if grammar.binding > 0:
        tied = _tied(grammar, reading, ranks)
        result = tied * (ranks == _shifted(ranks, 1)) + (1 - tied) * result
    return np.where(category < CONNECTOR, result, 1.0)


def _ranks(reading: Reading, word_ranks: Int[np.ndarray, "lexicon word"]) -> Int[np.ndarray, "row position lexicon"]:
    """Rank of every word under every lexicon, 0 for connectors and ``<eos>``."""
    is_word = reading.category < CONNECTOR
    ranks = np.moveaxis(word_ranks[:, np.where(is_word, reading.tokens, 0)], 0, 2)
    return np.where(is_word[:, :, None], ranks, 0)


def _weigh(
    grammar: DocumentGrammar, reading: Reading, ranks: Int[np.ndarray, "row position lexicon"]
) -> tuple[Float[np.ndarray, "row position"], Float[np.ndarray, "row position lexicon"]]:
    """Return the loss of every word within its category, and the posterior over the lexicons before it.

    The loss is infinite where no lexicon allows the word.
    """
    likelihood = _rank_probability(grammar, reading, ranks)
    n_rows, n_positions, n_lexicons = likelihood.shape
    probability = np.empty((n_rows, n_positions))
    posterior = np.empty_like(likelihood)
    weight = np.full((n_rows, n_lexicons), 1 / n_lexicons)
    for t in range(n_positions):
        weight[reading.document_start[:, t]] = 1 / n_lexicons
        posterior[:, t] = weight
        weight = weight * likelihood[:, t]
        probability[:, t] = weight.sum(axis=1)
        # Text that no lexicon allows is refused by the caller; until then its row goes on.
        weight = np.where(probability[:, t, None] > 0, weight, 1.0)
        weight /= weight.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        return -np.log(probability), posterior


def _refuse_impossible(loss: Float[np.ndarray, "row position"]) -> Float[np.ndarray, "row position"]:
    if np.isinf(loss).any():
        row, position = (int(i) for i in np.argwhere(np.isinf(loss))[0])
        raise ValueError(
            f"row {row}, position {position}: the text has probability 0 under every lexicon of the language"
        )
    return loss


def ideal_loss(grammar: DocumentGrammar, sample: Sample) -> IdealLoss:
    """Return the ideal predictor's loss on every token; see :meth:`DocumentGrammar.ideal_loss`."""
    reading = read(grammar, sample.tokens)
    structure = _structure_losses(grammar, reading)
    if grammar.lexicon != "per_document":
        known = "the lexicon is known" if grammar.lexicon == "fixed" else f"mixture over the {grammar.lexicon} lexicons"
        words = _refuse_impossible(_weigh(grammar, reading, _ranks(reading, grammar.word_ranks))[0])
        return IdealLoss.exact(structure + words, f"exact: {known}")
    found = _fresh_word_losses(grammar, reading)
    words = _refuse_impossible(found.loss)
    known = -np.log(_rank_probability(grammar, reading, np.maximum(sample.labels["rank"], 0)[:, :, None])[:, :, 0])
    log_size = np.log([*grammar.sizes, 1, 1])[reading.category]
    return IdealLoss(
        estimate=structure + words,
        error=found.error,
        mean_error=found.sum_error / max(words.shape[1] - 1, 1),  # the first word's loss is exact
        lower=structure + known,
        upper=structure + log_size,
        method=found.method,
    )


def _fresh_word_losses(grammar: DocumentGrammar, reading: Reading) -> lexicon_inference.WordLosses:
    """Return the losses of words of lexicons drawn afresh; where these are few, by summing over them one by one."""
    n_lexicons = math.prod(math.factorial(n) for n in grammar.sizes)
    if lexicon_inference.has_exact_sum(grammar) or n_lexicons * reading.tokens.shape[1] > MAX_ENUMERATION:
        return lexicon_inference.word_losses(grammar, reading)
    word_ranks = _all_word_ranks(grammar.sizes)
    loss = np.zeros(reading.tokens.shape)
    for row in range(len(loss)):
        one = reading.rows(slice(row, row + 1))
        loss[row] = _weigh(grammar, one, _ranks(one, word_ranks))[0][0]
    method = f"exact: mixture over all {n_lexicons} lexicons"
    return lexicon_inference.WordLosses(loss, np.zeros_like(loss), np.zeros(len(loss)), method)


def _all_word_ranks(sizes: tuple[int, int, int]) -> Int[np.ndarray, "lexicon word"]:
    """Return the rank of every word in every lexicon that there is."""
    of_category = [np.array(list(permutations(range(n)))) for n in sizes]
    which = np.indices([len(ranks) for ranks in of_category]).reshape(len(sizes), -1)
    return np.concatenate([ranks[i] for ranks, i in zip(of_category, which, strict=True)], axis=1)


def next_token_probabilities(
    grammar: DocumentGrammar, tokens: Int[np.ndarray, "row position"]
) -> Float[np.ndarray, "row position vocab"]:
    """Return P(token at t | the tokens before t); see :meth:`DocumentGrammar.next_token_probabilities`."""
    reading = read(grammar, tokens)
    first_connector, eos = grammar.offsets[CONNECTOR], grammar.eos_token_id
    result = np.empty((*reading.tokens.shape, grammar.vocab_size))
    p_category = reading.category_probabilities
    result[:, :, first_connector:eos] = p_category[:, :, CONNECTOR, None] / grammar.n_connectors
    result[:, :, eos] = p_category[:, :, EOS]
    if grammar.lexicon == "per_document":
        words = lexicon_inference.next_word_probabilities(grammar, reading)
    else:
        words = _mixture_of_words(grammar, reading)
    # Each word's probability within its category, times its category's.
    result[:, :, :first_connector] = words * p_category[:, :, grammar.token_categories[:first_connector]]
    return result


def _mixture_of_words(grammar: DocumentGrammar, reading: Reading) -> Float[np.ndarray, "row position word"]:
    """P(word | its category and the tokens before it) for every word, under the posterior over the lexicons."""
    ranks = _ranks(reading, grammar.word_ranks)
    loss, posterior = _weigh(grammar, reading, ranks)
    _refuse_impossible(loss)
    if grammar.binding == 0:
        return posterior @ grammar.word_probabilities
    tied = _tied(grammar, reading, ranks)
    result = (posterior * (1 - tied)) @ grammar.word_probabilities
    row, position, lexicon = np.ogrid[tuple(slice(n) for n in ranks.shape)]
    for category in (SUBJECT, VERB, OBJECT):
        word = grammar.lexicons[lexicon, category, _shifted(ranks, 1)]  # the word that has the rank of the word before
        np.add.at(result, (row, position, word), posterior * tied)
    return result

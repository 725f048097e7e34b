"""Exact next-token prediction for the document language: parse a text, weigh the lexicons, predict.

A clause's three words are predicted in their order of appearance. With ranks r1, r2, r3, Zipf law z and binding b,
P(r1, r2, r3) = z(r1) [b 1(r1 = r2 = r3) + (1 - b) z(r2) z(r3)], which is symmetric in the order of subject and verb.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from mechhier.grammars.base import Sample, check_tokens
from mechhier.grammars.clauses import CONNECTOR, EOS, OBJECT, SUBJECT, TOKENS_PER_CLAUSE, VERB

if TYPE_CHECKING:
    from mechhier.grammars.document import DocumentGrammar

_PADDING = -1


@dataclass(frozen=True)
class _Parse:
    """The structure of rows that begin a document, one entry per clause; ``tokens`` is padded to whole clauses."""

    tokens: Int[np.ndarray, "row clause 4"]
    sentence_start: Bool[np.ndarray, "row clause"]
    document_start: Bool[np.ndarray, "row clause"]
    chain: Bool[np.ndarray, "row clause"]  # the sentence is a chain of subject-verb-object clauses
    clause: Int[np.ndarray, "row clause"]  # number of the clause in its sentence


def _parse(grammar: DocumentGrammar, tokens: Int[np.ndarray, "row position"]) -> _Parse:
    """Parse rows that begin a document; raise ValueError at the first token that the grammar does not allow."""
    tokens = check_tokens(tokens, grammar.vocab_size)
    n_rows, n_positions = tokens.shape
    n_clauses = -(-n_positions // TOKENS_PER_CLAUSE)
    padded = np.full((n_rows, n_clauses * TOKENS_PER_CLAUSE), _PADDING)
    padded[:, :n_positions] = tokens
    clauses = padded.reshape(n_rows, n_clauses, TOKENS_PER_CLAUSE)

    ends_sentence = clauses[:, :, 3] == grammar.eos_token_id
    sentence_start = np.ones((n_rows, n_clauses), dtype=bool)
    sentence_start[:, 1:] = ends_sentence[:, :-1]
    sentence = np.cumsum(sentence_start, axis=1) - 1
    index = np.broadcast_to(np.arange(n_clauses), (n_rows, n_clauses))
    first_clause = np.maximum.accumulate(np.where(sentence_start, index, 0), axis=1)
    parse = _Parse(
        tokens=clauses,
        sentence_start=sentence_start,
        document_start=sentence_start & (sentence % grammar.sentences_per_document == 0),
        chain=np.take_along_axis(clauses[:, :, 0] < grammar.offsets[VERB], first_clause, axis=1),
        clause=index - first_clause,
    )
    _check(grammar, parse, n_positions)
    return parse


def _check(grammar: DocumentGrammar, parse: _Parse, n_positions: int) -> None:
    category = np.where(parse.tokens == _PADDING, _PADDING, grammar.token_categories[parse.tokens])
    chain = parse.chain[:, :, None]
    expected = np.where(chain, [SUBJECT, VERB, OBJECT, EOS], [VERB, SUBJECT, OBJECT, EOS])
    allowed = category == expected
    goes_on = parse.chain & (parse.clause + 1 < grammar.max_clauses)
    allowed[:, :, 3] |= (category[:, :, 3] == CONNECTOR) & goes_on
    allowed[:, :, 0] &= np.where(parse.chain, grammar.p_chain > 0, grammar.p_chain < 1)
    wrong = ~allowed.reshape(len(allowed), -1)[:, :n_positions]
    if wrong.any():
        row, position = (int(i) for i in np.argwhere(wrong)[0])
        token = grammar.vocabulary[parse.tokens.reshape(len(wrong), -1)[row, position]]
        raise ValueError(
            f"row {row}, position {position}: the grammar does not allow {token} here. Rows must begin a document "
            "(packed=False) and be text of this language"
        )


def _structure_log_probability(grammar: DocumentGrammar, parse: _Parse) -> Float[np.ndarray, "row clause 4"]:
    """Log-probability of each observed token's category, and of the connector within its category."""
    result = np.zeros(parse.tokens.shape)
    with np.errstate(divide="ignore"):
        order = np.log(np.where(parse.chain, grammar.p_chain, 1 - grammar.p_chain))
        left = np.maximum(grammar.max_clauses - parse.clause, 1)
        connector = np.log((left - 1) / left) - np.log(grammar.n_connectors)
    result[:, :, 0] = np.where(parse.sentence_start, order, 0)
    end = np.where(parse.chain, -np.log(left), 0)
    result[:, :, 3] = np.where(parse.tokens[:, :, 3] == grammar.eos_token_id, end, connector)
    return result


def _rank_log_probability(
    grammar: DocumentGrammar, ranks: Int[np.ndarray, "*any 3"], chain: Bool[np.ndarray, "*any"]
) -> Float[np.ndarray, "*any 3"]:
    """Log-probability of the three ranks of each clause in order of appearance, each given those before it."""
    with np.errstate(divide="ignore"):  # a steep law is 0 at its last ranks
        subject, verb, object_ = (np.log(law) for law in grammar.rank_probabilities)
    r1, r2, r3 = (ranks[..., i] for i in range(3))
    if grammar.binding == 0:
        first = np.where(chain, _at(subject, r1), _at(verb, r1))
        second = np.where(chain, _at(verb, r2), _at(subject, r2))
        return np.stack([first, second, _at(object_, r3)], axis=-1)
    b, law = grammar.binding, grammar.rank_probabilities[0]
    with np.errstate(divide="ignore"):
        second = np.log(b * (r2 == r1) + (1 - b) * law[r2])
        together = np.log(b * (r3 == r1) + (1 - b) * law[r2] * law[r3]) - np.log(b + (1 - b) * law[r2])
    return np.stack([subject[r1], second, np.where(r2 == r1, together, object_[r3])], axis=-1)


def _at(log_law: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Look up ranks, which may be out of range where the caller takes another category's value, or in padding."""
    return log_law[np.minimum(ranks, len(log_law) - 1)]


def _weigh(
    grammar: DocumentGrammar, parse: _Parse, n_positions: int
) -> tuple[Float[np.ndarray, "row position"], Float[np.ndarray, "row position lexicon"]]:
    """Return the log-probability of every token and the posterior over the lexicons before it."""
    n_lexicons = len(grammar.lexicons)
    n_rows = len(parse.tokens)
    words = np.clip(parse.tokens[:, :, :3], 0, grammar.offsets[CONNECTOR] - 1)
    ranks = np.moveaxis(grammar.word_ranks[:, words], 0, 2)  # row clause lexicon 3
    likelihood = np.zeros((*parse.tokens.shape, n_lexicons))
    of_words = _rank_log_probability(grammar, ranks, np.broadcast_to(parse.chain[:, :, None], ranks.shape[:-1]))
    likelihood[:, :, :3] = np.moveaxis(of_words, 2, 3)
    likelihood = likelihood.reshape(n_rows, -1, n_lexicons)
    document_start = np.zeros(parse.tokens.shape, dtype=bool)
    document_start[:, :, 0] = parse.document_start
    document_start = document_start.reshape(n_rows, -1)

    log_probability = _structure_log_probability(grammar, parse).reshape(n_rows, -1)[:, :n_positions]
    posterior = np.empty((n_rows, n_positions, n_lexicons))
    weight = np.full((n_rows, n_lexicons), 1 / n_lexicons)
    for t in range(n_positions):
        weight[document_start[:, t]] = 1 / n_lexicons
        posterior[:, t] = weight
        weight = weight * np.exp(likelihood[:, t])
        total = weight.sum(axis=1, keepdims=True)
        if not total.all():
            row = int(np.argmin(total))
            raise ValueError(f"row {row}, position {t}: the text has probability 0 under every lexicon of the language")
        weight = weight / total
        log_probability[:, t] += np.log(total[:, 0])
    return log_probability, posterior


def losses(grammar: DocumentGrammar, tokens: Int[np.ndarray, "row position"]) -> Float[np.ndarray, "row position"]:
    """Return -log P(token at t | the tokens before t) in nats under the exact predictor."""
    return -_weigh(grammar, _parse(grammar, tokens), np.shape(tokens)[1])[0]


def bounds_per_document(
    grammar: DocumentGrammar, sample: Sample
) -> tuple[Float[np.ndarray, "row position"], Float[np.ndarray, "row position"]]:
    """Return the losses in nats of two predictors: one knows every document's lexicon, one infers nothing about it."""
    parse = _parse(grammar, sample.tokens)
    n_rows, n_positions = sample.tokens.shape
    structure = _structure_log_probability(grammar, parse)
    ranks = np.zeros(parse.tokens.shape, dtype=np.int64)
    ranks.reshape(n_rows, -1)[:, :n_positions] = sample.labels["rank"]
    known = structure.copy()
    known[:, :, :3] += _rank_log_probability(grammar, ranks[:, :, :3], parse.chain)
    uniform = structure.copy()
    subject, verb, object_ = (-np.log(n) for n in grammar.sizes)
    uniform[:, :, :3] += np.where(parse.chain[:, :, None], [subject, verb, object_], [verb, subject, object_])
    lower, upper = (-x.reshape(n_rows, -1)[:, :n_positions] for x in (known, uniform))
    return lower, upper


def next_token_probabilities(
    grammar: DocumentGrammar, tokens: Int[np.ndarray, "row position"]
) -> Float[np.ndarray, "row position vocab"]:
    """Return P(token at t | the tokens before t); see :meth:`DocumentGrammar.next_token_probabilities`."""
    parse = _parse(grammar, tokens)
    n_rows, n_positions = np.shape(tokens)
    posterior = _weigh(grammar, parse, n_positions)[1]
    result = np.zeros((n_rows, n_positions, grammar.vocab_size))
    starts, words = grammar.offsets, grammar.word_probabilities
    columns = [slice(starts[c], starts[c + 1]) for c in (SUBJECT, VERB, OBJECT, CONNECTOR)]
    b = grammar.binding

    for slot in range(TOKENS_PER_CLAUSE):
        out, weight = result[:, slot::TOKENS_PER_CLAUSE], posterior[:, slot::TOKENS_PER_CLAUSE]
        n = out.shape[1]
        chain, start = parse.chain[:, :n], parse.sentence_start[:, :n]
        if slot == 0:
            p_subject = np.where(start, grammar.p_chain, 1.0)[:, :, None]
            out[:, :, columns[SUBJECT]] = p_subject * (weight @ words[:, columns[SUBJECT]])
            out[:, :, columns[VERB]] = (1 - p_subject) * (weight @ words[:, columns[VERB]])
        elif slot == 3:
            left = np.where(chain, np.maximum(grammar.max_clauses - parse.clause[:, :n], 1), 1)
            out[:, :, -1] = 1 / left
            out[:, :, columns[CONNECTOR]] = ((1 - 1 / left) / grammar.n_connectors)[:, :, None]
        else:
            ranks = np.moveaxis(grammar.word_ranks[:, parse.tokens[:, :n, :slot]], 0, 2)  # row clause lexicon slot
            if slot == 1:
                bound, free = b * weight, (1 - b) * weight
                category = np.where(chain, VERB, SUBJECT)
            else:
                agree = ranks[..., 0] == ranks[..., 1]
                p_second = grammar.rank_probabilities[0][ranks[..., 1]] if b else np.ones(agree.shape)
                p_bound = np.where(agree, b / (b + (1 - b) * p_second), 0)
                bound, free = p_bound * weight, (1 - p_bound) * weight
                category = np.full(chain.shape, OBJECT)
            for c in (SUBJECT, VERB, OBJECT):
                out[:, :, columns[c]] = np.where((category == c)[:, :, None], free @ words[:, columns[c]], 0)
            if b:
                lexicon = np.arange(len(grammar.lexicons))
                tied = grammar.lexicons[lexicon, category[:, :, None], ranks[..., 0]]  # has the first word's rank
                row, clause = np.ogrid[:n_rows, :n]
                np.add.at(out, (row[:, :, None], clause[:, :, None], tied), bound)
    return result

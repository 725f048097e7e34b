"""The ideal predictor of documents that each have a fresh lexicon: what the words so far say about the permutations.

**Exactly, where words are independent** (``binding=0``). A document's words of a category are independent draws from
z(pi(w)) for one unknown permutation pi. With counts n_w so far, P(next word | words so far) is a ratio of

    E(counts) = mean over permutations pi of  prod_w z(pi(w)) ** n_w,

a permanent with few distinct rows, as words of equal count are exchangeable: if m_k words have the k-th count n_k,
E = prod_k m_k! / n! times the coefficient of prod_k x_k ** m_k in prod_r sum_k x_k z(r) ** n_k. Dynamic programming
over the ranks r computes it, its state being how many words of each count have been given a rank: with the commonest
count implied by the others, n x prod_k (m_k + 1) steps. All terms are positive, so there is no cancellation. Where
every clause's words share a rank (``binding=1``, hierarchical text), the same sum over clauses predicts a clause's
first word; the other two are known if their clause has occurred, else uniform over the words not seen.

**Estimated** otherwise, and where a row needs more than :data:`MAX_OPERATIONS`: by particle filters, see
:mod:`mechhier.grammars.lexicon_filter`. (Where there are few enough lexicons, :mod:`document_predictor` sums over them.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mechhier.grammars import lexicon_filter
from mechhier.grammars.clauses import CONNECTOR
from mechhier.grammars.sampling import compiled

if TYPE_CHECKING:
    from mechhier.grammars.document import DocumentGrammar
    from mechhier.grammars.document_predictor import Reading

MAX_OPERATIONS = 2e9
"""Multiplications that the exact sum may take for one row, a few seconds; a row of the paper's takes 2e7."""

_RANKS_PER_RESCALING = 16


class WordLosses(NamedTuple):
    """The loss in nats of every word given its category, and how it was computed; tokens that are not words have loss 0."""

    loss: Float[np.ndarray, "row position"]
    """Loss of every token."""
    error: Float[np.ndarray, "row position"]
    """Its standard error; 0 where it is exact."""
    sum_error: Float[np.ndarray, " row"]
    """Standard error of the sum of a row's losses."""
    method: str
    """How they were computed."""


def word_losses(grammar: DocumentGrammar, reading: Reading) -> WordLosses:
    """Return the loss in nats of every word given its category, exactly if :func:`exact_losses` can, else estimated."""
    if not has_exact_sum(grammar):
        return estimated_losses(grammar, reading)
    loss, done = exact_losses(grammar, reading)
    error, sum_error = np.zeros_like(loss), np.zeros(len(loss))
    if done.all():
        return WordLosses(loss, error, sum_error, _METHOD_EXACT)
    left = ~done
    loss[left], error[left], sum_error[left], _ = estimated_losses(grammar, reading.rows(left))
    method = f"{_METHOD_EXACT}; too long in {left.sum()} of {len(done)} rows, {_METHOD_ESTIMATED}"
    return WordLosses(loss, error, sum_error, method)


_METHOD_EXACT = "exact: sum over all lexicons"
_METHOD_ESTIMATED = (
    f"estimate: {lexicon_filter.N_FILTERS} particle filters of {lexicon_filter.LEAST_PARTICLES} to "
    f"{lexicon_filter.MOST_PARTICLES} particles, weighted by their evidence"
)


def has_exact_sum(grammar: DocumentGrammar) -> bool:
    """Whether :func:`exact_losses` computes the losses of the language's words."""
    return grammar.binding == 0 or (grammar.binding == 1 and grammar.hierarchical)


def _words(grammar: DocumentGrammar, reading: Reading) -> Int[np.ndarray, "row position"]:
    """Return the number of every token within its category."""
    return reading.tokens - np.array(grammar.offsets)[reading.category]


def _log_laws(grammar: DocumentGrammar) -> Float[np.ndarray, "category rank"]:
    """Logarithms of the Zipf laws, finite also where the laws are 0 in floating point; -inf beyond a category's end."""
    result = np.full((3, max(grammar.sizes)), -np.inf)
    for category, n in enumerate(grammar.sizes):
        log_weight = -grammar.zipf * np.log(np.arange(1, n + 1))
        result[category, :n] = log_weight - np.log(np.exp(log_weight).sum())  # the largest weight is 1
    return result


# -- exactly ---------------------------------------------------------------------------------------------------------


def exact_losses(
    grammar: DocumentGrammar, reading: Reading
) -> tuple[Float[np.ndarray, "row position"], Bool[np.ndarray, " row"]]:
    """Return the loss in nats of every word given its category, and which rows were within :data:`MAX_OPERATIONS`.

    ``binding`` must be 0, or 1 in hierarchical text. The losses of a row that was not are unfinished.
    """
    words, log_laws, sizes = _words(grammar, reading), _log_laws(grammar), np.array(grammar.sizes)
    log_probability = np.zeros(words.shape)
    done = np.zeros(len(words), dtype=bool)
    for row in range(len(words)):
        places = reading.category[row], words[row], reading.document_start[row]
        if grammar.binding == 0:
            done[row] = _weigh_words(*places, log_laws, sizes, MAX_OPERATIONS, log_probability[row])
        else:
            done[row] = _weigh_clauses(*places, reading.tie[row], log_laws[0], MAX_OPERATIONS, log_probability[row])
    return -log_probability, done


def next_word_probabilities(grammar: DocumentGrammar, reading: Reading) -> Float[np.ndarray, "row position word"]:
    """Return P(word | its category and the tokens before it) for every word at every place, exactly.

    Raises:
        ValueError: ``binding`` is not 0, or a row needs more than :data:`MAX_OPERATIONS`.
    """
    if grammar.binding > 0:
        raise ValueError(
            f"binding is {grammar.binding} and lexicon='per_document': the exact sum over all permutations of the words "
            "needs binding=0; ideal_loss(sample) has the loss on the tokens of a text"
        )
    words, log_laws = _words(grammar, reading), _log_laws(grammar)
    result = np.empty((*words.shape, grammar.offsets[CONNECTOR]))
    for row in range(len(words)):
        places = reading.category[row], words[row], reading.document_start[row]
        if not _predict_words(*places, log_laws, np.array(grammar.offsets), MAX_OPERATIONS, result[row]):
            raise ValueError(
                f"row {row}: the exact sum over all lexicons needs more than {MAX_OPERATIONS:.0e} operations for "
                "documents of this length; ideal_loss(sample) has an estimate of the loss on the tokens of a text"
            )
    return result


@compiled
def _log_moment(words_of_count: np.ndarray, log_law: np.ndarray, budget: float) -> tuple[float, float]:
    """Return log(n! E(counts)) and the number of operations; NaN where they would exceed the budget.

    Args:
        words_of_count: Number of words with every count, 0 included; they sum to n.
        log_law: Logarithm of the law over the n ranks, falling.
        budget: Most operations allowed.
    """
    n = len(log_law)
    n_types = 0
    for k in range(len(words_of_count)):
        n_types += words_of_count[k] > 0
    count, n_words = np.empty(n_types, dtype=np.int64), np.empty(n_types, dtype=np.int64)
    i = 0
    for k in range(len(words_of_count) - 1, -1, -1):
        if words_of_count[k] > 0:
            count[i], n_words[i] = k, words_of_count[k]
            i += 1

    # The state counts the words of every type but the commonest, which is implied; the next commonest is innermost.
    by_size = np.argsort(-n_words)
    commonest = by_size[0]
    needed = float(n) * n_types
    for i in by_size[1:]:
        needed *= float(n_words[i] + 1)
    if needed > budget:
        return np.nan, needed
    stride = np.zeros(n_types, dtype=np.int64)
    n_states = 1
    for i in by_size[1:]:
        stride[i] = n_states
        n_states *= n_words[i] + 1

    # Scale every factor by the prices (dual variables) of the best assignment, the commoner word to the better rank.
    # Then no factor exceeds 1, those of the best assignment are 1, and nothing that matters over- or underflows.
    price_of_type, price_of_rank = np.empty(n_types), np.empty(n)
    log_result, price, r = 0.0, 0.0, 0
    for i in range(n_types):
        price_of_type[i] = count[i] * log_law[r] - price
        for _ in range(n_words[i]):
            price_of_rank[r] = price
            log_result += count[i] * log_law[r]
            if r + 1 < n:
                price -= count[i] * (log_law[r] - log_law[r + 1])
            r += 1
        log_result += math.lgamma(n_words[i] + 1.0)

    value, following = np.zeros(n_states), np.empty(n_states)
    value[0] = 1.0
    for r in range(n):
        factor = math.exp(count[commonest] * log_law[r] - price_of_type[commonest] - price_of_rank[r])
        for s in range(n_states):
            following[s] = factor * value[s]
        for i in by_size[1:]:
            factor = math.exp(count[i] * log_law[r] - price_of_type[i] - price_of_rank[r])
            step = stride[i]
            block = step * (n_words[i] + 1)
            for first in range(0, n_states, block):
                for s in range(first + step, first + block):
                    following[s] += factor * value[s - step]
        value, following = following, value
        if r % _RANKS_PER_RESCALING == 0:
            largest = value.max()
            for s in range(n_states):
                value[s] /= largest
            log_result += math.log(largest)
    return log_result + math.log(value[n_states - 1]), needed


@compiled
def _weigh_words(
    category: np.ndarray,
    word: np.ndarray,
    document_start: np.ndarray,
    log_laws: np.ndarray,
    sizes: np.ndarray,
    budget: float,
    log_probability: np.ndarray,
) -> bool:
    """Write log P(word | its category and the words before it) for every word; False if the budget is exceeded."""
    counts = np.zeros(log_laws.shape, dtype=np.int64)
    words_of_count = np.zeros((3, len(category) + 1), dtype=np.int64)
    moment = np.empty(3)
    for t in range(len(category)):
        if document_start[t]:
            counts[:] = 0
            words_of_count[:] = 0
            for c in range(3):
                words_of_count[c, 0] = sizes[c]
                moment[c] = math.lgamma(sizes[c] + 1.0)
        c = category[t]
        if c >= CONNECTOR:
            continue
        count = counts[c, word[t]]
        counts[c, word[t]] += 1
        words_of_count[c, count] -= 1
        words_of_count[c, count + 1] += 1
        after, needed = _log_moment(words_of_count[c], log_laws[c, : sizes[c]], budget)
        budget -= needed
        if budget < 0:
            return False
        log_probability[t] = after - moment[c]
        moment[c] = after
    return True


@compiled
def _weigh_clauses(
    category: np.ndarray,
    word: np.ndarray,
    document_start: np.ndarray,
    tie: np.ndarray,
    log_law: np.ndarray,
    budget: float,
    log_probability: np.ndarray,
) -> bool:
    """Do what :func:`_weigh_words` does where the three words of a clause have one rank: draws are clauses."""
    n = len(log_law)
    count = np.zeros(n, dtype=np.int64)  # of every kind of clause, numbered as they occur
    words_of_count = np.zeros(len(category) + 1, dtype=np.int64)
    kind_of_word, word_of_kind = np.empty((3, n), dtype=np.int64), np.empty((3, n), dtype=np.int64)
    moment, kind, n_kinds = 0.0, 0, 0
    for t in range(len(category)):
        if document_start[t]:
            count[:] = 0
            words_of_count[:] = 0
            words_of_count[0] = n
            moment = math.lgamma(n + 1.0)
            kind_of_word[:] = -1
            word_of_kind[:] = -1
            n_kinds = 0
        c = category[t]
        if c >= CONNECTOR:
            continue
        w = word[t]
        if tie[t] == 0:
            kind = kind_of_word[c, w]
            if kind < 0:
                kind = n_kinds
                n_kinds += 1
            words_of_count[count[kind]] -= 1
            count[kind] += 1
            words_of_count[count[kind]] += 1
            after, needed = _log_moment(words_of_count, log_law, budget)
            budget -= needed
            if budget < 0:
                return False
            log_probability[t] = after - moment
            moment = after
        elif kind_of_word[c, w] < 0 and word_of_kind[c, kind] < 0:
            log_probability[t] = -math.log(n - (n_kinds - 1))  # all kinds but this one have a word
        else:
            log_probability[t] = 0.0 if kind_of_word[c, w] == kind else -np.inf
        kind_of_word[c, w] = kind
        word_of_kind[c, kind] = w
    return True


@compiled
def _predict_words(
    category: np.ndarray,
    word: np.ndarray,
    document_start: np.ndarray,
    log_laws: np.ndarray,
    offsets: np.ndarray,
    budget: float,
    prediction: np.ndarray,
) -> bool:
    """Write P(word | its category and the words before it) for every word; False if the budget is exceeded."""
    n_words = prediction.shape[1]
    counts = np.zeros(n_words, dtype=np.int64)
    words_of_count = np.zeros((3, len(category) + 2), dtype=np.int64)
    of_count = np.empty(len(category) + 1)
    current = np.empty(n_words)
    for t in range(len(category)):
        if document_start[t]:
            counts[:] = 0
            words_of_count[:] = 0
            for c in range(3):
                words_of_count[c, 0] = offsets[c + 1] - offsets[c]
                current[offsets[c] : offsets[c + 1]] = 1.0 / words_of_count[c, 0]
        prediction[t] = current
        c = category[t]
        if c >= CONNECTOR:
            continue
        first, last = offsets[c], offsets[c + 1]
        count = counts[first + word[t]]
        counts[first + word[t]] += 1
        words_of_count[c, count] -= 1
        words_of_count[c, count + 1] += 1
        log_law = log_laws[c, : last - first]
        now, needed = _log_moment(words_of_count[c], log_law, budget)
        budget -= needed
        for k in range(len(category)):
            if words_of_count[c, k] == 0 or budget < 0:
                continue
            words_of_count[c, k] -= 1
            words_of_count[c, k + 1] += 1
            after, needed = _log_moment(words_of_count[c], log_law, budget)
            words_of_count[c, k] += 1
            words_of_count[c, k + 1] -= 1
            budget -= needed
            of_count[k] = math.exp(after - now)
        if budget < 0:
            return False
        for w in range(first, last):
            current[w] = of_count[counts[w]]
    return True


# -- by particle filters ---------------------------------------------------------------------------------------------


def estimated_losses(grammar: DocumentGrammar, reading: Reading) -> WordLosses:
    """Return an estimate of the loss in nats of every word given its category, by :mod:`lexicon_filter`.

    The random numbers of a document depend on its tokens alone.
    """
    language = lexicon_filter.Language.of(_log_laws(grammar), grammar.sizes, grammar.binding, grammar.hierarchical)
    words = _words(grammar, reading)
    loss, error = np.zeros(words.shape), np.zeros(words.shape)
    variance = np.zeros(len(words))
    for row in range(len(words)):
        ends = [*np.flatnonzero(reading.document_start[row])[1:], words.shape[1]]
        start = 0
        for end in ends:
            document = slice(start, end)
            found = lexicon_filter.estimate(
                language,
                words[row, document],
                reading.category[row, document],
                reading.tie[row, document],
                lexicon_filter.TOLERANCE * math.sqrt((end - start) * words.shape[1]),
            )
            loss[row, document], error[row, document] = found.loss, found.error
            variance[row] += found.sum_error**2
            start = end
    return WordLosses(loss, error, np.sqrt(variance), _METHOD_ESTIMATED)

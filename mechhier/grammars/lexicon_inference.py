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

**By sequential Monte Carlo** otherwise, and where a row needs more than :data:`MAX_OPERATIONS`. A particle gives ranks
to words as they occur. A word with a rank r has the probability that the tie law gives r; a word not seen before has
the law's mass on the category's unused ranks, divided by the number of words not seen. A new word's rank, and that of
the words tied to it, stays undecided and is summed over until something depends on it: the next word that is not
tied. Particles are weighted by their probability of every word, resampled (systematically) when the effective sample
size falls below half, and then moved by Metropolis-Hastings steps that swap ranks (Gilks & Berzuini 2001), so that an
early guess of a common word's rank can be put right. P(word | words before) is the weighted mean of the particles'
probabilities.

The estimated probability of a text is unbiased (Del Moral 2004), so its logarithm is too low on average, by about half
its variance: the estimated loss is, in expectation, an upper bound of the ideal predictor's. Several independent
filters give its standard error.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from mechhier.grammars.base import stable_generator
from mechhier.grammars.clauses import CONNECTOR
from mechhier.grammars.sampling import alias_table, compiled, draw

if TYPE_CHECKING:
    from mechhier.grammars.document import DocumentGrammar
    from mechhier.grammars.document_predictor import Reading

MAX_OPERATIONS = 2e9
"""Multiplications that the exact sum may take for one row, a few seconds; a row of the paper's takes 2e7."""

N_FILTERS, N_PARTICLES = 4, 1000
"""Independent particle filters of an estimate, and particles of each."""

_RANKS_PER_RESCALING = 16
_STEPS = 16  # Metropolis-Hastings steps of every particle after a resampling
_LEAST_TRACKED_MASS = 1e-6  # below it, a mass that was updated by subtraction has lost too many digits


def word_losses(
    grammar: DocumentGrammar, reading: Reading
) -> tuple[Float[np.ndarray, "row position"], Float[np.ndarray, "row position"], str]:
    """Return the loss in nats of every word given its category, its standard error, and how it was computed.

    Tokens that are not words have loss 0.
    """
    if not _has_exact_sum(grammar):
        return *estimated_losses(grammar, reading), _METHOD_ESTIMATED
    loss, done = exact_losses(grammar, reading)
    error = np.zeros_like(loss)
    if done.all():
        return loss, error, _METHOD_EXACT
    for row in np.flatnonzero(~done):
        loss[row], error[row] = _estimated_row(grammar, reading, int(row))
    return loss, error, f"{_METHOD_EXACT}; too long in {(~done).sum()} of {len(done)} rows, {_METHOD_ESTIMATED}"


_METHOD_EXACT = "exact: sum over all lexicons"
_METHOD_ESTIMATED = f"estimate: {N_FILTERS} particle filters of {N_PARTICLES} particles"


def _has_exact_sum(grammar: DocumentGrammar) -> bool:
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


def estimated_losses(
    grammar: DocumentGrammar, reading: Reading
) -> tuple[Float[np.ndarray, "row position"], Float[np.ndarray, "row position"]]:
    """Return an estimate of the loss in nats of every word given its category, and its standard error.

    The random numbers of a row depend on its tokens alone.
    """
    rows = [_estimated_row(grammar, reading, row) for row in range(len(reading.tokens))]
    shape = (len(rows), 2, reading.tokens.shape[1])
    loss, error = np.moveaxis(np.array(rows).reshape(shape), 1, 0)
    return loss, error


def _estimated_row(
    grammar: DocumentGrammar, reading: Reading, row: int
) -> tuple[Float[np.ndarray, " position"], Float[np.ndarray, " position"]]:
    laws = np.zeros((3, max(grammar.sizes)))
    for category, law in enumerate(grammar.rank_probabilities):
        laws[category, : len(law)] = law
    probability = np.ones((N_FILTERS, reading.tokens.shape[1]))
    for number in range(N_FILTERS):
        _filter(
            stable_generator("particle filter", number, *reading.tokens[row].tolist()),
            reading.tokens[row],
            reading.category[row],
            reading.tie[row],
            reading.document_start[row],
            laws,
            *alias_table(laws),
            np.array(grammar.offsets),
            grammar.binding,
            N_PARTICLES,
            probability[number],
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = -np.log(probability)
        return loss.mean(axis=0), loss.std(axis=0, ddof=1) / np.sqrt(N_FILTERS)


@compiled
def _mass(law: np.ndarray, used: np.ndarray, categories: int) -> float:
    """Return the law's mass on the ranks that no category of a bit mask uses."""
    total = 0.0
    for r in range(len(law)):
        if used[r] & categories == 0:
            total += law[r]
    return total


@compiled
def _first(categories: int) -> int:
    """Return the first category of a bit mask."""
    return 0 if categories & 1 else 1 if categories & 2 else 2


@compiled
def _draw_unused(rng: np.random.Generator, laws: np.ndarray, used: np.ndarray, categories: int, mass: float) -> int:
    """Draw from the categories' law restricted to the ranks, of known mass, that none of them (a bit mask) uses."""
    law = laws[_first(categories)]  # several categories have the same law
    left = rng.random() * mass
    last = -1
    for r in range(len(law)):
        if law[r] > 0.0 and used[r] & categories == 0:
            last = r
            left -= law[r]
            if left < 0.0:
                break
    return last


@compiled
def _decide(
    r: int,
    categories: int,
    words: np.ndarray,
    laws: np.ndarray,
    rank: np.ndarray,
    used: np.ndarray,
    unused_mass: np.ndarray,
) -> None:
    """Give a rank to one word of every category of a bit mask, in one particle."""
    for c in range(3):
        if categories >> c & 1:
            rank[words[c]] = r
            used[r] |= 1 << c
            unused_mass[c] -= laws[c, r]
            if unused_mass[c] < _LEAST_TRACKED_MASS:
                unused_mass[c] = _mass(laws[c], used, 1 << c)


@compiled
def _rejuvenate(
    rng: np.random.Generator,
    history: np.ndarray,
    category_of: np.ndarray,
    n_tokens: np.ndarray,
    threshold: np.ndarray,
    alias: np.ndarray,
    laws: np.ndarray,
    rank: np.ndarray,
    used: np.ndarray,
    unused_mass: np.ndarray,
    n_draws: np.ndarray,
) -> None:
    """Move one particle by Metropolis-Hastings steps that leave its law given the words so far as it is.

    A step swaps two ranks: all words at them, so that words that are tied stay tied; where no words are ever tied, the
    words of one category. One rank is that of a random token so far, the other is drawn from the law.
    """
    separate = len(n_draws) > 1
    for _ in range(_STEPS):
        word = history[int(rng.random() * len(history))]
        g = category_of[word] if separate else 0
        r, other = rank[word], draw(rng, threshold[g], alias[g])
        if other == r:
            continue
        tokens_here = tokens_there = 0
        for k in range(len(n_tokens)):
            if not separate or category_of[k] == g:
                if rank[k] == r:
                    tokens_here += n_tokens[k]
                elif rank[k] == other:
                    tokens_there += n_tokens[k]
        here, there = laws[g, r], laws[g, other]
        forth, back = tokens_here * there + tokens_there * here, tokens_here * here + tokens_there * there
        if rng.random() * forth >= back * (there / here) ** (n_draws[g, r] - n_draws[g, other]):
            continue
        n_draws[g, r], n_draws[g, other] = n_draws[g, other], n_draws[g, r]
        for k in range(len(n_tokens)):
            if not separate or category_of[k] == g:
                if rank[k] == r:
                    rank[k] = other
                elif rank[k] == other:
                    rank[k] = r
        for c in range(3):
            bit = 1 << c
            if (separate and c != g) or (used[r] ^ used[other]) & bit == 0:
                continue
            unused_mass[c] += here - there if used[r] & bit else there - here
            used[r] ^= bit
            used[other] ^= bit
            if unused_mass[c] < _LEAST_TRACKED_MASS:
                unused_mass[c] = _mass(laws[c], used, bit)


@compiled
def _resample(rng: np.random.Generator, weight: np.ndarray) -> np.ndarray:
    """Return, for every particle, the one that it becomes: drawn by their weights, which sum to one, systematically.

    A particle that is drawn remains where it is, so that only its copies need be written.
    """
    n = len(weight)
    copies = np.zeros(n, dtype=np.int64)
    u, i, cumulative = rng.random(), 0, weight[0]
    for j in range(n):
        while cumulative < (j + u) / n and i < n - 1:
            i += 1
            cumulative += weight[i]
        copies[i] += 1
    source = np.arange(n)
    i = 0
    for j in range(n):
        if copies[j] == 0:
            while copies[i] < 2:
                i += 1
            copies[i] -= 1
            source[j] = i
    return source


@compiled
def _filter(
    rng: np.random.Generator,
    token: np.ndarray,
    category: np.ndarray,
    tie: np.ndarray,
    document_start: np.ndarray,
    laws: np.ndarray,
    threshold: np.ndarray,
    alias: np.ndarray,
    offsets: np.ndarray,
    binding: float,
    n_particles: int,
    probability: np.ndarray,
) -> None:
    """Write the estimated P(word | its category and the tokens before it) for every word of a row."""
    n_ranks = laws.shape[1]
    weight = np.empty(n_particles)
    resampled = False  # since the last rejuvenation
    # Of the document so far: its words, numbered as they occur, and of each its category and number of tokens.
    number = np.empty(offsets[CONNECTOR], dtype=np.int64)
    history, n_past = np.empty(len(token), dtype=np.int64), 0
    n_unseen, n_seen = np.empty(3, dtype=np.int64), 0
    category_of, n_tokens = np.empty((2, min(len(token), offsets[CONNECTOR])), dtype=np.int64)
    # Of every particle: the rank of every word, -1 if it has none; the categories that use a rank, as bits; the law's
    # mass on the ranks that a category does not use; how often a rank was drawn, by category if none are ever tied.
    rank = np.empty((n_particles, len(n_tokens)), dtype=np.int32)
    used = np.empty((n_particles, n_ranks), dtype=np.uint8)
    unused_mass = np.empty((n_particles, 3))
    n_draws = np.empty((n_particles, 3 if binding == 0.0 else 1, n_ranks), dtype=np.int32)
    # The last word's rank, and whether it was tied; or, if it is undecided, the words that share it (their categories
    # as bits) and the law's mass on the ranks it can be.
    last = np.empty(n_particles, dtype=np.int32)
    tied = np.empty(n_particles, dtype=np.bool_)
    pending = np.empty(n_particles, dtype=np.uint8)
    pending_word = np.empty((n_particles, 3), dtype=np.int32)
    pending_mass = np.empty(n_particles)

    for t in range(len(token)):
        if document_start[t]:
            n_past = n_seen = 0
            number[:] = -1
            resampled = False
            weight[:] = 1.0 / n_particles
            rank[:] = -1
            used[:] = 0
            n_draws[:] = 0
            pending[:] = 0
            for c in range(3):
                n_unseen[c] = offsets[c + 1] - offsets[c]
                unused_mass[:, c] = laws[c].sum()
        c = category[t]
        if c >= CONNECTOR:
            continue
        law, bit, w = laws[c], 1 << c, number[token[t]]
        g = c if binding == 0.0 else 0
        is_new = w < 0
        if is_new:
            w = n_seen
        total = 0.0
        for i in range(n_particles):
            if weight[i] == 0.0:
                continue
            if pending[i] and (tie[t] == 0 or pending[i] & bit):
                last[i] = _draw_unused(rng, laws, used[i], pending[i], pending_mass[i])
                _decide(last[i], pending[i], pending_word[i], laws, rank[i], used[i], unused_mass[i])
                n_draws[i, _first(pending[i]) if binding == 0.0 else 0, last[i]] += 1
                pending[i] = 0
            if resampled and tie[t] == 0:
                seen = category_of[:n_seen], n_tokens[:n_seen]
                particle = rank[i], used[i], unused_mass[i], n_draws[i]
                _rejuvenate(rng, history[:n_past], *seen, threshold, alias, laws, *particle)

            # The probability of the word: its rank is tied to the last with probability p_tie, else free.
            p_tie = 0.0 if tie[t] == 0 else binding if tie[t] == 1 else 1.0 if tied[i] else 0.0
            known = -1 if is_new else rank[i, w]
            p_tied = p_free = both = 0.0
            if p_tie > 0.0:
                if known >= 0:
                    if pending[i]:
                        p_tied = law[known] / pending_mass[i] if used[i, known] & pending[i] == 0 else 0.0
                    else:
                        p_tied = 1.0 if last[i] == known else 0.0
                elif pending[i]:
                    both = _mass(law, used[i], pending[i] | bit)
                    p_tied = both / pending_mass[i] / n_unseen[c]
                else:
                    p_tied = 1.0 / n_unseen[c] if used[i, last[i]] & bit == 0 else 0.0
            if p_tie < 1.0:
                p_free = law[known] if known >= 0 else unused_mass[i, c] / n_unseen[c]
            p_tied *= p_tie
            p = p_tied + (1.0 - p_tie) * p_free
            weight[i] *= p
            total += weight[i]
            if p == 0.0:
                continue

            # Given the word, draw whether it is tied, and with it what can no longer stay undecided.
            tied[i] = rng.random() * p < p_tied
            if pending[i] and not (tied[i] and known < 0):
                last[i] = known if tied[i] else _draw_unused(rng, laws, used[i], pending[i], pending_mass[i])
                _decide(last[i], pending[i], pending_word[i], laws, rank[i], used[i], unused_mass[i])
                n_draws[i, 0, last[i]] += 1
                pending[i] = 0
            if known >= 0:
                last[i] = known
                n_draws[i, g, known] += not tied[i]
            else:
                pending_word[i, c] = w
                if not tied[i]:
                    pending[i], pending_mass[i] = bit, unused_mass[i, c]
                elif pending[i]:
                    pending[i], pending_mass[i] = pending[i] | bit, both
                else:
                    _decide(last[i], bit, pending_word[i], laws, rank[i], used[i], unused_mass[i])
        probability[t] = total
        if total == 0.0:
            return

        if is_new:
            number[token[t]] = w
            category_of[w], n_tokens[w] = c, 0
            n_seen += 1
            n_unseen[c] -= 1
        history[n_past] = w
        n_past += 1
        n_tokens[w] += 1
        if tie[t] == 0:
            resampled = False
        weight /= total
        if n_particles * (weight**2).sum() > 2.0:
            source = _resample(rng, weight)
            for i in range(n_particles):
                j = source[i]
                if j != i:
                    rank[i, :n_seen], used[i], unused_mass[i] = rank[j, :n_seen], used[j], unused_mass[j]
                    n_draws[i], last[i], tied[i] = n_draws[j], last[j], tied[j]
                    pending[i], pending_word[i], pending_mass[i] = pending[j], pending_word[j], pending_mass[j]
            weight[:] = 1.0 / n_particles
            resampled = True

"""What a document says about its fresh lexicon, by sequential Monte Carlo, where no exact sum is at hand.

A particle gives ranks to words as they occur. The ranks of an open clause's new words (in flat text: of a new word and
of those tied to it) stay undecided and are summed over: until the clause ends, or the next word is not tied. Particles
are weighted by their probability of every word and resampled (systematically) when the effective sample size falls
below half.

Then every particle is moved by Metropolis-Hastings steps (Gilks & Berzuini 2001), so that an early guess of a rank can
be put right, and what no particle has kept can be found again. Whether words were tied is summed over there: given the
ranks, the probability of the text so far is, but for a constant,

    prod over words of z(rank) ** tokens  *  prod over meetings of (1 + b / ((1 - b) z(r) ** (k - 1))) ** times

where a meeting is that of the k = 3 words of a clause (in flat text: of k = 2 neighbours), b is the binding, and a factor
of the second product is 1 where the ranks are not all one, r. A step swaps two ranks of one category, one of them a
random token's, the other drawn from the law or the rank of a word that was met; or two ranks of all three categories.

Each of several independent filters gives an unbiased estimate Z of the probability of the document's tokens up to
every place (Del Moral 2004); so does their mean, in which a filter that has lost the right lexicons weighs little. The
logarithm of the mean is too low by about var(Z) / 2 filters E(Z)^2, which the jackknife takes away. log Z is about normal,
with mean -s^2/2 and variance s^2 about the truth (Berard, Del Moral & Doucet 2014), from which comes the standard error
of the document's loss, s^2/n + s^4/2(n-1) squared for n filters; that of one token's is the jackknife's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from mechhier.grammars.base import stable_generator
from mechhier.grammars.clauses import CONNECTOR
from mechhier.grammars.sampling import alias_table, compiled, draw

N_FILTERS = 16
"""Independent particle filters of an estimate."""

LEAST_PARTICLES, MOST_PARTICLES = 250, 4000
"""Particles of a filter: where the filters differ too much, a document is read again with more."""

LEAST_OF_PAIRS = 1000
"""As `LEAST_PARTICLES`, where neighbours are tied pair by pair (the flat language): with fewer, filters agree by chance too
often (16 words, binding .5: errors covered the truth in 88 of 100 rows, with these in 95)."""

TOLERANCE = 0.005
"""Standard error in nats of a row's mean loss above which more particles are taken."""

_MOVES_PER_WORD = 2  # Metropolis-Hastings steps of every particle after a resampling, for every word seen
_MOST_MOVES = 128
_ALL_CATEGORIES, _TO_A_MET_WORD = 0.25, 0.35  # shares of the kinds of steps, where words are ever tied
_LEAST_TRACKED_MASS = 1e-6  # below it, a mass that was updated by subtraction has lost too many digits
_LARGEST_LOG = 600.0  # its exponential is finite
_WIDENING = float(special.stdtrit(N_FILTERS - 1, 0.975) / special.ndtri(0.975))


class Language(NamedTuple):
    """What a filter knows of the language, as arrays."""

    laws: np.ndarray
    """Zipf laws ``[category, rank]``, 0 beyond a category's end."""
    log_laws: np.ndarray
    """Their logarithms, finite where a law is only too small for floating point."""
    log_factor: np.ndarray
    """Logarithm of a meeting's factor, for the rank that all its words have."""
    threshold: np.ndarray
    """Alias tables of the laws."""
    alias: np.ndarray
    """See ``threshold``."""
    sizes: np.ndarray
    """Words of every category."""
    binding: float
    """See :class:`DocumentGrammar`."""
    per_clause: bool
    """Whether the words of a clause are tied by one coin; else neighbours are, each pair by its own."""

    @classmethod
    def of(
        cls,
        log_laws: Float[np.ndarray, "category rank"],
        sizes: tuple[int, int, int],
        binding: float,
        hierarchical: bool,
    ) -> Language:
        """Make the arrays of a language whose laws have these logarithms."""
        laws = np.exp(log_laws)
        per_clause = hierarchical and binding > 0
        log_factor = np.zeros(log_laws.shape[1])
        if binding > 0:
            log_odds = math.log(binding) - (math.log1p(-binding) if binding < 1 else -_LARGEST_LOG)
            log_factor = np.logaddexp(0.0, log_odds - (2 if per_clause else 1) * log_laws[0])
        return cls(laws, log_laws, log_factor, *alias_table(laws), np.array(sizes), binding, per_clause)


class Estimate(NamedTuple):
    """The losses of a document's words in nats, given their categories; tokens that are not words have loss 0.

    The standard errors are widened so that 1.96 of them are a 95 % interval though the filters are few.
    """

    loss: Float[np.ndarray, " position"]
    """Loss of every token."""
    error: Float[np.ndarray, " position"]
    """Its standard error."""
    sum_error: float
    """Standard error of the sum of the losses."""


def estimate(
    language: Language,
    word: Int[np.ndarray, " position"],
    category: Int[np.ndarray, " position"],
    tie: Int[np.ndarray, " position"],
    tolerance: float,
) -> Estimate:
    """Estimate the losses of a document's words; the random numbers depend on its tokens alone.

    Args:
        language: Its language.
        word: Number of every token within its category.
        category: Category ids.
        tie: How the rank of a word depends on those before it (see :mod:`mechhier.grammars.document_predictor`).
        tolerance: Standard error of the sum above which more particles are taken, up to :data:`MOST_PARTICLES`.
    """
    n_particles = LEAST_PARTICLES if language.per_clause else LEAST_OF_PAIRS
    while True:
        log_probability = np.zeros((N_FILTERS, len(word)))
        for number in range(N_FILTERS):
            rng = stable_generator("lexicon filter", n_particles, number, *category.tolist(), *word.tolist())
            _filter(rng, language, word, category, tie, n_particles, log_probability[number])
        found = combine(log_probability)
        if found.sum_error <= tolerance or n_particles == MOST_PARTICLES:
            return found
        # The variance falls as one over the number of particles.
        excess = min(found.sum_error / tolerance, math.sqrt(MOST_PARTICLES / n_particles))
        n_particles = min(MOST_PARTICLES, n_particles * 2 ** math.ceil(2 * math.log2(excess)))


def combine(log_probability: Float[np.ndarray, "filter position"]) -> Estimate:
    """Combine what independent filters say of every token's probability given those before it, each by its evidence."""
    n = len(log_probability)
    log_evidence = log_probability.cumsum(axis=1)
    of_mean = np.logaddexp.reduce(log_evidence, axis=0) - math.log(n)
    alive = np.isfinite(log_evidence[:, -1])
    if alive.sum() < 2:  # particles are too few, or the text is impossible: then a loss is infinite
        possible = np.isfinite(of_mean)
        loss = -np.diff(np.where(possible, of_mean, 0.0), prepend=0.0)
        loss[possible.sum() :] = 0.0
        loss[possible.sum() : possible.sum() + 1] = math.inf
        return Estimate(loss, np.where(loss == 0, 0.0, math.inf), math.inf)
    all_but_one = np.array([np.logaddexp.reduce(np.delete(log_evidence, i, axis=0), axis=0) for i in range(n)])
    all_but_one -= math.log(n - 1)
    mean = n * of_mean - (n - 1) * all_but_one.mean(axis=0)
    of_token = np.diff(all_but_one, axis=1, prepend=0.0)
    if alive.all():
        variance = float(log_evidence[:, -1].var(ddof=1))
    else:  # that of a logarithm, if normal, from that of the evidence
        variance = math.log1p(float(np.exp(log_evidence[:, -1] - of_mean[-1]).var(ddof=1)))
    return Estimate(
        -np.diff(mean, prepend=0.0),
        _WIDENING * math.sqrt(n - 1) * of_token.std(axis=0),
        _WIDENING * math.sqrt(variance / n + variance**2 / (2 * (n - 1))),
    )


# -- the text so far --------------------------------------------------------------------------------------------------


class _Text(NamedTuple):
    """The words of a document so far, numbered as they occur, and their meetings."""

    history: np.ndarray
    """Words in their order."""
    category: np.ndarray
    """Category of every word."""
    n_tokens: np.ndarray
    """How often it has occurred."""
    met: np.ndarray
    """Meetings in their order, by number."""
    members: np.ndarray
    """Words of a meeting ``[meeting, 3 or 2]``, in ascending order."""
    times: np.ndarray
    """How often they have met."""
    meetings: np.ndarray
    """Meetings of a word ``[word, ...]``."""
    n_meetings: np.ndarray
    """How many different ones it has."""


@compiled
def _note_meeting(text: _Text, words: np.ndarray, n_met: int, n_kinds: int) -> int:
    """Count a meeting of words; return how many different meetings there are now."""
    words = np.sort(words)
    kind = n_kinds
    for k in range(text.n_meetings[words[0]]):
        other = text.meetings[words[0], k]
        same = True
        for m in range(len(words)):
            same &= text.members[other, m] == words[m]
        if same:
            kind = other
    if kind == n_kinds:
        n_kinds += 1
        text.members[kind], text.times[kind] = words, 0
        for m in range(len(words)):
            text.meetings[words[m], text.n_meetings[words[m]]] = kind
            text.n_meetings[words[m]] += 1
    text.times[kind] += 1
    text.met[n_met] = kind
    return n_kinds


# -- ranks of a particle ------------------------------------------------------------------------------------------------
#
# `rank` is the rank of every word, -1 if it has none; `holder` the word that has a rank, [category, rank], -1 if none;
# `unused_mass` a category's law's mass on the ranks that none has. Several categories are a bit mask.


@compiled
def _is_free(holder: np.ndarray, r: int, categories: int) -> bool:
    """Whether no word of the categories has the rank."""
    used = (holder[0, r] >= 0) | (holder[1, r] >= 0) << 1 | (holder[2, r] >= 0) << 2
    return used & categories == 0


@compiled
def _free_mass(law: np.ndarray, holder: np.ndarray, categories: int) -> float:
    """Return the law's mass on the ranks that no word of the categories has."""
    total = 0.0
    for r in range(len(law)):
        if _is_free(holder, r, categories):
            total += law[r]
    return total


@compiled
def _draw_free(rng: np.random.Generator, law: np.ndarray, holder: np.ndarray, categories: int, mass: float) -> int:
    """Draw from a law restricted to the ranks, of known mass, that no word of the categories has."""
    left = rng.random() * mass
    last = -1
    for r in range(len(law)):
        if law[r] > 0.0 and _is_free(holder, r, categories):
            last = r
            left -= law[r]
            if left < 0.0:
                break
    return last


@compiled
def _subtract(laws: np.ndarray, c: int, mass: float, holder: np.ndarray, unused_mass: np.ndarray) -> None:
    unused_mass[c] -= mass
    if unused_mass[c] < _LEAST_TRACKED_MASS:
        unused_mass[c] = _free_mass(laws[c], holder, 1 << c)


@compiled
def _decide(
    r: int,
    categories: int,
    words: np.ndarray,
    laws: np.ndarray,
    rank: np.ndarray,
    holder: np.ndarray,
    unused_mass: np.ndarray,
) -> None:
    """Give a rank to one word of each of the categories."""
    for c in range(3):
        if categories >> c & 1:
            rank[words[c]] = r
            holder[c, r] = words[c]
            _subtract(laws, c, laws[c, r], holder, unused_mass)


@compiled
def _swap(
    c: int, r: int, other: int, laws: np.ndarray, rank: np.ndarray, holder: np.ndarray, unused_mass: np.ndarray
) -> None:
    """Swap two ranks of a category, whether words have them or not."""
    here, there = holder[c, r], holder[c, other]
    holder[c, r], holder[c, other] = there, here
    if here >= 0:
        rank[here] = other
    if there >= 0:
        rank[there] = r
    if here >= 0 > there:
        _subtract(laws, c, laws[c, other] - laws[c, r], holder, unused_mass)
    elif there >= 0 > here:
        _subtract(laws, c, laws[c, r] - laws[c, other], holder, unused_mass)


# -- moves ----------------------------------------------------------------------------------------------------------------


@compiled
def _rejuvenate(
    rng: np.random.Generator,
    language: Language,
    text: _Text,
    n_past: int,
    n_met: int,
    n_moves: int,
    rank: np.ndarray,
    holder: np.ndarray,
    unused_mass: np.ndarray,
) -> None:
    """Move one particle by steps that leave the law of the ranks given the text so far as it is."""
    laws, log_laws, log_factor = (
        language.laws,
        language.log_laws,
        language.log_factor,
    )  # names: indexing a tuple is slow
    threshold, alias = language.threshold, language.alias
    history, category_of, n_tokens, met = text.history, text.category, text.n_tokens, text.met
    members, times, meetings, n_meetings = text.members, text.times, text.meetings, text.n_meetings
    p_all = _ALL_CATEGORIES if n_met > 0 else 0.0
    p_met = _TO_A_MET_WORD if n_met > 0 else 0.0
    n_members = members.shape[1]
    by_law = (1.0 - p_all - p_met) / n_past
    by_meeting = p_met / (n_met * n_members * (n_members - 1)) if n_met > 0 else 0.0
    for _ in range(n_moves):
        u = rng.random()
        if p_all <= u < p_all + p_met:
            meeting = met[int(rng.random() * n_met)]
            i = int(rng.random() * n_members)
            j = (i + 1 + int(rng.random() * (n_members - 1))) % n_members
            word = members[meeting, i]
            c, r, other = category_of[word], int(rank[word]), int(rank[members[meeting, j]])
        else:
            word = history[int(rng.random() * n_past)]
            c, r = category_of[word], int(rank[word])
            other = int(draw(rng, threshold[c], alias[c]))
        if r == other:
            continue
        n_here = n_there = 0
        change = 0.0
        if u < p_all:
            gain = log_factor[other] - log_factor[r]
            for category in range(3):
                here, there = holder[category, r], holder[category, other]
                if here >= 0:
                    n_here += n_tokens[here]
                    change += gain * _unions(here, members, times, meetings, n_meetings, rank)
                if there >= 0:
                    n_there += n_tokens[there]
                    change -= gain * _unions(there, members, times, meetings, n_meetings, rank)
            forth = n_here * laws[c, other] + n_there * laws[c, r]
            back = n_here * laws[c, r] + n_there * laws[c, other]
        else:
            ways_forth = ways_back = 0  # by which a word gets the rank of a word it met, and loses it
            for side in range(2):
                word, now, then = (holder[c, r], r, other) if side == 0 else (holder[c, other], other, r)
                if word < 0:
                    continue
                if side == 0:
                    n_here = n_tokens[word]
                else:
                    n_there = n_tokens[word]
                for k in range(n_meetings[word]):
                    meeting = meetings[word, k]
                    n_now = n_then = 0
                    for m in range(n_members):
                        if members[meeting, m] != word:
                            its_rank = rank[members[meeting, m]]
                            n_now += its_rank == now
                            n_then += its_rank == then
                    ways_forth += times[meeting] * n_then
                    ways_back += times[meeting] * n_now
                    if n_now == n_members - 1:
                        change -= times[meeting] * log_factor[now]
                    elif n_then == n_members - 1:
                        change += times[meeting] * log_factor[then]
            forth = by_law * (n_here * laws[c, other] + n_there * laws[c, r]) + by_meeting * ways_forth
            back = by_law * (n_here * laws[c, r] + n_there * laws[c, other]) + by_meeting * ways_back
        change += (n_here - n_there) * (log_laws[c, other] - log_laws[c, r])
        if rng.random() * forth >= back * math.exp(min(change, _LARGEST_LOG)):
            continue
        for category in range(3) if u < p_all else range(c, c + 1):
            _swap(category, r, other, laws, rank, holder, unused_mass)


@compiled
def _unions(
    word: int, members: np.ndarray, times: np.ndarray, meetings: np.ndarray, n_meetings: np.ndarray, rank: np.ndarray
) -> int:
    """Return how often the words of meetings whose first is this one met, where they now have one rank."""
    total = 0
    for k in range(n_meetings[word]):
        meeting = meetings[word, k]
        if members[meeting, 0] == word:
            one = True
            for m in range(1, members.shape[1]):
                one &= rank[members[meeting, m]] == rank[word]
            if one:
                total += int(times[meeting])
    return total


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


# -- the filter -------------------------------------------------------------------------------------------------------------


class _Particles(NamedTuple):
    """The state of every particle: its ranks (see above), and what is undecided of the clause or run being read."""

    rank: np.ndarray
    holder: np.ndarray
    unused_mass: np.ndarray
    undecided: np.ndarray
    """Categories of the words without a rank, as bits."""
    words: np.ndarray
    """Those words ``[particle, category]``."""
    together: np.ndarray
    """Of a clause: the probability of its words so far, if tied. Of a run: the mass of the ranks the undecided can have."""
    apart: np.ndarray
    """Of a clause: the probability of its words so far, if not tied."""
    last: np.ndarray
    """Of a clause: the rank of all its words that have one, -1 if none has, -2 if they differ. Of a run: the last rank."""


@compiled
def _read_word_of_clause(
    rng: np.random.Generator,
    language: Language,
    particles: _Particles,
    i: int,
    place: int,
    c: int,
    w: int,
    is_new: bool,
    n_unseen: np.ndarray,
    share: float,
) -> float:
    """Read the next word of a clause in one particle; return its probability.

    Args:
        rng: Source of randomness.
        language: The language.
        particles: All particles.
        i: Which.
        place: 0, 1 or 2: the word's place in its clause.
        c: The word's category.
        w: The word.
        is_new: Whether it has not occurred before.
        n_unseen: Words of every category that have not occurred before the clause.
        share: Probability that the clause's new words are these, of those not seen.
    """
    laws, binding = language.laws, language.binding
    rank, holder, unused_mass = particles.rank[i], particles.holder[i], particles.unused_mass[i]
    before = 1.0
    if place == 0:
        particles.undecided[i], particles.apart[i], particles.last[i] = 0, 1.0, -1
    elif place == 1:
        before = particles.apart[i]
    else:
        before = binding * particles.together[i] + (1.0 - binding) * particles.apart[i]
    if is_new:
        particles.undecided[i] |= 1 << c
        particles.words[i, c] = w
        particles.apart[i] *= unused_mass[c] / n_unseen[c]
    else:
        particles.apart[i] *= laws[c, rank[w]]
        particles.last[i] = rank[w] if particles.last[i] == -1 or particles.last[i] == rank[w] else -2
    r, undecided = particles.last[i], particles.undecided[i]
    if r == -1:
        particles.together[i] = _free_mass(laws[c], holder, undecided) * share
    elif r >= 0 and _is_free(holder, r, undecided):
        particles.together[i] = laws[c, r] * share
    else:
        particles.together[i] = 0.0
    if place == 0:
        return particles.apart[i]
    tied = binding * particles.together[i]
    now = tied + (1.0 - binding) * particles.apart[i]
    if place == 2 and undecided and now > 0.0:
        if rng.random() * now < tied:
            if r == -1:
                r = _draw_free(rng, laws[c], holder, undecided, particles.together[i] / share)
            _decide(r, undecided, particles.words[i], laws, rank, holder, unused_mass)
        else:
            for k in range(3):
                if undecided >> k & 1:
                    r = _draw_free(rng, laws[k], holder, 1 << k, unused_mass[k])
                    _decide(r, 1 << k, particles.words[i], laws, rank, holder, unused_mass)
    return now / before


@compiled
def _read_word_of_run(
    rng: np.random.Generator,
    language: Language,
    particles: _Particles,
    i: int,
    tie: int,
    c: int,
    w: int,
    is_new: bool,
    n_unseen: np.ndarray,
) -> float:
    """Read a word of flat text in one particle; return its probability. ``tie``: whether a word is right before it."""
    law, bit = language.laws[c], 1 << c
    rank, holder, unused_mass = particles.rank[i], particles.holder[i], particles.unused_mass[i]
    p_tie = language.binding if tie else 0.0
    undecided = particles.undecided[i]
    if undecided & bit:  # of another word, whose rank it cannot have, or of this one, which thus gets its rank
        _settle(rng, language.laws, particles, i)
        undecided = 0
    known = -1 if is_new else rank[w]
    p_tied = p_free = mass = 0.0
    if p_tie > 0.0:
        if undecided:
            if known >= 0:
                p_tied = law[known] / particles.together[i] if _is_free(holder, known, undecided) else 0.0
            else:
                mass = _free_mass(law, holder, undecided | bit)
                p_tied = mass / particles.together[i] / n_unseen[c]
        elif known >= 0:
            p_tied = 1.0 if particles.last[i] == known else 0.0
        else:
            p_tied = 1.0 / n_unseen[c] if holder[c, particles.last[i]] < 0 else 0.0
    if p_tie < 1.0:
        p_free = law[known] if known >= 0 else unused_mass[c] / n_unseen[c]
    p_tied *= p_tie
    p = p_tied + (1.0 - p_tie) * p_free
    if p == 0.0:
        return 0.0

    # Given the word, draw whether it is tied, and with it what can no longer stay undecided.
    tied = rng.random() * p < p_tied
    if undecided and tied and known >= 0:
        _decide(known, undecided, particles.words[i], language.laws, rank, holder, unused_mass)
        particles.undecided[i] = 0
    elif undecided and not tied:
        _settle(rng, language.laws, particles, i)
    if known >= 0:
        particles.last[i] = known
        return p
    particles.words[i, c] = w
    if not tied:
        particles.undecided[i], particles.together[i] = bit, unused_mass[c]
    elif undecided:
        particles.undecided[i], particles.together[i] = undecided | bit, mass
    else:
        _decide(particles.last[i], bit, particles.words[i], language.laws, rank, holder, unused_mass)
    return p


@compiled
def _settle(rng: np.random.Generator, laws: np.ndarray, particles: _Particles, i: int) -> None:
    """Draw the rank of a run's undecided words in one particle."""
    rank, holder, unused_mass = particles.rank[i], particles.holder[i], particles.unused_mass[i]
    undecided = particles.undecided[i]
    first = 0 if undecided & 1 else 1 if undecided & 2 else 2  # several categories have the same law
    r = _draw_free(rng, laws[first], holder, undecided, particles.together[i])
    _decide(r, undecided, particles.words[i], laws, rank, holder, unused_mass)
    particles.last[i] = r
    particles.undecided[i] = 0


@compiled
def _filter(
    rng: np.random.Generator,
    language: Language,
    word: np.ndarray,
    category: np.ndarray,
    tie: np.ndarray,
    n_particles: int,
    log_probability: np.ndarray,
) -> None:
    """Write the estimated log P(word | its category and the tokens before it) for every word of a document."""
    n, n_ranks = len(word), language.laws.shape[1]
    n_most = min(n, language.sizes.sum())
    n_members = 3 if language.per_clause else 2
    text = _Text(
        np.empty(n, dtype=np.int64),
        np.empty(n_most, dtype=np.int64),
        np.zeros(n_most, dtype=np.int64),
        np.empty(n, dtype=np.int64),
        np.empty((n, n_members), dtype=np.int64),
        np.empty(n, dtype=np.int64),
        np.empty((n_most, n), dtype=np.int64),
        np.zeros(n_most, dtype=np.int64),
    )
    particles = _Particles(
        np.full((n_particles, n_most), -1, dtype=np.int32),
        np.full((n_particles, 3, n_ranks), -1, dtype=np.int32),
        np.ones((n_particles, 3)),
        np.zeros(n_particles, dtype=np.int64),
        np.empty((n_particles, 3), dtype=np.int64),
        np.empty(n_particles),
        np.empty(n_particles),
        np.empty(n_particles, dtype=np.int64),
    )
    number = np.full((3, n_ranks), -1, dtype=np.int64)  # of a word, in the order in which they occur
    n_unseen = language.sizes.copy()
    n_past = n_seen = n_met = n_kinds = 0
    share = 1.0
    weight = np.full(n_particles, 1.0 / n_particles)
    resampled = False  # since the last rejuvenation
    for t in range(n):
        c = category[t]
        if c >= CONNECTOR:
            continue
        w = int(number[c, word[t]])
        is_new = bool(w < 0)
        if is_new:
            w = n_seen
        if tie[t] == 0:
            share = 1.0
        if is_new:
            share /= n_unseen[c]
        n_moves = min(_MOVES_PER_WORD * n_seen, _MOST_MOVES)
        total = 0.0
        for i in range(n_particles):
            if weight[i] == 0.0:
                continue
            if tie[t] == 0:
                if not language.per_clause and particles.undecided[i]:
                    _settle(rng, language.laws, particles, i)
                if resampled:
                    ranks = particles.rank[i], particles.holder[i], particles.unused_mass[i]
                    _rejuvenate(rng, language, text, n_past, n_met, n_moves, *ranks)
            if language.per_clause:
                p = _read_word_of_clause(rng, language, particles, i, tie[t], c, w, is_new, n_unseen, share)
            else:
                p = _read_word_of_run(rng, language, particles, i, tie[t], c, w, is_new, n_unseen)
            weight[i] *= p
            total += weight[i]
        if total == 0.0:
            log_probability[t] = -np.inf
            return
        log_probability[t] = math.log(total)
        weight /= total
        if tie[t] == 0:
            resampled = False

        if is_new:
            number[c, word[t]], text.category[w] = w, c
            n_seen += 1
            n_unseen[c] -= 1
        text.history[n_past] = w
        text.n_tokens[w] += 1
        n_past += 1
        if language.binding > 0.0 and tie[t] == n_members - 1:
            n_kinds = _note_meeting(text, text.history[n_past - n_members : n_past], n_met, n_kinds)
            n_met += 1
        # Of a clause that is being read more is known than its ranks.
        if (not language.per_clause or tie[t] == 2) and n_particles * (weight**2).sum() > 2.0:
            source = _resample(rng, weight)
            for i in range(n_particles):
                j = source[i]
                if j != i:
                    particles.rank[i, :n_seen], particles.holder[i] = particles.rank[j, :n_seen], particles.holder[j]
                    particles.unused_mass[i], particles.words[i] = particles.unused_mass[j], particles.words[j]
                    particles.undecided[i], particles.together[i] = particles.undecided[j], particles.together[j]
                    particles.last[i] = particles.last[j]
            weight[:] = 1.0 / n_particles
            resampled = True

"""What a text says about a fresh lexicon, against enumeration of every lexicon of a small vocabulary."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechhier.grammars import document_predictor, lexicon_filter, lexicon_inference
from mechhier.grammars.document import DocumentGrammar

SHORT = {"n_connectors": 1, "n_sections": 1, "n_paragraphs": 1, "n_sentences": 4, "max_clauses": 2}


def language(n_words, **fields):
    return DocumentGrammar(n_words=n_words, lexicon="per_document", **(SHORT | fields))


def losses_by_enumeration(grammar, tokens):
    """-log P(word | its category, the tokens before) for every word of a row, summed over all lexicons."""
    starts = np.cumsum((0, *grammar.sizes)).tolist()
    laws = [np.arange(1.0, n + 1) ** -grammar.zipf for n in grammar.sizes]
    laws = [law / law.sum() for law in laws]
    lexicons = list(itertools.product(*(itertools.permutations(range(n)) for n in grammar.sizes)))
    ranks = np.array([sum(lexicon, ()) for lexicon in lexicons]).T  # of every word, in every lexicon
    losses, ended = [], 0
    weights, run = np.ones(len(lexicons)), []  # the run: categories and ranks since the last connector or <eos>
    for token in tokens:
        if token >= starts[3]:
            losses.append(0.0)
            run = []
            ended += token == grammar.eos_token_id
            if ended == grammar.sentences_per_document:
                weights, ended = np.ones(len(lexicons)), 0
            continue
        category = sum(token >= start for start in starts[1:3])
        before = probability_of_run(run, laws, grammar.binding, grammar.hierarchical)
        run = [*run, (category, ranks[token])]
        after = probability_of_run(run, laws, grammar.binding, grammar.hierarchical)
        after = weights * np.divide(after, before, out=np.zeros(len(lexicons)), where=after > 0)
        losses.append(-math.log(after.sum() / weights.sum()))
        weights = after
    return losses


def probability_of_run(ranks, laws, b, hierarchical):
    """P(the ranks of a run), under every lexicon."""
    free = [laws[c][r] for c, r in ranks]
    if len(ranks) < 2:
        return free[0] if ranks else 1.0
    if hierarchical:  # one coin for all
        together = free[0] * np.all([r == ranks[0][1] for _, r in ranks], axis=0)
        return b * together + (1 - b) * np.prod(free, axis=0)
    p = free[0]
    for i in range(1, len(ranks)):  # a coin for each
        p = p * (b * (ranks[i][1] == ranks[i - 1][1]) + (1 - b) * free[i])
    return p


def read(grammar, n_rows, context, seed=0):
    sample = grammar.generate(n_rows, context, np.random.default_rng(seed))
    return sample, document_predictor.read(grammar, sample.tokens)


EXACT = {
    "hierarchical": language(3),
    "unequal sizes": language((4, 1, 2), zipf=0.6, p_chain=0.3),
    "uniform law": language(3, zipf=0.0),
    "steep law": language(3, zipf=6.0),
    "flat": language(3, hierarchical=False),
    "clauses of one rank": language(3, binding=1.0),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_losses_equal_enumeration_of_all_lexicons(name):
    grammar = EXACT[name]
    sample, reading = read(grammar, 3, 40)
    loss, done = lexicon_inference.exact_losses(grammar, reading)
    assert done.all()
    for row, tokens in enumerate(sample.tokens.tolist()):
        np.testing.assert_allclose(loss[row], losses_by_enumeration(grammar, tokens), atol=1e-10)
    assert sample.labels["document"].max() >= 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.floats(0, 3))
def test_the_moment_is_the_mean_over_permutations(counts, exponent):
    n = len(counts)
    law = [(r + 1) ** -exponent for r in range(n)]
    law = [weight / sum(law) for weight in law]
    mean = sum(
        math.prod(Fraction(law[r]) ** k for r, k in zip(permutation, counts, strict=True))
        for permutation in itertools.permutations(range(n))
    )
    words_of_count = np.bincount(counts, minlength=8)
    result, _ = lexicon_inference._log_moment(words_of_count, np.log(law), math.inf)
    expected = math.log(mean.numerator) - math.log(mean.denominator)
    assert result == pytest.approx(expected, abs=1e-10)


def test_the_moment_of_huge_counts_neither_over_nor_underflows():
    counts, n = [900, 700, 20, 3], 40
    log_law = -2.5 * np.log(np.arange(1, n + 1))
    log_law -= np.log(np.exp(log_law).sum())
    words_of_count = np.bincount([*counts, *[0] * (n - 4)])
    result, _ = lexicon_inference._log_moment(words_of_count, log_law, math.inf)
    # The two commonest surely have the best ranks (the next best is (2/3)^1750 times less likely): 38 ranks are left.
    rest = sum(
        Fraction(math.exp(log_law[i])) ** 20 * Fraction(math.exp(log_law[j])) ** 3
        for i in range(2, n)
        for j in range(2, n)
        if i != j
    )
    expected = (
        900 * log_law[0] + 700 * log_law[1] + math.lgamma(37) + math.log(rest.numerator) - math.log(rest.denominator)
    )
    assert result == pytest.approx(expected, rel=1e-12)


def test_the_moment_of_very_many_assignments_does_not_overflow():
    n = 3000
    words_of_count = np.array([n - 310, 300, 10])  # about 10^440 ways to choose the ranks
    result, _ = lexicon_inference._log_moment(words_of_count, np.full(n, -math.log(n)), math.inf)
    assert result == pytest.approx(math.lgamma(n + 1) - 320 * math.log(n), rel=1e-12)


@pytest.mark.parametrize("hierarchical", [True, False])
def test_next_token_probabilities_sum_to_one_and_agree_with_the_losses(hierarchical):
    grammar = DocumentGrammar(n_words=(12, 7, 9), lexicon="per_document", n_sections=1, hierarchical=hierarchical)
    sample = grammar.generate(3, 150, np.random.default_rng(0))
    probabilities = grammar.next_token_probabilities(sample.tokens)
    np.testing.assert_allclose(probabilities.sum(axis=2), 1, atol=1e-11)
    observed = np.take_along_axis(probabilities, sample.tokens[:, :, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(-np.log(observed), grammar.ideal_loss(sample).estimate, atol=1e-9)
    assert sample.labels["document"].max() >= 1


def test_the_ideal_loss_of_fresh_lexicons_falls_within_a_document_and_rises_at_the_next():
    grammar = DocumentGrammar(lexicon="per_document", n_sections=1, max_clauses=1)  # every document: 32 tokens
    loss = grammar.ideal_loss(grammar.generate(300, 64, np.random.default_rng(0))).estimate.mean(axis=0)
    assert loss[2] == loss[34] == pytest.approx(math.log(30))
    assert loss[30] < loss[2] - 0.2
    assert loss[62] < loss[34] - 0.2


@pytest.mark.parametrize("hierarchical", [True, False])
@pytest.mark.parametrize("binding", [0.0, 0.5, 1.0])
def test_particle_filters_agree_with_enumeration_within_their_error(hierarchical, binding):
    grammar = language(3, binding=binding, zipf=1.5, hierarchical=hierarchical)
    sample, reading = read(grammar, 3, 40, seed=4)
    found = lexicon_inference.estimated_losses(grammar, reading)
    expected = np.array([losses_by_enumeration(grammar, tokens) for tokens in sample.tokens.tolist()])
    assert (np.abs((found.loss - expected).sum(axis=1)) <= 3 * found.sum_error).all()
    assert (found.sum_error < 0.1).all()
    assert (np.abs(found.loss - expected) <= 3 * found.error + 1e-9).mean() > 0.95
    assert not found.error[reading.category >= 3].any()


@pytest.mark.parametrize("grammar", [{"n_words": (9, 30, 20)}, {"n_words": 40, "binding": 1.0}])
def test_particle_filters_agree_with_the_exact_sum_over_many_words(grammar):
    grammar = DocumentGrammar(**grammar, lexicon="per_document")
    _, reading = read(grammar, 2, 192)
    exact = lexicon_inference.exact_losses(grammar, reading)[0]
    found = lexicon_inference.estimated_losses(grammar, reading)
    assert (np.abs((found.loss - exact).sum(axis=1)) <= 3 * found.sum_error).all()
    assert (found.sum_error / 192 < 0.006).all()
    assert np.abs(found.loss - exact).mean() < 2 * found.error.mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_words", "hierarchical", "binding"),
    [(3, True, 0.3), (4, True, 0.5), (4, True, 0.9), (3, False, 0.9), (4, False, 0.5), (4, False, 0.3)],
)
def test_intervals_of_estimates_cover_the_sum_over_all_lexicons_in_95_of_100_rows(n_words, hierarchical, binding):
    grammar = DocumentGrammar(n_words=n_words, binding=binding, hierarchical=hierarchical)
    sample, reading = read(grammar, 100, 64, seed=7)
    found = lexicon_inference.estimated_losses(grammar, reading)
    exact = np.array([losses_by_enumeration(grammar, tokens) for tokens in sample.tokens.tolist()])
    wrong, error = (found.loss - exact).sum(axis=1), found.sum_error
    assert (np.abs(wrong) <= 1.96 * error).sum() >= 89  # fewer in 1 of 100 simulations if 95 are expected
    assert (np.abs(wrong) <= 5 * error).all()
    assert abs(wrong.mean()) < 3.5 * np.sqrt((error**2).mean() / len(wrong))
    assert np.sqrt((error**2).mean()) / 63 < 0.003
    tokens = found.error > 1e-6  # else exact, but for rounding
    covered = np.abs(found.loss - exact)[tokens] <= 1.96 * found.error[tokens]
    assert 0.85 < covered.mean() < 0.99


def test_filters_that_differ_too_much_get_more_particles(monkeypatch):
    grammar = DocumentGrammar(n_words=12, binding=0.5)
    _, reading = read(grammar, 1, 48)
    monkeypatch.setattr(lexicon_filter, "TOLERANCE", math.inf)
    before = lexicon_inference.estimated_losses(grammar, reading)
    monkeypatch.setattr(lexicon_filter, "TOLERANCE", 0.7 * before.sum_error[0] / 48)
    after = lexicon_inference.estimated_losses(grammar, reading)
    assert after.sum_error[0] < 0.75 * before.sum_error[0]
    assert abs(after.loss.sum() - before.loss.sum()) < 4 * before.sum_error[0]


@pytest.mark.parametrize("spread", [0.2, 0.5, 1.0])
def test_combined_log_normal_evidence_has_little_bias_and_intervals_that_cover(spread):
    rng = np.random.default_rng(0)
    log_evidence = rng.normal(-(spread**2) / 2, spread, (2000, lexicon_filter.N_FILTERS, 1))  # of a probability 1
    found = [lexicon_filter.combine(one) for one in log_evidence]
    loss, error = np.array([one.loss[0] for one in found]), np.array([one.sum_error for one in found])
    assert abs(loss.mean()) < 0.1 * error.mean()
    assert 0.92 < (np.abs(loss) <= 1.96 * error).mean() < 0.975


def test_a_filter_that_has_lost_the_right_lexicons_hardly_weighs():
    log_probability = np.log(np.full((lexicon_filter.N_FILTERS, 3), 0.5))
    log_probability[0, 1:] = -10.0, -0.01
    weighed = math.log(2) + math.log(16 / 15)  # it says that the token is all but impossible: one of 16
    found = lexicon_filter.combine(log_probability)
    np.testing.assert_allclose(found.loss, [math.log(2), weighed, math.log(2)], atol=5e-3)
    assert -log_probability[:, 1].mean() > weighed + 0.5  # what the mean of the logarithms would be
    assert found.sum_error > 0.5
    log_probability[0, 1] = -np.inf
    np.testing.assert_allclose(lexicon_filter.combine(log_probability).loss[1:], [weighed, math.log(2)], atol=5e-3)
    log_probability[:, 1] = -np.inf
    assert lexicon_filter.combine(log_probability).loss.tolist() == [pytest.approx(math.log(2)), math.inf, 0]


@pytest.mark.parametrize("hierarchical", [True, False])
@pytest.mark.parametrize("binding", [0.0, 0.5])
def test_the_ideal_loss_lies_between_its_bounds_on_average(hierarchical, binding):
    grammar = DocumentGrammar(lexicon="per_document", binding=binding, hierarchical=hierarchical)
    loss = grammar.ideal_loss(grammar.generate(4, 96, np.random.default_rng(1)))
    assert loss.method.startswith("exact" if binding == 0 else "estimate")
    assert loss.lower.mean() + 0.05 < loss.estimate.mean() < loss.upper.mean() - 0.05


@pytest.mark.parametrize("hierarchical", [True, False])
@pytest.mark.parametrize("binding", [0.3, 0.8, 1.0])
def test_the_ideal_loss_of_few_words_is_exact_whatever_the_binding(hierarchical, binding):
    grammar = language(3, binding=binding, hierarchical=hierarchical)
    sample = grammar.generate(2, 40, np.random.default_rng(1))
    loss = grammar.ideal_loss(sample)
    expected = [losses_by_enumeration(grammar, tokens) for tokens in sample.tokens.tolist()]
    structure = loss.upper - np.where(grammar.token_categories[sample.tokens] < 3, math.log(3), 0)
    np.testing.assert_allclose(loss.estimate, structure + expected, atol=1e-9)
    assert loss.method.startswith("exact")
    assert not loss.error.any()
    assert not loss.mean_error.any()


def test_an_estimate_depends_on_its_row_alone():
    grammar = language(5, binding=0.5)
    _, reading = read(grammar, 3, 24)
    both = lexicon_inference.estimated_losses(grammar, reading)[0]
    alone = lexicon_inference.estimated_losses(grammar, document_predictor.read(grammar, reading.tokens[2:]))[0]
    np.testing.assert_array_equal(both[2], alone[0])


def test_rows_that_are_too_long_for_the_exact_sum_are_estimated(monkeypatch):
    grammar = DocumentGrammar(n_words=20, lexicon="per_document")
    sample = grammar.generate(2, 80, np.random.default_rng(0))
    sample.tokens[1] = np.tile(sample.tokens[1, :4], 20)  # one clause again and again: few kinds of counts
    sample.tokens[1, 3::4] = grammar.eos_token_id
    exact = grammar.ideal_loss(sample).estimate
    monkeypatch.setattr(lexicon_inference, "MAX_OPERATIONS", 30_000)
    loss = grammar.ideal_loss(sample)
    assert "1 of 2 rows" in loss.method
    assert loss.error[0].any()
    assert not loss.error[1].any()
    np.testing.assert_array_equal(loss.estimate[1], exact[1])
    assert loss.estimate[0].mean() == pytest.approx(exact[0].mean(), abs=0.02)
    with pytest.raises(ValueError, match="row 0: the exact sum over all lexicons needs more than 3e"):
        grammar.next_token_probabilities(sample.tokens)


def test_text_that_no_lexicon_allows_is_refused_with_its_place():
    for n_words, hierarchical in ((3, True), (3, False), (6, False)):
        grammar = language(n_words, binding=1.0, hierarchical=hierarchical)
        sample = grammar.generate(1, 8, np.random.default_rng(0))
        names = ["s0", "v0", "o0", "<eos>", "s0", "v0", "o1", "<eos>"]
        sample.tokens[0] = [grammar.vocabulary.index(name) for name in names]
        with pytest.raises(ValueError, match="row 0, position 6: the text has probability 0 under every lexicon"):
            grammar.ideal_loss(sample)


def test_bound_words_of_fresh_lexicons_have_no_exact_prediction_and_the_message_says_what_there_is():
    with pytest.raises(ValueError, match=r"needs binding=0; ideal_loss"):
        language(3, binding=0.5).next_token_probabilities(np.array([[0, 3]]))

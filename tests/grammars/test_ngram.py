"""The n-gram language against its definition, written once more in plain Python integers and lists."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from mechhier.grammars import NGram, Sample
from mechhier.specs import SpecError

MASK = 2**64 - 1


def row_of_history(grammar, history):
    """Table row of a history: a polynomial hash and splitmix64's finalizer, in Python integers."""
    x = sum((token + 1) * pow(6364136223846793005, i, 2**64) for i, token in enumerate(history)) & MASK
    x ^= int(grammar._salt)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return (x ^ (x >> 31)) % grammar.n_rows


def order_weights(grammar):
    weights = [(i + 1) ** -grammar.order_exponent for i in range(len(grammar.orders))]
    return [weight / sum(weights) for weight in weights]


def predict(grammar, history):
    """Next-token distribution after the tokens of the current document."""
    left = grammar.min_length + grammar.max_extra - len(history)
    p_eos = 0.0 if len(history) < grammar.min_length else 1 / (left + 1)
    words = np.zeros(grammar.vocab_size - 1)
    for order, weight in zip(grammar.orders, order_weights(grammar), strict=True):
        words += weight * grammar.rows[row_of_history(grammar, history[max(0, len(history) - order) :])]
    return np.append((1 - p_eos) * words, p_eos)


def documents(tokens, eos):
    """Split a row into documents without their <eos>; the last one may be cut."""
    parts = [[]]
    for token in tokens:
        if token == eos:
            parts.append([])
        else:
            parts[-1].append(int(token))
    return parts


grammars = st.builds(
    NGram,
    n_tokens=st.integers(2, 9),
    n_rows=st.integers(1, 20),
    orders=st.sampled_from([(1,), (1, 2, 4), (3, 1), (200,)]),
    min_length=st.integers(1, 6),
    max_extra=st.integers(0, 7),
    language_seed=st.integers(0, 5),
)


@settings(max_examples=50, deadline=None)
@given(grammars, st.integers(4, 60), st.booleans(), st.integers(0, 99))
def test_every_row_is_a_text_of_the_language_and_labels_say_what_the_definition_says(grammar, context, packed, seed):
    sample = grammar.generate(3, context, np.random.default_rng(seed), packed=packed)
    rows = [sample.tokens.ravel()] if packed else list(sample.tokens)
    expected = {name: [] for name in ("category", "document", "position", "row")}
    order_labels = iter(sample.labels["order"].ravel())
    for row in rows:
        texts = documents(row, grammar.eos_token_id)
        for text in texts[:-1]:
            assert grammar.min_length <= len(text) <= grammar.min_length + grammar.max_extra
        assert len(texts[-1]) <= grammar.min_length + grammar.max_extra
        for number, text in enumerate(texts):
            for position in range(len(text) + (number + 1 < len(texts))):
                is_eos = position == len(text)
                order = next(order_labels)
                assert (order == -1) if is_eos else (order in grammar.orders)
                history = text[max(0, position - order) : position]
                expected["category"].append(int(is_eos))
                expected["document"].append(number)
                expected["position"].append(position)
                expected["row"].append(-1 if is_eos else row_of_history(grammar, history))
    for name, values in expected.items():
        shaped = np.array(values).reshape(3, context)
        if name == "document":
            shaped = shaped - shaped[:, :1]
        np.testing.assert_array_equal(sample.labels[name], shaped)


@pytest.mark.parametrize("orders", [(1,), (1, 2, 4), (4, 1), (64,)])
def test_next_token_probabilities_and_losses_equal_the_definition_across_documents(orders):
    grammar = NGram(n_tokens=6, n_rows=11, orders=orders, min_length=3, max_extra=4)
    sample = grammar.generate(6, 40, np.random.default_rng(0))
    expected = np.zeros((6, 40, 6))
    for row, tokens in enumerate(sample.tokens):
        history = []
        for t, token in enumerate(tokens):
            expected[row, t] = predict(grammar, history)
            history = [] if token == grammar.eos_token_id else [*history, int(token)]
    np.testing.assert_allclose(grammar.next_token_probabilities(sample.tokens), expected, atol=1e-14)
    observed = np.take_along_axis(expected, sample.tokens[:, :, None], axis=2)[:, :, 0]
    ideal = grammar.ideal_loss(sample)
    for loss in (ideal.estimate, ideal.lower, ideal.upper):
        np.testing.assert_allclose(loss, -np.log(observed), atol=1e-12)
    assert not ideal.error.any()


def test_probabilities_of_all_documents_of_a_tiny_language_sum_to_one():
    grammar = NGram(n_tokens=3, n_rows=5, orders=(1, 2), min_length=1, max_extra=3)
    total = 0.0
    for length in range(1, 5):
        texts = np.array([[*words, 2] for words in itertools.product(range(2), repeat=length)])
        p = np.take_along_axis(grammar.next_token_probabilities(texts), texts[:, :, None], axis=2)
        total += p.prod(axis=1).sum()
    assert total == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("n_tokens", [7, 8, 9, 10, 30])
def test_text_is_drawn_with_the_predicted_probabilities(n_tokens):
    exponents = {"row_exponent_mean": 0.8, "row_exponent_std": 0.5, "row_exponent_min": 0.0}
    grammar = NGram(n_tokens=n_tokens, n_rows=20, orders=(1, 2, 8), min_length=4, max_extra=10, **exponents)
    tokens = grammar.generate(400, 64, np.random.default_rng(1)).tokens
    p = grammar.next_token_probabilities(tokens)
    drawn = tokens[:, :, None] == np.arange(grammar.vocab_size)
    z = (drawn - p).sum(axis=(0, 1)) / np.sqrt((p * (1 - p)).sum(axis=(0, 1)))
    assert np.abs(z).max() < 4
    after_t0 = np.roll(tokens == 0, 1, axis=1)
    after_t0[:, 0] = False
    z = (drawn - p)[after_t0].sum(axis=0) / np.sqrt((p * (1 - p))[after_t0].sum(axis=0) + 1e-12)
    assert np.abs(z).max() < 4


def test_orders_and_document_lengths_have_their_frequencies():
    grammar = NGram(orders=(1, 2, 4, 8), min_length=5, max_extra=9)
    sample = grammar.generate(300, 128, np.random.default_rng(2), packed=True)
    order = sample.labels["order"].ravel()
    counts = np.array([(order == n).sum() for n in grammar.orders])
    assert chisquare(counts, counts.sum() * np.array(order_weights(grammar))).pvalue > 1e-3
    lengths = sample.labels["position"].ravel()[sample.tokens.ravel() == grammar.eos_token_id]
    assert set(lengths) == set(range(5, 15))
    assert chisquare(np.bincount(lengths - 5)).pvalue > 1e-3


def test_rows_are_zipf_laws_over_one_token_order():
    grammar = NGram(n_tokens=50, n_rows=4000)
    slopes = -np.diff(np.log(grammar.rows), axis=1) / np.diff(np.log(np.arange(1, 50)))
    np.testing.assert_allclose(slopes, slopes[:, :1].repeat(48, axis=1), atol=1e-9)
    np.testing.assert_allclose(grammar.rows.sum(axis=1), 1)
    exponents = slopes[:, 0]
    assert exponents.min() == pytest.approx(1.2)
    at_least = (np.abs(exponents - 1.2) < 1e-9).mean()
    assert at_least == pytest.approx(0.2525, abs=4 * math.sqrt(0.2525 * 0.7475 / 4000))  # Phi((1.2 - 2) / 1.2)
    assert np.median(exponents) == pytest.approx(2.0, abs=0.1)


def test_documents_without_end_cost_the_memory_of_their_rows():
    sample = NGram(min_length=10**12, max_extra=10**12).generate(2, 50, np.random.default_rng(0))
    assert not np.any(sample.tokens == 100)


def test_the_empty_history_selects_one_row_for_all_documents():
    sample = NGram().generate(50, 128, np.random.default_rng(0))
    first_rows = sample.labels["row"][sample.labels["position"] == 0]
    assert len(first_rows) > 50
    assert len(set(first_rows)) == 1


def test_another_language_seed_is_another_language():
    one, other = NGram(), NGram(language_seed=1)
    assert np.any(one.rows != other.rows)
    assert one._salt != other._salt


def test_unigram_agrees_with_the_frequencies_of_independent_text():
    grammar = NGram(n_tokens=20, n_rows=100)
    sample = grammar.generate(1, 400_000, np.random.default_rng(7))
    frequency = np.bincount(sample.tokens.ravel(), minlength=20) / 400_000
    assert grammar.unigram.sum() == pytest.approx(1)
    assert grammar.unigram[-1] == pytest.approx(1 / 60.5)
    np.testing.assert_allclose(grammar.unigram, frequency, atol=0.005)


def test_the_paper_has_its_published_sizes():
    paper = NGram.paper()
    assert (paper.vocab_size, paper.eos_token_id, paper.n_rows, paper.default_context) == (1000, 999, 1000, 512)
    assert paper.orders == (1, 2, 4, 8, 16, 32, 64, 128)
    assert paper.max_document_length == 110
    assert paper.rows[:, 0].mean() == pytest.approx(0.55, abs=0.03)
    assert [paper.vocabulary[i] for i in (0, 998, 999)] == ["t0", "t998", "<eos>"]


def test_impossible_document_lengths_are_refused_with_their_place():
    grammar = NGram(n_tokens=3, n_rows=2, min_length=2, max_extra=1)
    grammar.next_token_probabilities(np.array([[0, 1, 2, 1, 1, 0, 2, 0]]))
    with pytest.raises(ValueError, match=r"position 1: <eos> must follow 2\.\.3 .* after 1 stands <eos>"):
        grammar.next_token_probabilities(np.array([[0, 2, 0, 0]]))
    too_long = Sample(np.array([[0, 0, 0, 1]]), {"position": np.arange(4)[None]})
    with pytest.raises(ValueError, match=r"position 3: .* after 3 stands t1"):
        grammar.ideal_loss(too_long)


def test_an_ideal_loss_refuses_rows_that_do_not_begin_a_document():
    grammar = NGram()
    with pytest.raises(ValueError, match="packed=False"):
        grammar.ideal_loss(grammar.generate(4, 64, np.random.default_rng(0), packed=True))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"n_tokens": 1}, "at least 2"),
        ({"n_rows": 0}, "at least 1"),
        ({"orders": ()}, "at least 1 items"),
        ({"orders": (1, 0)}, "at least 1"),
        ({"orders": (1, 2, 1)}, "every order may occur once"),
        ({"row_exponent_mean": float("nan")}, "finite"),
        ({"row_exponent_std": -1}, "at least 0"),
        ({"min_length": 0}, "at least 1"),
        ({"max_extra": -1}, "at least 0"),
        ({"order": 3}, "no such field"),
    ],
)
def test_a_wrong_parameter_is_refused_with_what_is_accepted(fields, says):
    with pytest.raises(SpecError, match=says):
        NGram(**fields)

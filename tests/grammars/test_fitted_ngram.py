"""The n-gram model of a corpus: its law against NLTK's, its text against the corpus's, to the order and beyond."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.lm import WittenBellInterpolated
from scipy.stats import chisquare

from mechhier.grammars import Corpus, DocumentGrammar, NGram, corpus
from mechhier.grammars.fitted_ngram import FittedNGram
from mechhier.specs import SpecError

TREES = DocumentGrammar(n_words=5, binding=1.0, lexicon=4)
SMALL = DocumentGrammar(n_words=3, n_connectors=2, lexicon=2, n_sections=1, n_paragraphs=1, n_sentences=1)
PAD = "<s>"


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def blocks(monkeypatch):
    """Blocks of so few rows that small corpora have several, of which the last is not whole."""
    monkeypatch.setattr(corpus, "_TOKENS_PER_BLOCK", 60)


def all_rows(text):
    return text.rows(0, text.n_rows)


def ngrams(rows, k):
    """Every run of k tokens that ends at a token, with padding before the row's first, as tuples of strings."""
    for row in rows:
        padded = [PAD] * (k - 1) + [str(token) for token in row]
        for t in range(len(row)):
            yield tuple(padded[t : t + k])


def nltk_model(rows, order, vocab_size):
    """NLTK's model with the counts of the rows; NLTK ends at relative frequencies, this language at a uniform law."""
    model = WittenBellInterpolated(order)
    model.fit([ngrams(rows, k) for k in range(1, order + 1)], [PAD, *map(str, range(vocab_size))])
    single, kinds = model.counts.unigrams, len(model.counts.unigrams)
    model.estimator.unigram_score = lambda word: (single[word] + kinds / vocab_size) / (single.N() + kinds)
    return model


def probabilities_by_nltk(model, row, vocab_size):
    padded = [PAD] * (model.order - 1) + [str(token) for token in row]
    histories = [tuple(padded[t : t + model.order - 1]) for t in range(len(row))]
    return [[model.unmasked_score(str(word), history) for word in range(vocab_size)] for history in histories]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_the_law_is_nltks_witten_bell_on_seen_and_unseen_histories(order, packed):
    source = SMALL.corpus(tokens=16 * 20, context=16, packed=packed)
    assert source.n_blocks == 7
    model = NGram.fit(source, order)
    rows = all_rows(source)
    reference = nltk_model(rows, order, SMALL.vocab_size)
    beyond_their_ends = np.hstack([rows, rows[:, :4]])[:6]
    anything = rng().integers(0, SMALL.vocab_size, (3, 20))
    texts = np.concatenate([model.generate(3, 20, rng()).tokens, anything, beyond_their_ends])
    expected = [probabilities_by_nltk(reference, row, SMALL.vocab_size) for row in texts]
    np.testing.assert_allclose(model.next_token_probabilities(texts), expected, atol=1e-14)


def test_the_law_is_nltks_after_tokens_that_the_corpus_lacks():
    source = SMALL.corpus(tokens=8, context=4)
    texts = rng().integers(0, SMALL.vocab_size, (4, 30))
    assert len(set(texts.ravel()) - set(all_rows(source).ravel())) > 3
    reference = nltk_model(all_rows(source), 3, SMALL.vocab_size)
    expected = [probabilities_by_nltk(reference, row, SMALL.vocab_size) for row in texts]
    np.testing.assert_allclose(NGram.fit(source, 3).next_token_probabilities(texts), expected, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(
    st.builds(NGram, n_tokens=st.integers(2, 6), min_length=st.integers(1, 4), max_extra=st.integers(0, 4)),
    st.integers(1, 4),
    st.integers(4, 12),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_laws_sum_to_one_and_are_positive_and_losses_are_their_logarithms(grammar, order, context, n_rows, seed):
    model = NGram.fit(grammar.corpus(context * n_rows, context=context, seed=seed), order)
    tokens = rng(seed).integers(0, grammar.vocab_size, (3, 20))
    sample = model.generate(3, 20, rng(seed))
    for text in (tokens, sample.tokens):
        law = model.next_token_probabilities(text)
        np.testing.assert_allclose(law.sum(axis=2), 1, atol=1e-12)
        assert law.min() > 0
    ideal = model.ideal_loss(sample)
    observed = np.take_along_axis(law, sample.tokens[:, :, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(ideal.estimate, -np.log(observed), atol=1e-12)
    np.testing.assert_array_equal(ideal.lower, ideal.upper)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_text_is_drawn_with_the_predicted_probabilities(order):
    model = NGram.fit(SMALL.corpus(tokens=300, context=20), order)
    sample = model.generate(3000, 20, rng(1))
    law = model.next_token_probabilities(sample.tokens)
    drawn = sample.tokens[:, :, None] == np.arange(model.vocab_size)
    surprise = -np.log(law)
    entropy = (law * surprise).sum(axis=2)
    variance = (law * surprise**2).sum(axis=2) - entropy**2
    excess = (drawn * surprise).sum(axis=2) - entropy

    def before(values, first):
        return np.pad(values, ((0, 0), (1, 0)), constant_values=first)[:, :-1]

    last_tokens = before(sample.tokens, -1)
    last_orders = before(sample.labels["order"], -1)
    for groups in (last_tokens, last_orders):
        for group in np.unique(groups):
            here = groups == group
            z = (drawn - law)[here].sum(axis=0) / np.sqrt((law * (1 - law))[here].sum(axis=0))
            assert np.abs(z).max() < 4.5
            assert abs(excess[here].sum()) < 4.5 * np.sqrt(variance[here].sum())


def test_tokens_are_drawn_from_every_order_as_often_as_the_interpolation_says():
    source, order = SMALL.corpus(tokens=300, context=20), 3
    sample = NGram.fit(source, order).generate(500, 20, rng(2))
    followers = {}
    for k in range(1, order + 1):
        for ngram, count in Counter(ngrams(all_rows(source), k)).items():
            followers.setdefault(ngram[:-1], []).append(count)
    share = np.zeros((order + 1, 2))  # expected number and its variance
    for ngram in ngrams(sample.tokens, order):
        rest = 1.0
        for k in range(order, -1, -1):
            counts = followers.get(ngram[order - k : -1], []) if k else [1]
            p = rest * sum(counts) / (sum(counts) + len(counts)) if counts and k else (0.0 if k else rest)
            share[k] += p, p * (1 - p)
            rest -= p
    found = np.bincount(sample.labels["order"].ravel(), minlength=order + 1)
    assert np.all(found > 0)
    assert np.abs((found - share[:, 0]) / np.sqrt(share[:, 1])).max() < 4


def test_tokens_of_order_zero_are_uniform():
    sample = NGram.fit(SMALL.corpus(tokens=8, context=4), 2).generate(500, 20, rng(3))
    assert chisquare(np.bincount(sample.tokens[sample.labels["order"] == 0], minlength=SMALL.vocab_size)).pvalue > 1e-3


@pytest.mark.parametrize("packed", [False, True])
def test_labels_say_what_the_tokens_say(packed):
    model = NGram.fit(TREES.corpus(20_000, context=48), 3)
    sample = model.generate(20, 30, rng(), packed=packed)
    rows = sample.tokens.reshape(1, -1) if packed else sample.tokens
    documents, positions = [], []
    for row in rows:
        document = position = 0
        for token in row:
            documents.append(document)
            positions.append(position)
            position += 1
            if token == model.eos_token_id:
                document, position = document + 1, 0
    documents = np.reshape(documents, (20, 30))
    np.testing.assert_array_equal(sample.labels["document"], documents - documents[:, :1])
    np.testing.assert_array_equal(sample.labels["position"], np.reshape(positions, (20, 30)))
    np.testing.assert_array_equal(sample.labels["category"], TREES.token_categories[sample.tokens])
    assert set(sample.labels) == {"category", "document", "position", "order"}


def total_variation(one, other, k):
    """Between the frequencies of k-grams inside rows."""
    runs = [np.lib.stride_tricks.sliding_window_view(rows, k, axis=1).reshape(-1, k) for rows in (one, other)]
    codes = [part @ TREES.vocab_size ** np.arange(k) for part in runs]
    kinds, kind = np.unique(np.concatenate(codes), return_inverse=True)
    counts = [np.bincount(part, minlength=len(kinds)) for part in np.split(kind, [len(codes[0])])]
    return np.abs(counts[0] / counts[0].sum() - counts[1] / counts[1].sum()).sum() / 2


@pytest.fixture(scope="module")
def texts():
    """Two independent corpora of a hierarchical language, and the control of the first: rows of 96 tokens."""
    sources = [TREES.corpus(96 * 1500, seed=seed, context=96) for seed in (0, 1)]
    control = NGram.fit(sources[0], 3).corpus(96 * 1500)
    return tuple(all_rows(text) for text in (*sources, control))


def test_ngrams_up_to_the_order_are_as_frequent_as_in_the_corpus_and_longer_ones_are_not(texts):
    source, other, control = texts
    for k in (1, 2, 3):
        assert total_variation(source, control, k) < 1.5 * total_variation(source, other, k)
    for k in (5, 7):
        assert total_variation(source, control, k) > 2 * total_variation(source, other, k)


def test_rows_begin_as_the_rows_of_the_corpus(texts):
    source, _, control = texts
    observed, expected = (np.bincount(rows[:, 0], minlength=TREES.vocab_size) for rows in (control, source))
    first = expected > 0
    assert first.sum() == 10, "subjects and verbs begin a document"
    assert observed[~first].sum() < 5, "the uniform law has little weight"
    scaled = expected[first] / expected[first].sum() * observed[first].sum()
    assert chisquare(observed[first], scaled).pvalue > 1e-3
    begins = TREES.token_categories[control[:, 0]]
    assert 0.4 < (begins == 0).mean() < 0.6


def clauses_of_sentences(rows):
    """Number of clauses of every whole sentence: a connector joins two."""
    counts = []
    for row in TREES.token_categories[rows]:
        counts += [sentence.count("c") + 1 for sentence in "".join("svoc<"[c] for c in row).split("<")[:-1]]
    return np.array(counts)


def test_sentences_have_no_bound_on_their_clauses(texts):
    source, _, control = map(clauses_of_sentences, texts)
    assert source.max() == 3
    assert (control > 3).mean() > 0.03
    assert np.mean(control) == pytest.approx(np.mean(source), rel=0.05), "as many connectors to an <eos>"


def agreement_of_objects(rows):
    """How often a subject that is met again in the row has the object of the clause where it was first met."""
    same = []
    for row in rows:
        category = TREES.token_categories[row]
        met = {}
        for t in np.flatnonzero((category[:-2] == 0) & (category[1:-1] == 1) & (category[2:] == 2)):
            same.append(met[row[t]] == row[t + 2] if row[t] in met else None)
            met.setdefault(row[t], row[t + 2])
    return np.mean([value for value in same if value is not None])


def test_a_document_has_no_lexicon_of_its_own():
    one_document = 64  # the first tokens of a row: 16 sentences have at least as many
    source = TREES.corpus(96 * 500, context=96)
    control = NGram.fit(source, 3).corpus(96 * 500)
    assert agreement_of_objects(all_rows(source)[:, :one_document]) == 1
    assert agreement_of_objects(all_rows(control)[:, :one_document]) < 0.6


def test_json_is_small_and_gives_the_same_language_and_the_same_text():
    model = NGram.fit(TREES.corpus(20_000, context=48, seed=5), 3)
    text = model.model_dump_json()
    assert len(text) < 1000
    read = FittedNGram.model_validate_json(text)
    assert (read, hash(read)) == (model, hash(model))
    assert read != NGram.fit(TREES.corpus(20_000, context=48, seed=6), 3)
    np.testing.assert_array_equal(read.generate(20, 48, rng()).tokens, model.generate(20, 48, rng()).tokens)
    np.testing.assert_array_equal(read.unigram, model.unigram)


def test_the_description_of_a_control_corpus_recreates_it_and_can_be_fitted_itself():
    control = NGram.fit(TREES.corpus(20_000, context=48), 2).corpus(2000, seed=3, split="test")
    again = Corpus.from_description(json.loads(json.dumps(control.description)))
    assert again == control
    np.testing.assert_array_equal(all_rows(again), all_rows(control))
    of_control = NGram.fit(control, 2)
    assert (of_control.vocabulary, of_control.default_context) == (TREES.vocabulary, 48)
    assert of_control.source["grammar"]["source"]["tokens"] == 20_016


def test_what_is_left_without_defaults_names_no_field_at_its_default():
    model = NGram.fit(TREES.corpus(20_000, context=48), 2)
    brief = model.model_dump(mode="json", exclude_defaults=True)
    language = {"kind": "document", "n_words": 5, "binding": 1.0, "lexicon": 4}
    assert brief == {"source": {"grammar": language, "tokens": 20_016, "context": 48}, "order": 2}
    assert FittedNGram.model_validate(brief) == model


def test_a_stored_corpus_is_counted_from_disk_and_gives_the_model_of_the_streamed_one(tmp_path, monkeypatch):
    streamed = TREES.corpus(20_000, context=48)
    stored = streamed.save(tmp_path / "corpus")
    expected = NGram.fit(streamed, 3).generate(10, 48, rng())
    monkeypatch.setattr(Corpus, "_draw_block", lambda *_: pytest.fail("the corpus was generated again"))
    model = NGram.fit(stored, 3)
    np.testing.assert_array_equal(model.generate(10, 48, rng()).tokens, expected.tokens)


def test_tokens_rows_and_frequencies_are_those_of_the_corpus():
    source = TREES.corpus(20_000, context=48)
    model = NGram.fit(source, 2)
    assert (model.vocabulary, model.categories, model.default_context) == (TREES.vocabulary, TREES.categories, 48)
    assert model.eos_token_id == TREES.eos_token_id
    np.testing.assert_array_equal(model.token_categories, TREES.token_categories)
    counts = np.bincount(all_rows(source).ravel(), minlength=TREES.vocab_size)
    kinds = np.count_nonzero(counts)
    np.testing.assert_allclose(model.unigram, (counts + kinds / len(counts)) / (counts.sum() + kinds), atol=1e-15)
    assert model.model_copy(update={"context": 64}).default_context == 64


def test_the_longest_order_of_a_vocabulary_is_accepted_and_the_next_refused_with_its_number():
    source = NGram(n_tokens=7).corpus(500, context=50)  # to the base 8, 21 tokens are 63 bits
    model = NGram.fit(source, 21)
    law = model.next_token_probabilities(all_rows(source))
    seen = np.take_along_axis(law, all_rows(source)[:, :, None], axis=2)
    assert seen[:, 20:].mean() > 0.9, "so long a history occurs once"
    with pytest.raises(SpecError, match="with 7 token ids n-grams of at most 21 tokens"):
        NGram.fit(source, 22)


def test_an_order_or_a_source_that_cannot_be_is_refused_with_what_is_accepted():
    source = SMALL.corpus(100, context=10)
    with pytest.raises(SpecError, match="at least 1"):
        NGram.fit(source, 0)
    with pytest.raises(SpecError, match="rows of the corpus have 10 tokens"):
        NGram.fit(source, 11)
    with pytest.raises(SpecError, match="tokens is 5, less than one row"):
        FittedNGram(source=source.description | {"tokens": 5}, order=2)
    with pytest.raises(SpecError, match="tokens: is missing"):
        FittedNGram(source={"grammar": {"kind": "ngram"}}, order=2)


def test_an_ideal_loss_refuses_rows_that_begin_inside_a_text():
    model = NGram.fit(TREES.corpus(20_000, context=48), 2)
    with pytest.raises(ValueError, match="packed=False"):
        model.ideal_loss(model.generate(5, 30, rng(), packed=True))

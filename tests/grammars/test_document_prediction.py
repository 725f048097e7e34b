"""Exact predictions of the document language against enumeration of whole languages in plain Python."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from mechhier.grammars import DocumentGrammar, Sample

TINY = {"n_connectors": 1, "n_sections": 1, "n_paragraphs": 1, "n_sentences": 2, "max_clauses": 2}


def enumerate_documents(grammar, lexicon):
    """All documents of a tiny grammar under one lexicon, as {tokens: probability}, from the definition."""
    laws = []
    for n in grammar.sizes:
        weights = [(rank + 1) ** -grammar.zipf for rank in range(n)]
        laws.append([weight / sum(weights) for weight in weights])
    b, first_connector = grammar.binding, sum(grammar.sizes)
    clauses = {}
    for ranks in itertools.product(*(range(n) for n in grammar.sizes)):
        p = (1 - b) * math.prod(law[rank] for law, rank in zip(laws, ranks, strict=True))
        p += b * laws[0][ranks[0]] * (ranks[0] == ranks[1] == ranks[2])
        clauses[tuple(int(lexicon[c][rank]) for c, rank in enumerate(ranks))] = p
    eos = first_connector + grammar.n_connectors
    sentences = Counter()
    for (s, v, o), p in clauses.items():
        sentences[v, s, o, eos] += (1 - grammar.p_chain) * p
    for n in range(1, grammar.max_clauses + 1):
        for chosen in itertools.product(clauses.items(), repeat=n):
            for connectors in itertools.product(range(first_connector, eos), repeat=n - 1):
                ends = (*connectors, eos)
                tokens = tuple(t for (words, _), end in zip(chosen, ends, strict=True) for t in (*words, end))
                p = math.prod(p for _, p in chosen) * grammar.n_connectors ** -(n - 1)
                sentences[tokens] += grammar.p_chain / grammar.max_clauses * p
    documents = {(): 1.0}
    for _ in range(grammar.sentences_per_document):
        documents = {d + s: p * q for d, p in documents.items() for s, q in sentences.items() if q > 0}
    return documents


def language(grammar, lexicons):
    """Mixture over equally likely lexicons: {document: probability}."""
    mixture = Counter()
    for lexicon in lexicons:
        for document, p in enumerate_documents(grammar, lexicon).items():
            mixture[document] += p / len(lexicons)
    return mixture


CASES = {
    "pool, half bound": DocumentGrammar(n_words=2, lexicon=3, binding=0.5, zipf=1.3, **TINY),
    "pool, all bound": DocumentGrammar(n_words=3, lexicon=2, binding=1.0, **(TINY | {"n_connectors": 2})),
    "pool, unequal sizes": DocumentGrammar(n_words=(2, 1, 3), lexicon=2, zipf=0.7, p_chain=0.2, **TINY),
    "pool, most subjects": DocumentGrammar(n_words=(4, 2, 1), lexicon=2, p_chain=0.8, **TINY),
    "fixed, chains only": DocumentGrammar(n_words=2, lexicon="fixed", binding=0.3, p_chain=1.0, **TINY),
    "fixed, single clauses": DocumentGrammar(n_words=3, lexicon="fixed", binding=0.3, p_chain=0.0, **TINY),
}


@pytest.mark.parametrize("name", CASES)
def test_next_token_probabilities_equal_enumeration_across_documents(name):
    grammar = CASES[name]
    prefixes = Counter()
    for document, p in language(grammar, grammar.lexicons).items():
        for end in range(len(document) + 1):
            prefixes[document[:end]] += p
    sample = grammar.generate(12, 30, np.random.default_rng(0))
    result = grammar.next_token_probabilities(sample.tokens)
    expected = np.zeros_like(result)
    for row, tokens in enumerate(sample.tokens.tolist()):
        history, ended = (), 0
        for t, token in enumerate(tokens):
            for v in range(grammar.vocab_size):
                expected[row, t, v] = prefixes[(*history, v)] / prefixes[history]
            history = (*history, token)
            ended += token == grammar.eos_token_id
            if ended == grammar.sentences_per_document:
                history, ended = (), 0
    np.testing.assert_allclose(result, expected, atol=1e-12)
    assert sample.labels["document"].max() >= 1
    lower, upper = grammar.floor_bounds(sample)
    observed = np.take_along_axis(expected, sample.tokens[:, :, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(lower, -np.log(observed), atol=1e-10)
    np.testing.assert_array_equal(lower, upper)


@pytest.mark.parametrize("name", CASES)
def test_unigram_and_entropy_bounds_agree_with_enumeration(name):
    grammar = CASES[name]
    documents = language(grammar, grammar.lexicons)
    assert sum(documents.values()) == pytest.approx(1)
    mean_length = sum(p * len(document) for document, p in documents.items())
    counts = np.zeros(grammar.vocab_size)
    for document, p in documents.items():
        counts += p * np.bincount(document, minlength=grammar.vocab_size)
    np.testing.assert_allclose(grammar.unigram, counts / mean_length, atol=1e-12)
    rate = -sum(p * math.log(p) for p in documents.values() if p > 0) / mean_length
    lower, upper = grammar.entropy_rate_bounds()
    if grammar.lexicon == "fixed":
        assert lower == pytest.approx(rate, abs=1e-12)
        assert upper == lower
    else:
        assert lower <= rate <= upper


@pytest.mark.parametrize("binding", [0.0, 0.6])
def test_the_true_entropy_rate_of_per_document_lexicons_lies_within_its_bounds(binding):
    grammar = DocumentGrammar(n_words=2, lexicon="per_document", binding=binding, zipf=2.0, **TINY)
    lexicons = list(itertools.product([(0, 1), (1, 0)], [(2, 3), (3, 2)], [(4, 5), (5, 4)]))
    documents = language(grammar, lexicons)
    mean_length = sum(p * len(document) for document, p in documents.items())
    rate = -sum(p * math.log(p) for p in documents.values()) / mean_length
    lower, upper = grammar.entropy_rate_bounds()
    assert lower < rate < upper
    counts = np.zeros(grammar.vocab_size)
    for document, p in documents.items():
        counts += p * np.bincount(document, minlength=grammar.vocab_size)
    np.testing.assert_allclose(grammar.unigram, counts / mean_length, atol=1e-12)


@pytest.mark.parametrize("lexicon", ["fixed", "per_document"])
@pytest.mark.parametrize("binding", [0.0, 0.7])
def test_mean_losses_of_whole_documents_equal_the_closed_form_entropy_rates(lexicon, binding):
    grammar = DocumentGrammar(lexicon=lexicon, binding=binding, zipf=2.0, max_clauses=1)  # every document: 64 tokens
    losses = grammar.floor_bounds(grammar.generate(400, 64, np.random.default_rng(5)))
    for loss, rate in zip(losses, grammar.entropy_rate_bounds(), strict=True):
        standard_error = loss.mean(axis=1).std(ddof=1) / math.sqrt(len(loss))
        assert abs(loss.mean() - rate) < 4 * standard_error + 1e-12


def test_a_pool_is_recognised_within_its_document_and_forgotten_at_the_next():
    grammar = DocumentGrammar(lexicon=16, binding=1.0, max_clauses=1, n_sections=1)  # every document: 32 tokens
    loss, _ = grammar.floor_bounds(grammar.generate(100, 64, np.random.default_rng(0)))
    second_word = loss.mean(axis=0)[1::4]
    assert second_word[0] > 1.5 > 0.3 > second_word[7]
    assert second_word[8] > 1.5 > 0.3 > second_word[15]


@pytest.mark.parametrize("n_positions", [0, 1, 2, 3, 5, 8])
def test_rows_may_end_anywhere(n_positions):
    grammar = DocumentGrammar(n_words=3, lexicon=2, binding=0.5)
    tokens = grammar.generate(2, 8, np.random.default_rng(0)).tokens
    whole = grammar.next_token_probabilities(tokens)
    np.testing.assert_allclose(grammar.next_token_probabilities(tokens[:, :n_positions]), whole[:, :n_positions])


def test_impossible_text_is_refused_with_its_place():
    grammar = DocumentGrammar(n_words=2, lexicon="fixed", **TINY)
    names = {name: i for i, name in enumerate(grammar.vocabulary)}

    def predict(text):
        return grammar.next_token_probabilities(np.array([[names[name] for name in text.split()]]))

    predict("s0 v0 o1 c0 s1 v0 o0 <eos> v0 s0")
    with pytest.raises(ValueError, match="row 0, position 1: the grammar does not allow o0"):
        predict("s0 o0 v0 <eos>")
    with pytest.raises(ValueError, match="position 7: the grammar does not allow c0"):
        predict("s0 v0 o1 c0 s1 v0 o0 c0")
    with pytest.raises(ValueError, match="position 3: the grammar does not allow c0"):
        predict("v0 s0 o1 c0")
    chains = grammar.model_copy(update={"p_chain": 1.0})
    with pytest.raises(ValueError, match="position 0: the grammar does not allow v0"):
        chains.next_token_probabilities(np.array([[names["v0"]]]))
    with pytest.raises(ValueError, match=r"0\.\.7"):
        grammar.next_token_probabilities(np.array([[8]]))
    with pytest.raises(ValueError, match=r"\[rows, positions\]"):
        grammar.next_token_probabilities(np.array([0, 1]))


def test_text_that_no_lexicon_of_a_bound_pool_allows_is_refused():
    grammar = DocumentGrammar(n_words=6, lexicon=2, binding=1.0)
    subject = grammar.lexicons[0, 0, 0]
    possible = {int(lexicon[1][list(lexicon[0]).index(subject)]) for lexicon in grammar.lexicons}
    impossible = next(verb for verb in range(6, 12) if verb not in possible)
    with pytest.raises(ValueError, match="position 1: the text has probability 0 under every lexicon"):
        grammar.next_token_probabilities(np.array([[subject, impossible]]))


def test_per_document_lexicons_have_bounds_but_no_exact_prediction():
    grammar = DocumentGrammar(lexicon="per_document")
    with pytest.raises(ValueError, match="floor_bounds"):
        grammar.next_token_probabilities(np.array([[0, 30]]))


def test_floor_bounds_refuse_rows_that_do_not_begin_a_document():
    grammar = DocumentGrammar(lexicon="fixed")
    sample = grammar.generate(8, 64, np.random.default_rng(0), packed=True)
    with pytest.raises(ValueError, match="packed=False"):
        grammar.floor_bounds(sample)
    first = Sample(sample.tokens[:1], {name: label[:1] for name, label in sample.labels.items()})
    assert grammar.floor_bounds(first)[0].shape == (1, 64)

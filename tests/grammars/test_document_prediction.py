"""Exact predictions of the document language and its flat counterpart against enumeration in plain Python."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from mechhier.grammars.base import Sample
from mechhier.grammars.document import DocumentGrammar

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
    loss = grammar.ideal_loss(sample)
    observed = np.take_along_axis(expected, sample.tokens[:, :, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(loss.estimate, -np.log(observed), atol=1e-10)
    np.testing.assert_array_equal(loss.lower, loss.estimate)
    np.testing.assert_array_equal(loss.upper, loss.estimate)
    assert not loss.error.any()
    assert loss.method.startswith("exact")


def all_lexicons(grammar):
    """Every choice of a permutation of the words of each category."""
    starts = np.cumsum((0, *grammar.sizes))
    categories = [range(starts[i], starts[i + 1]) for i in range(3)]
    return list(itertools.product(*(itertools.permutations(words) for words in categories)))


@pytest.mark.parametrize("binding", [0.0, 1.0])
def test_per_document_lexicons_are_predicted_as_by_enumeration_of_all_lexicons(binding):
    grammar = DocumentGrammar(n_words=2, lexicon="per_document", binding=binding, zipf=1.5, **TINY)
    prefixes = Counter()
    for document, p in language(grammar, all_lexicons(grammar)).items():
        for end in range(len(document) + 1):
            prefixes[document[:end]] += p
    sample = grammar.generate(30, 30, np.random.default_rng(1))
    loss = grammar.ideal_loss(sample)
    assert loss.method.startswith("exact")
    assert not loss.error.any()
    predicted = grammar.next_token_probabilities(sample.tokens) if binding == 0 else None
    for row, tokens in enumerate(sample.tokens.tolist()):
        history, ended = (), 0
        for t, token in enumerate(tokens):
            expected = [prefixes[(*history, v)] / prefixes[history] for v in range(grammar.vocab_size)]
            assert loss.estimate[row, t] == pytest.approx(-math.log(expected[token]), abs=1e-10)
            if predicted is not None:
                np.testing.assert_allclose(predicted[row, t], expected, atol=1e-10)
            history = (*history, token)
            ended += token == grammar.eos_token_id
            if ended == grammar.sentences_per_document:
                history, ended = (), 0


# -- flat text --------------------------------------------------------------------------------------------------------


def category_chain(grammar):
    """P(next category | category) counted in the hierarchical language's sentences, written out in full."""
    pairs = Counter()
    sentences = {(1, 0, 2, 4): 1 - grammar.p_chain}
    for n in range(1, grammar.max_clauses + 1):
        sentences[(*(0, 1, 2, 3) * (n - 1), 0, 1, 2, 4)] = grammar.p_chain / grammar.max_clauses
    for sentence, p in sentences.items():
        for pair in itertools.pairwise((4, *sentence)):
            pairs[pair] += p
    return {(a, b): p / sum(q for (c, _), q in pairs.items() if c == a) for (a, b), p in pairs.items()}


def flat_next(grammar, lexicon, before, after_word):
    """P(next token | the token before it, under one lexicon) from the definition, {token: probability}."""
    rank_of = {int(word): (c, r) for c, words in enumerate(lexicon) for r, word in enumerate(words) if word >= 0}
    law = [[(r + 1) ** -grammar.zipf / sum((i + 1) ** -grammar.zipf for i in range(n)) for r in range(n)]
           for n in grammar.sizes]  # fmt: skip
    first_connector = sum(grammar.sizes)
    now = 4 if before is None or before == grammar.eos_token_id else rank_of[before][0] if after_word else 3
    chain = category_chain(grammar)
    result = {v: chain.get((now, 3), 0) / grammar.n_connectors for v in range(first_connector, grammar.eos_token_id)}
    result[grammar.eos_token_id] = chain.get((now, 4), 0)
    for word, (c, r) in rank_of.items():
        tied = grammar.binding if after_word else 0
        p = tied * (after_word and rank_of[before][1] == r) + (1 - tied) * law[c][r]
        result[word] = chain.get((now, c), 0) * p
    return result


FLAT = {
    "pool": DocumentGrammar(n_words=3, lexicon=3, binding=0.6, hierarchical=False, **TINY),
    "fixed, unequal sizes": DocumentGrammar(
        n_words=(3, 1, 2), lexicon="fixed", p_chain=0.8, hierarchical=False, **TINY
    ),
    "per document": DocumentGrammar(n_words=2, lexicon="per_document", zipf=2.0, hierarchical=False, **TINY),
}


@pytest.mark.parametrize("name", FLAT)
def test_flat_predictions_equal_a_mixture_of_chains_written_out(name):
    grammar = FLAT[name]
    lexicons = all_lexicons(grammar) if grammar.lexicon == "per_document" else list(grammar.lexicons)
    sample = grammar.generate(6, 40, np.random.default_rng(2))
    result = grammar.next_token_probabilities(sample.tokens)
    loss = grammar.ideal_loss(sample).estimate
    for row, tokens in enumerate(sample.tokens.tolist()):
        weights, ended, before = [1 / len(lexicons)] * len(lexicons), 0, None
        for t, token in enumerate(tokens):
            after_word = before is not None and before < sum(grammar.sizes)
            under = [flat_next(grammar, lexicon, before, after_word) for lexicon in lexicons]
            for v in range(grammar.vocab_size):
                expected = sum(w * p[v] for w, p in zip(weights, under, strict=True)) / sum(weights)
                assert result[row, t, v] == pytest.approx(expected, abs=1e-11)
            assert loss[row, t] == pytest.approx(-math.log(result[row, t, token]), abs=1e-10)
            weights = [w * p[token] for w, p in zip(weights, under, strict=True)]
            before = token
            ended += token == grammar.eos_token_id
            if ended == grammar.sentences_per_document:
                weights, ended, before = [1 / len(lexicons)] * len(lexicons), 0, None
    assert sample.labels["document"].max() >= 1


@pytest.mark.parametrize("binding", [0.0, 0.6, 1.0])
def test_entropy_rate_of_flat_text_is_that_of_its_chain_of_tokens(binding):
    grammar = DocumentGrammar(
        n_words=3, n_connectors=2, lexicon="fixed", binding=binding, p_chain=0.3, hierarchical=False
    )
    rows = []
    for token in range(grammar.vocab_size):
        next_token = flat_next(grammar, grammar.lexicons[0], token, token < 9)
        rows.append([next_token[v] for v in range(grammar.vocab_size)])
    transition = np.array(rows)
    np.testing.assert_allclose(transition.sum(axis=1), 1)
    stationary = np.linalg.matrix_power(0.5 * (transition + np.eye(len(rows))), 4096)[0]
    logs = np.log(np.where(transition > 0, transition, 1))
    rate = -(stationary[:, None] * transition * logs).sum()
    assert grammar.entropy_rate_bounds() == pytest.approx((rate, rate), abs=1e-10)
    np.testing.assert_allclose(grammar.unigram, stationary, atol=1e-10)


def test_entropy_rates_of_flat_text_with_unequal_sizes_and_per_document_lexicons():
    grammar = DocumentGrammar(n_words=(5, 2, 3), lexicon="per_document", p_chain=0.3, hierarchical=False)
    loss = grammar.ideal_loss(grammar.generate(40, 4000, np.random.default_rng(0)))
    for losses, rate in zip((loss.lower, loss.upper), grammar.entropy_rate_bounds(), strict=True):
        standard_error = losses.mean(axis=1).std(ddof=1) / math.sqrt(len(losses))
        assert abs(losses.mean() - rate) < 4 * standard_error


def test_impossible_flat_text_is_refused_with_its_place():
    grammar = DocumentGrammar(n_words=2, lexicon="fixed", hierarchical=False, **TINY)
    names = {name: i for i, name in enumerate(grammar.vocabulary)}

    def predict(text, grammar=grammar):
        return grammar.next_token_probabilities(np.array([[names[name] for name in text.split()]]))

    predict("s0 v0 s1 v0 o1 <eos> s1 o0 c0 s0 o0 c0 s0")
    with pytest.raises(ValueError, match="row 0, position 2: the grammar does not allow s1"):
        predict("s0 o0 s1")
    with pytest.raises(ValueError, match="position 0: the grammar does not allow o1"):
        predict("o1")
    with pytest.raises(ValueError, match="position 1: the grammar does not allow o0"):
        predict("v0 o0", grammar.model_copy(update={"p_chain": 0.0}))


# -- closed forms -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("lexicon", "binding"), [("fixed", 0.0), ("fixed", 0.7), ("per_document", 0.0), ("per_document", 1.0)]
)
def test_mean_losses_of_whole_documents_equal_the_closed_form_entropy_rates(lexicon, binding):
    grammar = DocumentGrammar(lexicon=lexicon, binding=binding, zipf=2.0, max_clauses=1)  # every document: 64 tokens
    losses = grammar.ideal_loss(grammar.generate(400, 64, np.random.default_rng(5)))
    for loss, rate in zip((losses.lower, losses.upper), grammar.entropy_rate_bounds(), strict=True):
        standard_error = loss.mean(axis=1).std(ddof=1) / math.sqrt(len(loss))
        assert abs(loss.mean() - rate) < 4 * standard_error + 1e-12


def test_a_pool_is_recognised_within_its_document_and_forgotten_at_the_next():
    grammar = DocumentGrammar(lexicon=16, binding=1.0, max_clauses=1, n_sections=1)  # every document: 32 tokens
    loss = grammar.ideal_loss(grammar.generate(100, 64, np.random.default_rng(0))).estimate
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


@pytest.mark.parametrize("hierarchical", [True, False])
def test_rows_that_do_not_begin_a_document_are_refused(hierarchical):
    grammar = DocumentGrammar(lexicon="fixed", hierarchical=hierarchical)
    sample = grammar.generate(8, 64, np.random.default_rng(0), packed=True)
    with pytest.raises(ValueError, match="packed=False"):
        grammar.ideal_loss(sample)
    first = Sample(sample.tokens[:1], {name: label[:1] for name, label in sample.labels.items()})
    assert grammar.ideal_loss(first).estimate.shape == (1, 64)

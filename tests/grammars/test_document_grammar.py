"""The document language's text against its closed forms, and against a parser that shares no code with it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2_contingency, chisquare

from mechhier.grammars import DocumentGrammar
from mechhier.specs import SpecError


def rng(seed=0):
    return np.random.default_rng(seed)


def parse(words, sentences_per_document):
    """Label a row that begins a document, word by word, from the token strings alone."""
    labels, document, sentence, clause, slot, order = [], 0, 0, 0, 0, ""
    for word in words:
        kind = word[0]
        if slot == 0 and clause == 0:
            assert kind in "sv"
            order = "svo" if kind == "s" else "vso"
        if slot < 3:
            assert kind == order[slot]
        else:
            assert kind == "<" or (kind == "c" and order == "svo")
        labels.append((document, sentence, clause, "svoc<".index(kind)))
        slot += 1
        if slot == 4:
            slot, clause = 0, clause + 1
            if kind == "<":
                clause, sentence = 0, sentence + 1
                if sentence == sentences_per_document:
                    sentence, document = 0, document + 1
    return np.array(labels)


grammars = st.builds(
    DocumentGrammar,
    n_words=st.one_of(st.integers(1, 6), st.tuples(*[st.integers(1, 6)] * 3)),
    n_connectors=st.integers(1, 4),
    zipf=st.floats(0, 3),
    n_sections=st.integers(1, 2),
    n_paragraphs=st.integers(1, 3),
    n_sentences=st.integers(1, 3),
    max_clauses=st.integers(1, 4),
    p_chain=st.sampled_from([0.0, 0.3, 1.0]),
    lexicon=st.sampled_from(["fixed", "per_document", 3]),
)


@settings(max_examples=60, deadline=None)
@given(grammars, st.integers(4, 70), st.booleans(), st.integers(0, 99))
def test_every_row_is_a_text_of_the_language_and_labels_say_what_an_independent_parser_reads(
    grammar, context, packed, seed
):
    sample = grammar.generate(3, context, rng(seed), packed=packed)
    rows = [sample.tokens.ravel()] if packed else list(sample.tokens)
    per_document = grammar.n_sections * grammar.n_paragraphs * grammar.n_sentences
    read = np.concatenate([parse([grammar.vocabulary[t] for t in row], per_document) for row in rows])
    document, sentence, clause, category = (column.reshape(3, context) for column in read.T)
    np.testing.assert_array_equal(sample.labels["document"], document - document[:, :1])
    np.testing.assert_array_equal(sample.labels["sentence"], sentence)
    np.testing.assert_array_equal(sample.labels["clause"], clause)
    np.testing.assert_array_equal(sample.labels["category"], category)
    np.testing.assert_array_equal(sample.labels["paragraph"], sentence // grammar.n_sentences)
    np.testing.assert_array_equal(sample.labels["section"], sentence // grammar.n_sentences // grammar.n_paragraphs)
    assert np.all((sample.labels["rank"] >= 0) == (category < 3))
    ends = sample.tokens == grammar.eos_token_id
    assert np.all(sample.labels["n_clauses"][ends] == clause[ends] + 1)
    assert np.all(sample.labels["n_clauses"] > clause)
    assert clause.max() < grammar.max_clauses


def test_a_language_of_a_pool_writes_the_words_that_its_lexicons_say():
    grammar = DocumentGrammar(n_words=(5, 3, 4), lexicon=6, n_sections=1, n_paragraphs=1)
    sample = grammar.generate(50, 40, rng())
    word = sample.labels["rank"] >= 0
    lexicon, category, rank = (sample.labels[name][word] for name in ("lexicon", "category", "rank"))
    np.testing.assert_array_equal(grammar.lexicons[lexicon, category, rank], sample.tokens[word])
    assert set(lexicon) == set(range(6))


def test_lexicons_are_permutations_of_each_category_and_pad_the_smaller_ones():
    grammar = DocumentGrammar(n_words=(5, 3, 4), lexicon=4)
    for lexicon in grammar.lexicons:
        for ranks, first, size in zip(lexicon, (0, 5, 8), (5, 3, 4), strict=True):
            assert sorted(ranks[:size]) == list(range(first, first + size))
            assert np.all(ranks[size:] == -1)


def test_a_pool_depends_on_the_language_seed_alone_and_a_larger_one_begins_with_a_smaller():
    small, large = DocumentGrammar(lexicon=3), DocumentGrammar(lexicon=5, binding=0.5, zipf=2.0, p_chain=1.0)
    np.testing.assert_array_equal(large.lexicons[:3], small.lexicons)
    np.testing.assert_array_equal(DocumentGrammar(lexicon="fixed").lexicons, small.lexicons[:1])
    assert np.any(DocumentGrammar(lexicon=3, language_seed=1).lexicons != small.lexicons)


def test_a_copy_with_another_seed_has_nothing_cached_of_the_old_language():
    grammar = DocumentGrammar(lexicon=3)
    old = grammar.lexicons
    copy = grammar.model_copy(update={"language_seed": 1})
    np.testing.assert_array_equal(copy.lexicons, DocumentGrammar(lexicon=3, language_seed=1).lexicons)
    assert np.any(copy.lexicons != old)
    with pytest.raises(SpecError):
        grammar.model_copy(update={"lexicon": 1})


@pytest.mark.parametrize("repetitions", [1, 4])
def test_as_many_documents_share_a_lexicon_as_there_are_repetitions(repetitions):
    grammar = DocumentGrammar(n_words=8, lexicon="per_document", repetitions=repetitions, n_sections=1)
    sample = grammar.generate(40, 96, rng(), packed=True)
    lexicon, sentence, clause = (sample.labels[name].ravel() for name in ("lexicon", "sentence", "clause"))
    first_tokens = np.flatnonzero((sentence == 0) & (clause == 0) & (np.arange(len(sentence)) % 4 == 0))
    counts = np.bincount(lexicon[first_tokens])
    assert np.all(counts[counts != repetitions] < repetitions)
    assert (counts != repetitions).sum() <= 1
    assert (repetitions == 1) == bool(np.all(np.diff(lexicon[first_tokens]) == 1)), "shared lexicons are shuffled"
    word = sample.labels["rank"].ravel() >= 0
    triples = np.stack([lexicon, sample.labels["category"].ravel(), sample.labels["rank"].ravel()])[:, word]
    pairs = np.unique(np.concatenate([triples, sample.tokens.reshape(1, -1)[:, word]]), axis=1)
    assert pairs.shape[1] == np.unique(triples, axis=1).shape[1], "a lexicon gives every rank one word"


def sentences(grammar, sample):
    """Whole sentences of packed text, as strings of category letters."""
    text = "".join("svoc<"[c] for c in grammar.token_categories[sample.tokens.ravel()])
    return text.split("<")[:-1]


@pytest.mark.parametrize(("p_chain", "max_clauses"), [(0.5, 3), (0.8, 4)])
def test_sentence_lengths_and_orders_have_their_closed_form_frequencies(p_chain, max_clauses):
    grammar = DocumentGrammar(p_chain=p_chain, max_clauses=max_clauses)
    found = sentences(grammar, grammar.generate(400, 96, rng(1), packed=True))
    expected = {"c".join(["svo"] * n): p_chain / max_clauses for n in range(1, max_clauses + 1)} | {"vso": 1 - p_chain}
    assert set(found) == set(expected)
    counts = np.array([found.count(kind) for kind in expected])
    assert chisquare(counts, counts.sum() * np.array(list(expected.values()))).pvalue > 1e-3


def test_category_transitions_have_their_closed_form_frequencies():
    grammar = DocumentGrammar(p_chain=0.3, max_clauses=2)
    category = grammar.token_categories[grammar.generate(400, 96, rng(2), packed=True).tokens.ravel()]
    subject, verb, object_, connector, eos = range(5)
    after_eos = category[1:][category[:-1] == eos]
    assert binomtest(int((after_eos == subject).sum()), len(after_eos), 0.3).pvalue > 1e-3
    assert set(after_eos) == {subject, verb}
    # first clause of a chain: starts the text or follows <eos>
    starts = np.flatnonzero((category[:-4] == eos) & (category[1:-3] == subject))
    terminators = category[starts + 4]
    assert set(terminators) == {connector, eos}
    assert binomtest(int((terminators == eos).sum()), len(terminators), 0.5).pvalue > 1e-3
    for before, after in ((connector, subject), (subject, verb), (verb, object_)):
        follow = category[1:][category[:-1] == before]
        allowed = {after} if before == connector else {after, object_ if before == subject else subject}
        assert set(follow) == allowed


@pytest.mark.parametrize("binding", [0.0, 0.5, 1.0])
def test_words_have_zipf_frequencies_whatever_the_binding(binding):
    grammar = DocumentGrammar(n_words=12, zipf=1.0, lexicon="fixed", binding=binding)
    tokens = grammar.generate(200, 96, rng(3)).tokens
    zipf = np.array([1 / (rank + 1) for rank in range(12)])
    for category in range(3):
        words = grammar.lexicons[0, category]
        counts = np.bincount(tokens.ravel(), minlength=grammar.vocab_size)[words]
        assert chisquare(counts, counts.sum() * zipf / zipf.sum()).pvalue > 1e-3
    connectors = np.bincount(tokens.ravel(), minlength=grammar.vocab_size)[36:46]
    assert chisquare(connectors).pvalue > 1e-3


def test_binding_one_gives_the_three_words_of_every_clause_one_rank():
    sample = DocumentGrammar(lexicon=8, binding=1.0).generate(20, 96, rng())
    ranks = sample.labels["rank"].reshape(-1, 4)
    assert np.all(ranks[:, :3] == ranks[:, :1])
    assert len(set(ranks[:, 0])) > 10


@pytest.mark.parametrize("p_chain", [0.0, 1.0])
def test_binding_is_one_coin_per_clause_in_either_order(p_chain):
    n, b = 6, 0.4
    sample = DocumentGrammar(n_words=n, zipf=1.0, binding=b, p_chain=p_chain).generate(200, 96, rng(4))
    ranks = sample.labels["rank"].reshape(-1, 4)[:, :3]
    zipf = np.array([1 / (rank + 1) for rank in range(n)])
    zipf /= zipf.sum()
    joint = (1 - b) * np.einsum("i,j,k->ijk", zipf, zipf, zipf)
    joint[range(n), range(n), range(n)] += b * zipf
    counts = np.bincount(ranks @ [n * n, n, 1], minlength=n**3)
    often = joint.ravel() * len(ranks) > 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = len(ranks) * np.append(joint.ravel()[often], joint.ravel()[~often].sum())
    assert chisquare(observed, expected).pvalue > 1e-3


FLAT = {"n_connectors": 2, "zipf": 1.0, "lexicon": "fixed", "p_chain": 0.4}


def stream(hierarchical, binding, seed):
    """One long text of small vocabulary, the lexicon fixed."""
    grammar = DocumentGrammar(n_words=4, binding=binding, hierarchical=hierarchical, **FLAT)
    return grammar, grammar.generate(500, 512, rng(seed), packed=True)


@pytest.mark.parametrize("binding", [0.0, 0.6, 1.0])
def test_flat_text_has_the_tokens_and_the_pairs_of_neighbours_of_hierarchical_text(binding):
    counts = []
    for hierarchical in (True, False):
        grammar, sample = stream(hierarchical, binding, seed=7)
        tokens = sample.tokens.ravel()
        # Far apart, so that they are as good as independent; 31 is odd, so that every place of a clause has its turn.
        pairs = tokens[:-1:31] * grammar.vocab_size + tokens[1::31]
        counts.append(np.bincount(pairs, minlength=grammar.vocab_size**2))
    counts = np.array(counts)
    assert np.all((counts[0] > 0) == (counts[1] > 0)), "the same pairs are possible"
    often = counts.sum(axis=0) > 20
    assert chi2_contingency(counts[:, often]).pvalue > 1e-3
    tokens = counts.reshape(2, grammar.vocab_size, -1).sum(axis=2)
    assert chi2_contingency(tokens).pvalue > 1e-3
    assert chisquare(tokens[1], tokens[1].sum() * grammar.unigram).pvalue > 1e-3


def test_flat_text_is_a_first_order_chain_of_categories_and_hierarchical_text_is_not():
    p_values = {}
    for hierarchical in (True, False):
        category = stream(hierarchical, 0.0, seed=8)[1].labels["category"].ravel()
        before, now, after = category[:-2], category[1:-1], category[2:]
        verb = now == 1
        table = np.array([[np.sum(verb & (before == b) & (after == a)) for a in (0, 2)] for b in (0, 4)])
        p_values[hierarchical] = chi2_contingency(table).pvalue
    assert p_values[False] > 1e-3 > 1e-50 > p_values[True]


@pytest.mark.parametrize("binding", [0.0, 0.6, 1.0])
def test_a_flat_word_has_its_neighbours_rank_with_probability_binding_and_else_its_own(binding):
    sample = stream(False, binding, seed=9)[1]
    rank = sample.labels["rank"].ravel()
    neighbours = (rank[1:] >= 0) & (rank[:-1] >= 0)
    first = (rank[1:] >= 0) & (rank[:-1] < 0)
    law = np.array([1 / (r + 1) for r in range(4)])
    law /= law.sum()
    assert chisquare(np.bincount(rank[1:][first]), first.sum() * law).pvalue > 1e-3
    for r in range(4):
        following = rank[1:][neighbours & (rank[:-1] == r)]
        expected = binding * (np.arange(4) == r) + (1 - binding) * law
        observed = np.bincount(following, minlength=4)
        assert not observed[expected == 0].any()
        possible = expected > 0
        assert possible.sum() == 1 or chisquare(observed[possible], len(following) * expected[possible]).pvalue > 1e-3


def test_a_flat_document_ends_at_its_last_eos_and_has_the_same_mean_length():
    grammar = DocumentGrammar(n_words=3, n_sections=1, n_paragraphs=1, n_sentences=3, lexicon=2, hierarchical=False)
    sample = grammar.generate(300, 512, rng(2), packed=True)
    sentence = np.cumsum(sample.tokens.ravel() == grammar.eos_token_id)
    before = np.append(0, sentence[:-1]).reshape(sample.tokens.shape)
    np.testing.assert_array_equal(sample.labels["document"], before // 3 - before[:, :1] // 3)
    np.testing.assert_array_equal(sample.labels["sentence"], before % 3)
    mean_length = sample.tokens.size / (sentence[-1] / 3)
    assert mean_length == pytest.approx(3 * 4 * 1.5, rel=0.02)
    assert set(sample.labels) == {"category", "rank", "document", "sentence", "lexicon"}
    assert len(set(sample.labels["lexicon"].ravel())) == 2


def test_the_paper_has_its_published_sizes_and_floors():
    paper = DocumentGrammar.paper()
    assert (paper.vocab_size, paper.default_context, paper.sentences_per_document) == (1001, 512, 16)
    names = [paper.vocabulary[i] for i in (0, 299, 300, 600, 900, 999, 1000)]
    assert names == ["s0", "s299", "v0", "o0", "c0", "c99", "<eos>"]
    assert paper.entropy_rate_bounds() == pytest.approx((3.9035, 4.8687), abs=1e-3)


def test_default_context_holds_the_longest_document():
    grammar = DocumentGrammar(n_sections=1, n_paragraphs=2, n_sentences=2, max_clauses=3)
    assert grammar.default_context == 4 * 3 * 4
    assert grammar.model_copy(update={"context": 20}).default_context == 20


def test_equal_sizes_given_one_by_one_are_the_same_language():
    assert DocumentGrammar(n_words=(4, 4, 4)) == DocumentGrammar(n_words=4)
    assert DocumentGrammar(n_words=(4, 4, 4), binding=0.5).sizes == (4, 4, 4)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"n_words": 0}, "at least 1"),
        ({"n_words": (3, 0, 3)}, "at least 1"),
        ({"n_connectors": 0}, "at least 1"),
        ({"zipf": float("inf")}, "finite"),
        ({"zipf": -1.0}, "at least 0"),
        ({"p_chain": 1.5}, "at most 1"),
        ({"binding": -0.1}, "at least 0"),
        ({"binding": 0.5, "n_words": (3, 4, 5)}, "numbers must be equal"),
        ({"lexicon": 1}, "at least 2"),
        ({"lexicon": "random"}, "'fixed' or 'per_document'"),
        ({"repetitions": 2, "lexicon": "fixed"}, "per-document lexicon"),
        ({"context": 3}, "at least 4"),
        ({"language_seed": -1}, "at least 0"),
        ({"max_clause": 3}, "no such field"),
    ],
)
def test_a_wrong_parameter_is_refused_with_what_is_accepted(fields, says):
    with pytest.raises(SpecError, match=says):
        DocumentGrammar(**fields)


def test_generate_refuses_no_rows_and_rows_shorter_than_a_clause():
    with pytest.raises(ValueError, match="n_rows must be at least 1"):
        DocumentGrammar().generate(0, 96, rng())
    with pytest.raises(ValueError, match="at least 4"):
        DocumentGrammar().generate(1, 3, rng())


def test_a_per_document_language_has_no_lexicons_of_its_own():
    with pytest.raises(ValueError, match="draw_lexicons"):
        _ = DocumentGrammar(lexicon="per_document").lexicons


def test_shared_arrays_cannot_be_written_to():
    grammar = DocumentGrammar(lexicon=2)
    with pytest.raises(ValueError, match="read-only"):
        grammar.lexicons[0, 0, 0] = 1


def test_trees_of_documents_have_the_constituents_that_labels_and_tokens_say():
    grammar = DocumentGrammar(n_words=4, n_connectors=2, n_sections=2, n_paragraphs=2, n_sentences=1)
    sample = grammar.generate(5, 120, np.random.default_rng(0), trees=True)
    for row in range(5):
        trees = grammar.trees(sample, row)
        assert [t for tree in trees for t in tree.tokens] == [grammar.vocabulary[t] for t in sample.tokens[row]]
        for tree in trees[:-1]:
            assert (tree.symbol, len(tree.children)) == ("document", 2)
            for paragraph in (p for section in tree.children for p in section.children):
                assert [sentence.symbol for sentence in paragraph.children] == ["sentence"]
                *clauses, end = paragraph.children[0].children
                assert str(end) == "(eos <eos>)"
                assert [c.symbol for c in clauses] == (["clause", "connector"] * 3)[: len(clauses)]
                orders = {tuple(word.symbol for word in c.children) for c in clauses if c.symbol == "clause"}
                assert orders in ({("subject", "verb", "object")}, {("verb", "subject", "object")})
    flat = grammar.model_copy(update={"hierarchical": False})
    tree = flat.trees(flat.generate(1, 60, np.random.default_rng(0), trees=True), 0)[0]
    assert {child.symbol for child in tree.children} <= set(flat.categories)

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import digamma

from mechhier.grammars import PCFG, DocumentGrammar, NGram, cfg3, dyck, random_hierarchy
from mechhier.grammars.statistics import _pair_entropies, chao_wang_jost, describe, length_shares, spaced_distances
from mechhier.results import load, save


def markov_chain(start, transitions):
    """A right-linear grammar: the next token depends on the last; a row of `transitions` ends with P(<eos>)."""
    tokens = "abcdefgh"[: len(start)]
    rules = [("S", (t.upper(),), p) for t, p in zip(tokens, start, strict=True)]
    for t, (*onward, end) in zip(tokens, transitions, strict=True):
        rules += [(t.upper(), (t, u.upper()), p) for u, p in zip(tokens, onward, strict=True)]
        rules.append((t.upper(), (t,), end))
    return PCFG(start="S", terminals=tuple(tokens), rules=tuple(rules))


def exact_information(start, transitions, distance):
    """Mutual information of the stationary chain, `<eos>` being followed by the start, from a power of its matrix."""
    matrix = np.array([*transitions, [*start, 0.0]])
    law = np.linalg.matrix_power(matrix, 10_000)[0]
    joint = law[:, None] * np.linalg.matrix_power(matrix, distance)
    outer = law[:, None] * law
    return float((joint[joint > 0] * np.log(joint[joint > 0] / outer[joint > 0])).sum())


CHAIN = ((0.3, 0.7), ((0.88, 0.1, 0.02), (0.05, 0.93, 0.02)))


def information(text, suffix=""):
    return text[f"mutual_information{suffix}"].to_numpy()


# -- mutual information ----------------------------------------------------------------------------------------------


def test_mutual_information_of_a_markov_chain_is_that_of_the_powers_of_its_matrix():
    text = describe(markov_chain(*CHAIN).corpus(tokens=2**18, context=128, packed=True, seed=1))
    exact = np.array([exact_information(*CHAIN, d) for d in text.distance.to_numpy().tolist()])
    half_width = information(text, "_high") - information(text)
    assert exact[0] > 0.3
    assert exact[-1] < 1e-4
    assert (np.abs(information(text) - exact) <= 1.5 * half_width).all()  # all distances at once
    assert (half_width < 1e-3 + 0.05 * exact).all()


def test_counts_of_a_large_vocabulary_are_corrected():
    rng = np.random.default_rng(3)
    n = 40
    rows = 0.5 * rng.dirichlet(np.full(n, 0.2), n) + 0.5 / n
    matrix = np.concatenate([rows * 0.95, np.full((n, 1), 0.05)], axis=1)
    tokens = [f"t{i}" for i in range(n)]
    rules = [("S", (f"N{i}",), 1 / n) for i in range(n)]
    for i in range(n):
        rules += [(f"N{i}", (tokens[i], f"N{j}"), matrix[i, j]) for j in range(n)]
        rules.append((f"N{i}", (tokens[i],), matrix[i, n]))
    grammar = PCFG(start="S", terminals=tuple(tokens), rules=tuple(rules))
    text = describe(grammar.corpus(tokens=2**14, context=64, packed=True), max_distance=16)
    exact = np.array([exact_information([1 / n] * n, matrix, d) for d in text.distance.to_numpy().tolist()])
    bias_of_counts = n**2 / 2 / 2**14
    assert np.abs(information(text) - exact).max() < 0.2 * bias_of_counts


@pytest.mark.parametrize("packed", [False, True])
def test_independent_tokens_have_none(packed):
    grammar = markov_chain((0.5, 0.3, 0.2), [(0.49, 0.294, 0.196, 0.02)] * 3)
    text = describe(grammar.corpus(tokens=2**18, context=128, packed=packed, seed=2), max_distance=8)
    # No document is empty, so <eos> does not follow <eos>; beyond that tokens are independent.
    exact = [
        exact_information((0.5, 0.3, 0.2), [(0.49, 0.294, 0.196, 0.02)] * 3, d)
        for d in text.distance.to_numpy().tolist()
    ]
    assert exact[1] < 1e-6
    assert (information(text, "_low") <= exact).all()
    assert (information(text, "_high") >= exact).all()
    assert (information(text, "_high") < 2e-3).all()
    for end in ("_null", "_beyond_position"):
        assert np.abs(information(text, end)).max() < 1e-3


def test_what_positions_alone_tell_is_the_null():
    # Every string is a b c d <eos>, so that a token tells every other, and so does its place in the row.
    grammar = PCFG.from_string("S -> 'a' 'b' 'c' 'd' [1.0]")
    text = describe(grammar.corpus(tokens=50_000, context=50), max_distance=5)
    assert information(text)[-1] == pytest.approx(math.log(5), rel=0.02)
    assert information(text, "_null") == pytest.approx(information(text))
    assert information(text, "_beyond_position") == pytest.approx(0, abs=1e-12)


def test_what_a_row_has_beyond_position_is_what_its_own_tokens_share():
    # Two words that are the same, and <eos>. Of neighbours a third are the two words of a string.
    grammar = PCFG.from_string("S -> 'a' 'a' [0.5] | 'b' 'b' [0.5]")
    text = describe(grammar.corpus(tokens=2**16, context=63), max_distance=3)
    words, eos = 1 / 3, 1 / 6  # the share of either word is also 1 / 3
    law = {("a", "a"): eos, ("b", "b"): eos, ("a", "."): eos, ("b", "."): eos, (".", "a"): eos, (".", "b"): eos}
    exact = sum(p * math.log(p / words / words) for p in law.values())
    assert information(text)[0] == pytest.approx(exact, rel=0.05)
    beyond = information(text, "_beyond_position")
    apart = {pair: eos for pair in law if "." in pair} | {pair: eos / 2 for pair in ("aa", "ab", "ba", "bb")}
    exact_null = sum(p * math.log(p / words / words) for p in apart.values())
    assert information(text, "_null")[0] == pytest.approx(exact_null, rel=0.05)
    assert beyond[0] == pytest.approx(exact - exact_null, rel=0.05)
    assert np.abs(beyond[1:]).max() < 2e-3


def test_an_ngram_model_has_the_mutual_information_of_its_source_as_far_as_it_sees():
    # Documents of one length, packed: rows are not independent, which must not show.
    grammar = random_hierarchy(n_symbols=6, n_tuples=2, n_levels=3, n_classes=6)
    corpus = grammar.corpus(tokens=2**18, context=256, packed=True)
    control = NGram.fit(corpus, order=4).corpus(tokens=2**18, packed=True)
    source, model = (describe(text, max_distance=3) for text in (corpus, control))
    assert information(model) == pytest.approx(information(source), rel=0.05)
    assert information(source)[-1] > 0.01


@pytest.mark.parametrize(
    "grammar",
    [cfg3(n_levels=6), random_hierarchy(n_symbols=6, n_tuples=4, n_levels=5, n_classes=6)],
    ids=["cfg3", "random_hierarchy"],
)
def test_mutual_information_of_a_hierarchy_outlives_that_of_its_ngram_model(grammar):
    corpus = grammar.corpus(tokens=2**18, context=256, packed=True)
    control = NGram.fit(corpus, order=3).corpus(tokens=2**18, packed=True)
    hierarchy, flat = describe(corpus, max_distance=16), describe(control, max_distance=16)
    near, far = 0, -1
    assert information(flat)[near] == pytest.approx(information(hierarchy)[near], rel=0.05)
    assert information(hierarchy, "_low")[far] > 3 * information(flat, "_high")[far]


def test_fewer_than_ten_rows_leave_mutual_information_unknown():
    corpus = dyck().corpus(tokens=640, context=64)
    assert np.isfinite(information(describe(corpus))).all()
    assert np.isnan(information(describe(corpus, n_rows=9))).all()


@pytest.mark.parametrize("counts", [[1, 1, 1, 2, 2, 5], [1, 1, 1, 1], [3, 2, 9, 40], [1, 4, 4, 2]])
def test_entropy_estimate_is_the_published_series(counts):
    n, f1, f2 = sum(counts), counts.count(1), counts.count(2)
    entropy = sum(c / n * (digamma(n) - digamma(c)) for c in counts)
    if f1:
        a = 2 * f2 / ((n - 1) * f1 + 2 * f2) if f2 else 2 / ((n - 1) * (f1 - 1) + 2)
        series = -math.log(a) - sum((1 - a) ** r / r for r in range(1, n))
        entropy += f1 / n * (1 - a) ** (1 - n) * series
    values = [np.array(float(v)) for v in (sum(c * digamma(c) for c in counts), f1, f2, n)]
    assert chao_wang_jost(*values) == pytest.approx(entropy, abs=f1 / n / n + 1e-12)


@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 60), st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_entropies_without_a_group_are_those_of_the_other_groups_pairs(n_groups, rows, positions, vocab_size, seed):
    first, second = np.random.default_rng(seed).integers(0, vocab_size, (2, n_groups, rows, positions), dtype=np.uint16)
    terms = np.append(0.0, [n * digamma(n) for n in range(1, first.size + 1)])
    found = _pair_entropies(first, second, vocab_size, terms)
    for left_out in range(-1, n_groups):
        kept = [g for g in range(n_groups) if g != left_out]
        counts = list(Counter(zip(first[kept].ravel().tolist(), second[kept].ravel().tolist(), strict=True)).values())
        sums = (sum(c * digamma(c) for c in counts), counts.count(1), counts.count(2), sum(counts))
        expected = chao_wang_jost(*(np.array(float(v)) for v in sums))
        assert found[left_out + 1] == pytest.approx(float(expected))


@given(st.integers(1, 5000))
def test_distances_are_spaced_evenly_on_a_logarithmic_axis(largest):
    distances = spaced_distances(largest)
    assert (distances[0], distances[-1]) == (1, largest)
    assert (np.diff(distances) > 0).all()
    assert (distances[1:] <= 2 * distances[:-1]).all()
    assert len(distances) <= 2 * math.log2(largest) + 2


# -- tokens and documents --------------------------------------------------------------------------------------------


def test_frequencies_are_those_of_the_rows_read():
    corpus = dyck().corpus(tokens=2**19, context=64, seed=5)
    n_rows = corpus.rows_per_block + 10  # in two blocks
    counts = Counter(corpus.rows(0, n_rows).ravel().tolist())
    text = describe(corpus, n_rows=n_rows, max_distance=1)
    expected = [counts[t] / (64 * n_rows) for t in range(corpus.grammar.vocab_size)]
    assert text.frequency.to_numpy().tolist() == expected
    assert text.token.to_numpy().tolist() == corpus.grammar.vocabulary
    assert np.array_equal(text.unigram, corpus.grammar.unigram)
    assert text.attrs["n_tokens"] == 64 * n_rows


@given(st.lists(st.integers(1, 30), min_size=1, max_size=50))
def test_lengths_of_complete_documents_are_counted(lengths):
    share = length_shares(np.array(lengths), np.array([0, 0]))
    assert len(share) == max(lengths)
    for n in range(1, max(lengths) + 1):
        assert share[n - 1] == pytest.approx(lengths.count(n) / len(lengths))


def test_cut_documents_count_as_longer_than_their_parts():
    # By hand: of 5 documents 1 has one token; of the 3 known longer than one, 1 has two; the rest has three.
    share = length_shares(np.array([1, 2, 3]), np.array([1, 2]))
    assert share == pytest.approx([1 / 5, 4 / 5 * 1 / 3, 4 / 5 * 2 / 3])
    assert length_shares(np.array([2]), np.array([7])) == pytest.approx([0, 0.5])
    assert length_shares(np.empty(0, dtype=int), np.array([7])) == pytest.approx([0])


@pytest.mark.parametrize("packed", [False, True])
def test_lengths_of_documents_follow_the_grammars_law_though_rows_cut_long_ones(packed):
    grammar = dyck(n_brackets=1)
    text = describe(grammar.corpus(tokens=2**18, context=16, packed=packed), max_distance=1)
    share, expected = text.length_share.to_numpy()[:16], text.length_expected.to_numpy()[:16]
    # With its <eos> a string is longer by one.
    assert np.array_equal(expected, grammar.length_probabilities(15)[: len(expected)])
    assert 0.5 < expected.sum() < 0.95
    assert np.abs(share - expected).max() < 3 * math.sqrt(0.25 / 2**14)
    assert share[:13].sum() == pytest.approx(expected[:13].sum(), abs=0.01)


def test_the_law_of_lengths_is_that_of_the_accepted_strings_with_their_eos():
    text = "S -> 'a' S [0.5] | 'a' [0.5]"
    grammar = PCFG.from_string(text, lengths=(2, 4))
    described = describe(grammar.corpus(tokens=4096, context=32))
    # Strings of 2, 3, 4 tokens have 1/4, 1/8, 1/16; with <eos> they are 3, 4, 5 long.
    assert described.length_expected.to_numpy() == pytest.approx(np.array([0, 0, 4, 2, 1]) / 7)
    assert described.length_share.to_numpy() == pytest.approx(np.array([0, 0, 4, 2, 1]) / 7, abs=0.07)
    assert np.isnan(describe(NGram(n_tokens=5).corpus(tokens=2000, context=200)).length_expected).all()


def test_a_document_of_several_sentences_is_counted_once():
    grammar = DocumentGrammar(n_words=3, n_sections=1, n_paragraphs=1, n_sentences=3, max_clauses=1, lexicon="fixed")
    text = describe(grammar.corpus(tokens=1000, context=30))
    # Three sentences of four tokens; a row of 30 tokens holds two documents and half of a third.
    assert text.length_share.to_numpy().tolist() == [0.0] * 11 + [1.0]
    assert (text.attrs["n_documents"], text.attrs["n_documents_cut"]) == (2 * 34, 34)


# -- conventions -----------------------------------------------------------------------------------------------------


def test_a_description_is_the_same_again_and_survives_a_file(tmp_path):
    corpus = cfg3(n_levels=3).corpus(tokens=3000, context=30)
    text = describe(corpus)
    assert describe(corpus).identical(text)
    assert load(save(text, tmp_path / "text.nc")).identical(text)
    assert text.attrs["phenomenon"] == "corpus"
    for variable in text.data_vars.values():
        assert {"long_name", "units"} <= set(variable.attrs)


def test_rows_and_distances_out_of_range_are_refused():
    corpus = dyck().corpus(tokens=640, context=64)
    with pytest.raises(ValueError, match="n_rows is 11; this corpus has 1 to 10 rows"):
        describe(corpus, n_rows=11)
    with pytest.raises(ValueError, match="max_distance is 64; two tokens of a row of 64 are 1 to 63 apart"):
        describe(corpus, max_distance=64)

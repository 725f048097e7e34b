"""A corpus is the same text however it is read, and knows the floor of its language."""

import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from scipy import stats

from mechhier.grammars import (
    PCFG,
    AnyGrammar,
    Corpus,
    CorpusError,
    DocumentGrammar,
    NGram,
    cfg3,
    dyck,
    random_hierarchy,
)
from mechhier.grammars.floor import floor as floor_of
from mechhier.specs import SpecError

POOL = DocumentGrammar(n_words=6, lexicon=4, binding=1.0)


@pytest.fixture(scope="module")
def corpus():
    """Two whole blocks and a part of a third, of 2730 rows each."""
    return POOL.corpus(tokens=6000 * 96, context=96, seed=3)


def test_tokens_are_rounded_up_to_whole_rows():
    corpus = POOL.corpus(tokens=1001, context=100)
    assert (corpus.n_rows, len(corpus), corpus.n_tokens) == (11, 11, 1100)
    assert POOL.corpus(tokens=1000).context == POOL.default_context


def test_rows_are_the_same_in_whatever_portions_they_are_read(corpus):
    whole = corpus.rows(0, corpus.n_rows)
    assert whole.shape == (6000, 96)
    assert whole.dtype == np.int64
    assert corpus.n_blocks == 3
    np.testing.assert_array_equal(corpus.rows(2720, 2740), whole[2720:2740])
    np.testing.assert_array_equal(corpus[2730], whole[2730])
    np.testing.assert_array_equal(corpus[-1], whole[5999])
    np.testing.assert_array_equal(corpus.sample(2700, 5500).tokens, whole[2700:5500])
    assert corpus.rows(7, 7).shape == (0, 96)


def test_a_longer_corpus_begins_with_a_shorter_one(corpus):
    shorter = POOL.corpus(tokens=3000 * 96, context=96, seed=3)
    np.testing.assert_array_equal(shorter.rows(2000, 3000), corpus.rows(2000, 3000))


def test_blocks_seeds_splits_and_grammars_are_different_streams(corpus):
    first = corpus.rows(0, 100)
    others = [
        corpus.rows(2730, 2830),
        POOL.corpus(96 * 100, context=96, seed=4).rows(0, 100),
        corpus.held_out(tokens=96 * 100).rows(0, 100),
        corpus.held_out("test").rows(0, 100),
        POOL.model_copy(update={"n_sections": 3}).corpus(96 * 100, context=96, seed=3).rows(0, 100),
    ]
    streams = [first, *others]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert (one == other).mean() < 0.5


def test_the_text_of_a_seed_is_pinned():
    """A change of these tokens makes every stored corpus and every result irreproducible: raise the version then."""
    documents = DocumentGrammar(n_words=3, n_connectors=2, lexicon=2)
    flat = documents.model_copy(update={"hierarchical": False, "lexicon": "per_document"})
    pinned = [
        (documents, "0 3 8 9 0 3 8 9 1 5 8 11 2 3 6 10"),
        (flat, "3 6 9 0 3 1 5 7 11 3 2 5 1 3 8 11"),
        (NGram(n_tokens=9, row_exponent_mean=0.5, row_exponent_min=0.0), "2 0 2 2 5 6 5 0 7 6 3 8 2 6 0 6"),
        (NGram.fit(documents.corpus(1000, context=16), 2), "3 6 11 0 8 11 0 8 11 1 3 8 11 0 3 2"),
        (cfg3(n_levels=2), "1 0 1 0 2 3 2 0 1 0 1 2 0 3 2 0"),
        (random_hierarchy(n_levels=2), "4 4 3 3 8 5 0 4 4 8 5 6 6 4 8 6"),
    ]
    for grammar, expected in pinned:
        assert " ".join(map(str, grammar.corpus(16, context=16)[0])) == expected
    dealt = dyck(lengths=(2, 6)).corpus(16, context=16, disjoint=True)
    assert " ".join(map(str, dealt[0])) == "2 3 4 0 1 4 2 3 4 0 1 2 3 4 0 1"


def test_held_out_text_has_the_layout_of_the_corpus_and_another_split(corpus):
    held_out = corpus.held_out()
    assert (held_out.split, held_out.n_rows, held_out.context, held_out.seed) == ("validation", 256, 96, 3)
    with pytest.raises(ValueError, match="this corpus is the 'validation' split"):
        held_out.held_out("validation")


def test_per_document_lexicons_have_one_number_each_across_blocks():
    corpus = DocumentGrammar(n_words=6, lexicon="per_document").corpus(tokens=3000 * 96, context=96)
    sample = corpus.sample(2725, 2735)
    words: dict[tuple[int, int, int], int] = {}
    labels = [sample.labels[name].ravel().tolist() for name in ("lexicon", "category", "rank")]
    for *key, token in zip(*labels, sample.tokens.ravel().tolist(), strict=True):
        if key[2] >= 0:
            assert words.setdefault(tuple(key), token) == token
    assert np.unique(sample.labels["lexicon"][:5]).max() < np.unique(sample.labels["lexicon"][5:]).min()


def test_packed_rows_are_one_stream_cut_into_rows():
    corpus = POOL.corpus(tokens=200 * 50, context=50, packed=True)
    text = "".join("svoc<"[c] for c in POOL.token_categories[corpus.rows(0, 200).ravel()])
    parts = text.split("<")[:-1]
    assert set(parts) == {"vso", "svo", "svocsvo", "svocsvocsvo"}


def test_description_describes_the_corpus_again(corpus):
    again = Corpus.from_description(corpus.description)
    assert again == corpus
    with pytest.raises(SpecError):
        Corpus.from_description(corpus.description | {"grammar": {"kind": "document", "n_words": 0}})


def test_a_grammar_is_read_by_its_kind():
    adapter = TypeAdapter(AnyGrammar)
    assert adapter.validate_python({"kind": "ngram", "n_tokens": 5}) == NGram(n_tokens=5)
    read = adapter.validate_python({"kind": "document", "lexicon": 8, "n_words": [3, 4, 5]})
    assert read == DocumentGrammar(lexicon=8, n_words=(3, 4, 5))
    for grammar in (POOL, NGram.paper(), DocumentGrammar.paper(), read):
        assert adapter.validate_json(grammar.model_dump_json()) == grammar
    with pytest.raises(ValidationError, match="kind: must be one of document, ngram"):
        adapter.validate_python({"kind": "markov"})


def test_a_corpus_can_be_pickled_and_leaves_its_blocks_behind(corpus):
    expected = corpus.rows(0, 2)
    data = pickle.dumps(corpus)
    assert len(data) < 50_000
    np.testing.assert_array_equal(pickle.loads(data).rows(0, 2), expected)


def test_a_corpus_keeps_a_few_blocks_in_memory():
    corpus = POOL.corpus(tokens=7 * 2**17, context=2**17)
    for first in range(0, 7, 2):
        corpus.rows(first, first + 1)
    assert list(corpus._blocks) == [0, 1, 2, 3]
    corpus = POOL.corpus(tokens=6 * 2**18, context=2**18)
    for row in (0, 1, 2, 3, 0, 4, 5):
        corpus[row]
    assert list(corpus._blocks) == [3, 0, 4, 5]


def test_floor_of_an_exact_language_is_its_predictors_loss_on_held_out_rows():
    corpus = POOL.corpus(tokens=96 * 1000, context=96)
    floor = corpus.floor(n_rows=40)
    loss = POOL.ideal_loss(corpus.held_out().sample(0, 40)).estimate
    for name in ("floor", "floor_lower", "floor_upper"):
        np.testing.assert_allclose(floor[name], loss.mean(axis=0))
        assert float(floor[f"{name}_mean"]) == pytest.approx(loss[:, 1:].mean())
        assert floor[f"{name}_mean_low"] < floor[f"{name}_mean"] < floor[f"{name}_mean_high"]
    assert float(floor.floor_mean_error) == 0
    assert all(v.attrs["units"] == "nats" and v.attrs["long_name"] for v in floor.data_vars.values())
    assert (floor.attrs["split"], floor.attrs["n_rows"]) == ("validation", 40)


def test_floor_of_a_held_out_corpus_is_measured_on_itself():
    held_out = NGram().corpus(tokens=64 * 300, context=64).held_out("test", tokens=64 * 20)
    floor = held_out.floor()
    loss = held_out.grammar.ideal_loss(held_out.sample(0, 20)).estimate
    np.testing.assert_allclose(floor.floor, loss.mean(axis=0))
    assert (floor.attrs["split"], floor.attrs["n_rows"]) == ("test", 20)


def test_floor_of_per_document_lexicons_lies_between_its_bounds():
    floor = DocumentGrammar(zipf=2.0).corpus(tokens=96 * 1000, context=96).floor(n_rows=20)
    assert float(floor.floor_lower_mean) + 0.1 < float(floor.floor_mean) < float(floor.floor_upper_mean) - 0.1


def test_floor_of_an_estimate_says_how_well_its_rows_and_all_rows_are_known():
    corpus = DocumentGrammar(n_words=6, binding=0.5, n_sections=1).corpus(tokens=32 * 10, context=32, split="test")
    floor = corpus.floor(n_rows=3)
    found = corpus.grammar.ideal_loss(corpus.sample(0, 3))
    assert floor.floor_mean_error.item() == pytest.approx(math.hypot(*found.mean_error) / 3)
    assert floor.floor_mean_error < floor.floor_error[1:].mean()  # errors of a row's tokens partly cancel
    means = found.estimate[:, 1:].mean(axis=1)
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert (floor.floor_mean_low.item(), floor.floor_mean_high.item()) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("n_rows", [2, 4, 16])
def test_floors_interval_covers_the_mean_over_all_rows_in_95_of_100_samples(n_rows):
    def mean(seed, n):
        return floor_of(POOL, POOL.generate(n, 48, np.random.default_rng(seed)))

    truth = mean(0, 4000).floor_mean.item()
    samples = [mean(seed, n_rows) for seed in range(1, 401)]
    covered = np.mean([s.floor_mean_low <= truth <= s.floor_mean_high for s in samples])
    assert 0.92 < covered < 0.98  # with the normal quantile: .70, .85, .93


def test_floor_of_a_grammar_with_rejected_lengths_says_that_only_bounds_are_known():
    floor = dyck(lengths=(2, 40)).corpus(tokens=64 * 100, context=64).floor(n_rows=10)
    assert np.isnan(floor.floor_mean_error)
    assert float(floor.floor_lower_mean) < float(floor.floor_upper_mean)
    assert floor.attrs["method"].startswith("upper bound")


def test_floor_of_packed_rows_is_refused(corpus):
    packed = POOL.corpus(tokens=1000, context=50, packed=True)
    with pytest.raises(ValueError, match="packed=False"):
        packed.floor()
    with pytest.raises(ValueError, match="n_rows must be at least 2"):
        corpus.floor(n_rows=1)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"tokens": 95, "context": 96}, "at least context = 96"),
        ({"tokens": 1000, "context": 3}, "at least 4"),
        ({"tokens": 1000, "seed": -1}, "seed must be at least 0"),
        ({"tokens": 1000, "split": "dev"}, "train, validation, test"),
    ],
)
def test_a_wrong_corpus_is_refused_with_what_is_accepted(values, says):
    with pytest.raises(ValueError, match=says):
        POOL.corpus(**values)


def test_rows_out_of_range_are_refused(corpus):
    with pytest.raises(ValueError, match="of a corpus of 6000 rows"):
        corpus.rows(5990, 6001)
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        corpus.rows(5, 4)
    with pytest.raises(ValueError, match="at least one row"):
        corpus.sample(5, 5)
    for index in (6000, -6001):
        with pytest.raises(IndexError, match="6000 rows"):
            corpus[index]


def test_trees_of_blocks_of_different_depth_are_read_together():
    grammar = PCFG.from_string("S -> 'a' S 'b' [0.45] | 'a' 'b' [0.55]")
    corpus = grammar.corpus(tokens=2**19, context=64)
    assert corpus.n_blocks == 2
    first = corpus.rows_per_block
    sample = corpus.sample(first - 3, first + 3, trees=True)
    np.testing.assert_array_equal(sample.tokens, corpus.rows(first - 3, first + 3))
    for row in range(6):
        trees = grammar.trees(sample, row)
        words = [grammar.vocabulary[t] for t in sample.tokens[row] if t != grammar.eos_token_id]
        assert [token for tree in trees for token in tree.tokens] == words
    with pytest.raises(ValueError, match="NGram has no trees"):
        NGram().corpus(1000).sample(0, 1, trees=True)


def test_a_corpus_is_exported_as_a_hugging_face_dataset():
    corpus = POOL.corpus(tokens=96 * 50, context=96)
    dataset = corpus.to_dataset()
    assert dataset.num_rows == 50
    np.testing.assert_array_equal(np.array(dataset["input_ids"]), corpus.rows(0, 50))
    assert Corpus.from_description(json.loads(dataset.info.description)) == corpus


# -- what splits share -----------------------------------------------------------------------------------------------

SMALL = random_hierarchy(n_symbols=4, n_levels=2)  # 8 classes x 2 x 2^2 strings of 4 tokens, all equally likely


def documents_of(corpus):
    """The documents that rows hold whole, as tuples: an independent reading of the text."""
    eos, per_document = corpus.grammar.eos_token_id, corpus.grammar.eos_per_document
    found = set()
    for row in corpus.rows(0, corpus.n_rows).tolist():
        document = []
        for token in row:
            document.append(token)
            if token == eos and document.count(eos) == per_document:
                found.add(tuple(document))
                document = []
    return found


@pytest.mark.parametrize(
    "grammar", [SMALL, DocumentGrammar(n_words=2, lexicon="fixed", n_connectors=1, n_sections=1, n_paragraphs=1)]
)
def test_dealt_splits_share_no_document_and_others_do(grammar):
    dealt = grammar.corpus(tokens=2**14, context=64, disjoint=True)
    splits = [documents_of(corpus) for corpus in (dealt, dealt.held_out("validation"), dealt.held_out("test"))]
    assert all(splits)
    assert not splits[0] & splits[1]
    assert not splits[0] & splits[2]
    assert not splits[1] & splits[2]
    free = grammar.corpus(tokens=2**14, context=64)
    assert documents_of(free) & documents_of(free.held_out("test"))
    dealt.require_disjoint(dealt.held_out("test"))
    with pytest.raises(CorpusError, match=r"of \d+ documents of the test split .* also occur in the train split"):
        free.require_disjoint(free.held_out("test"))


def test_packed_rows_are_dealt_too():
    packed = SMALL.corpus(2**12, context=16, disjoint=True, packed=True)
    stream = packed.rows(0, packed.n_rows).ravel()
    documents = [tuple(part.tolist()) for part in np.split(stream, np.flatnonzero(stream == SMALL.eos_token_id) + 1)]
    assert len(documents) > 800
    assert set(documents[:-1]) <= documents_of(SMALL.corpus(2**16, context=64, disjoint=True))


def test_the_splits_get_their_shares_of_the_documents():
    shares = {}
    for split in ("train", "validation", "test"):
        shares[split] = len(documents_of(SMALL.corpus(2**17, context=64, disjoint=True, split=split))) / 64
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["train"] == pytest.approx(0.8, abs=0.15)


def test_dealt_rows_begin_documents_and_carry_their_labels():
    corpus = cfg3(n_levels=3, seed=1).corpus(tokens=2**13, context=64, disjoint=True)
    sample = corpus.sample(3, 60, trees=True)
    np.testing.assert_array_equal(sample.tokens, corpus.rows(3, 60))
    assert not sample.labels["position"][:, 0].any()
    is_eos = sample.tokens == corpus.grammar.eos_token_id
    np.testing.assert_array_equal(sample.labels["category"] == len(corpus.grammar.nonterminals), is_eos)
    before = np.cumsum(is_eos, axis=1) - is_eos
    np.testing.assert_array_equal(sample.labels["document"], before)
    for row in range(5):
        trees = corpus.grammar.trees(sample, row)
        assert len(trees) == sample.labels["document"][row].max() + (0 if is_eos[row, -1] else 1) + is_eos[row, -1]
        assert np.isfinite(corpus.grammar.log_probability(np.array([int(t[1:]) for t in trees[0].tokens])))


def test_lexicons_that_are_too_few_to_differ_are_refused():
    many = DocumentGrammar(n_words=30).corpus(10**6)
    many.require_disjoint(many.held_out("test"))
    few = DocumentGrammar(n_words=3).corpus(10**6)
    with pytest.raises(CorpusError, match="may share one"):
        few.require_disjoint(few.held_out("test"))


def test_what_cannot_be_dealt_or_compared_is_refused(corpus):
    with pytest.raises(ValueError, match="lexicons already differ"):
        DocumentGrammar().corpus(1000, disjoint=True)
    with pytest.raises(ValueError, match="different languages"):
        corpus.require_disjoint(SMALL.corpus(1000))
    packed = SMALL.corpus(1000, packed=True)
    with pytest.raises(ValueError, match="packed=False"):
        packed.require_disjoint(packed.held_out("test"))
    one = PCFG.from_string("S -> 'a' 'a' 'a' [1.0]").corpus(1000, context=8, disjoint=True, split="test")
    with pytest.raises(ValueError, match="too few different ones"):
        one.rows(0, 1)


def test_a_large_vocabulary_is_kept_in_32_bits():
    large = DocumentGrammar(n_words=30_000, lexicon="fixed").corpus(tokens=2**12, context=2**10)
    assert large.dtype == np.uint32
    assert large.rows(0, 4).max() > 2**16
    assert POOL.corpus(1000).dtype == np.uint16


def test_grammars_import_neither_torch_nor_transformers():
    code = "import sys, mechhier.grammars; print(*{'torch', 'transformers', 'pandas'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""

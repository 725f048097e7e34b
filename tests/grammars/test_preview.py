"""`mechhier corpus`: what it shows and stores, and what it says of a wrong spec."""

import re

import numpy as np
import pytest
from typer.testing import CliRunner

from mechhier.cli import app
from mechhier.grammars import Corpus, dyck

DYCK = "grammar: {kind: dyck, n_brackets: 1, max_depth: 3}\ntokens: 20000\ncontext: 64\nseed: 3\n"


def run(*arguments):
    return CliRunner().invoke(app, ["corpus", *map(str, arguments)], env={"COLUMNS": "120"})


def test_it_shows_sentences_a_tree_frequencies_floors_and_what_splits_share(tmp_path):
    (tmp_path / "dyck.yaml").write_text(DYCK)
    result = run(tmp_path / "dyck.yaml")
    assert result.exit_code == 0, result.output
    corpus = dyck(n_brackets=1, max_depth=3).corpus(20000, context=64, seed=3)
    words = [corpus.grammar.vocabulary[token] for token in corpus[0]]
    first = " ".join(words[: words.index("<eos>") + 1])
    shown = re.findall(r"^  ([()].*(?:<eos>|tokens\))) *$", result.output, flags=re.MULTILINE)
    assert len(shown) == 10
    assert shown[0] == first
    assert "D1" in result.output
    for token, probability in zip(corpus.grammar.vocabulary, corpus.grammar.unigram, strict=True):
        assert re.search(rf"^ {re.escape(token)} +{probability:.4f}", result.output, flags=re.MULTILINE)
    assert f"{float(corpus.floor(64).floor_mean):.4f}" in result.output
    assert "exact: ratios of prefix probabilities" in result.output
    assert "also occur in the train split" in result.output


def test_it_stores_the_corpus_and_the_same_command_opens_it_again(tmp_path):
    (tmp_path / "dyck.yaml").write_text(DYCK)
    for _ in range(2):
        result = run(tmp_path / "dyck.yaml", "--out", tmp_path / "stored", "--workers", 2)
        assert result.exit_code == 0, result.output
    stored = Corpus.open(tmp_path / "stored")
    expected = dyck(n_brackets=1, max_depth=3).corpus(20000, context=64, seed=3)
    np.testing.assert_array_equal(stored.rows(0, stored.n_rows), expected.rows(0, expected.n_rows))


@pytest.mark.parametrize("kind", ["{kind: ngram, n_tokens: 9}", "{kind: document, n_words: 9}"])
def test_packed_rows_and_languages_without_trees_are_shown_too(tmp_path, kind):
    (tmp_path / "spec.yaml").write_text(f"grammar: {kind}\ntokens: 5000\ncontext: 50\npacked: true\n")
    result = run(tmp_path / "spec.yaml")
    assert result.exit_code == 0, result.output
    assert "not defined for packed rows" in result.output
    assert ("the first tree" in result.output) == ("document" in kind)
    for arm in (
        "hierarchical  fixed",
        "hierarchical  per_document",
        "flat          fixed",
        "flat          per_document",
    ):
        assert (arm in result.output) == ("document" in kind)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grammar: {kind: dyck, brackets: 2}\ntokens: 100", "grammar.brackets"),
        ("grammar: {kind: cfg3, n_symbols: 1}\ntokens: 100", "grammar.n_symbols: must be at least 2, got 1"),
        ("grammar: {kind: dyck}\ntoken: 100", "tokens: is missing"),
        ("grammar: {kind: pcfg, start: S, terminals: [a], rules: [[S, [a], 0.5]]}\ntokens: 99", "sum to 0.5, not 1"),
        ("- 1", "must hold the fields grammar, tokens"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_spec_is_refused_with_the_field_named(tmp_path, text, message):
    (tmp_path / "wrong.yaml").write_text(text)
    result = run(tmp_path / "wrong.yaml")
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_wrong_size_and_an_unknown_name_are_refused(tmp_path):
    (tmp_path / "short.yaml").write_text("grammar: {kind: dyck}\ntokens: 10\n")
    result = run(tmp_path / "short.yaml")
    assert (result.exit_code, "less than one row" in result.output) == (2, True)
    result = run("nothing")
    assert result.exit_code == 2
    assert "no packaged corpus of that name (cfg3, paper_document, paper_ngram)" in result.output.replace("\n", " ")


@pytest.mark.parametrize("name", ["cfg3", "paper_document", "paper_ngram"])
def test_the_packaged_corpora_are_read(name):
    from mechhier.grammars import CorpusSpec, DocumentGrammar, NGram, cfg3
    from mechhier.specs import read_spec

    corpus = read_spec(CorpusSpec, name, package="mechhier.grammars.corpora").corpus()
    expected = {"cfg3": cfg3(), "paper_document": DocumentGrammar.paper(), "paper_ngram": NGram.paper()}
    assert corpus.grammar == expected[name]
    assert corpus.context == 512

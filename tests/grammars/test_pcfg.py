"""Context-free grammars against NLTK's reading of them, enumeration of all their derivations, and closed forms."""

import json
import math
from collections import Counter
from pathlib import Path

import nltk
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from random_grammars import derivations, ids, pcfgs, strings
from scipy.stats import chisquare

from mechhier.grammars import PCFG, AnyGrammar, Rule
from mechhier.specs import SpecError

ENGLISH = """
# A toy grammar in NLTK's notation.
S -> NP VP [1.0]
NP -> Det N [0.5] | NP PP [0.25]
NP -> 'John' [0.1] | "I" [0.15]
Det -> 'the' [0.8] | 'my' [0.2]
N -> 'man' [0.5] | 'telescope' [0.5]
VP -> VP PP [0.1] | V NP [0.7] | V [0.2]
V -> 'ate' [0.35] | 'saw' [0.65]
PP -> P NP [1.0]
P -> 'with' [0.61] | 'under' [0.39]
"""
ANBN = PCFG.from_string("S -> 'a' S 'b' [0.4] | 'a' 'b' [0.6]")
ANCHORS = Path(__file__).resolve().parents[3] / "shared" / "anchors"

relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def text_of(grammar, n_strings, seed=0):
    """Strings as tuples of terminals, whole ones only."""
    length = int(n_strings * (grammar.expected_length + 1) * 1.2) + 50
    stream = grammar.generate(1, length, np.random.default_rng(seed)).tokens[0]
    ends = np.flatnonzero(stream == grammar.eos_token_id)
    parts = np.split(stream, ends + 1)[: len(ends)]
    return [tuple(grammar.vocabulary[t] for t in part[:-1]) for part in parts]


# -- reading ---------------------------------------------------------------------------------------------------------


def test_nltks_notation_is_read_as_nltk_reads_it():
    grammar, theirs = PCFG.from_string(ENGLISH), nltk.PCFG.fromstring(ENGLISH)
    expected = {(str(p.lhs()), tuple(map(str, p.rhs())), p.prob()) for p in theirs.productions()}
    assert set(grammar.rules) == expected
    assert grammar.start == str(theirs.start())
    assert grammar.terminals == ("John", "I", "the", "my", "man", "telescope", "ate", "saw", "with", "under")


def test_what_is_written_is_read_by_nltk_and_by_us():
    grammar = PCFG(start="S", terminals=("it's", "->", "|"), rules=[("S", ("it's", "->", "|"), 1.0)])
    assert PCFG.from_string(grammar.to_string()) == grammar
    written = PCFG.from_string(ENGLISH).to_string()
    read = nltk.PCFG.fromstring(written.split("\n", 1)[1])
    assert {(str(p.lhs()), tuple(map(str, p.rhs())), p.prob()) for p in read.productions()} == set(
        PCFG.from_string(ENGLISH).rules
    )


@given(pcfgs())
@relaxed
def test_text_and_json_give_the_same_grammar_back(grammar):
    assert TypeAdapter(AnyGrammar).validate_python(json.loads(grammar.model_dump_json())) == grammar
    again = PCFG.from_string(grammar.to_string())
    assert set(again.rules) == set(grammar.rules)
    assert again.start == grammar.start


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rules"),
        ("S => 'a' [1.0]", "line 1"),
        ("S -> 'a'", "ends with its probability"),
        ("S -> 'a' [0.5] 'b' [0.5]", "write | between"),
        ("S -> 'a' [x]", r"\[x\] is not a probability"),
        ("S -> 'a [1.0]", "not understood"),
    ],
)
def test_a_line_that_is_not_a_rule_is_refused_with_its_number(text, message):
    with pytest.raises(ValueError, match=message):
        PCFG.from_string(text)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("S", ("a",), 0.5)], r"probabilities of 'S' sum to 0.5, not 1: S -> a \[0.5\]"),
        ([("S", ("a", "B"), 1.0)], r"in S -> a B \[1\]: 'B' has no rule"),
        ([("S", ("a",), 0.5), ("S", ("S", "S"), 0.5)], r"spectral radius.*S -> S S"),
        ([("S", ("a",), 0.9), ("S", ("B",), 0.1), ("B", ("B",), 1.0)], "'B' is unproductive"),
        ([("S", ("a",), 1.0), ("B", ("a",), 1.0)], r"B -> a \[1\]: 'B' is unreachable"),
        ([("S", ("a",), 1.0), ("S", ("a",), 0.0)], r"S -> a \[0\]: a probability is above 0"),
        ([("S", ("a",), 0.5), ("S", ("a",), 0.5)], "listed twice"),
        ([("T", ("a",), 1.0)], "start symbol 'S' has no rule"),
        ([("S", ("a",), 1.0), ("a", (), 1.0)], "'a' is a terminal and has rules"),
        ([("S", (), 1.0)], "terminal 'a' is unreachable"),
    ],
)
def test_what_is_not_a_grammar_is_refused_and_the_rule_named(rules, message):
    with pytest.raises(SpecError, match=message):
        PCFG(start="S", terminals=("a",), rules=rules)


@pytest.mark.parametrize(
    ("terminal", "message"),
    [("<eos>", "end of a string"), ("<unk>", "no word"), ("", "no word"), ("a b", "spaces between")],
)
def test_what_text_could_not_show_cannot_be_a_terminal(terminal, message):
    with pytest.raises(SpecError, match=message):
        PCFG(start="S", terminals=(terminal,), rules=[("S", (terminal,), 1.0)])


def test_a_table_of_another_form_is_refused():
    with pytest.raises(ValueError, match="not a cfg3 table"):
        PCFG.from_cfg3({"all": [[{"id": 1, "children": [[7]]}]]})


@pytest.mark.skipif(not ANCHORS.is_dir(), reason="the published rule tables are not here")
def test_the_published_cfg3b_has_its_published_length_and_entropy():
    grammar = PCFG.from_cfg3(ANCHORS / "cfg3b.json")
    assert grammar.expected_length == pytest.approx(276, abs=0.5)
    assert grammar.max_document_length == 432 + 1
    assert grammar.derivation_entropy / np.log(2) / grammar.expected_length == pytest.approx(0.61, abs=0.005)
    assert len(grammar.rules) == 2 * (1 + 5 * 3)


@pytest.mark.skipif(not ANCHORS.is_dir(), reason="the published rule tables are not here")
@pytest.mark.parametrize(("name", "n_levels"), [("cfg3f", 6), ("cfg3k", 7)])
def test_the_other_published_tables_are_read(name, n_levels):
    grammar = PCFG.from_cfg3(ANCHORS / f"{name}.json")
    sample = grammar.generate(2, 64, np.random.default_rng(0))
    text = sample.labels["category"] < len(grammar.nonterminals)
    assert set(sample.labels["depth"][text]) == {n_levels}
    assert grammar.terminals == ("1", "2", "3")


# -- moments ---------------------------------------------------------------------------------------------------------


@given(pcfgs(recursive=False))
@relaxed
def test_lengths_counts_and_entropy_are_those_of_the_enumerated_derivations(grammar):
    found = list(derivations(grammar))
    assert grammar.expected_length == pytest.approx(sum(p * len(s) for p, s, _ in found))
    for terminal in grammar.terminals:
        assert grammar.expected_counts[terminal] == pytest.approx(sum(p * s.count(terminal) for p, s, _ in found))
    assert grammar.derivation_entropy == pytest.approx(-sum(p * math.log(p) for p, _, _ in found))
    assert grammar.max_document_length == max(len(s) for _, s, _ in found) + 1
    laws = Counter()
    for p, s, _ in found:
        laws[len(s)] += p
    longest = max(laws)
    assert grammar.length_probabilities(longest) == pytest.approx([laws[n] for n in range(longest + 1)])


@given(pcfgs(recursive=False))
@settings(relaxed, max_examples=20)
def test_derivation_entropy_is_the_strings_entropy_where_each_has_one_derivation(grammar):
    probabilities, counts = strings(grammar)
    entropy = -sum(p * math.log(p) for p in probabilities.values())
    if max(counts.values()) == 1:
        assert grammar.derivation_entropy == pytest.approx(entropy)
    else:
        assert grammar.derivation_entropy > entropy - 1e-12


def test_closed_forms_of_a_recursive_grammar():
    # n pairs with probability 0.6 * 0.4 ** (n - 1): a geometric law.
    assert ANBN.expected_length == pytest.approx(2 / 0.6)
    assert ANBN.derivation_entropy == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.4)) / 0.6)
    lengths = ANBN.length_probabilities(9)
    assert lengths == pytest.approx([0, 0, 0.6, 0, 0.24, 0, 0.096, 0, 0.0384, 0])
    assert ANBN.max_document_length is None
    assert ANBN.default_context == 512
    assert ANBN.unigram == pytest.approx(np.array([1 / 0.6, 1 / 0.6, 1]) / (2 / 0.6 + 1))


@pytest.mark.parametrize("bounds", [(1, 3), (2, 6), (3, 3)])
def test_rejected_lengths_leave_the_grammar_given_the_length(bounds):
    text = "S -> A A [0.5] | A 'c' A 'c' [0.3] | [0.2]\nA -> 'a' [0.6] | 'b' 'b' [0.3] | [0.1]"
    whole, grammar = PCFG.from_string(text), PCFG.from_string(text, lengths=bounds)
    accepted = {s: p for s, p in strings(whole)[0].items() if bounds[0] <= len(s) <= bounds[1]}
    mass = sum(accepted.values())
    assert grammar.rejected_mass == pytest.approx(1 - mass)
    assert grammar.max_document_length == bounds[1] + 1
    drawn = Counter(text_of(grammar, 20_000))
    assert set(drawn) == set(accepted)
    observed = [drawn[s] for s in accepted]
    assert chisquare(observed, np.array(list(accepted.values())) / mass * sum(observed)).pvalue > 1e-4
    counts = np.array([sum(p * s.count(t) for s, p in accepted.items()) for t in grammar.terminals] + [mass])
    assert grammar.unigram == pytest.approx(counts / counts.sum())


def test_rejected_strings_leave_no_trace_in_the_trees():
    grammar = ANBN.model_copy(update={"lengths": (4, 8)})
    sample = grammar.generate(20, 30, np.random.default_rng(0), trees=True)
    for row in range(20):
        words = [grammar.vocabulary[t] for t in sample.tokens[row] if t != grammar.eos_token_id]
        trees = grammar.trees(sample, row)
        assert [token for tree in trees for token in tree.tokens] == words
        assert all(len(tree.tokens) in (4, 6, 8) for tree in trees[:-1])


def test_lengths_that_hardly_occur_are_refused():
    with pytest.raises(SpecError, match="holds 0 of all strings"):
        ANBN.model_copy(update={"lengths": (3, 3)})
    with pytest.raises(SpecError, match="the shortest comes first"):
        ANBN.model_copy(update={"lengths": (4, 2)})


# -- text ------------------------------------------------------------------------------------------------------------


@given(pcfgs(recursive=False), st.integers(0, 5))
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
def test_strings_are_drawn_with_their_probabilities(grammar, seed):
    probabilities, _ = strings(grammar)
    assume(len(probabilities) < 300)
    drawn = Counter(text_of(grammar, 4000, seed))
    assert set(drawn) <= set(probabilities)
    # Rare strings together, so that the chi-square law holds.
    n = sum(drawn.values())
    common = [s for s, p in probabilities.items() if p * n >= 10]
    rest = 1 - sum(probabilities[s] for s in common)
    observed, expected = [drawn[s] for s in common], [probabilities[s] * n for s in common]
    if rest * n >= 10:
        observed.append(n - sum(observed))
        expected.append(rest * n)
    if len(observed) > 1:
        expected = np.array(expected) * sum(observed) / sum(expected)
        assert chisquare(observed, expected).pvalue > 1e-5


@given(pcfgs(), st.integers(0, 5), st.booleans())
@relaxed
def test_trees_use_the_grammars_rules_and_labels_agree_with_them(grammar, seed, packed):
    sample = grammar.generate(3, 40, np.random.default_rng(seed), packed=packed, trees=True)
    plain = grammar.generate(3, 40, np.random.default_rng(seed), packed=packed)
    assert np.array_equal(sample.tokens, plain.tokens)
    rules = {rule[:2] for rule in grammar.rules}
    for row in range(3):
        if packed and row > 0:
            break  # the row begins inside a tree
        tokens = [grammar.vocabulary[t] for t in sample.tokens[row]]
        trees = grammar.trees(sample, row)
        assert [t for tree in trees for t in tree.tokens] == [t for t in tokens if t != "<eos>"]
        whole = len(trees) - (tokens[-1] != "<eos>")
        for tree in trees[:whole]:
            for production in nltk.Tree.fromstring(str(tree)).productions():
                rhs = tuple(map(str, production.rhs()))
                # Constituents without a token are not in the tree.
                assert any(
                    lhs == str(production.lhs()) and _without_empty(full, rhs, grammar) for lhs, full in rules
                ), production
        expected = [path for tree in trees for path in _paths(tree, ())]
        text = [t for t in range(40) if tokens[t] != "<eos>"]
        for t, path in zip(text, expected, strict=True):
            assert sample.labels["depth"][row, t] == len(path)
            assert grammar.categories[sample.labels["category"][row, t]] == path[-1]
        ends = [t for t in range(40) if tokens[t] == "<eos>"]
        assert all(grammar.categories[c] == "eos" for c in sample.labels["category"][row, ends])
        assert list(sample.labels["document"][row]) == list(np.cumsum([0] + [t == "<eos>" for t in tokens[:-1]]))


def _without_empty(full, rhs, grammar):
    """Whether a right side is another one without some of its nonterminals."""
    rest = list(rhs)
    for symbol in full:
        if rest and rest[0] == symbol:
            rest.pop(0)
        elif symbol in grammar.terminals:
            return False
    return not rest


def _paths(tree, above):
    for child in tree.children:
        if isinstance(child, str):
            yield (*above, tree.symbol)
        else:
            yield from _paths(child, (*above, tree.symbol))


def test_open_constituents_by_hand():
    grammar = PCFG.from_string("S -> A 'c' A [1.0]\nA -> 'a' B [1.0]\nB -> 'b' 'b' [1.0]")
    sample = grammar.generate(1, 8, np.random.default_rng(0), trees=True)
    assert str(grammar.trees(sample, 0)[0]) == "(S (A a (B b b)) c (A a (B b b)))"
    #                                            a  b  b  c  a  b  b  <eos>
    assert sample.labels["depth"][0].tolist() == [2, 3, 3, 1, 2, 3, 3, 0]
    # After the first b, S, A and B go on; after the second only S; after the last nothing does.
    assert sample.labels["open"][0].tolist() == [2, 3, 1, 1, 2, 3, 0, 0]
    assert sample.labels["position"][0].tolist() == list(range(8))
    with pytest.raises(ValueError, match="trees=True"):
        grammar.trees(grammar.generate(1, 8, np.random.default_rng(0)), 0)


def test_a_row_that_cuts_a_string_goes_on_with_another_in_the_next_row():
    rows = ANBN.generate(200, 5, np.random.default_rng(1))
    assert (rows.tokens[:, 0] == 0).all()
    assert (rows.labels["position"][:, 0] == 0).all()
    stream = ANBN.generate(200, 5, np.random.default_rng(1), packed=True)
    assert (stream.labels["position"][:, 0] > 0).any()
    assert (stream.labels["document"][:, 0] == 0).all()


def test_rules_hold_their_parts_by_name():
    rule = ANBN.rules[0]
    assert (rule.lhs, rule.rhs, rule.probability) == ("S", ("a", "S", "b"), 0.4)
    assert isinstance(rule, Rule)
    assert ids(ANBN, "ab") == [0, 1]

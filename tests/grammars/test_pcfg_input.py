"""What goes into a context-free grammar and its predictions: notations, names, sizes, tokens, samples, deep trees."""

import copy
import math
import pickle

import nltk
import numpy as np
import pytest
from fuzzing import limit
from hypothesis import given, settings
from hypothesis import strategies as st
from random_grammars import pcfgs

from mechhier.grammars import PCFG, Sample, Tree, cfg3, dyck, random_hierarchy


def test_the_six_digits_that_nltk_writes_are_accepted_and_normalised():
    grammar = PCFG.from_string("S -> 'a' [.333333] | 'b' [.333333] | 'c' S [.333333]")
    assert grammar.unigram.sum() == pytest.approx(1)
    assert math.exp(grammar.log_probability(np.array([0]))) == pytest.approx(1 / 3, abs=1e-12)
    assert grammar.length_probabilities(200).sum() == pytest.approx(1, abs=1e-12)
    assert "[0.333333]" in grammar.to_string()
    with pytest.raises(ValueError, match=r"sum to 0\.9998, not 1"):
        PCFG.from_string("S -> 'a' [.9998]")


def test_what_nltk_induces_and_prints_is_read():
    trees = [
        nltk.Tree.fromstring(text)
        for text in ("(S (A a) (B b))", "(S (A a) (B (B c) (A a)))", "(S (B b))", "(S (A d) (A a))", "(S (B c) (B b))")
    ]
    theirs = nltk.induce_pcfg(nltk.Nonterminal("S"), [p for tree in trees for p in tree.productions()])
    ours = PCFG.from_string(str(theirs))
    assert (ours.start, len(ours.rules)) == ("S", len(theirs.productions()))
    parser = nltk.InsideChartParser(theirs)
    expected = sum(tree.prob() for tree in parser.parse(["a", "b"]))
    ids = np.array([ours.terminals.index(word) for word in ("a", "b")])
    assert math.exp(ours.log_probability(ids)) == pytest.approx(expected, rel=1e-4)


ODD = [
    "'",
    '"',
    "#",
    "->",
    "[",
    "]",
    "|",
    "[1.0]",
    "%start",
    "\\",
    "it's",
    "S",
    "\u00df",
    "#terminals:",
    "x'y",
    ".",
    ":",
]


@given(pcfgs(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_a_written_grammar_has_the_same_tokens_start_and_rules(grammar, random):
    """Also where terminals are numbered in another order than that of the rules, have odd names, and rules are mixed."""
    names = dict(
        zip(grammar.terminals, random.sample([x for x in ODD if x != "S"], len(grammar.terminals)), strict=True)
    )
    rules = [(lhs, tuple(names.get(x, x) for x in rhs), p) for lhs, rhs, p in grammar.rules]
    random.shuffle(rules)
    terminals = list(names.values())
    random.shuffle(terminals)
    odd = PCFG(start=grammar.start, terminals=tuple(terminals), rules=tuple(rules))
    again = PCFG.from_string(odd.to_string())
    assert again == odd
    assert again.vocabulary == odd.vocabulary
    theirs = nltk.PCFG.fromstring(odd.to_string())
    assert (str(theirs.start()), len(theirs.productions())) == (odd.start, len(odd.rules))


@pytest.mark.parametrize("grammar", [cfg3(seed=3), dyck(n_brackets=6), random_hierarchy()], ids=["cfg3", "dyck", "rhm"])
def test_a_written_family_has_the_same_tokens(grammar):
    assert PCFG.from_string(grammar.to_string()).vocabulary == grammar.vocabulary


def test_names_that_the_notation_cannot_write_are_refused():
    for start, terminal, says in (
        ("S", "a'b\"c", "both kinds of quotes"),
        ("A B", "a", "cannot be written"),
        ("#S", "a", "cannot be written"),
        ("S->T", "a", "cannot be written"),
        ("S|T", "a", "cannot be written"),
    ):
        with pytest.raises(ValueError, match=says):
            PCFG(start=start, terminals=(terminal,), rules=((start, (terminal,), 1.0),)).to_string()


def test_a_list_of_terminals_that_is_not_theirs_is_named_and_a_comment_is_none():
    for listed in ("'a' 'b'", "'b'", "'a' 'a'"):
        with pytest.raises(ValueError, match="must list every terminal"):
            PCFG.from_string(f"# terminals: {listed}\nS -> 'a' [1.0]")
    assert PCFG.from_string("# terminals: are quoted, as 'a'\nS -> 'a' [1.0]").terminals == ("a",)


def test_a_misspelt_nonterminal_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="'NPP' has no rule and is not a terminal; did you mean 'NP'"):
        PCFG.from_string("S -> NPP 'a' [1.0]\nNP -> 'b' [1.0]")


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"all": 5},
        {"all": []},
        {"all": [[]]},
        {"all": [5]},
        {"all": [[5]]},
        {"all": [[{"id": None}]]},
        {"all": [[{"id": 1, "children": 5}]]},
        {"all": [[{"id": 1, "children": [5]}], [{"id": 2}]]},
        {"all": [[{"id": 1, "children": [["x"]]}], [{"id": 2}]]},
        {"all": [[{"id": 1, "children": [[-1]]}], [{"id": 2}]]},
        {"all": [[{"id": 1, "children": [[True]]}], [{"id": 2}]]},
        {"all": [[{"id": 1, "children": [[0]]}]]},
    ],
)
def test_a_table_of_another_form_is_refused(table):
    with pytest.raises(ValueError, match=r"not a cfg3 table: .*a list of levels"):
        PCFG.from_cfg3(table)


def chain(n, rule):
    return "\n".join([f"N{i} -> {rule.format(i, (i + 1) % n)}" for i in range(n)])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PCFG.from_string(chain(3000, "'a' N{1} [0.9] | 'b' [0.1]")), "contain one another"),
        (lambda: PCFG.from_string(EMPTY).log_probability(np.array([0])), "22 symbols of it can be empty.*Split it"),
        (lambda: PCFG.from_string(EMPTY).most_probable_tree(np.array([0])), "22 symbols of it can be empty.*Split it"),
        (
            lambda: PCFG.from_string(f"S -> {'A ' * 5000} 'a' [1.0]\nA -> 'a' [0.0001] | [0.9999]").states,
            "can be empty",
        ),
        (lambda: LONG.log_probability(np.array([0])), "at most 4,000"),
        (lambda: SUMS.most_probable_tree(np.zeros(40_000, dtype=int)), "GiB.*shorter string"),
        (lambda: SUMS.log_probability(np.zeros(10**8, dtype=np.uint8)), "shorter string"),
        (lambda: SUMS.next_token_probabilities(np.zeros((10**5, 5000), dtype=np.uint8)), "fewer rows"),
        (lambda: SUMS.length_probabilities(10**6), "at most 10,000"),
        (lambda: SUMS.generate(10**9, 1000, np.random.default_rng(0)), "too many"),
    ],
)
def test_what_costs_too_much_is_refused_within_two_seconds(make, says):
    with limit(2), pytest.raises(ValueError, match=f"(?s){says}"):
        make()


EMPTY = f"S -> {' '.join(f'A{i}' for i in range(22))} [0.9] | 'z' [0.1]\n" + "\n".join(
    f"A{i} -> 'a{i}' [0.5] | [0.5]" for i in range(22)
)
SUMS = PCFG.from_string("S -> S S [0.4] | 'a' [0.6]")
LONG = PCFG.from_string(
    f"{chain(5000, chr(39) + 'a' + chr(39) + ' N{1} [1.0]').rsplit(chr(10), 1)[0]}\nN4999 -> 'b' [1.0]"
)


@pytest.mark.parametrize(
    "text",
    [
        "S -> S S [0.4999] | [0.2] | 'a' [0.3001]",
        "A -> A [0.99999] | 'a' [0.00001]",
        "S -> 'a' S [0.99999] | 'a' [0.00001]",
        "S -> A A [0.99999] | 'a' [0.00001]\nA -> S [0.49999] | 'a' [0.50001]",
    ],
)
def test_grammars_close_to_critical_take_no_longer(text):
    with limit(5):
        grammar = PCFG.from_string(text)
        grammar.next_token_probabilities(grammar.generate(1, 50, np.random.default_rng(0)).tokens)
        grammar.length_probabilities(2000)
        assert grammar.model_copy(update={"lengths": (1, 500)}).unigram.sum() == pytest.approx(1)


@pytest.mark.parametrize("text", ["S -> 'a' S [0.999] | 'a' [0.001]", "S -> S A [0.999] | 'a' [0.001]\nA -> 'a' [1.0]"])
def test_a_long_string_with_one_derivation_is_read_soon(text):
    grammar = PCFG.from_string(text)
    with limit(10):
        assert grammar.log_probability(np.zeros(4000, dtype=int)) == pytest.approx(
            3999 * math.log(0.999) + math.log(0.001)
        )


def test_equal_symbols_that_can_be_empty_are_no_burden():
    grammar = PCFG.from_string(f"S -> {'A ' * 60} [1.0]\nA -> 'a' [0.5] | [0.5]")
    expected = math.comb(60, 20) / 2**60
    with limit(5):
        assert math.exp(grammar.log_probability(np.zeros(20, dtype=int))) == pytest.approx(expected)


def test_whole_numbers_of_any_kind_are_accepted():
    corpus = SUMS.corpus(1e4, seed=np.int64(3), context=np.uint16(50))
    assert corpus == SUMS.corpus(10_000, seed=3, context=50)
    assert len(corpus.rows(np.int64(0), np.int32(2))) == 2
    for tokens in (1000.5, "1000", True, float("nan"), np.inf, None):
        with pytest.raises(ValueError, match="tokens must be a whole number, got"):
            SUMS.corpus(tokens)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([[0.0, 1.0]], "integers, not float64"),
        ([[True]], "integers, not bool"),
        ([["a"]], "a word's id"),
        ("a", "a word's id"),
        ([[0], [0, 0]], "rows have one length"),
        (None, "integers"),
        ([[[0]]], "shape"),
        ([[5]], r"0\.\.[01]; found 5\.\.5"),
        ([[-1]], r"0\.\.[01]; found -1\.\.-1"),
    ],
)
def test_what_is_no_tokens_is_named(tokens, says):
    string = tokens[0] if isinstance(tokens, list) and len(tokens) == 1 else tokens
    for use in (SUMS.next_token_probabilities, SUMS.category_probabilities, SUMS.state_probabilities):
        with pytest.raises(ValueError, match=says):
            use(tokens)
    for use in (SUMS.log_probability, SUMS.prefix_log_probabilities, SUMS.most_probable_tree):
        with pytest.raises(ValueError, match="dimension" if says == "shape" else says):
            use(string)


def test_tokens_of_any_integers_are_accepted():
    for dtype in (np.uint8, np.uint16, np.int32, np.uint64):
        assert SUMS.log_probability(np.zeros(3, dtype=dtype)) == SUMS.log_probability([0, 0, 0])
    with pytest.raises(ValueError, match=r"one row is tokens\[None\]"):
        SUMS.next_token_probabilities(np.zeros(3, dtype=int))


def test_what_is_no_sample_and_no_generator_is_named():
    with pytest.raises(ValueError, match="sample must be the Sample that"):
        SUMS.ideal_loss(np.zeros((2, 5), dtype=int))
    with pytest.raises(ValueError, match="no label 'position'"):
        SUMS.ideal_loss(Sample(np.zeros((2, 5), dtype=int), {}))
    with pytest.raises(ValueError, match="sample must be the Sample that"):
        SUMS.trees(5, 0)
    with pytest.raises(ValueError, match="row must be at most 0"):
        SUMS.trees(SUMS.generate(1, 8, np.random.default_rng(0), trees=True), 1)
    with pytest.raises(ValueError, match=r"np\.random\.default_rng"):
        SUMS.generate(1, 8, 3)


# -- deep trees ------------------------------------------------------------------------------------------------------


def test_trees_of_a_hundred_thousand_levels_are_used_without_recursion():
    tree = Tree("A", ["x"])
    for _ in range(100_000):
        tree = Tree("S", ["a", tree])
    assert str(tree).startswith("(S a (S a (S a ")
    assert len(repr(tree)) > 10**6
    assert tree.tokens == ["a"] * 100_000 + ["x"]
    again = pickle.loads(pickle.dumps(tree))
    assert again == tree == copy.deepcopy(tree) == copy.copy(tree)
    again.children[0] = "b"
    assert again != tree


def test_a_tree_is_written_as_it_is_made():
    tree = Tree("S", [Tree("A", ["a, [", "b'"]), "c", Tree("B{", [])])
    assert eval(repr(tree)) == tree
    assert str(tree) == "(S (A a, [ b') c (B{))"
    assert tree != "S"
    for symbol, children in ((5, []), ("S", "abc"), ("S", [1]), ("S", None)):
        with pytest.raises(ValueError, match="of a tree"):
            Tree(symbol, children)


def test_the_most_probable_tree_of_a_deep_derivation_is_found():
    grammar = PCFG.from_string("S -> 'a' S [0.999] | 'a' [0.001]")
    tree, log_probability = grammar.most_probable_tree(np.zeros(1500, dtype=int))
    assert len(tree.tokens) == 1500
    assert str(tree).count("(S") == 1500
    assert log_probability == pytest.approx(1499 * math.log(0.999) + math.log(0.001))


def test_trees_that_take_too_much_memory_are_refused():
    grammar = PCFG.from_string("S -> 'a' S [0.9999] | 'a' [0.0001]")
    with pytest.raises(ValueError, match=r"levels deep take .* GiB; generate fewer rows"):
        grammar.generate(100, 4000, np.random.default_rng(0), trees=True)

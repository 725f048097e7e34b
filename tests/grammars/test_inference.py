"""Exact inference for context-free grammars against genlm-grammar, NLTK, the forward algorithm and enumeration."""

import math
from collections import Counter

import nltk
import numpy as np
import pytest
from genlm.grammar import CFG, EOS, EarleyLM, Float, add_EOS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_grammars import derivations, ids, pcfgs, strings

from mechhier.grammars import PCFG, Sample

relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])

AMBIGUOUS = PCFG.from_string(
    "S -> A S B [0.3] | 'a' [0.3] | A [0.2] | [0.1] | S S [0.1]\nA -> 'a' [0.5] | B [0.3] | [0.2]\n"
    "B -> 'b' [0.6] | 'a' 'b' [0.4]"
)


def genlm(grammar):
    """The same grammar in genlm-grammar."""
    lines = [f"{p!r}: {lhs} -> {' '.join(rhs)}" for lhs, rhs, p in grammar.rules]
    return CFG.from_string("\n".join(lines), Float, start=grammar.start)


@given(pcfgs(), st.lists(st.integers(0, 2), max_size=5))
@relaxed
def test_strings_and_prefixes_have_genlms_probabilities(grammar, tokens):
    tokens = [t % len(grammar.terminals) for t in tokens]
    words = tuple(grammar.terminals[t] for t in tokens)
    theirs = genlm(grammar)
    assert math.exp(grammar.log_probability(np.array(tokens, dtype=int))) == pytest.approx(theirs(words), abs=1e-9)
    ours = np.exp(grammar.prefix_log_probabilities(np.array(tokens, dtype=int)))
    expected = [theirs.prefix_weight(words[:t]) for t in range(len(words) + 1)]
    assert ours == pytest.approx(np.array(expected), abs=1e-8)


@given(pcfgs(), st.integers(0, 9))
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
def test_next_tokens_have_genlms_probabilities(grammar, seed):
    tokens = grammar.generate(1, 6, np.random.default_rng(seed)).tokens
    ours = grammar.next_token_probabilities(tokens)[0]
    theirs = EarleyLM(add_EOS(genlm(grammar)))
    prefix = ()
    for t, token in enumerate(tokens[0]):
        expected = theirs.p_next(prefix)
        for v, word in enumerate([*grammar.terminals, EOS]):
            assert ours[t, v] == pytest.approx(expected[word], abs=1e-8)
        prefix = () if token == grammar.eos_token_id else (*prefix, grammar.terminals[token])


@given(pcfgs(recursive=False))
@relaxed
def test_strings_and_next_tokens_have_the_enumerated_probabilities(grammar):
    probabilities, _ = strings(grammar)
    for tokens, probability in list(probabilities.items())[:10]:
        assert grammar.log_probability(np.array(ids(grammar, tokens), dtype=int)) == pytest.approx(
            math.log(probability)
        )
        row = np.array([[*ids(grammar, tokens), grammar.eos_token_id]])
        ours = grammar.next_token_probabilities(row)[0]
        for t in range(len(tokens) + 1):
            follows = Counter()
            for other, p in probabilities.items():
                if other[:t] == tokens[:t]:
                    follows[grammar.vocabulary.index(other[t]) if len(other) > t else grammar.eos_token_id] += p
            expected = np.array([follows[v] for v in range(grammar.vocab_size)]) / follows.total()
            assert ours[t] == pytest.approx(expected, abs=1e-10)


def test_the_inside_probability_is_the_sum_over_nltks_parses():
    text = "S -> S S [0.2] | A 'b' [0.4] | 'a' [0.4]\nA -> 'a' [0.7] | A 'a' [0.3]"
    parser = nltk.InsideChartParser(nltk.PCFG.fromstring(text))
    grammar = PCFG.from_string(text)
    for words in ("a", "ab", "aab", "aaa", "aaab", "abab", "b", "ba"):
        expected = sum(tree.prob() for tree in parser.parse(list(words)))
        assert math.exp(grammar.log_probability(np.array(ids(grammar, words)))) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [
        "S -> S S [0.2] | A 'b' [0.4] | 'a' [0.4]\nA -> 'a' [0.7] | A 'a' [0.3]",
        "S -> A B 'c' [0.5] | B A [0.3] | A [0.2]\nA -> B [0.5] | 'a' [0.5]\nB -> 'a' [0.3] | 'b' [0.3] | A A [0.4]",
    ],
)
def test_the_most_probable_tree_is_nltks_viterbi_parse(text):
    grammar, parser = PCFG.from_string(text), nltk.ViterbiParser(nltk.PCFG.fromstring(text))
    n_parsed = 0
    for tokens in grammar.generate(1, 200, np.random.default_rng(0)).tokens[0].reshape(40, 5):
        tokens = tokens[tokens != grammar.eos_token_id]
        if len(tokens) == 0:
            continue
        tree, log_probability = grammar.most_probable_tree(tokens)
        theirs = next(iter(parser.parse([grammar.terminals[t] for t in tokens])), None)
        if theirs is None:
            assert (tree, log_probability) == (None, -np.inf)
            continue
        n_parsed += 1
        assert math.exp(log_probability) == pytest.approx(theirs.prob())
        if sum(math.isclose(t.prob(), theirs.prob()) for t in _all_parses(text, tree.tokens)) == 1:
            assert str(tree) == " ".join(str(nltk.Tree.convert(theirs)).split())
    assert n_parsed > 10


def _all_parses(text, words):
    return nltk.InsideChartParser(nltk.PCFG.fromstring(text)).parse(words)


@given(pcfgs(recursive=False))
@relaxed
def test_the_most_probable_tree_has_the_largest_enumerated_probability(grammar):
    best = Counter()
    for probability, tokens, _ in derivations(grammar):
        best[tokens] = max(best[tokens], probability)
    for tokens, probability in list(best.items())[:10]:
        if not tokens:
            with pytest.raises(ValueError, match="empty string"):
                grammar.most_probable_tree(np.array([], dtype=int))
            continue
        tree, log_probability = grammar.most_probable_tree(np.array(ids(grammar, tokens)))
        assert log_probability == pytest.approx(math.log(probability))
        assert tuple(tree.tokens) == tokens


@given(pcfgs(), st.integers(0, 9))
@relaxed
def test_predictions_sum_to_one_and_agree_with_the_loss(grammar, seed):
    sample = grammar.generate(4, 20, np.random.default_rng(seed))
    probabilities = grammar.next_token_probabilities(sample.tokens)
    assert probabilities.sum(axis=-1) == pytest.approx(np.ones((4, 20)), abs=1e-9)
    assert grammar.category_probabilities(sample.tokens).sum(axis=-1) == pytest.approx(np.ones((4, 20)), abs=1e-9)
    loss = grammar.ideal_loss(sample)
    observed = np.take_along_axis(probabilities, sample.tokens[:, :, None], axis=-1)[:, :, 0]
    assert loss.estimate == pytest.approx(-np.log(observed), abs=1e-9)
    assert not loss.error.any()


@given(pcfgs(), st.integers(0, 9))
@relaxed
def test_states_whose_next_symbol_is_a_token_add_up_to_the_categories(grammar, seed):
    tokens = grammar.generate(2, 10, np.random.default_rng(seed)).tokens
    states, categories = grammar.state_probabilities(tokens), grammar.category_probabilities(tokens)
    for i, category in enumerate(grammar.nonterminals):
        writing = [state.startswith(f"{category} ->") and ". '" in state for state in grammar.states]
        assert states[:, :, writing].sum(axis=-1) == pytest.approx(categories[:, :, i], abs=1e-9)


def dotted_rules(tree, grammar, before):
    """Of a derivation's tree: the dotted rules of the ancestors of the token after ``before`` tokens."""
    if isinstance(tree, str):
        return []
    symbol, *children = tree
    names = [c if isinstance(c, str) else c[0] for c in children]
    names = [f"'{n}'" if n in grammar.terminals else n for n in names]
    for dot, child in enumerate(children):
        size = len(list(leaves(child)))
        if before < size:
            state = " ".join([symbol, "->", *names[:dot], ".", *names[dot:]])
            return [state, *dotted_rules(child, grammar, before)]
        before -= size
    raise AssertionError


def leaves(tree):
    if isinstance(tree, str):
        yield tree
    else:
        for child in tree[1:]:
            yield from leaves(child)


@given(pcfgs(recursive=False, empty=False))
@relaxed
def test_posteriors_over_states_and_categories_are_the_enumerated_ones(grammar):
    found = list(derivations(grammar))
    _, tokens, _ = max(found, key=lambda d: (len(d[1]), d[0]))
    row = np.array([[*ids(grammar, tokens), grammar.eos_token_id]])
    states, categories = grammar.state_probabilities(row)[0], grammar.category_probabilities(row)[0]
    assert len(set(grammar.states)) == len(grammar.states)
    for t in range(len(tokens) + 1):
        expected, expected_category, mass = Counter(), Counter(), 0.0
        for p, s, tree in found:
            if s[:t] == tokens[:t]:
                mass += p
                if len(s) == t:
                    expected_category["eos"] += p
                    continue
                ancestors = dotted_rules(tree, grammar, t)
                expected.update(dict.fromkeys(ancestors, 0))
                for state in ancestors:
                    expected[state] += p
                expected_category[ancestors[-1].split(" ->")[0]] += p
        assert states[t] == pytest.approx([expected[s] / mass for s in grammar.states], abs=1e-10)
        assert categories[t] == pytest.approx([expected_category[c] / mass for c in grammar.categories], abs=1e-10)


def test_categories_of_a_right_linear_grammar_are_the_forward_algorithms_beliefs():
    rng = np.random.default_rng(0)
    transition, emission = rng.dirichlet(np.ones(3), 3), rng.dirichlet(np.ones(2), 3)
    stop = 0.1
    rules = [("S", (f"Q{q}",), 1 / 3) for q in range(3)]
    for q in range(3):
        for a in range(2):
            rules.append((f"Q{q}", ("ab"[a],), emission[q, a] * stop))
            rules += [(f"Q{q}", ("ab"[a], f"Q{r}"), emission[q, a] * (1 - stop) * transition[q, r]) for r in range(3)]
    grammar = PCFG(start="S", terminals=("a", "b"), rules=rules)
    tokens = rng.integers(0, 2, 30)
    belief, expected = np.full(3, 1 / 3), []
    for token in tokens:
        expected.append(belief / belief.sum())
        belief = (belief * emission[:, token] * (1 - stop)) @ transition
    ours = grammar.category_probabilities(tokens[None])[0, :, 1:4]
    ours = ours / ours.sum(axis=1, keepdims=True)
    assert ours == pytest.approx(np.array(expected), abs=1e-10)


def test_long_strings_do_not_underflow():
    grammar = PCFG.from_string(
        "S -> W S [0.9995] | W [0.0005]\nW -> " + " | ".join(f"'w{i}' [0.01]" for i in range(100))
    )
    tokens = np.random.default_rng(0).integers(0, 100, 400)
    per_token = math.log(0.9995) - math.log(100)
    assert grammar.log_probability(tokens) == pytest.approx(399 * per_token + math.log(0.0005 / 100))
    assert grammar.log_probability(tokens) < math.log(np.finfo(float).tiny)  # the probability itself is 0 in float64


def test_text_that_is_not_of_the_language_is_refused_where_it_leaves_it():
    grammar = PCFG.from_string("S -> 'a' S 'b' [0.4] | 'a' 'b' [0.6]")
    with pytest.raises(ValueError, match="row 1, position 3: the grammar does not allow <eos>"):
        grammar.next_token_probabilities(np.array([[0, 1, 2, 0], [0, 0, 1, 2]]))
    with pytest.raises(ValueError, match="row 0, position 0: the grammar does not allow b"):
        grammar.next_token_probabilities(np.array([[1, 0]]))
    assert grammar.log_probability(np.array([0, 0, 1])) == -np.inf
    assert np.isneginf(grammar.prefix_log_probabilities(np.array([0, 1, 0]))).tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match="one dimension"):
        grammar.log_probability(np.array([[0, 1]]))
    with pytest.raises(ValueError, match=r"0\.\.1"):
        grammar.log_probability(np.array([0, 2]))
    sample = grammar.generate(8, 7, np.random.default_rng(0), packed=True)
    with pytest.raises(ValueError, match="must begin a document"):
        grammar.ideal_loss(sample)


def test_with_rejected_lengths_the_bounds_hold_the_enumerated_loss():
    text = "S -> A A [0.5] | A 'c' A 'c' [0.3] | [0.2]\nA -> 'a' [0.6] | 'b' 'b' [0.3] | [0.1]"
    grammar = PCFG.from_string(text, lengths=(2, 4))
    accepted = {s: p for s, p in strings(PCFG.from_string(text))[0].items() if 2 <= len(s) <= 4}
    mass = sum(accepted.values())
    entropy = -sum(p / mass * math.log(p / mass) for p in accepted.values())
    lower = upper = 0.0
    for tokens, p in accepted.items():
        row = np.array([[*ids(grammar, tokens), grammar.eos_token_id]])
        loss = grammar.ideal_loss(Sample(row, {"position": np.arange(row.shape[1])[None]}))
        lower, upper = lower + p / mass * loss.lower.sum(), upper + p / mass * loss.upper.sum()
    assert lower < entropy < upper
    # In all over a string the predictor that does not know of the rejection loses -log(accepted mass), exactly.
    assert upper - entropy == pytest.approx(-math.log(mass))
    with pytest.raises(ValueError, match="no tractable exact predictor"):
        grammar.next_token_probabilities(np.array([[0]]))

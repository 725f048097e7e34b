"""Families of grammars against their definitions: exact counts, closed forms, and a stack for brackets."""

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from mechhier.grammars import PCFG, AnyGrammar, cfg3, dyck, random_hierarchy
from mechhier.grammars.families import FAMILIES


@pytest.mark.parametrize("seed", range(4))
def test_cfg3_has_the_levels_symbols_rules_and_lengths_asked_for(seed):
    grammar = cfg3(
        n_levels=4, n_symbols=4, n_rules=(2, 3), rule_lengths=(1, 3), distinct_children=False, seed=seed, context=64
    )
    assert len(grammar.nonterminals) == 1 + 3 * 4
    assert len(grammar.terminals) == 4
    assert grammar.context == 64
    for symbol in grammar.nonterminals:
        rules = [rule for rule in grammar.rules if rule.lhs == symbol]
        assert 2 <= len(rules) <= 3
        assert all(1 <= len(rule.rhs) <= 3 for rule in rules)
        assert {rule.probability for rule in rules} == {1 / len(rules)}
    sequences = [rule.rhs for rule in grammar.rules]
    assert len(set(sequences)) == len(sequences)
    sample = grammar.generate(2, 64, np.random.default_rng(0))
    assert set(sample.labels["depth"][sample.tokens != grammar.eos_token_id]) == {4}


def test_cfg3_without_distinct_children_repeats_symbols_and_with_them_never():
    assert all(len(set(rule.rhs)) == len(rule.rhs) for rule in cfg3().rules)
    assert any(len(set(rule.rhs)) < len(rule.rhs) for rule in cfg3(distinct_children=False).rules)


def test_cfg3_leaves_out_symbols_that_too_few_rules_can_reach():
    grammar = cfg3(n_levels=3, n_symbols=8, seed=0)
    of_root = {x for rule in grammar.rules if rule.lhs == "S" for x in rule.rhs}
    assert len(of_root) < 8
    assert {x for x in grammar.nonterminals if x.startswith("l1_")} == of_root
    assert len(grammar.terminals) == 8


def test_a_seed_is_a_language():
    assert cfg3(seed=1) == cfg3(seed=1)
    assert cfg3(seed=1) != cfg3(seed=2)
    assert random_hierarchy(seed=1) == random_hierarchy(seed=1)
    assert random_hierarchy(seed=1) != random_hierarchy(seed=2)


@pytest.mark.parametrize("v_m_s_L_classes", [(8, 2, 2, 3, 8), (6, 4, 3, 2, 5), (4, 4, 2, 2, 3)])
def test_random_hierarchy_has_its_closed_form_entropy_and_one_derivation_a_string(v_m_s_L_classes):
    v, m, s, levels, classes = v_m_s_L_classes
    grammar = random_hierarchy(n_symbols=v, n_tuples=m, tuple_length=s, n_levels=levels, n_classes=classes)
    assert grammar.expected_length == pytest.approx(s**levels)
    assert grammar.max_document_length == s**levels + 1
    # A class, and one of m tuples for it and for every symbol of the levels above the tokens.
    expansions = sum(s**level for level in range(levels))
    assert grammar.derivation_entropy == pytest.approx(np.log(classes) + expansions * np.log(m))
    below = [rule.rhs for rule in grammar.rules if rule.lhs != "S"]
    assert len(set(below)) == len(below)
    # One derivation: the string's own probability is the derivation's.
    tokens = grammar.generate(3, s**levels + 1, np.random.default_rng(0)).tokens[:, :-1]
    for string in tokens:
        assert grammar.log_probability(string) == pytest.approx(-np.log(classes) - expansions * np.log(m))


@pytest.mark.parametrize(("n_brackets", "max_depth"), [(1, 1), (2, 3), (5, 4)])
def test_dyck_strings_are_balanced_up_to_the_depth(n_brackets, max_depth):
    grammar = dyck(n_brackets=n_brackets, max_depth=max_depth)
    assert grammar.vocab_size == 2 * n_brackets + 1
    stream = grammar.generate(1, 20_000, np.random.default_rng(0)).tokens[0]
    stack, deepest = [], 0
    for token in stream:
        if token == grammar.eos_token_id:
            assert not stack
        elif token % 2 == 0:
            stack.append(token)
            deepest = max(deepest, len(stack))
        else:
            assert stack.pop() == token - 1
    assert deepest == max_depth
    kinds = np.bincount(stream)[:-1:2]
    assert kinds / kinds.sum() == pytest.approx(np.full(n_brackets, 1 / n_brackets), abs=0.03)


def test_dyck_without_nesting_is_a_sequence_of_pairs():
    grammar = dyck(n_brackets=2, max_depth=4, p_nest=0.0, p_next=0.5)
    assert grammar.expected_length == pytest.approx(4)
    assert grammar.derivation_entropy == pytest.approx(2 * (np.log(2) + np.log(2)))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("cfg3", {"rule_lengths": (2, 4)}, "4 distinct children"),
        ("cfg3", {"n_rules": (3, 2)}, "the smaller number comes first"),
        ("cfg3", {"n_symbols": 1}, "n_symbols: must be at least 2, got 1"),
        ("cfg3", {"n_symbols": 2, "n_rules": (9, 9), "rule_lengths": (2, 2)}, "no level found"),
        ("random_hierarchy", {"n_tuples": 9}, "8 and tuple_length=2 give 64 tuples; the rules need 72"),
        ("dyck", {"p_next": 1.0}, "p_next: must be below 1, got 1"),
        ("dyck", {"max_depth": 0}, "max_depth: must be at least 1, got 0"),
    ],
)
def test_impossible_sizes_are_refused_by_name(family, options, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES[family](**options)


def test_yaml_names_a_family_by_its_kind():
    read = TypeAdapter(AnyGrammar).validate_python
    assert read({"kind": "cfg3", "n_levels": 3, "rule_lengths": [2, 2], "seed": 4}) == cfg3(
        n_levels=3, rule_lengths=(2, 2), seed=4
    )
    assert isinstance(read({"kind": "dyck"}), PCFG)
    with pytest.raises(ValidationError, match="levels: no such field; did you mean n_levels"):
        read({"kind": "cfg3", "levels": 3})

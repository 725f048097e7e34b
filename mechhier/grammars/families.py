"""Families of context-free grammars from the literature: each function returns a :class:`PCFG`.

In YAML a family is a grammar too: ``{kind: cfg3, n_levels: 6, n_symbols: 3}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise, product
from typing import Any

from mechhier.grammars.base import stable_generator
from mechhier.grammars.pcfg import PCFG
from mechhier.grammars.rules import Rule

_BRACKETS = ("()", "[]", "{}", "<>")
_TRIES = 10_000
_MOST_TUPLES = 10**6


def cfg3(
    *,
    n_levels: int = 6,
    n_symbols: int = 3,
    n_rules: tuple[int, int] = (2, 2),
    rule_lengths: tuple[int, int] = (2, 3),
    distinct_children: bool = True,
    seed: int = 0,
    **fields: Any,
) -> PCFG:
    """Draw a grammar of the family of cfg3b, cfg3f, ... (Allen-Zhu & Li 2023, arXiv 2305.13673).

    A root, then ``n_levels`` levels of ``n_symbols`` symbols each, the last of which are the tokens. A symbol has a few
    equally likely rules, each a short sequence of symbols of the next level; no two rules of a level are the same
    sequence. Every symbol is used, unless the rules above it are too few; those without a use are left out.

    Args:
        n_levels: Levels below the root; tokens have this depth.
        n_symbols: Symbols on each level.
        n_rules: Fewest and most rules of a symbol; the number is drawn uniformly.
        rule_lengths: Shortest and longest right side; the length is drawn uniformly.
        distinct_children: Whether a right side holds no symbol twice (as in cfg3b; not in cfg3f).
        seed: Of the grammar.
        **fields: Other fields of :class:`PCFG`, such as ``context``.

    Raises:
        ValueError: A size is not possible; the message says which.

    Example:
        >>> grammar = cfg3(n_levels=3, seed=1)
        >>> grammar.vocabulary, grammar.max_document_length <= 3**3 + 1
        (['t0', 't1', 't2', '<eos>'], True)
    """
    _at_least("n_levels", n_levels, 1)
    _at_least("n_symbols", n_symbols, 2)
    for name, (low, high) in (("n_rules", n_rules), ("rule_lengths", rule_lengths)):
        _at_least(name, low, 1)
        if low > high:
            raise ValueError(f"{name}={(low, high)}: the smaller number comes first")
    if distinct_children and rule_lengths[1] > n_symbols:
        raise ValueError(
            f"rule_lengths={rule_lengths}: {rule_lengths[1]} distinct children need as many symbols, and n_symbols is "
            f"{n_symbols}; set distinct_children=False or take shorter rules"
        )
    rng = stable_generator("cfg3", n_levels, n_symbols, *n_rules, *rule_lengths, int(distinct_children), seed)
    levels = [["S"]]
    levels += [[f"l{level}_{i}" for i in range(n_symbols)] for level in range(1, n_levels)]
    levels.append([f"t{i}" for i in range(n_symbols)])
    rules: list[Rule] = []
    parents = levels[0]
    for children in levels[1:]:
        must_use_all = len(parents) * n_rules[1] * rule_lengths[1] >= n_symbols
        for _ in range(_TRIES):
            drawn = [
                [
                    tuple(
                        rng.choice(n_symbols, rng.integers(*rule_lengths, endpoint=True), replace=not distinct_children)
                    )
                    for _ in range(rng.integers(*n_rules, endpoint=True))
                ]
                for _ in parents
            ]
            sequences = [sequence for of_symbol in drawn for sequence in of_symbol]
            used = sorted({i for sequence in sequences for i in sequence})
            if len(set(sequences)) == len(sequences) and (len(used) == n_symbols or not must_use_all):
                break
        else:
            raise ValueError(
                f"no level found in {_TRIES} tries: n_rules={n_rules} rules of {rule_lengths} symbols for each of "
                f"{len(parents)} symbols must all differ and use all {n_symbols} symbols of the next level"
            )
        for parent, of_symbol in zip(parents, drawn, strict=True):
            rules += [Rule(parent, tuple(children[i] for i in sequence), 1 / len(of_symbol)) for sequence in of_symbol]
        parents = [children[i] for i in used]
    return PCFG(start="S", terminals=tuple(parents), rules=tuple(rules), **fields)


def random_hierarchy(
    *,
    n_symbols: int = 8,
    n_tuples: int = 2,
    tuple_length: int = 2,
    n_levels: int = 3,
    n_classes: int = 8,
    seed: int = 0,
    **fields: Any,
) -> PCFG:
    """Draw a random hierarchy model (Cagnetta et al. 2024, arXiv 2307.02129).

    A string has a class, drawn uniformly; a class has ``n_tuples`` equally likely rules, each a tuple of
    ``tuple_length`` symbols of the first level; so has each of the ``n_symbols`` symbols of a level, down to the tokens.
    No tuple belongs to two symbols of a level, so a string has one derivation and ``tuple_length ** n_levels`` tokens.

    Args:
        n_symbols: v, the symbols of a level.
        n_tuples: m, the rules of a symbol.
        tuple_length: s, the length of a rule.
        n_levels: L, the levels below the class.
        n_classes: Number of classes.
        seed: Of the grammar.
        **fields: Other fields of :class:`PCFG`, such as ``context``.

    Raises:
        ValueError: A size is not possible, or there are fewer tuples than the symbols need.

    Example:
        >>> grammar = random_hierarchy(n_symbols=4, n_tuples=2, n_levels=3, n_classes=2)
        >>> round(grammar.expected_length, 6), grammar.max_document_length
        (8.0, 9)
    """
    sizes = {"n_symbols": n_symbols, "n_tuples": n_tuples, "n_levels": n_levels, "n_classes": n_classes}
    for name, size in sizes.items():
        _at_least(name, size, 1)
    _at_least("tuple_length", tuple_length, 2)
    possible = n_symbols**tuple_length
    needed = n_tuples * max(n_classes, n_symbols if n_levels > 1 else 1)
    if needed > possible or possible > _MOST_TUPLES:
        raise ValueError(
            f"n_symbols={n_symbols} and tuple_length={tuple_length} give {possible} tuples; the rules need {needed} "
            f"different ones, and at most {_MOST_TUPLES} are enumerated"
        )
    rng = stable_generator("random_hierarchy", *sizes.values(), tuple_length, seed)
    tuples = list(product(range(n_symbols), repeat=tuple_length))
    levels = [[f"class{i}" for i in range(n_classes)]]
    levels += [[f"l{level}_{i}" for i in range(n_symbols)] for level in range(1, n_levels)]
    levels.append([f"t{i}" for i in range(n_symbols)])
    rules = [Rule("S", (name,), 1 / n_classes) for name in levels[0]]
    for parents, children in pairwise(levels):
        chosen = rng.permutation(len(tuples))[: n_tuples * len(parents)].reshape(len(parents), n_tuples)
        rules += [
            Rule(parent, tuple(children[i] for i in tuples[number]), 1 / n_tuples)
            for parent, numbers in zip(parents, chosen, strict=True)
            for number in numbers
        ]
    return _reachable_part(rules, tuple(levels[-1]), fields)


def dyck(*, n_brackets: int = 2, max_depth: int = 4, p_nest: float = 0.5, p_next: float = 0.5, **fields: Any) -> PCFG:
    """Return the Dyck language of several kinds of brackets, nested to a limited depth (Hewitt et al. 2020).

    A string is a sequence of bracket pairs; what a pair holds is empty or again a sequence. Every kind of bracket is
    equally likely everywhere. The grammar is unambiguous, and has no empty rule.

    Args:
        n_brackets: k, the kinds of brackets.
        max_depth: Most brackets open at once.
        p_nest: Probability that a pair holds something (0 at the depth limit).
        p_next: Probability that another pair follows a pair.
        **fields: Other fields of :class:`PCFG`, such as ``context``.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> dyck(n_brackets=1, max_depth=1, p_next=0.5).to_string()
        "%start D1\\nD1 -> '(' ')' [0.5] | '(' ')' D1 [0.5]"
    """
    _at_least("n_brackets", n_brackets, 1)
    _at_least("max_depth", max_depth, 1)
    for name, value in (("p_nest", p_nest), ("p_next", p_next)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 0 and below 1")
    pairs = [_BRACKETS[i] if i < len(_BRACKETS) else (f"({i}", f"){i}") for i in range(n_brackets)]
    rules = []
    for depth in range(1, max_depth + 1):
        nest = p_nest if depth < max_depth else 0.0
        for (left, right), nested, follows in product(pairs, (False, True), (False, True)):
            rhs = (left, *([f"D{depth + 1}"] if nested else []), right, *([f"D{depth}"] if follows else []))
            probability = (nest if nested else 1 - nest) * (p_next if follows else 1 - p_next) / n_brackets
            if probability > 0:
                rules.append(Rule(f"D{depth}", rhs, probability))
        if nest == 0.0:
            break
    return PCFG(
        start="D1", terminals=tuple(bracket for pair in pairs for bracket in pair), rules=tuple(rules), **fields
    )


FAMILIES: Mapping[str, Callable[..., PCFG]] = {"cfg3": cfg3, "random_hierarchy": random_hierarchy, "dyck": dyck}
"""Families by the ``kind`` that YAML names them by."""


def expand_family(described: Any) -> Any:
    """Make a grammar of a mapping whose ``kind`` names a family; return anything else as it is.

    Raises:
        ValueError: A value is not accepted, or the family has no such option.
    """
    if not isinstance(described, Mapping) or described.get("kind") not in FAMILIES:
        return described
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in described.items() if name != "kind"}
    try:
        return FAMILIES[described["kind"]](**options)
    except TypeError as error:
        raise ValueError(f"{described['kind']}: {error}") from error


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; at least {least} is needed")


def _reachable_part(rules: list[Rule], tokens: tuple[str, ...], fields: dict[str, Any]) -> PCFG:
    """Make a grammar of the rules that a string can use; with few rules some symbols are in no one's."""
    reached = {"S"}
    kept = []
    for rule in rules:  # from the root down, level by level
        if rule.lhs in reached:
            kept.append(rule)
            reached.update(rule.rhs)
    return PCFG(start="S", terminals=tuple(t for t in tokens if t in reached), rules=tuple(kept), **fields)

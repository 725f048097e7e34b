"""Families of context-free grammars from the literature: each function returns a :class:`PCFG`.

In YAML a family is a grammar too: ``{kind: cfg3, n_levels: 6, n_symbols: 3}``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from itertools import pairwise, product
from typing import Annotated, Any, TypeGuard

from pydantic import Field

from mechhier.grammars.base import stable_generator
from mechhier.grammars.pcfg import PCFG
from mechhier.grammars.rules import Rule, check_size
from mechhier.specs import Flag, Number, Problem, Seed, Size, SpecError, Whole, check_arguments, no_such_field

_BRACKETS = ("()", "[]", "{}", "<>")
_TRIES = 10_000
_MOST_DRAWS = 50_000  # of rules, over all tries of a level: half a second
_MOST_TUPLES = 10**6

Levels = Annotated[Size, Field(le=100)]
"""Levels of a grammar: a string has at least as many tokens as there are levels, most often exponentially many."""
Symbols = Annotated[Size, Field(le=10_000)]


def family(function: Callable[..., PCFG]) -> Callable[..., PCFG]:
    """Make a function check its options by their annotations before it draws anything."""

    @functools.wraps(function)
    def checked(**options: Any) -> PCFG:
        own = {name: value for name, value in options.items() if name in parameters}
        others = {name: value for name, value in options.items() if name not in parameters}
        if unknown := [name for name in others if name not in fields]:
            problems = [Problem((name,), no_such_field(name, (*parameters, *fields))) for name in unknown]
            raise SpecError.of(function.__name__, problems)
        try:
            return function(**check_arguments(function, own), **others)
        except ValueError as error:
            problems = error.problems if isinstance(error, SpecError) else ()
            raise SpecError.of(function.__name__, problems or [Problem((), str(error))]) from None

    parameters = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields = [name for name in PCFG.model_fields if name not in ("kind", "start", "terminals", "rules")]
    return checked


@family
def cfg3(
    *,
    n_levels: Levels = 6,
    n_symbols: Annotated[Symbols, Field(ge=2)] = 3,
    n_rules: tuple[Symbols, Symbols] = (2, 2),
    rule_lengths: tuple[Symbols, Symbols] = (2, 3),
    distinct_children: Flag = True,
    seed: Seed = 0,
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
    for name, (low, high) in (("n_rules", n_rules), ("rule_lengths", rule_lengths)):
        if low > high:
            raise SpecError(f"{name}={(low, high)}: the smaller number comes first")
    _check_size(1 + n_levels * n_symbols, n_rules[1], rule_lengths[1])
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
        n_tries = min(_TRIES, max(1, _MOST_DRAWS // (len(parents) * n_rules[1])))
        for _ in range(n_tries):
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
                f"no level found in {n_tries} tries: n_rules={n_rules} rules of {rule_lengths} symbols for each of "
                f"{len(parents)} symbols must all differ and use all {n_symbols} symbols of the next level"
            )
        for parent, of_symbol in zip(parents, drawn, strict=True):
            rules += [Rule(parent, tuple(children[i] for i in sequence), 1 / len(of_symbol)) for sequence in of_symbol]
        parents = [children[i] for i in used]
    return PCFG(start="S", terminals=tuple(parents), rules=tuple(rules), **fields)


@family
def random_hierarchy(
    *,
    n_symbols: Symbols = 8,
    n_tuples: Symbols = 2,
    tuple_length: Annotated[Whole, Field(ge=2, le=100)] = 2,
    n_levels: Levels = 3,
    n_classes: Symbols = 8,
    seed: Seed = 0,
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
    _check_size(1 + n_classes + n_levels * n_symbols, n_tuples, tuple_length)
    possible = n_symbols**tuple_length
    needed = n_tuples * max(n_classes, n_symbols if n_levels > 1 else 1)
    if needed > possible or possible > _MOST_TUPLES:
        raise ValueError(
            f"n_symbols={n_symbols} and tuple_length={tuple_length} give {possible} tuples; the rules need {needed} "
            f"different ones, and at most {_MOST_TUPLES} are enumerated"
        )
    rng = stable_generator("random_hierarchy", n_symbols, n_tuples, n_levels, n_classes, tuple_length, seed)
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


@family
def dyck(
    *,
    n_brackets: Symbols = 2,
    max_depth: Annotated[Size, Field(le=1_000)] = 4,
    p_nest: Annotated[Number, Field(ge=0, lt=1)] = 0.5,
    p_next: Annotated[Number, Field(ge=0, lt=1)] = 0.5,
    **fields: Any,
) -> PCFG:
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
    check_size(max_depth + 2 * n_brackets, 4 * n_brackets * max_depth, 16 * n_brackets * max_depth)
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


def is_family(described: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether a description is that of a family."""
    return isinstance(described, Mapping) and isinstance(described.get("kind"), str) and described["kind"] in FAMILIES


def expand_family(described: Any) -> Any:
    """Make a grammar of a mapping whose ``kind`` names a family; return anything else as it is.

    Raises:
        SpecError: A value is not accepted, or the family has no such option.
    """
    if not is_family(described):
        return described
    if not all(isinstance(name, str) for name in described):
        raise SpecError("the names of a grammar's fields are text")
    return FAMILIES[described["kind"]](**{name: value for name, value in described.items() if name != "kind"})


def _check_size(n_symbols: int, n_rules: int, length: int) -> None:
    """Refuse a grammar of too many symbols, of so many rules of that length each, before they are drawn."""
    check_size(n_symbols, n_symbols * n_rules, n_symbols * n_rules * length)


def _reachable_part(rules: list[Rule], tokens: tuple[str, ...], fields: dict[str, Any]) -> PCFG:
    """Make a grammar of the rules that a string can use; with few rules some symbols are in no one's."""
    reached = {"S"}
    kept = []
    for rule in rules:  # from the root down, level by level
        if rule.lhs in reached:
            kept.append(rule)
            reached.update(rule.rhs)
    return PCFG(start="S", terminals=tuple(t for t in tokens if t in reached), rules=tuple(kept), **fields)

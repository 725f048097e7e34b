"""Random context-free grammars for properties, and what enumeration says about them."""

import math
from collections import Counter

from hypothesis import strategies as st

from mechhier.grammars import PCFG


@st.composite
def pcfgs(draw, *, recursive=True, empty=True):
    """A consistent grammar with up to four nonterminals; without recursion at most three, few enough to enumerate."""
    n = draw(st.integers(1, 4 if recursive else 3))
    rules, used = [], set()
    for i in range(n):
        below = [f"N{j}" for j in range(i + 1, n)]
        alternatives = {}
        for k in range(draw(st.integers(1, 3))):
            rhs = draw(st.lists(st.sampled_from(["a", "b", "c", *below[:1]]), min_size=1, max_size=3))
            if k == 0:
                rhs = [*rhs[:2], *below[:1]] or rhs
            if len(below) > 1 and rhs.count(below[0]) == 3:  # cubes of cubes would be too many
                rhs[1] = "c"
            alternatives[tuple(rhs)] = draw(st.floats(0.2, 1.0))
        if empty and draw(st.booleans()):
            alternatives[()] = draw(st.floats(0.2, 1.0))
        if recursive and draw(st.booleans()):
            rhs = draw(st.permutations([f"N{i}", draw(st.sampled_from(["a", "b", f"N{i}"]))]))
            alternatives[tuple(rhs)] = 0.4 * sum(alternatives.values())
        total = sum(alternatives.values())
        rules += [(f"N{i}", rhs, weight / total) for rhs, weight in alternatives.items()]
        used.update(x for rhs in alternatives for x in rhs if not x.startswith("N"))
    if not used:
        rules = [("N0", ("a",), 1.0)]
        used = {"a"}
    return PCFG(start="N0", terminals=tuple(sorted(used)), rules=tuple(rules))


def derivations(grammar, symbol=None):
    """All derivations of a symbol of a grammar without recursion: (probability, tokens, tree as nested tuples)."""
    symbol = grammar.start if symbol is None else symbol
    if symbol in grammar.terminals:
        yield 1.0, (symbol,), symbol
        return
    for lhs, rhs, probability in grammar.rules:
        if lhs == symbol:
            parts = [(probability, (), ())]
            for child in rhs:
                parts = [
                    (p * q, s + t, (*trees, tree))
                    for p, s, trees in parts
                    for q, t, tree in derivations(grammar, child)
                ]
            yield from ((p, s, (symbol, *trees)) for p, s, trees in parts)


def strings(grammar):
    """All strings with their probabilities and their numbers of derivations."""
    probabilities, counts = Counter(), Counter()
    for probability, tokens, _ in derivations(grammar):
        probabilities[tokens] += probability
        counts[tokens] += 1
    assert math.isclose(sum(probabilities.values()), 1)
    return probabilities, counts


def ids(grammar, tokens):
    """Token ids of terminals."""
    return [grammar.terminals.index(token) for token in tokens]

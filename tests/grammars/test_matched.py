"""The matched arms side by side."""

import numpy as np
import pytest

from mechhier.grammars.document import DocumentGrammar
from mechhier.grammars.matched import matched_arms


@pytest.mark.parametrize("binding", [0.0, 0.5])
def test_arms_share_their_frequencies_and_have_the_floors_their_closed_forms_say(binding):
    grammar = DocumentGrammar(n_words=6, lexicon=4, binding=binding, context=48, p_chain=0.3)
    arms = matched_arms(grammar, n_rows=30 if binding == 0 else 4)
    kinds = ["fixed", "per_document", "pool of 4"]
    assert list(arms.index) == [(text, kind) for text in ("hierarchical", "flat") for kind in kinds]
    assert arms["unigram_difference"].max() < 1e-12
    assert np.all(arms["entropy_rate_lower"] <= arms["entropy_rate_upper"])
    assert np.all((arms["floor_low"] < arms["floor"]) & (arms["floor"] < arms["floor_high"]))
    assert arms.loc[("hierarchical", "pool of 4"), "grammar"] == grammar
    assert arms.loc[("flat", "fixed"), "grammar"] == grammar.model_copy(
        update={"lexicon": "fixed", "hierarchical": False}
    )
    if binding == 0:
        for text in ("hierarchical", "flat"):
            floor = arms.loc[text, "floor"]
            assert floor["fixed"] < floor["per_document"] < arms.loc[(text, "per_document"), "entropy_rate_upper"]


def test_frequencies_that_differ_are_reported(monkeypatch):
    grammar = DocumentGrammar(n_words=3, lexicon="fixed", context=16)
    skewed = np.array(grammar.category_transitions)
    skewed[4, :2] = 0.75, 0.25
    monkeypatch.setattr(DocumentGrammar, "category_transitions", property(lambda _: skewed))
    arms = matched_arms(grammar, n_rows=2)
    assert arms.loc["hierarchical", "unigram_difference"].max() == 0
    assert arms.loc["flat", "unigram_difference"].max() > 0.01


def test_a_language_without_a_pool_has_four_arms_whose_repetitions_are_its_own():
    grammar = DocumentGrammar(n_words=3, lexicon="per_document", repetitions=3, context=16)
    arms = matched_arms(grammar, n_rows=2)
    assert len(arms) == 4
    assert arms.loc[("flat", "per_document"), "grammar"].repetitions == 3

import re
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechhier.grammars import PCFG, DocumentGrammar, NGram, Tree, cfg3, dyck
from mechhier.grammars.statistics import describe
from mechhier.report import corpus as corpus_figure
from mechhier.report import plot
from mechhier.report.corpus import frequency_panel, information_panel, length_panel, tree_panel
from mechhier.report.drawing import TREE_TEXT_SIZE, TREE_WIDTH, draw
from mechhier.report.panels import Curve, CurvePanel

LANGUAGES = {
    "document": DocumentGrammar(n_words=5, lexicon=2, n_sections=1, n_paragraphs=1),
    "flat document": DocumentGrammar(n_words=5, lexicon=2, hierarchical=False),
    "ngram": NGram(n_tokens=8, max_extra=9),
    "cfg3": cfg3(n_levels=4),
    "dyck": dyck(),
    "empty strings": PCFG.from_string("S -> 'a' S [0.3] | [0.7]"),
}


def panel_titles(figure):
    return [a.text.replace("<br>", " ") for a in figure.layout.annotations]


def texts(figure):
    return [t for trace in figure.data if trace.type == "scatter" and trace.mode == "text" for t in trace.text]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_corpus_of_every_language_is_drawn(language, packed):
    grammar = LANGUAGES[language]
    corpus = grammar.corpus(tokens=4000, context=80, packed=packed)
    figure = plot(corpus)
    go.Figure(figure.to_dict())  # plotly accepts every property
    assert figure.layout.title.text.startswith(type(grammar).__name__)
    assert "first 4,000 of 4,000 tokens" in figure.layout.title.text
    found = panel_titles(figure)
    assert len(found) == (4 if grammar.symbols else 3)
    assert any("Tree of the first" in title for title in found) == bool(grammar.symbols)


def test_the_smallest_corpus_is_drawn_and_says_what_is_not_known():
    figure = plot(cfg3().corpus(tokens=8, context=8))
    shown = panel_titles(figure)
    assert shown.count("no value is defined here") == 2  # no complete document, too few rows
    assert "Tree of the first document, which its row cuts, 8 tokens" in shown


def test_a_title_that_is_given_is_drawn():
    assert plot(dyck().corpus(tokens=640, context=64), title="a <b>").layout.title.text == "a &lt;b&gt;"


def test_tokens_stand_at_their_rank_with_their_share_and_the_law():
    text = describe(DocumentGrammar(n_words=4, lexicon=2).corpus(tokens=960, context=96), max_distance=1)
    observed, law = frequency_panel(text).curves
    shares = zip(text.frequency.to_numpy(), text.unigram.to_numpy(), strict=True)
    by_name = dict(zip(text.token.to_numpy(), shares, strict=True))
    assert (np.diff(law.y) <= 0).all()
    assert (np.diff(observed.y) > 0).any()  # a short text: its own order is another
    assert observed.x.tolist() == list(range(1, len(by_name) + 1))
    for name, share, probability in zip(observed.names, observed.y, law.y, strict=True):
        assert by_name.pop(name.removeprefix("token ")) == (share, probability)
    assert not by_name


def test_a_large_vocabulary_is_thinned_to_ranks_of_every_size():
    text = describe(NGram(n_tokens=5000).corpus(tokens=20_000, context=100), max_distance=1)
    ranks = frequency_panel(text).curves[0].x
    assert len(ranks) <= 1500
    assert (ranks[0], ranks[-1]) == (1, 5000)
    assert (ranks[1:] / ranks[:-1]).max() <= 2


@pytest.mark.parametrize("language", LANGUAGES)
def test_bins_hold_every_document_and_equally_many_possible_lengths(language):
    text = describe(LANGUAGES[language].corpus(tokens=200_000, context=400, packed=True), max_distance=1)
    panel = length_panel(text)
    widths = np.diff(panel.edges)
    assert (widths == widths[0]).all()
    assert len(panel.bars.y) <= 40
    assert panel.bars.y.sum() == pytest.approx(text.length_share.sum())
    share = text.length_share.to_numpy()
    for i, value in enumerate(panel.bars.y):
        inside = (text.length > panel.edges[i]) & (text.length < panel.edges[i + 1])
        assert value == pytest.approx(share[inside].sum())
    if panel.law is not None:
        known = np.isfinite(panel.law.y)
        assert np.abs(panel.law.y - panel.bars.y)[known].max() < 0.1
    assert (panel.law is not None) == isinstance(LANGUAGES[language], PCFG)


def test_lengths_that_are_multiples_of_something_make_no_pattern():
    # A string of brackets has an even number of them: a bin of three lengths would hold one or two.
    text = describe(dyck().corpus(tokens=2**17, context=512, packed=True), max_distance=1)
    assert np.diff(length_panel(text).edges)[0] % 2 == 0


def test_mutual_information_is_drawn_with_interval_and_null():
    text = describe(cfg3(n_levels=4).corpus(tokens=40_000, context=64))
    whole, beyond = information_panel(text).curves
    for curve, name in ((whole, "mutual_information"), (beyond, "mutual_information_beyond_position")):
        for values, end in ((curve.y, ""), (curve.low, "_low"), (curve.high, "_high")):
            assert np.array_equal(values, text[name + end])
    assert np.array_equal(whole.null, text.mutual_information_null_high)


def test_logarithmic_axes_leave_out_what_is_not_positive_and_cut_the_band():
    x = np.array([1.0, 2.0, 4.0])
    curve = Curve("a", x, np.array([1.0, -0.1, 0.01]), "#000000", low=x * 0 - 1, high=x, null=np.array([0.1, 0.0, 0.1]))
    figure = draw([CurvePanel("t", "nats", [curve], log=True)], title="", columns=1)
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")
    band, null, line = (t for t in figure.data)
    assert min(y for y in band.y if y is not None) == 0.005
    assert np.isnan(line.y[1])
    assert np.isnan(null.y[1])
    assert "interval -1 to 2" in line.text[1]


# -- trees -----------------------------------------------------------------------------------------------------------


def edges_down(panel):
    """Every node's children, by the index of the node."""
    return {i: [j for j, node in enumerate(panel.nodes) if node.parent == i] for i in range(len(panel.nodes))}


def rebuilt(panel, index=0):
    """The tree that a panel shows, in bracket notation."""
    node = panel.nodes[index]
    if node.is_leaf:
        return node.label
    return f"({' '.join([node.label, *(rebuilt(panel, child) for child in edges_down(panel)[index])])})"


def test_a_tree_that_fits_is_drawn_whole():
    tree = Tree("S", [Tree("A", ["a", "b"]), "c", Tree("A", [Tree("B", ["a"])])])
    panel = tree_panel(tree)
    assert panel.title == "Tree of the first complete document, 4 tokens"
    assert rebuilt(panel) == str(tree)
    leaves = [node for node in panel.nodes if node.is_leaf]
    assert [node.label for node in leaves] == ["a", "b", "c", "a"]
    assert {node.level for node in leaves} == {3}
    assert [node.x for node in leaves] == sorted(node.x for node in leaves)
    assert panel.nodes[0].hover == "S<br>4 tokens: a b c a"
    assert leaves[2].hover == "token c<br>position 2"


@given(st.integers(0, 40), st.sampled_from(list(LANGUAGES)))
@settings(deadline=None, max_examples=25)
def test_no_label_of_a_tree_meets_another_and_the_title_says_what_was_cut(seed, language):
    grammar = LANGUAGES[language]
    if not grammar.symbols:
        return
    sample = grammar.generate(1, 200, np.random.default_rng(seed), trees=True)
    tree = max(grammar.trees(sample, 0), key=lambda tree: len(tree.tokens))
    panel = tree_panel(tree)
    tokens = [node.label for node in panel.nodes if node.is_leaf]
    n = len(tree.tokens)
    if tokens[-1] == "…":
        tokens.pop()
        assert f"its first {len(tokens)} of {n} tokens" in panel.title
        assert panel.nodes[-1].hover == f"{n - len(tokens)} more tokens"
    assert tokens == tree.tokens[: len(tokens)]
    assert len(tokens) <= 40
    levels = {}
    for node in panel.nodes:
        levels.setdefault(node.level, []).append(node)
    for nodes in levels.values():
        nodes.sort(key=lambda node: node.x)
        for left, right in pairwise(nodes):
            # Half of either label, at half its size a letter.
            assert right.x - left.x > 0.25 * TREE_TEXT_SIZE * (len(left.label) + len(right.label))
        assert nodes[0].x > 0
        assert nodes[-1].x < TREE_WIDTH


def test_a_tree_that_is_too_deep_or_too_wide_is_cut_to_its_first_tokens():
    deep = Tree("S", ["a"])
    for _ in range(40):
        deep = Tree("S", ["a", deep])
    assert "its first 14 of 41 tokens" in tree_panel(deep).title
    wide = Tree("a rather long name", ["b" * 40] * 10)
    assert "its first 3 of 10 tokens" in tree_panel(wide).title


def test_the_tree_is_that_of_the_first_complete_document():
    grammar = PCFG.from_string("S -> 'a' S [0.9] | 'b' [0.1]")
    corpus = grammar.corpus(tokens=4000, context=8, seed=3)
    rows = [[grammar.vocabulary[t] for t in row] for row in corpus.rows(0, 50)]
    first = next(row for row in rows if "<eos>" in row)
    assert rows[0] is not first
    shown = texts(plot(corpus))
    assert [t for t in shown if t != "S"] == first[: first.index("<eos>")]


def test_names_in_trees_are_escaped():
    figure = plot(DocumentGrammar(n_words=3, lexicon="fixed").corpus(tokens=2000, context=100))
    assert "&lt;eos&gt;" in texts(figure)
    assert not any("<eos>" in t for t in texts(figure))
    grammar = PCFG(start="<S>", terminals=("<b>",), rules=[("<S>", ("<b>", "<b>"), 1.0)])
    written = plot(grammar.corpus(tokens=100, context=10)).to_json()
    assert not re.search(r"<(b|S)>|\\u003c(b|S)\\u003e", written)


def test_trees_that_would_not_fit_in_memory_are_left_out_and_the_title_says_so(monkeypatch):
    monkeypatch.setattr(corpus_figure, "TREE_BYTES", 2**18)
    figure = plot(dyck().corpus(tokens=640, context=64))
    assert "trees too deep to draw" in figure.layout.title.text
    assert not any("Tree" in title for title in panel_titles(figure))


def test_dealt_corpora_draw_more_text_than_they_hold(monkeypatch):
    fits = []
    for disjoint, split in ((False, "validation"), (True, "train"), (True, "validation")):
        corpus = cfg3(n_levels=4).corpus(tokens=640, context=64, disjoint=disjoint, split=split)
        monkeypatch.setattr(corpus_figure, "TREE_BYTES", 2 * 4 * 2**18 * 8)
        fits.append("too deep" not in plot(corpus).layout.title.text)
    assert fits == [True, True, False]


def test_a_tree_has_a_row_of_its_own_below_the_panels():
    figure = plot(dyck().corpus(tokens=640, context=64))
    domains = [(figure.layout[f"xaxis{i}"].domain, figure.layout[f"yaxis{i}"].domain) for i in ("", 2, 3, 4)]
    assert domains[3][0] == (0.0, 1.0)
    assert domains[3][1][1] < min(y[0] for _, y in domains[:3])


def test_panels_after_a_tree_begin_a_new_row():
    tree = tree_panel(Tree("S", ["a", "b"]))
    x = np.array([1.0, 2.0])
    figure = draw([tree, *(CurvePanel(t, "", [Curve(t, x, x, "#000000")]) for t in "pq")], title="", columns=2)
    axes = {trace.name: (trace.xaxis, trace.yaxis) for trace in figure.data if trace.name in ("p", "q")}
    assert axes == {"p": ("x2", "y2"), "q": ("x3", "y3")}
    assert figure.layout.xaxis.domain == (0.0, 1.0)
    assert figure.layout.yaxis2.domain == figure.layout.yaxis3.domain
    assert figure.layout.yaxis2.domain[1] < figure.layout.yaxis.domain[0]
    assert panel_titles(figure)[1:] == ["p", "q"]


def test_what_cannot_be_drawn_names_what_can():
    with pytest.raises(TypeError, match="a corpus, and a planted model"):
        plot([1])

"""A corpus's figure: frequencies of its tokens, lengths of its documents, mutual information by distance, one tree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from mechhier.grammars import Corpus, Tree
from mechhier.grammars.dealing import SHARES, document_ends
from mechhier.grammars.statistics import describe
from mechhier.report import style
from mechhier.report.drawing import TREE_TEXT_SIZE, TREE_WIDTH, draw
from mechhier.report.panels import Bars, Curve, CurvePanel, HistogramPanel, Node, Panel, TreePanel

OBSERVED, LAW = "corpus", "the grammar's own law"
BEYOND = "corpus, beyond position"
NULL = "null: same positions in other rows (upper 95 %)"
MAX_RANKS = 1500  # more tokens than this: ranks are thinned evenly on the logarithmic axis
MAX_BINS = 40
TREE_TOKENS, TREE_LEVELS = 40, 14  # at most
TREE_ROWS = 256  # in which a complete document is looked for
TREE_BYTES = 2**27  # of one array with every ancestor of every token of a block; several are made
LETTER_WIDTH = 0.6 * TREE_TEXT_SIZE  # pixels, on average
LEAF_GAP = 8  # pixels between the labels of neighbouring leaves
MAX_STRETCH = 2.0  # of a tree that is narrower than its panel
HOVER_TOKENS = 12


def plot_corpus(corpus: Corpus, *, title: str | None = None) -> go.Figure:
    """Draw a corpus; see `mechhier.report.plot`.

    Args:
        corpus: of any language.
        title: of the figure; the default names the language and says how many tokens were read.

    Returns:
        A figure with three panels, and a fourth with a tree if the language has trees.
    """
    text = describe(corpus)
    panels: list[Panel] = [frequency_panel(text), length_panel(text), information_panel(text)]
    words = (
        f"{type(corpus.grammar).__name__}, {corpus.split} split: first {text.attrs['n_tokens']:,} of "
        f"{corpus.n_tokens:,} tokens"
    )
    if corpus.grammar.symbols:
        if _trees_fit(corpus):
            tree, is_whole = _first_tree(corpus)
            panels += [] if tree is None else [tree_panel(tree, is_whole=is_whole)]
        else:
            words += "; trees too deep to draw"
    return draw(panels, title=title or words, columns=3, null_label=NULL)


def frequency_panel(text: xr.Dataset) -> CurvePanel:
    """Return the share of every token by its rank under the grammar's law, and the law."""
    law, observed = text["unigram"].to_numpy(), text["frequency"].to_numpy()
    order = np.lexsort((-observed, -law))
    rank = np.arange(1, len(order) + 1)
    if len(order) > MAX_RANKS:
        rank = np.unique(np.geomspace(1, len(order), MAX_RANKS).astype(np.int64))
    shown = order[rank - 1]
    names = [f"token {token}" for token in text["token"].to_numpy()[shown]]
    return CurvePanel(
        "Share of every token",
        "share of the tokens",
        [
            Curve(OBSERVED, rank, observed[shown], style.BLUE, line=False, names=names),
            Curve(LAW, rank, law[shown], style.VERMILLION, symbol=None, names=names),
        ],
        x_title="rank under the grammar's law",
        log=True,
    )


def length_panel(text: xr.Dataset) -> HistogramPanel:
    """Return the share of documents by length, in at most 40 bins, and the law where it is known."""
    share, law = text["length_share"].to_numpy(), text["length_expected"].to_numpy()
    length = text["length"].to_numpy()
    seen = length[share > 0] if (share > 0).any() else length
    # Lengths can be multiples of something (4 in the document language): bins hold equally many possible ones.
    step = int(np.gcd.reduce(np.diff(seen))) if len(seen) > 1 else 1
    n_possible = int(seen[-1] - seen[0]) // step + 1
    least = math.ceil(n_possible / MAX_BINS)
    # The last bin as full as can be: one that holds fewer lengths than the others would look like a fall.
    width = step * min(range(least, 2 * least), key=lambda n: -n_possible % n)
    first = int(seen[0])
    n_bins = (int(seen[-1]) - first) // width + 1
    edges = first - 0.5 + width * np.arange(n_bins + 1)
    padded = np.full((2, first - 1 + n_bins * width), [[0.0], [np.nan]])
    padded[:, : len(share)] = share, law
    shares, laws = padded[:, first - 1 :].reshape(2, n_bins, width).sum(axis=2)
    n_documents, n_cut = text.attrs["n_documents"], text.attrs["n_documents_cut"]
    return HistogramPanel(
        f"Lengths of documents\n({n_documents:,} complete, {n_cut:,} cut)",
        f"share per {width} tokens" if width > 1 else "share of the documents",
        "tokens, <eos> included",
        edges,
        Bars(OBSERVED, shares, style.BLUE),
        Curve(LAW, edges[:-1], laws, style.VERMILLION) if np.isfinite(laws).any() else None,
    )


def information_panel(text: xr.Dataset) -> CurvePanel:
    """Return mutual information by distance on logarithmic axes, what positions alone account for, and the rest."""
    distance = text["distance"].to_numpy()

    def curve(label: str, name: str, color: str, symbol: str, null: np.ndarray | None = None) -> Curve:
        y, low, high = (text[f"{name}{end}"].to_numpy() for end in ("", "_low", "_high"))
        return Curve(label, distance, y, color, low=low, high=high, null=null, symbol=symbol)

    null = text["mutual_information_null_high"].to_numpy()
    curves = [
        curve(OBSERVED, "mutual_information", style.BLUE, "circle", null),
        curve(BEYOND, "mutual_information_beyond_position", style.GREEN, "diamond"),
    ]
    return CurvePanel("Mutual information of two tokens", "nats", curves, x_title="distance in tokens", log=True)


# -- the tree --------------------------------------------------------------------------------------------------------


def _trees_fit(corpus: Corpus) -> bool:
    """Whether the ancestors of a block's tokens fit in memory: trees are made for whole blocks."""
    per_block = corpus.rows_per_block
    block = replace(corpus, n_rows=per_block, path=None)  # all of it, also where the corpus ends inside
    depth = block.sample(0, per_block).labels.get("depth")
    if depth is None:
        return True
    low, high = SHARES[corpus.split] if corpus.disjoint else (0.0, 1.0)
    return int(depth.max()) * depth.size * 4 / (high - low) <= TREE_BYTES


def _first_tree(corpus: Corpus) -> tuple[Tree | None, bool]:
    """Return the tree of the first complete document, and whether it is whole; the first one if a row cuts them all."""
    grammar = corpus.grammar
    # Only the first row of a packed corpus begins a document.
    n_rows = 1 if corpus.packed else min(TREE_ROWS, corpus.n_rows, corpus.rows_per_block)
    n_whole = np.zeros(n_rows, dtype=np.int64)
    for number, row in enumerate(corpus.rows(0, n_rows)):
        ends = document_ends(row, grammar.eos_token_id, grammar.eos_per_document)
        n_whole[number] = (np.diff(ends, prepend=0) > 1).sum()  # a document that is only <eos> has no tree
    chosen = int(np.argmax(n_whole > 0))
    trees = grammar.trees(corpus.sample(chosen, chosen + 1, trees=True), 0)
    return (trees[0] if trees else None), bool(n_whole[chosen])


def tree_panel(tree: Tree, *, is_whole: bool = True) -> TreePanel:
    """Return a tree, cut to the first tokens that fit legibly (at most 40), which its title says.

    Args:
        tree: any tree.
        is_whole: whether the document was complete.
    """
    n_tokens = len(tree.tokens)
    for n_shown in range(min(n_tokens, TREE_TOKENS), 0, -1):
        drawn, width = _laid_out(tree, n_shown, n_tokens)
        if width <= TREE_WIDTH and max(node.level for node in drawn) <= TREE_LEVELS:
            break
    else:
        drawn, n_shown = _laid_out(tree, 1, n_tokens)[0], 1
    words = "Tree of the first complete document" if is_whole else "Tree of the first document, which its row cuts"
    words += f", {n_tokens} tokens" if n_shown == n_tokens else f": its first {n_shown} of {n_tokens} tokens"
    return TreePanel(words, drawn)


@dataclass
class _Part:
    """A node while it is laid out: what it shows and which leaves, numbered from the left, are below it."""

    label: str
    level: int
    parent: int | None
    hover: str
    leaves: list[int]
    is_leaf: bool


def _laid_out(tree: Tree, n_shown: int, n_tokens: int) -> tuple[list[Node], float]:
    """Return the nodes above the first tokens, and the width in pixels that they need."""
    parts: list[_Part] = []
    n_leaves = 0

    def add(item: Tree | str, level: int, above: tuple[int, ...]) -> None:
        nonlocal n_leaves
        if n_leaves == n_shown:
            return
        hover = _hover(item) if isinstance(item, Tree) else f"token {style.text(item)}<br>position {n_leaves}"
        number = len(parts)
        parent = above[-1] if above else None
        if isinstance(item, Tree):
            parts.append(_Part(item.symbol, level, parent, hover, [], is_leaf=False))
            for child in item.children:
                add(child, level + 1, (*above, number))
        else:
            parts.append(_Part(item, level, parent, hover, [n_leaves], is_leaf=True))
            for index in above:
                parts[index].leaves.append(n_leaves)
            n_leaves += 1

    add(tree, 0, ())
    if n_shown < n_tokens:
        parts.append(_Part("…", 0, None, f"{n_tokens - n_shown} more tokens", [n_leaves], is_leaf=True))
    widths = _widths(parts)
    stretch = min(MAX_STRETCH, max(1.0, TREE_WIDTH / widths.sum()))
    margin = max(0.0, (TREE_WIDTH - stretch * widths.sum()) / 2)
    centers = margin + stretch * (np.cumsum(widths) - widths / 2)
    lowest = max(part.level for part in parts)
    nodes = [
        Node(
            part.label,
            float(centers[[part.leaves[0], part.leaves[-1]]].mean()),
            lowest if part.is_leaf else part.level,
            part.parent,
            part.hover,
            part.is_leaf,
        )
        for part in parts
    ]
    return nodes, float(widths.sum())


def _widths(parts: Sequence[_Part]) -> np.ndarray:
    """Return the width in pixels of every leaf, so that no label is wider than the leaves below it."""
    widths = np.zeros(max(part.leaves[-1] for part in parts) + 1)
    for part in reversed(parts):  # children before their parents
        missing = LETTER_WIDTH * len(part.label) + LEAF_GAP - widths[part.leaves].sum()
        widths[part.leaves] += max(0.0, missing) / len(part.leaves)
    return widths


def _hover(tree: Tree) -> str:
    tokens = tree.tokens
    beginning = " ".join(tokens[:HOVER_TOKENS]) + (" …" if len(tokens) > HOVER_TOKENS else "")
    return f"{style.text(tree.symbol)}<br>{len(tokens)} tokens: {style.text(beginning)}"

"""What a corpus looks like, for the terminal: sentences, a tree, frequencies, and how well it can be predicted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree as RichTree

from mechhier.grammars.corpus import Corpus
from mechhier.grammars.document import DocumentGrammar
from mechhier.grammars.matched import matched_arms
from mechhier.grammars.storage import CorpusError
from mechhier.grammars.trees import Tree

_N_SENTENCES = 10
_SENTENCE_TOKENS = 20
_N_FREQUENT = 12
_TREE_TOKENS = 30
_TREE_LEVELS = 30  # deeper, and there is no room in the line
_FLOOR_ROWS = 64
_ARM_ROWS = 16
_COMPARED_TOKENS = 2_000_000


def preview(corpus: Corpus) -> Iterator[RenderableType]:
    """Yield, for rich to print: facts, ten sentences, one tree, frequencies of tokens, floors, and what splits share."""
    grammar = corpus.grammar
    yield _heading(f"{type(grammar).__name__}, seed {corpus.seed}, {corpus.split} split")
    n_bytes = corpus.n_tokens * corpus.dtype.itemsize
    yield Text(
        f"{corpus.n_tokens:,} tokens in {corpus.n_rows:,} rows of {corpus.context}, {n_bytes / 1e6:,.1f} MB as "
        f"{corpus.dtype.name}; vocabulary {grammar.vocab_size}"
    )
    n_rows = min(corpus.n_rows, max(1, 2**16 // corpus.context))
    tokens = corpus.rows(0, n_rows)
    yield _heading(f"{_N_SENTENCES} sentences (up to <eos>)")
    for sentence in _sentences(corpus, tokens):
        yield Padding(Text(sentence), (0, 0, 0, 2), expand=False)
    if grammar.symbols:
        yield from _first_tree(corpus)
    yield _heading(f"the {min(_N_FREQUENT, grammar.vocab_size)} most frequent tokens")
    yield _frequencies(corpus, tokens)
    yield _heading("loss of the ideal predictor (nats per token)")
    yield _floors(corpus)
    if isinstance(grammar, DocumentGrammar):
        yield _heading(f"the matched arms (nats per token; ideal loss on {_ARM_ROWS} rows)")
        yield _arms(grammar)
    yield _heading("what the splits share")
    yield Text(_shared(corpus))


def _heading(words: str) -> RenderableType:
    return Padding(Text(words, style="bold"), (1, 0, 0, 0), expand=False)


def _sentences(corpus: Corpus, tokens: np.ndarray) -> Iterator[str]:
    left = _N_SENTENCES
    for row in tokens:
        for sentence in np.split(row, np.flatnonzero(row == corpus.grammar.eos_token_id) + 1)[:-1]:
            if left == 0:
                return
            left -= 1
            yield _written(corpus, sentence)
    if left == _N_SENTENCES:
        yield _written(corpus, tokens[0]) + " (no <eos> in the row)"


def _written(corpus: Corpus, tokens: np.ndarray) -> str:
    words = " ".join(corpus.grammar.vocabulary[token] for token in tokens[:_SENTENCE_TOKENS])
    return words if len(tokens) <= _SENTENCE_TOKENS else f"{words} ... ({len(tokens)} tokens)"


def _first_tree(corpus: Corpus) -> Iterator[RenderableType]:
    try:
        tree = corpus.grammar.trees(corpus.sample(0, 1, trees=True), 0)[0]
    except ValueError as error:  # too deep to be kept
        yield _heading("the first tree")
        yield Padding(Text(str(error)), (0, 0, 0, 2), expand=False)
        return
    yield _heading(f"the first tree{_cut_note(tree)}")
    yield Padding(_drawn(tree), (0, 0, 0, 2), expand=False)


def _cut_note(tree: Tree) -> str:
    n = len(tree.tokens)
    return f", about the first {_TREE_TOKENS} of its {n} tokens" if n > _TREE_TOKENS else ""


def _drawn(tree: Tree) -> RichTree:
    budget = _TREE_TOKENS
    root = RichTree(Text(tree.symbol))
    todo: list[tuple[RichTree, Tree | str, int]] = [(root, child, 1) for child in reversed(tree.children)]
    while todo and budget > 0:
        branch, child, level = todo.pop()
        if isinstance(child, str):
            branch.add(Text(child, style="green"))
            budget -= 1
        elif all(isinstance(part, str) for part in child.children):
            branch.add(Text(child.symbol + " ").append(" ".join(child.tokens), style="green"))
            budget -= len(child.tokens)
        elif level == _TREE_LEVELS:
            tokens = child.tokens
            branch.add(Text(child.symbol + " ").append(" ".join(tokens[:budget]), style="green").append(" ..."))
            budget -= len(tokens)
        else:
            below = branch.add(Text(child.symbol))
            todo += [(below, part, level + 1) for part in reversed(child.children)]
    return root


def _frequencies(corpus: Corpus, tokens: np.ndarray) -> Table:
    grammar = corpus.grammar
    observed = np.bincount(tokens.ravel(), minlength=grammar.vocab_size) / tokens.size
    table = Table(box=None, pad_edge=True)
    for column in ("token", "expected", f"in {tokens.size:,} tokens"):
        table.add_column(column, justify="left" if column == "token" else "right")
    for token in np.argsort(-grammar.unigram, kind="stable")[:_N_FREQUENT]:
        table.add_row(Text(grammar.vocabulary[token]), f"{grammar.unigram[token]:.4f}", f"{observed[token]:.4f}")
    return table


def _floors(corpus: Corpus) -> RenderableType:
    if corpus.packed:
        return Text("not defined for packed rows, whose first documents begin before the row")
    floor = corpus.floor(min(_FLOOR_ROWS, max(corpus.n_rows, 2)))
    table = Table(box=None, pad_edge=True)
    for column in ("", "mean", "95 % interval over rows"):
        table.add_column(column)
    for name, words in (
        ("floor", "ideal predictor"),
        ("floor_lower", "lower bound"),
        ("floor_upper", "upper bound"),
    ):
        mean, low, high = (float(floor[f"{name}_mean{end}"]) for end in ("", "_low", "_high"))
        table.add_row(words, f"{mean:.4f}", f"[{low:.4f}, {high:.4f}]")
    table.add_row("method", Text(floor.attrs["method"]))
    return table


def _arms(grammar: DocumentGrammar) -> Table:
    table = Table(box=None, pad_edge=True)
    for column in ("structure", "lexicon", "entropy rate", "ideal loss", "95 %"):
        table.add_column(column)
    for (structure, lexicon), arm in matched_arms(grammar, n_rows=_ARM_ROWS).iterrows():  # type: ignore[misc]
        low, high = arm["entropy_rate_lower"], arm["entropy_rate_upper"]
        rate = f"{low:.4f}" if low == high else f"{low:.4f} to {high:.4f}"
        interval = f"[{arm['floor_low']:.3f}, {arm['floor_high']:.3f}]"
        table.add_row(structure, lexicon, rate, f"{arm['floor']:.4f}", interval)
    return table


def _shared(corpus: Corpus) -> str:
    if corpus.packed:
        return "documents cannot be told apart in packed rows"
    part = corpus.grammar.corpus(
        min(corpus.n_tokens, _COMPARED_TOKENS),
        seed=corpus.seed,
        context=corpus.context,
        split=corpus.split,
        disjoint=corpus.disjoint,
    )
    other = "test" if corpus.split != "test" else "validation"
    try:
        part.require_disjoint(part.held_out(other))
    except CorpusError as error:
        return f"of {part.n_tokens:,} tokens: {error}"
    what = "lexicon" if corpus.fresh_lexicons else "document"
    return f"no {what} of {part.n_tokens:,} tokens is in the {other} split"

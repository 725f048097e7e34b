"""Trees over the tokens of a text: a constituent is a symbol and what it consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from mechhier.specs import shown


@dataclass
class Tree:
    """A constituent: its symbol, and its parts in order, which are constituents or tokens.

    ``str(tree)`` is bracket notation, as NLTK's ``Tree.fromstring`` and most treebank tools read it.

    Example:
        >>> tree = Tree("S", [Tree("A", ["a"]), "b"])
        >>> str(tree), tree.tokens
        ('(S (A a) b)', ['a', 'b'])
    """

    symbol: str
    children: list[Tree | str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.symbol, str):
            raise ValueError(f"the symbol of a tree is text, got {shown(self.symbol)}")
        if not isinstance(self.children, list) or not all(isinstance(part, Tree | str) for part in self.children):
            raise ValueError(f"the children of a tree are a list of trees and tokens, got {shown(self.children)}")

    # Without recursion: a derivation may be deeper than Python's stack.

    def __str__(self) -> str:
        return self._written("({}", " ", " ", str, ")")

    def __repr__(self) -> str:
        return self._written("Tree(symbol={!r}, children=[", "", ", ", repr, "])")

    def _written(self, opening: str, first: str, between: str, leaf: Callable[[str], str], closing: str) -> str:
        written: list[str] = []
        todo: list[tuple[str, Tree | str | None]] = [("", self)]
        while todo:
            before, part = todo.pop()
            written.append(before)
            if isinstance(part, Tree):
                written.append(opening.format(part.symbol))
                parts = [(between if i else first, child) for i, child in enumerate(part.children)]
                todo += [(closing, None), *reversed(parts)]
            elif part is not None:
                written.append(leaf(part))
        return "".join(written)

    @property
    def tokens(self) -> list[str]:
        """Tokens of the constituent, from left to right."""
        return [part for part in self._preorder() if isinstance(part, str)]

    def _preorder(self) -> Iterator[Tree | str]:
        todo: list[Tree | str] = [self]
        while todo:
            part = todo.pop()
            yield part
            if isinstance(part, Tree):
                todo += reversed(part.children)

    def _flat(self) -> list[str | tuple[str, int]]:
        """The tokens, and the symbols with the numbers of their parts, each before its parts."""
        return [(part.symbol, len(part.children)) if isinstance(part, Tree) else part for part in self._preorder()]

    @staticmethod
    def _of_flat(flat: list[str | tuple[str, int]]) -> Tree:
        root = Tree("")
        unfinished = [(root, 1)]
        for part in flat:
            while not unfinished[-1][1]:
                unfinished.pop()
            parent, n_left = unfinished[-1]
            unfinished[-1] = (parent, n_left - 1)
            if isinstance(part, str):
                parent.children.append(part)
            else:
                tree = Tree(part[0])
                parent.children.append(tree)
                unfinished.append((tree, part[1]))
        tree = root.children[0]
        assert isinstance(tree, Tree)
        return tree

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tree):
            return NotImplemented
        return self._flat() == other._flat()

    def __reduce__(self) -> tuple[Any, ...]:
        return Tree._of_flat, (self._flat(),)

    def __copy__(self) -> Tree:
        return Tree(self.symbol, self.children)


def trees_of_row(
    tokens: Sequence[str],
    ancestors: Int[np.ndarray, "position depth"],
    nodes: Int[np.ndarray, "position depth"],
    symbols: Sequence[str],
) -> list[Tree]:
    """Build the trees of a row from each token's ancestors: their symbols and their numbers, root first, -1 as padding.

    A token without ancestors (such as the ``<eos>`` between two strings) belongs to no tree.
    """
    trees: list[Tree] = []
    path: list[Tree] = []
    numbers: list[int] = []
    for token, symbol_ids, node_ids in zip(tokens, ancestors, nodes, strict=True):
        depth = int((node_ids >= 0).sum())
        shared = 0
        while shared < min(depth, len(numbers)) and numbers[shared] == node_ids[shared]:
            shared += 1
        del path[shared:], numbers[shared:]
        for level in range(shared, depth):
            node = Tree(symbols[int(symbol_ids[level])])
            if path:
                path[-1].children.append(node)
            else:
                trees.append(node)
            path.append(node)
            numbers.append(int(node_ids[level]))
        if path:
            path[-1].children.append(token)
    return trees


def node_numbers(
    ancestors: Int[np.ndarray, "row position depth"], shared: Int[np.ndarray, "row position"]
) -> Int[np.ndarray, "row position depth"]:
    """Number the constituents of every row from the number of ancestors that a token shares with the one before it.

    Args:
        ancestors: Symbols of every token's ancestors, root first, padded with -1.
        shared: How many of them are the same constituents as those of the token before; 0 at a row's first token.
    """
    level = np.arange(ancestors.shape[2])
    present = ancestors >= 0
    new = present & (level >= shared[:, :, None])
    count = np.cumsum(new.reshape(len(new), -1), axis=1, dtype=np.int32).reshape(new.shape) - 1
    number = np.where(new, count, np.int32(-1))
    # A constituent that goes on has the number it was given at its first token.
    return np.where(present, np.maximum.accumulate(number, axis=1), np.int32(-1))

"""What every formal language of the package can do: name its tokens, generate text with labels, predict itself."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from mechhier.grammars.trees import Tree, trees_of_row
from mechhier.specs import MOST_CONTEXT, Described, Seed, SpecError, Whole, whole

if TYPE_CHECKING:
    from mechhier.grammars.corpus import Corpus

Split = Literal["train", "validation", "test"]
MIN_CONTEXT = 4
"""Smallest row length: one clause of the document language."""
MOST_TOKENS = 10**15
"""Most tokens of a corpus: more text than there is. Nothing is held but the blocks that are read."""
MOST_WORDS = 10**6
"""Most tokens of a vocabulary: they are listed, and a model has a row for each."""
MOST_BYTES = 2**30
"""Most memory of what a language draws once."""
UNBOUNDED_CONTEXT = 512
"""Row length where documents have no longest and none is given: that of arXiv 2603.06592."""


@dataclass(frozen=True)
class Sample:
    """Rows of text with what the grammar knows about every token.

    Attributes:
        tokens: Token ids, ``Int64[rows, positions]``.
        labels: One integer array of the same shape per label; -1 where the label does not apply. Where trees were
            asked for also ``ancestors`` (ids of :attr:`Grammar.symbols`) and ``nodes`` (numbers of constituents,
            unique in the row), both ``[rows, positions, depth]``, the root first, padded with -1.
    """

    tokens: Int[np.ndarray, "row position"]
    labels: dict[str, Int[np.ndarray, "row position ..."]]

    @classmethod
    def joined(cls, parts: Sequence[Sample]) -> Sample:
        """Return the rows of several samples one after the other; trees are padded to the deepest."""
        labels = {}
        for name in parts[0].labels:
            deepest = max(part.labels[name].shape[2:] for part in parts)
            labels[name] = np.concatenate([_padded(part.labels[name], deepest) for part in parts])
        return cls(np.concatenate([part.tokens for part in parts]), labels)


MakeLabels = Callable[[bool], dict[str, np.ndarray]]
"""With trees or without -> the labels of a text that has been drawn."""


@dataclass(frozen=True)
class IdealLoss:
    """The loss in nats, on every token of a sample, of the ideal predictor, which knows the grammar.

    The loss at position t is -log P(token at t | the tokens before t). Bounds hold in expectation; a single token's
    loss may lie outside.

    Attributes:
        estimate: The ideal predictor's own loss.
        error: Standard error of the estimate; 0 where it is exact, NaN where only the bounds are known. Where few
            samples lie behind it, it is widened (by Student's law) so that 1.96 of it are a 95 % interval.
        mean_error: Standard error, likewise, of the mean of a row's estimate over positions 1 and later: the errors of
            a row's tokens depend on one another.
        lower: A lower bound.
        upper: An upper bound.
        method: How ``estimate`` was computed.
    """

    estimate: Float[np.ndarray, "row position"]
    error: Float[np.ndarray, "row position"]
    mean_error: Float[np.ndarray, " row"]
    lower: Float[np.ndarray, "row position"]
    upper: Float[np.ndarray, "row position"]
    method: str

    @classmethod
    def exact(cls, loss: Float[np.ndarray, "row position"], method: str) -> IdealLoss:
        """Return a loss that is known exactly and so is its own bounds."""
        zero = np.zeros_like(loss)
        return cls(estimate=loss, error=zero, mean_error=zero.sum(axis=1), lower=loss, upper=loss, method=method)


class Grammar(Described, ABC):
    """A formal language: immutable parameters from which vocabulary, text and exact predictions follow.

    Two grammars with equal fields are the same language. What a language draws once (a fixed lexicon, the lexicons of
    a pool, the rows of an n-gram table) comes from ``language_seed``; what a text draws comes from the generator given
    to :meth:`generate`.
    """

    language_seed: Seed = 0
    """Seed of everything that is drawn once for the language."""
    context: Annotated[Whole, Field(ge=MIN_CONTEXT, le=MOST_CONTEXT)] | None = None
    """Tokens per row of a corpus; None: the longest document."""

    def __eq__(self, other: object) -> bool:
        # Fields alone: pydantic would compare what is cached too, and arrays have no single truth value.
        if type(self) is not type(other):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in type(self).model_fields)

    __hash__ = Described.__hash__

    @property
    def is_drawn(self) -> bool:
        """Whether something of the language is drawn once, so that another ``language_seed`` is another language."""
        return False

    # -- tokens ------------------------------------------------------------------------------------------------------

    @cached_property
    def vocabulary(self) -> list[str]:
        """Token strings; a token's id is its index."""
        raise NotImplementedError

    @property
    @abstractmethod
    def categories(self) -> tuple[str, ...]:
        """Names of the syntactic categories; a category's id is its index."""

    @cached_property
    def token_categories(self) -> Int[np.ndarray, " vocab"]:
        """Category id of every token id."""
        raise NotImplementedError

    @cached_property
    def unigram(self) -> Float[np.ndarray, " vocab"]:
        """Probability of every token id at a random place of a random document, EOS included."""
        raise NotImplementedError

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def eos_token_id(self) -> int:
        """Id of ``<eos>``, the last token of the vocabulary."""
        return self.vocab_size - 1

    @property
    def eos_per_document(self) -> int:
        """How many ``<eos>`` a document has; it ends with the last of them."""
        return 1

    @property
    @abstractmethod
    def max_document_length(self) -> int | None:
        """Tokens of the longest possible document, EOS included; None if there is no longest."""

    @property
    def default_context(self) -> int:
        """Tokens per row of a corpus unless told otherwise.

        ``context`` if set, else the length of the longest document, or 512 (the paper's) if there is no longest.
        """
        return self.context or max(MIN_CONTEXT, self.max_document_length or UNBOUNDED_CONTEXT)

    # -- text --------------------------------------------------------------------------------------------------------

    def generate(
        self, n_rows: int, context: int, rng: np.random.Generator, *, packed: bool = False, trees: bool = False
    ) -> Sample:
        """Draw rows of text with a label for every token.

        Args:
            n_rows: Number of rows.
            context: Tokens per row, at least 4.
            rng: Source of all randomness; the language itself is not drawn from it.
            packed: False: every row begins a document; where one ends inside the row the next begins, and the row's
                last document is cut. True: all rows are one stream of documents, cut into rows.
            trees: Whether to return the labels ``ancestors`` and ``nodes`` too, of which :meth:`trees` makes trees.

        Returns:
            Tokens and labels, each ``[n_rows, context]``. The label ``document`` counts from 0 in every row.

        Raises:
            ValueError: ``n_rows`` is below 1 or ``context`` below 4, or trees are asked of a language without any.
        """
        tokens, make_labels = self.draw_rows(n_rows, context, rng, packed=packed)
        return Sample(tokens.astype(np.int64), make_labels(trees))

    def draw_rows(
        self, n_rows: int, context: int, rng: np.random.Generator, *, packed: bool = False
    ) -> tuple[Int[np.ndarray, "row position"], MakeLabels]:
        """Draw the tokens that :meth:`generate` draws, and say how to label them: tokens alone are several times faster."""
        n_rows = whole("n_rows", n_rows, least=1)
        context = whole("context", context, least=MIN_CONTEXT, most=MOST_CONTEXT)
        rows, width = (1, n_rows * context) if packed else (n_rows, context)
        tokens, make_labels = self._generate(rows, width, rng)

        def make_labels_of_rows(trees: bool) -> dict[str, np.ndarray]:
            if trees and not self.symbols:
                raise ValueError(f"a {type(self).__name__} has no trees: its text is not built of constituents")
            labels = {n: label.reshape(n_rows, context, *label.shape[2:]) for n, label in make_labels(trees).items()}
            labels["document"] = labels["document"] - labels["document"][:, :1]
            return labels

        return tokens.reshape(n_rows, context), make_labels_of_rows

    @abstractmethod
    def _generate(self, n_rows: int, context: int, rng: np.random.Generator) -> tuple[np.ndarray, MakeLabels]:
        """Draw rows that each begin a document, and say how to label them."""

    # -- trees -------------------------------------------------------------------------------------------------------

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the constituents in the label ``ancestors``; empty if the language has no trees."""
        return ()

    def trees(self, sample: Sample, row: int) -> list[Tree]:
        """Return the trees of a row's documents, in order; the tree of a document that the row cuts lacks its end.

        Args:
            sample: What :meth:`generate` or :meth:`Corpus.sample` returned with ``trees=True``.
            row: Which row.

        Raises:
            ValueError: The sample was drawn without trees.
        """
        if "nodes" not in sample.labels:
            raise ValueError("the sample has no trees; generate it with trees=True")
        tokens = [self.vocabulary[token] for token in sample.tokens[row]]
        return trees_of_row(tokens, sample.labels["ancestors"][row], sample.labels["nodes"][row], self.symbols)

    def corpus(
        self,
        tokens: int,
        *,
        seed: int = 0,
        context: int | None = None,
        packed: bool = False,
        split: Split = "train",
        disjoint: bool = False,
    ) -> Corpus:
        """Describe a corpus of this language; its blocks are generated when they are read.

        Args:
            tokens: Number of tokens wanted; rounded up to whole rows.
            seed: Seed of the text.
            context: Tokens per row; :attr:`default_context` if None.
            packed: Whether rows are cut from one stream of documents (see :meth:`generate`).
            split: Which of the three independent streams of the seed.
            disjoint: Whether documents are dealt to the splits by a hash of their tokens, so that none is in two of
                them (see :class:`Corpus`).

        Raises:
            ValueError: ``tokens`` is below ``context``, or another value is out of range.
        """
        from mechhier.grammars.corpus import Corpus

        if context is None:
            why = "that is the longest document; give context"
            context = whole("context", self.default_context, least=MIN_CONTEXT, most=MOST_CONTEXT, why=why)
        context = whole("context", context, least=MIN_CONTEXT, most=MOST_CONTEXT)
        tokens = whole("tokens", tokens, least=1, most=MOST_TOKENS)
        if tokens < context:
            raise SpecError(f"tokens is {tokens}, less than one row; a corpus has at least context = {context} tokens")
        n_rows = -(-tokens // context)
        return Corpus(
            grammar=self, seed=seed, context=context, packed=packed, split=split, disjoint=disjoint, n_rows=n_rows
        )

    # -- prediction --------------------------------------------------------------------------------------------------

    @abstractmethod
    def next_token_probabilities(self, tokens: Int[np.ndarray, "row position"]) -> Float[np.ndarray, "row position v"]:
        """Return P(token at t | the tokens before t) of the ideal predictor, which knows the grammar.

        Every row must begin a document (the layout of ``packed=False``).
        """

    @abstractmethod
    def ideal_loss(self, sample: Sample) -> IdealLoss:
        """Return the ideal predictor's loss on every token, exact or estimated between bounds.

        Every row must begin a document (the layout of ``packed=False``).
        """


def _padded(label: np.ndarray, depth: tuple[int, ...]) -> np.ndarray:
    """Pad the depths of a label with -1; a label without depths stays as it is."""
    widths = [(0, 0), (0, 0), *((0, n - m) for n, m in zip(depth, label.shape[2:], strict=True))]
    return np.pad(label, widths, constant_values=-1) if depth else label


def stable_generator(*parts: str | int) -> np.random.Generator:
    """Return a generator that depends on the parts alone: not on the machine, the process or what was drawn before."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest, "big"))))


def zipf(n: int, exponent: float) -> Float[np.ndarray, " n"]:
    """Return the Zipf law over ranks 0..n-1: probability proportional to (rank + 1) ** -exponent."""
    log_weight = -exponent * np.log(np.arange(1, n + 1))
    weight = np.exp(log_weight - log_weight.max())
    return weight / weight.sum()


def read_only(array: np.ndarray) -> np.ndarray:
    """Forbid writing to an array that many callers share, and return it."""
    array.flags.writeable = False
    return array


def check_tokens(tokens: np.ndarray, vocab_size: int) -> Int[np.ndarray, "row position"]:
    """Return tokens as int64 after checking that they are rows of ids of the vocabulary."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers of shape [rows, positions], not {tokens.dtype} {tokens.shape}")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise ValueError(f"token ids must be 0..{vocab_size - 1}; found {tokens.min()}..{tokens.max()}")
    return tokens.astype(np.int64)

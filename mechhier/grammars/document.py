"""The document language: sections of paragraphs of sentences of clauses, over words with a lexicon per document.

The language of arXiv 2603.06592 with every size a parameter. A sentence is, with probability ``p_chain``, a chain of
1..``max_clauses`` (uniform) clauses subject-verb-object joined by uniform connectors; else one clause verb-subject-
object. Every sentence ends with ``<eos>``. A word is drawn as a Zipf rank, and a *lexicon* (one permutation of the
words per category) says which word has that rank. Every clause is four tokens: three words and a terminator, which is
a connector or ``<eos>``.

Its flat counterpart (``hierarchical=False``) is the first-order Markov chain over categories and ranks that has, given
the lexicon, the same frequencies of single tokens and of pairs of neighbours, and no clauses, sentences or paragraphs.
What differs between the two is structure beyond neighbours, and nothing else.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field, field_validator, model_validator
from scipy.special import entr

from mechhier.grammars import document_generator, document_predictor
from mechhier.grammars.base import (
    MOST_BYTES,
    MOST_WORDS,
    Grammar,
    IdealLoss,
    MakeLabels,
    Sample,
    read_only,
    stable_generator,
    zipf,
)
from mechhier.grammars.clauses import CONNECTOR, EOS, OBJECT, SUBJECT, TOKENS_PER_CLAUSE, VERB
from mechhier.specs import Flag, Number, Probability, Size, Whole

Words = Annotated[Size, Field(le=MOST_WORDS)]
Sentences = Annotated[Size, Field(le=10**6)]
"""Parts of a part of a document; a document of a million is longer than any row."""


class DocumentGrammar(Grammar):
    """The document language of arXiv 2603.06592, every size a parameter; :meth:`paper` has the released constants.

    Attributes:
        n_words: Words per category, or (subjects, verbs, objects).
        n_connectors: Number of connectors, drawn uniformly.
        zipf: Exponent of the Zipf law over ranks; 0 is uniform.
        n_sections: Sections in a document.
        n_paragraphs: Paragraphs in a section.
        n_sentences: Sentences in a paragraph.
        max_clauses: Longest chain of clauses in a sentence.
        p_chain: Probability that a sentence is a chain of subject-verb-object clauses.
        lexicon: ``"fixed"``: one lexicon for the language; ``"per_document"``: a fresh one for every document; an
            integer K of at least 2: every document takes one of the language's K lexicons, uniformly. A fresh lexicon
            costs time and memory in proportion to the number of words.
        repetitions: With ``"per_document"``: number of documents of a block that share a lexicon. They are shuffled
            within their block, not across blocks.
        binding: Probability, per clause, that verb and object take the rank of their subject; otherwise the three
            ranks are independent. Frequencies of single words do not depend on it. 0 in the paper. In flat text: the
            probability that a word takes the rank of the word right before it, which gives the same pairs.
        hierarchical: Whether there are clauses, sentences, paragraphs and sections; False: the matched flat language
            (see the module). Its documents end with as many ``<eos>`` and have the same mean length.

    Example:
        >>> grammar = DocumentGrammar(n_words=3, n_connectors=1, lexicon="fixed")
        >>> grammar.vocabulary
        ['s0', 's1', 's2', 'v0', 'v1', 'v2', 'o0', 'o1', 'o2', 'c0', '<eos>']
        >>> sample = grammar.generate(2, 12, np.random.default_rng(0))
        >>> sample.tokens.shape, sorted(sample.labels)[:3]
        ((2, 12), ['category', 'clause', 'document'])
    """

    kind: Literal["document"] = "document"
    n_words: Words | tuple[Words, Words, Words] = 30
    n_connectors: Words = 10
    zipf: Annotated[Number, Field(ge=0)] = 1.0
    n_sections: Sentences = 2
    n_paragraphs: Sentences = 4
    n_sentences: Sentences = 2
    max_clauses: Sentences = 3
    p_chain: Probability = 0.5
    lexicon: Literal["fixed", "per_document"] | Annotated[Whole, Field(ge=2, le=MOST_WORDS)] = "per_document"
    repetitions: Words = 1
    binding: Probability = 0.0
    hierarchical: Flag = True

    @classmethod
    def paper(cls) -> DocumentGrammar:
        """Return the language with the constants of the paper's released generator."""
        return cls(n_words=300, n_connectors=100, zipf=1.0, lexicon="per_document", repetitions=10, context=512)

    @field_validator("n_words")
    @classmethod
    def _equal_sizes_are_one_number(cls, n_words: int | tuple[int, int, int]) -> int | tuple[int, int, int]:
        if isinstance(n_words, tuple) and len(set(n_words)) == 1:
            return n_words[0]
        return n_words

    @model_validator(mode="after")
    def _check(self) -> DocumentGrammar:
        if self.vocab_size > MOST_WORDS:
            raise ValueError(
                f"n_words={self.n_words} in each of three categories and n_connectors={self.n_connectors} are "
                f"{self.vocab_size:,} tokens; at most {MOST_WORDS:,} are accepted"
            )
        if isinstance(self.lexicon, int) and 24 * self.lexicon * max(self.sizes) > MOST_BYTES:
            raise ValueError(
                f"lexicon={self.lexicon} lexicons of n_words={self.n_words} words take "
                f"{24 * self.lexicon * max(self.sizes) / 2**30:,.0f} GiB; at most {MOST_BYTES // 2**30} GiB are accepted"
            )
        if self.binding > 0 and isinstance(self.n_words, tuple):
            raise ValueError(
                f"binding={self.binding} ties the ranks of subject, verb and object, so their numbers must be equal; "
                f"n_words is {self.n_words}: give one number, or binding=0"
            )
        if self.repetitions > 1 and self.lexicon != "per_document":
            raise ValueError(
                f"repetitions={self.repetitions} is the number of documents that share a per-document lexicon; "
                f"lexicon is {self.lexicon!r}: leave repetitions at 1, or set lexicon='per_document'"
            )
        return self

    # -- tokens ------------------------------------------------------------------------------------------------------

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of subjects, verbs and objects."""
        if isinstance(self.n_words, tuple):
            return self.n_words
        return self.n_words, self.n_words, self.n_words

    @property
    def offsets(self) -> tuple[int, int, int, int, int]:
        """First token id of every category: subjects, verbs, objects, connectors, ``<eos>``."""
        n_subjects, n_verbs, n_objects = self.sizes
        first_connector = n_subjects + n_verbs + n_objects
        return 0, n_subjects, n_subjects + n_verbs, first_connector, first_connector + self.n_connectors

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.offsets[EOS] + 1

    @cached_property
    def vocabulary(self) -> list[str]:
        """Token strings ``s0 .. v0 .. o0 .. c0 .. <eos>``; a token's id is its index."""
        counts = (*self.sizes, self.n_connectors)
        return [f"{letter}{i}" for letter, n in zip("svoc", counts, strict=True) for i in range(n)] + ["<eos>"]

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the categories: subject, verb, object, connector, eos."""
        return "subject", "verb", "object", "connector", "eos"

    @cached_property
    def token_categories(self) -> Int[np.ndarray, " vocab"]:
        """Category id of every token id."""
        return read_only(np.repeat(np.arange(5), (*self.sizes, self.n_connectors, 1)))

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the constituents: those of several words, then the categories."""
        several = ("document", "section", "paragraph", "sentence", "clause") if self.hierarchical else ("document",)
        return several + self.categories

    @property
    def sentences_per_document(self) -> int:
        """Sentences in a document, always the same number: how many ``<eos>`` it has."""
        return self.n_sections * self.n_paragraphs * self.n_sentences

    @property
    def eos_per_document(self) -> int:
        """How many ``<eos>`` a document has: one a sentence."""
        return self.sentences_per_document

    @property
    def max_document_length(self) -> int:
        """Tokens of a document of which every sentence has ``max_clauses`` clauses (flat text can be longer)."""
        return self.sentences_per_document * self.max_clauses * TOKENS_PER_CLAUSE

    # -- frequencies and entropy -------------------------------------------------------------------------------------

    @cached_property
    def rank_probabilities(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Zipf law over the ranks of subjects, verbs and objects: three arrays, one per category."""
        subject, verb, object_ = (read_only(zipf(n, self.zipf)) for n in self.sizes)
        return subject, verb, object_

    @property
    def mean_clauses(self) -> float:
        """Expected number of clauses of a sentence."""
        return self.p_chain * (1 + self.max_clauses) / 2 + 1 - self.p_chain

    @cached_property
    def category_transitions(self) -> Float[np.ndarray, "category next_category"]:
        """P(category of a token | category of the token before it); a document begins as after ``<eos>``.

        The same for hierarchical and flat text.
        """
        p, clauses = self.p_chain, (1 + self.max_clauses) / 2  # of a chain
        pairs = np.zeros((5, 5))  # expected numbers in a sentence
        pairs[EOS, [SUBJECT, VERB]] = p, 1 - p
        pairs[SUBJECT, [VERB, OBJECT]] = p * clauses, 1 - p
        pairs[VERB, [OBJECT, SUBJECT]] = p * clauses, 1 - p
        pairs[OBJECT, [CONNECTOR, EOS]] = p * (clauses - 1), 1
        pairs[CONNECTOR, SUBJECT] = 1
        return read_only(pairs / pairs.sum(axis=1, keepdims=True))

    @cached_property
    def category_frequencies(self) -> Float[np.ndarray, " category"]:
        """Probability of every category at a random place of a random document; the same for both kinds of text."""
        terminators = 0.25 / self.mean_clauses
        return read_only(np.array([0.25, 0.25, 0.25, 0.25 - terminators, terminators]))

    @cached_property
    def unigram(self) -> Float[np.ndarray, " vocab"]:
        """Probability of every token id at a random place of a random document, in closed form.

        With a fixed lexicon or a pool: of this language's lexicons; with per-document lexicons: over all lexicons.
        """
        n_tokens = np.array([*self.sizes, self.n_connectors, 1])
        frequency = (self.category_frequencies / n_tokens)[self.token_categories]
        if self.lexicon != "per_document":
            frequency[: self.offsets[CONNECTOR]] = 0.25 * self.word_probabilities.mean(axis=0)
        return read_only(frequency)

    def entropy_rate_bounds(self) -> tuple[float, float]:
        """Bound the entropy rate of whole documents, in nats per token, in closed form.

        Returns:
            ``(lower, upper)``. Lower: the lexicon is known. Upper: with a fixed lexicon the same number; with a pool
            of K, ln(K) more per document, or what per-document lexicons have if that is less; with per-document
            lexicons no inference in context, so that every word of a category is equally likely.
        """
        structure = self._structure_entropy()
        known = structure + self._rank_entropy()
        if self.lexicon == "fixed":
            return known, known
        uniform = structure + 0.25 * float(np.log(self.sizes).sum())
        if self.lexicon == "per_document":
            return known, uniform
        mean_length = TOKENS_PER_CLAUSE * self.mean_clauses * self.sentences_per_document
        return known, min(uniform, known + float(np.log(self.lexicon)) / mean_length)

    def _structure_entropy(self) -> float:
        """Entropy in nats per token of the categories and of the choice of connectors."""
        p, m = self.p_chain, self.mean_clauses
        if self.hierarchical:
            sentence = entr(p) + entr(1 - p) + p * np.log(self.max_clauses)
            return float((sentence + (m - 1) * np.log(self.n_connectors)) / (TOKENS_PER_CLAUSE * m))
        transitions = self.category_frequencies @ entr(self.category_transitions).sum(axis=1)
        return float(transitions + self.category_frequencies[CONNECTOR] * np.log(self.n_connectors))

    def _rank_entropy(self) -> float:
        """Entropy in nats per token of the ranks, given the categories and the ranks before."""
        if self.hierarchical:
            return self._clause_entropy() / TOKENS_PER_CLAUSE
        if self.binding == 0:
            return 0.25 * sum(float(entr(law).sum()) for law in self.rank_probabilities)
        law = self.rank_probabilities[0]
        pairs = self.category_frequencies[:CONNECTOR] @ self.category_transitions[:CONNECTOR, :CONNECTOR]
        tied = float(pairs.sum())  # how often a token is a word right after a word
        given_neighbour = law @ _mixture_entropy(law, np.full(len(law), self.binding))
        return float((0.75 - tied) * entr(law).sum() + tied * given_neighbour)

    def _clause_entropy(self) -> float:
        """Entropy in nats of the three ranks of a clause: H(first) + H(second | first) + H(third | first, second)."""
        first, second, third = self.rank_probabilities
        if self.binding == 0:
            return float(entr(first).sum() + entr(second).sum() + entr(third).sum())
        law, bound = first, np.full(len(first), self.binding)
        agree = self.binding + (1 - self.binding) * law
        given_first = law @ _mixture_entropy(law, bound)
        p_agree = law @ agree
        given_both = (law * agree) @ _mixture_entropy(law, self.binding / agree) + (1 - p_agree) * entr(law).sum()
        return float(entr(law).sum() + given_first + given_both)

    # -- lexicons ----------------------------------------------------------------------------------------------------

    @property
    def is_drawn(self) -> bool:
        """Whether the language has lexicons of its own; with fresh ones for every document it has none."""
        return self.lexicon != "per_document"

    @cached_property
    def lexicons(self) -> Int[np.ndarray, "lexicon category rank"]:
        """Token id of every rank in every lexicon of the language, ``[K, 3, largest category]``.

        K is 1 with a fixed lexicon. Entries beyond a category's size are -1. A function of ``language_seed`` and the
        sizes alone; the first lexicons of a larger pool are those of a smaller.

        Raises:
            ValueError: The lexicons are drawn per document.
        """
        if self.lexicon == "per_document":
            raise ValueError("with lexicon='per_document' a language has no lexicons; draw_lexicons(n, rng) draws some")
        rng = stable_generator("lexicons", self.language_seed)
        n = 1 if self.lexicon == "fixed" else self.lexicon
        return read_only(np.concatenate([self.draw_lexicons(1, rng) for _ in range(n)]))

    def draw_lexicons(self, n: int, rng: np.random.Generator) -> Int[np.ndarray, "lexicon category rank"]:
        """Draw ``n`` lexicons: token id of every rank, ``[n, 3, largest category]``, -1 beyond a category's size."""
        lexicons = np.full((n, 3, max(self.sizes)), -1, dtype=np.int64)
        for category, (start, size) in enumerate(zip(self.offsets, self.sizes, strict=False)):
            words = np.tile(np.arange(start, start + size), (n, 1))
            lexicons[:, category, :size] = rng.permuted(words, axis=1)
        return lexicons

    @cached_property
    def word_ranks(self) -> Int[np.ndarray, "lexicon word"]:
        """Rank of every word (token ids below the first connector) in every lexicon of a fixed lexicon or a pool."""
        n_lexicons, n_words = len(self.lexicons), self.offsets[CONNECTOR]
        ranks = np.empty((n_lexicons, n_words), dtype=np.int64)
        for category, size in enumerate(self.sizes):
            np.put_along_axis(ranks, self.lexicons[:, category, :size], np.arange(size)[None], axis=1)
        return read_only(ranks)

    @cached_property
    def word_probabilities(self) -> Float[np.ndarray, "lexicon word"]:
        """Probability of every word within its category, in every lexicon of a fixed lexicon or a pool."""
        starts = self.offsets
        columns = [self.word_ranks[:, starts[c] : starts[c + 1]] for c in (SUBJECT, VERB, OBJECT)]
        laws = zip(self.rank_probabilities, columns, strict=True)
        return read_only(np.concatenate([law[ranks] for law, ranks in laws], axis=1))

    # -- text --------------------------------------------------------------------------------------------------------

    def _generate(self, n_rows: int, context: int, rng: np.random.Generator) -> tuple[np.ndarray, MakeLabels]:
        return document_generator.generate(self, n_rows, context, rng)

    # -- prediction --------------------------------------------------------------------------------------------------

    def next_token_probabilities(self, tokens: Int[np.ndarray, "row position"]) -> Float[np.ndarray, "row position v"]:
        """Return P(token at t | the tokens before t), exactly: a Bayesian mixture over lexicons.

        The posterior over the lexicons starts at every document from what the language says of them (uniform over its
        lexicons; with per-document lexicons, over all permutations) and is updated token by token. Every row must
        begin a document (the layout of ``packed=False``); rows may end anywhere.

        Args:
            tokens: Token ids, ``[rows, positions]``.

        Returns:
            Probabilities ``[rows, positions, vocab]``. Memory: rows x positions x (2 vocab + 6 K) float64 for K
            lexicons; give the rows in portions. With per-document lexicons a row takes about seven times as long as
            in :meth:`ideal_loss`.

        Raises:
            ValueError: A row is not text of this language; or the lexicons are drawn per document and there is no
                exact sum over them: words are bound to one another, or the documents are too long.
        """
        return document_predictor.next_token_probabilities(self, tokens)

    def ideal_loss(self, sample: Sample) -> IdealLoss:
        """Return the ideal predictor's loss on every token, in nats, between a lower and an upper bound.

        With a fixed lexicon or a pool it is the loss of the exact mixture and its own bounds. With per-document
        lexicons it is exact where ``binding`` is 0 (or 1, in hierarchical text) and the documents are not too long, and
        where there are up to four words per category and rows of up to 300 tokens. Else it is the estimate of particle
        filters (see :mod:`mechhier.grammars.lexicon_filter`), with its error. The lower bound knows the document's
        lexicon, and the upper infers nothing from the context, so that every word of a category is equally likely.
        Bounds hold in expectation; a single token's loss may lie outside.

        The predictor forgets a lexicon at the end of its document. With ``repetitions`` above 1 other documents of
        the row may share it; they are shuffled over a block of about 2^18 tokens, so that this is seldom, and the
        estimate is, by that little, an upper bound.

        Args:
            sample: Tokens and labels as :meth:`generate` returns them with ``packed=False``; ``[rows, positions]``.

        Returns:
            Losses ``[rows, positions]``. Memory: rows x positions x 6 K float64 for K lexicons.

        Raises:
            ValueError: A row does not begin a document, or is not text of this language.
        """
        if any(np.any(sample.labels[name][:, 0] != 0) for name in ("sentence", "clause") if name in sample.labels):
            raise ValueError(
                "every row must begin a document to be predicted exactly; generate with packed=False, "
                "or use entropy_rate_bounds() for packed text"
            )
        return document_predictor.ideal_loss(self, sample)


def _mixture_entropy(law: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Entropy in nats of weight[j] * (point mass on j) + (1 - weight[j]) * law, for every j."""
    rest = 1 - weight
    all_of_law = entr(rest) + rest * entr(law).sum()
    return all_of_law - entr(rest * law) + entr(weight + rest * law)

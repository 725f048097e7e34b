"""The document language: sections of paragraphs of sentences of clauses, over words with a lexicon per document.

The language of arXiv 2603.06592 with every size a parameter. A sentence is, with probability ``p_chain``, a chain of
1..``max_clauses`` (uniform) clauses subject-verb-object joined by uniform connectors; else one clause verb-subject-
object. Every sentence ends with ``<eos>``. A word is drawn as a Zipf rank, and a *lexicon* (one permutation of the
words per category) says which word has that rank.

Every clause is four tokens: three words and a terminator, which is a connector or ``<eos>``. A text is therefore an
array of clauses, and everything here works on such arrays.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field, field_validator, model_validator
from scipy.special import entr

from mechhier.grammars import document_generator, document_predictor
from mechhier.grammars.base import Grammar, Sample, read_only, stable_generator, zipf
from mechhier.grammars.clauses import CONNECTOR, EOS, OBJECT, SUBJECT, TOKENS_PER_CLAUSE, VERB

Size = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


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
            ranks are independent. Frequencies of single words do not depend on it. 0 in the paper.

    Example:
        >>> grammar = DocumentGrammar(n_words=3, n_connectors=1, lexicon="fixed")
        >>> grammar.vocabulary
        ['s0', 's1', 's2', 'v0', 'v1', 'v2', 'o0', 'o1', 'o2', 'c0', '<eos>']
        >>> sample = grammar.generate(2, 12, np.random.default_rng(0))
        >>> sample.tokens.shape, sorted(sample.labels)[:3]
        ((2, 12), ['category', 'clause', 'document'])
    """

    kind: Literal["document"] = "document"
    n_words: Size | tuple[Size, Size, Size] = 30
    n_connectors: Size = 10
    zipf: Annotated[float, Field(ge=0)] = 1.0
    n_sections: Size = 2
    n_paragraphs: Size = 4
    n_sentences: Size = 2
    max_clauses: Size = 3
    p_chain: Probability = 0.5
    lexicon: Literal["fixed", "per_document"] | Annotated[int, Field(ge=2)] = "per_document"
    repetitions: Size = 1
    binding: Probability = 0.0

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
    def sentences_per_document(self) -> int:
        """Sentences in a document, always the same number."""
        return self.n_sections * self.n_paragraphs * self.n_sentences

    @property
    def max_document_length(self) -> int:
        """Tokens of a document of which every sentence has ``max_clauses`` clauses."""
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
    def unigram(self) -> Float[np.ndarray, " vocab"]:
        """Probability of every token id at a random place of a random document, in closed form.

        With a fixed lexicon or a pool: of this language's lexicons; with per-document lexicons: over all lexicons.
        """
        frequency = np.empty(self.vocab_size)
        if self.lexicon == "per_document":
            for category, (start, n) in enumerate(zip(self.offsets, self.sizes, strict=False)):
                frequency[start : self.offsets[category + 1]] = 0.25 / n
        else:
            frequency[: self.offsets[CONNECTOR]] = 0.25 * self.word_probabilities.mean(axis=0)
        terminators = 0.25 / self.mean_clauses
        frequency[self.offsets[CONNECTOR] : self.offsets[EOS]] = (0.25 - terminators) / self.n_connectors
        frequency[self.offsets[EOS]] = terminators
        return read_only(frequency)

    def entropy_rate_bounds(self) -> tuple[float, float]:
        """Bound the entropy rate of whole documents, in nats per token, in closed form.

        Returns:
            ``(lower, upper)``. Lower: the lexicon is known. Upper: with a fixed lexicon the same number; with a pool
            of K, ln(K) more per document, or what per-document lexicons have if that is less; with per-document
            lexicons no inference in context, so that every word of a category is equally likely.
        """
        p, m = self.p_chain, self.mean_clauses
        structure = float(entr(p) + entr(1 - p)) + p * np.log(self.max_clauses) + (m - 1) * np.log(self.n_connectors)
        tokens = TOKENS_PER_CLAUSE * m
        lower = float((structure + m * self._clause_entropy()) / tokens)
        uniform = float((structure + m * np.log(self.sizes).sum()) / tokens)
        if self.lexicon == "fixed":
            return lower, lower
        if self.lexicon == "per_document":
            return lower, uniform
        return lower, min(uniform, lower + float(np.log(self.lexicon)) / (tokens * self.sentences_per_document))

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

    def _generate(self, n_rows: int, context: int, rng: np.random.Generator) -> Sample:
        return document_generator.generate(self, n_rows, context, rng)

    # -- prediction --------------------------------------------------------------------------------------------------

    def next_token_probabilities(self, tokens: Int[np.ndarray, "row position"]) -> Float[np.ndarray, "row position v"]:
        """Return P(token at t | the tokens before t), exactly: a Bayesian mixture over the language's lexicons.

        The posterior over the lexicons starts uniform at every document and is updated token by token. Every row must
        begin a document (the layout of ``packed=False``); rows may end anywhere.

        Args:
            tokens: Token ids, ``[rows, positions]``.

        Returns:
            Probabilities ``[rows, positions, vocab]``. Memory: rows x positions x (vocab + 4 K) float64 for K
            lexicons; give the rows in portions.

        Raises:
            ValueError: The lexicons are drawn per document (there is no tractable exact predictor:
                :meth:`floor_bounds` brackets its loss), or a row is not text of this language.
        """
        self._refuse_per_document()
        return document_predictor.next_token_probabilities(self, tokens)

    def floor_bounds(
        self, sample: Sample
    ) -> tuple[Float[np.ndarray, "row position"], Float[np.ndarray, "row position"]]:
        """Return a lower and an upper bound of the ideal predictor's loss on every token, in nats.

        With a fixed lexicon or a pool both are the loss of the exact predictor. With per-document lexicons the lower
        bound knows the document's lexicon, and the upper infers nothing from the context: every word of a category is
        equally likely. (Both hold for the expected loss; a single token's loss may lie outside.)

        Args:
            sample: Tokens and labels as :meth:`generate` returns them with ``packed=False``; ``[rows, positions]``.

        Returns:
            ``(lower, upper)``, each ``[rows, positions]``. Memory: rows x positions x 4 K float64 for K lexicons.

        Raises:
            ValueError: A row does not begin a document, or is not text of this language.
        """
        if any(np.any(sample.labels[name][:, 0] != 0) for name in ("sentence", "clause")):
            raise ValueError(
                "every row must begin a document to be predicted exactly; generate with packed=False, "
                "or use entropy_rate_bounds() for packed text"
            )
        if self.lexicon == "per_document":
            return document_predictor.bounds_per_document(self, sample)
        loss = document_predictor.losses(self, sample.tokens)
        return loss, loss

    def _refuse_per_document(self) -> None:
        if self.lexicon == "per_document":
            raise ValueError(
                "lexicon='per_document' has no tractable exact predictor (it would sum over all permutations of the "
                "words); floor_bounds(sample) or corpus.floor() bracket its loss"
            )


def _mixture_entropy(law: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Entropy in nats of weight[j] * (point mass on j) + (1 - weight[j]) * law, for every j."""
    rest = 1 - weight
    all_of_law = entr(rest) + rest * entr(law).sum()
    return all_of_law - entr(rest * law) + entr(weight + rest * law)

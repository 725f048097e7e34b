"""The n-gram model of a corpus: a control text with the corpus's local statistics and nothing beyond them.

With P_0 uniform over the vocabulary, the law of the next token w after the last k - 1 tokens h is, by interpolated
Witten-Bell smoothing (Witten & Bell 1991; Chen & Goodman 1999),

    P_k(w | h) = (c(hw) + T(h) P_{k-1}(w | h')) / (c(h) + T(h)),

where c(hw) is how often w follows h in the corpus, c(h) the sum of that over w, T(h) the number of different tokens that
follow h, and h' is h without its first token. Where h does not occur, P_k = P_{k-1}. Every token is possible everywhere.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int8, Int32, Int64
from pydantic import Field, field_serializer, field_validator, model_validator

from mechhier.grammars.base import Grammar, IdealLoss, MakeLabels, Sample, check_tokens, read_only
from mechhier.grammars.ngram import places_in_documents
from mechhier.grammars.sampling import compiled
from mechhier.specs import Size

if TYPE_CHECKING:
    from mechhier.grammars.corpus import Corpus

_LARGEST_CODE = 2**63  # codes of n-grams are int64


class _Counts(NamedTuple):
    """Counts of the n-grams of every length up to the order, grouped by their history; shortest histories first.

    The histories and n-grams are numbered. History 0 is the empty one; the last one is what a row begins with.
    """

    first: Int64[np.ndarray, " history_and_one"]  # the first n-gram with this history
    shorter: Int64[np.ndarray, " history"]  # the history without its first token; -1 for the empty one
    depth: Int8[np.ndarray, " history"]  # length of the n-grams with this history
    token: Int32[np.ndarray, " ngram"]  # last token of the n-gram, rising within a history
    before: Int64[np.ndarray, " ngram_and_one"]  # sum of the counts of the n-grams before this one
    then: Int64[np.ndarray, " ngram"]  # the longest history that the n-gram ends with


class FittedNGram(Grammar):
    """An n-gram model with the counts of a corpus, made by :meth:`NGram.fit`.

    A row begins as the corpus's rows begin. Histories run on across ``<eos>`` within a row. Only the description of the
    corpus is stored; where the counts are needed and absent, in another process, the corpus is generated and counted
    again. They take 20 to 37 bytes for every different n-gram of every length up to ``order``.

    Attributes:
        source: The corpus, as :attr:`Corpus.description` describes it.
        order: Tokens of the longest n-grams; the next token depends on the ``order - 1`` before it.

    Example:
        >>> from mechhier.grammars import DocumentGrammar, NGram
        >>> corpus = DocumentGrammar(n_words=5, lexicon=2).corpus(tokens=10_000, context=48)
        >>> control = NGram.fit(corpus, order=2).corpus(tokens=10_000)
        >>> control.context, control.grammar.vocab_size
        (48, 26)
    """

    kind: Literal["fitted_ngram"] = "fitted_ngram"
    source: dict[str, Any]
    order: Annotated[Size, Field(le=64)]

    @classmethod
    def fit(cls, corpus: Corpus, order: int) -> FittedNGram:
        """Return the model of a corpus, counted from the rows given; see :meth:`NGram.fit`."""
        grammar = cls(source=corpus.description, order=order)
        vars(grammar)["_counts"] = _count(corpus, order)  # what the cached property would count from the description
        return grammar

    @field_validator("source")
    @classmethod
    def _complete(cls, source: dict[str, Any]) -> dict[str, Any]:
        return _corpus(source).description

    @model_validator(mode="after")
    def _check_order(self) -> FittedNGram:
        if self.order > self.source["context"]:
            raise ValueError(
                f"order is {self.order}, but the rows of the corpus have {self.source['context']} tokens; an n-gram must "
                "lie within a row"
            )
        radix = self.vocab_size + 1
        if radix**self.order > _LARGEST_CODE:
            largest = next(k for k in range(self.order, 0, -1) if radix**k <= _LARGEST_CODE)
            raise ValueError(
                f"order is {self.order}; with {self.vocab_size} token ids n-grams of at most {largest} tokens can be "
                "counted"
            )
        return self

    @field_serializer("source")
    def _brief(self, source: dict[str, Any], info: Any) -> dict[str, Any]:
        # info is a SerializationInfo, a protocol that cannot be checked at run time.
        if not info.exclude_defaults:
            return source
        from mechhier.grammars.corpus import CorpusSpec

        # As of every grammar, what is left without the defaults stays the same when a later version adds a field.
        brief = CorpusSpec.model_validate(source).model_dump(mode="json", exclude_defaults=True)
        return brief | {"grammar": {"kind": source["grammar"]["kind"]} | brief["grammar"]}

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @cached_property
    def _source(self) -> Corpus:
        return _corpus(self.source)

    # -- tokens ------------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._source.grammar.vocab_size

    @cached_property
    def vocabulary(self) -> list[str]:
        """Token strings of the corpus's language; a token's id is its index."""
        return self._source.grammar.vocabulary

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the categories of the corpus's language."""
        return self._source.grammar.categories

    @cached_property
    def token_categories(self) -> Int[np.ndarray, " vocab"]:
        """Category id of every token id."""
        return self._source.grammar.token_categories

    @cached_property
    def unigram(self) -> Float[np.ndarray, " vocab"]:
        """P_1 of the module's formula: the frequency of every token id in the corpus, no token's quite 0."""
        counts, n_different = self._counts, self._counts.first[1]
        frequency = np.full(self.vocab_size, n_different / self.vocab_size)
        frequency[counts.token[:n_different]] += np.diff(counts.before[: n_different + 1])
        return read_only(frequency / frequency.sum())

    @property
    def max_document_length(self) -> None:
        """None: whatever the corpus's language, nothing here bounds a document."""
        return None

    @property
    def default_context(self) -> int:
        """Tokens per row of a corpus unless told otherwise: ``context`` if set, else as in the corpus."""
        return self.context if self.context is not None else self._source.context

    @cached_property
    def _counts(self) -> _Counts:
        return _count(self._source, self.order)

    # -- text --------------------------------------------------------------------------------------------------------

    def _generate(self, n_rows: int, context: int, rng: np.random.Generator) -> tuple[np.ndarray, MakeLabels]:
        tokens = np.empty((n_rows, context), dtype=np.int32)
        order = np.empty((n_rows, context), dtype=np.int8)  # 3^order is at most 2^63
        _write(rng, self._counts, self.vocab_size, tokens, order)

        def make_labels(trees: bool) -> dict[str, np.ndarray]:
            document, position = places_in_documents(tokens == self.eos_token_id)
            return {
                "category": self.token_categories[tokens],
                "order": order.astype(np.int64),
                "document": document,
                "position": position,
            }

        return tokens, make_labels

    # -- prediction --------------------------------------------------------------------------------------------------

    def next_token_probabilities(self, tokens: Int[np.ndarray, "row position"]) -> Float[np.ndarray, "row position v"]:
        """Return P(token at t | the tokens before t), exactly: the interpolated law of the module's formula.

        Every row must begin as generated rows begin (the layout of ``packed=False``); any tokens may follow.

        Args:
            tokens: Token ids, ``[rows, positions]``.

        Returns:
            Probabilities ``[rows, positions, vocab]``, all positive. Memory: rows x positions x vocab float64; give the
            rows in portions.

        Raises:
            ValueError: Not token ids of this language.
        """
        tokens = check_tokens(tokens, self.vocab_size)
        result = np.empty((*tokens.shape, self.vocab_size))
        _predict(self._counts, tokens, result)
        return result

    def ideal_loss(self, sample: Sample) -> IdealLoss:
        """Return the loss of the exact predictor, which is the model itself, on every token, in nats.

        Args:
            sample: Tokens and labels as :meth:`generate` returns them with ``packed=False``; ``[rows, positions]``.

        Raises:
            ValueError: A row does not begin as generated rows begin.
        """
        if np.any(sample.labels["position"][:, 0] != 0):
            raise ValueError("every row must begin a text to be predicted exactly; generate with packed=False")
        tokens = check_tokens(sample.tokens, self.vocab_size)
        probability = np.empty(tokens.shape)
        _score(self._counts, self.vocab_size, tokens, probability)
        return IdealLoss.exact(-np.log(probability), "exact: the law of the n-gram model itself")


def _corpus(description: dict[str, Any]) -> Corpus:
    from mechhier.grammars.corpus import Corpus  # late: it imports all grammars

    return Corpus.from_description(description)


# -- counting --------------------------------------------------------------------------------------------------------
# An n-gram's code is the number whose digits are its tokens, to a base (radix) one more than the number of token ids. The
# digit radix - 1 stands for the places before a row's first token. A history of k - 1 tokens has a code in the same way.


def _count(corpus: Corpus, order: int) -> _Counts:
    """Count a corpus block by block; memory is in proportion to the number of different n-grams."""
    radix = corpus.grammar.vocab_size + 1
    # Sorted runs, each more than twice as large as the next: an n-gram is merged few times, and is held about twice.
    runs: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, corpus.n_rows, corpus.rows_per_block):
        rows = corpus.rows(start, min(start + corpus.rows_per_block, corpus.n_rows))
        runs.append(np.unique(_codes(rows, order, radix), return_counts=True))
        while len(runs) > 1 and len(runs[-2][0]) <= 2 * len(runs[-1][0]):
            runs.append(_merged([runs.pop(), runs.pop()]))
    levels = [_merged(runs)]
    for k in range(order - 1, 0, -1):
        # Every token of the corpus is the last of one n-gram of each length: shorter ones are the ends of longer ones.
        codes, counts = levels[-1]
        levels.append(_merged([(codes % radix**k, counts)]))
    return _linked(levels[::-1], radix)


def _linked(levels: list[tuple[np.ndarray, np.ndarray]], radix: int) -> _Counts:
    """Number histories and n-grams, given codes and counts of those of length 1, 2 .. order."""
    histories = [np.unique(codes // radix, return_index=True) for codes, _ in levels]
    n_histories = np.cumsum([0] + [len(codes) for codes, _ in histories])  # shorter than those of a level
    n_ngrams = np.cumsum([0] + [len(codes) for codes, _ in levels])
    first, shorter, then = [], [np.array([-1])], []
    for level, (codes, _) in enumerate(levels):
        history, first_of_history = histories[level]
        first.append(first_of_history + n_ngrams[level])
        if level == 0:
            longest = np.zeros(len(codes), dtype=np.int64)
        else:
            ends = np.searchsorted(histories[level - 1][0], history % radix ** (level - 1))
            shorter.append(ends + n_histories[level - 1])
            longest = then[-1][np.searchsorted(levels[level - 1][0], codes % radix**level)]
        if level + 1 < len(levels):  # the whole n-gram is a history, unless it stands at the ends of rows alone
            longer, _ = histories[level + 1]
            place = np.minimum(np.searchsorted(longer, codes), len(longer) - 1)
            longest = np.where(longer[place] == codes, place + n_histories[level + 1], longest)
        then.append(longest)
    return _Counts(
        first=np.append(np.concatenate(first), n_ngrams[-1]),
        shorter=np.concatenate(shorter),
        depth=np.repeat(np.arange(1, len(levels) + 1, dtype=np.int8), np.diff(n_histories)),
        token=np.concatenate([(codes % radix).astype(np.int32) for codes, _ in levels]),
        before=np.append(0, np.cumsum(np.concatenate([counts for _, counts in levels]))),
        then=np.concatenate(then),
    )


def _codes(rows: Int64[np.ndarray, "row position"], order: int, radix: int) -> Int64[np.ndarray, "row position"]:
    """Return the code of the n-gram that ends at every token."""
    n_positions = rows.shape[1]
    padded = np.pad(rows, ((0, 0), (order - 1, 0)), constant_values=radix - 1)
    codes = np.zeros_like(rows)
    for i in range(order):
        codes = codes * radix + padded[:, i : i + n_positions]
    return codes


def _merged(runs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return codes, sorted, and counts; those of equal codes are added up."""
    codes, counts = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    rising = np.argsort(codes, kind="stable")  # fast where runs are sorted
    codes, counts = codes[rising], counts[rising]
    starts = np.flatnonzero(np.append(True, codes[1:] != codes[:-1]))
    return codes[starts], np.add.reduceat(counts, starts)


# -- compiled loops --------------------------------------------------------------------------------------------------
# The law of the next token is a mixture: with the longest history that occurs, of its counts with weight c / (c + T), and
# of the law with the history one shorter with the rest; after the empty history, of the uniform law.


@compiled
def _find(token: np.ndarray, low: int, high: int, value: int) -> int:
    """Return which of the n-grams ``low`` to ``high`` of one history ends with a token; -1 if none does."""
    end = high
    while low < high:
        middle = (low + high) // 2
        if token[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low if low < end and token[low] == value else -1


@compiled
def _follow(history: int, value: int, counts: _Counts) -> int:
    """Return the longest history that occurs after one more token."""
    while history >= 0:
        ngram = _find(counts.token, counts.first[history], counts.first[history + 1], value)
        if ngram >= 0:
            return counts.then[ngram]
        history = counts.shorter[history]
    return 0


@compiled
def _write(
    rng: np.random.Generator,
    counts: _Counts,
    vocab_size: int,
    tokens: np.ndarray,
    order: np.ndarray,
) -> None:
    """Draw rows, and the length of the n-gram that every token was drawn from (0: from the uniform law)."""
    for row in range(len(tokens)):
        longest = len(counts.shorter) - 1
        for t in range(tokens.shape[1]):
            history, ngram = longest, -1
            while history >= 0:
                low, high = counts.first[history], counts.first[history + 1]
                count = counts.before[high] - counts.before[low]
                u = rng.random() * (count + high - low)
                if u < count:
                    place = counts.before[low] + int(u)
                    while high - low > 1:
                        middle = (low + high) // 2
                        if counts.before[middle] <= place:
                            low = middle
                        else:
                            high = middle
                    ngram = low
                    break
                history = counts.shorter[history]
            if ngram >= 0:
                tokens[row, t], order[row, t] = counts.token[ngram], counts.depth[history]
            else:
                tokens[row, t], order[row, t] = int(rng.random() * vocab_size), 0
            longest = _follow(longest, tokens[row, t], counts) if history < longest else counts.then[ngram]


@compiled
def _predict(
    counts: _Counts,
    tokens: np.ndarray,
    probabilities: np.ndarray,
) -> None:
    """Write the law of every token given those before it in its row."""
    for row in range(len(tokens)):
        longest = len(counts.shorter) - 1
        for t in range(tokens.shape[1]):
            law, weight, history = probabilities[row, t], 1.0, longest
            law[:] = 0.0
            while history >= 0:
                low, high = counts.first[history], counts.first[history + 1]
                share = weight / (counts.before[high] - counts.before[low] + high - low)
                for ngram in range(low, high):
                    law[counts.token[ngram]] += share * (counts.before[ngram + 1] - counts.before[ngram])
                weight = share * (high - low)
                history = counts.shorter[history]
            law += weight / len(law)
            longest = _follow(longest, tokens[row, t], counts)


@compiled
def _score(
    counts: _Counts,
    vocab_size: int,
    tokens: np.ndarray,
    probability: np.ndarray,
) -> None:
    """Write the probability of every token given those before it in its row."""
    for row in range(len(tokens)):
        longest = len(counts.shorter) - 1
        for t in range(tokens.shape[1]):
            p, weight, history = 0.0, 1.0, longest
            while history >= 0:
                low, high = counts.first[history], counts.first[history + 1]
                share = weight / (counts.before[high] - counts.before[low] + high - low)
                ngram = _find(counts.token, low, high, tokens[row, t])
                if ngram >= 0:
                    p += share * (counts.before[ngram + 1] - counts.before[ngram])
                weight = share * (high - low)
                history = counts.shorter[history]
            probability[row, t] = p + weight / vocab_size
            longest = _follow(longest, tokens[row, t], counts)

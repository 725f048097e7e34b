"""The n-gram language: local statistics of mixed order, no hierarchy and nothing latent that lasts a document.

The language of arXiv 2603.06592. To draw the next token, draw an order, hash the last that many tokens of the document
(of however many there are; none at its beginning) to a row of a table, and draw from that row. A row is a Zipf law over
the same token order as every other row, with its own exponent.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator, model_validator

from mechhier.grammars.base import (
    MOST_BYTES,
    MOST_WORDS,
    Grammar,
    IdealLoss,
    MakeLabels,
    Sample,
    check_tokens,
    read_only,
    stable_generator,
    zipf,
)
from mechhier.grammars.sampling import alias_table, compiled, draw
from mechhier.specs import Number, Size, Whole, shown

if TYPE_CHECKING:
    from mechhier.grammars.corpus import Corpus
    from mechhier.grammars.fitted_ngram import FittedNGram

_TOKEN, _EOS = range(2)
_BASE = np.uint64(6364136223846793005)  # the multiplier of Knuth's MMIX generator: odd, with well spread bits
_INVERSE_BASE = np.uint64(pow(int(_BASE), -1, 2**64))
_SCANNED = 8  # entries of a cumulative law that are tried one by one: a cache line
_UNIGRAM_TOKENS = 2**19

Tokens = Annotated[Size, Field(le=10**15)]
"""Of a document or of what is hashed, longer than any row."""


class NGram(Grammar):
    """The mixed-order n-gram language of arXiv 2603.06592; :meth:`paper` has the released constants.

    Attributes:
        n_tokens: Size of the vocabulary including ``<eos>``, its last token. (The default is the vocabulary of the
            default :class:`DocumentGrammar`.)
        n_rows: Rows of the transition table.
        orders: Numbers of preceding tokens that may be hashed, in order of falling probability.
        order_exponent: The i-th order (from 0) has probability proportional to (i + 1) ** -order_exponent.
        row_exponent_mean: A row's Zipf exponent is max(row_exponent_min, Normal(mean, std)).
        row_exponent_std: See ``row_exponent_mean``.
        row_exponent_min: See ``row_exponent_mean``.
        min_length: Fewest tokens of a document before its ``<eos>``.
        max_extra: A document has min_length + uniform{0..max_extra} tokens before its ``<eos>``.

    Example:
        >>> grammar = NGram(n_tokens=5, n_rows=10, orders=(1, 2))
        >>> grammar.vocabulary
        ['t0', 't1', 't2', 't3', '<eos>']
        >>> grammar.generate(2, 12, np.random.default_rng(0)).tokens.shape
        (2, 12)
    """

    kind: Literal["ngram"] = "ngram"
    n_tokens: Annotated[Whole, Field(ge=2, le=MOST_WORDS)] = 101
    n_rows: Annotated[Size, Field(le=100_000)] = 1000
    orders: Annotated[tuple[Tokens, ...], Field(min_length=1, max_length=1_000)] = (1, 2, 4, 8, 16, 32, 64, 128)
    order_exponent: Annotated[Number, Field(ge=0)] = 1.5
    row_exponent_mean: Number = 2.0
    row_exponent_std: Annotated[Number, Field(ge=0)] = 1.2
    row_exponent_min: Annotated[Number, Field(ge=0)] = 1.2
    min_length: Tokens = 10
    max_extra: Annotated[Whole, Field(ge=0, le=10**15)] = 99

    @classmethod
    def paper(cls) -> NGram:
        """Return the language with the constants of the paper's released generator."""
        return cls(n_tokens=1000, context=512)

    @staticmethod
    def fit(corpus: Corpus, order: int) -> FittedNGram:
        """Return the n-gram model of a corpus: text of the same local statistics, without what lies beyond them.

        Args:
            corpus: Text of any language of the package.
            order: Tokens of the n-grams that are counted; the next token depends on the ``order - 1`` before it.

        Raises:
            ValueError: ``order`` is below 1, longer than a row, or too large for the vocabulary.
        """
        from mechhier.grammars.fitted_ngram import FittedNGram  # late: it imports this module

        return FittedNGram.fit(corpus, order)

    @field_validator("orders")
    @classmethod
    def _orders_differ(cls, orders: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(orders)) < len(orders):
            raise ValueError(f"orders is {shown(orders)}; every order may occur once")
        return orders

    @model_validator(mode="after")
    def _check_table(self) -> NGram:
        if 8 * self.n_rows * self.n_tokens > MOST_BYTES:
            raise ValueError(
                f"the table of n_rows={self.n_rows} for n_tokens={self.n_tokens} takes "
                f"{8 * self.n_rows * self.n_tokens / 2**30:,.0f} GiB; at most {MOST_BYTES // 2**30} GiB are accepted"
            )
        return self

    # -- tokens ------------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.n_tokens

    @cached_property
    def vocabulary(self) -> list[str]:
        """Token strings ``t0 .. <eos>``; a token's id is its index."""
        return [f"t{i}" for i in range(self.n_tokens - 1)] + ["<eos>"]

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the categories: token, eos."""
        return "token", "eos"

    @cached_property
    def token_categories(self) -> Int[np.ndarray, " vocab"]:
        """Category id of every token id."""
        return read_only(np.repeat([_TOKEN, _EOS], (self.n_tokens - 1, 1)))

    @property
    def max_document_length(self) -> int:
        """Tokens of the longest document, EOS included."""
        return self.min_length + self.max_extra + 1

    # -- the language ------------------------------------------------------------------------------------------------

    @property
    def is_drawn(self) -> bool:
        """Always: the transition table is drawn."""
        return True

    @cached_property
    def order_probabilities(self) -> Float[np.ndarray, " order"]:
        """Probability of every entry of ``orders``."""
        return read_only(zipf(len(self.orders), self.order_exponent))

    @cached_property
    def rows(self) -> Float[np.ndarray, "row token"]:
        """The transition table ``[n_rows, n_tokens - 1]``: next-token probabilities given a row, ``<eos>`` left out.

        A function of ``language_seed`` alone for given sizes. ``<eos>`` is drawn by a document's length, never here.
        """
        rng = stable_generator("rows", self.language_seed)
        exponents = rng.normal(self.row_exponent_mean, self.row_exponent_std, self.n_rows)
        exponents = np.maximum(exponents, self.row_exponent_min)
        return read_only(np.stack([zipf(self.n_tokens - 1, float(a)) for a in exponents]))

    @cached_property
    def unigram(self) -> Float[np.ndarray, " vocab"]:
        """Probability of every token id at a random place of a random document.

        Not a closed form, since which histories occur decides which rows are used: the exact next-token distribution
        averaged over the positions of 2^19 tokens of generated documents (a fixed stream of the language), so that
        every entry is positive. The entry of ``<eos>`` is exact.
        """
        tokens, _ = self._generate(1, _UNIGRAM_TOKENS, stable_generator("unigram", self.language_seed))
        is_word = tokens != self.eos_token_id
        use = np.zeros(self.n_rows)
        for probability, rows in zip(self.order_probabilities, self._selected_rows(tokens), strict=True):
            use += probability * np.bincount(rows[is_word], minlength=self.n_rows)
        p_eos = 1 / (self.min_length + self.max_extra / 2 + 1)
        return read_only(np.append((1 - p_eos) * (use / use.sum()) @ self.rows, p_eos))

    @cached_property
    def _cumulative_rows(self) -> Float[np.ndarray, "row token"]:
        cumulative = np.cumsum(self.rows, axis=1)
        return read_only(cumulative / cumulative[:, -1:])

    @cached_property
    def _salt(self) -> np.uint64:
        """What makes the hash another one for another language seed."""
        return stable_generator("hash", self.language_seed).integers(0, 2**64, dtype=np.uint64)

    # -- text --------------------------------------------------------------------------------------------------------

    def _generate(self, n_rows: int, context: int, rng: np.random.Generator) -> tuple[np.ndarray, MakeLabels]:
        tokens, order, row = np.empty((3, n_rows, context), dtype=np.int32)
        orders, salt = np.array(self.orders), self._salt
        law = alias_table(self.order_probabilities)
        _write(rng, self.min_length, self.max_extra, orders, *law, self._cumulative_rows, salt, tokens, order, row)

        def make_labels(trees: bool) -> dict[str, np.ndarray]:
            document, position = places_in_documents(tokens == self.eos_token_id)
            return {
                "category": self.token_categories[tokens],
                "order": order.astype(np.int64),
                "row": row.astype(np.int64),
                "document": document,
                "position": position,
            }

        return tokens, make_labels

    # -- prediction --------------------------------------------------------------------------------------------------

    def next_token_probabilities(self, tokens: Int[np.ndarray, "row position"]) -> Float[np.ndarray, "row position v"]:
        """Return P(token at t | the tokens before t), exactly: the mixture over orders and the hazard of the length.

        Every row must begin a document (the layout of ``packed=False``); rows may end anywhere.

        Args:
            tokens: Token ids, ``[rows, positions]``.

        Returns:
            Probabilities ``[rows, positions, vocab]``. Memory: 2 x rows x positions x vocab float64; give the rows in
            portions.

        Raises:
            ValueError: A row is not text of this language.
        """
        tokens, position = self._parse(tokens)
        result = np.zeros((*tokens.shape, self.n_tokens))
        for probability, rows in zip(self.order_probabilities, self._selected_rows(tokens), strict=True):
            result[:, :, :-1] += probability * self.rows[rows]
        p_eos = self._p_eos(position)
        result[:, :, :-1] *= (1 - p_eos)[:, :, None]
        result[:, :, -1] = p_eos
        return result

    def ideal_loss(self, sample: Sample) -> IdealLoss:
        """Return the loss of the exact predictor on every token, in nats.

        Args:
            sample: Tokens and labels as :meth:`generate` returns them with ``packed=False``; ``[rows, positions]``.

        Raises:
            ValueError: A row does not begin a document, or is not text of this language.
        """
        if np.any(sample.labels["position"][:, 0] != 0):
            raise ValueError("every row must begin a document to be predicted exactly; generate with packed=False")
        tokens, position = self._parse(sample.tokens)
        is_eos = tokens == self.eos_token_id
        word = np.where(is_eos, 0, tokens)
        probability = np.zeros(tokens.shape)
        for p_order, rows in zip(self.order_probabilities, self._selected_rows(tokens), strict=True):
            probability += p_order * self.rows[rows, word]
        p_eos = self._p_eos(position)
        loss = -np.log(np.where(is_eos, p_eos, (1 - p_eos) * probability))
        return IdealLoss.exact(loss, "exact: mixture over the orders, hazard of the document's length")

    def _parse(
        self, tokens: Int[np.ndarray, "row position"]
    ) -> tuple[Int[np.ndarray, "row position"], Int[np.ndarray, "row position"]]:
        """Return the tokens and their positions in their documents; raise ValueError at an impossible length."""
        tokens = check_tokens(tokens, self.vocab_size)
        is_eos = tokens == self.eos_token_id
        _, position = places_in_documents(is_eos)
        p_eos = self._p_eos(position)
        wrong = np.where(is_eos, p_eos == 0, p_eos == 1)
        if wrong.any():
            row, at = (int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(
                f"row {row}, position {at}: <eos> must follow {self.min_length}..{self.min_length + self.max_extra} "
                f"tokens of a document, here after {position[row, at]} stands {self.vocabulary[tokens[row, at]]}. "
                "Rows must begin a document (packed=False) and be text of this language"
            )
        return tokens, position

    def _p_eos(self, position: Int[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
        """Probability that the document ends after ``position`` tokens, given that it has not ended before."""
        left = np.maximum(self.min_length + self.max_extra + 1 - position, 1)
        return np.where(position < self.min_length, 0.0, 1 / left)

    def _selected_rows(self, tokens: Int[np.ndarray, "row position"]) -> Int[np.ndarray, "order row position"]:
        """Return the table row that every order selects before every token."""
        selected = np.empty((len(self.orders), *tokens.shape), dtype=np.int32)
        _select_rows(tokens, self.eos_token_id, np.array(self.orders), self.n_rows, self._salt, selected)
        return selected


def places_in_documents(
    is_eos: Bool[np.ndarray, "row position"],
) -> tuple[Int[np.ndarray, "row position"], Int[np.ndarray, "row position"]]:
    """Return, for every token, the ``<eos>`` before it in its row, and the tokens between the last of them and it."""
    document = np.cumsum(is_eos, axis=1) - is_eos
    index = np.broadcast_to(np.arange(is_eos.shape[1]), is_eos.shape)
    start = np.zeros_like(index)
    start[:, 1:] = np.where(is_eos[:, :-1], index[:, 1:], 0)
    return document, index - np.maximum.accumulate(start, axis=1)


@compiled
def _row_of_history(
    prefix: np.ndarray, inverse_power: np.ndarray, t: int, length: int, n_rows: int, salt: np.uint64
) -> int:
    """Return the table row of the ``length`` tokens before position ``t`` of a document.

    ``prefix[t]`` is the sum of (token + 1) B^i over the positions i < t, modulo 2^64. The difference of two, times a
    power of 1/B, is a polynomial hash of the tokens between, wherever they stand. Then the finalizer of splitmix64
    (Steele, Lea & Flood 2014), and a remainder.
    """
    start = t - length
    x = ((prefix[t] - prefix[start]) * inverse_power[start]) ^ salt
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((x ^ (x >> np.uint64(31))) % np.uint64(n_rows))


@compiled
def _inverse_powers(n: int) -> np.ndarray:
    """Return 1, 1/B .. B^-(n - 1) modulo 2^64."""
    powers = np.ones(n, dtype=np.uint64)
    for i in range(1, n):
        powers[i] = powers[i - 1] * _INVERSE_BASE
    return powers


@compiled
def _select_rows(
    tokens: np.ndarray, eos: int, orders: np.ndarray, n_table_rows: int, salt: np.uint64, selected: np.ndarray
) -> None:
    """Find the table row that every order selects before every token of rows that begin a document."""
    n_rows, n_positions = tokens.shape
    prefix, inverse_power = np.zeros(n_positions + 1, dtype=np.uint64), _inverse_powers(n_positions + 1)
    for row in range(n_rows):
        t, power = 0, np.uint64(1)
        for position in range(n_positions):
            for i in range(len(orders)):
                length = min(orders[i], t)
                selected[i, row, position] = _row_of_history(prefix, inverse_power, t, length, n_table_rows, salt)
            token = tokens[row, position]
            if token == eos:
                t, power = 0, np.uint64(1)
            else:
                prefix[t + 1] = prefix[t] + np.uint64(token + 1) * power
                power *= _BASE
                t += 1


@compiled
def _draw_heavy_first(rng: np.random.Generator, cumulative: np.ndarray) -> int:
    """Draw a value from a cumulative law: the first values one by one, the others by bisection.

    In a table of laws too large for the cache, where the first values are the likely ones, this is faster than a
    constant number of look-ups at random places.
    """
    u = rng.random()
    for i in range(min(_SCANNED, len(cumulative))):
        if u < cumulative[i]:
            return i
    low, high = _SCANNED, len(cumulative) - 1
    while low < high:
        middle = (low + high) // 2
        if u < cumulative[middle]:
            high = middle
        else:
            low = middle + 1
    return low


@compiled
def _write(
    rng: np.random.Generator,
    min_length: int,
    max_extra: int,
    orders: np.ndarray,
    order_threshold: np.ndarray,
    order_alias: np.ndarray,
    cumulative_rows: np.ndarray,
    salt: np.uint64,
    tokens: np.ndarray,
    order: np.ndarray,
    row: np.ndarray,
) -> None:
    """Draw rows that begin a document: every token, its order, and its row of the table (-1 for ``<eos>``)."""
    n_rows, context = tokens.shape
    n_table_rows, eos = cumulative_rows.shape
    longest = min(min_length + max_extra, context)
    prefix, inverse_power = np.zeros(longest + 1, dtype=np.uint64), _inverse_powers(longest + 1)
    for i in range(n_rows):
        left, t, power = min_length + int(rng.random() * (max_extra + 1)), 0, np.uint64(1)
        for position in range(context):
            if left == 0:
                tokens[i, position], order[i, position], row[i, position] = eos, -1, -1
                left, t, power = min_length + int(rng.random() * (max_extra + 1)), 0, np.uint64(1)
                continue
            drawn = orders[draw(rng, order_threshold, order_alias)]
            selected = _row_of_history(prefix, inverse_power, t, min(drawn, t), n_table_rows, salt)
            token = _draw_heavy_first(rng, cumulative_rows[selected])
            tokens[i, position], order[i, position], row[i, position] = token, drawn, selected
            prefix[t + 1] = prefix[t] + np.uint64(token + 1) * power
            power *= _BASE
            t += 1
            left -= 1

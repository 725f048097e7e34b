"""The n-gram language: local statistics of mixed order, no hierarchy and nothing latent that lasts a document.

The language of arXiv 2603.06592. To draw the next token, draw an order, hash the last that many tokens of the document
(of however many there are; none at its beginning) to a row of a table, and draw from that row. A row is a Zipf law over
the same token order as every other row, with its own exponent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float, Int, UInt64
from pydantic import Field, field_validator

from mechhier.grammars.base import Grammar, Sample, check_tokens, read_only, stable_generator, zipf

_TOKEN, _EOS = range(2)
_HASH_BASE = 6364136223846793005  # the multiplier of Knuth's MMIX generator: odd, with well spread bits
_UNIGRAM_TOKENS = 2**19

Size = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class _Text:
    """Documents as columns, EOS left out: what was drawn at every position, and the hashes of the prefixes."""

    tokens: Int[np.ndarray, "position document"]
    order: Int[np.ndarray, "position document"]
    row: Int[np.ndarray, "position document"]
    prefix: UInt64[np.ndarray, "prefix document"]


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
    n_tokens: Annotated[int, Field(ge=2)] = 101
    n_rows: Size = 1000
    orders: Annotated[tuple[Size, ...], Field(min_length=1)] = (1, 2, 4, 8, 16, 32, 64, 128)
    order_exponent: Annotated[float, Field(ge=0)] = 1.5
    row_exponent_mean: float = 2.0
    row_exponent_std: Annotated[float, Field(ge=0)] = 1.2
    row_exponent_min: Annotated[float, Field(ge=0)] = 1.2
    min_length: Size = 10
    max_extra: Annotated[int, Field(ge=0)] = 99

    @classmethod
    def paper(cls) -> NGram:
        """Return the language with the constants of the paper's released generator."""
        return cls(n_tokens=1000, context=512)

    @field_validator("orders")
    @classmethod
    def _orders_differ(cls, orders: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(orders)) < len(orders):
            raise ValueError(f"orders is {orders}; every order may occur once")
        return orders

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
        rng = stable_generator("unigram", self.language_seed)
        mean_length = self.min_length + self.max_extra / 2
        lengths = self._draw_lengths(int(_UNIGRAM_TOKENS / (mean_length + 1)) + 1, rng)
        text = self._write(lengths, rng)
        position, document = np.nonzero(np.arange(self.max_document_length)[:, None] < lengths)
        use = np.zeros(self.n_rows)
        for order, probability in zip(self.orders, self.order_probabilities, strict=True):
            rows = self._rows_of_histories(text.prefix, position, np.minimum(order, position), document)
            use += probability * np.bincount(rows, minlength=self.n_rows)
        p_eos = 1 / (mean_length + 1)
        return read_only(np.append((1 - p_eos) * (use / use.sum()) @ self.rows, p_eos))

    @cached_property
    def _cumulative_rows(self) -> Float[np.ndarray, " entry"]:
        """The rows' cumulative laws end to end, row r shifted by r: one sorted array to search."""
        cumulative = np.cumsum(self.rows, axis=1)
        cumulative[:, -1] = 1.0
        return read_only((cumulative + np.arange(self.n_rows)[:, None]).ravel())

    @cached_property
    def _salt(self) -> np.uint64:
        """What makes the hash another one for another language seed."""
        return stable_generator("hash", self.language_seed).integers(0, 2**64, dtype=np.uint64)

    def _rows_of_histories(
        self,
        prefix: UInt64[np.ndarray, "prefix column"],
        t: Int[np.ndarray, ...] | int,
        length: Int[np.ndarray, ...],
        column: Int[np.ndarray, ...],
    ) -> Int[np.ndarray, ...]:
        """Return the table row of the ``length`` tokens before position ``t`` of each column; the three broadcast.

        ``prefix[t]`` is the sum of (token + 1) B^i over the positions i < t, modulo 2^64. The difference of two, times
        a power of 1/B, is a polynomial hash of the tokens between, wherever they stand. Then the finalizer of
        splitmix64 (Steele, Lea & Flood 2014), and a remainder.
        """
        start = t - length
        shift = _powers(pow(_HASH_BASE, -1, 2**64), len(prefix))
        x = ((prefix[t, column] - prefix[start, column]) * shift[start]) ^ self._salt
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((x ^ (x >> np.uint64(31))) % np.uint64(self.n_rows)).astype(np.int64)

    # -- text --------------------------------------------------------------------------------------------------------

    def _draw_lengths(self, size: int | tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Draw numbers of tokens of documents, ``<eos>`` not counted."""
        return rng.integers(self.min_length, self.min_length + self.max_extra + 1, size)

    def _write(self, lengths: Int[np.ndarray, " document"], rng: np.random.Generator) -> _Text:
        """Draw the tokens of documents of given lengths, position by position for all documents at once."""
        longest, n = self.max_document_length, len(lengths)
        falling = np.argsort(-lengths, kind="stable")  # the documents still being written are then the first columns
        writing = np.searchsorted(-lengths[falling], -np.arange(longest), side="left")
        powers = _powers(_HASH_BASE, longest)
        cumulative_orders = np.cumsum(self.order_probabilities)
        cumulative_orders[-1] = 1.0
        orders = np.array(self.orders)

        tokens = np.full((longest, n), self.eos_token_id)
        order, row = np.full((longest, n), -1), np.full((longest, n), -1)
        prefix = np.zeros((longest + 1, n), dtype=np.uint64)
        for t, m in enumerate(writing):
            if m == 0:
                break
            drawn = orders[np.searchsorted(cumulative_orders, rng.random(m), side="right")]
            chosen = self._rows_of_histories(prefix, t, np.minimum(drawn, t), np.arange(m))
            place = np.searchsorted(self._cumulative_rows, chosen + rng.random(m), side="right")
            token = np.minimum(place - chosen * (self.n_tokens - 1), self.n_tokens - 2)
            tokens[t, :m], order[t, :m], row[t, :m] = token, drawn, chosen
            prefix[t + 1, :m] = prefix[t, :m] + (token + 1).astype(np.uint64) * powers[t]
        back = np.argsort(falling)
        return _Text(tokens[:, back], order[:, back], row[:, back], prefix[:, back])

    def _generate(self, n_rows: int, context: int, rng: np.random.Generator) -> Sample:
        # Documents: as many as fit into a row if every one has the least length; the rest is not used.
        most = -(-context // (self.min_length + 1))
        length = self._draw_lengths((n_rows, most), rng)
        start = np.cumsum(length + 1, axis=1) - (length + 1)
        used = start < context
        shown = np.minimum(length + 1, context - start)[used]
        text = self._write(np.minimum(length[used], shown), rng)

        column = np.repeat(np.arange(len(shown)), shown)
        position = np.arange(n_rows * context) - np.repeat(np.cumsum(shown) - shown, shown)

        def rows(flat: np.ndarray) -> np.ndarray:
            return flat.reshape(n_rows, context)

        tokens = rows(text.tokens[position, column])
        labels = {
            "category": self.token_categories[tokens],
            "order": rows(text.order[position, column]),
            "row": rows(text.row[position, column]),
            "document": rows(np.repeat(np.nonzero(used)[1], shown)),
            "position": rows(position),
        }
        return Sample(tokens, labels)

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
        for probability, rows in self._rows_by_order(tokens, position):
            result[:, :, :-1] += probability * self.rows[rows]
        p_eos = self._p_eos(position)
        result[:, :, :-1] *= (1 - p_eos)[:, :, None]
        result[:, :, -1] = p_eos
        return result

    def floor_bounds(
        self, sample: Sample
    ) -> tuple[Float[np.ndarray, "row position"], Float[np.ndarray, "row position"]]:
        """Return the loss of the exact predictor on every token, in nats, as both bounds.

        Args:
            sample: Tokens and labels as :meth:`generate` returns them with ``packed=False``; ``[rows, positions]``.

        Returns:
            ``(loss, loss)``, each ``[rows, positions]``.

        Raises:
            ValueError: A row does not begin a document, or is not text of this language.
        """
        if np.any(sample.labels["position"][:, 0] != 0):
            raise ValueError("every row must begin a document to be predicted exactly; generate with packed=False")
        tokens, position = self._parse(sample.tokens)
        is_eos = tokens == self.eos_token_id
        word = np.where(is_eos, 0, tokens)
        probability = np.zeros(tokens.shape)
        for p_order, rows in self._rows_by_order(tokens, position):
            probability += p_order * self.rows[rows, word]
        p_eos = self._p_eos(position)
        loss = -np.log(np.where(is_eos, p_eos, (1 - p_eos) * probability))
        return loss, loss

    def _parse(
        self, tokens: Int[np.ndarray, "row position"]
    ) -> tuple[Int[np.ndarray, "row position"], Int[np.ndarray, "row position"]]:
        """Return the tokens and their positions in their documents; raise ValueError at an impossible length."""
        tokens = check_tokens(tokens, self.vocab_size)
        is_eos = tokens == self.eos_token_id
        index = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        start = np.zeros_like(tokens)
        start[:, 1:] = np.where(is_eos[:, :-1], index[:, 1:], 0)
        position = index - np.maximum.accumulate(start, axis=1)
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

    def _rows_by_order(
        self, tokens: Int[np.ndarray, "row position"], position: Int[np.ndarray, "row position"]
    ) -> Iterator[tuple[float, Int[np.ndarray, "row position"]]]:
        """Yield, for every order, its probability and the table row it selects before every token."""
        n_rows, n_positions = tokens.shape
        prefix = np.zeros((n_positions + 1, n_rows), dtype=np.uint64)
        np.cumsum((tokens.T + 1).astype(np.uint64) * _powers(_HASH_BASE, n_positions)[:, None], axis=0, out=prefix[1:])
        t, column = np.arange(n_positions)[None], np.arange(n_rows)[:, None]
        for order, probability in zip(self.orders, self.order_probabilities, strict=True):
            yield float(probability), self._rows_of_histories(prefix, t, np.minimum(order, position), column)


def _powers(base: int, n: int) -> UInt64[np.ndarray, " n"]:
    """Return base**0 .. base**(n - 1) modulo 2^64."""
    powers = np.ones(n, dtype=np.uint64)
    powers[1:] = np.cumprod(np.full(max(n - 1, 0), base, dtype=np.uint64))
    return powers

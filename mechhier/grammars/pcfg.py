"""Probabilistic context-free grammars: any rules, sampled with their trees, with exact moments.

A document is one string of the grammar followed by ``<eos>``. What has to sum over derivations (probabilities of
strings and prefixes, prediction, posteriors) is in :mod:`mechhier.grammars.inference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from scipy.special import entr

from mechhier.grammars import derivation, lengths, notation, parsing
from mechhier.grammars.base import (
    MOST_WORDS,
    Grammar,
    IdealLoss,
    MakeLabels,
    Sample,
    check_tokens,
    read_only,
)
from mechhier.grammars.rules import (
    EOS,
    MOST_RULES,
    Rule,
    bottom_up,
    check,
    check_size,
    is_recursive,
    mean_children,
    totals,
)
from mechhier.grammars.trees import Tree, node_numbers
from mechhier.reading import read_json, read_text
from mechhier.specs import Size, Text, Whole

if TYPE_CHECKING:
    import os

    from mechhier.grammars.inference import Prediction, Predictor

MOST_LENGTH = 10_000
"""Longest string whose probability is computed for `lengths`: the time grows with its square."""
_MOST_TABLE_BYTES = 2**26
_MOST_PRODUCTS = 2 * 10**8  # of such a computation, in a round
_LEAST_ACCEPTED_MASS = 1e-3  # of strings whose length is accepted: rejection draws 1 / mass strings for one


class PCFG(Grammar):
    """A probabilistic context-free grammar.

    Attributes:
        start: The symbol every string is derived from.
        terminals: The tokens, in the order of their ids; ``<eos>`` comes after them.
        rules: The rules. The probabilities of a symbol's rules sum to one; rules may be recursive as long as
            derivations end with probability one (spectral radius of :attr:`mean_matrix` below one), and may be empty.
        lengths: Shortest and longest string; strings of another length are rejected and drawn again, so that the
            language is the grammar's given the length (see :attr:`rejected_mass`). None: every length.

    Raises:
        ValueError: It is not a grammar, or has parts that no string uses; the message names the rule or the symbol.

    Example:
        >>> grammar = PCFG(
        ...     start="S", terminals=("a", "b"), rules=[("S", ("a", "S", "b"), 0.4), ("S", ("a", "b"), 0.6)]
        ... )
        >>> round(grammar.expected_length, 3), round(grammar.derivation_entropy, 3)
        (3.333, 1.122)
        >>> sample = grammar.generate(1, 8, np.random.default_rng(2), trees=True)
        >>> str(grammar.trees(sample, 0)[0])
        '(S a (S a (S a b) b) b)'
    """

    kind: Literal["pcfg"] = "pcfg"
    start: Text
    terminals: Annotated[tuple[Text, ...], Field(min_length=1, max_length=MOST_WORDS)]
    rules: Annotated[tuple[Rule, ...], Field(min_length=1, max_length=MOST_RULES)]
    lengths: tuple[Annotated[Whole, Field(ge=0)], Annotated[Size, Field(le=MOST_LENGTH)]] | None = None

    # -- reading -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_string(cls, text: str, **fields: Any) -> PCFG:
        """Read a grammar in NLTK's notation.

        One ``A -> B 'b' [0.4] | C [0.6]`` a line; terminals are quoted, comments begin with ``#``. The start symbol is
        the first line's unless a line says ``%start S``. Terminals are numbered in order of appearance.

        Args:
            text: The grammar.
            **fields: Other fields, such as ``context`` or ``lengths``.

        Raises:
            ValueError: A line is not a rule, or a rule has no probability.

        Example:
            >>> grammar = PCFG.from_string("S -> 'a' S 'b' [0.4] | 'a' 'b' [0.6]")
            >>> grammar.vocabulary, len(grammar.rules)
            (['a', 'b', '<eos>'], 2)
        """
        start, terminals, rules = notation.read(text)
        return cls(start=start, terminals=terminals, rules=rules, **fields)

    @classmethod
    def from_cfg3(cls, source: str | os.PathLike[str] | dict[str, Any], **fields: Any) -> PCFG:
        """Read a rule table as published with cfg3b, cfg3f and others (Allen-Zhu & Li 2023, arXiv 2305.13673).

        ``all[d]`` lists the symbols of depth d with their ``id`` and their ``children``: one list per rule, of indices
        into the symbols of depth d + 1. The rules of a symbol are equally likely; symbols without rules are terminals.

        Args:
            source: The JSON file, or what it holds.
            **fields: Other fields, such as ``context``.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The table does not have this form.
        """
        table: Any = source
        if not isinstance(source, dict):
            table = read_json(read_text(source, most_bytes=_MOST_TABLE_BYTES), str(source))
        start, terminals, rules = notation.read_cfg3(table)
        return cls(start=start, terminals=terminals, rules=rules, **fields)

    def to_string(self) -> str:
        """Return the grammar in NLTK's notation; :meth:`from_string` reads it.

        Raises:
            ValueError: A terminal holds both kinds of quotes.
        """
        return notation.write(self.start, self.terminals, self.rules)

    @model_validator(mode="after")
    def _check(self) -> PCFG:
        n_children = sum(len(rule.rhs) for rule in self.rules)
        check_size(len({rule.lhs for rule in self.rules}) + len(self.terminals), len(self.rules), n_children)
        check(self.start, self.terminals, self.rules)
        if self.lengths is not None:
            shortest, longest = self.lengths
            if shortest > longest:
                raise ValueError(f"lengths is {self.lengths}: the shortest comes first")
            if n_children * longest**2 > _MOST_PRODUCTS:
                raise ValueError(
                    f"lengths is {self.lengths}: for {n_children:,} symbols in rules the probability of a length is computed "
                    f"up to {int((_MOST_PRODUCTS / n_children) ** 0.5):,}"
                )
            if 1 - self.rejected_mass < _LEAST_ACCEPTED_MASS:
                raise ValueError(
                    f"lengths={self.lengths} holds {1 - self.rejected_mass:.2g} of all strings, and at least "
                    f"{_LEAST_ACCEPTED_MASS:g} is needed; the mean length is {self.expected_length:.1f}"
                )
        return self

    # -- tokens and symbols ------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of token ids: the terminals and ``<eos>``."""
        return len(self.terminals) + 1

    @cached_property
    def vocabulary(self) -> list[str]:
        """The terminals and ``<eos>``; a token's id is its index."""
        return [*self.terminals, EOS]

    @cached_property
    def nonterminals(self) -> tuple[str, ...]:
        """The nonterminals in order of their first rules, the start symbol first."""
        return tuple(dict.fromkeys([self.start, *(rule.lhs for rule in self.rules)]))

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the constituents: the nonterminals."""
        return self.nonterminals

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the categories: the nonterminals, and eos. A token's category is the symbol that wrote it."""
        return (*self.nonterminals, "eos")

    @cached_property
    def token_categories(self) -> Int[np.ndarray, " vocab"]:
        """The category that writes a token most often, for every token id; the label ``category`` is the true one."""
        expected = self._expected_counts @ self._terminal_means
        written = self._expected_counts[:, None] * self._terminal_means
        assert (expected > 0).all()
        return read_only(np.append(written.argmax(axis=0), len(self.nonterminals)))

    @cached_property
    def _nonterminal_ids(self) -> dict[str, int]:
        return {symbol: i for i, symbol in enumerate(self.nonterminals)}

    @cached_property
    def _symbol_ids(self) -> dict[str, int]:
        """Nonterminals from 0, terminals after them."""
        return self._nonterminal_ids | {t: len(self.nonterminals) + i for i, t in enumerate(self.terminals)}

    # -- moments -----------------------------------------------------------------------------------------------------

    @cached_property
    def mean_matrix(self) -> Float[np.ndarray, "symbol child"]:
        """M: the expected number of each nonterminal (column) in one expansion of each nonterminal (row)."""
        return read_only(self._children[:, : len(self.nonterminals)])

    @cached_property
    def _terminal_means(self) -> Float[np.ndarray, "symbol terminal"]:
        return self._children[:, len(self.nonterminals) :]

    @cached_property
    def _children(self) -> Float[np.ndarray, "symbol child"]:
        return mean_children(self.rules, list(self._symbol_ids))[: len(self.nonterminals)]

    @cached_property
    def _expected_counts(self) -> Float[np.ndarray, " symbol"]:
        """How often each nonterminal is expanded in a string: the start symbol's row of (I - M)^-1."""
        n = len(self.nonterminals)
        return np.linalg.solve(np.eye(n) - self.mean_matrix.T, np.eye(n)[0])

    @property
    def expected_counts(self) -> dict[str, float]:
        """Expected number of each nonterminal and each terminal in a string (whatever ``lengths`` rejects)."""
        of_terminals = self._expected_counts @ self._terminal_means
        counts = np.concatenate([self._expected_counts, of_terminals])
        return dict(zip((*self.nonterminals, *self.terminals), counts.tolist(), strict=True))

    @property
    def expected_length(self) -> float:
        """Expected number of tokens of a string, ``<eos>`` not counted (whatever ``lengths`` rejects)."""
        return float((self._expected_counts @ self._terminal_means).sum())

    @property
    def derivation_entropy(self) -> float:
        """Entropy in nats of a string's derivation, H = (I - M)^-1 h at the start symbol (Grenander 1976).

        The entropy of the strings themselves is the same if the grammar is unambiguous, else less. ``lengths`` is not
        regarded.
        """
        own = np.zeros(len(self.nonterminals))
        for rule in self.rules:
            own[self._nonterminal_ids[rule.lhs]] += entr(rule.probability)
        return float(self._expected_counts @ own)

    @property
    def entropy_rate(self) -> float:
        """Derivation entropy in nats per token, a string's ``<eos>`` counted as one of its tokens."""
        return self.derivation_entropy / (self.expected_length + 1)

    @cached_property
    def unigram(self) -> Float[np.ndarray, " vocab"]:
        """Probability of every token id at a random place of the text, ``<eos>`` included.

        In closed form; with ``lengths`` from the exact distribution of lengths and counts of tokens among the strings
        of these lengths.
        """
        if self.lengths is None:
            counts = np.append(self._expected_counts @ self._terminal_means, 1.0)
        else:
            counts = np.append(self._expected_tokens_of_lengths(), 1.0)
        return read_only(counts / counts.sum())

    def length_probabilities(self, longest: int) -> Float[np.ndarray, " length"]:
        """Return P(a string has 0, 1, .. ``longest`` tokens), before ``lengths`` rejects any.

        Cost: some dozens of convolutions of that length per rule.
        """
        return lengths.length_laws(self._rule_ids, len(self.nonterminals), longest)[0]

    @cached_property
    def rejected_mass(self) -> float:
        """Probability that a string is rejected for its length; 0 without ``lengths``. Exact."""
        if self.lengths is None:
            return 0.0
        shortest, longest = self.lengths
        return float(1 - self.length_probabilities(longest)[shortest:].sum())

    def _expected_tokens_of_lengths(self) -> Float[np.ndarray, " terminal"]:
        """Expected number of every terminal in a string of accepted length, times the accepted mass."""
        assert self.lengths is not None
        shortest, longest = self.lengths
        means = lengths.terminal_counts(self._rule_ids, len(self.nonterminals), len(self.terminals), longest)
        return means[:, shortest:].sum(axis=1) / (1 - self.rejected_mass)

    @property
    def max_document_length(self) -> int | None:
        """Tokens of the longest string and its ``<eos>``; None if there is no longest."""
        if self.lengths is not None:
            return self.lengths[1] + 1
        if is_recursive(self.mean_matrix):
            return None
        longest = dict.fromkeys(self.terminals, 1)
        for symbol, rules in bottom_up(self.rules):
            longest[symbol] = max(sum(longest[child] for child in rule.rhs) for rule in rules)
        return longest[self.start] + 1

    # -- text --------------------------------------------------------------------------------------------------------

    @cached_property
    def _rule_ids(self) -> list[tuple[int, tuple[int, ...], float]]:
        """The rules in symbol ids, those of one symbol side by side, normalised."""
        ids = self._symbol_ids
        ordered = sorted(self.rules, key=lambda rule: ids[rule.lhs])
        total = totals(self.rules)
        return [(ids[r.lhs], tuple(ids[x] for x in r.rhs), r.probability / total[r.lhs]) for r in ordered]

    @cached_property
    def _rule_arrays(self) -> derivation.Rules:
        return derivation.Rules.of(self._rule_ids, len(self.nonterminals))

    def _generate(self, n_rows: int, context: int, rng: np.random.Generator) -> tuple[np.ndarray, MakeLabels]:
        rules = self._rule_arrays
        shortest, longest = (0, -1) if self.lengths is None else self.lengths
        tokens, used, ends = derivation.derive(rng, n_rows, context, rules, shortest, longest)

        def make_labels(trees: bool) -> dict[str, np.ndarray]:
            category, depth, shared, is_open, document, position = derivation.relabel(
                used, ends, n_rows, context, rules
            )
            labels = {"category": category, "depth": depth, "open": is_open, "document": document, "position": position}
            if trees:
                ancestors = derivation.ancestors(used, ends, context, int(depth.max()), rules)
                labels |= {"ancestors": ancestors, "nodes": node_numbers(ancestors, shared)}
            return labels

        return tokens, make_labels

    # -- prediction --------------------------------------------------------------------------------------------------

    @cached_property
    def _predictor(self) -> Predictor:
        from mechhier.grammars.inference import Predictor

        return Predictor.of(self._rule_ids, len(self.nonterminals), len(self.terminals))

    def log_probability(self, tokens: Int[np.ndarray, " position"]) -> float:
        """Return the log-probability in nats of a whole string, summed over its derivations; -inf if it has none.

        The inside probability of Baker (1979), by Stolcke's (1995) algorithm. ``lengths`` is not regarded.

        Args:
            tokens: The string without ``<eos>``.

        Raises:
            ValueError: Not a one-dimensional array of terminals' ids.
        """
        return self._predictor.string(self._check_string(tokens))[1]

    def prefix_log_probabilities(self, tokens: Int[np.ndarray, " position"]) -> Float[np.ndarray, " prefix"]:
        """Return log P(a string begins with the first t tokens) in nats for t = 0 .. len(tokens); -inf where none does.

        The prefix probability of Jelinek & Lafferty (1991). ``lengths`` is not regarded.

        Args:
            tokens: A string or its beginning, without ``<eos>``.

        Raises:
            ValueError: Not a one-dimensional array of terminals' ids.
        """
        return self._predictor.string(self._check_string(tokens))[0]

    def most_probable_tree(self, tokens: Int[np.ndarray, " position"]) -> tuple[Tree | None, float]:
        """Return the tree of a string's most probable derivation (Viterbi parse) and its log-probability in nats.

        Args:
            tokens: The string without ``<eos>``; at least one token.

        Returns:
            The tree, from which constituents without a token are left out, and the derivation's log-probability; None
            and -inf if the grammar does not derive the string. Cost: n^3 / 6 times the number of dotted rules, memory
            12 n^2 bytes for each of them.

        Raises:
            ValueError: Not a one-dimensional array of terminals' ids, or empty.

        Example:
            >>> grammar = PCFG.from_string("S -> S S [0.3] | 'a' [0.7]")
            >>> str(grammar.most_probable_tree(np.array([0, 0]))[0])
            '(S (S a) (S a))'
        """
        tokens = self._check_string(tokens)
        if len(tokens) == 0:
            raise ValueError("the empty string has no tree; give at least one token")
        names = [*self.nonterminals, *self.terminals]
        return parsing.most_probable_tree(self._rule_ids, names, len(self.terminals), tokens)

    def next_token_probabilities(self, tokens: Int[np.ndarray, "row position"]) -> Float[np.ndarray, "row position v"]:
        """Return P(token at t | the tokens before t), exactly: ratios of prefix probabilities (Stolcke 1995).

        Every row must begin a document (the layout of ``packed=False``); rows may end anywhere.

        Args:
            tokens: Token ids, ``[rows, positions]``.

        Returns:
            Probabilities ``[rows, positions, vocab]``. Cost per string of n tokens: at most n^3 / 6 times the number
            of dotted rules, in compiled code; for a grammar with little ambiguity close to n^2.

        Raises:
            ValueError: A row is not text of this language, or ``lengths`` is set (the exact predictor would have to
                know how long the rest of every derivation is; :meth:`ideal_loss` brackets its loss).
        """
        return self._predictions(tokens, "tokens", self.vocab_size)

    def category_probabilities(self, tokens: Int[np.ndarray, "row position"]) -> Float[np.ndarray, "row position c"]:
        """Return P(category of the token at t | the tokens before t), with :attr:`categories` as last dimension.

        The symbol that writes the next token is the top of the stack of constituents under construction. Of a
        right-linear grammar (A -> a B), which is a hidden Markov model, it is the whole state, and these are its
        belief states (Shai et al. 2024).

        Args:
            tokens: Token ids, ``[rows, positions]``; every row begins a document.

        Raises:
            ValueError: As :meth:`next_token_probabilities`.
        """
        return self._predictions(tokens, "categories", len(self.categories))

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the dotted rules ``A -> B . C D``: A is under construction, B is complete, C holds the next token.

        Those of the grammar without its empty rules, which derives the same nonempty strings.
        """
        names = [*self.nonterminals, *map(notation.quoted, self.terminals)]
        return tuple(
            " ".join([names[lhs], "->", *(names[x] for x in rhs[:dot]), ".", *(names[x] for x in rhs[dot:])])
            for lhs, rhs, dot in self._predictor.dotted_rules
        )

    def state_probabilities(self, tokens: Int[np.ndarray, "row position"]) -> Float[np.ndarray, "row position state"]:
        """Return the posterior over the grammar's state before every token, given the tokens before it.

        The state is the stack of constituents under construction: one dotted rule per ancestor of the next token. There
        are infinitely many stacks, so this is their marginal: for each of the :attr:`states`, the expected number of
        ancestors of the next token that are in it. Where a symbol cannot contain itself (all cfg3 and random hierarchy
        grammars) that is a probability. All are 0 where the string ends.

        Args:
            tokens: Token ids, ``[rows, positions]``; every row begins a document.

        Returns:
            ``[rows, positions, states]``. Cost: as :meth:`next_token_probabilities`, twice.

        Raises:
            ValueError: As :meth:`next_token_probabilities`.
        """
        return self._predictions(tokens, "states", len(self.states))

    def _predictions(
        self, tokens: Int[np.ndarray, "row position"], field: Literal["tokens", "categories", "states"], width: int
    ) -> Float[np.ndarray, "row position width"]:
        """Return one field of the :class:`Prediction` of every string at every place."""
        self._refuse_lengths()
        tokens = check_tokens(tokens, self.vocab_size)
        result = np.zeros((*tokens.shape, width))
        for row, start, stop, ended in self._strings(tokens):
            prediction = self._predict(tokens, row, start, stop, ended, states=field == "states")
            result[row, start : stop + ended] = getattr(prediction, field)[: stop + ended - start]
        return result

    def ideal_loss(self, sample: Sample) -> IdealLoss:
        """Return the loss of the exact predictor on every token, in nats.

        With ``lengths`` set the exact predictor is not tractable, and the estimate, which is the upper bound, is the loss
        of the predictor that does not know which lengths are rejected. The ideal one is better by
        -log(1 - rejected mass) in all over a whole string, so at no token by more on average: the lower bound.

        Args:
            sample: Tokens and labels as :meth:`generate` returns them with ``packed=False``; ``[rows, positions]``.

        Raises:
            ValueError: A row does not begin a document, or is not text of this language.
        """
        if np.any(sample.labels["position"][:, 0] != 0):
            raise ValueError("every row must begin a document to be predicted exactly; generate with packed=False")
        tokens = check_tokens(sample.tokens, self.vocab_size)
        loss = np.zeros(tokens.shape)
        for row, start, stop, ended in self._strings(tokens):
            prediction = self._predict(tokens, row, start, stop, ended)
            observed = tokens[row, start : stop + ended]
            with np.errstate(divide="ignore"):
                loss[row, start : stop + ended] = -np.log(prediction.tokens[np.arange(len(observed)), observed])
        if self.lengths is None:
            return IdealLoss.exact(loss, "exact: ratios of prefix probabilities")
        return IdealLoss(
            estimate=loss,
            error=np.full_like(loss, np.nan),
            mean_error=np.full(len(loss), np.nan),
            lower=loss + np.log1p(-self.rejected_mass),
            upper=loss,
            method="upper bound: the predictor that does not know which lengths are rejected",
        )

    def _strings(self, tokens: Int[np.ndarray, "row position"]) -> Iterator[tuple[int, int, int, bool]]:
        """Yield (row, start, stop, whether an <eos> follows at stop) for every string, the cut ones included."""
        for row, line in enumerate(tokens):
            start = 0
            for stop in np.flatnonzero(line == self.eos_token_id):
                yield row, start, int(stop), True
                start = int(stop) + 1
            if start < len(line):
                yield row, start, len(line), False

    def _predict(
        self, tokens: np.ndarray, row: int, start: int, stop: int, ended: bool, *, states: bool = False
    ) -> Prediction:
        """Predict every token of one string and its <eos>; raise ValueError where the grammar does not allow it."""
        prediction = self._predictor.predict(tokens[row, start:stop], states=states)
        n_read = len(prediction.log_prefix) - 1
        allowed = n_read == stop - start
        if not allowed or (ended and prediction.tokens[n_read, -1] <= 0):
            position = start + n_read
            raise ValueError(
                f"row {row}, position {position}: the grammar does not allow {self.vocabulary[tokens[row, position]]} "
                "here. Rows must begin a document (packed=False) and be text of this language"
            )
        return prediction

    def _check_string(self, tokens: Int[np.ndarray, " position"]) -> Int[np.ndarray, " position"]:
        tokens = np.asarray(tokens)
        if tokens.ndim != 1:
            raise ValueError(f"a string has one dimension; tokens has shape {tokens.shape}")
        if len(tokens) == 0:
            return tokens.astype(np.int64)
        return check_tokens(tokens[None], self.eos_token_id)[0]

    def _refuse_lengths(self) -> None:
        if self.lengths is not None:
            raise ValueError(
                f"lengths={self.lengths} has no tractable exact predictor; ideal_loss(sample) or corpus.floor() bracket "
                "its loss, and model_copy(update={'lengths': None}) predicts exactly"
            )

"""The token sequences that a phenomenon draws for itself when the caller gives none."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from transformers import PreTrainedTokenizerBase

from mechhier.models.hooked import Hooked
from mechhier.models.loading import bos_token_id, model_info

MAX_REPEAT = 64
"""Longest random segment; Olsson et al. (2022) and the library detectors use 25 to 100 tokens."""
N_LENGTHS = 8
"""Number of different segment lengths in one measurement, at most."""
_PER_LENGTH = 4
"""Sequences of each length, so that each half has two and the spread within lengths can be told."""

_TEXTS = (
    "The river rises in the mountains, runs south through three valleys, and reaches the sea near a small fishing town.",
    "When water is heated to its boiling point it becomes steam, and when the steam cools again it becomes water.",
    "The committee met on Monday to discuss the budget, and on Tuesday the committee published a summary of the budget.",
    "A triangle has three sides, a square has four sides, a pentagon has five sides, and a hexagon has six sides.",
    "Anna gave the book to Peter because Peter had asked for it, and a week later Peter gave the book back to Anna.",
    "In winter the days are short and the nights are long, while in summer the days are long and the nights are short.",
    "The old clock in the hall strikes every hour, so at noon it strikes twelve times and at one it strikes only once.",
    "Bees collect nectar from flowers and turn it into honey, which they store in the cells of the comb for the winter.",
    "The train from Paris to Lyon takes about two hours, and the train from Lyon to Marseille takes a little less.",
    "To make bread you need flour, water, salt and yeast; mix them, let the dough rise, and bake it in a hot oven.",
    "The Earth turns once around its axis every day and travels once around the Sun every year, followed by the Moon.",
    "She opened the door, looked into the room, saw that nobody was there, and quietly closed the door behind her.",
    "The first chapter introduces the problem, the second chapter reviews the methods, and the third reports the results.",
    "Gold is heavier than silver, silver is heavier than iron, and iron is heavier than aluminium of the same volume.",
    "If it rains tomorrow we will stay at home and read, but if the sun shines tomorrow we will walk to the lake.",
    "The library opens at nine in the morning and closes at six in the evening, except on Sunday, when it is closed.",
    "Two plus two is four, four plus four is eight, eight plus eight is sixteen, and sixteen plus sixteen is thirty-two.",
    "The captain ordered the crew to lower the sails, because the wind had grown so strong that the mast began to bend.",
    "Copper conducts electricity well, which is why most of the cables in the walls of a house are made of copper.",
    "The painter mixed blue and yellow to make green, and then mixed red and yellow to make the orange of the evening sky.",
    "Many birds fly south in autumn, spend the winter in a warmer country, and return to the same nests in spring.",
    "The teacher wrote a word on the board, asked the class to read the word aloud, and then wiped the board clean.",
    "A good map shows the roads, the rivers and the hills, and tells the traveller how far one village is from the next.",
    "The court heard both sides, considered the evidence for a week, and then announced its decision to the public.",
)


def bos_token(hooked: Hooked) -> int | None:
    """The beginning-of-sequence token of `mechhier.models.loading.bos_token_id`."""
    return bos_token_id(hooked.model)


def token_frequencies(hooked: Hooked) -> Float[np.ndarray, " vocab"]:
    """Frequencies from which random tokens are drawn; they sum to one.

    The training frequencies where the model carries its grammar (without the end-of-sequence token), else uniform over
    the tokens that text can have: those of its tokenizer that are not special. A vocabulary is often padded beyond its
    tokenizer or has holes, and a token that no text has was never trained. Without a tokenizer, over all tokens.
    """
    info = model_info(hooked.model)
    tokenizer = getattr(hooked.model, "tokenizer", None)
    if info is not None and info.grammar is not None:
        frequencies = np.array(info.grammar.unigram, dtype=np.float64)
        frequencies[info.grammar.eos_token_id] = 0.0
    elif tokenizer is not None:
        frequencies = np.zeros(hooked.d_vocab)
        frequencies[[token for token in _text_tokens(tokenizer) if token < hooked.d_vocab]] = 1.0
        if not frequencies.any():
            raise ValueError("no token of the model's tokenizer is within its vocabulary; give tokens instead")
    else:
        frequencies = np.ones(hooked.d_vocab)
    return frequencies / frequencies.sum()


def _text_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    # Tokens in reserve and those that mark turns of a dialogue are special, though not among the named ones.
    marks = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return set(tokenizer.get_vocab().values()) - marks - set(tokenizer.all_special_ids)


def random_repeats(hooked: Hooked, n_sequences: int, *, seed: int) -> list[tuple[int, Int[torch.Tensor, "batch pos"]]]:
    """Sequences `[BOS] r r` of random tokens, in groups with a different length of r each.

    A single length could be solved by position alone, hence several: spread evenly from a quarter of the longest
    possible one (at most `MAX_REPEAT`), the same for every seed, because chance depends on them. Of few sequences there
    are `_PER_LENGTH` of each length, but two lengths at least. The tokens of one r are
    distinct, drawn by frequency without replacement, so that the earlier copy of a token is unique and a perfect
    induction head scores 1.

    Returns:
        `(length of r, tokens)` per group, shortest first; the groups' sizes sum to `n_sequences`.

    Raises:
        ValueError: The context or the vocabulary is too small for any repeat.
    """
    bos = bos_token(hooked)
    frequencies = token_frequencies(hooked)
    longest = min(MAX_REPEAT, (hooked.n_ctx - (bos is not None)) // 2, int((frequencies > 0).sum()))
    if longest < 4:
        raise ValueError(
            f"random repeats need a context of at least 8 tokens and 4 ordinary tokens; this model has a context of "
            f"{hooked.n_ctx} and {int((frequencies > 0).sum())} ordinary tokens"
        )
    rng = np.random.default_rng(seed)
    n_lengths = min(n_sequences, N_LENGTHS, max(2, n_sequences // _PER_LENGTH))
    lengths = np.unique(np.linspace(max(4, longest // 4), longest, n_lengths).astype(int))
    groups = []
    for length, chosen in zip(lengths, np.array_split(np.arange(n_sequences), len(lengths)), strict=True):
        segment = np.stack([rng.choice(len(frequencies), int(length), replace=False, p=frequencies) for _ in chosen])
        rows = np.concatenate([segment, segment], axis=1)
        if bos is not None:
            rows = np.concatenate([np.full((len(rows), 1), bos), rows], axis=1)
        groups.append((int(length), hooked.check_tokens(rows)))
    return groups


def natural_tokens(hooked: Hooked, n_sequences: int, *, seed: int) -> tuple[str, Int[torch.Tensor, "batch pos"]]:
    """Sequences such as the model was trained on, and what they are.

    Held-out text of the model's grammar where it carries one; else built-in English sentences, cut to one length, where
    it has a tokenizer; else random repeated tokens.
    """
    info = model_info(hooked.model)
    if info is not None and info.grammar is not None:
        return "held-out text of the model's grammar", grammar_text(hooked, n_sequences, seed=seed)
    tokenizer = getattr(hooked.model, "tokenizer", None)
    if tokenizer is not None:
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in _TEXTS]
        bos = bos_token(hooked)
        prefix = [] if bos is None else [bos]
        length = min(hooked.n_ctx - len(prefix), *(len(row) for row in rows))
        return "built-in English sentences", hooked.check_tokens([prefix + row[:length] for row in rows])
    # The longest of N_LENGTHS equal groups: all its rows have one length.
    length, rows = random_repeats(hooked, n_sequences * N_LENGTHS, seed=seed)[-1]
    rows = rows[:n_sequences]
    return f"random tokens, a segment of {length} twice", rows


def grammar_text(hooked: Hooked, n_sequences: int, *, seed: int) -> Int[torch.Tensor, "batch pos"]:
    """Held-out ("test" split) rows of the grammar that the model carries, as long as its context allows."""
    info = model_info(hooked.model)
    assert info is not None
    assert info.grammar is not None
    corpus = info.grammar.corpus(n_sequences * hooked.n_ctx, seed=seed, context=hooked.n_ctx, split="test")
    return hooked.check_tokens(corpus.rows(0, n_sequences))

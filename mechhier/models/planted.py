"""Models whose circuit is known because it was written by hand, to calibrate every measure.

All are GPT-2 models of two heads a layer and two or three layers, so that they load through every route that trained
models take. `planted_builder` says how their weights are written. MLPs are zero, but for `planted_function_vector`'s,
whose units are conjunctions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from mechhier.models.planted_builder import SCORE_GAP, Builder

if TYPE_CHECKING:
    from mechhier.grammars import DocumentGrammar

# The attended token is written this much larger than the current one, so that it is the model's prediction.
_OUTPUT_SCALE = 4.0
# An MLP unit's input where its condition holds; minus that, or less, elsewhere. GELU's error at 10 is below 1e-6.
_UNIT_INPUT = 10.0
# What a verb's logit loses per id where the task is unknown: the guess is the first verb, not the rounding error's.
_TIE_BREAK = 1e-3


@dataclass(frozen=True)
class PlantedModel:
    """A model and what a sound measure must say of it."""

    model: GPT2LMHeadModel
    expected: Mapping[str, float]
    """Name of a score -> its value: of the planted head on `r r` with distinct tokens in `r`, unless the function that
    makes the model says something else."""
    heads: Mapping[str, tuple[int, int]]
    """Role -> (layer, head)."""


def planted_induction(vocab_size: int = 320, n_ctx: int = 128) -> PlantedModel:
    """A perfect induction head: head 0 of layer 1 attends to the token after earlier copies of the current one.

    Head 0 of layer 0 attends to the previous position and writes its token into a subspace of its own
    (K-composition). Where no earlier copy exists, the head attends uniformly to all positions but the first (which
    has no previous token); where there are several, equally to each. The model predicts the attended token.

    Args:
        vocab_size: Number of tokens; the model has `2 * (vocab_size + n_ctx)` dimensions.
        n_ctx: Longest sequence.
    """
    build = Builder(vocab_size, n_ctx)
    build.previous_token_head(2)
    query, key = build.maps(2)
    query[build.token, :vocab_size] = torch.eye(vocab_size) * build.gain(3)
    key[build.previous, :vocab_size] = torch.eye(vocab_size)
    # Position 0 wrote its own token as its "previous" one: push it below every other key, for every query.
    key[build.position.start, vocab_size] = -1.0
    value, output = build.copy_token(3, build.token, _OUTPUT_SCALE)
    build.head(1, query=query, key=key, value=value, output=output)
    with torch.no_grad():
        build.attention(1).c_attn.bias[vocab_size] = 2 * build.gain(3) * build.one_hot_size(3)
    return PlantedModel(
        build.model,
        expected={"IND": 1.0, "DUP": 0.0, "PREV": 1.0},
        heads={"induction": (1, 0), "previous_token": (0, 0)},
    )


def planted_duplicate(vocab_size: int = 320, n_ctx: int = 128) -> PlantedModel:
    """A perfect duplicate-token head: head 0 of layer 1 attends to earlier copies of the current token, not to itself.

    Where no earlier copy exists, it attends uniformly to all earlier positions; position 0 can only attend to itself.
    Layer 0 does nothing. The model predicts the attended token. Arguments as `planted_induction`.
    """
    build = Builder(vocab_size, n_ctx)
    query, key = build.maps(2)
    query[build.token, :vocab_size] = torch.eye(vocab_size) * build.gain(2)
    key[build.token, :vocab_size] = torch.eye(vocab_size)
    # The own position loses twice what a matching token gains.
    query[build.position, vocab_size:] = -2 * torch.eye(n_ctx) * build.gain(2)
    key[build.position, vocab_size:] = torch.eye(n_ctx)
    value, output = build.copy_token(2, build.token, _OUTPUT_SCALE)
    build.head(1, query=query, key=key, value=value, output=output)
    return PlantedModel(build.model, expected={"IND": 0.0, "DUP": 1.0}, heads={"duplicate_token": (1, 0)})


def planted_inert(vocab_size: int = 320, n_ctx: int = 128) -> PlantedModel:
    """A model whose heads do nothing: uniform attention over the past, zero output. Arguments: `planted_induction`."""
    build = Builder(vocab_size, n_ctx)
    return PlantedModel(build.model, expected={"IND_minus_uniform": 0.0, "DUP_minus_uniform": 0.0}, heads={})


def planted_backup(vocab_size: int = 320, n_ctx: int = 128, *, share: float = 0.7) -> PlantedModel:
    """A Hydra: when layer 0's attention is taken out, layer 1's writes `share` of what is missing.

    Head 0 of layer 0, the name mover, attends from everywhere to position 1 and writes its token, which the model
    predicts, and a flag. Head 0 of layer 1, the backup, attends to position 0 where it sees the flag, else to position
    1, and writes `share` of what the name mover writes. Sequences must begin with token 0, the sink, which has no value
    and is nowhere else, and have at least 8 tokens. MLPs are zero.

    `expected` is attention growth / -own change of layer 0's attention, `repair_share_*` by ablation. It follows from
    the weights, to 1e-4. Zero ablation alone takes the flag away: a resampled or a mean write still carries it, and the
    backup stays silent. A random perturbation of the same norm seldom hides the flag with the default sizes, but does
    so for one position in ten where the model has 80 dimensions.

    Args:
        vocab_size: Number of tokens; the model has `2 * (vocab_size + n_ctx)` dimensions.
        n_ctx: Longest sequence.
        share: What the backup writes, as a share of what it stands in for.

    Raises:
        ValueError: Sizes below 3, or a negative share.
    """
    if vocab_size < 3 or n_ctx < 3:
        raise ValueError(f"a sink, a name and a guess need sizes of at least 3, not {vocab_size} and {n_ctx}")
    if share < 0:
        raise ValueError(f"share must not be negative, got {share}")
    build = Builder(vocab_size, n_ctx)
    constant, flag, origin = build.constant(), build.subspace(1).start, build.subspace(1).start
    answer = build.previous  # No head of this model writes previous tokens.
    sink_position, name_position = build.position.start, build.position.start + 1
    names = slice(1, vocab_size)
    # Where layer 0 has written nothing, a token, a position and the constant.
    bare = build.one_hot_size(3)

    def copy_name(scale: float) -> tuple[Tensor, Tensor]:
        value, read = build.maps(2)
        value[names, names] = torch.eye(vocab_size - 1) * scale / bare
        read[answer, build.token] = torch.eye(vocab_size)
        return build.read_against(origin, value), read.T

    query, key = build.maps(2)
    key[name_position, 0] = 1.0
    value, output = copy_name(_OUTPUT_SCALE)
    output[build.token, flag] = 1.0
    build.head(0, query=query, key=build.read_against(origin, key), value=value, output=output)

    # Where layer 0 has written: the LayerNorm leaves least of the query and the key.
    least = build.norm_factor(1.0, 1.0, 1.0, _OUTPUT_SCALE, _OUTPUT_SCALE)
    query, key = build.maps(2)
    query[flag, 0], query[constant, 0] = 2 / _OUTPUT_SCALE, -1.0
    query *= SCORE_GAP * sqrt(build.d_head) / least**2
    key[sink_position, 0], key[name_position, 0] = 1.0, -1.0
    value, output = copy_name(share * _OUTPUT_SCALE)
    query, key = build.read_against(origin, query), build.read_against(origin, key)
    build.head(1, query=query, key=key, value=value, output=output)
    with torch.no_grad():
        build.attention(0).c_attn.bias[0] = SCORE_GAP * sqrt(build.d_head) / bare
        build.model.lm_head.weight[:, answer] = torch.eye(vocab_size)
    return PlantedModel(
        build.model,
        expected={"repair_share_zero": share, "repair_share_mean": 0.0, "repair_share_resample": 0.0},
        heads={"name_mover": (0, 0), "backup": (1, 0)},
    )


def planted_function_vector(grammar: DocumentGrammar, n_ctx: int = 64) -> PlantedModel:
    """A model that carries out "the verb of this subject" in whichever lexicon of a pool the prompt demonstrates.

    Layer 0's head 0 writes the previous token; its MLP has a unit for every lexicon t and subject s that sees s at the
    previous and t's verb of s at the current position, and writes evidence for t. Head 0 of layer 1, the function-vector
    head, attends uniformly and writes `4 x (share of positions with evidence for t)` in a direction of t's own: 4k/(4k + 1)
    after k demonstrations of t, at most a few tenths by coincidence. Layer 2's MLP has a unit for every t and s that
    sees s and more than half of t's direction, and writes t's verb of s. Without a task the model gives every verb the
    same probability (the first a little more, so that its guess is always that one).

    `expected`, to 0.03, on `grammar_tasks(grammar)`: `AIE` of the head (every other head: 0), `accuracy_clean`,
    `P_shuffled` (the answer's probability on shuffled prompts), and `accuracy_injected` of a task's vector in a zero-shot
    prompt: at layers 0 and 1; at layer 2 it is too late.

    Args:
        grammar: A document language with a pool of lexicons and binding 1. The MLPs have a unit for every lexicon and
            word.
        n_ctx: Longest sequence.

    Raises:
        ValueError: The grammar has no pool, or its ranks are not tied.
    """
    if not isinstance(grammar.lexicon, int) or grammar.binding != 1:
        raise ValueError(
            f"a function to carry needs a pool of lexicons and binding=1; the grammar has lexicon={grammar.lexicon!r} and "
            f"binding={grammar.binding}"
        )
    lexicons = torch.tensor(grammar.lexicons)
    n_tasks, _, n_words = lexicons.shape
    subjects, verbs = slice(0, n_words), slice(n_words, 2 * n_words)
    n_units = n_tasks * n_words
    build = Builder(grammar.vocab_size, n_ctx, n_layers=3, n_units=n_units, n_extra=2 * n_tasks + n_words + 2)
    constant, origin = build.constant(), build.subspace(1).start
    evidence, task, answer = build.subspace(n_tasks), build.subspace(n_tasks), build.subspace(n_words)
    unit = torch.arange(n_units)
    unit_task = unit // n_words
    unit_subject, unit_verb = lexicons[:, 0].reshape(-1), lexicons[:, 1].reshape(-1)

    def conjunction(first: Tensor, second: Tensor, norm_factor: float) -> Tensor:
        """Units whose input is `_UNIT_INPUT` where both of two dimensions are 1, and minus that where one is."""
        read = torch.zeros(build.d_model, n_units)
        read[first, unit] = read[second, unit] = 1.0
        read[constant] = -1.5
        return build.read_against(origin, read) * 2 * _UNIT_INPUT / norm_factor

    def writing(dimensions: Tensor, size: float) -> Tensor:
        write = torch.zeros(n_units, build.d_model)
        write[unit, dimensions] = size / _UNIT_INPUT
        return write

    build.previous_token_head(3)
    # Token, position, constant and previous token.
    build.mlp(
        0,
        read=conjunction(build.previous.start + unit_subject, unit_verb, build.one_hot_size(4)),
        write=writing(evidence.start + unit_task, 1.0),
    )

    # One token in four is a verb, and its residual holds the evidence as a fifth 1.
    query, key, value, read = build.maps(4)
    value[evidence, :n_tasks] = torch.eye(n_tasks) * 4 / build.one_hot_size(5)
    read[task, :n_tasks] = torch.eye(n_tasks)
    build.head(1, query=query, key=key, value=build.read_against(origin, value), output=read.T)

    build.mlp(
        2,
        read=conjunction(unit_subject, task.start + unit_task, build.one_hot_size(5)),
        write=writing(answer.start + unit_verb - verbs.start, _OUTPUT_SCALE),
    )
    with torch.no_grad():
        unembedding = build.model.lm_head.weight
        unembedding.zero_()
        unembedding[verbs, answer] = torch.eye(n_words)
        unembedding[verbs, subjects] = 1 - _TIE_BREAK * torch.arange(n_words)[:, None].expand(-1, n_words)
    return PlantedModel(
        build.model,
        expected={
            "AIE": 1 - 1 / n_words,
            "accuracy_clean": 1.0,
            "P_shuffled": 1 / n_words,
            "accuracy_injected": 1.0,
        },
        heads={"previous_token": (0, 0), "function_vector": (1, 0)},
    )

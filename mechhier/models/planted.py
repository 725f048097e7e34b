"""Models whose circuit is known because it was written by hand, to calibrate every measure.

All are two-layer, two-head GPT-2 models, so that they load through every route that trained models take. The residual
stream holds four one-hot subspaces: the token, the position, the previous token (written by a head) and padding. A
LayerNorm of a sum of one-hots is the same sum rescaled, minus a constant that is equal in all dimensions; the
constant moves all of a query's scores alike, so it drops out of the softmax, and a large gain makes attention one-hot
to within exp(-50). MLPs are zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

# A score this far below the best one gets an attention of exp(-50) = 2e-22.
_SCORE_GAP = 50.0
# The attended token is written this much larger than the current one, so that it is the model's prediction.
_OUTPUT_SCALE = 4.0


@dataclass(frozen=True)
class PlantedModel:
    """A model and what a sound measure must say of it."""

    model: GPT2LMHeadModel
    expected: Mapping[str, float]
    """Name of a score on `r r` with distinct tokens in `r` -> its value, for the planted head."""
    heads: Mapping[str, tuple[int, int]]
    """Role -> (layer, head)."""


class _Builder:
    """An all-zero GPT-2 with one-hot embeddings, and the subspaces to write heads in."""

    def __init__(self, vocab_size: int, n_ctx: int) -> None:
        if vocab_size < 2 or n_ctx < 2:
            raise ValueError(f"vocab_size and n_ctx must be at least 2, not {vocab_size} and {n_ctx}")
        self.d_head = vocab_size + n_ctx
        self.d_model = 2 * self.d_head
        self.token = slice(0, vocab_size)
        self.position = slice(vocab_size, self.d_head)
        self.previous = slice(self.d_head, self.d_head + vocab_size)
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=n_ctx,
            n_embd=self.d_model,
            n_layer=2,
            n_head=2,
            n_inner=self.d_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
        )
        self.model = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
            self.model.transformer.wte.weight[:, self.token] = torch.eye(vocab_size)
            self.model.transformer.wpe.weight[:, self.position] = torch.eye(n_ctx)
            self.model.lm_head.weight[:, self.token] = torch.eye(vocab_size)

    def attention(self, layer: int) -> Any:
        """The attention module of a layer."""
        return self.model.transformer.h[layer].attn  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]

    def one_hot_size(self, n_ones: int) -> float:
        """What the LayerNorm makes of each 1 in a residual of `n_ones` ones, relative to the zeros."""
        mean = n_ones / self.d_model
        return 1 / sqrt(mean * (1 - mean))

    def head(self, layer: int, *, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Write head 0 of a layer: the maps are [d_model, d_head], the output [d_head, d_model]."""
        attention = self.attention(layer)
        with torch.no_grad():
            for part, weight in enumerate((query, key, value)):
                start = part * self.d_model
                attention.c_attn.weight[:, start : start + self.d_head] = weight
            attention.c_proj.weight[: self.d_head] = output

    def maps(self, n: int) -> list[Tensor]:
        return [torch.zeros(self.d_model, self.d_head) for _ in range(n)]

    def gain(self, n_ones: int) -> float:
        """The query weight for which one matching one-hot raises the attention score by the gap."""
        return _SCORE_GAP * sqrt(self.d_head) / self.one_hot_size(n_ones) ** 2

    def copy_token(self, n_ones: int, target: slice, scale: float) -> tuple[Tensor, Tensor]:
        """Value and output maps that write the attended token's one-hot, `scale` large, into the target subspace."""
        value, read = self.maps(2)
        size = self.token.stop
        value[self.token, :size] = torch.eye(size) * scale / self.one_hot_size(n_ones)
        read[target, :size] = torch.eye(size)
        return value, read.T


def planted_induction(vocab_size: int = 320, n_ctx: int = 128) -> PlantedModel:
    """A perfect induction head: head 0 of layer 1 attends to the token after earlier copies of the current one.

    Head 0 of layer 0 attends to the previous position and writes its token into a subspace of its own
    (K-composition). Where no earlier copy exists, the head attends uniformly to all positions but the first (which
    has no previous token); where there are several, equally to each. The model predicts the attended token.

    Args:
        vocab_size: Number of tokens; the model has `2 * (vocab_size + n_ctx)` dimensions.
        n_ctx: Longest sequence.
    """
    build = _Builder(vocab_size, n_ctx)
    query, key = build.maps(2)
    # Position t asks for position t - 1; position 0 can only attend to itself.
    query[build.position, :n_ctx] = torch.eye(n_ctx).roll(-1, dims=1) * build.gain(2)
    query[build.position.start, :] = 0.0
    key[build.position, :n_ctx] = torch.eye(n_ctx)
    value, output = build.copy_token(2, build.previous, 1.0)
    build.head(0, query=query, key=key, value=value, output=output)

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
    build = _Builder(vocab_size, n_ctx)
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
    build = _Builder(vocab_size, n_ctx)
    return PlantedModel(build.model, expected={"IND_minus_uniform": 0.0, "DUP_minus_uniform": 0.0}, heads={})

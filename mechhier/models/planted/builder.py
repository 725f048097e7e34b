"""GPT-2 models with all-zero weights, and the means to write heads and MLPs into them by hand.

The residual stream holds one-hot subspaces: the token, the position, the previous token (written by a head) and
padding, in which a model may keep more. A LayerNorm of a sum of one-hots is the same sum rescaled, minus a constant
that is equal in all dimensions; the constant moves all of a query's scores alike, so it drops out of the softmax
(elsewhere, what is read is read against a dimension that is always zero), and a large gain makes attention one-hot to
within exp(-50).
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

SCORE_GAP = 50.0
"""A score this far below the best one gets an attention of exp(-50) = 2e-22."""
CARRIER = 1000.0
"""A constant that outweighs everything else in a residual stream; float32 still resolves a 1 beside it to 1e-6."""


class Builder:
    """An all-zero GPT-2 with one-hot embeddings, and the subspaces to write heads in."""

    def __init__(
        self,
        vocab_size: int,
        n_ctx: int,
        *,
        min_vocab_size: int = 4,
        n_layers: int = 2,
        n_units: int | None = None,
        n_extra: int = 0,
    ) -> None:
        for name, size, least in (
            ("vocab_size", vocab_size, min_vocab_size),
            ("n_ctx", n_ctx, 8),
            ("n_layers", n_layers, 1),
        ):
            if not isinstance(size, int) or size < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {size!r}")
        self.d_head = vocab_size + max(n_ctx, n_extra)
        self.d_model = 2 * self.d_head
        self.token = slice(0, vocab_size)
        self.position = slice(vocab_size, vocab_size + n_ctx)
        self.previous = slice(self.d_head, self.d_head + vocab_size)
        self._n_used = self.previous.stop
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=n_ctx,
            n_embd=self.d_model,
            n_layer=n_layers,
            n_head=2,
            n_inner=n_units or self.d_head,
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

    def block(self, layer: int) -> Any:
        """The module of a layer."""
        return self.model.transformer.h[layer]  # pyright: ignore[reportIndexIssue]

    def attention(self, layer: int) -> Any:
        """The attention module of a layer."""
        return self.block(layer).attn

    def subspace(self, size: int) -> slice:
        """The next unused dimensions of the padding."""
        start = self._n_used
        self._n_used += size
        assert self._n_used <= self.d_model
        return slice(start, self._n_used)

    def constant(self, size: float = 1.0) -> int:
        """A dimension with one value at every position: what a threshold is set against, whatever the LayerNorm's scale."""
        dimension = self.subspace(1).start
        with torch.no_grad():
            self.model.transformer.wpe.weight[:, dimension] = size
        return dimension

    def carrier(self) -> float:
        """Make every LayerNorm the same fixed factor, and return that factor.

        A constant of `CARRIER` in one dimension outweighs whatever else the residual stream holds: writes of size 1 move
        the LayerNorm's scale by less than 1e-5. Everything but attention patterns is then linear in the residual stream.
        """
        self.constant(CARRIER)
        # A token and a position.
        return self.norm_factor(CARRIER, 1.0, 1.0)

    def read_against(self, origin: int, maps: Tensor) -> Tensor:
        """Maps whose columns sum to zero, so that the LayerNorm's mean drops out; `origin` is always 0 in the residual."""
        maps[origin] -= maps.sum(0)
        return maps

    def norm_factor(self, *entries: float) -> float:
        """What the LayerNorm multiplies a residual by that holds these entries and zeros."""
        mean = sum(entries) / self.d_model
        variance = sum(entry**2 for entry in entries) / self.d_model - mean**2
        return 1 / sqrt(variance + self.model.config.layer_norm_epsilon)

    def one_hot_size(self, n_ones: int) -> float:
        """What the LayerNorm makes of each 1 in a residual of `n_ones` ones, relative to the zeros."""
        return self.norm_factor(*[1.0] * n_ones)

    def head(self, layer: int, *, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Write head 0 of a layer: the maps are [d_model, d_head], the output [d_head, d_model]."""
        attention = self.attention(layer)
        with torch.no_grad():
            for part, weight in enumerate((query, key, value)):
                start = part * self.d_model
                attention.c_attn.weight[:, start : start + self.d_head] = weight
            attention.c_proj.weight[: self.d_head] = output

    def mlp(self, layer: int, *, read: Tensor, write: Tensor) -> None:
        """Write the MLP of a layer: units read [d_model, n_units] and write [n_units, d_model]."""
        mlp = self.block(layer).mlp
        with torch.no_grad():
            mlp.c_fc.weight.copy_(read)
            mlp.c_proj.weight.copy_(write)

    def linear_mlp(self, layer: int, *, origin: int, source: slice, target: slice, gain: float) -> None:
        """The MLP writes `gain` times what its LayerNorm makes of one subspace into another of the same size.

        A pair of units per dimension: GELU(x) - GELU(-x) = x, exactly, for GELU is x times an odd function plus 1/2.
        """
        size = source.stop - source.start
        read, write = torch.zeros(self.d_model, 2 * size), torch.zeros(2 * size, self.d_model)
        read[source] = torch.cat([torch.eye(size), -torch.eye(size)], dim=1)
        write[:, target] = torch.cat([torch.eye(size), -torch.eye(size)]) * gain
        self.mlp(layer, read=self.read_against(origin, read), write=write)

    def previous_token_head(self, n_ones: int) -> None:
        """Head 0 of layer 0 writes the token of position t - 1 into `previous`; position 0 can only attend to itself."""
        n_ctx = self.position.stop - self.position.start
        query, key = self.maps(2)
        query[self.position, :n_ctx] = torch.eye(n_ctx).roll(-1, dims=1) * self.gain(n_ones)
        query[self.position.start, :] = 0.0
        key[self.position, :n_ctx] = torch.eye(n_ctx)
        value, output = self.copy_token(n_ones, self.previous, 1.0)
        self.head(0, query=query, key=key, value=value, output=output)

    def maps(self, n: int) -> list[Tensor]:
        """Query, key, value or transposed output maps to fill: `n` of zeros, [d_model, d_head]."""
        return [torch.zeros(self.d_model, self.d_head) for _ in range(n)]

    def gain(self, n_ones: int) -> float:
        """The query weight for which one matching one-hot raises the attention score by the gap."""
        return SCORE_GAP * sqrt(self.d_head) / self.one_hot_size(n_ones) ** 2

    def copy_token(self, n_ones: int, target: slice, scale: float) -> tuple[Tensor, Tensor]:
        """Value and output maps that write the attended token's one-hot, `scale` large, into the target subspace."""
        value, read = self.maps(2)
        size = self.token.stop
        value[self.token, :size] = torch.eye(size) * scale / self.one_hot_size(n_ones)
        read[target, :size] = torch.eye(size)
        return value, read.T

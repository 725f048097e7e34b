"""Where every head looks, and what the model loses, on random repeats and on text: one forward pass over each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechhier.models.hooked import Hooked
from mechhier.phenomena._tokens import bos_token
from mechhier.phenomena.induction.losses import token_losses

WITH_CATEGORY_NULL = ("IND_text", "DUP_text", "NEXT_text")
"""Scores that syntax alone can raise; ROLE_text measures syntax, so that it has no such null."""


@dataclass(frozen=True)
class Sums:
    """Per sequence, sums over the queries that count."""

    attention: Float[np.ndarray, "sequence layer head"]
    uniform: Float[np.ndarray, " sequence"]
    """Of a head that attends uniformly."""
    n_queries: Float[np.ndarray, " sequence"]
    category_null: Float[np.ndarray, "sequence layer head"] | None = None
    """Of each head, if it attended uniformly within every syntactic category; None without categories."""
    lengths: Int[np.ndarray, " sequence"] | None = None
    """Of the repeats: chance depends on them, and they are laid out, not drawn. None on text."""


def on_repeats(
    hooked: Hooked, groups: list[tuple[int, Int[Tensor, "batch pos"]]], advance: Callable[..., None]
) -> tuple[dict[str, Sums], list[Float[np.ndarray, "sequence token"]]]:
    """`IND`, `DUP`, `PREV` on groups of random repeats, and the loss on every token after the first, by group.

    Args:
        hooked: The model.
        groups: From `random_repeats`.
        advance: Told the number of sequences done.

    Cost: one forward pass; memory beyond it one layer's pattern of one batch.
    """
    parts: dict[str, list[Sums]] = {"IND": [], "DUP": [], "PREV": []}
    losses = []
    offset = int(bos_token(hooked) is not None)
    for length, rows in groups:
        second = torch.arange(offset + length, offset + 2 * length, device=rows.device)
        later = torch.arange(1, rows.shape[1], device=rows.device)
        pairs = {"IND": (second, second - length + 1), "DUP": (second, second - length), "PREV": (later, later - 1)}
        of_group = []
        for part in torch.arange(len(rows)).split(hooked.batch_size(rows.shape[1])):
            batch = rows[part]

            def diagonals(
                pattern: Float[Tensor, "batch head query key"], pairs: dict[str, tuple[Tensor, Tensor]] = pairs
            ) -> Float[Tensor, "score batch head"]:
                return torch.stack([pattern[:, :, q, k].sum(-1) for q, k in pairs.values()])

            per_layer, logits = _reduce_with_logits(hooked, batch, part, diagonals)
            attention = torch.stack(per_layer, dim=2).cpu().double().numpy()
            for name, of_score in zip(pairs, attention, strict=True):
                q, _ = pairs[name]
                uniform = float((1.0 / (q.cpu() + 1).double()).sum())
                each = np.ones(len(batch))
                lengths = np.full(len(batch), length)
                parts[name].append(Sums(of_score, uniform * each, len(q) * each, lengths=lengths))
            of_group.append(token_losses(logits, batch))
            advance(len(batch))
        losses.append(np.concatenate(of_group))
    return {name: _concatenate(found) for name, found in parts.items()}, losses


def text_keys(
    tokens: Int[Tensor, "batch pos"],
    categories: Int[Tensor, "batch pos"] | None = None,
    *,
    first_query: int = 0,
) -> dict[str, Bool[Tensor, "batch query key"]]:
    """Which keys count for each text score: `IND_text`, `DUP_text`, `NEXT_text`, and `ROLE_text` with categories.

    The last position has no next token and is left out as a query; a key may be the query itself only where that is
    the token asked for (a repeated token).

    Args:
        tokens: Token ids.
        categories: Syntactic category of every token.
        first_query: Leave out the queries before this position.

    Returns:
        Masks over the queries `first_query` to pos - 2 and the keys 0 to pos - 2.
    """
    length = tokens.shape[1] - 1
    places = torch.arange(length, device=tokens.device)
    queries = places[first_query:, None]

    def equal(ids: Int[Tensor, "batch pos"], wanted: Int[Tensor, "batch query"]) -> Bool[Tensor, "batch query key"]:
        return rearrange(wanted, "batch query -> batch query 1") == rearrange(ids[:, :-1], "batch key -> batch 1 key")

    def followers(earlier: Bool[Tensor, "batch query key"]) -> Bool[Tensor, "batch query key"]:
        return torch.nn.functional.pad(earlier[:, :, :-1], (1, 0))

    copies = equal(tokens, tokens[:, first_query:-1]) & (places < queries)
    keys = {
        "IND_text": followers(copies),
        "DUP_text": copies,
        "NEXT_text": equal(tokens, tokens[:, first_query + 1 :]) & (places <= queries),
    }
    if categories is not None:
        keys["ROLE_text"] = followers(equal(categories, categories[:, first_query:-1]) & (places < queries))
    return keys


def on_text(
    hooked: Hooked,
    tokens: Int[Tensor, "batch pos"],
    categories: Int[np.ndarray, "batch pos"] | None,
    advance: Callable[..., None],
) -> tuple[dict[str, Sums], Float[np.ndarray, "sequence token"]]:
    """The text scores over the queries of the second half, and the loss on every token after the first.

    Cost: one forward pass; memory beyond it is one layer's pattern of one batch (with four heads or more).

    Raises:
        ValueError: Sequences of fewer than 3 tokens.
    """
    parts: dict[str, list[Sums]] = {}
    losses = []
    length = tokens.shape[1] - 1
    if length < 2:
        raise ValueError(f"text scores need sequences of at least 3 tokens, got {tokens.shape[1]}")
    first = length // 2
    per_key = 1.0 / torch.arange(first + 1, length + 1).double()
    all_categories = None if categories is None else torch.as_tensor(np.array(categories), device=tokens.device)
    size = hooked.batch_size(tokens.shape[1])
    for start in range(0, len(tokens), size):
        batch = tokens[start : start + size]
        of_batch = None if all_categories is None else all_categories[start : start + size]
        keys = text_keys(batch, of_batch, first_query=first)
        weights, names = _weights(keys, of_batch)

        def masses(
            pattern: Float[Tensor, "batch head query key"], weights: Tensor = weights
        ) -> Float[Tensor, "batch head score"]:
            # Whole rows of the pattern, so that it is read in place; the weight of the last key is zero.
            late = pattern[:, :, first:-1].flatten(2)
            return late @ weights.transpose(1, 2)

        per_layer, logits = _reduce_with_logits(hooked, batch, torch.arange(start, start + len(batch)), masses)
        found = torch.stack(per_layer, dim=1).cpu().double().numpy()
        for name, mask in keys.items():
            attention = found[..., names.index(name)]
            null = found[..., names.index(f"{name}_null")] if f"{name}_null" in names else None
            uniform = (mask.sum(-1).cpu() * per_key).sum(-1).numpy()
            n_queries = mask.any(-1).sum(-1).cpu().double().numpy()
            parts.setdefault(name, []).append(Sums(attention, uniform, n_queries, null))
        losses.append(token_losses(logits, batch))
        advance(len(batch))
    return {name: _concatenate(found) for name, found in parts.items()}, np.concatenate(losses)


def _reduce_with_logits(
    hooked: Hooked, tokens: Int[Tensor, "batch pos"], rows: Int[Tensor, " batch"], reduce: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], Float[Tensor, "batch pos d_vocab"]]:
    """As `mechhier.probes.reduce_patterns`, with the logits of the same pass."""
    reduced: list[Tensor] = []

    def read(pattern: Tensor) -> None:
        reduced.append(reduce(pattern.float()))

    logits = hooked.run(tokens, [("pattern", layer, read) for layer in range(hooked.n_layers)], rows=rows)
    return reduced, logits


def _weights(
    keys: dict[str, Bool[Tensor, "batch query key"]], categories: Int[Tensor, "batch pos"] | None
) -> tuple[Float[Tensor, "batch score query_and_key"], list[str]]:
    """What the attention to each key counts for each score, so that all scores are one product with the pattern.

    For a score's category null that is the share of the key's category that counts for the score.
    """
    names = list(keys) + ([] if categories is None else [f"{name}_null" for name in WITH_CATEGORY_NULL])
    batch, n_queries, n_keys = next(iter(keys.values())).shape
    device = next(iter(keys.values())).device
    weights = torch.zeros(batch, len(names), n_queries, n_keys + 1, device=device)
    for place, mask in enumerate(keys.values()):
        weights[:, place, :, :-1] = mask
    if categories is not None:
        kinds = categories[:, :-1].long()
        of_category = torch.nn.functional.one_hot(kinds, int(kinds.max()) + 1).float()
        seen = of_category.cumsum(dim=1)[:, -n_queries:].clamp(min=1.0)
        index = kinds[:, None].expand(-1, n_queries, -1)
        for name in WITH_CATEGORY_NULL:
            share = weights[:, names.index(name), :, :-1] @ of_category / seen
            weights[:, names.index(f"{name}_null"), :, :-1] = share.gather(2, index)
    return weights.flatten(2), names


def _concatenate(parts: list[Sums]) -> Sums:
    nulls = [part.category_null for part in parts if part.category_null is not None]
    lengths = [part.lengths for part in parts if part.lengths is not None]
    return Sums(
        attention=np.concatenate([part.attention for part in parts]),
        uniform=np.concatenate([part.uniform for part in parts]),
        n_queries=np.concatenate([part.n_queries for part in parts]),
        category_null=np.concatenate(nulls) if nulls else None,
        lengths=np.concatenate(lengths) if lengths else None,
    )

"""Induction heads: attention to what followed last time, on random repeats and on the model's own kind of text."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechhier.models.loading import model_info
from mechhier.phenomena._provenance import provenance
from mechhier.phenomena._tokens import bos_token, grammar_text, random_repeats
from mechhier.probes.attention import reduce_patterns
from mechhier.probes.hooked import Hooked
from mechhier.results import Variables, best_of, mean_interval, scored

DEFINITION = (
    "Mean attention A[q, k]. On random repeats [BOS] r r with |r| = n, q in the second copy: IND = A[q, q-n+1], "
    "DUP = A[q, q-n]; PREV = A[t, t-1] over all t. On text, over queries in the second half that have such a key: "
    "IND_text = mass on tokens that follow an earlier copy of the current token, DUP_text = mass on earlier copies of "
    "it, NEXT_text = mass on copies of the true next token."
)
SOURCE = "Olsson et al. 2022, In-context Learning and Induction Heads; Elhage et al. 2021; text scores: mechhier"

_LONG_NAMES = {
    "IND": "attention to the token after the earlier copy",
    "DUP": "attention to the earlier copy",
    "PREV": "attention to the previous token",
    "IND_text": "attention to tokens after an earlier copy, on text",
    "DUP_text": "attention to earlier copies of the current token, on text",
    "NEXT_text": "attention to copies of the true next token, on text",
}

Sums = tuple[Float[np.ndarray, "sequence layer head"], Float[np.ndarray, " sequence"], Float[np.ndarray, " sequence"]]
"""Per sequence: summed attention by head, summed attention of a uniform head, number of queries."""


def induction(
    model: Any, tokens: Int[Any, "batch pos"] | None = None, *, n_sequences: int = 64, seed: int = 0
) -> xr.Dataset:
    """Attention scores of every head for induction, duplicate tokens and the previous token.

    Random repeats are far out of distribution for a small grammar model; the text scores are what it can show on the
    language it knows. Each score stands next to what uniform attention would score on the same queries.

    Cost: one forward pass over the random repeats and one over the text; memory beyond it is one layer's pattern.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        tokens: Text to score in distribution, token ids without padding. By default held-out text of the grammar that
            the model was trained on; without a grammar the text scores are left out.
        n_sequences: Number of random-repeat sequences, and of text sequences drawn from the grammar; at least 4.
        seed: Seed of everything drawn.

    Returns:
        `IND`, `DUP`, `PREV` and, with text, `IND_text`, `DUP_text`, `NEXT_text`, each `[layer, head]`, attention mass in
        [0, 1], with `_low`, `_high` (95 %, bootstrap over sequences) and the scalar `_uniform`. `X_best` is the score,
        on every other sequence, of the head (`X_best_layer`, `X_best_head`) that scored highest on the rest.

    Raises:
        TypeError: Not a hooked model.
        ValueError: Tokens that the model cannot take, or too few sequences.

    Example:
        >>> import mechhier as mh
        >>> planted = mh.models.planted.planted_induction()
        >>> result = mh.phenomena.induction(mh.load_model(planted.model), n_sequences=8)
        >>> bool(result.IND.sel(layer=1, head=0) > 0.99)
        True
    """
    if n_sequences < 4:
        raise ValueError(f"n_sequences must be at least 4, so that both halves have an interval, got {n_sequences}")
    hooked = Hooked(model)
    info = model_info(model)
    text = None
    if tokens is not None:
        text = hooked.check_tokens(tokens)
        text_source = "given by the caller"
    elif info is not None and info.grammar is not None:
        text = grammar_text(hooked, n_sequences, seed=seed)
        text_source = "held-out text of the model's grammar"
    else:
        text_source = "none: the model carries no grammar and no tokens were given"

    scores = _on_repeats(hooked, n_sequences, seed=seed)
    if text is not None:
        scores |= _on_text(hooked, text)
    variables: Variables = {}
    for name, sums in scores.items():
        variables |= _describe(name, sums, seed=seed)
    return xr.Dataset(
        variables,
        coords={"layer": np.arange(hooked.n_layers), "head": np.arange(hooked.n_heads)},
        attrs=provenance(
            hooked,
            phenomenon="induction",
            definition=DEFINITION,
            source=SOURCE,
            ablation="none",
            seed=seed,
            n_sequences=n_sequences,
            n_text_sequences=0 if text is None else len(text),
            text=text_source,
        ),
    )


def _describe(name: str, sums: Sums, *, seed: int) -> Variables:
    attention, uniform, counts = sums
    long_name, units = _LONG_NAMES[name], "attention mass"
    counts_by_head = counts[:, None, None]
    variables = scored(name, ("layer", "head"), attention, counts_by_head, long_name=long_name, units=units, seed=seed)
    baseline, _, _ = mean_interval(uniform, counts, seed=seed)
    variables[f"{name}_uniform"] = ((), baseline, {"long_name": f"{long_name}, uniform attention", "units": units})
    layer, head, best_sums, best_counts = best_of(attention, counts_by_head)
    variables |= scored(
        f"{name}_best",
        (),
        best_sums,
        best_counts,
        long_name=f"{long_name}, head chosen on the other half",
        units=units,
        seed=seed,
    )
    for which, index in (("layer", layer), ("head", head)):
        label = {"long_name": f"{which} of the head chosen for {name}", "units": "index"}
        variables[f"{name}_best_{which}"] = ((), np.asarray(index), label)
    return variables


def _on_repeats(hooked: Hooked, n_sequences: int, *, seed: int) -> dict[str, Sums]:
    parts: dict[str, list[Sums]] = {"IND": [], "DUP": [], "PREV": []}
    offset = int(bos_token(hooked) is not None)
    for length, rows in random_repeats(hooked, n_sequences, seed=seed):
        second = torch.arange(offset + length, offset + 2 * length, device=rows.device)
        queries = {"IND": (second, second - length + 1), "DUP": (second, second - length)}
        later = torch.arange(1, rows.shape[1], device=rows.device)
        queries["PREV"] = (later, later - 1)
        for batch in rows.split(hooked.batch_size(rows.shape[1])):

            def diagonals(
                pattern: Float[Tensor, "batch head query key"],
                queries: dict[str, tuple[Tensor, Tensor]] = queries,
            ) -> dict[str, Float[Tensor, "batch head"]]:
                return {name: pattern[:, :, q, k].sum(-1).cpu() for name, (q, k) in queries.items()}

            per_layer = reduce_patterns(hooked, batch, diagonals)
            for name, (q, _) in queries.items():
                attention = torch.stack([layer[name] for layer in per_layer], dim=1).double().numpy()
                uniform = float((1.0 / (q + 1).double()).sum())
                parts[name].append((attention, np.full(len(batch), uniform), np.full(len(batch), float(len(q)))))
    return {name: _concatenate(found) for name, found in parts.items()}


def text_keys(tokens: Int[Tensor, "batch pos"]) -> dict[str, Bool[Tensor, "batch query key"]]:
    """Which keys count for each text score: `IND_text`, `DUP_text`, `NEXT_text`.

    The last position has no next token and is left out as a query; a key may be the query itself only where that is
    the token asked for (a repeated token).
    """
    current = tokens[:, :-1]
    length = current.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    same = rearrange(current, "batch query -> batch query 1") == rearrange(current, "batch key -> batch 1 key")
    earlier_copy = same & causal.tril(-1)
    after_copy = torch.zeros_like(earlier_copy)
    after_copy[:, :, 1:] = earlier_copy[:, :, :-1]
    is_next = rearrange(tokens[:, 1:], "batch query -> batch query 1") == rearrange(current, "batch key -> batch 1 key")
    return {"IND_text": after_copy, "DUP_text": earlier_copy, "NEXT_text": is_next & causal}


def _on_text(hooked: Hooked, tokens: Int[Tensor, "batch pos"]) -> dict[str, Sums]:
    parts: dict[str, list[Sums]] = {"IND_text": [], "DUP_text": [], "NEXT_text": []}
    length = tokens.shape[1] - 1
    if length < 2:
        raise ValueError(f"text scores need sequences of at least 3 tokens, got {tokens.shape[1]}")
    late = torch.arange(length, device=tokens.device) >= length // 2
    per_key = 1.0 / torch.arange(1, length + 1, device=tokens.device).double()
    for batch in tokens.split(hooked.batch_size(tokens.shape[1])):
        keys = {name: mask & late[:, None] for name, mask in text_keys(batch).items()}
        weights = {name: mask.float() for name, mask in keys.items()}

        def masses(
            pattern: Float[Tensor, "batch head query key"], weights: dict[str, Tensor] = weights
        ) -> dict[str, Float[Tensor, "batch head"]]:
            inner = pattern[:, :, :-1, :-1]
            return {name: torch.einsum("bhqk,bqk->bh", inner, weight).cpu() for name, weight in weights.items()}

        per_layer = reduce_patterns(hooked, batch, masses)
        for name, mask in keys.items():
            attention = torch.stack([layer[name] for layer in per_layer], dim=1).double().numpy()
            uniform = (mask.sum(-1) * per_key).sum(-1).cpu().numpy()
            counts = mask.any(-1).sum(-1).double().cpu().numpy()
            parts[name].append((attention, uniform, counts))
    return {name: _concatenate(found) for name, found in parts.items()}


def _concatenate(parts: list[Sums]) -> Sums:
    attention, uniform, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return attention, uniform, counts

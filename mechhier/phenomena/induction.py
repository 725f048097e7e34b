"""Induction heads: attention to what followed last time, on random repeats and on the model's own kind of text."""

from __future__ import annotations

from dataclasses import dataclass
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
    "it, NEXT_text = mass on copies of the true next token. X_null = the head's own mass on every syntactic category, "
    "spread evenly over the category's tokens so far: what syntax alone would score. Best heads: largest excess over it."
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


@dataclass(frozen=True)
class _Sums:
    """Per sequence, sums over the queries that count."""

    attention: Float[np.ndarray, "sequence layer head"]
    uniform: Float[np.ndarray, " sequence"]
    """Of a head that attends uniformly."""
    n_queries: Float[np.ndarray, " sequence"]
    category_null: Float[np.ndarray, "sequence layer head"] | None = None
    """Of each head, if it attended uniformly within every syntactic category; None without a grammar."""


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
        [0, 1], with `_low`, `_high` (95 %, bootstrap over sequences) and the scalar `_uniform`. With a grammar the text
        scores also have `_null` `[layer, head]`: what the head would score if it knew syntax alone. `X_best` is the
        score, on every other sequence, of the head (`X_best_layer`, `X_best_head`) that scored highest on the rest, above
        its `_null` where there is one (then also `X_best_null`).

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
        categories = None if info is None or info.grammar is None else info.grammar.token_categories
        scores |= _on_text(hooked, text, categories)
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


def _describe(name: str, sums: _Sums, *, seed: int) -> Variables:
    long_name, units, dims = _LONG_NAMES[name], "attention mass", ("layer", "head")
    counts = sums.n_queries[:, None, None]
    variables = scored(name, dims, sums.attention, counts, long_name=long_name, units=units, seed=seed)
    baseline, _, _ = mean_interval(sums.uniform, sums.n_queries, seed=seed)
    variables[f"{name}_uniform"] = ((), baseline, {"long_name": f"{long_name}, uniform attention", "units": units})
    null = np.zeros_like(sums.attention) if sums.category_null is None else sums.category_null
    layer, head, halves = best_of(sums.attention - null, counts)
    chosen = sums.attention[halves, layer, head], sums.n_queries[halves]
    best = f"{name}_best"
    variables |= scored(
        best, (), *chosen, long_name=f"{long_name}, head chosen on the other half", units=units, seed=seed
    )
    if sums.category_null is not None:
        label = f"{long_name}, syntax alone"
        value, _, _ = mean_interval(null, counts, seed=seed)
        variables[f"{name}_null"] = (dims, value, {"long_name": label, "units": units})
        value, _, _ = mean_interval(null[halves, layer, head], sums.n_queries[halves], seed=seed)
        variables[f"{best}_null"] = (
            (),
            value,
            {"long_name": f"{label}, head chosen on the other half", "units": units},
        )
    for which, index in (("layer", layer), ("head", head)):
        label = {"long_name": f"{which} of the head chosen for {name}", "units": "index"}
        variables[f"{best}_{which}"] = ((), np.asarray(index), label)
    return variables


def _on_repeats(hooked: Hooked, n_sequences: int, *, seed: int) -> dict[str, _Sums]:
    parts: dict[str, list[_Sums]] = {"IND": [], "DUP": [], "PREV": []}
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
                parts[name].append(_Sums(attention, np.full(len(batch), uniform), np.full(len(batch), float(len(q)))))
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


def _on_text(
    hooked: Hooked, tokens: Int[Tensor, "batch pos"], categories: Int[np.ndarray, " vocab"] | None
) -> dict[str, _Sums]:
    parts: dict[str, list[_Sums]] = {"IND_text": [], "DUP_text": [], "NEXT_text": []}
    length = tokens.shape[1] - 1
    if length < 2:
        raise ValueError(f"text scores need sequences of at least 3 tokens, got {tokens.shape[1]}")
    late = torch.arange(length, device=tokens.device) >= length // 2
    per_key = 1.0 / torch.arange(1, length + 1, device=tokens.device).double()
    for batch in tokens.split(hooked.batch_size(tokens.shape[1])):
        keys = {name: mask & late[:, None] for name, mask in text_keys(batch).items()}
        weights = {name: mask.float() for name, mask in keys.items()}
        of_category = None if categories is None else _one_hot(batch[:, :-1], categories)
        spread = {} if of_category is None else {name: _spread(mask, of_category) for name, mask in weights.items()}

        def masses(
            pattern: Float[Tensor, "batch head query key"],
            weights: dict[str, Tensor] = weights,
            of_category: Tensor | None = of_category,
            spread: dict[str, Tensor] = spread,
        ) -> dict[str, Float[Tensor, "batch head"]]:
            inner = pattern[:, :, :-1, :-1]
            found = {name: torch.einsum("bhqk,bqk->bh", inner, weight).cpu() for name, weight in weights.items()}
            if of_category is not None:
                by_category = torch.einsum("bhqk,bkc->bhqc", inner, of_category)
                found |= {
                    f"{name}_null": torch.einsum("bhqc,bqc->bh", by_category, share).cpu()
                    for name, share in spread.items()
                }
            return found

        per_layer = reduce_patterns(hooked, batch, masses)
        for name, mask in keys.items():
            attention, null = (
                torch.stack([layer[key] for layer in per_layer], dim=1).double().numpy()
                if key in per_layer[0]
                else None
                for key in (name, f"{name}_null")
            )
            assert attention is not None
            uniform = (mask.sum(-1) * per_key).sum(-1).cpu().numpy()
            parts[name].append(_Sums(attention, uniform, mask.any(-1).sum(-1).double().cpu().numpy(), null))
    return {name: _concatenate(found) for name, found in parts.items()}


def _one_hot(
    tokens: Int[Tensor, "batch key"], categories: Int[np.ndarray, " vocab"]
) -> Float[Tensor, "batch key category"]:
    of_token = torch.as_tensor(np.array(categories), device=tokens.device)[tokens]
    return torch.nn.functional.one_hot(of_token.long(), int(categories.max()) + 1).float()


def _spread(
    keys: Float[Tensor, "batch query key"], of_category: Float[Tensor, "batch key category"]
) -> Float[Tensor, "batch query category"]:
    """Share of a category's tokens up to the query that are among the keys that count."""
    seen = of_category.cumsum(dim=1)
    return torch.einsum("bqk,bkc->bqc", keys, of_category) / seen.clamp(min=1.0)


def _concatenate(parts: list[_Sums]) -> _Sums:
    nulls = [part.category_null for part in parts if part.category_null is not None]
    return _Sums(
        attention=np.concatenate([part.attention for part in parts]),
        uniform=np.concatenate([part.uniform for part in parts]),
        n_queries=np.concatenate([part.n_queries for part in parts]),
        category_null=np.concatenate(nulls) if nulls else None,
    )

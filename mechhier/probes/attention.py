"""Attention patterns: read, reduced layer by layer, cut between positions, or replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.arguments import is_whole, one_of, seed_number, shown, whole_number
from mechhier.models.hooked import MAX_BYTES, Hook, Hooked, rows_being_run
from mechhier.models.torch_state import entered_in_default_torch_state, in_default_torch_state
from mechhier.probes import _runs
from mechhier.probes.components import Head, check, grouped, label
from mechhier.probes.metrics import Metric, check_callable, loss, name_of
from mechhier.probes.provenance import provenance
from mechhier.progress import track

Reduced = TypeVar("Reduced")
NamedPattern: TypeAlias = Literal["previous", "self", "uniform"]
ForcedPattern: TypeAlias = "NamedPattern | Float[Any, 'query key'] | Float[Any, 'sequence query key']"

KNOCK_OUT = (
    "Attention from the queries to the keys is set to zero and the row renormalised, all that follows recomputed"
)
_EFFECT = "effect = metric(edited) - metric(clean), mean over sequences"


@in_default_torch_state
def reduce_patterns(
    model: Any,
    tokens: Int[Any, "batch pos"],
    reduce: Callable[[Float[Tensor, "batch head query key"]], Reduced],
) -> list[Reduced]:
    """`reduce(pattern)` of every layer, in one forward pass.

    Memory beyond the forward pass is one layer's pattern and what `reduce` returns: no stack of patterns exists.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`, or its `Hooked`.
        tokens: Token ids without padding.
        reduce: Given the pattern of one layer.

    Raises:
        TypeError: Not a hooked model, or not token ids.
        ValueError: Tokens that the model cannot take.
    """
    hooked = Hooked.of(model)
    tokens = hooked.check_tokens(tokens)
    reduced: list[Reduced] = []

    def read(pattern: Tensor) -> None:
        reduced.append(reduce(pattern.float()))

    hooked.run(tokens, [("pattern", layer, read) for layer in range(hooked.n_layers)])
    return reduced


@in_default_torch_state
def patterns(
    model: Any, tokens: Int[Any, "batch pos"], heads: Sequence[Head | tuple[int, int]]
) -> Float[np.ndarray, "batch chosen query key"]:
    """Attention patterns of the chosen heads, in the order given; one forward pass.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`, or its `Hooked`.
        tokens: Token ids without padding.
        heads: `Head`s, or `(layer, head)` pairs.

    Raises:
        TypeError: Not a hooked model, token ids, or heads.
        ValueError: Tokens or a head that the model does not have.
    """
    hooked = Hooked.of(model)
    tokens = hooked.check_tokens(tokens)
    chosen = [part for entry in _check_heads(hooked, heads) for part in entry]
    pairs = [(head.layer, head.head) for head in chosen]
    found: dict[tuple[int, int], Tensor] = {}

    def read(pattern: Tensor, layer: int) -> None:
        found.update({pair: pattern[:, pair[1]].float().cpu() for pair in pairs if pair[0] == layer})

    hooked.run(
        tokens, [("pattern", layer, partial(read, layer=layer)) for layer in sorted({pair[0] for pair in pairs})]
    )
    return torch.stack([found[pair] for pair in pairs], dim=1).numpy()


@dataclass(frozen=True)
class Edge:
    """Attention from some queries to some keys, in one head or many; None means all.

    Attributes:
        layer: Index of the layer.
        head: Index of the head.
        queries: Position or positions that attend; negative from the end.
        keys: Position or positions that are attended to; negative from the end.
    """

    layer: int | None = None
    head: int | None = None
    queries: int | tuple[int, ...] | None = None
    keys: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("layer", "head"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole_number(f"Edge.{name}", getattr(self, name)))
        for name in ("queries", "keys"):
            object.__setattr__(self, name, _as_positions(f"Edge.{name}", getattr(self, name)))

    def __str__(self) -> str:
        where = ("" if self.layer is None else f"L{self.layer}") + ("" if self.head is None else f"H{self.head}")
        return f"{where or 'all'} {_words(self.queries)}→{_words(self.keys)}"


@in_default_torch_state
def knock_out(
    model: Any,
    edges: Sequence[Edge | tuple[Edge, ...]],
    tokens: Int[Any, "sequence pos"],
    *,
    metric: Metric | None = None,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
) -> xr.Dataset:
    """The effect on a metric of cutting attention from some positions to others, one entry after the other.

    The chosen entries of the pattern are set to zero and their rows renormalised: the same as masking the scores before
    the softmax (Geva et al. 2023). In a model with attention sinks (gpt-oss) the sink stays in the softmax. A row that
    has nothing left, as far as its dtype resolves, attends to nothing.

    Cost: one forward pass, and for each entry one over the layers from its first on.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`. Its own hooks, and the edits of contexts around the call, act
            in every run, before this edit.
        edges: What is cut; the edges of a tuple are cut together.
        tokens: Token ids without padding.
        metric: By default the next-token loss of `tokens`.
        max_bytes: Working memory of one batch.
        seed: Of the bootstrap.

    Returns:
        `effect` and `edited` `[edge]` and the scalar `clean`, in the metric's units, each with `_low` and `_high` (95 %,
        bootstrap over sequences); `edge` holds the labels of the entries.

    Raises:
        TypeError: Not a hooked model, edges, token ids, or a metric.
        ValueError: Layers, heads or positions that do not exist; a metric that does not return one number per sequence.

    Example:
        >>> import mechhier as mh
        >>> from mechhier.probes import Edge, knock_out, logit_difference
        >>> planted = mh.models.planted.planted_backup(share=0.0)
        >>> tokens = planted.tokens(8)
        >>> metric = logit_difference(answers=tokens[:, 1], wrong=tokens[:, 2])
        >>> edges = [Edge(keys=1, queries=-1), Edge(keys=2, queries=-1)]  # the name is at position 1
        >>> result = knock_out(mh.load_model(planted.model), edges, tokens, metric=metric)
        >>> [bool(effect < -30) for effect in result.effect]
        [True, False]
    """
    hooked = Hooked(model, max_bytes=max_bytes)
    entries = _check_edges(hooked, edges)
    tokens = hooked.check_tokens(tokens)
    _check_positions(entries, length=tokens.shape[1])
    edits = [(_first_layer(entry), _knocking_out(hooked, entry)) for entry in entries]
    return _effects(
        hooked,
        tokens,
        edits,
        metric,
        dim="edge",
        labels=[label(entry) for entry in entries],
        verb="attention knocked out",
        seed=seed,
        phenomenon="knock_out",
        definition=f"{KNOCK_OUT}; {_EFFECT}",
        source="Geva et al. 2023, Dissecting Recall of Factual Associations in Auto-Regressive Language Models",
    )


@entered_in_default_torch_state
@contextmanager
def knocked_out(model: Any, edges: Sequence[Edge | tuple[Edge, ...]]) -> Iterator[None]:
    """Inside the block every call of the model is without these edges; see `knock_out`, and `ablated` for contexts.

    Positions count from the beginning of the sequence, also while `model.generate` goes on with cached keys; those that a
    call does not reach are not cut in it.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        edges: What is cut, all of it together.

    Raises:
        TypeError: Not a hooked model, or not an edge.
        ValueError: Layers or heads that do not exist.

    Example:
        >>> import mechhier as mh
        >>> from mechhier.probes import Edge, knocked_out
        >>> planted = mh.models.planted.planted_induction()
        >>> model, tokens = mh.load_model(planted.model), planted.tokens(2)
        >>> with knocked_out(model, [Edge(layer=1, head=0, keys=3)]):
        ...     _, cache = model.run_with_cache(tokens)
        >>> float(cache["blocks.1.attn.hook_pattern"][:, 0, :, 3].max())
        0.0
    """
    hooked = Hooked(model)
    together = tuple(edge for entry in _check_edges(hooked, edges) for edge in entry)
    with _runs.acting(hooked, _knocking_out(hooked, together)):
        yield


@in_default_torch_state
def force_pattern(
    model: Any,
    heads: Sequence[Head | tuple[Head, ...]],
    tokens: Int[Any, "sequence pos"],
    pattern: ForcedPattern,
    *,
    metric: Metric | None = None,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
) -> xr.Dataset:
    """The effect on a metric of replacing heads' attention patterns, one entry after the other.

    Cost: one forward pass, and for each entry one over the layers from its first on.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`. Its own hooks, and the edits of contexts around the call, act
            in every run, before this edit.
        heads: The heads of a tuple are replaced together. A pair of whole numbers is a head.
        tokens: Token ids without padding.
        pattern: "previous" (position t attends to t - 1, position 0 to itself), "self", "uniform" (over the past and
            itself), or a pattern `[query, key]` or `[sequence, query, key]`; it is taken as it is, not normalised.
        metric: By default the next-token loss of `tokens`.
        max_bytes: Working memory of one batch.
        seed: Of the bootstrap.

    Returns:
        `effect` and `edited` `[forced]` and the scalar `clean`, in the metric's units, each with `_low` and `_high` (95 %,
        bootstrap over sequences); `forced` holds the labels of the entries.

    Raises:
        TypeError: Not a hooked model, heads, token ids, a pattern, or a metric.
        ValueError: Heads that do not exist; a pattern of another name or shape, or one that attends to what follows; a
            metric that does not return one number per sequence.

    Example:
        >>> import mechhier as mh
        >>> from mechhier.probes import Head, force_pattern, loss
        >>> planted = mh.models.planted.planted_induction()
        >>> tokens = planted.tokens(4)
        >>> result = force_pattern(mh.load_model(planted.model), [Head(0, 0), Head(1, 0)], tokens, "previous")
        >>> [bool(abs(effect) > 1) for effect in result.effect]  # head 0 of layer 0 attends to the previous token anyway
        [False, True]
    """
    hooked = Hooked(model, max_bytes=max_bytes)
    entries = _check_heads(hooked, heads)
    tokens = hooked.check_tokens(tokens)
    given = _check_pattern(pattern)
    if isinstance(given, Tensor) and (
        given.shape[-1] != tokens.shape[1] or (given.ndim == 3 and len(given) != len(tokens))
    ):
        raise ValueError(f"a pattern of shape {list(given.shape)} does not fit tokens of shape {list(tokens.shape)}")
    edits = [(min(head.layer for head in entry), _forcing(entry, given)) for entry in entries]
    return _effects(
        hooked,
        tokens,
        edits,
        metric,
        dim="forced",
        labels=[label(entry) for entry in entries],
        verb="attention forced",
        seed=seed,
        phenomenon="force_pattern",
        definition=f"The attention pattern of the heads is replaced, all that follows recomputed; {_EFFECT}",
        source="Elhage et al. 2021, A Mathematical Framework for Transformer Circuits (frozen attention patterns)",
        pattern=pattern if isinstance(pattern, str) else "given by the caller",
    )


@entered_in_default_torch_state
@contextmanager
def forced_pattern(model: Any, heads: Sequence[Head | tuple[Head, ...]], pattern: ForcedPattern) -> Iterator[None]:
    """Inside the block these heads have this pattern in every call; see `force_pattern`, and `ablated` for contexts.

    A named pattern fits every length, and goes on while `model.generate` does. A given one must reach as far as the call;
    one pattern for each sequence must have as many as the call.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        heads: All of them together.
        pattern: As in `force_pattern`.

    Raises:
        TypeError: Not a hooked model, or not a head.
        ValueError: As `force_pattern`. In a call: one that the pattern does not fit.

    Example:
        >>> import mechhier as mh
        >>> from mechhier.probes import Head, forced_pattern
        >>> planted = mh.models.planted.planted_induction()
        >>> model, tokens = mh.load_model(planted.model), planted.tokens(2)
        >>> with forced_pattern(model, [Head(1, 0)], "self"):
        ...     prediction = model(tokens).argmax(-1)
        >>> bool((prediction == tokens).all())
        True
    """
    hooked = Hooked(model)
    together = tuple(head for entry in _check_heads(hooked, heads) for head in entry)
    with _runs.acting(hooked, _forcing(together, _check_pattern(pattern))):
        yield


def _as_positions(name: str, positions: Any) -> int | tuple[int, ...] | None:
    if positions is None or is_whole(positions):
        return None if positions is None else whole_number(name, positions)
    if isinstance(positions, str) or not isinstance(positions, Iterable) or not getattr(positions, "ndim", 1):
        raise TypeError(f"{name} must be a position, some of them, or None for all, got {shown(positions)}")
    return tuple(whole_number(name, position) for position in positions)


def _words(positions: int | tuple[int, ...] | None) -> str:
    if positions is None:
        return "all"
    return str(positions) if isinstance(positions, int) else ",".join(map(str, positions))


def _first_layer(edges: Sequence[Edge]) -> int:
    return min(0 if edge.layer is None else edge.layer for edge in edges)


def _check_edges(hooked: Hooked, edges: Any) -> list[tuple[Edge, ...]]:
    entries: Any = grouped(edges, accepted=(Edge,), name="edges")
    for edge in (edge for entry in entries for edge in entry):
        if edge.layer is not None and not 0 <= edge.layer < hooked.n_layers:
            raise ValueError(f"no edge {edge}: the model has layers 0..{hooked.n_layers - 1}")
        if edge.head is not None and not 0 <= edge.head < hooked.n_heads:
            raise ValueError(f"no edge {edge}: the model has heads 0..{hooked.n_heads - 1} in every layer")
    return entries


def _check_positions(entries: list[tuple[Edge, ...]], *, length: int) -> None:
    for edge in (edge for entry in entries for edge in entry):
        for positions in (edge.queries, edge.keys):
            if len(_reached(positions, length)) < _n_named(positions, length):
                raise ValueError(f"no edge {edge}: positions must lie in {-length}..{length - 1}")


def _n_named(positions: int | tuple[int, ...] | None, length: int) -> int:
    return length if positions is None else 1 if isinstance(positions, int) else len(positions)


def _reached(positions: int | tuple[int, ...] | None, length: int) -> list[int]:
    """Those of the positions that a sequence of this length has, counted from its beginning."""
    if positions is None:
        return list(range(length))
    chosen = (positions,) if isinstance(positions, int) else positions
    return [position % length for position in chosen if -length <= position < length]


def _knocking_out(hooked: Hooked, edges: Sequence[Edge]) -> list[Hook]:
    def edit_of(of_layer: list[Edge]) -> Callable[[Tensor], Tensor]:
        def edit(pattern: Tensor) -> Tensor:
            cut = torch.zeros(pattern.shape[1:], dtype=torch.bool)
            n_queries, n_keys = pattern.shape[-2:]
            for edge in of_layer:
                # With cached keys (model.generate) the queries are the last positions.
                queries = [q - (n_keys - n_queries) for q in _reached(edge.queries, n_keys) if q >= n_keys - n_queries]
                heads = list(range(hooked.n_heads)) if edge.head is None else [edge.head]
                cut[np.ix_(heads, queries, _reached(edge.keys, n_keys))] = True
            cut = cut.to(pattern.device)
            left = pattern.float().masked_fill(cut, 0.0)
            total = left.sum(-1, keepdim=True)
            if hooked.verification.has_sinks:
                # What goes to no key takes part in the softmax, and keeps its part.
                total = total + (1.0 - pattern.float().sum(-1, keepdim=True)).clamp(min=0.0)
            share = torch.where(total > 0, left / total, 0.0)
            return torch.where(cut.any(-1, keepdim=True), share.to(pattern.dtype), pattern)

        return edit

    by_layer = {layer: [edge for edge in edges if edge.layer in (None, layer)] for layer in range(hooked.n_layers)}
    return [("pattern", layer, edit_of(of_layer)) for layer, of_layer in by_layer.items() if of_layer]


def _check_heads(hooked: Hooked, heads: Any) -> list[tuple[Head, ...]]:
    entries: Any = grouped(heads, accepted=(Head,), name="heads")
    for entry in entries:
        check(hooked, entry)
    return entries


def _check_pattern(pattern: Any) -> str | Tensor:
    if isinstance(pattern, str):
        return one_of("pattern", pattern, get_args(NamedPattern))
    try:
        given = torch.as_tensor(pattern).float()
    except (TypeError, ValueError, RuntimeError):
        known = ", ".join(get_args(NamedPattern))
        raise TypeError(f"pattern must be one of {known}, or a tensor [query, key], got {shown(pattern)}") from None
    if given.ndim not in (2, 3) or given.shape[-1] != given.shape[-2]:
        raise ValueError(f"a pattern must be [query, key] or [sequence, query, key], got {list(given.shape)}")
    if not given.isfinite().all() or bool(given.triu(1).any()):
        raise ValueError("a pattern must be finite, and zero where the key comes after the query")
    return given


def _forcing(heads: Sequence[Head], pattern: str | Tensor) -> list[Hook]:
    def edit_of(of_layer: list[int]) -> Callable[[Tensor], Tensor]:
        def edit(before: Tensor) -> Tensor:
            n_queries, n_keys = before.shape[-2:]
            if isinstance(pattern, str):
                forced = _named_pattern(pattern, n_queries, n_keys)
            else:
                forced = _given_pattern(pattern, len(before), n_queries, n_keys)
            edited = before.clone()
            edited[:, of_layer] = forced.to(before)[..., None, :, :]
            return edited

        return edit

    layers = sorted({head.layer for head in heads})
    return [("pattern", layer, edit_of([head.head for head in heads if head.layer == layer])) for layer in layers]


def _named_pattern(name: str, n_queries: int, n_keys: int) -> Float[Tensor, "query key"]:
    # With cached keys (model.generate) the queries are the last positions.
    queries = torch.arange(n_keys - n_queries, n_keys)
    if name == "uniform":
        seen = torch.arange(n_keys) <= queries[:, None]
        return seen / seen.sum(-1, keepdim=True)
    attended = queries if name == "self" else (queries - 1).clamp(min=0)
    return torch.nn.functional.one_hot(attended, n_keys).float()


def _given_pattern(pattern: Tensor, n_batch: int, n_queries: int, n_keys: int) -> Float[Tensor, "... query key"]:
    known = rows_being_run()
    if n_keys > pattern.shape[-1]:
        raise ValueError(f"the pattern is of {pattern.shape[-1]} positions, the call is on {n_keys}")
    if pattern.ndim == 3:
        n_run = n_batch if known is None else int(known.max()) + 1
        if n_run > len(pattern) or (known is None and n_run != len(pattern)):
            raise ValueError(f"there are patterns of {len(pattern)} sequences, the call is on {n_run}")
        pattern = pattern if known is None else pattern[known.to(pattern.device)]
    return pattern[..., n_keys - n_queries : n_keys, :n_keys]


def _effects(
    hooked: Hooked,
    tokens: Int[Tensor, "sequence pos"],
    edits: list[tuple[int, list[Hook]]],
    metric: Metric | None,
    *,
    dim: str,
    labels: list[str],
    verb: str,
    seed: int,
    **described: str,
) -> xr.Dataset:
    """The effect of every edit, given with its first layer."""
    coord = _runs.label_coord(labels)
    metric = loss(tokens) if metric is None else check_callable(metric)
    seed = seed_number(seed)
    clean = _runs.measure(hooked, tokens, metric)[0]
    edited = np.empty((len(tokens), len(edits)))
    start: _runs.Start = None
    with track(verb, total=len(edits)) as advance:
        for number in sorted(range(len(edits)), key=lambda number: edits[number][0]):
            layer, hooks = edits[number]
            start = _runs.advance(hooked, tokens, start, layer)
            edited[:, number] = _runs.measure(
                hooked, tokens, metric, hooks=lambda variants, rows, hooks=hooks: hooks, start=start
            )[0]
            advance()
    return _runs.labelled(
        _runs.change((dim,), clean, edited, metric, verb=verb, seed=seed),
        {dim: coord},
        provenance(hooked, **described, metric=name_of(metric)[0], seed=seed, n_sequences=len(tokens)),
    )

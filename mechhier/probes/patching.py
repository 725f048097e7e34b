"""Activation patching: what of one run, put into another, brings its behaviour back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.arguments import is_whole, one_of, seed_number, shown, whole_number
from mechhier.models.hooked import MAX_BYTES, Hook, Hooked, HookFunction, SiteName, rows_being_run
from mechhier.models.torch_state import entered_in_default_torch_state, in_default_torch_state
from mechhier.probes import _runs
from mechhier.probes.ablation import ABLATABLE
from mechhier.probes.components import Component, HeadInput, Index, Resid, check, grouped, locate
from mechhier.probes.metrics import Metric, check_callable, name_of
from mechhier.probes.provenance import provenance
from mechhier.progress import track

Direction: TypeAlias = Literal["denoise", "noise"]

POSITION_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Patched at every (layer, position)."""
HEAD_SITES = ("q", "k", "v", "z", "pattern")
"""Patched at every (layer, head)."""

DEFINITION = (
    "patched = metric of one run with one activation taken from the other run, all that follows recomputed; denoise: the "
    "corrupted run with a clean activation, noise: the clean run with a corrupted one. recovered = (patched - corrupted) / "
    "(clean - corrupted), sums over sequences; NaN unless the interval of clean - corrupted, which needs 4 sequences, leaves "
    "out 0"
)
SOURCE = "Meng et al. 2022, Locating and Editing Factual Associations in GPT; Heimersheim & Nanda 2024"


@in_default_torch_state
def patch(
    model: Any,
    clean: Int[Any, "sequence pos"],
    corrupted: Int[Any, "sequence pos"],
    *,
    metric: Metric,
    sites: SiteName | Sequence[SiteName] = "resid_pre",
    position: int | None = None,
    direction: Direction = "denoise",
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
) -> xr.Dataset:
    """Patch every activation of some sites, one at a time, from one run into the other.

    Cost: two forward passes, and for each layer as many passes over the layers from it on as there are positions or
    heads. Memory: the streams of both runs, and one layer's activations of the sites, for all sequences.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`. Its own hooks, and the edits of contexts around the call, act
            in every run, before the patch.
        clean: Token ids without padding.
        corrupted: As many, of the same length.
        metric: One number per sequence, from `mechhier.probes.metrics` or a callable like them.
        sites: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, patched at single positions; or `z`, `q`,
            `k`, `v`, `pattern`, patched for single heads (with grouped queries k and v have fewer heads than q). One of
            them, or several with the same dims.
        position: For heads: patch at this position only (the query's, for `pattern`), instead of at all of them.
        direction: "denoise" puts clean activations into the corrupted run, "noise" corrupted ones into the clean run.
        max_bytes: Working memory of one batch.
        seed: Of the bootstrap.

    Returns:
        `patched` (the metric's units) and `recovered` (1 the clean run's, 0 the corrupted run's metric),
        `[layer, position]` or `[layer, head]`, with a dim `site` before them where several sites were given; the scalars
        `clean` and `corrupted`. Each with `_low`, `_high` (95 %, studentised bootstrap over sequences).

    Raises:
        TypeError: Not a hooked model, token ids, or a metric.
        ValueError: Tokens, sites or a position that the model does not have, or sites of different dims; a metric that
            does not return one number per sequence.

    Example:
        >>> import mechhier as mh
        >>> from mechhier.probes import logit_difference, patch
        >>> planted = mh.models.planted.planted_backup()
        >>> clean = planted.tokens(8)
        >>> corrupted = clean.roll(1, dims=0)
        >>> metric = logit_difference(answers=clean[:, 1], wrong=corrupted[:, 1])
        >>> result = patch(mh.load_model(planted.model), clean, corrupted, metric=metric)
        >>> result.recovered.sel(layer=0).values.round(2).tolist()[:3]  # the name at position 1 is what is moved
        [0.0, 1.0, 0.0]
    """
    hooked = Hooked(model, max_bytes=max_bytes)
    plan = Plan.of(hooked, clean, corrupted, sites, position, direction)
    metric, seed = check_callable(metric), seed_number(seed)
    values = {
        name: _runs.measure(hooked, tokens, metric)[0]
        for name, tokens in (("clean", plan.clean), ("corrupted", plan.corrupted))
    }
    found = patched_values(hooked, plan, metric)
    variables = _runs.recovery(plan.dims, values["clean"], values["corrupted"], plan.squeezed(found), metric, seed=seed)
    return _runs.labelled(
        variables,
        plan.coords,
        provenance(
            hooked,
            phenomenon="patch",
            definition=DEFINITION,
            source=SOURCE,
            **plan.settings,
            metric=name_of(metric)[0],
            seed=seed,
            n_sequences=len(plan.clean),
        ),
    )


@entered_in_default_torch_state
@contextmanager
def patched(
    model: Any,
    components: Sequence[Component | Resid | HeadInput],
    source: Int[Any, "sequence pos"],
    *,
    positions: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[None]:
    """Inside the block every call of the model has some components' activations from a run on other tokens.

    Row i of a call takes those of sequence i of the source, whose length it must have; a source of one sequence gives to
    every row. Functions of this package keep rows apart however they batch them. The single-token steps that
    `model.generate` makes after the prompt are left as they are. Contexts nest; edits of one site act in the order in
    which they were entered. Nothing is left behind, also after an exception.

    Cost: one forward pass over the source on entry. Memory: the activations that are patched.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        components: `Head`, `Attention`, `MLP`, `Neurons`, `Resid` (the stream that enters a layer) or `HeadInput` (a head's
            q, k or v), all patched together.
        source: Token ids of the run from which the activations come; it is made on entry.
        positions: Where; by default everywhere. Negative from the end.
        max_bytes: Working memory of one batch of the source.

    Raises:
        TypeError: Not a hooked model, components, or token ids.
        ValueError: Components or positions that do not exist. In a call: other sizes than the source's.

    Example:
        >>> import mechhier as mh
        >>> from mechhier.probes import Resid, patched
        >>> planted = mh.models.planted.planted_induction()
        >>> model, clean, other = mh.load_model(planted.model), planted.tokens(2, seed=0), planted.tokens(2, seed=1)
        >>> with patched(model, [Resid(0)], other):
        ...     moved = model(clean)
        >>> bool((moved - model(other)).abs().max() < 1e-3)
        True
    """
    hooked = Hooked(model, max_bytes=max_bytes)
    parts: Any = [part for entry in grouped(components, accepted=(*ABLATABLE, Resid, HeadInput)) for part in entry]
    check(hooked, parts)
    tokens = hooked.check_tokens(source, "source")
    where = _positions(positions, tokens.shape[1])
    places = [locate(hooked, part) for part in parts]
    kept, _ = _runs.record(
        hooked, tokens, {(site, layer) for site, layer, _ in places}, stop=max(layer for _, layer, _ in places)
    )

    edits: list[Hook] = [(site, layer, taking(kept[site, layer], index, where)) for site, layer, index in places]
    with _runs.acting(hooked, edits):
        yield


def taking(taken: Tensor, index: Index, where: list[int] | None = None) -> HookFunction:
    """A hook function for a block: part of an activation, at some positions, is taken from the same rows of `taken`."""
    positions = slice(None) if where is None else where

    def edit(activation: Tensor) -> Tensor | None:
        if activation.shape[1] == 1 != taken.shape[1]:
            return None
        rows = _corresponding(activation, taken)
        edited = activation.clone()
        edited[(slice(None), positions, *index)] = taken[rows][(slice(None), positions, *index)].to(activation)
        return edited

    return edit


class Plan:
    """What is patched into what, checked: shared by `patch` and `attribution_patch`."""

    def __init__(
        self,
        clean: Tensor,
        corrupted: Tensor,
        sites: tuple[SiteName, ...],
        n_units: int,
        n_layers: int,
        position: int | None,
        direction: Direction,
        single: bool,
    ):
        self.clean, self.corrupted, self.sites, self.position = clean, corrupted, sites, position
        self.by_head = sites[0] in HEAD_SITES
        self.n_units, self.n_layers, self.direction, self.single = n_units, n_layers, direction, single

    @classmethod
    def of(
        cls,
        hooked: Hooked,
        clean: Any,
        corrupted: Any,
        sites: SiteName | Sequence[SiteName],
        position: int | None,
        direction: Direction,
    ) -> Plan:
        """Check the arguments of `patch`.

        Raises:
            ValueError: As `patch`.
        """
        first, second = _runs.check_pair(hooked, clean, corrupted)
        single = isinstance(sites, str)
        known = (*POSITION_SITES, *HEAD_SITES)
        if not isinstance(sites, Iterable):
            raise TypeError(f"sites must be one or several of {', '.join(known)}, got {shown(sites)}")
        names: tuple[Any, ...] = (sites,) if single else tuple(one_of("sites", site, known) for site in sites)
        one_of("sites", names[0] if names else "", known)
        if len(set(names)) < len(names):
            raise ValueError(f"sites must be different ones of {', '.join(known)}, got {shown(sites)}")
        one_of("direction", direction, get_args(Direction))
        grouped_heads = hooked.n_kv_heads
        units = {
            first.shape[1] if name in POSITION_SITES else grouped_heads if name in ("k", "v") else hooked.n_heads
            for name in names
        }
        if len({name in POSITION_SITES for name in names}) > 1 or len(units) > 1:
            raise ValueError(f"the sites {', '.join(names)} have different dims: patch them in calls of their own")
        if names[0] in POSITION_SITES and position is not None:
            raise ValueError("position is for heads; the stream, attn_out and mlp_out are patched at every position")
        if position is not None:
            (position,) = _positions(position, first.shape[1])
        if "resid_mid" in names and hooked.parallel:
            raise ValueError("resid_mid does not exist in a model whose attention and MLP run in parallel")
        if "mlp_out" in names and hooked.attn_only:
            raise ValueError("mlp_out does not exist in a model of attention layers only")
        return cls(first, second, names, units.pop(), hooked.n_layers, position, direction, single)

    @property
    def base(self) -> Int[Tensor, "sequence pos"]:
        """The run that is patched."""
        return self.corrupted if self.direction == "denoise" else self.clean

    @property
    def source(self) -> Int[Tensor, "sequence pos"]:
        """The run that the activations come from."""
        return self.clean if self.direction == "denoise" else self.corrupted

    @property
    def dims(self) -> tuple[str, ...]:
        """Of the result."""
        cell = ("layer", "head" if self.by_head else "position")
        return cell if self.single else ("site", *cell)

    @property
    def coords(self) -> dict[str, Any]:
        """Of the result."""
        layers, units = np.arange(self.n_layers), np.arange(self.n_units)
        coords = {"layer": layers, self.dims[-1]: units}
        return coords if self.single else {"site": np.array(self.sites), **coords}

    @property
    def settings(self) -> dict[str, Any]:
        """As attributes."""
        everywhere = "all" if self.by_head else "each"
        return {
            "sites": ", ".join(self.sites),
            "direction": self.direction,
            "position": everywhere if self.position is None else self.position,
        }

    def squeezed(self, values: Float[np.ndarray, "sequence site layer unit"]) -> Float[np.ndarray, "sequence ..."]:
        """Without the dim of the sites where there is one."""
        return values[:, 0] if self.single else values

    def place(self, site: SiteName, units: Tensor) -> tuple[Any, ...]:
        """Index of a unit in the activation of each row, after the row."""
        if not self.by_head:
            return (units,)
        at = slice(None) if self.position is None else self.position
        return (units, at) if site == "pattern" else (at, units)


def patched_values(hooked: Hooked, plan: Plan, metric: Metric) -> Float[np.ndarray, "sequence site layer unit"]:
    """The metric of every sequence with every single patch."""
    values = np.empty((len(plan.base), len(plan.sites), plan.n_layers, plan.n_units))
    base: _runs.Start = None
    source: _runs.Start = None
    with track("patching layers", total=plan.n_layers) as advance:
        for layer in range(plan.n_layers):
            kept, left = _runs.record(
                hooked, plan.source, [(site, layer) for site in plan.sites], start=source, stop=layer
            )
            source, following = (layer + 1, left), _runs.advance(hooked, plan.base, base, layer + 1)
            for number, site in enumerate(plan.sites):

                def hooks(
                    units: Tensor,
                    rows: Tensor,
                    site: SiteName = site,
                    layer: int = layer,
                    taken: Tensor = kept[site, layer],
                ) -> list[Hook]:
                    def edit(activation: Tensor) -> Tensor:
                        edited, place = activation.clone(), plan.place(site, units)
                        edited[(torch.arange(len(rows)), *place)] = taken[(rows, *place)].to(activation)
                        return edited

                    return [(site, layer, edit)]

                by_unit = _runs.measure(hooked, plan.base, metric, n_variants=plan.n_units, hooks=hooks, start=base)
                values[:, number, layer] = by_unit.T
            base = following
            advance()
    return values


def _positions(positions: int | Sequence[int] | None, length: int) -> list[int]:
    if positions is None:
        return list(range(length))
    if isinstance(positions, str) or not (is_whole(positions) or isinstance(positions, Iterable)):
        raise TypeError(f"positions must be whole numbers in {-length}..{length - 1}, got {shown(positions)}")
    given: Any = [positions] if is_whole(positions) else positions
    chosen = [whole_number("position", position) for position in given]
    if not chosen or any(not -length <= position < length for position in chosen):
        raise ValueError(f"positions must lie in {-length}..{length - 1}, got {shown(positions)}")
    return [position % length for position in chosen]


def _corresponding(activation: Tensor, taken: Tensor) -> Int[Tensor, " batch"]:
    """The source's sequence of every row of a batch.

    Raises:
        ValueError: They do not correspond.
    """
    known = rows_being_run()
    n_run = len(activation) if known is None else int(known.max()) + 1
    fits = n_run <= len(taken) if known is not None else n_run == len(taken)
    if activation.shape[1] != taken.shape[1] or not (fits or len(taken) == 1):
        raise ValueError(
            f"the source has {len(taken)} sequences of {taken.shape[1]} tokens, the call is on {n_run} of "
            f"{activation.shape[1]}"
        )
    if len(taken) == 1:
        return torch.zeros(len(activation), dtype=torch.long)
    return torch.arange(n_run) if known is None else known

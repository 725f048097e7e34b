"""Ablation: what a component's output is replaced by, the effect of it, and a context in which a model is ablated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.arguments import one_of, seed_number, whole_number
from mechhier.models.hooked import MAX_BYTES, Hook, Hooked, rows_being_run
from mechhier.models.token_ids import token_ids
from mechhier.models.torch_state import entered_in_default_torch_state, in_default_torch_state
from mechhier.probes import _runs
from mechhier.probes.components import (
    MLP,
    Attention,
    Component,
    Entries,
    Head,
    Neurons,
    check,
    grouped,
    label,
    locate,
    read,
)
from mechhier.probes.metrics import Metric, check_callable, loss, name_of
from mechhier.probes.provenance import provenance
from mechhier.progress import track

Ablation: TypeAlias = Literal["resample", "mean", "zero"]
_Parts: TypeAlias = "tuple[Component, ...]"
_Values: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""What a component is replaced by, given the patch and the sequence of every row: [batch, pos, width], or broadcast."""

ABLATABLE = (Head, Attention, MLP, Neurons)
DEFINITION = (
    "effect = metric(ablated) - metric(unedited), mean over sequences, and over patches where resampled. A head is ablated at "
    "its output z, attention and MLP at what they add to the residual stream, neurons before the output matrix; everything "
    "later is recomputed. resample: the component's output on another sequence at the same position, or with roles at a "
    "random position of the same role in another sequence; mean: over the reference's sequences and positions; zero: nothing."
)
SOURCE = "McGrath et al. 2023, The Hydra Effect (resample ablation); Chan et al. 2022, Causal Scrubbing"
USUAL_PATCHES = 15
"""Least number of patches in McGrath et al."""
_DEFAULT_PATCHES = 16


def check_ablation(ablation: str, n_sequences: int, n_patches: int | None) -> int:
    """Refuse an unknown ablation, and one that has too few donors; say how many patches there are.

    Returns:
        The number of versions of every sequence: `n_patches` when resampling, by default 16 or as many as there are
        other sequences; 1 for another ablation.

    Raises:
        TypeError: The ablation is no name, or the number of patches no whole number.
        ValueError: The ablation is unknown, or resampling asks for more donors than there are other sequences.
    """
    one_of("ablation", ablation, get_args(Ablation))
    if ablation != "resample":
        return 1
    if n_sequences < 2:
        raise ValueError(
            f"resample ablation patches from other sequences: it needs at least 2 sequences, got {n_sequences}"
        )
    if n_patches is None:
        return min(_DEFAULT_PATCHES, n_sequences - 1)
    n_patches = whole_number("n_patches", n_patches)
    if not 1 <= n_patches < n_sequences:
        raise ValueError(
            f"resample ablation patches from n_patches other sequences: with {n_sequences} sequences n_patches must lie "
            f"in 1..{n_sequences - 1}, got {n_patches}"
        )
    return n_patches


def draw_donors(
    n_sequences: int, n_donors: int, n_patches: int, *, own: bool, generator: torch.Generator
) -> Int[Tensor, "patch sequence"]:
    """Different donors for each sequence when resampling, drawn with the generator.

    Sequence i takes from i + shift, modulo the number of donors, with different random shifts: every sequence donates
    equally often, and rows that lie in order of likeness are not given their neighbours.

    Args:
        n_sequences: Sequences that take.
        n_donors: Sequences that give.
        n_patches: Donors of each sequence.
        own: The sequences give to each other, and never to themselves.
        generator: Of the shifts.
    """
    shifts = torch.randperm(n_donors - own, generator=generator)[:n_patches] + int(own)
    return (torch.arange(n_sequences) + shifts[:, None]) % n_donors


def replacements(
    writes: Float[Tensor, "sequence pos d_model"], ablation: Ablation, donors: Int[Tensor, "patch sequence"] | None
) -> Iterator[Float[Tensor, "sequence pos d_model"]]:
    """Every version of the ablated write: one for each patch for "resample", one for "mean" and "zero".

    - "resample": the same position of the sequences that `donors` names (`draw_donors`).
    - "mean": the mean over all sequences and positions.
    - "zero": nothing.
    """
    if ablation == "resample":
        assert donors is not None
        for donor in donors:
            yield writes[donor.to(writes.device)]
    elif ablation == "mean":
        yield writes.float().mean(dim=(0, 1)).to(writes.dtype).expand_as(writes)
    else:
        yield torch.zeros_like(writes)


@in_default_torch_state
def ablate(
    model: Any,
    components: Entries,
    tokens: Int[Any, "sequence pos"],
    *,
    ablation: Ablation = "resample",
    reference: Int[Any, "other pos"] | None = None,
    roles: Int[Any, "sequence pos"] | None = None,
    n_patches: int | None = None,
    metric: Metric | None = None,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
) -> xr.Dataset:
    """The effect on a metric of ablating components, one entry after the other.

    In a post-norm model (OLMo-2) the other heads of a layer are rescaled when one is ablated at z; that is part of its
    effect.

    Cost: one forward pass over the tokens and the reference, and for each entry one (with resampling `n_patches`) over
    the layers from its first one on. Memory: the streams of all sequences at one layer, and what is replaced.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`. Its own hooks, and the edits of contexts around the call, act
            in every run, before the ablation.
        components: `Head`, `Attention`, `MLP`, `Neurons`; the components of a tuple are ablated together.
        tokens: Token ids without padding.
        ablation: What a component's output is replaced by: "resample", "mean" or "zero".
        reference: Sequences that donate what is resampled, or over which is averaged; as long as `tokens` or longer. By
            default `tokens`, each sequence taking from the others.
        roles: A label of every position, for instance its syntactic category: the donor is then a random position of the
            same role in another sequence (role-matched), not the same position (position-matched).
        n_patches: Different donors of each sequence when resampling, by default 16 or as many as there are; 15 or more
            are usual (see `SOURCE`).
        metric: By default the next-token loss of `tokens`.
        max_bytes: Working memory of one batch.
        seed: Of donors and bootstrap.

    Returns:
        `effect` and `edited` `[ablated]` and the scalar `clean`, in the metric's units, each with `_low` and `_high`
        (95 %, bootstrap over sequences); `ablated` holds the labels of the entries.

    Raises:
        TypeError: Not a hooked model, components, token ids, or a metric.
        ValueError: Tokens, components, roles or a number of patches that do not fit the model or each other; a metric that
            does not return one number per sequence.

    Example:
        >>> import mechhier as mh
        >>> from mechhier.probes import Head, ablate, logit_difference
        >>> planted = mh.models.planted.planted_backup(share=0.7)
        >>> tokens = planted.tokens(8)
        >>> model = mh.load_model(planted.model)
        >>> metric = logit_difference(answers=tokens[:, 1], wrong=tokens[:, 2])
        >>> result = ablate(model, [Head(0, 0), Head(0, 1)], tokens, ablation="zero", metric=metric)
        >>> [round(float(effect), 1) for effect in result.effect]
        [-12.0, 0.0]
    """
    hooked = Hooked(model, max_bytes=max_bytes)
    entries = _checked(hooked, components)
    tokens = hooked.check_tokens(tokens)
    labels = _runs.label_coord([label(entry) for entry in entries])
    metric = loss(tokens) if metric is None else check_callable(metric)
    seed = seed_number(seed)
    own = reference is None
    donors_tokens = tokens if reference is None else _check_reference(hooked, reference, tokens)
    n_patches = check_ablation(ablation, len(tokens) if own else len(donors_tokens) + 1, n_patches)
    if roles is not None and (ablation != "resample" or not own):
        raise ValueError(
            "roles choose the donors of resample ablation among `tokens`: give neither reference nor another ablation"
        )
    generator = torch.Generator().manual_seed(seed)
    if ablation != "resample":
        donors: Donors | None = None
    elif roles is None:
        donors = _same_position(len(tokens), len(donors_tokens), tokens.shape[1], n_patches, own, generator)
    else:
        donors = _same_role(_check_roles(roles, tokens), n_patches, generator)

    clean = _runs.measure(hooked, tokens, metric)[0]
    edited = np.empty((len(tokens), len(entries)))
    start: _runs.Start = None
    donor_start: _runs.Start = None
    with track("ablating components", total=len(entries)) as advance:
        for layer in sorted({_first_layer(entry) for entry in entries}):
            start = _runs.advance(hooked, tokens, start, layer)
            group = [number for number, entry in enumerate(entries) if _first_layer(entry) == layer]
            parts = {part for number in group for part in entries[number]}
            activations: dict[Component, Tensor] = {}
            if ablation != "zero":
                donor_start = start if own else _runs.advance(hooked, donors_tokens, donor_start, layer)
                activations = _record_parts(hooked, donors_tokens, parts, start=donor_start)
            values = {part: _values(hooked, part, ablation, activations, donors) for part in parts}
            for number in group:

                def hooks(
                    patches: Tensor,
                    rows: Tensor,
                    entry: _Parts = entries[number],
                    values: dict[Component, _Values] = values,
                ) -> list[Hook]:
                    return [_hook(hooked, part, values[part](patches, rows)) for part in entry]

                by_patch = _runs.measure(hooked, tokens, metric, n_variants=n_patches, hooks=hooks, start=start)
                edited[:, number] = by_patch.mean(0)
                advance()

    few = ablation == "resample" and n_patches < USUAL_PATCHES
    return _runs.labelled(
        _runs.change(("ablated",), clean, edited, metric, verb=f"{ablation}-ablated", seed=seed),
        {"ablated": labels},
        provenance(
            hooked,
            phenomenon="ablate",
            definition=DEFINITION,
            source=SOURCE,
            ablation=ablation,
            donors=_describe_donors(ablation, own=own, by_role=roles is not None),
            n_patches=n_patches,
            **({"note": f"fewer than the {USUAL_PATCHES} patches of McGrath et al."} if few else {}),
            metric=name_of(metric)[0],
            seed=seed,
            n_sequences=len(tokens),
            n_reference=len(donors_tokens),
        ),
    )


@entered_in_default_torch_state
@contextmanager
def ablated(
    model: Any,
    components: Entries,
    *,
    ablation: Ablation,
    reference: Int[Any, "other pos"] | None = None,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
) -> Iterator[None]:
    """Inside the block every call of the model is ablated: `model(tokens)`, `model.generate`, functions of this package.

    Contexts nest. Edits of one site act in the order in which they were entered. Nothing is left behind, also after an
    exception.

    - "zero" and "mean" hold for any tokens; the mean is over the reference's sequences and positions.
    - "resample" gives row i of a batch the outputs of one other sequence of the reference, at the same position: the one
      after sequence i in an order drawn with the seed (`i` modulo the number of sequences). So no row gets its own where
      the reference itself is run. Functions of this package keep rows apart however they batch them.

    Cost: one forward pass over the reference on entry, none for "zero". Memory: what is resampled, for the whole reference.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        components: As in `ablate`; all of them are ablated together.
        ablation: "resample", "mean" or "zero", as in `ablate`.
        reference: Sequences; needed unless the ablation is "zero".
        max_bytes: Working memory of one batch of the reference.
        seed: Of the donors.

    Raises:
        TypeError: As `ablate`.
        ValueError: As `ablate`; no reference where one is needed. In a call: a position beyond the reference.

    Example:
        >>> import mechhier as mh
        >>> from mechhier.probes import Head, ablated
        >>> planted = mh.models.planted.planted_induction()
        >>> model, tokens = mh.load_model(planted.model), planted.tokens(4)
        >>> before = model(tokens)
        >>> with ablated(model, [Head(1, 0)], ablation="zero"):
        ...     inside = model(tokens)
        >>> bool((inside - before).abs().max() > 1), bool((model(tokens) == before).all())
        (True, True)
    """
    hooked = Hooked(model, max_bytes=max_bytes)
    parts = tuple(dict.fromkeys(part for entry in _checked(hooked, components) for part in entry))
    one_of("ablation", ablation, get_args(Ablation))
    if ablation != "zero" and reference is None:
        raise ValueError(f"{ablation} ablation needs sequences to take the activations from: give reference=tokens")
    sequences = None if reference is None else hooked.check_tokens(reference, "reference")
    seed = seed_number(seed)
    check_ablation(ablation, 0 if sequences is None else len(sequences), 1)
    if ablation == "resample" and sequences is not None:
        order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))
        donor = torch.empty_like(order)
        donor[order] = order.roll(-1)
        activations = _record_parts(hooked, sequences, parts, start=None)
        hooks = [hook for part in parts for hook in _resampling(hooked, part, activations[part], donor)]
    else:
        activations = (
            {} if sequences is None or ablation == "zero" else _record_parts(hooked, sequences, parts, start=None)
        )
        anything = torch.zeros(1, dtype=torch.long)
        hooks = [
            _hook(hooked, part, _values(hooked, part, ablation, activations, None)(anything, anything))
            for part in parts
        ]
    with _runs.acting(hooked, hooks):
        yield


Donors: TypeAlias = "tuple[Int[Tensor, 'patch sequence pos'], Int[Tensor, 'patch sequence pos']]"
"""The donor's sequence and position."""


def _checked(hooked: Hooked, components: Entries) -> list[_Parts]:
    entries: Any = grouped(components, accepted=ABLATABLE)
    for entry in entries:
        check(hooked, entry)
    return entries


def _first_layer(parts: Sequence[Component]) -> int:
    return min(part.layer for part in parts)


def _check_reference(hooked: Hooked, reference: Any, tokens: Tensor) -> Int[Tensor, "other pos"]:
    reference = hooked.check_tokens(reference, "reference")
    if reference.shape[1] < tokens.shape[1]:
        raise ValueError(
            f"reference sequences must be at least as long as the tokens ({tokens.shape[1]}), got {reference.shape[1]}"
        )
    return reference[:, : tokens.shape[1]]


def _check_roles(roles: Any, tokens: Tensor) -> Int[Tensor, "sequence pos"]:
    roles = token_ids(roles, "roles")
    if roles.shape != tokens.shape:
        raise ValueError(
            f"roles must be integer labels of shape {list(tokens.shape)}, one for every token, got {list(roles.shape)}"
        )
    return roles.cpu()


def _same_position(n: int, n_donors: int, length: int, n_patches: int, own: bool, generator: torch.Generator) -> Donors:
    """Different other sequences for each sequence, at every position."""
    sequences = draw_donors(n, n_donors, n_patches, own=own, generator=generator)
    shape = (n_patches, n, length)
    return sequences[..., None].expand(shape), torch.arange(length).expand(shape)


def _same_role(roles: Int[Tensor, "sequence pos"], n_patches: int, generator: torch.Generator) -> Donors:
    """A random position of the same role in another sequence, uniformly, for every position of its own.

    Raises:
        ValueError: A role that occurs in one sequence only.
    """
    n, length = roles.shape
    sequences, positions = (torch.empty(n_patches, n, length, dtype=torch.long) for _ in range(2))
    for role in roles.unique().tolist():
        of_sequence, of_position = (roles == role).nonzero(as_tuple=True)
        counts = torch.bincount(of_sequence, minlength=n)
        others = len(of_sequence) - counts[of_sequence]
        if int(others.min()) == 0:
            raise ValueError(f"role {role} occurs in one sequence only: no other sequence can donate to it")
        drawn = (torch.rand(n_patches, len(of_sequence), generator=generator, dtype=torch.float64) * others).long()
        # The own sequence's entries are a block of the sorted list: what is drawn behind its beginning skips them.
        before = (counts.cumsum(0) - counts)[of_sequence]
        drawn += torch.where(drawn >= before, counts[of_sequence], 0)
        sequences[:, of_sequence, of_position] = of_sequence[drawn]
        positions[:, of_sequence, of_position] = of_position[drawn]
    return sequences, positions


def _record_parts(
    hooked: Hooked,
    tokens: Int[Tensor, "sequence pos"],
    parts: Sequence[Component] | set[Component],
    *,
    start: _runs.Start,
) -> dict[Component, Float[Tensor, "sequence pos width"]]:
    places = {part: locate(hooked, part) for part in parts}
    sites: set[_runs.Site] = {(site, layer) for site, layer, _ in places.values()}
    kept, _ = _runs.record(hooked, tokens, sites, start=start, stop=max(layer for _, layer in sites))
    return {part: read(kept[site, layer], index) for part, (site, layer, index) in places.items()}


def _values(
    hooked: Hooked, part: Component, ablation: Ablation, activations: dict[Component, Tensor], donors: Donors | None
) -> _Values:
    if ablation == "zero":
        nothing = torch.zeros(1, 1, 1, device=hooked.device)
        return lambda patches, rows: nothing
    of_part = activations[part]
    if donors is None:
        mean = of_part.float().mean(dim=(0, 1), keepdim=True)
        return lambda patches, rows: mean
    sequences, positions = donors
    return lambda patches, rows: of_part[sequences[patches, rows], positions[patches, rows]]


def _hook(hooked: Hooked, part: Component, value: Tensor) -> Hook:
    site, layer, index = locate(hooked, part)
    return site, layer, _runs.replacing(index, value)


def _resampling(
    hooked: Hooked, part: Component, of_part: Float[Tensor, "sequence pos width"], donor: Int[Tensor, " sequence"]
) -> list[Hook]:
    """Hooks that replace a part in any batch by its donors' activations at the positions that are being run."""
    site, layer, index = locate(hooked, part)
    first: list[int] = [0]

    def find_position(pattern: Tensor) -> None:
        # With cached keys (model.generate) the batch begins behind them.
        first[0] = pattern.shape[-1] - pattern.shape[-2]

    def edit(activation: Tensor) -> Tensor:
        n_batch, length = activation.shape[:2]
        if first[0] + length > of_part.shape[1]:
            raise ValueError(
                f"cannot resample position {first[0] + length - 1}: the reference has {of_part.shape[1]} positions"
            )
        known = rows_being_run()
        rows = torch.arange(n_batch) if known is None else known
        value = of_part[donor[rows % len(donor)], first[0] : first[0] + length]
        return _runs.replacing(index, value)(activation)

    return [("pattern", layer, find_position), (site, layer, edit)]


def _describe_donors(ablation: Ablation, *, own: bool, by_role: bool) -> str:
    if ablation != "resample":
        return "none" if ablation == "zero" else "mean over the tokens" if own else "mean over the reference"
    where = "another sequence" if own else "a sequence of the reference"
    return f"random position of the same role in {where}" if by_role else f"same position of {where}"

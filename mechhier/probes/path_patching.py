"""Path patching: what one component passes on to another one, or to the logits, by direct paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.arguments import seed_number, shown
from mechhier.models.hooked import MAX_BYTES, Hook, Hooked, SiteName
from mechhier.models.torch_state import entered_in_default_torch_state, in_default_torch_state
from mechhier.probes import _runs
from mechhier.probes.ablation import ABLATABLE
from mechhier.probes.components import (
    Component,
    Entries,
    HeadInput,
    Index,
    Neurons,
    at,
    check,
    grouped,
    label,
    locate,
)
from mechhier.probes.metrics import Metric, check_callable, name_of
from mechhier.probes.patching import taking
from mechhier.probes.provenance import provenance
from mechhier.progress import track
from mechhier.results import scored

Receivers: TypeAlias = "Literal['logits'] | Sequence[HeadInput | tuple[HeadInput, ...]]"

DEFINITION = (
    "Run C: the clean run, the sender's output taken from the corrupted run, the output z of every other head frozen at the "
    "clean run's; norms {mlps} recomputed. Receiver logits: patched = metric of run C. Receivers q, k, v of heads: patched = "
    "metric of the clean run with those inputs taken from run C, all that follows recomputed. effect = patched - clean; "
    "recovered = (patched - corrupted) / (clean - corrupted), sums over sequences; NaN unless the interval of clean - "
    "corrupted, which needs 4 sequences, leaves out 0"
)
SOURCE = (
    "Wang et al. 2022, Interpretability in the Wild (appendix B); Goldowsky-Dill et al. 2023, Localizing Model Behavior"
)


@in_default_torch_state
def path_patch(
    model: Any,
    senders: Entries,
    clean: Int[Any, "sequence pos"],
    corrupted: Int[Any, "sequence pos"],
    receivers: Receivers = "logits",
    *,
    metric: Metric,
    freeze_mlps: bool = False,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
) -> xr.Dataset:
    """The effect of a component through its direct paths to given receivers, and no other.

    As in Wang et al. (2022) a direct path leads through the residual stream and MLPs, but no other attention head. With
    `freeze_mlps` it leads through the residual stream only, as where MLPs are nodes of their own (Goldowsky-Dill et al.
    2023): the effect on the logits is then the direct effect, with the final norm's true scale.

    Cost: two forward passes; for every sender one over the layers from it on, and with heads as receivers for every
    sender and receiver one over the layers from the receiver on. Memory: z of all layers (with `freeze_mlps` also what
    the MLPs write), and the stream at the receivers' layers, of all sequences.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`, sequential or parallel. Its own hooks, and the edits of
            contexts around the call, act in every run, before the patch.
        senders: `Head`, `Attention`, `MLP` or `Neurons`; those of a tuple send together.
        clean: Token ids without padding.
        corrupted: As many, of the same length.
        receivers: "logits", or `HeadInput`s; those of a tuple receive together.
        metric: One number per sequence, from `mechhier.probes.metrics` or a callable like them.
        freeze_mlps: Freeze MLPs, too, at the clean run's values.
        max_bytes: Working memory of one batch.
        seed: Of the bootstrap.

    Returns:
        `patched` and `effect` (the metric's units) and `recovered`, `[sender, receiver]`, and the scalars `clean` and
        `corrupted`; each with `_low`, `_high` (95 %, studentised bootstrap over sequences). Where no path leads from a
        sender to a receiver `patched` is `clean`.

    Raises:
        TypeError: Not a hooked model, components, token ids, or a metric.
        ValueError: Tokens or components that the model does not have; a metric that does not return one number per
            sequence.

    Example:
        >>> import mechhier as mh
        >>> from mechhier.probes import Head, HeadInput, path_patch, logit_difference
        >>> planted = mh.models.planted.planted_backup(share=0.7)
        >>> clean = planted.tokens(8)
        >>> corrupted = clean.roll(1, dims=0)
        >>> metric = logit_difference(answers=clean[:, 1], wrong=corrupted[:, 1])
        >>> model = mh.load_model(planted.model)
        >>> movers = path_patch(model, [Head(0, 0), Head(0, 1)], clean, corrupted, metric=metric)
        >>> movers.recovered.values.round(2).tolist()
        [[0.0], [1.0]]
    """
    hooked = Hooked(model, max_bytes=max_bytes)
    sending, receiving = _check_ends(hooked, senders, receivers)
    first, second = _runs.check_pair(hooked, clean, corrupted)
    metric, seed = check_callable(metric), seed_number(seed)
    labels = {
        "sender": _runs.label_coord([label(entry) for entry in sending]),
        "receiver": _runs.label_coord([label(entry) for entry in receiving] or ["logits"]),
    }
    values = {
        name: _runs.measure(hooked, tokens, metric)[0] for name, tokens in (("clean", first), ("corrupted", second))
    }
    paths = _Paths(hooked, first, second, sending, receiving, freeze_mlps)
    patched = np.empty((len(first), len(sending), len(labels["receiver"])))
    with track("patching paths", total=len(sending)) as advance:
        for number, sender in enumerate(sending):
            patched[:, number] = paths.from_sender(sender, metric, values["clean"])
            advance()

    name, units = name_of(metric)
    dims = ("sender", "receiver")
    variables = _runs.recovery(dims, values["clean"], values["corrupted"], patched, metric, seed=seed)
    effect = patched - values["clean"][:, None, None]
    words = f"change of the {name} along the path"
    variables |= scored(
        "effect", dims, effect, np.ones_like(effect), long_name=words, units=units, seed=seed, change=True
    )
    return _runs.labelled(
        variables,
        labels,
        provenance(
            hooked,
            phenomenon="path_patch",
            definition=DEFINITION.format(mlps="are" if freeze_mlps else "and MLPs are"),
            source=SOURCE,
            freeze_mlps=freeze_mlps,
            metric=name,
            seed=seed,
            n_sequences=len(first),
        ),
    )


@entered_in_default_torch_state
@contextmanager
def path_patched(
    model: Any,
    senders: Entries,
    clean: Int[Any, "sequence pos"],
    corrupted: Int[Any, "sequence pos"],
    receivers: Receivers = "logits",
    *,
    freeze_mlps: bool = False,
    max_bytes: int = MAX_BYTES,
) -> Iterator[None]:
    """Inside the block calls of the model on the clean tokens are path-patched, from all senders to all receivers.

    Row i of a call must be sequence i of `clean`; functions of this package keep rows apart however they batch them.
    Contexts nest. Nothing is left behind, also after an exception. Arguments and definition as `path_patch`.

    Cost: two forward passes on entry, and with heads as receivers one more from the first sender's layer on. Memory: z of
    all layers (with `freeze_mlps` also what the MLPs write), of all sequences.

    Raises:
        TypeError: As `path_patch`.
        ValueError: As `path_patch`. In a call: other sizes than the clean tokens'.

    Example:
        >>> import mechhier as mh
        >>> from mechhier.probes import Head, path_patched
        >>> planted = mh.models.planted.planted_backup(share=0.7)
        >>> model, clean = mh.load_model(planted.model), planted.tokens(8)
        >>> with path_patched(model, [Head(0, 0)], clean, clean.roll(1, dims=0)):
        ...     inside = model(clean)
        >>> bool((inside - model(clean)).abs().max() > 1)
        True
    """
    hooked = Hooked(model, max_bytes=max_bytes)
    sending, receiving = _check_ends(hooked, senders, receivers)
    first, second = _runs.check_pair(hooked, clean, corrupted)
    together = tuple(dict.fromkeys(part for entry in sending for part in entry))
    paths = _Paths(hooked, first, second, [together], receiving, freeze_mlps)
    edits: list[Hook] = []
    if not receiving:
        edits = [(site, layer, taking(values, index)) for site, layer, index, values in paths.sending(together)]
    received = paths.received(together)
    for part in dict.fromkeys(part for entry in paths.reached(together) for part in entry):
        site, layer, index = locate(hooked, part)
        edits.append((site, layer, taking(received[site, layer], index)))
    with _runs.acting(hooked, edits):
        yield


def _check_ends(
    hooked: Hooked, senders: Entries, receivers: Receivers
) -> tuple[list[tuple[Component, ...]], list[tuple[HeadInput, ...]]]:
    sending: Any = grouped(senders, accepted=ABLATABLE, name="senders")
    if isinstance(receivers, str) and receivers != "logits":
        raise ValueError(f"receivers must be 'logits' or a sequence of HeadInput, got {shown(receivers)}")
    receiving: Any = [] if isinstance(receivers, str) else grouped(receivers, accepted=(HeadInput,), name="receivers")
    for entry in (*sending, *receiving):
        check(hooked, entry)
    return sending, receiving


class _Paths:
    """What the runs of all senders and receivers have in common."""

    def __init__(
        self,
        hooked: Hooked,
        clean: Int[Tensor, "sequence pos"],
        corrupted: Int[Tensor, "sequence pos"],
        senders: list[tuple[Component, ...]],
        receivers: list[tuple[HeadInput, ...]],
        freeze_mlps: bool,
    ):
        self.hooked, self.clean, self.receivers, self.freeze_mlps = hooked, clean, receivers, freeze_mlps
        layers = range(hooked.n_layers)
        frozen: set[_runs.Site] = {("z", layer) for layer in layers}
        parts = {part for entry in senders for part in entry}
        if freeze_mlps and not hooked.attn_only:
            frozen |= {("mlp_out", layer) for layer in layers}
            frozen |= {("mlp_post", part.layer) for part in parts if isinstance(part, Neurons)}
        starts = {part.layer for entry in (*senders, *receivers) for part in entry} - {0}
        entering: set[_runs.Site] = {("resid_post", layer - 1) for layer in starts}
        kept, _ = _runs.record(hooked, clean, frozen | entering, stop=hooked.n_layers - 1)
        self.frozen = {site: kept[site] for site in frozen}
        self.starts: dict[int, _runs.Start] = {layer: (layer, kept["resid_post", layer - 1]) for layer in starts}
        self.starts[0] = None
        places = [locate(hooked, part) for part in parts]
        self.sent, _ = _runs.record(
            hooked, corrupted, {place[:2] for place in places}, stop=max(layer for _, layer, _ in places)
        )

    def from_sender(
        self, sender: tuple[Component, ...], metric: Metric, unpatched: Float[np.ndarray, " sequence"]
    ) -> Float[np.ndarray, "sequence receiver"]:
        """The metric with the sender's paths to every receiver patched."""
        layer = min(part.layer for part in sender)
        start = self.starts[layer]
        if not self.receivers:
            edited = _runs.measure(
                self.hooked, self.clean, metric, hooks=lambda _, rows: self._sending(sender, rows), start=start
            )
            return edited.T
        received = self.received(sender)
        columns = [self._with_inputs(entry, received, metric) if entry else unpatched for entry in self.reached(sender)]
        return np.stack(columns, axis=1)

    def reached(self, sender: tuple[Component, ...]) -> list[list[HeadInput]]:
        """Of every receiver, the inputs that a path from the sender leads to: those of later layers."""
        layer = min(part.layer for part in sender)
        return [[part for part in entry if part.layer > layer] for entry in self.receivers]

    def received(self, sender: tuple[Component, ...]) -> dict[_runs.Site, Tensor]:
        """What the receivers' sites are in run C, all sequences."""
        inputs = {locate(self.hooked, part)[:2] for entry in self.reached(sender) for part in entry}
        if not inputs:
            return {}
        return _runs.record(
            self.hooked,
            self.clean,
            inputs,
            start=self.starts[min(part.layer for part in sender)],
            stop=max(layer for _, layer in inputs),
            hooks=lambda rows: self._sending(sender, rows),
        )[0]

    def sending(self, sender: tuple[Component, ...]) -> Iterator[tuple[SiteName, int, Index, Tensor]]:
        """The edits of run C: what is between, frozen, and in its place the sender's output, of all sequences."""
        first = min(part.layer for part in sender)
        for (site, layer), clean in self.frozen.items():
            # Neurons send through their own output matrix, with the other neurons frozen.
            through = site == "mlp_out" and Neurons in {type(part) for part in sender if part.layer == layer}
            if layer >= first and not through:
                yield site, layer, (), clean
        for part in sender:
            site, layer, index = locate(self.hooked, part)
            yield site, layer, index, self.sent[site, layer]

    def _sending(self, sender: tuple[Component, ...], rows: Int[Tensor, " batch"]) -> list[Hook]:
        return [
            (site, layer, _runs.replacing(index, values[rows][at(index)]))
            for site, layer, index, values in self.sending(sender)
        ]

    def _with_inputs(
        self, entry: list[HeadInput], received: dict[_runs.Site, Tensor], metric: Metric
    ) -> Float[np.ndarray, " sequence"]:
        def hooks(_: Tensor, rows: Tensor) -> list[Hook]:
            edits: list[Hook] = []
            for part in entry:
                site, layer, index = locate(self.hooked, part)
                edits.append((site, layer, _runs.replacing(index, received[site, layer][rows][at(index)])))
            return edits

        start = self.starts[min(part.layer for part in entry)]
        return _runs.measure(self.hooked, self.clean, metric, hooks=hooks, start=start)[0]

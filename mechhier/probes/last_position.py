"""Runs that differ at the last position only: all earlier ones are run once, and each run costs one position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.models.hooked import Hook, Hooked, HookFunction, SiteName


class LastPosition:
    """Sequences of one length, of which only the last position is run again.

    An edit at the last position changes no earlier one, because attention is causal: with the keys and values of the
    earlier positions a run after it costs 1/T of a forward pass. Exact in every class: where a model was seen to go on
    from cached keys wrongly (MPT's ALiBi, rotations that depend on the length), whole sequences are run instead, with
    edits at the last position alone.

    Cost: one forward pass over the sequences. Memory: their keys and values, and the residual stream at one position
    (with whole runs: at all positions and layers).

    Args:
        hooked: The model.
        tokens: The sequences.
        rows: Which sequences of the measurement they are (`mechhier.models.hooked.rows_being_run`).

    Attributes:
        streams: The residual stream at the last position that leaves each layer: [layer, sequence, d_model].
        logits: [sequence, d_vocab].
    """

    streams: Float[Tensor, "layer sequence d_model"]
    logits: Float[Tensor, "sequence d_vocab"]

    def __init__(self, hooked: Hooked, tokens: Int[Tensor, "sequence pos"], rows: Int[Tensor, " sequence"]):
        self._hooked = hooked
        self._tokens = tokens[:, -1:]
        self._rows = rows
        self._length = tokens.shape[1]
        self._whole = not hooked.can("cached keys")
        if self._whole:
            self._tokens = tokens
        cached = self._length > 1 and not self._whole
        self._past = hooked.key_values(tokens[:, :-1], rows=rows) if cached else None
        streams: list[Tensor] = []
        # What leaves a layer, not what enters the next: edits of the caller that act there act in every run from there.
        entering: list[Tensor] = []
        hooks: list[Hook] = [("resid_post", layer, streams.append) for layer in range(hooked.n_layers)]
        hooks.append(("embed", None, entering.append))
        self.logits = hooked.run(self._tokens, hooks, past=self._past, rows=rows)[:, -1]
        # By the layer that they enter; needed where the earlier positions are run again.
        self._entering = [*entering, *streams] if self._whole else []
        self.streams = torch.stack([stream[:, -1] for stream in streams])

    def batches(self, index: Int[Tensor, " row"]) -> Iterator[slice]:
        """Parts of `index` that fit in the memory budget as rows of one run."""
        size = _batch_size(self._hooked, self._length)
        for start in range(0, len(index), size):
            yield slice(start, start + size)

    def run(
        self,
        index: Int[Tensor, " row"],
        hooks: Iterable[Hook] = (),
        *,
        start: tuple[int, Float[Tensor, "row d_model"]] | None = None,
    ) -> Float[Tensor, "row d_vocab"]:
        """Logits at the last position.

        Args:
            index: Which sequence each row continues.
            hooks: What to read and edit; activations have one position.
            start: A layer and the stream at the last position that enters it; by default the last token.
        """
        layer = 0 if start is None else start[0]
        entering = None if start is None else start[1][:, None]
        if self._whole:
            hooks = [(site, of_layer, _at_the_end(site, function)) for site, of_layer, function in hooks]
            if entering is not None:
                entering = torch.cat([self._entering[layer][index, :-1], entering], dim=1)
        return self._hooked.run(
            self._tokens[index],
            hooks,
            start=None if entering is None else (layer, entering),
            past=None if self._past is None else self._past.rows(index, first_layer=layer),
            rows=self._rows[index.to(self._rows.device)],
        )[:, -1]


def _at_the_end(site: SiteName, function: HookFunction) -> HookFunction:
    """A function of the activation at the last position, on activations of all positions."""
    position = 2 if site == "pattern" else 1  # [batch, head, query, key], else [batch, pos, ...]

    def act(activation: Tensor) -> Tensor | None:
        last = activation.narrow(position, activation.shape[position] - 1, 1)
        edited = function(last)
        if edited is None:
            return None
        return torch.cat([activation.narrow(position, 0, activation.shape[position] - 1), edited], dim=position)

    return act


def _batch_size(hooked: Hooked, length: int) -> int:
    """Rows of one run at the last position."""
    return hooked.batch_size(1, past=length - 1) if hooked.can("cached keys") else hooked.batch_size(length)


def last_positions(
    hooked: Hooked, tokens: Int[Tensor, "sequence pos"], rows: Int[Tensor, " sequence"]
) -> Iterator[tuple[slice, LastPosition]]:
    """`LastPosition` of as many sequences at a time as fit in the memory budget, and which; `rows` as there."""
    length = tokens.shape[1]
    size = min(hooked.batch_size(length), _batch_size(hooked, length))
    if not hooked.can("cached keys"):
        size = max(1, size // hooked.n_layers)  # the streams of all layers are kept
    for start in range(0, len(tokens), size):
        part = slice(start, start + size)
        yield part, LastPosition(hooked, tokens[part], rows[part])

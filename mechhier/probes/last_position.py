"""Runs that differ at the last position only: all earlier ones are run once, and each run costs one position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.models.hooked import Hook, Hooked


class LastPosition:
    """Sequences of one length, of which only the last position is run again.

    An edit at the last position changes no earlier one, because attention is causal: with the keys and values of the
    earlier positions a run after it costs 1/T of a forward pass. Exact in every class.

    Cost: one forward pass over the sequences. Memory: their keys and values, and the residual stream at one position.

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
        self._past = hooked.key_values(tokens[:, :-1], rows=rows) if self._length > 1 else None
        streams: list[Tensor] = []
        # What leaves a layer, not what enters the next: edits of the caller that act there act in every run from there.
        hooks: list[Hook] = [("resid_post", layer, streams.append) for layer in range(hooked.n_layers)]
        self.logits = hooked.run(self._tokens, hooks, past=self._past, rows=rows)[:, -1]
        self.streams = torch.stack(streams)[:, :, -1]

    def batches(self, index: Int[Tensor, " row"]) -> Iterator[slice]:
        """Parts of `index` that fit in the memory budget as rows of one run."""
        size = self._hooked.batch_size(1, past=self._length - 1)
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
        return self._hooked.run(
            self._tokens[index],
            hooks,
            start=None if start is None else (layer, start[1][:, None]),
            past=None if self._past is None else self._past.rows(index, first_layer=layer),
            rows=self._rows[index.to(self._rows.device)],
        )[:, -1]


def last_positions(
    hooked: Hooked, tokens: Int[Tensor, "sequence pos"], rows: Int[Tensor, " sequence"]
) -> Iterator[tuple[slice, LastPosition]]:
    """`LastPosition` of as many sequences at a time as fit in the memory budget, and which; `rows` as there."""
    length = tokens.shape[1]
    size = min(hooked.batch_size(length), hooked.batch_size(1, past=length - 1))
    for start in range(0, len(tokens), size):
        part = slice(start, start + size)
        yield part, LastPosition(hooked, tokens[part], rows[part])

"""Attention patterns: reduced inside the hooks, one layer at a time, or the patterns of a few sequences to look at."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.probes.hooked import Hooked

Reduced = TypeVar("Reduced")


def reduce_patterns(
    hooked: Hooked,
    tokens: Int[Tensor, "batch pos"],
    reduce: Callable[[Float[Tensor, "batch head query key"]], Reduced],
) -> list[Reduced]:
    """`reduce(pattern)` of every layer, in one forward pass.

    Memory beyond the forward pass is one layer's pattern and what `reduce` returns: no stack of patterns exists.
    """
    reduced: list[Reduced] = []

    def read(pattern: Tensor) -> None:
        reduced.append(reduce(pattern.float()))

    hooked.run(tokens, [("pattern", layer, read) for layer in range(hooked.n_layers)])
    return reduced


def patterns(
    hooked: Hooked, tokens: Int[Tensor, "batch pos"], heads: list[tuple[int, int]]
) -> Float[np.ndarray, "batch chosen query key"]:
    """Attention patterns of the chosen `(layer, head)` pairs, in the order given; one forward pass.

    Raises:
        ValueError: A head that the model does not have.
    """
    for layer, head in heads:
        if not (0 <= layer < hooked.n_layers and 0 <= head < hooked.n_heads):
            raise ValueError(
                f"no head L{layer}H{head}: the model has {hooked.n_layers} layers of {hooked.n_heads} heads"
            )
    found: dict[tuple[int, int], Tensor] = {}

    def read(pattern: Tensor, layer: int) -> None:
        found.update({pair: pattern[:, pair[1]].float().cpu() for pair in heads if pair[0] == layer})

    hooked.run(
        tokens, [("pattern", layer, partial(read, layer=layer)) for layer in sorted({pair[0] for pair in heads})]
    )
    return torch.stack([found[pair] for pair in heads], dim=1).numpy()

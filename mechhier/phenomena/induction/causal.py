"""What the model loses without its induction heads, against as many random heads of the same layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.models.hooked import Hook, Hooked
from mechhier.phenomena.induction.losses import copy_losses, late_minus_early, token_losses

MAX_SHARE = 8
"""At most one head in this many is ablated."""

HeadSet = frozenset[tuple[int, int]]
Groups = list[tuple[int, Int[Tensor, "batch pos"]]]
Loss = Callable[[Float[np.ndarray, "sequence token"]], Float[np.ndarray, " sequence"]]


@dataclass(frozen=True)
class Effects:
    """Change of a loss by ablation, in nats, on sequences that did not choose the heads.

    Attributes:
        top: Without the induction heads.
        controls: Without each set of random heads.
        lengths: Of the repeats; None on text.
    """

    top: Float[np.ndarray, " sequence"]
    controls: Float[np.ndarray, "control sequence"]
    lengths: Int[np.ndarray, " sequence"] | None


def choose_heads(
    scores: Float[np.ndarray, "layer head"], convincing: Float[np.ndarray, "layer head"]
) -> list[tuple[int, int]]:
    """The induction heads to ablate: all convincing ones, at least one, at most an eighth of the model's heads.

    They are taken by falling score; at most half the heads of a layer, so that as many others are left there for a
    control. None where layers have a single head.
    """
    n_heads = scores.shape[1]
    wanted = int(np.clip(convincing.sum(), 1, max(1, scores.size // MAX_SHARE)))
    chosen: list[tuple[int, int]] = []
    for flat in np.argsort(-scores, axis=None, kind="stable"):
        layer, head = divmod(int(flat), n_heads)
        if len(chosen) < wanted and sum(other == layer for other, _ in chosen) < n_heads // 2:
            chosen.append((layer, head))
    return chosen


def control_sets(chosen: list[tuple[int, int]], n_heads: int, n_controls: int, *, seed: int) -> list[HeadSet]:
    """Different sets of as many heads of the same layers, none of them chosen; fewer where fewer exist."""
    rng = np.random.default_rng(seed)
    layers = sorted({layer for layer, _ in chosen})
    others = {layer: [head for head in range(n_heads) if (layer, head) not in chosen] for layer in layers}
    sets: dict[HeadSet, None] = {}
    for _ in range(20 * n_controls):
        if len(sets) == n_controls:
            break
        drawn = [
            (layer, int(head))
            for layer in layers
            for head in rng.choice(others[layer], sum(other == layer for other, _ in chosen), replace=False)
        ]
        sets[frozenset(drawn)] = None
    return list(sets)


def ablate(
    hooked: Hooked,
    chosen: list[tuple[int, int]],
    controls: list[HeadSet],
    repeats: Groups,
    text: Int[Tensor, "batch pos"] | None,
    advance: Callable[..., None],
) -> dict[str, Effects]:
    """Changes of `copy_loss` on the repeats and of `ICL_score` on the text, on every other sequence of at least two.

    An ablated head's z is replaced by its mean over the positions of the sequences that are not scored, those on which
    the heads were chosen, of the same kind (repeats or text).

    Cost: 1 + (2 + number of controls) x (share of the layers from the first ablated one on) forward passes over half of
    the sequences. Memory beyond a pass: one batch's residual stream.
    """
    kinds: dict[str, list[tuple[Loss, Tensor, Tensor]]] = {}
    lengths: list[int] = []
    start = 0
    for length, rows in repeats:
        reference = torch.arange(start, start + len(rows), device=rows.device) % 2 == 0
        part = partial(_copy_loss, length=length), rows[reference], rows[~reference]
        kinds.setdefault("copy_loss", []).append(part)
        lengths += [length] * len(part[-1])
        start += len(rows)
    if not lengths:
        kinds.clear()
    if text is not None and len(text) > 1:
        kinds["ICL_score"] = [(late_minus_early, text[::2], text[1::2])]
    effects = {}
    for name, parts in kinds.items():
        means = _mean_z(hooked, [rows for _, rows, _ in parts if len(rows)], sorted({layer for layer, _ in chosen}))
        changes = [
            _changes(hooked, rows[part], part, loss, [frozenset(chosen), *controls], means, advance)
            for loss, _, rows in parts
            for part in torch.arange(len(rows)).split(hooked.batch_size(rows.shape[1]))
            if len(part)
        ]
        joined = np.concatenate(changes, axis=1)
        effects[name] = Effects(joined[0], joined[1:], np.array(lengths) if name == "copy_loss" else None)
    return effects


def _copy_loss(losses: Float[np.ndarray, "sequence token"], *, length: int) -> Float[np.ndarray, " sequence"]:
    return copy_losses(losses, length)[1]


def _mean_z(
    hooked: Hooked, batches: list[Int[Tensor, "batch pos"]], layers: list[int]
) -> dict[int, Float[Tensor, "head d_head"]]:
    """Mean output of every head of some layers, over all sequences and positions."""
    sums = {layer: torch.zeros(hooked.n_heads, hooked.d_head, device=hooked.device) for layer in layers}

    def read(z: Tensor, layer: int) -> None:
        sums[layer] += z.float().sum((0, 1))

    hooks: list[Hook] = [("z", layer, partial(read, layer=layer)) for layer in layers]
    for rows in batches:
        for part in torch.arange(len(rows)).split(hooked.batch_size(rows.shape[1])):
            hooked.run(rows[part], hooks, stop=layers[-1], rows=part)
    n_positions = sum(rows.numel() for rows in batches)
    return {layer: total / n_positions for layer, total in sums.items()}


def _changes(
    hooked: Hooked,
    tokens: Int[Tensor, "batch pos"],
    rows: Int[Tensor, " batch"],
    loss: Loss,
    head_sets: list[HeadSet],
    means: dict[int, Float[Tensor, "head d_head"]],
    advance: Callable[..., None],
) -> Float[np.ndarray, "head_set sequence"]:
    first = min(means)
    start = None if first == 0 else (first, hooked.run(tokens, stop=first - 1, rows=rows))
    clean = loss(token_losses(hooked.run(tokens, start=start, rows=rows), tokens))
    changes = []
    for heads in head_sets:
        hooks: list[Hook] = [("z", layer, partial(_replace, layer=layer, heads=heads, means=means)) for layer in means]
        changes.append(loss(token_losses(hooked.run(tokens, hooks, start=start, rows=rows), tokens)) - clean)
        advance(len(tokens))
    return np.stack(changes)


def _replace(
    z: Float[Tensor, "batch pos head d_head"],
    *,
    layer: int,
    heads: HeadSet,
    means: dict[int, Float[Tensor, "head d_head"]],
) -> Float[Tensor, "batch pos head d_head"]:
    ablated = [head for of, head in sorted(heads) if of == layer]
    z = z.clone()
    z[:, :, ablated] = means[layer][ablated].to(z.dtype)
    return z

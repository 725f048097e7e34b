"""One ablation's effect on a target logit, split exactly into what each downstream component does about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechhier.models.hooked import Hook, Hooked, SiteName
from mechhier.probes.attribution import centred_logit, target_directions

LayerKey: TypeAlias = tuple[str, int]
"""An attention or MLP layer: ("attention", 3), ("mlp", 3)."""
COMPONENTS: tuple[tuple[str, SiteName], ...] = (("attention", "attn_out"), ("mlp", "mlp_out"))
Level: TypeAlias = Literal["layer", "head"]


@dataclass(frozen=True)
class Part:
    """What is ablated: an attention or MLP layer, or one head."""

    component: str
    layer: int
    head: int | None = None

    @property
    def key(self) -> LayerKey:
        """The layer that it is, or is part of."""
        return self.component, self.layer


def parts(hooked: Hooked, level: Level) -> list[Part]:
    """Everything that is ablated at a level: [component, layer] or [layer, head], flattened in this order."""
    if level == "head":
        return [Part("attention", layer, head) for layer in range(hooked.n_layers) for head in range(hooked.n_heads)]
    return [Part(name, layer) for name, _ in COMPONENTS for layer in range(hooked.n_layers)]


@dataclass
class Clean:
    """What the clean run leaves for the ablated ones."""

    tokens: Int[Tensor, "sequence pos"]
    directions: Float[Tensor, "sequence pos d_model"]
    scale: Float[Tensor, "sequence pos"]
    targets: Int[Tensor, "sequence pos"]
    logit: Float[Tensor, "sequence pos"]
    chosen: Bool[Tensor, "sequence pos"]
    direct: dict[LayerKey, Float[Tensor, "sequence pos"]]
    total: Float[Tensor, "sequence pos"]
    """Of the whole stream: the target's centred logit without biases."""
    resid_post: list[Float[Tensor, "sequence pos d_model"]]
    """Leaving each layer; on the CPU where they would not fit in the budget. What leaves a layer, not what enters the next:
    edits of the caller that act there act in every run that begins there."""
    outputs: dict[LayerKey, Tensor]
    """What is ablated: writes [sequence, pos, d_model] by layer, or at head level z [sequence, pos, head, d_head]."""
    head_direct: dict[int, Float[Tensor, "sequence pos head"]]
    """Direct effects of heads by layer; at head level only."""

    def output(self, part: Part) -> Tensor:
        """What the part puts out: [sequence, pos, d_model], or [sequence, pos, d_head] for a head."""
        output = self.outputs[part.key]
        return (output if part.head is None else output[:, :, part.head]).to(self.scale.device)

    def direct_effect(self, part: Part) -> Float[Tensor, "sequence pos"]:
        """The part's direct effect on the target's logit."""
        return self.direct[part.key] if part.head is None else self.head_direct[part.layer][..., part.head]


@dataclass
class Effects:
    """Terms of one part's ablation, averaged over its replacements.

    By sequence: sums over the positions that count, float64.
    """

    terms: dict[str, Float[np.ndarray, " sequence"]] = field(default_factory=dict)
    response: dict[LayerKey, Float[np.ndarray, " sequence"]] = field(default_factory=dict)
    """Change of the direct effect of every layer downstream."""
    repair_by_direct: Float[np.ndarray, " sequence"] | float = 0.0
    """Self-repair times the clean direct effect, that centred over all positions that count."""
    head_response: dict[int, Float[Tensor, " head"]] = field(default_factory=dict)
    """Change of the direct effect of later heads, mean over the positions that count; at head level only."""
    identity_error: float = 0.0
    """Of all positions that count, the largest difference between the total effect and the sum of its terms."""
    unaffected_error: float = 0.0
    """Of all positions, the largest change of a layer that is not downstream."""
    largest: float = 0.0
    """Of all positions, the largest term."""


def clean_run(
    hooked: Hooked,
    tokens: Int[Tensor, "sequence pos"],
    *,
    level: Level,
    targets: Int[Tensor, "sequence pos"] | None,
    min_probability: float,
) -> Clean:
    """Direct effects on the targets (by default the top tokens), and what the ablations at this level need; one pass."""
    n, length = tokens.shape
    kept_bytes = n * length * hooked.n_layers * hooked.d_model * (3 if level == "layer" else 2) * hooked.dtype.itemsize
    store = hooked.device if kept_bytes <= hooked.max_bytes else torch.device("cpu")
    # All layers' activations of a batch exist at a time.
    size = max(1, hooked.batch_size(length) // hooked.n_layers)
    keys = [part.key for part in parts(hooked, "layer")]
    without_mlps = bool(getattr(hooked.cfg, "attn_only", False))
    found: list[Clean] = []
    for rows in torch.arange(n).split(size):
        batch = tokens[rows]
        seen: dict[tuple[str, int], Tensor] = {}

        def keep(name: str, layer: int, seen: dict[tuple[str, int], Tensor] = seen) -> Callable[[Tensor], None]:
            return lambda activation: seen.__setitem__((name, layer), activation)

        hooks = _scale_hooks(hooked, keep("final_scale", 0))
        for layer in range(hooked.n_layers):
            hooks += [("resid_post", layer, keep("resid_post", layer)), *_component_hooks(layer, keep)]
            if level == "head":
                hooks.append(("z", layer, keep("z", layer)))
        logits = hooked.run(batch, hooks, rows=rows)
        if without_mlps:
            # The MLP layers that such a model does not have write nothing.
            seen |= {("mlp", layer): torch.zeros_like(seen[("attention", layer)]) for layer in range(hooked.n_layers)}
        top = logits.argmax(-1)
        target = top if targets is None else targets[rows]
        directions = target_directions(hooked, target)
        scale = _scale(seen.get(("final_scale", 0)), target)
        direct = {key: _dot(seen[key], directions) / scale for key in keys}
        # The top token's probability is 1 / sum exp(logit - top logit).
        probability = (logits.float() - logits.float().amax(-1, keepdim=True)).exp().sum(-1).reciprocal()
        outputs = keys if level == "layer" else [("attention", layer) for layer in range(hooked.n_layers)]
        found.append(
            Clean(
                tokens=batch,
                directions=directions,
                scale=scale,
                targets=target,
                logit=centred_logit(logits, target),
                chosen=probability > min_probability,
                direct=direct,
                total=_dot(seen[("resid_post", hooked.n_layers - 1)], directions) / scale,
                resid_post=[seen[("resid_post", layer)].to(store) for layer in range(hooked.n_layers)],
                outputs={key: seen[key if level == "layer" else ("z", key[1])].to(store) for key in outputs},
                head_direct={
                    layer: hooked.head_projections(layer, seen[("z", layer)], directions) / scale[..., None]
                    for layer in range(hooked.n_layers)
                    if level == "head"
                },
            )
        )
    return _joined(found)


def _joined(batches: list[Clean]) -> Clean:
    def join(values: list[Any]) -> Any:
        """Tensors along the sequences; lists and mappings of tensors entry by entry."""
        if isinstance(values[0], dict):
            return {key: join([value[key] for value in values]) for key in values[0]}
        if isinstance(values[0], list):
            return [join(list(entries)) for entries in zip(*values, strict=True)]
        return torch.cat(values)

    return Clean(**{each.name: join([getattr(batch, each.name) for batch in batches]) for each in fields(Clean)})


def effects(hooked: Hooked, clean: Clean, part: Part, versions: Iterable[Tensor]) -> Effects:
    """Mean over versions of the part's output of what running with it does, from the part's layer on.

    Versions run as rows of one batch, as many as fit. Cost: a pass from the part's layer on for each version (for an
    MLP from the layer behind it).
    """
    result = Effects()
    n, n_runs = len(clean.tokens), 0
    together = max(1, hooked.batch_size(clean.tokens.shape[1]) // n)
    remaining = iter(versions)
    while group := list(islice(remaining, together)):
        _add(result, hooked, clean, part, torch.cat(group), len(group))
        n_runs += len(group)
    for of in (result.terms, result.response, result.head_response):
        for name in of:
            of[name] = of[name] / n_runs  # type: ignore[index]
    result.repair_by_direct = result.repair_by_direct / n_runs
    return result


def centred(clean: Clean, values: Float[Tensor, "sequence pos"]) -> Float[Tensor, "sequence pos"]:
    """Values minus their mean over the positions that count, there; 0 elsewhere."""
    return torch.where(clean.chosen, values - values[clean.chosen].mean(), 0.0)


def _add(result: Effects, hooked: Hooked, clean: Clean, part: Part, replaced: Tensor, k: int) -> None:
    """Add the terms of `k` versions, stacked as rows, to the result's."""
    rows = torch.arange(len(clean.tokens), device=clean.tokens.device).repeat(k)
    logit, changes, scale, head_response = _run(hooked, clean, part, replaced, rows)
    chosen = clean.chosen[rows]
    downstream = {other: change for other, change in changes.items() if _is_downstream(hooked, part.key, other)}
    unaffected = [change for other, change in changes.items() if other not in downstream and other != part.key]
    own = changes[part.key]
    attention, mlp = (
        sum((change for other, change in downstream.items() if other[0] == name), torch.zeros_like(own))
        for name, _ in COMPONENTS
    )
    total = logit - clean.logit[rows]
    norm = (clean.scale[rows] / scale - 1.0) * (clean.total[rows] + own + attention + mlp)
    measured = {
        "total_effect": total,
        "own_change": own,
        "attention_growth": attention,
        "mlp_change": mlp,
        "norm_change": norm,
        "self_repair": total - own,
    }
    error = (total - own - attention - mlp - norm).abs()[chosen]
    result.identity_error = max(result.identity_error, float(error.max()) if error.numel() else 0.0)
    result.unaffected_error = max([result.unaffected_error, *(float(change.abs().max()) for change in unaffected)])
    result.largest = max(result.largest, *(float(term.abs().max()) for term in measured.values()))

    def by_sequence(values: list[Tensor]) -> Float[np.ndarray, "value sequence"]:
        counted = torch.where(chosen, torch.stack(values), 0.0).sum(-1)
        return counted.cpu().double().unflatten(1, (k, -1)).sum(1).numpy()

    for into, values in ((result.terms, measured), (result.response, downstream)):
        for name, summed in zip(values, by_sequence(list(values.values())) if values else (), strict=True):
            into[name] = into.get(name, 0.0) + summed  # type: ignore[arg-type, call-overload]
    by_direct = centred(clean, clean.direct_effect(part))[rows] * measured["self_repair"]
    result.repair_by_direct = result.repair_by_direct + by_sequence([by_direct])[0]
    for layer, value in head_response.items():
        result.head_response[layer] = result.head_response.get(layer, 0.0) + value


def _is_downstream(hooked: Hooked, ablated: LayerKey, other: LayerKey) -> bool:
    same_block = other[1] == ablated[1] and ablated[0] == "attention" and other[0] == "mlp"
    return other[1] > ablated[1] or (same_block and not hooked.parallel)


def _run(
    hooked: Hooked, clean: Clean, part: Part, replaced: Tensor, index: Int[Tensor, " row"]
) -> tuple[Tensor, dict[LayerKey, Tensor], Tensor, dict[int, Tensor]]:
    """The target's centred logit, Delta DE by layer (from the ablated one on), the scale, and Delta DE of heads.

    All [row, pos] but the last, which is summed over rows and averaged over the chosen positions of the clean run.
    """
    # What an MLP writes changes nothing before the next layer, which gets its input directly.
    behind, head, output = part.component == "mlp", part.head, clean.output(part)
    first_layer = part.layer + behind
    logits: list[Tensor] = []
    direct: dict[LayerKey, list[Tensor]] = {}
    by_head: dict[int, Tensor] = {}
    scales: list[Tensor] = []
    for rows in index.split(hooked.batch_size(clean.tokens.shape[1])):
        done = sum(len(each) for each in logits)
        new = replaced[done : done + len(rows)]
        directions, scale = clean.directions[rows], clean.scale[rows]
        moved = new.float() - output[rows].float() if behind else 0.0
        if isinstance(moved, Tensor):
            direct.setdefault(part.key, []).append(clean.direct[part.key][rows] + _dot(moved, directions) / scale)
        start = None
        if first_layer > 0:
            entering = clean.resid_post[first_layer - 1]
            entering = entering[rows.to(entering.device)].to(hooked.device)
            start = (first_layer, (entering.float() + moved).to(entering.dtype))

        def project(
            name: str, layer: int, directions: Tensor = directions, scale: Tensor = scale
        ) -> Callable[[Tensor], None]:
            return lambda write: direct.setdefault((name, layer), []).append(_dot(write, directions) / scale)

        def replace(output: Tensor, new: Tensor = new) -> Tensor:
            if head is None:
                return new
            output = output.clone()
            output[:, :, head] = new
            return output

        def read_heads(
            layer: int, rows: Tensor = rows, directions: Tensor = directions, scale: Tensor = scale
        ) -> Callable[[Tensor], None]:
            def read(z: Tensor) -> None:
                change = hooked.head_projections(layer, z, directions) / scale[..., None]
                change = (change - clean.head_direct[layer][rows])[clean.chosen[rows]].sum(0)
                by_head[layer] = by_head.get(layer, 0.0) + change / clean.chosen.sum()

            return read

        hooks = _scale_hooks(hooked, scales.append)
        if not behind:
            hooks.append(("attn_out" if head is None else "z", part.layer, replace))
        for later in range(first_layer, hooked.n_layers):
            hooks += _component_hooks(later, project)
            if head is not None and later > part.layer:
                hooks.append(("z", later, read_heads(later)))
        found = hooked.run(clean.tokens[rows], hooks, start=start, rows=rows)
        logits.append(centred_logit(found, clean.targets[rows]))
    changes = {key: torch.cat(values) - clean.direct[key][index] for key, values in direct.items()}
    return torch.cat(logits), changes, _scale(torch.cat(scales) if scales else None, clean.targets[index]), by_head


def _component_hooks(layer: int, reader: Callable[[str, int], Callable[[Tensor], None]]) -> Iterator[Hook]:
    return ((site, layer, reader(name, layer)) for name, site in COMPONENTS)


def _scale_hooks(hooked: Hooked, read: Callable[[Tensor], None]) -> list[Hook]:
    return [] if hooked.final_norm == "none" else [("final_scale", None, read)]


def _scale(read: Tensor | None, like: Tensor) -> Float[Tensor, "sequence pos"]:
    """The final norm's scale, 1 in a model without norms."""
    return torch.ones_like(like, dtype=torch.float32) if read is None else read.float()[..., 0]


def _dot(writes: Tensor, directions: Tensor) -> Float[Tensor, "sequence pos"]:
    return torch.einsum("npd,npd->np", writes.float(), directions)

"""One ablation's effect on a target logit, split exactly into what each downstream component does about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechhier.models.hooked import Hook, Hooked, SiteName
from mechhier.probes.ablation import Ablation
from mechhier.probes.attribution import centred_logit, target_directions

LayerKey: TypeAlias = tuple[str, int]
"""An attention or MLP layer: ("attention", 3), ("mlp", 3)."""
COMPONENTS: tuple[tuple[str, SiteName], ...] = (("attention", "attn_out"), ("mlp", "mlp_out"))
Level: TypeAlias = Literal["layer", "head"]
_RESOLUTION = 1e-5
"""Of the largest direct effect: direct effects that vary by less are rounding."""


@dataclass(frozen=True)
class Part:
    """What is ablated: an attention or MLP layer, or one head."""

    component: str
    layer: int
    head: int | None = None

    def __str__(self) -> str:
        return f"{self.component} {self.layer}" if self.head is None else f"head {self.head} of layer {self.layer}"

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
    probability: Float[Tensor, "sequence pos"]
    """Of the top token."""
    chosen: Bool[Tensor, "sequence pos"]
    """Positions that count."""
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

    def first_sequence(self) -> Clean:
        """The clean run of the first sequence alone."""

        def cut(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: cut(each) for key, each in value.items()}
            return [cut(each) for each in value] if isinstance(value, list) else value[:1]

        return Clean(**{each.name: cut(getattr(self, each.name)) for each in fields(self)})

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
    direct: Float[np.ndarray, " sequence"] = field(default_factory=lambda: np.zeros(1))
    """The part's clean direct effect."""
    direct_squares: Float[np.ndarray, " sequence"] = field(default_factory=lambda: np.zeros(1))
    """Square of the clean direct effect, centred over all positions that count."""
    repair_by_direct: Float[np.ndarray, " sequence"] = field(default_factory=lambda: np.zeros(1))
    """Self-repair times the clean direct effect, both centred."""
    head_response: dict[int, Float[Tensor, " head"]] = field(default_factory=dict)
    """Change of the direct effect of later heads, mean over the positions that count; at head level only."""
    identity_error: float = 0.0
    """Of all positions that count, the largest difference between the total effect and the sum of its terms."""
    unaffected_error: float = 0.0
    """Of all positions, the largest change of a layer that is not downstream."""
    largest: float = 0.0
    """Of all positions, the largest term."""


@dataclass(frozen=True)
class Turning:
    """The null of a part's ablation: the part writes as much and as variably, in directions that mean nothing.

    What it adds to the stream, w, becomes centre + (w - centre) R with one random rotation R for all positions and
    sequences, in the run that chooses the targets and in the ablated one; the centre is what the ablation leaves on
    average. An untrained part's output matrix is as likely with R as without, so that in an untrained model nothing
    tells the part from its turned self.
    """

    part: Part
    rotation: Float[Tensor, "d_model d_model"]
    centre: Float[Tensor, "#sequence #pos d_model"]

    def __call__(self, write: Float[Tensor, "sequence pos d_model"]) -> Float[Tensor, "sequence pos d_model"]:
        """What is written instead."""
        return self.centre + (write - self.centre) @ self.rotation

    def hooks(self, hooked: Hooked) -> list[Hook]:
        """Turn what the part writes, in any run."""
        part = self.part
        site, head = dict(COMPONENTS)[part.component], part.head
        if head is None:
            return [(site, part.layer, lambda write: self(write.float()).to(write.dtype))]
        seen: dict[str, Tensor] = {}

        def turn(attention: Tensor) -> Tensor:
            write = head_write(hooked, part.layer, head, seen.pop("z"))
            return (attention.float() + self(write) - write).to(attention.dtype)

        return [("z", part.layer, lambda z: seen.update(z=z)), (site, part.layer, turn)]


def turning(
    hooked: Hooked, clean: Clean, part: Part, ablation: Ablation, rotation: Float[Tensor, "d_model d_model"]
) -> Turning:
    """The null of one part under an ablation, for one rotation; no pass."""
    if ablation == "zero":
        return Turning(part, rotation, torch.zeros(1, 1, hooked.d_model, device=hooked.device))
    output = clean.outputs[part.key]
    writes = torch.zeros(output.shape[1], hooked.d_model, device=hooked.device)
    for batch in output.split(hooked.batch_size(output.shape[1])):
        batch = batch.to(hooked.device)
        write = batch.float() if part.head is None else head_write(hooked, part.layer, part.head, batch)
        writes += write.sum(0) / len(output)
    return Turning(part, rotation, writes[None] if ablation == "resample" else writes.mean(0)[None, None])


def head_write(
    hooked: Hooked, layer: int, head: int, z: Float[Tensor, "sequence pos head d_head"]
) -> Float[Tensor, "sequence pos d_model"]:
    """What one head adds to the stream, float32 (in a post-norm model its share, see `Hooked.head_writes`)."""
    if hooked.attention_gains(layer)[1] is not None:
        return hooked.head_writes(layer, z)[0][:, :, head]
    return z[:, :, head].float() @ hooked.W_O(layer)[head].float()


def clean_run(
    hooked: Hooked,
    tokens: Int[Tensor, "sequence pos"],
    *,
    level: Level,
    targets: Int[Tensor, "sequence pos"] | None,
    min_probability: float,
) -> Clean:
    """Direct effects on the targets (by default the top tokens), and what the ablations at this level need; one pass.

    Raises:
        RuntimeError: Activations or logits are not finite.
    """
    clean = _read(hooked, tokens, level=level, targets=targets)
    _check_finite(clean)
    return replace(clean, chosen=clean.probability > min_probability)


def turned_run(
    hooked: Hooked, clean: Clean, turning: Turning, *, level: Level, targets: Int[Tensor, "sequence pos"] | None
) -> Clean:
    """The clean run of the model whose part is turned, its targets the top tokens of this run unless given.

    The positions that count are the clean run's. Cost: a pass from the part's layer on.
    """
    part = turning.part
    turned = _read(
        hooked, clean.tokens, level=level, targets=targets, first_layer=part.layer, clean=clean, turning=turning
    )
    head_direct: dict[int, Tensor] = {}
    if part.head is not None:
        # w R . u = w . R u, without making the writes.
        along = turned.directions @ turning.rotation.T
        projections = hooked.head_projections(part.layer, clean.outputs[part.key].to(hooked.device), along)
        fixed = (turning.centre * (turned.directions - along)).sum(-1)[..., None]
        head_direct = {part.layer: (projections + fixed) / turned.scale[..., None]}
    return replace(
        turned,
        chosen=clean.chosen,
        outputs=clean.outputs,
        head_direct=head_direct,
        resid_post=clean.resid_post[: part.layer] + turned.resid_post,
    )


def _read(
    hooked: Hooked,
    tokens: Int[Tensor, "sequence pos"],
    *,
    level: Level,
    targets: Int[Tensor, "sequence pos"] | None,
    first_layer: int = 0,
    clean: Clean | None = None,
    turning: Turning | None = None,
) -> Clean:
    """One run, everything of it that ablations need, from a layer on (of the layers before nothing)."""
    n, length = tokens.shape
    kept_bytes = n * length * hooked.n_layers * hooked.d_model * (3 if level == "layer" else 2) * hooked.dtype.itemsize
    store = hooked.device if kept_bytes <= hooked.max_bytes else torch.device("cpu")
    # All layers' activations of a batch exist at a time.
    size = max(1, hooked.batch_size(length) // hooked.n_layers)
    layers = range(first_layer, hooked.n_layers)
    keys = [(name, layer) for name, _ in COMPONENTS for layer in layers]
    without_mlps = bool(getattr(hooked.cfg, "attn_only", False))
    found: list[Clean] = []
    for rows in torch.arange(n).split(size):
        seen: dict[tuple[str, int], Tensor] = {}

        def keep(name: str, layer: int, seen: dict[tuple[str, int], Tensor] = seen) -> Callable[[Tensor], None]:
            return lambda activation: seen.__setitem__((name, layer), activation)

        hooks = _scale_hooks(hooked, keep("final_scale", 0)) + ([] if turning is None else turning.hooks(hooked))
        for layer in layers:
            hooks += [("resid_post", layer, keep("resid_post", layer)), *_component_hooks(layer, keep)]
            if level == "head" and turning is None:
                hooks.append(("z", layer, keep("z", layer)))
        start = None
        if clean is not None and first_layer > 0:
            entering = clean.resid_post[first_layer - 1]
            start = (first_layer, entering[rows.to(entering.device)].to(hooked.device))
        logits = hooked.run(tokens[rows], hooks, start=start, rows=rows)
        if without_mlps:
            # The MLP layers that such a model does not have write nothing.
            seen |= {("mlp", layer): torch.zeros_like(seen[("attention", layer)]) for layer in layers}
        target = logits.argmax(-1) if targets is None else targets[rows]
        directions = target_directions(hooked, target)
        scale = _scale(seen.get(("final_scale", 0)), target)
        # The top token's probability is 1 / sum exp(logit - top logit).
        probability = (logits.float() - logits.float().amax(-1, keepdim=True)).exp().sum(-1).reciprocal()
        outputs = [key for key in keys if turning is None and (level == "layer" or key[0] == "attention")]
        found.append(
            Clean(
                tokens=tokens[rows],
                directions=directions,
                scale=scale,
                targets=target,
                logit=centred_logit(logits, target),
                probability=probability,
                chosen=torch.ones_like(probability, dtype=torch.bool),
                direct={key: _dot(seen[key], directions) / scale for key in keys},
                total=_dot(seen[("resid_post", hooked.n_layers - 1)], directions) / scale,
                resid_post=[seen[("resid_post", layer)].to(store) for layer in layers],
                outputs={key: seen[key if level == "layer" else ("z", key[1])].to(store) for key in outputs},
                head_direct={
                    layer: hooked.head_projections(layer, seen[("z", layer)], directions) / scale[..., None]
                    for layer in layers
                    if level == "head" and turning is None
                },
            )
        )
    return _joined(found)


def _check_finite(clean: Clean) -> None:
    """Refuse a run that holds what is not a number.

    Raises:
        RuntimeError: With the first layer that does.
    """
    for layer, resid in enumerate(clean.resid_post):
        if not resid.isfinite().all():
            raise RuntimeError(
                f"the residual stream behind layer {layer} is not finite: the weights up to there hold NaN or infinity, or "
                f"activations overflow {str(resid.dtype).removeprefix('torch.')}; look at the checkpoint, or load it with "
                'dtype="float32"'
            )
    if not clean.logit.isfinite().all() or not clean.total.isfinite().all():
        raise RuntimeError(
            "the logits are not finite though the residual stream is: the unembedding, the final norm or their product "
            "holds NaN or infinity; direct effects are not defined"
        )


def _joined(batches: list[Clean]) -> Clean:
    def join(values: list[Any]) -> Any:
        """Tensors along the sequences; lists and mappings of tensors entry by entry."""
        if isinstance(values[0], dict):
            return {key: join([value[key] for value in values]) for key in values[0]}
        if isinstance(values[0], list):
            return [join(list(entries)) for entries in zip(*values, strict=True)]
        return torch.cat(values)

    return Clean(**{each.name: join([getattr(batch, each.name) for batch in batches]) for each in fields(Clean)})


def effects(
    hooked: Hooked,
    clean: Clean,
    part: Part,
    versions: Iterable[Float[Tensor, "sequence pos width"]],
    *,
    turning: Turning | None = None,
) -> Effects:
    """Mean over versions of the part's output of what running with it does, from the part's layer on.

    With a turning, `clean` is its `turned_run`, and the versions are of the output before it is turned.

    Versions run as rows of one batch, as many as fit. Cost: a pass from the part's layer on for each version (for an
    MLP from the layer behind it).

    Raises:
        RuntimeError: An ablated run is not finite.
    """
    result = Effects()
    n, n_runs = len(clean.tokens), 0
    together = max(1, hooked.batch_size(clean.tokens.shape[1]) // n)
    remaining = iter(versions)
    while group := list(islice(remaining, together)):
        _add(result, hooked, clean, part, torch.cat(group), len(group), turning)
        n_runs += len(group)
    for of in (result.terms, result.response, result.head_response):
        for name in of:
            of[name] = of[name] / n_runs  # type: ignore[index]
    direct = clean.direct_effect(part)
    result.direct = _by_sequence(torch.where(clean.chosen, direct, 0.0))
    x = centred(clean, direct)
    largest = max(float(each.abs().max()) for each in clean.direct.values())
    if float(x.abs().max()) <= _RESOLUTION * largest:
        x, result.repair_by_direct = torch.zeros_like(x), np.zeros(1)
    mean_repair = result.terms["self_repair"].sum() / max(1, int(clean.chosen.sum()))
    result.direct_squares = _by_sequence(x**2)
    result.repair_by_direct = result.repair_by_direct / n_runs - _by_sequence(x) * mean_repair
    return result


def centred(clean: Clean, values: Float[Tensor, "sequence pos"]) -> Float[Tensor, "sequence pos"]:
    """Values minus their mean over the positions that count, there; 0 elsewhere."""
    return torch.where(clean.chosen, values - values[clean.chosen].mean(), 0.0)


def _by_sequence(values: Float[Tensor, "sequence pos"]) -> Float[np.ndarray, " sequence"]:
    return values.sum(-1).cpu().double().numpy()


def _add(
    result: Effects, hooked: Hooked, clean: Clean, part: Part, replaced: Tensor, k: int, turning: Turning | None
) -> None:
    """Add the terms of `k` versions, stacked as rows, to the result's."""
    rows = torch.arange(len(clean.tokens), device=clean.tokens.device).repeat(k)
    logit, changes, scale, head_response = _run(hooked, clean, part, replaced, rows, turning)
    if not logit.isfinite().all():
        raise RuntimeError(
            f"ablating {part} gives logits that are not finite: activations overflow "
            f"{str(hooked.dtype).removeprefix('torch.')}, or what is put in place holds NaN"
        )
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
    hooked: Hooked, clean: Clean, part: Part, replaced: Tensor, index: Int[Tensor, " row"], turning: Turning | None
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
            moved = moved if turning is None else moved @ turning.rotation
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

        def put(output: Tensor, new: Tensor = new) -> Tensor:
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
            hooks.append(("attn_out" if head is None else "z", part.layer, put))
            hooks += [] if turning is None else turning.hooks(hooked)
        for later in range(first_layer, hooked.n_layers):
            hooks += _component_hooks(later, project)
            if head is not None and later > part.layer and turning is None:
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

"""The Hydra effect: ablate one layer, and see which later ones make up for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechhier.phenomena._provenance import provenance
from mechhier.phenomena._tokens import natural_tokens
from mechhier.probes.ablation import Ablation, check_ablation, matched_noise, replacements
from mechhier.probes.attribution import centred_logit, target_directions
from mechhier.probes.hooked import Hook, Hooked, SiteName
from mechhier.progress import track
from mechhier.results import Variables, scored

DEFINITION = (
    "i = the clean run's top token. Direct effect DE_c = (a_c gamma / sigma) W_U[:, i], centred over the vocabulary, "
    "sigma frozen at the clean run's. Ablating m: total effect TE = logit_i(ablated) - logit_i(clean) = own change + "
    "attention growth + MLP change + norm change, where own, attention and MLP are Delta DE of m, of the attention and "
    "of the MLP layers downstream of m, and norm = (s/s' - 1) (logit_i + sum Delta DE). Self-repair = TE - own change. "
    "Hydra = attention growth. Compensation = OLS slope of self-repair on DE_m over positions."
)
SOURCE = "McGrath et al. 2023, The Hydra Effect; Rushing & Nanda 2024, Explorations of Self-Repair"

COMPONENTS: tuple[tuple[str, SiteName], ...] = (("attention", "attn_out"), ("mlp", "mlp_out"))
NULL_DRAWS = 4
"""Random perturbations per ablated component."""
_TOLERANCE = 1e-3
"""Largest effect of an ablation that should have none, relative to the largest direct effect."""

_TERMS = {
    "total_effect": "total effect of the ablation on the top token's logit",
    "own_change": "change of the ablated component's own direct effect",
    "attention_growth": "Hydra effect: change of downstream attention's direct effect",
    "mlp_change": "change of downstream MLPs' direct effect",
    "norm_change": "change through the final norm's scale",
    "self_repair": "self-repair: total effect minus own change",
}
_WITH_NULL = ("total_effect", "attention_growth", "mlp_change", "self_repair")


@dataclass
class _Clean:
    """What the clean run leaves for the ablated ones; every tensor is [sequence, pos, ...]."""

    tokens: Int[Tensor, "sequence pos"]
    directions: Float[Tensor, "sequence pos d_model"]
    scale: Float[Tensor, "sequence pos"]
    logit: Float[Tensor, "sequence pos"]
    targets: Int[Tensor, "sequence pos"]
    chosen: Bool[Tensor, "sequence pos"]
    resid_pre: list[Float[Tensor, "sequence pos d_model"]]
    """Entering each layer, and, last, leaving the last one."""
    writes: dict[tuple[str, int], Float[Tensor, "sequence pos d_model"]]
    direct: dict[tuple[str, int], Float[Tensor, "sequence pos"]]
    total: Float[Tensor, "sequence pos"]
    """Sum of all direct effects: the target's centred logit without biases."""


@dataclass
class _Effects:
    """Terms of one ablated component, summed over its replacements; every tensor is [sequence, pos]."""

    n_runs: int = 0
    terms: dict[str, Tensor] = field(default_factory=dict)
    response: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    identity_error: float = 0.0
    unaffected_error: float = 0.0

    def mean(self, term: str) -> Tensor:
        return self.terms[term] / self.n_runs


def hydra(
    model: Any,
    tokens: Int[Any, "batch pos"] | None = None,
    *,
    ablation: Ablation = "resample",
    n_patches: int = 16,
    min_probability: float = 0.5,
    n_sequences: int = 64,
    seed: int = 0,
) -> xr.Dataset:
    """What ablating each attention and MLP layer does to the top token's logit, term by term, and who makes up for it.

    A component's own write is ablated, never the residual stream. The terms add up exactly (see `DEFINITION`;
    the largest deviation is in `identity_error`), so that repair by later attention (the Hydra effect), by later MLPs
    and by the final norm are told apart. The null moves the component's write as far, in a random direction.

    Cost: two forward passes, and for each of the 2L components `n_patches` (resample) or 1 (mean, zero) passes plus 4
    for the null: from the ablated layer on for attention, from the layer behind it for an MLP, so L passes for all
    components at once on average. Memory: 3 L tensors of [sequence, pos, d_model].

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        tokens: Sequences to measure on, without padding. By default held-out text of the model's grammar; without a
            grammar built-in English sentences; without a tokenizer random repeated tokens.
        ablation: What replaces the component's write: "resample" (the same position of `n_patches` other
            sequences), "mean" (over sequences and positions) or "zero".
        n_patches: Donors per sequence for "resample"; 15 or more are needed for a stable estimate (McGrath et al.).
        min_probability: Positions count where the clean top token's probability exceeds this.
        n_sequences: Sequences to draw when none are given (there are 24 built-in sentences).
        seed: Seed of everything drawn.

    Returns:
        For each ablated `component` ("attention", "mlp") and `layer`, in logits: `direct_effect` (clean),
        `total_effect`, `own_change`, `attention_growth`, `mlp_change`, `norm_change`, `self_repair`, each with `_low`,
        `_high` (95 %, bootstrap over sequences), four of them with `_null`; `compensation` (slope); `response`
        `[component, layer, responding_component, responding_layer]`; the scalars `n_positions`,
        `n_positions_total`, `identity_error`, `no_op_error`. NaN where no position qualifies.

    Raises:
        TypeError: Not a hooked model.
        ValueError: Tokens or an ablation that cannot be used.
        RuntimeError: Replacing a write by itself, or one that a component cannot see, has an effect: the model is not a
            deterministic causal stack.

    Example:
        >>> import mechhier as mh
        >>> planted = mh.models.planted.planted_inert()
        >>> result = mh.phenomena.hydra(mh.load_model(planted.model), min_probability=0.0, n_sequences=8, n_patches=4)
        >>> bool(abs(result.attention_growth).max() < 1e-4)
        True
    """
    hooked = Hooked(model)
    if getattr(hooked.cfg, "output_logits_soft_cap", None) and hooked.cfg.output_logits_soft_cap > 0:
        raise ValueError("direct effects are not defined for a model that caps its logits (output_logits_soft_cap)")
    if tokens is None:
        text, rows = natural_tokens(hooked, n_sequences, seed=seed)
    else:
        text, rows = "given by the caller", hooked.check_tokens(tokens)
    check_ablation(ablation, len(rows), n_patches)

    clean = _clean_run(hooked, rows, min_probability)
    generator = torch.Generator().manual_seed(seed)
    ablated: dict[tuple[str, int], _Effects] = {}
    null: dict[tuple[str, int], _Effects] = {}
    with track("hydra: ablating layers", total=2 * hooked.n_layers) as advance:
        for key, writes in clean.writes.items():
            ablated[key] = _effects(hooked, clean, key, replacements(writes, ablation, n_patches=n_patches))
            moved = replacements(writes, ablation, n_patches=min(NULL_DRAWS, n_patches))
            repeated = (version for version in moved for _ in range(1 if ablation == "resample" else NULL_DRAWS))
            null[key] = _effects(
                hooked, clean, key, (matched_noise(writes, version, generator) for version in repeated)
            )
            advance()

    inert = ("attention", 0)
    unchanged = _effects(hooked, clean, inert, [clean.writes[inert]])
    no_op_error = max(
        *(effects.unaffected_error for effects in ablated.values()),
        *(float(change.abs().max()) for change in unchanged.terms.values()),
    )
    largest = max(float(direct.abs().max()) for direct in clean.direct.values())
    if no_op_error > _TOLERANCE * (1.0 + largest):
        raise RuntimeError(
            f"replacing a write by itself, or one that a component cannot see, changed a direct effect by {no_op_error:.3g}; "
            "the model (or a hook on it) is not deterministic, or it is not a causal stack of layers"
        )
    variables = _terms(clean, ablated, null, seed=seed) | _compensation(clean, ablated, seed=seed)
    variables |= _response(clean, ablated)
    counts = {
        "n_positions": (int(clean.chosen.sum()), "positions whose clean top probability exceeds the threshold", "1"),
        "n_positions_total": (clean.chosen.numel(), "positions looked at", "1"),
        "identity_error": (
            max(effects.identity_error for effects in ablated.values()),
            "largest difference between the total effect and the sum of its terms",
            "logit",
        ),
        "no_op_error": (
            no_op_error,
            "largest change when a write is replaced by itself, or of a component that is not downstream",
            "logit",
        ),
    }
    for name, (value, long_name, units) in counts.items():
        variables[name] = ((), np.asarray(value), {"long_name": long_name, "units": units})
    names = [name for name, _ in COMPONENTS]
    return xr.Dataset(
        variables,
        coords={
            "component": names,
            "layer": np.arange(hooked.n_layers),
            "responding_component": names,
            "responding_layer": np.arange(hooked.n_layers),
        },
        attrs=provenance(
            hooked,
            phenomenon="hydra",
            definition=DEFINITION,
            source=SOURCE,
            ablation=ablation,
            n_patches=n_patches if ablation == "resample" else 1,
            null=f"random perturbation of the same norm, {NULL_DRAWS} draws",
            min_probability=min_probability,
            seed=seed,
            n_sequences=len(rows),
            text=text,
        ),
    )


def _component_hooks(layer: int, reader: Callable[[str, int], Callable[[Tensor], None]]) -> list[Hook]:
    return [(site, layer, reader(name, layer)) for name, site in COMPONENTS]


def _scale_hooks(hooked: Hooked, read: Callable[[Tensor], None]) -> list[Hook]:
    return [] if hooked.final_norm == "none" else [("final_scale", None, read)]


def _scale(read: Tensor | None, like: Tensor) -> Float[Tensor, "sequence pos"]:
    """The final norm's scale, 1 in a model without norms."""
    return torch.ones_like(like, dtype=torch.float32) if read is None else read.float()[..., 0]


def _dot(writes: Tensor, directions: Tensor) -> Float[Tensor, "sequence pos"]:
    return torch.einsum("npd,npd->np", writes.float(), directions)


def _clean_run(hooked: Hooked, tokens: Int[Tensor, "sequence pos"], min_probability: float) -> _Clean:
    kept: dict[tuple[str, int], list[Tensor]] = {}

    def keep(name: str, layer: int) -> Callable[[Tensor], None]:
        def read(activation: Tensor) -> None:
            kept.setdefault((name, layer), []).append(activation)

        return read

    hooks = _scale_hooks(hooked, keep("final_scale", 0))
    for layer in range(hooked.n_layers):
        hooks.append(("resid_pre", layer, keep("resid_pre", layer)))
        hooks += _component_hooks(layer, keep)
    hooks.append(("resid_post", hooked.n_layers - 1, keep("resid_pre", hooked.n_layers)))
    logits_of_targets, targets, probabilities = [], [], []
    for batch in tokens.split(hooked.batch_size(tokens.shape[1])):
        logits = hooked.run(batch, hooks)
        top = logits.argmax(-1)
        targets.append(top)
        logits_of_targets.append(centred_logit(logits, top))
        # The top token's probability is 1 / sum exp(logit - top logit).
        probabilities.append((logits.float() - logits.float().amax(-1, keepdim=True)).exp().sum(-1).reciprocal())
    activations = {key: torch.cat(parts) for key, parts in kept.items()}
    target = torch.cat(targets)
    directions = target_directions(hooked, target)
    scale = _scale(activations.get(("final_scale", 0)), target)
    keys = [(name, layer) for layer in range(hooked.n_layers) for name, _ in COMPONENTS]
    if getattr(hooked.cfg, "attn_only", False):
        # The MLP layers that such a model does not have write nothing.
        silent = {
            ("mlp", layer): torch.zeros_like(activations[("attention", layer)]) for layer in range(hooked.n_layers)
        }
        activations |= silent
    writes = {key: activations[key] for key in keys}
    direct = {key: _dot(write, directions) / scale for key, write in writes.items()}
    embedding = _dot(activations[("resid_pre", 0)], directions) / scale
    return _Clean(
        tokens=tokens,
        directions=directions,
        scale=scale,
        logit=torch.cat(logits_of_targets),
        targets=target,
        chosen=torch.cat(probabilities) > min_probability,
        resid_pre=[activations[("resid_pre", layer)] for layer in range(hooked.n_layers + 1)],
        writes=writes,
        direct=direct,
        total=embedding + torch.stack(list(direct.values())).sum(0),
    )


def _effects(hooked: Hooked, clean: _Clean, key: tuple[str, int], versions: Any) -> _Effects:
    """Run every version of the ablated write from its layer on; sum the terms over versions."""
    effects = _Effects()
    for replaced in versions:
        logit, changes, scale = _one_ablation(hooked, clean, key, replaced)
        downstream = {other: change for other, change in changes.items() if _is_downstream(hooked, key, other)}
        unaffected = [change for other, change in changes.items() if other not in downstream and other != key]
        own = changes[key]
        attention, mlp = (
            sum((change for other, change in downstream.items() if other[0] == name), torch.zeros_like(own))
            for name, _ in COMPONENTS
        )
        norm = (clean.scale / scale - 1.0) * (clean.total + own + attention + mlp)
        total = logit - clean.logit
        measured = {
            "total_effect": total,
            "own_change": own,
            "attention_growth": attention,
            "mlp_change": mlp,
            "norm_change": norm,
            "self_repair": total - own,
        }
        error = (total - own - attention - mlp - norm).abs()[clean.chosen]
        effects.identity_error = max(effects.identity_error, float(error.max()) if error.numel() else 0.0)
        effects.unaffected_error = max(
            [effects.unaffected_error, *(float(change.abs().max()) for change in unaffected)]
        )
        for into, values in ((effects.terms, measured), (effects.response, downstream)):
            for name, value in values.items():
                into[name] = into[name] + value if name in into else value  # type: ignore[index]
        effects.n_runs += 1
    return effects


def _is_downstream(hooked: Hooked, ablated: tuple[str, int], other: tuple[str, int]) -> bool:
    same_block = other[1] == ablated[1] and ablated[0] == "attention" and other[0] == "mlp"
    return other[1] > ablated[1] or (same_block and not hooked.parallel)


def _one_ablation(
    hooked: Hooked, clean: _Clean, key: tuple[str, int], replaced: Float[Tensor, "sequence pos d_model"]
) -> tuple[Tensor, dict[tuple[str, int], Tensor], Tensor]:
    """The target's centred logit, Delta DE by component (from the ablated layer on), and the scale; all [sequence, pos]."""
    name, layer = key
    # What an MLP writes changes nothing before the next layer, which gets its input directly.
    first_layer = layer if name == "attention" else layer + 1
    entering = (
        clean.resid_pre[layer] if name == "attention" else clean.resid_pre[layer + 1] + replaced - clean.writes[key]
    )
    logits_of_targets: list[Tensor] = []
    effects: dict[tuple[str, int], list[Tensor]] = {}
    scales: list[Tensor] = []
    size = hooked.batch_size(clean.tokens.shape[1])
    for start in range(0, len(clean.tokens), size):
        rows = slice(start, start + size)
        directions, scale = clean.directions[rows], clean.scale[rows]

        def project(
            name: str, layer: int, directions: Tensor = directions, scale: Tensor = scale
        ) -> Callable[[Tensor], None]:
            def read(write: Tensor) -> None:
                effects.setdefault((name, layer), []).append(_dot(write, directions) / scale)

            return read

        def replace(_: Tensor, rows: slice = rows) -> Tensor:
            return replaced[rows]

        hooks = _scale_hooks(hooked, scales.append)
        if name == "attention":
            hooks.append(("attn_out", layer, replace))
        for later in range(first_layer, hooked.n_layers):
            hooks += _component_hooks(later, project)
        logits = hooked.run(clean.tokens[rows], hooks, start=(first_layer, entering[rows]))
        logits_of_targets.append(centred_logit(logits, clean.targets[rows]))
    changes = {other: torch.cat(parts) - clean.direct[other] for other, parts in effects.items()}
    changes[key] = _dot(replaced - clean.writes[key], clean.directions) / clean.scale
    return torch.cat(logits_of_targets), changes, _scale(torch.cat(scales) if scales else None, clean.targets)


def _per_sequence(clean: _Clean, values: Float[Tensor, "sequence pos"]) -> Float[np.ndarray, " sequence"]:
    return torch.where(clean.chosen, values.double(), 0.0).sum(-1).cpu().numpy()


def _stack(ablated: dict[tuple[str, int], Any]) -> np.ndarray:
    """`[..., component, layer]` from a mapping by (component, layer) to arrays `[...]`."""
    n_layers = 1 + max(layer for _, layer in ablated)
    return np.stack(
        [np.stack([ablated[(name, layer)] for layer in range(n_layers)], axis=-1) for name, _ in COMPONENTS], axis=-2
    )


def _terms(
    clean: _Clean, ablated: dict[tuple[str, int], _Effects], null: dict[tuple[str, int], _Effects], *, seed: int
) -> Variables:
    counts = clean.chosen.sum(-1).double().cpu().numpy()[:, None, None]
    dims = ("component", "layer")
    direct = _stack({key: _per_sequence(clean, value) for key, value in clean.direct.items()})
    variables = scored(
        "direct_effect", dims, direct, counts, long_name="direct effect on the top token", units="logit", seed=seed
    )
    for term, long_name in _TERMS.items():
        sums = _stack({key: _per_sequence(clean, effects.mean(term)) for key, effects in ablated.items()})
        variables |= scored(term, dims, sums, counts, long_name=long_name, units="logit", seed=seed)
        if term in _WITH_NULL:
            sums = _stack({key: _per_sequence(clean, effects.mean(term)) for key, effects in null.items()})
            variables |= scored(
                f"{term}_null",
                dims,
                sums,
                counts,
                long_name=f"{long_name}, random perturbation",
                units="logit",
                seed=seed,
            )
    return variables


def _compensation(clean: _Clean, ablated: dict[tuple[str, int], _Effects], *, seed: int) -> Variables:
    """OLS slope of self-repair on the clean direct effect, positions as points, as a ratio of centred sums."""
    sums, counts = {}, {}
    for key, effects in ablated.items():
        x, y = clean.direct[key].double(), effects.mean("self_repair").double()
        if clean.chosen.any():
            x, y = x - x[clean.chosen].mean(), y - y[clean.chosen].mean()
        sums[key], counts[key] = _per_sequence(clean, x * y), _per_sequence(clean, x * x)
    return scored(
        "compensation",
        ("component", "layer"),
        _stack(sums),
        _stack(counts),
        long_name="compensation: slope of self-repair on the direct effect",
        units="1",
        seed=seed,
    )


def _response(clean: _Clean, ablated: dict[tuple[str, int], _Effects]) -> Variables:
    nothing = torch.zeros_like(clean.scale)
    by_responder = {
        responder: _stack(
            {
                key: _per_sequence(clean, effects.response.get(responder, nothing) / effects.n_runs)
                for key, effects in ablated.items()
            }
        )
        for responder in clean.direct
    }
    with np.errstate(invalid="ignore", divide="ignore"):
        response = _stack(by_responder).sum(0) / clean.chosen.sum().item()
    return {
        "response": (
            ("component", "layer", "responding_component", "responding_layer"),
            response,
            {"long_name": "change of the responding component's direct effect", "units": "logit"},
        )
    }

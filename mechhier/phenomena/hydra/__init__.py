"""The Hydra effect: ablate one layer or head, and see which later ones make up for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.models.hooked import MAX_BYTES, Hooked
from mechhier.models.torch_state import in_default_torch_state
from mechhier.phenomena._tokens import natural_tokens
from mechhier.phenomena.hydra.effects import COMPONENTS, Clean, Effects, Level, Part, clean_run, effects, parts
from mechhier.phenomena.hydra.statistics import compensation, head_response, repair_share, response, terms
from mechhier.probes.ablation import Ablation, check_ablation, matched_noise, replacements
from mechhier.probes.provenance import provenance
from mechhier.progress import track

DEFINITION = (
    "i = the clean run's top token. Direct effect DE_c = (a_c gamma / sigma) W_U[:, i], centred over the vocabulary, "
    "sigma frozen at the clean run's. Ablating m: total effect TE = logit_i(ablated) - logit_i(clean) = own change + "
    "attention growth + MLP change + norm change, where own, attention and MLP are Delta DE of m's layer, of the attention "
    "and of the MLP layers downstream of m, and norm = (s/s' - 1) (logit_i + sum Delta DE). Self-repair = TE - own change. "
    "Hydra = attention growth. Compensation = OLS slope of self-repair on DE_m over positions. Repair share = sum of "
    "self-repair / sum of -own change, where the mean DE_m exceeds {min_direct_effect}."
)
SOURCE = "McGrath et al. 2023, The Hydra Effect; Rushing & Nanda 2024, Explorations of Self-Repair"

MIN_DIRECT_EFFECT = 0.1
"""Logits; a share of less is a ratio of noise (the published shares are of heads with more, see Rushing & Nanda 2024)."""
_TOLERANCE = 1e-3
"""Largest effect of an ablation that should have none, relative to the largest direct effect."""


@in_default_torch_state
def hydra(
    model: Any,
    tokens: Int[Any, "batch pos"] | None = None,
    *,
    level: Level = "layer",
    targets: Int[Any, "batch pos"] | None = None,
    ablation: Ablation = "resample",
    n_patches: int = 16,
    n_null: int = 4,
    min_probability: float = 0.5,
    n_sequences: int = 64,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
) -> xr.Dataset:
    """What ablating each layer, or each head, does to the top token's logit, term by term, and who makes up for it.

    A part's own output is ablated, never the residual stream. The terms add up exactly (see `DEFINITION`; the largest
    deviation is in `identity_error`), so that repair by later attention (the Hydra effect), by later MLPs and by the
    final norm are told apart. The null moves the part's output as far, in a random direction.

    At level "layer" every attention and MLP layer is ablated, at what it writes; at level "head" every head, at z. In a
    post-norm model (OLMo-2) the other heads of the layer are rescaled when one is ablated: that is in `own_change`.

    Cost, in forward passes over the sequences: 2 + L N at level "layer" and 2 + H (L + 1) / 2 N at level "head", for N =
    `n_patches` (resample) or 1 (mean, zero) replacements plus `n_null`: every ablated run begins at the ablated layer,
    for an MLP behind it. Memory: 3 L (heads: 2 L) tensors of [sequence, pos, d_model], on the CPU where they exceed
    `max_bytes`.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        tokens: Sequences to measure on, without padding. By default held-out text of the model's grammar; without a
            grammar built-in English sentences; without a tokenizer random repeated tokens.
        level: "layer": attention and MLP layers; "head": single heads.
        targets: The token i at every position; by default the clean run's top token.
        ablation: What replaces the part's output: "resample" (the same position of `n_patches` other sequences), "mean"
            (over sequences and positions) or "zero".
        n_patches: Donors per sequence for "resample"; 15 or more are needed for a stable estimate (McGrath et al.).
        n_null: Random perturbations per part; 0 leaves the null out.
        min_probability: Positions count where the clean top token's probability exceeds this.
        n_sequences: Sequences to draw when none are given (there are 24 built-in sentences).
        max_bytes: Working memory of one batch beyond the weights.
        seed: Seed of everything drawn.

    Returns:
        For each ablated part (dims `component`, `layer`, or `layer`, `head`), in logits: `direct_effect` (clean),
        `total_effect`, `own_change`, `attention_growth`, `mlp_change`, `norm_change`, `self_repair`, each with `_low`,
        `_high` (95 %, bootstrap over sequences), four of them with `_null`; `compensation` (slope); `repair_share` and,
        over parts, `repair_share_median`. `response` `[ablated part, responding_component, responding_layer]`, at level
        "layer" with an interval; at level "head" also `head_response` `[layer, head, responding_layer,
        responding_head]`. The scalars `n_positions`, `n_positions_total`, `identity_error`, `no_op_error`. NaN where no
        position qualifies.

    Raises:
        TypeError: Not a hooked model.
        ValueError: Tokens, targets, a level or an ablation that cannot be used.
        RuntimeError: Replacing an output by itself, or one that a component cannot see, has an effect: the model is not
            a deterministic causal stack.

    Example:
        >>> import mechhier as mh
        >>> planted = mh.models.planted.planted_inert()
        >>> result = mh.phenomena.hydra(mh.load_model(planted.model), min_probability=0.0, n_sequences=8, n_patches=4)
        >>> bool(abs(result.attention_growth).max() < 1e-4)
        True
    """
    hooked = Hooked(model, max_bytes=max_bytes)
    if getattr(hooked.cfg, "output_logits_soft_cap", None) and hooked.cfg.output_logits_soft_cap > 0:
        raise ValueError("direct effects are not defined for a model that caps its logits (output_logits_soft_cap)")
    if level not in get_args(Level):
        raise ValueError(f"level must be one of {', '.join(get_args(Level))}, got {level!r}")
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")
    if tokens is None:
        text, rows = natural_tokens(hooked, n_sequences, seed=seed)
    else:
        text, rows = "given by the caller", hooked.check_tokens(tokens)
    check_ablation(ablation, len(rows), n_patches)
    wanted = None if targets is None else hooked.check_tokens(targets)
    if wanted is not None and wanted.shape != rows.shape:
        raise ValueError(f"targets need one token per position, {list(rows.shape)}, got {list(wanted.shape)}")

    clean = clean_run(hooked, rows, level=level, targets=wanted, min_probability=min_probability)
    ablated_parts = parts(hooked, level)
    generator = torch.Generator().manual_seed(seed)
    ablated: list[Effects] = []
    null: list[Effects] = []
    with track(f"hydra: ablating {level}s", total=len(ablated_parts)) as advance:
        for part in ablated_parts:
            output = clean.output(part)
            ablated.append(effects(hooked, clean, part, replacements(output, ablation, n_patches=n_patches)))
            if n_null:
                null.append(effects(hooked, clean, part, _perturbed(output, ablation, n_patches, n_null, generator)))
            advance()
    no_op_error = _no_op_error(hooked, clean, ablated_parts[0], ablated)

    shape = _shape(hooked, level)
    variables = terms(clean, ablated_parts, ablated, null, shape, seed=seed)
    variables |= compensation(clean, ablated_parts, ablated, shape, seed=seed)
    variables |= repair_share(variables, ablated, shape, min_direct_effect=MIN_DIRECT_EFFECT, seed=seed)
    variables |= response(clean, ablated, shape, seed=seed)
    if level == "head":
        variables |= head_response(ablated, shape)
    variables |= {
        name: ((), np.asarray(value), {"long_name": long_name, "units": units})
        for name, value, long_name, units in (
            (
                "n_positions",
                int(clean.chosen.sum()),
                "positions whose clean top probability exceeds the threshold",
                "1",
            ),
            ("n_positions_total", clean.chosen.numel(), "positions looked at", "1"),
            (
                "identity_error",
                max(each.identity_error for each in ablated),
                "largest difference between the total effect and the sum of its terms",
                "logit",
            ),
            (
                "no_op_error",
                no_op_error,
                "largest change when an output is replaced by itself, or of a component that is not downstream",
                "logit",
            ),
        )
    }
    names = [name for name, _ in COMPONENTS]
    coords: dict[str, Any] = {"layer": np.arange(hooked.n_layers), "responding_layer": np.arange(hooked.n_layers)}
    coords["responding_component"] = names
    if level == "layer":
        coords["component"] = names
    else:
        coords |= {"head": np.arange(hooked.n_heads), "responding_head": np.arange(hooked.n_heads)}
    return xr.Dataset(
        variables,
        coords=coords,
        attrs=provenance(
            hooked,
            phenomenon="hydra",
            definition=DEFINITION.format(min_direct_effect=MIN_DIRECT_EFFECT),
            source=SOURCE,
            level=level,
            ablation=ablation,
            n_patches=n_patches if ablation == "resample" else 1,
            null=f"random perturbation of the same norm, {n_null} draws" if n_null else "none",
            target="top token of the clean run" if wanted is None else "given by the caller",
            min_probability=min_probability,
            seed=seed,
            n_sequences=len(rows),
            text=text,
        ),
    )


def _shape(hooked: Hooked, level: Level) -> dict[str, int]:
    if level == "head":
        return {"layer": hooked.n_layers, "head": hooked.n_heads}
    return {"component": len(COMPONENTS), "layer": hooked.n_layers}


def _perturbed(
    output: Float[Tensor, "sequence pos width"],
    ablation: Ablation,
    n_patches: int,
    n_null: int,
    generator: torch.Generator,
) -> Iterator[Float[Tensor, "sequence pos width"]]:
    """`n_null` random perturbations, each as large as one of the ablation's replacements."""
    versions = list(replacements(output, ablation, n_patches=min(n_patches, n_null)))
    for draw in range(n_null):
        yield matched_noise(output, versions[draw % len(versions)], generator)


def _no_op_error(hooked: Hooked, clean: Clean, part: Part, ablated: list[Effects]) -> float:
    """Largest effect where there can be none.

    Raises:
        RuntimeError: It is too large.
    """
    unchanged = effects(hooked, clean, part, [clean.output(part)])
    error = max(unchanged.largest, *(each.unaffected_error for each in ablated))
    largest = max(float(direct.abs().max()) for direct in clean.direct.values())
    if error > _TOLERANCE * (1.0 + largest):
        raise RuntimeError(
            f"replacing an output by itself, or one that a component cannot see, changed a direct effect by {error:.3g}; "
            "the model (or a hook on it) is not deterministic, or it is not a causal stack of layers"
        )
    return error

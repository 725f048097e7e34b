"""The Hydra effect: ablate one layer or head, and see which later ones make up for it."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from scipy import stats

from mechhier.arguments import number, one_of, seed_number, whole_number
from mechhier.models.hooked import MAX_BYTES, Hooked
from mechhier.models.torch_state import in_default_torch_state
from mechhier.phenomena._tokens import natural_tokens
from mechhier.phenomena.hydra.effects import (
    COMPONENTS,
    Clean,
    Effects,
    Level,
    Part,
    clean_run,
    effects,
    parts,
    turned_run,
    turning,
)
from mechhier.phenomena.hydra.statistics import compensation, head_response, repair_share, response, terms
from mechhier.probes.ablation import Ablation, check_ablation, draw_donors, replacements
from mechhier.probes.provenance import provenance
from mechhier.progress import track
from mechhier.results import MIN_SAMPLES, Variables, warn_undefined
from mechhier.specs import Drawn, DrawnOrNone, Probability, Size

DEFINITION = (
    "i = the clean run's top token. Direct effect DE_c = (a_c gamma / sigma) W_U[:, i], centred over the vocabulary, "
    "sigma frozen at the clean run's. Ablating m: total effect TE = logit_i(ablated) - logit_i(clean) = own change + "
    "attention growth + MLP change + norm change, where own, attention and MLP are Delta DE of m's layer, of the attention "
    "and of the MLP layers downstream of m, and norm = (s/s' - 1) (logit_i + sum Delta DE). Self-repair = TE - own change. "
    "Hydra = attention growth. Compensation = OLS slope of self-repair on DE_m over positions. Repair share = sum of "
    "self-repair / sum of -own change, where the interval of the mean -own change lies above {min_lost}. Null: the same for "
    "a part that writes the same in random directions (a rotation about what the ablation leaves on average, in the run "
    "that chooses i and in the ablated one)."
)
SOURCE = "McGrath et al. 2023, The Hydra Effect; Rushing & Nanda 2024, Explorations of Self-Repair"

_NULL = (
    "the part writes the same in random directions about what the ablation leaves on average, target chosen in that run: "
    "mean and 95 % band of {n_null} draws; of total_effect, attention_growth, mlp_change, self_repair, compensation and "
    "repair_share; own_change, norm_change, direct_effect and the responses have none"
)
MIN_LOST = 0.1
"""Logits; a share of less is a ratio of noise (the published shares are of heads with more, see Rushing & Nanda 2024)."""
_TOLERANCE = 1e-3
"""Largest effect of what should have none, relative to the largest logit or direct effect."""
_ROUNDINGS = 16
"""The same in roundings of the weights' dtype, where that is coarser."""


@in_default_torch_state
def hydra(
    model: Any,
    tokens: Int[Any, "batch pos"] | None = None,
    *,
    level: Level = "layer",
    targets: Int[Any, "batch pos"] | None = None,
    ablation: Ablation = "resample",
    n_patches: Drawn | None = None,
    n_null: DrawnOrNone = 4,
    min_probability: Probability = 0.5,
    n_sequences: Drawn = 64,
    max_bytes: Size = MAX_BYTES,
    seed: int = 0,
) -> xr.Dataset:
    """What ablating each layer, or each head, does to the top token's logit, term by term, and who makes up for it.

    A part's own output is ablated, never the residual stream. The terms add up exactly (see `DEFINITION`; the largest
    deviation is in `identity_error`), so that repair by later attention (the Hydra effect), by later MLPs and by the
    final norm are told apart.

    The null is the same measurement on a part that writes as much and as variably in random directions. Its target is
    the top token of its own run, so that it shares what the choice of the target does: a token chosen by all that is
    written loses when any of it is replaced. An untrained part cannot be told from its null: its values lie in the
    null's 95 % band, however many sequences are measured. The interval of a value is over sequences of one model, the
    band over what the part could have written in other directions; compare the value with the band.

    At level "layer" every attention and MLP layer is ablated, at what it writes; at level "head" every head, at z. In a
    post-norm model (OLMo-2) the other heads of the layer are rescaled when one is ablated: that is in `own_change`.

    Cost, in forward passes over the sequences: 1 + L N at level "layer" and 1 + H (L + 1) / 2 N at level "head", for N =
    `n_patches` (resample) or 1 (mean, zero) replacements and 2 `n_null` (at level "layer" `n_null` passes more): every
    ablated run begins at the ablated layer, for an MLP behind it. The check that a part replaced by itself changes
    nothing is (L + 1) / 2 passes (heads: H (L + 1) / 2) over one sequence. Memory: 3 L (heads: 2 L) tensors of [sequence,
    pos, d_model], with a null L more, on the CPU where they exceed `max_bytes`.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        tokens: Sequences to measure on, without padding. By default held-out text of the model's grammar; without a
            grammar built-in English sentences; without a tokenizer random repeated tokens.
        level: "layer": attention and MLP layers; "head": single heads.
        targets: The token i at every position; by default the clean run's top token.
        ablation: What replaces the part's output: "resample" (the same position of `n_patches` other sequences), "mean"
            (over sequences and positions) or "zero".
        n_patches: Donors per sequence for "resample", drawn with the seed, by default 16 or as many as there are; 15 or
            more are needed for a stable estimate (McGrath et al.).
        n_null: Draws of the null per part; 0 leaves it out, a band needs two.
        min_probability: Positions count where the clean top token's probability exceeds this.
        n_sequences: Sequences to draw when none are given (there are 24 built-in sentences).
        max_bytes: Working memory of one batch beyond the weights.
        seed: Seed of everything drawn.

    Returns:
        For each ablated part (dims `component`, `layer`, or `layer`, `head`), in logits: `direct_effect` (clean),
        `total_effect`, `own_change`, `attention_growth`, `mlp_change`, `norm_change`, `self_repair`, each with `_low`,
        `_high` (95 %, bootstrap over sequences); without units `compensation` (slope) and `repair_share` (NaN where the
        interval of -own_change does not lie above `MIN_LOST`). Six of these have a `_null`, the mean over its draws, and
        `_null_low`, `_null_high`, between which 95 % of draws lie; the direct effect, the own and the norm's change and
        the responses have none. `repair_share_median`, over the parts that have a share; its interval allows for not
        knowing which parts these are. `response` `[ablated part, responding_component, responding_layer]`, at level
        "layer" with an interval; at level "head" also `head_response` `[layer, head, responding_layer,
        responding_head]`. The scalars `n_positions`, `n_positions_total`, `identity_error`, `no_op_error`. What is NaN
        because nothing qualifies is said in one `MeasurementWarning`.

    Raises:
        TypeError: Not a hooked model, token ids, names, or numbers.
        ValueError: Tokens, targets, a level or an ablation that cannot be used.
        RuntimeError: Activations or logits are not finite; replacing an output by itself, or one that a component cannot
            see, has an effect (the model is not a deterministic causal stack); the terms do not add up.

    Example:
        >>> import mechhier as mh
        >>> planted = mh.models.planted.planted_inert()
        >>> result = mh.phenomena.hydra(mh.load_model(planted.model), min_probability=0.0, n_sequences=8, n_patches=4)
        >>> bool(abs(result.attention_growth).max() < 1e-4)
        True
    """
    hooked = Hooked(model, max_bytes=max_bytes)
    hooked.require("direct effects")
    one_of("level", level, get_args(Level))
    n_null, seed = whole_number("n_null", n_null, at_least=0), seed_number(seed)
    n_sequences = whole_number("n_sequences", n_sequences, at_least=1)
    min_probability = number("min_probability", min_probability, low=0.0, high=1.0)
    if tokens is None:
        text, rows = natural_tokens(hooked, n_sequences, seed=seed)
    else:
        text, rows = "given by the caller", hooked.check_tokens(tokens)
    n_patches = check_ablation(ablation, len(rows), n_patches)
    wanted = None if targets is None else hooked.check_tokens(targets, "targets")
    if wanted is not None and wanted.shape != rows.shape:
        raise ValueError(f"targets need one token per position, {list(rows.shape)}, got {list(wanted.shape)}")

    generator = torch.Generator().manual_seed(seed)
    donors = None
    if ablation == "resample":
        donors = draw_donors(len(rows), len(rows), n_patches, own=True, generator=generator)
    rotations = _rotations(hooked, n_null, seed=seed)
    clean = clean_run(hooked, rows, level=level, targets=wanted, min_probability=min_probability)
    tolerance, ablated_parts = _tolerance(hooked, clean), parts(hooked, level)
    ablated: list[Effects] = []
    null: list[list[Effects]] = [[] for _ in rotations]
    no_op_error = 0.0
    with track(f"hydra: ablating {level}s", total=len(ablated_parts)) as advance:
        for part in ablated_parts:
            output = clean.output(part)
            ablated.append(effects(hooked, clean, part, replacements(output, ablation, donors)))
            no_op_error = max(no_op_error, _no_op_error(hooked, clean, part, ablated[-1], tolerance))
            _check_identity(part, ablated[-1], tolerance)
            for draw, rotation in enumerate(rotations):
                of_draw = None if donors is None else donors[[draw % len(donors)]]
                turned = turning(hooked, clean, part, ablation, rotation)
                base = turned_run(hooked, clean, turned, level=level, targets=wanted)
                versions = replacements(output, ablation, of_draw)
                null[draw].append(effects(hooked, base, part, versions, turning=turned))
            advance()

    shape = _shape(hooked, level)
    variables = terms(clean, ablated, null, shape, seed=seed)
    variables |= compensation(ablated, null, shape, seed=seed)
    variables |= repair_share(variables, clean, ablated, null, shape, min_lost=MIN_LOST, seed=seed)
    _say_what_is_undefined(clean, ablated_parts, variables, min_probability=min_probability)
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
            definition=DEFINITION.format(min_lost=MIN_LOST),
            source=SOURCE,
            level=level,
            ablation=ablation,
            n_patches=n_patches,
            null=_NULL.format(n_null=n_null) if n_null else "none",
            donors="the same position of other sequences, drawn with the seed" if ablation == "resample" else "none",
            target="top token of the clean run" if wanted is None else "given by the caller",
            min_probability=min_probability,
            largest_probability=float(clean.probability.max()),
            seed=seed,
            n_sequences=len(rows),
            text=text,
        ),
    )


def _shape(hooked: Hooked, level: Level) -> dict[str, int]:
    if level == "head":
        return {"layer": hooked.n_layers, "head": hooked.n_heads}
    return {"component": len(COMPONENTS), "layer": hooked.n_layers}


def _rotations(hooked: Hooked, n: int, *, seed: int) -> list[torch.Tensor]:
    """Random rotations of the stream, float32 [d_model, d_model]."""
    rng = np.random.default_rng(seed)
    return [
        torch.as_tensor(
            stats.ortho_group.rvs(hooked.d_model, random_state=rng), dtype=torch.float32, device=hooked.device
        )
        for _ in range(n)
    ]


def _say_what_is_undefined(clean: Clean, parts: list[Part], variables: Variables, *, min_probability: float) -> None:
    """Warn, once, of everything that is NaN because nothing qualifies."""
    if not bool(clean.chosen.any()):
        warn_undefined(
            f"hydra: no position counts, so that every effect is NaN: no top token has a probability above "
            f"{min_probability:g} (min_probability), the largest is {float(clean.probability.max()):.3g}. The model may be "
            "untrained, or the text unlike what it knows"
        )
        return
    reasons = []
    n_counting = int(clean.chosen.any(-1).sum())
    lost, least = (-np.asarray(variables[name][1]) for name in ("own_change", "own_change_high"))
    if n_counting < MIN_SAMPLES:
        reasons.append(
            f"intervals and repair_share are NaN: only {n_counting} sequences have a position whose top token has a "
            f"probability above {min_probability:g} (min_probability), and {MIN_SAMPLES} are needed"
        )
    elif not (least > MIN_LOST).any():
        reasons.append(
            f"repair_share is NaN: no part loses more than {MIN_LOST} logits of direct effect by its interval, "
            f"{parts[int(np.argmax(lost))]} loses most, {lost.max():.3g}; the largest probability of a top token is "
            f"{float(clean.probability.max()):.3g}"
        )
    slopes = np.isnan(np.asarray(variables["compensation"][1]))
    if slopes.any():
        reasons.append(
            f"compensation is NaN for {slopes.sum()} of {slopes.size} parts: their direct effect does not vary"
        )
    if reasons:
        warn_undefined(f"hydra: {'; '.join(reasons)}")


def _tolerance(hooked: Hooked, clean: Clean) -> float:
    """Largest effect, in logits, of what should have none: relative to the logits and direct effects."""
    of_dtype = max(_TOLERANCE, _ROUNDINGS * torch.finfo(hooked.dtype).eps)
    return of_dtype * (1.0 + max(float(values.abs().max()) for values in (clean.logit, *clean.direct.values())))


def _no_op_error(hooked: Hooked, clean: Clean, part: Part, ablated: Effects, tolerance: float) -> float:
    """Largest effect where there can be none: of the part replaced by itself, on what it does not reach.

    The first is tried on one sequence, so that every part can be tried. An MLP replaced by itself is the run that begins
    at the next layer, which is tried with that layer's attention.

    Raises:
        RuntimeError: It is too large.
    """
    error = ablated.unaffected_error
    if part.component == "attention" or part.layer == hooked.n_layers - 1:
        one = clean.first_sequence()
        error = max(error, effects(hooked, one, part, [one.output(part)]).largest)
    if error > tolerance:
        raise RuntimeError(
            f"replacing the output of {part} by itself, or one that a component cannot see, changed a logit or a direct "
            f"effect by {error:.3g}; the model (or a hook on it) is not deterministic, or it is not a causal stack of layers"
        )
    return error


def _check_identity(part: Part, ablated: Effects, tolerance: float) -> None:
    """Refuse terms that do not add up.

    Raises:
        RuntimeError: They miss the total effect by too much.
    """
    if ablated.identity_error > tolerance:
        raise RuntimeError(
            f"the terms of ablating {part} miss its total effect by {ablated.identity_error:.3g} logits: between what the "
            "layers write and the logits lies something that direct effects leave out (a multiplier, a gain, a cap, or a "
            "hook on the final norm or the unembedding). mechhier.probes.ablate measures total effects without them"
        )

"""From per-position terms to means over sequences with intervals."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from mechhier.phenomena.hydra.effects import COMPONENTS, Clean, Effects
from mechhier.results import CONFIDENCE, MIN_SAMPLES, N_RESAMPLES, Variables, ratio, scored

TERMS = {
    "total_effect": "total effect of the ablation on the target's logit",
    "own_change": "change of the ablated part's own direct effect",
    "attention_growth": "Hydra effect: change of downstream attention's direct effect",
    "mlp_change": "change of downstream MLPs' direct effect",
    "norm_change": "change through the final norm's scale",
    "self_repair": "self-repair: total effect minus own change",
}
_WITH_NULL = ("total_effect", "attention_growth", "mlp_change", "self_repair")

Null = list[list[Effects]]
"""By draw and part."""
Shape = Mapping[str, int]
"""Dims of the ablated parts, in the order in which they are listed."""


def terms(clean: Clean, ablated: list[Effects], null: Null, shape: Shape, *, seed: int) -> Variables:
    """Direct effect and every term of the total effect, by ablated part; the null's where it has one."""
    counts = _counts(clean, shape)

    def described(name: str, sums: list[np.ndarray], long_name: str) -> Variables:
        return scored(name, list(shape), _stack(sums, shape), counts, long_name=long_name, units="logit", seed=seed)

    variables = described("direct_effect", [each.direct for each in ablated], "direct effect on the target's logit")
    for term, long_name in TERMS.items():
        variables |= described(term, [each.terms[term] for each in ablated], long_name)
        if term in _WITH_NULL:
            draws = [ratio(_sums(draw, term, shape), counts, 0) for draw in null]
            variables |= null_band(term, shape, draws, long_name=long_name, units="logit")
    return variables


def compensation(ablated: list[Effects], null: Null, shape: Shape, *, seed: int) -> Variables:
    """OLS slope of self-repair on the clean direct effect, positions as points, as a ratio of centred sums."""
    long_name, units = "compensation: slope of self-repair on the direct effect", "1"

    def sums(effects: list[Effects]) -> tuple[np.ndarray, np.ndarray]:
        products, squares = [each.repair_by_direct for each in effects], [each.direct_squares for each in effects]
        return _stack(products, shape), _stack(squares, shape)

    variables = scored("compensation", list(shape), *sums(ablated), long_name=long_name, units=units, seed=seed)
    draws = [ratio(*sums(draw), 0) for draw in null]
    return variables | null_band("compensation", shape, draws, long_name=long_name, units=units)


def null_band(name: str, shape: Shape, draws: list[np.ndarray], *, long_name: str, units: str) -> Variables:
    """The null's mean over its draws, and the band in which one more draw lies (95 %, Student's t; NaN for one draw).

    An untrained model is one more draw (see `effects.Turning`): the band is a prediction interval, not one of the mean.
    """
    if not draws:
        return {}
    values, n = np.stack(draws), len(draws)
    mean = values.mean(0)
    if n > 1:
        reach = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(0, ddof=1) * np.sqrt(1 + 1 / n)
    else:
        reach = np.full_like(mean, np.nan)
    label = f"{long_name}, of a part that writes in random directions"
    labels = (f"{label}: mean of {n} draws", *(f"{label}: {end} bound (95 % of draws)" for end in ("lower", "upper")))
    return {
        f"{name}_null{suffix}": (list(shape), value, {"long_name": text, "units": units})
        for suffix, value, text in zip(("", "_low", "_high"), (mean, mean - reach, mean + reach), labels, strict=True)
    }


def repair_share(
    described: Variables,
    clean: Clean,
    ablated: list[Effects],
    null: Null,
    shape: Shape,
    *,
    min_lost: float,
    seed: int,
) -> Variables:
    """Share of the direct effect lost that is made up for, of parts that surely lose some, and its median over them.

    Surely: the interval of what is lost, minus `own_change`, lies above `min_lost`. Elsewhere the share is a ratio of
    noise, and NaN; so is the null's where a draw of it loses less.
    """
    repaired, lost = _sums(ablated, "self_repair", shape), -_sums(ablated, "own_change", shape)
    least, most = (-np.asarray(described[f"own_change_{end}"][1]) for end in ("high", "low"))
    surely, possibly = least > min_lost, most > min_lost
    long_name, units = "repair share: self-repair relative to the direct effect lost", "1"
    shares = scored("repair_share", list(shape), repaired, lost, long_name=long_name, units=units, seed=seed)
    counts = _counts(clean, shape)
    draws = []
    for draw in null:
        of_draw = -_sums(draw, "own_change", shape)
        share = ratio(_sums(draw, "self_repair", shape), of_draw, 0)
        draws.append(np.where(ratio(of_draw, counts, 0) > min_lost, share, np.nan))
    shares |= null_band("repair_share", shape, draws, long_name=long_name, units=units)
    shares = {name: (dims, np.where(surely, each, np.nan), label) for name, (dims, each, label) in shares.items()}

    median = np.median(shares["repair_share"][1][surely]) if surely.any() else np.nan
    n_parts = surely.size
    repaired, lost = repaired.reshape(-1, n_parts), lost.reshape(-1, n_parts)
    bounds = median_bounds(
        repaired, lost, counts.reshape(-1), surely.reshape(-1), possibly.reshape(-1), min_lost=min_lost, seed=seed
    )
    label = f"median over parts that surely lose more than {min_lost} logits of the {long_name}"
    labels = (label, f"{label}, lower bound (95 %)", f"{label}, upper bound (95 %)")
    medians = {
        f"repair_share_median{suffix}": ((), np.asarray(value), {"long_name": text, "units": units})
        for suffix, value, text in zip(("", "_low", "_high"), (median, *bounds), labels, strict=True)
    }
    if null:
        of_null = shares["repair_share_null"][1]
        value = np.median(of_null[np.isfinite(of_null)]) if np.isfinite(of_null).any() else np.nan
        text = "median over parts of repair_share_null, where it is defined"
        medians["repair_share_median_null"] = ((), np.asarray(value), {"long_name": text, "units": units})
    return shares | medians


@np.errstate(invalid="ignore", divide="ignore")
def median_bounds(
    repaired: Float[np.ndarray, "sample *set part"],
    lost: Float[np.ndarray, "sample *set part"],
    counts: Float[np.ndarray, " sample"],
    surely: Bool[np.ndarray, "*set part"],
    possibly: Bool[np.ndarray, "*set part"],
    *,
    min_lost: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the median share over the parts that lose more than `min_lost` in the population.

    Which parts these are is itself estimated, so that each resample has the median over three sets: the parts that
    surely lose more, those and the possible ones that do so in this resample, and all possible ones. The lower bound is
    the quantile of the least of the three, the upper one that of the largest: a part near the gate widens the interval
    by what its membership changes. A possible part, were it counted, would lose `min_lost` at least, and is taken to.
    Their distances from the estimate are widened for few samples as Student's t is beside the normal.

    Args:
        repaired: Sums of self-repair by sample; sets of parts are independent of each other.
        lost: Sums of the direct effect lost.
        counts: Positions of each sample; samples without any are left out.
        surely: Parts whose interval of what is lost lies above `min_lost`.
        possibly: Parts whose interval reaches above it.
        min_lost: The gate, in logits.
        seed: Seed of the resampling.

    Returns:
        Lower and upper bound, [*set]; NaN where no part is sure, or with fewer than `MIN_SAMPLES` samples.
    """
    repaired, lost, counts = (each[counts > 0] for each in (repaired, lost, counts))
    n = len(counts)
    undefined = np.full(surely.shape[:-1], np.nan)
    if n < MIN_SAMPLES or not surely.any():
        return undefined, undefined
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=N_RESAMPLES).astype(np.float64)
    estimate = _masked_median(repaired.sum(0) / lost.sum(0), surely)
    total = (drawn @ counts).reshape(-1, *[1] * surely.ndim)
    repaired, lost = (np.tensordot(drawn, each, axes=1) / total for each in (repaired, lost))
    share = repaired / np.maximum(lost, min_lost)
    medians = [
        _masked_median(share, np.broadcast_to(mask, share.shape))
        for mask in (surely, surely | (possibly & (lost > min_lost)), surely | possibly)
    ]
    tail = (1 - CONFIDENCE) / 2
    low = np.quantile(np.minimum.reduce(medians), tail, axis=0, method="inverted_cdf")
    high = np.quantile(np.maximum.reduce(medians), 1 - tail, axis=0, method="inverted_cdf")
    widened = np.sqrt(n / (n - 1)) * stats.t.ppf(tail, n - 1) / stats.norm.ppf(tail)
    low = estimate - widened * np.maximum(estimate - low, 0)
    high = estimate + widened * np.maximum(high - estimate, 0)
    defined = surely.any(-1)
    return np.where(defined, low, np.nan), np.where(defined, high, np.nan)


def _masked_median(values: Float[np.ndarray, "... part"], mask: Bool[np.ndarray, "... part"]) -> np.ndarray:
    """Median over the parts that the mask holds; infinite where it holds none."""
    ordered, n = np.sort(np.where(mask, values, np.inf), axis=-1), mask.sum(-1, keepdims=True)
    lower, upper = (np.take_along_axis(ordered, np.maximum(at, 0), axis=-1)[..., 0] for at in ((n - 1) // 2, n // 2))
    return (lower + upper) / 2


def response(clean: Clean, ablated: list[Effects], shape: Shape, *, seed: int) -> Variables:
    """Change of the direct effect of every layer downstream: ablated part x responding layer."""
    nothing = np.zeros(len(clean.tokens))
    n_layers = shape["layer"]
    by_responder = [
        _stack([each.response.get((name, layer), nothing) for each in ablated], shape)
        for name, _ in COMPONENTS
        for layer in range(n_layers)
    ]
    sums = np.stack(by_responder, axis=-1)
    sums = sums.reshape(*sums.shape[:-1], len(COMPONENTS), n_layers)
    dims = [*shape, "responding_component", "responding_layer"]
    long_name, units = "change of the responding layer's direct effect", "logit"
    if "head" not in shape:
        counts = _counts(clean, shape)[..., None, None]
        return scored("response", dims, sums, counts, long_name=long_name, units=units, seed=seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums.sum(0) / clean.chosen.sum().item()
    return {"response": (dims, mean, {"long_name": long_name, "units": units})}


def head_response(ablated: list[Effects], shape: Shape) -> Variables:
    """Change of the direct effect of every later head: ablated head x responding head."""
    n_layers, n_heads = shape["layer"], shape["head"]
    values = np.zeros((len(ablated), n_layers, n_heads))
    for each, row in zip(ablated, values, strict=True):
        for layer, change in each.head_response.items():
            row[layer] = change.cpu().numpy()
    label = {"long_name": "change of the responding head's direct effect", "units": "logit"}
    dims = ["layer", "head", "responding_layer", "responding_head"]
    return {"head_response": (dims, values.reshape(n_layers, n_heads, n_layers, n_heads), label)}


def _stack(by_part: list[Float[np.ndarray, " sequence"]], shape: Shape) -> Float[np.ndarray, "sequence ..."]:
    return np.stack(by_part, axis=-1).reshape(len(by_part[0]), *shape.values())


def _sums(effects: list[Effects], term: str, shape: Shape) -> Float[np.ndarray, "sequence ..."]:
    return _stack([each.terms[term] for each in effects], shape)


def _counts(clean: Clean, shape: Shape) -> Float[np.ndarray, "sequence ..."]:
    return clean.chosen.sum(-1).cpu().double().numpy().reshape(-1, *[1] * len(shape))

"""From per-position terms to means over sequences with intervals."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from scipy import stats

from mechhier.phenomena.hydra.effects import COMPONENTS, Clean, Effects
from mechhier.results import CONFIDENCE, Variables, ratio, scored

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
            draws = [ratio(_stack([each.terms[term] for each in draw], shape), counts, 0) for draw in null]
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
    described: Variables, ablated: list[Effects], null: Null, shape: Shape, *, min_lost: float, seed: int
) -> Variables:
    """Share of the direct effect lost that is made up for, of parts that surely lose one, and its median over parts."""
    repaired = _stack([each.terms["self_repair"] for each in ablated], shape)
    lost = -_stack([each.terms["own_change"] for each in ablated], shape)
    passes = -np.asarray(described["own_change_high"][1]) > min_lost
    long_name, units = "repair share: self-repair relative to the direct effect lost", "1"
    shares = scored("repair_share", list(shape), repaired, lost, long_name=long_name, units=units, seed=seed)
    draws = []
    for draw in null:
        sums = (-_stack([each.terms["own_change"] for each in draw], shape)).sum(0)
        draws.append(ratio(_stack([each.terms["self_repair"] for each in draw], shape), sums[None], 0))
    shares |= null_band("repair_share", shape, draws, long_name=long_name, units=units)
    return {name: (dims, np.where(passes, values, np.nan), attributes) for name, (dims, values, attributes) in shares.items()}


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


def _counts(clean: Clean, shape: Shape) -> Float[np.ndarray, "sequence ..."]:
    return clean.chosen.sum(-1).cpu().double().numpy().reshape(-1, *[1] * len(shape))

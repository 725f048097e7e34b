"""Attribution patching: every patch at once, to first order, from one backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.arguments import seed_number
from mechhier.models.hooked import MAX_BYTES, Hook, Hooked, SiteName
from mechhier.models.torch_state import in_default_torch_state
from mechhier.probes import _runs
from mechhier.probes.metrics import Metric, check_callable, name_of
from mechhier.probes.patching import Direction, Plan, patched_values
from mechhier.probes.provenance import provenance
from mechhier.results import UNBOUNDED, correlation_interval, scored, warn_undefined, with_bounds

DEFINITION = (
    "attribution = (source - base) . gradient of the metric at the base run, summed over what is patched at once: the first "
    "order of patched - base. base is the corrupted run and source the clean one (denoise), or the reverse (noise). "
    "estimated = base + attribution; recovered = (estimated - corrupted) / (clean - corrupted), sums over sequences; NaN "
    "unless the interval of clean - corrupted, which needs 4 sequences, leaves out 0. effect = patched - base, exactly; "
    "correlation = Pearson's, of the "
    "means of attribution and effect over all sites, layers and positions or heads"
)
SOURCE = (
    "Nanda 2023, Attribution Patching; Syed et al. 2023, Attribution Patching Outperforms Automated Circuit Discovery"
)


@in_default_torch_state
def attribution_patch(
    model: Any,
    clean: Int[Any, "sequence pos"],
    corrupted: Int[Any, "sequence pos"],
    *,
    metric: Metric,
    sites: SiteName | Sequence[SiteName] = "resid_pre",
    position: int | None = None,
    direction: Direction = "denoise",
    exact: bool = False,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
) -> xr.Dataset:
    """Estimate every patch of `patch` to first order.

    The estimate is poor where what is patched moves far, above all the residual stream of early layers, because a norm's
    scale depends on it (Nanda 2023); `exact` says how good it is.

    Cost: two forward passes and one backward; with `exact` those of `patch` too. Memory: activations of all layers that the
    backward pass needs, for one batch, which is therefore `n_layers` times smaller. Parameters get no gradients.

    Args:
        model: As in `patch`, as are `clean`, `corrupted`, `sites`, `position`, `direction` and `seed`.
        clean: Token ids without padding.
        corrupted: As many, of the same length.
        metric: As in `patch`, and differentiable.
        sites: Where.
        position: For heads.
        direction: "denoise" or "noise".
        exact: Also patch in earnest, and correlate.
        max_bytes: Working memory of one batch.
        seed: Of the bootstrap.

    Returns:
        `attribution` and `estimated` (the metric's units) and `recovered`, with the dims of `patch`, and the scalars `clean`
        and `corrupted`; with `exact` also `effect`, the patches' true effect, and the scalar `correlation`. Each with
        `_low`, `_high` (95 %, studentised bootstrap over sequences).

    Raises:
        TypeError: Not a hooked model, token ids, or a metric.
        ValueError: As `patch`; a metric that is not differentiable.

    Example:
        >>> import mechhier as mh
        >>> from mechhier.probes import attribution_patch, logit_difference
        >>> planted = mh.models.planted.planted_backup(share=0.0)
        >>> clean = planted.tokens(8)
        >>> corrupted = clean.roll(1, dims=0)
        >>> metric = logit_difference(answers=clean[:, 1], wrong=corrupted[:, 1])
        >>> model = mh.load_model(planted.model)
        >>> result = attribution_patch(model, clean, corrupted, sites="attn_out", metric=metric, exact=True)
        >>> float(result.correlation.round(3))
        1.0
    """
    hooked = Hooked(model, max_bytes=max_bytes)
    plan = Plan.of(hooked, clean, corrupted, sites, position, direction)
    metric, seed = check_callable(metric), seed_number(seed)
    values = {
        name: _runs.measure(hooked, tokens, metric)[0]
        for name, tokens in (("clean", plan.clean), ("corrupted", plan.corrupted))
    }
    base = values["corrupted" if direction == "denoise" else "clean"]
    found = _attributions(hooked, plan, metric)
    attribution = plan.squeezed(found)
    name, units = name_of(metric)
    estimated = attribution + base.reshape(-1, *[1] * (attribution.ndim - 1))
    variables = _runs.recovery(
        plan.dims, values["clean"], values["corrupted"], estimated, metric, seed=seed, key="estimated"
    )
    words = f"attributed change of the {name}"
    variables |= scored(
        "attribution",
        plan.dims,
        attribution,
        np.ones_like(attribution),
        long_name=words,
        units=units,
        seed=seed,
        bounds=UNBOUNDED,
    )
    if exact:
        effect = patched_values(hooked, plan, metric) - base[:, None, None, None]
        by_cell = plan.squeezed(effect)
        words = f"change of the {name}, patched"
        variables |= scored(
            "effect", plan.dims, by_cell, np.ones_like(by_cell), long_name=words, units=units, seed=seed, change=True
        )
        found, effect = (values.reshape(len(values), -1) for values in (found, effect))
        correlation = correlation_interval(found, effect, seed=seed)
        if np.isnan(correlation[0]):
            warn_undefined("attribution or effect is the same everywhere: their correlation is NaN")
        words = "correlation of attribution and effect"
        variables |= with_bounds("correlation", (), correlation, long_name=words, units="1")
    return _runs.labelled(
        variables,
        plan.coords,
        provenance(
            hooked,
            phenomenon="attribution_patch",
            definition=DEFINITION,
            source=SOURCE,
            **plan.settings,
            metric=name,
            seed=seed,
            n_sequences=len(plan.clean),
        ),
    )


def _attributions(hooked: Hooked, plan: Plan, metric: Metric) -> Float[np.ndarray, "sequence site layer unit"]:
    sites: list[_runs.Site] = [(site, layer) for site in plan.sites for layer in range(plan.n_layers)]
    size = max(1, hooked.batch_size(plan.base.shape[1]) // hooked.n_layers)
    parts = [_of_batch(hooked, plan, metric, sites, rows) for rows in torch.arange(len(plan.base)).split(size)]
    return torch.cat(parts).reshape(-1, len(plan.sites), plan.n_layers, plan.n_units).numpy()


def _of_batch(
    hooked: Hooked, plan: Plan, metric: Metric, sites: list[_runs.Site], rows: Int[Tensor, " batch"]
) -> Float[Tensor, "batch site_and_layer unit"]:
    source, base = {}, {}

    def keep(site: _runs.Site) -> Hook:
        return (*site, lambda activation: source.__setitem__(site, activation))

    def follow(site: _runs.Site) -> Hook:
        def read(activation: Tensor) -> Tensor:
            # A copy is surely on the way from the tokens to the logits; the tensor itself may be a view beside it.
            base[site] = activation.clone()
            return base[site]

        return (*site, read)

    # Gradients are wanted of activations only, also of a model whose parameters have them switched off.
    leaf: Hook = ("embed", None, lambda resid: resid.detach().requires_grad_())
    _runs.run(hooked, plan.source, rows, [keep(site) for site in sites])
    logits = _runs.run(hooked, plan.base, rows, [leaf, *map(follow, sites)], gradients=True)
    with torch.enable_grad():
        values = metric(logits, rows)
    _runs.check_metric(values, metric, len(rows))
    if not values.requires_grad:
        raise ValueError(
            f"the metric {name_of(metric)[0]!r} is not differentiable: it returns a tensor without gradients"
        )
    gradients = torch.autograd.grad(values.sum(), [base[site] for site in sites], allow_unused=True)
    moved = [
        torch.zeros_like(base[site])
        if gradient is None
        else (source[site] - base[site]).detach().float() * gradient.float()
        for site, gradient in zip(sites, gradients, strict=True)
    ]
    return torch.stack([_by_unit(plan, site, product) for (site, _), product in zip(sites, moved, strict=True)], 1)


def _by_unit(plan: Plan, site: SiteName, product: Tensor) -> Float[Tensor, "batch unit"]:
    """Sums of an activation's terms over what is patched at once."""
    if plan.by_head:
        product = product if site == "pattern" else product.transpose(1, 2)  # row, head, position, ...
        product = product if plan.position is None else product[:, :, plan.position]
    return product.detach().float().flatten(2).sum(-1).cpu().double()

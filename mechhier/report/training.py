"""Panels over training: one line per arm, intervals as bands, the null dashed in the same panel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import xarray as xr

from mechhier.report import style
from mechhier.report.checkpoint import (
    COMPONENTS,
    CONTROLS,
    HYDRA_TERMS,
    INJECTED,
    PROMPTS,
    reference_curves,
    short_component,
)
from mechhier.report.panels import Curve, CurvePanel, HeatPanel, Panel, color_limits, heat_hover
from mechhier.report.reading import Reading
from mechhier.results import FAILED_STEPS

Arms = Mapping[str, xr.Dataset]

#: Up to this many ablated components each gets its own panel of curves; above, heatmaps layer x step.
MAX_COMPONENT_PANELS = 6
HYDRA_OVER_TRAINING = ("total_effect", "attention_growth", "mlp_change", "self_repair")


def all_steps(arms: Arms) -> list[float]:
    """Return every step of every arm."""
    return [step for dataset in arms.values() for step in Reading(dataset).steps.tolist()]


def with_gaps(dataset: xr.Dataset) -> xr.Dataset:
    """Return a sweep's dataset with undefined values at the steps that failed, over which no line is drawn."""
    failed = np.atleast_1d(dataset.attrs.get(FAILED_STEPS, ())).tolist()
    if not failed or "step" not in dataset.dims:
        return dataset
    return dataset.reindex(step=sorted({*dataset.step.to_numpy().tolist(), *failed}))


def _curve(
    reading: Reading,
    index: int,
    label: str,
    y: np.ndarray,
    *,
    low: np.ndarray | None,
    high: np.ndarray | None,
    null: np.ndarray | None,
) -> Curve:
    color, symbol = style.color(index), style.symbol(index)
    return Curve(label, reading.steps, y, color, low=low, high=high, null=null, symbol=symbol)


def _scalar_panel(arms: Arms, name: str, scale: style.StepScale) -> CurvePanel:
    """Return the panel of a variable with no dim but `step`, a line for every arm that has it."""
    curves, words = [], ("", "")
    for index, (arm, dataset) in enumerate(arms.items()):
        reading = Reading(dataset)
        if name in reading:
            low, high = reading.interval(name, "step")
            words = words if words[0] else (reading.title(name), reading.units(name))
            null = reading.null(name, "step")
            curves.append(_curve(reading, index, arm, reading.values(name, "step"), low=low, high=high, null=null))
    return CurvePanel(words[0], words[1], curves, scale)


def _names(arms: Arms, *dims: str) -> list[str]:
    """Return the variables with exactly `step` and these dims in any arm, in the order first met."""
    return list(dict.fromkeys(name for dataset in arms.values() for name in Reading(dataset).names("step", *dims)))


def induction(arms: Arms, scale: style.StepScale) -> list[Panel]:
    """Return a panel for every best head's score (chosen on one half of the sequences, scored on the other)."""
    return [_best_head(arms, name, scale) for name in _names(arms) if name.endswith("_best")]


def _best_head(arms: Arms, name: str, scale: style.StepScale) -> CurvePanel:
    """Return a best head's panel; where its null is another than uniform attention, that is a dotted line beside it."""
    panel = _scalar_panel(arms, name, scale)
    uniform = f"{name.removesuffix('_best')}_uniform"
    readings = [(index, Reading(dataset)) for index, dataset in enumerate(arms.values())]
    dotted = [
        Curve("uniform attention", r.steps, r.values(uniform, "step"), style.color(index), dash="dot", symbol=None)
        for index, r in readings
        if f"{name}_null" in r and uniform in r
    ]
    return replace(panel, curves=[*panel.curves, *dotted])


def hydra(arms: Arms, scale: style.StepScale) -> list[Panel]:
    """Return a panel for every term and ablated component, or heatmaps layer x step in a deep model; of heads, scalars."""
    first = Reading(_first(arms))
    if "head" in first.dataset.dims:
        return [_scalar_panel(arms, name, scale) for name in ("repair_share_median", "n_positions") if name in first]
    terms = [name for name in HYDRA_OVER_TRAINING if name in first]
    parts = [(c, la) for la in first.labels("layer").tolist() for c in first.labels("component").tolist()]
    if len(parts) > MAX_COMPONENT_PANELS:
        return [panel for name in terms for panel in _hydra_heatmaps(arms, name, scale)]
    return [_hydra_panel(arms, name, component, layer, scale) for name in terms for component, layer in parts]


def _hydra_panel(arms: Arms, name: str, component: str, layer: int, scale: style.StepScale) -> CurvePanel:
    curves, units = [], ""
    for index, (arm, dataset) in enumerate(arms.items()):
        reading = Reading(dataset.sel(component=component, layer=layer))
        low, high = reading.interval(name, "step")
        y, null, units = reading.values(name, "step"), reading.null(name, "step"), reading.units(name)
        curves.append(_curve(reading, index, arm, y, low=low, high=high, null=null))
    return CurvePanel(
        f"{style.capital(HYDRA_TERMS[name][0])}, {short_component(component, layer)} ablated", units, curves, scale
    )


def _hydra_heatmaps(arms: Arms, name: str, scale: style.StepScale) -> list[HeatPanel]:
    dims = ("component", "layer", "step")
    limits = color_limits([Reading(dataset).values(name, *dims) for dataset in arms.values()])
    panels = []
    for arm, dataset in arms.items():
        reading = Reading(dataset)
        low, high = reading.interval(name, *dims)
        null = reading.null(name, *dims)
        for row, component in enumerate(reading.labels("component").tolist()):
            title = f"{HYDRA_TERMS[name][0]}, {COMPONENTS.get(component, component)} ablated"
            panels.append(
                _layer_heatmap(
                    reading,
                    f"{arm}: {title}" if arm else title,
                    reading.values(name, *dims)[row],
                    None if low is None else low[row],
                    None if high is None else high[row],
                    None if null is None else null[row],
                    units=reading.units(name),
                    limits=limits,
                    scale=scale,
                )
            )
    return panels


def _layer_heatmap(
    reading: Reading,
    title: str,
    z: np.ndarray,
    low: np.ndarray | None,
    high: np.ndarray | None,
    null: np.ndarray | None,
    *,
    units: str,
    limits: tuple[float, float],
    scale: style.StepScale,
) -> HeatPanel:
    layers, steps = reading.labels("layer").tolist(), reading.steps
    rows, columns = [f"layer {layer}" for layer in layers], [f"step {step:,g}" for step in steps]
    return HeatPanel(
        title=f"{title}\n({units})",
        z=z,
        x_title="training step",
        y_title="layer",
        x=steps.tolist(),
        y=layers,
        limits=limits,
        hover=heat_hover(z, low, high, null, rows=rows, columns=columns),
        scale=scale,
    )


def function_vectors(arms: Arms, scale: style.StepScale) -> list[Panel]:
    """Return the largest head effect, the clean accuracy, and the accuracy with a vector injected at its best layer.

    One arm: a line for every injected vector. Several arms: a line per arm for the function vector, and dashed the best
    of its controls. A maximum over heads or layers is biased up; every control and null beside it is a maximum as well.
    """
    panels: list[Panel] = []
    having = {arm: dataset for arm, dataset in arms.items() if "AIE" in dataset}
    if having:
        panels.append(_largest_effect(having, scale))
    if any("accuracy_clean" in dataset for dataset in arms.values()):
        with_chance = {
            arm: d.assign(accuracy_clean_null=d["chance"]) if "chance" in d else d for arm, d in arms.items()
        }
        panel = _scalar_panel(with_chance, "accuracy_clean", scale)
        panels.append(replace(panel, title=panel.title + ("\n(null: chance)" if "chance" in _first(arms) else "")))
    having = {arm: dataset for arm, dataset in arms.items() if "accuracy" in dataset}
    prompts = dict.fromkeys(str(p) for dataset in having.values() for p in Reading(dataset).labels("prompt"))
    for prompt in prompts:
        if len(having) == 1:
            panels.append(_injected_vectors(Reading(_first(having)), prompt, scale))
        else:
            panels.append(_injected_by_arm(having, prompt, scale))
    return panels


def _first(arms: Arms) -> xr.Dataset:
    return next(iter(arms.values()))


def _largest_effect(arms: Arms, scale: style.StepScale) -> CurvePanel:
    dims = ("step", "layer", "head")
    curves, units = [], ""
    for index, (arm, dataset) in enumerate(arms.items()):
        reading = Reading(dataset)
        effect, (low, high), null = (
            reading.values("AIE", *dims),
            reading.interval("AIE", *dims),
            reading.null("AIE", *dims),
        )
        units = reading.units("AIE")
        y, at = _largest(_flat(effect))
        curves.append(
            _curve(
                reading,
                index,
                arm,
                y,
                low=None if low is None else _taken(_flat(low), at),
                high=None if high is None else _taken(_flat(high), at),
                null=None if null is None else _largest(_flat(null))[0],
            )
        )
    return CurvePanel("Largest indirect effect of a head (AIE)", units, curves, scale)


def _largest(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every row's largest value and its column; NaN and column 0 for a row of NaN alone."""
    known = np.isfinite(rows)
    at = np.where(known, rows, -np.inf).argmax(axis=1)
    return np.where(known.any(axis=1), _taken(rows, at), np.nan), at


def _taken(rows: np.ndarray, at: np.ndarray) -> np.ndarray:
    return np.take_along_axis(rows, at[:, None], axis=1)[:, 0]


def _injected_vectors(reading: Reading, prompt: str, scale: style.StepScale) -> CurvePanel:
    row = Reading(reading.dataset.sel(prompt=prompt))
    curves = []
    for vector in row.labels("vector").tolist():
        if row.dataset["accuracy"].sel(vector=vector).isnull().all():
            continue
        label, color, symbol = INJECTED.get(vector, (str(vector), style.BLACK, "cross"))
        y, low, high = _best_layer(row, [vector])
        curves.append(Curve(label, row.steps, y, color, low=low, high=high, symbol=symbol))
    curves += reference_curves(row, row.steps, prompt, "step")
    title = f"Accuracy with a vector added at its best layer, {PROMPTS.get(prompt, prompt)}"
    return CurvePanel(title, row.units("accuracy"), curves, scale)


def _injected_by_arm(arms: Arms, prompt: str, scale: style.StepScale) -> CurvePanel:
    curves, units = [], ""
    for index, (arm, dataset) in enumerate(arms.items()):
        row = Reading(dataset.sel(prompt=prompt))
        y, low, high = _best_layer(row, ["function_vector"])
        controls = [vector for vector in row.labels("vector").tolist() if vector in CONTROLS]
        null = _best_layer(row, controls)[0] if controls else None
        units = row.units("accuracy")
        curves.append(_curve(row, index, arm, y, low=low, high=high, null=null))
    title = f"Accuracy with the function vector, {PROMPTS.get(prompt, prompt)}\n(null: the best control vector)"
    return CurvePanel(title, units, curves, scale)


def _best_layer(row: Reading, vectors: list[str]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return the largest accuracy over these vectors and all layers at every step, and the interval there."""
    dims = ("step", "vector", "layer")
    some = Reading(row.dataset.sel(vector=vectors))
    low, high = some.interval("accuracy", *dims)
    y, at = _largest(_flat(some.values("accuracy", *dims)))
    return y, None if low is None else _taken(_flat(low), at), None if high is None else _taken(_flat(high), at)


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1)


def published(arms: Arms, scale: style.StepScale) -> list[Panel]:
    """Return the published scores over training: scalars, the first k, every transition, and heatmaps layer x step."""
    panels: list[Panel] = [_scalar_panel(arms, name, scale) for name in _names(arms)]
    dims = sorted({str(dim) for dataset in arms.values() for dim in dataset.dims} - {"step", "layer", "head"})
    for dim in dims:
        for name in _names(arms, dim):
            panels += _panel_for_each(arms, name, dim, scale, only_first=dim == "k")
    for name in [*_names(arms, "layer"), *(name for dim in dims for name in _names(arms, dim, "layer"))]:
        panels += _published_heatmaps(arms, name, scale)
    return panels


def _panel_for_each(arms: Arms, name: str, dim: str, scale: style.StepScale, *, only_first: bool) -> list[CurvePanel]:
    readings = {arm: Reading(dataset) for arm, dataset in arms.items() if name in dataset}
    labels = list(dict.fromkeys(label for reading in readings.values() for label in reading.labels(dim).tolist()))
    panels = []
    for label in labels[:1] if only_first else labels:
        chosen = {
            arm: reading.dataset.isel({dim: reading.labels(dim).tolist().index(label)})
            for arm, reading in readings.items()
            if label in reading.labels(dim).tolist()
        }
        panel = _scalar_panel(chosen, name, scale)
        panels.append(replace(panel, title=f"{panel.title}\n{dim}{' ' if isinstance(label, str) else ' = '}{label}"))
    return panels


def _published_heatmaps(arms: Arms, name: str, scale: style.StepScale) -> list[HeatPanel]:
    readings, words = {}, ""
    for arm, dataset in arms.items():
        if name in dataset:
            other = next((str(dim) for dim in dataset[name].dims if dim not in ("step", "layer")), None)
            readings[arm] = Reading(dataset if other is None else dataset.isel({other: 0}))
            words = "" if other is None else f"\n{other} = {Reading(dataset).labels(other)[0]}"
    limits = color_limits([reading.values(name, "layer", "step") for reading in readings.values()])
    panels = []
    for arm, reading in readings.items():
        title = (f"{arm}: " if arm else "") + reading.title(name) + words
        z, (low, high) = reading.values(name, "layer", "step"), reading.interval(name, "layer", "step")
        null = reading.null(name, "layer", "step")
        units = reading.units(name)
        panels.append(_layer_heatmap(reading, title, z, low, high, null, units=units, limits=limits, scale=scale))
    return panels


PANELS: dict[str, Callable[[Arms, style.StepScale], list[Panel]]] = {
    "induction": induction,
    "hydra": hydra,
    "function_vectors": function_vectors,
    "published": published,
}

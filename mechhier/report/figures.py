"""`plot`: from a result to a figure, by the phenomenon it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from mechhier.grammars import Corpus
from mechhier.report import checkpoint, interventions, style, training
from mechhier.report.circuit import plot_circuit
from mechhier.report.corpus import plot_corpus
from mechhier.report.drawing import draw
from mechhier.report.loss import plot_loss, plot_run
from mechhier.report.panels import Panel, with_prefix
from mechhier.report.reading import by_phenomenon, require_one_kind
from mechhier.specs import shown

if TYPE_CHECKING:
    from mechhier.models import Run
    from mechhier.models.planted import PlantedModel

TITLES = {
    "induction": "Induction heads",
    "hydra": "Hydra effect: what the rest of the model does when a part of it is ablated",
    "function_vectors": "Function vectors",
    "published": "Scores as published",
    **interventions.TITLES,
}
NULLS = {
    "induction": "null: uniform attention; on text: syntax alone",
    "hydra": "null: the part writing in random directions",
    "function_vectors": "null",
    "published": "null",
    **dict.fromkeys(interventions.TITLES, ""),
}
COLUMNS = {"induction": 3, "hydra": 2, "function_vectors": 2, "published": 3, **dict.fromkeys(interventions.TITLES, 2)}
MAX_COLUMNS = 4


_LISTED = 10


def plot(
    result: xr.Dataset | xr.DataTree | Mapping[str, xr.Dataset] | pd.DataFrame | Run | Corpus | PlantedModel,
    *,
    title: str | None = None,
) -> go.Figure:
    """Draw a result: of one model, over training, of several arms, a training log; or a corpus, or a planted circuit.

    Interventions of `mechhier.probes` are drawn for one model: patches as heatmaps, other edits as bars.

    Over training (a `step` dim) the figure shows curves with their intervals and nulls, one line per arm; the step axis
    is logarithmic but shows step 0 (see `mechhier.report.style.StepScale`). Without `step` it shows the model's heads,
    layers and components.

    A corpus is shown by its first 2^20 tokens or so (see `mechhier.grammars.statistics.describe`): frequencies of
    tokens by rank, lengths of documents, mutual information by distance, and the first tree of a language that has
    trees. This takes some seconds, whatever the size of the corpus.

    Args:
        result: the dataset of a phenomenon or an intervention, the tree of a sweep, one phenomenon's datasets by arm, a
            run or its log, a corpus, or a planted model.
        title: of the figure; the default names the phenomenon and the model, or the language.

    Returns:
        A plotly figure; nothing global is changed.

    Raises:
        TypeError: for anything else.
        ValueError: for an unknown phenomenon, or a dataset in which there is nothing to draw.

    Example:
        >>> scores = xr.Dataset({"IND": (("layer", "head"), [[0.1, 0.9]])}, attrs={"phenomenon": "induction"})
        >>> plot(scores).layout.title.text
        'Induction heads'
    """
    if isinstance(result, xr.Dataset):
        return _plot_arms({"": result}, title)
    if isinstance(result, xr.DataTree):
        return _plot_tree(by_phenomenon(result), title)
    if isinstance(result, pd.DataFrame):
        if lacking := sorted({"step", "loss", "eval_loss"} - set(result.columns)):
            raise ValueError(
                f"cannot plot this table, which is no run's log: it has no columns {', '.join(lacking)}. A table of heads is "
                "of a result: plot the result itself"
            )
        return plot_loss({"": result})
    if isinstance(result, Mapping) and all(isinstance(dataset, xr.Dataset) for dataset in result.values()):
        return _plot_arms(dict(result), title)
    if isinstance(result, Corpus):
        return plot_corpus(result, title=title)
    # Not at the top: these need transformers, which takes seconds to import.
    from mechhier.models import Run
    from mechhier.models.planted import PlantedModel

    if isinstance(result, Run):
        return plot_run(result, title=title)
    if isinstance(result, PlantedModel):
        return plot_circuit(result, title=title)
    raise TypeError(
        f"cannot plot a {type(result).__name__}: accepted are the Dataset of a phenomenon, the DataTree of a sweep, a "
        "mapping from arm to Dataset, a run, a run's log, a corpus, and a planted model"
    )


def _plot_arms(arms: dict[str, xr.Dataset], title: str | None) -> go.Figure:
    phenomenon = require_one_kind(arms)
    arms = {arm: training.with_gaps(dataset) for arm, dataset in arms.items()}
    over_training = all("step" in dataset.dims for dataset in arms.values())
    scale = style.StepScale.of(training.all_steps(arms)) if over_training else None
    panels = _panels(phenomenon, arms, scale)
    columns = COLUMNS[phenomenon]
    if over_training:
        columns = _training_columns(phenomenon, arms, panels)
    model = next(iter(arms.values())).attrs.get("model") if len(arms) == 1 else None
    words = TITLES[phenomenon] + (f" ({model})" if model else "")
    return draw(panels, title=title or words, columns=columns, null_label=NULLS[phenomenon])


def _training_columns(phenomenon: str, arms: Mapping[str, xr.Dataset], panels: list[Panel]) -> int:
    if phenomenon == "hydra" and "component" in _first(arms).dims:
        # A row is one term: its columns are the ablated components (curves) or the arms and components (heatmaps).
        return min(MAX_COLUMNS, len(panels) // len([t for t in training.HYDRA_OVER_TRAINING if t in _first(arms)]))
    return min(COLUMNS[phenomenon], len(panels))


def _first(arms: Mapping[str, xr.Dataset]) -> xr.Dataset:
    return next(iter(arms.values()))


def _plot_tree(sorted_leaves: dict[str, dict[str, xr.Dataset]], title: str | None) -> go.Figure:
    sorted_leaves = {
        phenomenon: {arm: training.with_gaps(dataset) for arm, dataset in arms.items()}
        for phenomenon, arms in sorted_leaves.items()
    }
    if len(sorted_leaves) == 1:
        return _plot_arms(next(iter(sorted_leaves.values())), title)
    steps = [
        step
        for arms in sorted_leaves.values()
        for step in training.all_steps({a: d for a, d in arms.items() if "step" in d.dims})
    ]
    scale = style.StepScale.of(steps) if steps else None
    panels: list[Panel] = []
    for phenomenon, arms in sorted_leaves.items():
        named = {arm: dataset.assign_attrs(phenomenon=phenomenon) for arm, dataset in arms.items()}
        require_one_kind(named)
        short = phenomenon.replace("_", " ")
        panels += [with_prefix(panel, short) for panel in _panels(phenomenon, named, scale)]
    words = title or " · ".join(name.replace("_", " ") for name in sorted_leaves)
    return draw(panels, title=words, columns=3, null_label="null")


def _panels(phenomenon: str, arms: Mapping[str, xr.Dataset], scale: style.StepScale | None) -> list[Panel]:
    over_training = scale is not None and all("step" in dataset.dims for dataset in arms.values())
    if over_training and phenomenon not in training.PANELS:
        raise ValueError(f"{phenomenon} results are drawn for one model: select one step first, result.isel(step=-1)")
    try:
        if over_training and scale is not None:
            panels = training.PANELS[phenomenon](arms, scale)
        else:
            panels = [
                with_prefix(p, arm) for arm, dataset in arms.items() for p in checkpoint.PANELS[phenomenon](dataset)
            ]
    except KeyError as error:
        raise _lacking(phenomenon, error.args[0], next(iter(arms.values()))) from error
    except (ValueError, TypeError, IndexError) as error:
        # NumPy's and xarray's own, of dims that a figure needs; ours say what to do.
        if "cannot plot" in str(error):
            raise
        raise _lacking(phenomenon, None, next(iter(arms.values()))) from error
    if not panels:
        dataset = next(iter(arms.values()))
        if any(coordinate.ndim == 0 and name != "step" for name, coordinate in dataset.coords.items()):
            raise _lacking(phenomenon, None, dataset)
        found = sorted({str(name) for dataset in arms.values() for name in dataset.data_vars})
        listed = ", ".join(found[:_LISTED]) + (f" and {len(found) - _LISTED} more" if len(found) > _LISTED else "")
        raise ValueError(f"nothing to draw in this {phenomenon} result: it holds {listed or 'no variable'}")
    return panels


def _lacking(phenomenon: str, what: object, dataset: xr.Dataset) -> ValueError:
    """What to say of a result that a figure cannot be made of, because something of it was selected or left out."""
    selected = [str(name) for name, coordinate in dataset.coords.items() if coordinate.ndim == 0 and name != "step"]
    if selected:
        remedy = (
            f"{selected[0]} was selected: select it as a list, result.isel({selected[0]}=[0]), or plot the whole result"
        )
    else:
        remedy = "plot the whole result, as it was returned; one variable of it is drawn by result[name].plot()"
    lacks = "a dim that its figure shows" if what is None else shown(what)
    return ValueError(f"cannot plot this {phenomenon} result, which lacks {lacks}: {remedy}")

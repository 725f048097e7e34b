"""Figures of interventions: what is drawn is what was measured."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from random_models import random_hooked, random_tokens

from mechhier.probes import (
    MLP,
    Edge,
    Head,
    HeadInput,
    ablate,
    attribution_patch,
    force_pattern,
    knock_out,
    logit_difference,
    patch,
    path_patch,
)
from mechhier.report import plot

CLEAN, CORRUPTED = random_tokens(4, 5), random_tokens(4, 5, seed=1)
METRIC = logit_difference(torch.arange(4), torch.arange(4) + 10)


@pytest.fixture(scope="module")
def model():
    return random_hooked("llama", "bridge")


def of_type(figure, kind):
    assert isinstance(figure, go.Figure)
    return [trace for trace in figure.data if trace.type == kind]


def test_effects_of_edits_are_bars_with_intervals_and_labels(model):
    results = [
        ablate(model, [Head(0, 1), (Head(0, 2), MLP(1))], CLEAN, ablation="zero", metric=METRIC),
        knock_out(model, [Edge(keys=0), Edge(layer=1, keys=1)], CLEAN, metric=METRIC),
        force_pattern(model, [Head(0, 1), Head(1, 1)], CLEAN, "self", metric=METRIC),
        path_patch(model, [Head(0, 1), MLP(0)], CLEAN, CORRUPTED, metric=METRIC).isel(receiver=slice(0, 1)),
    ]
    for result in results:
        figure = plot(result)
        (bars,) = of_type(figure, "bar")
        np.testing.assert_allclose(bars.y, result.effect.values.ravel())
        np.testing.assert_allclose(bars.error_y.array, (result.effect_high - result.effect).values.ravel(), atol=1e-12)
        (dim,) = {str(dim) for dim in result.effect.dims} - {"receiver"}
        assert list(figure.layout.xaxis.ticktext) == result[dim].values.tolist()
        assert figure.layout.yaxis.title.text == "logit"


def test_patches_are_heatmaps_by_site_in_what_is_recovered(model):
    def certain(logits, rows):
        return logits[:, -1, 0] + 100 * logits[:, -1].softmax(-1)[:, 1] * 0

    # The runs surely differ: four times the same sequence.
    pair = CLEAN[:1].repeat(4, 1), CORRUPTED[:1].repeat(4, 1)
    result = patch(model, *pair, sites=["resid_pre", "mlp_out"], metric=certain)
    heat = of_type(plot(result), "heatmap")
    assert len(heat) == 2
    np.testing.assert_allclose(np.asarray(heat[1].z), result.recovered.sel(site="mlp_out"))
    assert heat[1].customdata[2][3].startswith("layer 2, position 3<br>value ")
    unknown = patch(model, CLEAN, CLEAN, sites="z", metric=METRIC)
    (heat,) = of_type(plot(unknown), "heatmap")
    np.testing.assert_allclose(np.asarray(heat.z), unknown.patched)


def test_attributions_stand_beside_the_true_effects_and_say_how_well_they_agree(model):
    result = attribution_patch(model, CLEAN, CORRUPTED, sites="z", metric=METRIC, exact=True)
    figure = plot(result)
    left, right = of_type(figure, "heatmap")
    np.testing.assert_allclose(np.asarray(left.z), result.attribution)
    np.testing.assert_allclose(np.asarray(right.z), result.effect)
    assert (left.zmin, left.zmax) == (right.zmin, right.zmax)
    words = " ".join(annotation.text.replace("<br>", " ") for annotation in figure.layout.annotations)
    assert f"correlation {float(result.correlation):.3g}" in words


def test_paths_between_components_are_a_matrix(model):
    receivers = [HeadInput(2, 0, "q"), HeadInput(2, 1, "v")]
    result = path_patch(model, [Head(0, 1), Head(1, 0), MLP(0)], CLEAN, CORRUPTED, receivers, metric=METRIC)
    (heat,) = of_type(plot(result), "heatmap")
    np.testing.assert_allclose(np.asarray(heat.z), result.effect)
    assert list(heat.x) == ["L2H0.q", "L2H1.v"]
    assert list(heat.y) == ["L0H1", "L1H0", "mlp0"]


def test_an_intervention_over_training_is_refused_with_what_to_do(model):
    result = patch(model, CLEAN, CORRUPTED, metric=METRIC).expand_dims(step=[0, 10])
    with pytest.raises(ValueError, match=r"select one step first"):
        plot(result)

import re
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
import synthetic_results as synthetic
import xarray as xr

from mechhier.models import Run
from mechhier.report import by_phenomenon, plot, plot_loss, plot_positions
from mechhier.report.style import PALETTE, StepScale


def traces(figure, kind):
    return [trace for trace in figure.data if trace.type == kind]


def titles(figure):
    return " | ".join(annotation.text.replace("<br>", " ") for annotation in figure.layout.annotations)


def lines_called(figure, label):
    """The data of every visible line of a label, without bands and nulls."""
    return [
        t for t in figure.data if t.type == "scatter" and t.name == label and t.x is not None and t.x[0] is not None
    ]


@pytest.mark.parametrize("name", synthetic.RESULTS)
def test_every_phenomenon_is_drawn_for_one_model_and_over_training(name):
    result = synthetic.RESULTS[name]
    for figure in (plot(result()), plot(synthetic.over_training(result)), plot(synthetic.sweep(phenomena=[name]))):
        assert isinstance(figure, go.Figure)
        assert figure.data
        go.Figure(figure.to_dict())  # plotly accepts every property


def test_heatmaps_hold_the_scores_and_the_uniform_baseline():
    scores = synthetic.induction(layers=3, heads=5)
    figure = plot(scores)
    heatmaps = traces(figure, "heatmap")
    assert len(heatmaps) == 6
    np.testing.assert_array_equal(np.asarray(heatmaps[0].z), scores.IND.to_numpy())
    assert titles(figure).count("uniform 0.08") == 6
    assert len({(h.zmin, h.zmax) for h in heatmaps}) == 1
    hover = heatmaps[0].customdata[2][4]
    assert f"value {scores.IND[2, 4].item():.3g}" in hover
    assert f"{scores.IND_low[2, 4].item():.3g} to {scores.IND_high[2, 4].item():.3g}" in hover
    assert "null 0.08" in hover


def test_hydra_bars_carry_interval_and_null_and_the_matrix_is_ordered_by_depth():
    result = synthetic.hydra(layers=2)
    figure = plot(result)
    bar = next(t for t in traces(figure, "bar") if t.name == "attention growth downstream")
    np.testing.assert_allclose(bar.y, result.attention_growth.sel(component="attention"))
    np.testing.assert_allclose(bar.error_y.array, 0.3)
    nulls = [t for t in traces(figure, "scatter") if t.line.dash == "dot"]
    drawn = [y for t in nulls for y in t.y if y is not None]
    assert set(result.self_repair_null.sel(component="mlp").to_numpy()) <= set(drawn)
    matrix = np.asarray(traces(figure, "heatmap")[0].z)
    expected = result.response.sel(component="mlp", layer=0, responding_component="attention", responding_layer=1)
    assert matrix[1, 2] == expected.item()


def test_a_deep_hydra_result_is_drawn_as_lines_by_layer():
    figure = plot(synthetic.hydra(layers=16))
    assert not traces(figure, "bar")
    assert all(len(t.y) == 16 for t in lines_called(figure, "self-repair"))


def test_function_vector_heads_are_marked_and_controls_are_lines():
    result = synthetic.function_vectors()
    figure = plot(result)
    labels = np.array(traces(figure, "heatmap")[0].text)
    np.testing.assert_array_equal(np.char.endswith(labels, "★"), result.selected.to_numpy())
    for label, vector in (("function vector", "function_vector"), ("random heads' vector", "random_heads")):
        drawn = lines_called(figure, label)
        np.testing.assert_allclose(drawn[0].y, result.accuracy.sel(prompt="zero_shot", vector=vector))
    assert lines_called(figure, "without injection")[1].y[0] == 0.2  # the shuffled prompt's own


def test_arms_are_lines_of_one_colour_with_their_null_dashed_in_the_same_panel():
    figure = plot(synthetic.sweep(arms=("a", "b"), phenomena=["induction"]))
    first, second = lines_called(figure, "a"), lines_called(figure, "b")
    assert len(first) == len(second) == 6
    assert {t.line.color for t in first} == {PALETTE[0]}
    assert {t.line.color for t in second} == {PALETTE[1]}
    for line in first:
        nulls = [t for t in figure.data if t.xaxis == line.xaxis and t.type == "scatter" and t.line.dash == "dash"]
        assert any(t.line.color == PALETTE[0] and set(t.y) == {0.08} for t in nulls)
    assert sum(bool(t.showlegend) for t in figure.data if t.name == "a") == 1


def test_function_vectors_of_several_arms_are_drawn_against_their_best_control():
    arms = {name: synthetic.over_training(synthetic.function_vectors, seed=i) for i, name in enumerate("ab")}
    figure = plot(arms)
    line = lines_called(figure, "a")[2]  # after the indirect effect and the clean accuracy
    by_vector = arms["a"].accuracy.sel(prompt="zero_shot").max("layer")
    np.testing.assert_allclose(line.y, by_vector.sel(vector="function_vector"))
    null = next(t for t in figure.data if t.xaxis == line.xaxis and t.type == "scatter" and t.line.dash == "dash")
    np.testing.assert_allclose(null.y, by_vector.drop_sel(vector="function_vector").max("vector"))


def test_a_deep_hydra_sweep_is_a_heatmap_of_layer_and_step():
    result = synthetic.over_training(synthetic.hydra, layers=8, steps=(0, 10, 100))
    figure = plot(result)
    heatmap = traces(figure, "heatmap")[0]
    np.testing.assert_array_equal(heatmap.z, result.total_effect.sel(component="attention").transpose("layer", "step"))
    assert len(heatmap.x) == 4  # borders of three columns


def test_missing_values_break_the_band_and_an_undefined_panel_says_so():
    result = synthetic.over_training(synthetic.hydra)
    for name in result.data_vars:
        if "step" in result[name].dims and "component" in result[name].dims and "low" not in name:
            result[name] = result[name].where(result.step != 120)
    result["self_repair"] = result["self_repair"] * np.nan
    figure = plot(result)
    bands = [t for t in figure.data if t.fill == "toself"]
    assert sum(x is None for x in bands[0].x) == 2  # two polygons, before and after the gap
    assert not any(isinstance(v, float) and np.isnan(v) for t in bands for v in t.y if v is not None)
    assert titles(figure).count("no value is defined here") == 4


def test_one_sweep_with_several_phenomena_is_one_figure():
    tree = synthetic.sweep(arms=("a", "b"), phenomena=["induction", "hydra"])
    assert list(by_phenomenon(tree)) == ["induction", "hydra"]
    assert list(by_phenomenon(tree)["hydra"]) == ["a", "b"]
    shown = titles(plot(tree))
    assert "induction: " in shown
    assert "hydra: " in shown


def test_a_sweep_of_one_run_needs_no_arm():
    tree = xr.DataTree.from_dict({"/induction": synthetic.over_training(synthetic.induction)})
    assert list(by_phenomenon(tree)) == ["induction"]
    assert "step 0 shows" in titles(plot(tree))


@pytest.mark.parametrize("missing", ["IND_low", "IND_uniform", "DUP"])
def test_a_result_without_an_interval_a_baseline_or_a_score_is_still_drawn(missing):
    assert plot(synthetic.induction().drop_vars(missing)).data


def test_an_unknown_phenomenon_is_named():
    with pytest.raises(ValueError, match=r"'phenomenon' is 'geometry'.*induction, hydra"):
        plot(xr.Dataset({"x": 1}, attrs={"phenomenon": "geometry"}))
    with pytest.raises(ValueError, match="'nothing'"):
        plot(xr.DataTree.from_dict({"/arm/nothing": xr.Dataset({"x": 1})}))


def test_what_cannot_be_drawn_is_an_error():
    with pytest.raises(TypeError, match="cannot plot a list"):
        plot([synthetic.induction()])
    with pytest.raises(ValueError, match=r"result\.isel\(seed=0\)"):
        plot(synthetic.induction().assign(IND_low=synthetic.induction().IND_low.expand_dims(seed=[0, 1])))
    with pytest.raises(ValueError, match="nothing to draw in this induction result: it holds other"):
        plot(xr.Dataset({"other": ("x", [1.0])}, attrs={"phenomenon": "induction"}))
    with pytest.raises(ValueError, match="different phenomena"):
        plot({"a": synthetic.induction(), "b": synthetic.hydra()})
    with pytest.raises(ValueError, match="empty tree"):
        plot(xr.DataTree())


def test_the_step_axis_is_logarithmic_and_shows_step_zero():
    scale = StepScale.of([0, 10, 100, 1000])
    positions = scale.position([0, 10, 100, 1000])
    np.testing.assert_allclose(positions, np.log10([1, 2, 11, 101]))
    axis = scale.axis(title=True, spacing=0.1)
    assert axis["ticktext"][0] == "0"
    assert {"10", "100", "1,000"} <= set(axis["ticktext"])
    np.testing.assert_allclose(axis["tickvals"], sorted(axis["tickvals"]))
    assert axis["range"][0] < 0 < positions[-1] < axis["range"][1]


def test_a_step_axis_that_starts_late_spends_no_room_on_step_zero():
    scale = StepScale.of([1000, 20_000, 738_020])
    axis = scale.axis(title=True, spacing=0.1)
    assert axis["ticktext"][0] == "1,000"
    assert axis["range"][0] > 0


def test_a_single_checkpoint_has_a_step_axis_too():
    assert plot(synthetic.over_training(synthetic.induction, steps=(0,))).data


def test_the_loss_is_drawn_against_its_floor():
    log = synthetic.log()
    figure = plot_loss({"exact": log, "bounds": log, "none": log}, {"exact": (1.9, 1.9), "bounds": (1.5, 2.4)})
    held_out = lines_called(figure, "held out")
    np.testing.assert_allclose(held_out[0].y, log.eval_loss.dropna())
    assert [set(t.y) for t in lines_called(figure, "floor (exact)")] == [{1.9}]
    assert [set(t.y) for t in lines_called(figure, "floor: upper bound")] == [{2.4}]
    assert [(s.y0, s.y1) for s in figure.layout.shapes] == [(1.5, 2.4)]


class Trained(Run):
    """A run with a log and an evaluation, and nothing on disk."""

    log = synthetic.log()
    path = Path("runs/pcfg")

    def __init__(self, evaluation):
        self._evaluation = evaluation

    @property
    def evaluation(self):
        return self._evaluation


def an_evaluation(*, exact=True, packed=False):
    loss = np.linspace(2, 1, 12).reshape(3, 4)
    variables = {"eval_loss": loss, "eval_loss_low": loss - 0.1, "eval_loss_high": loss + 0.1}
    found = xr.Dataset(
        {name: (("step", "position"), values) for name, values in variables.items()},
        coords={"step": [0, 10, 400], "position": [1, 2, 3, 4]},
    )
    if packed:
        return found
    floor = np.array([0.9, 0.8, 0.7, 0.6]) if exact else np.full(4, np.nan)
    for name, values in (("floor", floor), ("floor_lower", np.full(4, 0.5)), ("floor_upper", np.full(4, 1.5))):
        found[name] = ("position", values)
        found[f"{name}_mean"] = float(values.mean())
    return found.assign(floor_mean_error=0.0 if exact else np.nan)


def test_a_log_is_drawn_as_loss():
    assert len(lines_called(plot(synthetic.log()), "held out")) == 1


def test_a_run_is_drawn_over_training_and_by_position_against_its_floor():
    figure = plot(Trained(an_evaluation()))
    assert len(lines_called(figure, "training")) == 1
    (floor,) = lines_called(figure, "floor (exact)")
    np.testing.assert_allclose(floor.y, 0.75)
    (last,) = lines_called(figure, "step 400")
    assert list(last.x) == [1, 2, 3, 4]
    np.testing.assert_allclose(last.y, np.linspace(2, 1, 12)[8:])
    (ideal,) = lines_called(figure, "ideal predictor")
    np.testing.assert_allclose(ideal.y, [0.9, 0.8, 0.7, 0.6])


def test_a_floor_that_is_only_bounded_is_drawn_as_two_lines_and_none_as_none():
    figure = plot_positions({"bounds": an_evaluation(exact=False), "packed": an_evaluation(packed=True)})
    assert [set(line.y) for line in lines_called(figure, "floor: lower bound")] == [{0.5}]
    assert [set(line.y) for line in lines_called(figure, "floor: upper bound")] == [{1.5}]
    assert not lines_called(figure, "ideal predictor")
    assert not lines_called(plot(Trained(an_evaluation(packed=True))), "floor (exact)")


def test_loss_of_a_wrong_log_or_floor_is_an_error():
    with pytest.raises(ValueError, match="lacks loss"):
        plot_loss({"a": pd.DataFrame({"step": [0]})})
    with pytest.raises(ValueError, match="without a log: b"):
        plot_loss({"a": synthetic.log()}, {"b": (1, 1)})
    with pytest.raises(ValueError, match="no log"):
        plot_loss({})


def test_names_that_look_like_markup_are_escaped():
    figure = plot({"<b>arm</b>": synthetic.over_training(synthetic.induction)})
    assert any(t.name == "&lt;b&gt;arm&lt;/b&gt;" for t in figure.data)


def test_nothing_global_changes():
    template, renderer = pio.templates.default, pio.renderers.default
    plot(synthetic.induction())
    assert (pio.templates.default, pio.renderers.default) == (template, renderer)


def _parts(result):
    """A result with one value of a dim selected, a dim averaged, a coordinate or a variable left out, a variable alone."""
    for dim in result.dims:
        yield f"isel {dim}", result.isel({dim: 0})
        yield f"isel [0] {dim}", result.isel({dim: [0]})
        yield f"mean {dim}", result.mean(dim, keep_attrs=True)
        yield f"without {dim}", result.drop_vars(dim)
    for name in result.data_vars:
        yield f"without {name}", result.drop_vars(name)
        yield f"only {name}", result[[name]]


def _refusal(part):
    try:
        plot(part)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("phenomenon", synthetic.RESULTS)
def test_a_part_of_a_result_is_drawn_or_refused_in_a_line_of_ours(phenomenon):
    result = synthetic.RESULTS[phenomenon]()
    for what, part in _parts(result):
        refused = _refusal(part)
        assert refused is None or re.fullmatch(r"(cannot plot|nothing to draw in) .*", refused), what


@pytest.mark.parametrize("phenomenon", ["induction", "hydra", "function_vectors"])
def test_a_layer_that_was_selected_is_to_be_selected_as_a_list(phenomenon):
    result = synthetic.RESULTS[phenomenon]()
    with pytest.raises(ValueError, match=r"layer was selected: select it as a list, result.isel\(layer=\[0\]\)"):
        plot(result.isel(layer=0))
    assert plot(result.isel(layer=[0])).data


def test_a_table_that_is_no_log_is_told_what_to_plot():
    with pytest.raises(ValueError, match=r"no run's log: it has no columns .* plot the result itself"):
        plot(pd.DataFrame({"layer": [0], "head": [1]}))

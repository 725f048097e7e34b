"""Ablating induction heads, against raw PyTorch hooks on Hugging Face's model and on planted models."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from random_models import CLASSES, random_hf, random_hooked, random_tokens

import mechhier as mh
from mechhier import results
from mechhier.models import load_model
from mechhier.models.planted import planted_duplicate, planted_induction, planted_inert, planted_previous_token
from mechhier.phenomena._tokens import random_repeats
from mechhier.phenomena.induction import heads
from mechhier.phenomena.induction.causal import ablate, choose_heads, control_sets
from mechhier.phenomena.induction.kinds import kinds_of
from mechhier.probes import Hooked


@pytest.mark.parametrize("kind", CLASSES)
def test_without_the_planted_induction_head_copies_are_lost_and_without_another_head_not(kind):
    model = load_model(planted_induction(24, 48).model, as_=kind)
    result = mh.phenomena.induction(model, torch.tensor([[*range(20), *range(20)]] * 4), n_sequences=16)
    assert result.ablated.values.tolist() == [[0, 0], [1, 0]]
    assert result.copy_loss_change_low > 2
    assert abs(float(result.copy_loss_change_null)) < 1e-5
    assert float(result.copy_loss_change_p) == 0.5  # one other head in the layer: one control set
    assert result.attrs["n_control_sets"] == 1
    assert np.isfinite(result.copy_loss_change_control).sum() == 1
    assert result.ICL_score_change > 2


def test_changes_equal_raw_hooks_on_hugging_face():
    hf, tokens = random_hf("gpt2"), random_tokens(8, 30)
    model = load_model(random_hf("gpt2"))
    result = mh.phenomena.induction(model, tokens, n_sequences=10, n_controls=3)
    ablated = [tuple(pair) for pair in np.argwhere(result.ablated.values)]
    assert len(ablated) == 1
    (layer, head), d_head = ablated[0], 16
    projection, columns = hf.transformer.h[layer].attn.c_proj, slice(head * d_head, (head + 1) * d_head)

    def run(rows, hook):
        handle = projection.register_forward_pre_hook(hook)
        with torch.no_grad():
            logits = hf(rows).logits
        handle.remove()
        return -logits.log_softmax(-1)[:, :-1].gather(-1, rows[:, 1:, None])[..., 0].numpy()

    def means_of(batches):
        seen = []
        for rows in batches:
            run(rows, lambda module, inputs: seen.append(inputs[0][..., columns].flatten(0, 1)))
        return torch.cat(seen).mean(0)

    def changes(batches, mean):
        def replace(module, inputs):
            z = inputs[0].clone()
            z[..., columns] = mean
            return (z,)

        return [(run(rows, replace), run(rows, lambda module, inputs: None)) for rows in batches]

    groups = random_repeats(Hooked(model), 10, seed=0)
    rows = [(n, row[None]) for n, group in groups for row in group]
    mean = means_of([row for _, row in rows[::2]])
    expected = [
        (without[0, n:] - with_it[0, n:]).mean() for (n, row) in rows[1::2] for without, with_it in changes([row], mean)
    ]
    assert float(result.copy_loss_change) == pytest.approx(np.mean(expected), abs=1e-5)
    assert abs(np.mean(expected)) > 1e-3
    ((without, with_it),) = changes([tokens[1::2]], means_of([tokens[::2]]))
    change = without - with_it
    expected = change[:, 26:].mean() - change[:, 1:4].mean()
    assert float(result.ICL_score_change) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    "sets", [([(0, 1), (2, 3)], [(0, 0), (2, 1)]), ([(1, 3), (1, 0), (2, 2)], [(1, 1), (1, 2), (2, 0)])]
)
def test_sets_of_heads_in_several_layers_are_ablated_as_by_raw_hooks_on_hugging_face(sets, kind):
    hf, tokens = random_hf("gpt2"), random_tokens(6, 30)
    hooked = Hooked(load_model(random_hf("gpt2"), as_=kind))
    found = ablate(hooked, sets[0], [frozenset(sets[1])], [(15, tokens)], tokens, lambda n: None)["ICL_score"]
    projections = [block.attn.c_proj for block in hf.transformer.h]
    means = {}
    handles = [
        projection.register_forward_pre_hook(
            lambda module, inputs, layer=layer: means.update({layer: inputs[0].mean((0, 1))})
        )
        for layer, projection in enumerate(projections)
    ]
    with torch.no_grad():
        hf(tokens[::2])
    for handle in handles:
        handle.remove()

    def score(heads):
        def replace(module, inputs, layer):
            z = inputs[0].clone()
            for of, head in heads:
                if of == layer:
                    z[..., 16 * head : 16 * (head + 1)] = means[layer][16 * head : 16 * (head + 1)]
            return (z,)

        handles = [p.register_forward_pre_hook(partial(replace, layer=layer)) for layer, p in enumerate(projections)]
        rows = tokens[1::2]
        with torch.no_grad():
            losses = -hf(rows).logits.log_softmax(-1)[:, :-1].gather(-1, rows[:, 1:, None])[..., 0].numpy()
        for handle in handles:
            handle.remove()
        return losses[:, 26:].mean(1) - losses[:, 1:4].mean(1)

    for measured, ablated in zip((found.top, found.controls[0]), sets, strict=True):
        np.testing.assert_allclose(measured, score(ablated) - score([]), atol=1e-4)
        assert abs(measured).min() > 1e-3


def test_the_heads_are_chosen_on_the_sequences_that_do_not_score_them():
    """By a plain loop over Hugging Face's attentions; the other sequences would have chosen another head."""
    hf = random_hf("gpt2")
    model = load_model(random_hf("gpt2"))
    result = mh.phenomena.induction(model, n_sequences=6, n_controls=1, seed=1)
    totals, row_number, counts = np.zeros((2, 3, 4)), 0, [0, 0]
    for n, rows in random_repeats(Hooked(model), 6, seed=1):
        with torch.no_grad():
            attentions = [a.numpy() for a in hf(rows, output_attentions=True).attentions]
        for b in range(len(rows)):
            half = row_number % 2
            for q in range(n, 2 * n):
                totals[half] += [a[b, :, q, q - n + 1] for a in attentions]
                counts[half] += 1
            row_number += 1
    chosen, others = (np.unravel_index(total.argmax(), total.shape) for total in totals)
    assert chosen != others
    assert np.argwhere(result.ablated.values).tolist() == [[int(place) for place in chosen]]


@pytest.mark.parametrize("architecture", ["llama-gqa", "olmo2", "gpt_neox"])
def test_changes_are_the_same_in_both_classes_and_any_batch_size(architecture, monkeypatch):
    def measure(kind):
        return mh.phenomena.induction(
            random_hooked(architecture, kind), random_tokens(6, 30), n_sequences=4, n_controls=2
        )

    measured = [measure("bridge"), measure(None)]
    monkeypatch.setattr(Hooked, "batch_size", lambda self, length: 2)
    measured.append(measure("bridge"))
    for other in measured[1:]:
        for name in ("ablated", "copy_loss_change", "copy_loss_change_control", "ICL_score_change_control"):
            np.testing.assert_allclose(measured[0][name], other[name], atol=1e-4)


def test_effects_in_untrained_models_are_within_those_of_random_heads():
    ranks = []
    for seed in range(6):
        hf = mh.ModelSpec("llama", n_layers=2, d_model=32, n_heads=8).build(
            vocab_size=60, eos_token_id=0, n_ctx=48, seed=seed
        )
        result = mh.phenomena.induction(load_model(hf), n_sequences=12, seed=seed)
        assert (result.kind == "none").all()
        assert abs(float(result.copy_loss_change)) < 0.05
        ranks.append(float(result.copy_loss_change_p))
    assert min(ranks) >= 1 / 11
    assert np.mean(ranks) > 0.2


def test_the_p_value_and_null_are_those_of_the_control_sets():
    result = mh.phenomena.induction(random_hooked("llama", None), random_tokens(6, 30), n_sequences=8, n_controls=3)
    for name in ("copy_loss_change", "ICL_score_change"):
        sets = result[f"{name}_control"].values
        assert len(sets) == 3
        assert float(result[f"{name}_null"]) == pytest.approx(sets.mean())
        assert float(result[f"{name}_null_low"]) == pytest.approx(np.quantile(sets, 0.025))
        assert float(result[f"{name}_null_high"]) == pytest.approx(np.quantile(sets, 0.975))
        assert float(result[f"{name}_p"]) == pytest.approx((1 + (sets >= float(result[name])).sum()) / 4)


def test_no_controls_leave_the_ablations_out():
    result = mh.phenomena.induction(random_hooked("llama", None), n_sequences=4, n_controls=0)
    assert not [name for name in result if "change" in str(name) or name == "ablated"]
    assert result.attrs["ablation"] == "none"
    with pytest.raises(ValueError, match="n_controls must be a whole number of at least 0"):
        mh.phenomena.induction(random_hooked("llama", None), n_controls=-1)


def test_all_convincing_heads_are_chosen_up_to_an_eighth_and_half_a_layer():
    scores = np.arange(32.0).reshape(4, 8)
    nobody, everybody = np.zeros((4, 8), bool), np.ones((4, 8), bool)
    assert choose_heads(scores, nobody) == [(3, 7)]
    assert choose_heads(scores, everybody) == [(3, 7), (3, 6), (3, 5), (3, 4)]
    assert choose_heads(scores[:, :2], everybody[:, :2]) == [(3, 1)]
    wide = np.arange(64.0).reshape(32, 2)
    assert choose_heads(wide, np.ones((32, 2), bool)) == [(31 - i, 1) for i in range(8)]
    assert choose_heads(np.ones((3, 1)), np.ones((3, 1), bool)) == []


def test_control_sets_match_the_layers_and_never_hold_a_chosen_head():
    chosen = [(0, 1), (2, 0), (2, 3)]
    sets = control_sets(chosen, 8, 12, seed=0)
    assert len(set(sets)) == 12
    for each in sets:
        assert sorted(layer for layer, _ in each) == [0, 2, 2]
        assert not each & set(chosen)
    assert control_sets(chosen, 8, 12, seed=0) == sets
    assert control_sets([(1, 0)], 2, 12, seed=0) == [frozenset({(1, 1)})]


def test_a_model_with_single_heads_has_no_control_and_is_not_ablated():
    hf = mh.ModelSpec("llama", n_layers=2, d_model=32, n_heads=1).build(vocab_size=60, eos_token_id=0, n_ctx=48, seed=0)
    result = mh.phenomena.induction(load_model(hf), n_sequences=4)
    assert int(result.ablated.sum()) == 0
    assert "copy_loss_change" not in result


@pytest.mark.parametrize(
    ("planted", "kinds"),
    [
        (planted_induction, [["previous token", "none"], ["induction", "none"]]),
        (planted_previous_token, [["previous token", "none"], ["none", "none"]]),
        (planted_duplicate, [["none", "none"], ["duplicate token", "none"]]),
        (planted_inert, [["none", "none"], ["none", "none"]]),
    ],
)
def test_planted_heads_are_of_their_kind_and_a_saved_result_keeps_it(planted, kinds, tmp_path):
    result = mh.phenomena.induction(load_model(planted(24, 48).model), n_sequences=8, n_controls=0)
    assert result.kind.values.tolist() == kinds
    loaded = results.load(results.save(result, tmp_path / "result.nc"))
    assert loaded.kind.values.tolist() == kinds
    assert heads(loaded).equals(heads(result))


def test_a_kind_needs_a_lower_bound_above_the_threshold_and_the_largest_share_wins():
    lower = {
        "IND": np.array([[0.5, 0.36, 0.38]]),
        "DUP": np.array([[0.6, 0.0, 0.0]]),
        "PREV": np.array([[0.0, 0.0, 0.0]]),
    }
    uniform = {"IND": 0.1, "DUP": 0.5, "PREV": 0.1}
    # Shares of the way from uniform to 1: IND .44, .29, .31; DUP .2.
    assert kinds_of(lower, uniform).tolist() == [["induction", "none", "induction"]]
    # One sequence has no interval: nothing is sure.
    unknown = {name: np.full((1, 2), np.nan) for name in lower}
    assert kinds_of(unknown, uniform).tolist() == [["none", "none"]]


def test_the_table_has_a_row_per_head_by_falling_induction_score():
    result = mh.phenomena.induction(random_hooked("llama", None), n_sequences=6, n_controls=0)
    table = heads(result)
    assert len(table) == 12
    assert table.IND.is_monotonic_decreasing
    for row in table.itertuples():
        for name in ("IND", "IND_low", "PREV_high", "DUP", "copying", "kind"):
            assert getattr(row, name) == result[name].sel(layer=row.layer, head=row.head).item()
    with pytest.raises(ValueError, match="lacks kind"):
        heads(result.drop_vars("kind"))
    with pytest.raises(ValueError, match=r"isel\(step"):
        heads(result.expand_dims(step=[0, 1]))


def test_the_figure_shows_copying_composition_ablations_and_kinds():
    result = mh.phenomena.induction(load_model(planted_induction(24, 48).model), n_sequences=8)
    figure = mh.plot(result)
    shown = " ".join(annotation.text for annotation in figure.layout.annotations)
    assert "Copying score" in shown
    assert "K-composition" in shown.replace("<br>", " ")
    heatmaps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(heatmaps) == 5
    assert "kind: induction" in heatmaps[0].customdata[1][0]
    assert heatmaps[0].text[1][0].endswith("★")
    bars = {trace.name: trace.y for trace in figure.data if trace.type == "bar"}
    assert bars["induction heads ablated"][0] == pytest.approx(float(result.copy_loss_change))
    assert bars["random heads of the same layers ablated"][0] == pytest.approx(0.0, abs=1e-5)

"""Activation and attribution patching against raw PyTorch hooks, TransformerLens's tools, and finite differences."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
import torch
from random_models import CLASSES, EVERY_MODEL, random_hf, random_hooked, random_tokens
from raw_hooks import BODIES, head_slice, logits_of, put, record, site_edit

import mechhier as mh
from mechhier.models import load_model
from mechhier.models.planted import planted_induction
from mechhier.probes import (
    MLP,
    Attention,
    Head,
    HeadInput,
    Neurons,
    Resid,
    attribution_patch,
    logit_difference,
    patch,
    patched,
)
from mechhier.probes._runs import recovery
from mechhier.results import MeasurementWarning

CLEAN, CORRUPTED = random_tokens(4, 5), random_tokens(4, 5, seed=1)
METRIC = logit_difference(torch.arange(4), torch.arange(4) + 10)


def differences(logits):
    return (logits[range(4), -1, range(4)] - logits[range(4), -1, range(10, 14)]).double().numpy()


@pytest.mark.parametrize("architecture", BODIES)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patches_at_positions_equal_raw_hooks(architecture, kind, direction):
    hf = random_hf(architecture)
    base, source = (CORRUPTED, CLEAN) if direction == "denoise" else (CLEAN, CORRUPTED)
    sites = ["resid_pre", "attn_out", "mlp_out"]
    result = patch(random_hooked(architecture, kind), CLEAN, CORRUPTED, sites=sites, metric=METRIC, direction=direction)
    assert result.patched.dims == ("site", "layer", "position")
    clean, corrupted = (differences(logits_of(hf, tokens)).mean() for tokens in (CLEAN, CORRUPTED))
    for site in sites:
        for layer in range(3):
            value = record(hf, source, site, layer)
            for position in range(5):
                logits = logits_of(hf, base, [site_edit(hf, site, layer, put(value[:, position], position))])
                found = result.sel(site=site, layer=layer, position=position)
                assert float(found.patched) == pytest.approx(differences(logits).mean(), abs=2e-4)
                if np.isfinite(found.recovered):
                    share = (differences(logits).mean() - corrupted) / (clean - corrupted)
                    assert float(found.recovered) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("architecture", BODIES)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("position", [None, 3, -1])
def test_patches_of_heads_equal_raw_hooks(architecture, kind, position):
    hf = random_hf(architecture)
    result = patch(random_hooked(architecture, kind), CLEAN, CORRUPTED, sites="z", metric=METRIC, position=position)
    assert result.patched.dims == ("layer", "head")
    where = slice(None) if position is None else position
    for layer in range(3):
        z = record(hf, CLEAN, "z", layer)
        for head in range(4):
            edit = put(z[:, where, head_slice(head)], where, head_slice(head))
            logits = logits_of(hf, CORRUPTED, [site_edit(hf, "z", layer, edit)])
            assert float(result.patched[layer, head]) == pytest.approx(differences(logits).mean(), abs=2e-4)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    ("site", "tool"),
    [
        ("resid_pre", "get_act_patch_resid_pre"),
        ("attn_out", "get_act_patch_attn_out"),
        ("mlp_out", "get_act_patch_mlp_out"),
        ("z", "get_act_patch_attn_head_out_all_pos"),
        ("q", "get_act_patch_attn_head_q_all_pos"),
        ("k", "get_act_patch_attn_head_k_all_pos"),
        ("v", "get_act_patch_attn_head_v_all_pos"),
        ("pattern", "get_act_patch_attn_head_pattern_all_pos"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_patches_agree_with_transformer_lens(kind, site, tool):
    from transformer_lens import patching

    model = random_hooked("olmo2", kind)
    _, cache = model.run_with_cache(CLEAN)
    metric = logit_difference(3, 10)
    rows = torch.arange(4)
    with torch.no_grad():
        expected = getattr(patching, tool)(model, CORRUPTED, cache, lambda logits: metric(logits, rows).mean())
    found = patch(model, CLEAN, CORRUPTED, sites=site, metric=metric).patched
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-4)


@pytest.mark.parametrize(("architecture", "kind"), EVERY_MODEL)
def test_every_model_is_patched_alike_in_any_batches(architecture, kind):
    model = random_hooked(architecture, kind)
    options = {"metric": METRIC, "sites": "v"}
    whole = patch(model, CLEAN, CORRUPTED, **options)
    single = patch(model, CLEAN, CORRUPTED, max_bytes=1, **options)
    np.testing.assert_allclose(whole.patched, single.patched, atol=1e-5)
    other = patch(random_hooked(architecture, "bridge"), CLEAN, CORRUPTED, **options)
    np.testing.assert_allclose(whole.patched, other.patched, atol=1e-4)
    assert (abs(whole.patched - whole.corrupted) > 1e-3).any()


def test_patching_a_run_with_itself_changes_nothing_and_recovers_no_number():
    result = patch(random_hooked("llama", "bridge"), CLEAN, CLEAN, sites=["resid_pre", "mlp_out"], metric=METRIC)
    np.testing.assert_allclose(result.patched, np.broadcast_to(result.clean, result.patched.shape), atol=1e-5)
    assert np.isnan(result.recovered).all()


@pytest.mark.parametrize("kind", CLASSES)
def test_all_of_layer_0_recovers_everything_and_the_last_stream_only_the_last_position(kind):
    model = random_hooked("olmo2", kind)
    with patched(model, [Resid(0)], CLEAN):
        torch.testing.assert_close(
            model(CORRUPTED, return_type="logits"), model(CLEAN, return_type="logits"), atol=1e-4, rtol=0
        )
    one_token = CLEAN.clone()
    one_token[:, 2] = (one_token[:, 2] + 7) % 50
    metric = logit_difference(3, 10)
    for direction, all_of, none_of in (("denoise", 1.0, 0.0), ("noise", 0.0, 1.0)):
        # The runs surely differ: four times the same sequence.
        pair = CLEAN[:1].repeat(4, 1), one_token[:1].repeat(4, 1)
        options = {"metric": lambda logits, rows: logits[:, -1, 3].exp(), "direction": direction}
        first = patch(model, *pair, **options).recovered.sel(layer=0)
        last = patch(model, *pair, sites="resid_post", **options).recovered.sel(layer=2)
        np.testing.assert_allclose(first, [none_of, none_of, all_of, none_of, none_of], atol=1e-3)
        np.testing.assert_allclose(last, [none_of] * 4 + [all_of], atol=1e-3)
    back = patch(model, CORRUPTED, CLEAN, metric=metric, direction="noise").patched
    np.testing.assert_allclose(patch(model, CLEAN, CORRUPTED, metric=metric).patched, back, atol=1e-6)


@pytest.mark.parametrize(
    ("clean", "corrupted", "expected"),
    [
        ([3.0, 5.0, 4.0, 4.5], [1.0, 1.0, 1.0, 1.0], 0.5),
        ([1.0, -1.0, 0.5, 0.2], [0.0, 0.0, 0.0, 0.0], np.nan),  # differences of both signs
        ([1.00001, 2.00001, 3.00001, 4.00001], [1.0, 2.0, 3.0, 4.0], np.nan),  # no more than rounding
        ([3.0, 5.0, 4.0], [1.0, 1.0, 1.0], np.nan),  # too few to know
    ],
)
def test_recovery_is_a_ratio_of_means_and_not_a_number_where_the_runs_do_not_differ(clean, corrupted, expected):
    clean, corrupted = np.array(clean), np.array(corrupted)
    patched_half = (corrupted + 0.5 * (clean - corrupted))[:, None]
    said = (
        contextlib.nullcontext()
        if np.isfinite(expected)
        else pytest.warns(MeasurementWarning, match="recovered is NaN")
    )
    with said:
        found = recovery(("layer",), clean, corrupted, patched_half, METRIC, seed=0)
    np.testing.assert_allclose(found["recovered"][1], [expected])
    np.testing.assert_allclose(found["recovered_low"][1], [expected])
    np.testing.assert_allclose(found["patched"][1], [patched_half.mean()])


@pytest.mark.parametrize("n", [1, 3])
def test_few_sequences_are_patched_without_intervals_and_numbers_have_their_units(n):
    with pytest.warns(MeasurementWarning, match=f"needs 4 sequences, of {n} there is none") as said:
        few = patch(random_hooked("gpt2", "bridge"), CLEAN[:n], CORRUPTED[:n], metric=METRIC)
    assert [each.filename for each in said if each.category is MeasurementWarning] == [__file__]
    for name in ("clean", "corrupted", "patched"):
        assert np.isfinite(few[name]).all()
        assert np.isnan(few[f"{name}_low"]).all()
    assert np.isnan(few.recovered).all()
    assert (few.recovered.units, few.patched.units) == ("1", "logit")


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_recovery_is_no_number_in_95_of_100_where_the_runs_do_not_differ(n):
    """Half of the time at two sequences and 8 % at sixteen it was one, by the interval of percentiles."""
    rng, numbers = np.random.default_rng(0), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeasurementWarning)
        for seed in range(1000):
            clean, corrupted, run = rng.normal(size=(3, n))
            numbers += np.isfinite(recovery((), clean, corrupted, run, METRIC, seed=seed)["recovered"][1])
    # 50 expected at most; more than 64 in one of fifty such tests.
    assert numbers <= 64


@pytest.mark.parametrize("kind", CLASSES)
def test_planted_induction_is_found_in_its_two_heads_and_in_the_repeated_token(kind):
    """The clean run repeats r; the corrupted one has another token in place of the copy's successor."""
    planted = planted_induction()
    clean = torch.tensor([[start + i for i in (0, 1, 2, 3, 4, 0, 1)] for start in (5, 15, 25, 35)])
    corrupted = clean.clone()
    corrupted[:, 2] += 50
    metric = logit_difference(clean[:, 2], corrupted[:, 2])
    model = mh.load_model(planted.model, as_=kind)
    heads = patch(model, clean, corrupted, sites="z", metric=metric)
    expected = np.zeros((2, 2))
    expected[1, 0] = 1.0
    np.testing.assert_allclose(heads.recovered, expected, atol=1e-3)
    stream = patch(model, clean, corrupted, metric=metric)
    np.testing.assert_allclose(stream.recovered, [[0, 0, 1, 0, 0, 0, 0]] * 2, atol=1e-3)


@pytest.mark.parametrize("architecture", BODIES)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_context_patches_every_kind_of_component(architecture, kind):
    hf, model = random_hf(architecture), random_hooked(architecture, kind)
    places = {
        Head(1, 2): ("z", head_slice(2)),
        Attention(1): ("attn_out", slice(None)),
        MLP(1): ("mlp_out", slice(None)),
        Neurons(1, 4, 50): ("mlp_post", slice(4, 50)),
        Resid(1): ("resid_pre", slice(None)),
    }
    for part, (site, where) in places.items():
        value = record(hf, CLEAN, site, 1)[:, [1, 3], where]
        expected = logits_of(
            hf, CORRUPTED, [site_edit(hf, site, 1, put(value.flatten(0, 1).view_as(value), [1, 3], where))]
        )
        with patched(model, [part], CLEAN, positions=[1, -2]):
            found = model(CORRUPTED, return_type="logits").detach()
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    with patched(model, [MLP(1)], CLEAN[:1]):
        from_one = model(CORRUPTED, return_type="logits").detach()
    value = record(hf, CLEAN[:1], "mlp_out", 1)
    torch.testing.assert_close(
        from_one, logits_of(hf, CORRUPTED, [site_edit(hf, "mlp_out", 1, put(value, slice(None)))]), atol=1e-3, rtol=1e-4
    )


def test_a_context_refuses_calls_that_do_not_correspond():
    model = random_hooked("llama", "bridge")
    with patched(model, [HeadInput(1, 0, "q")], CLEAN):
        for wrong in (CORRUPTED[:2], CORRUPTED[:, :4], torch.cat([CORRUPTED, CORRUPTED])):
            with pytest.raises(ValueError, match="the source has 4 sequences of 5 tokens"):
                model(wrong)
    with (
        pytest.raises(ValueError, match=r"positions must lie in -5\.\.4"),
        patched(model, [MLP(0)], CLEAN, positions=5),
    ):
        pass


@pytest.mark.parametrize("architecture", BODIES)
@pytest.mark.parametrize(("site", "position"), [("resid_pre", None), ("mlp_out", None), ("z", None), ("z", 3)])
def test_attributions_are_the_slope_along_the_patch(architecture, site, position):
    """Central differences of the Hugging Face model's metric in float64."""
    hf = random_hf(architecture)
    result = attribution_patch(
        random_hooked(architecture, "bridge"), CLEAN, CORRUPTED, sites=site, metric=METRIC, position=position
    )
    hf = hf.double()
    # Norms and softmax stay in float32: the step must not be small.
    step, layer = 3e-3, 1
    moved = record(hf, CLEAN, site, layer) - record(hf, CORRUPTED, site, layer)
    for unit in range(result.attribution.shape[1]):
        index = (slice(None), unit) if site != "z" else (slice(None), slice(None), head_slice(unit))
        if position is not None:
            index = (slice(None), position, head_slice(unit))
        part = torch.zeros_like(moved)
        part[index] = moved[index]
        ends = [
            logits_of(
                hf, CORRUPTED, [site_edit(hf, site, layer, lambda x, sign=sign, part=part: x + sign * step * part)]
            )
            for sign in (1, -1)
        ]
        slope = (differences(ends[0]) - differences(ends[1])).mean() / (2 * step)
        largest = float(abs(result.attribution).max())
        assert float(result.attribution[layer, unit]) == pytest.approx(slope, abs=2e-3 * largest)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("site", ["resid_mid", "q", "k", "v", "pattern"])
def test_attributions_of_every_site_are_the_patches_to_first_order(kind, site):
    """Close to the corrupted run: a source that differs by little is patched as attributed."""
    model = load_model(random_hf("llama-gqa"), as_=kind, dtype=torch.float64)
    model.hook_dict["blocks.0.hook_resid_pre"].add_hook(_nearly_the_same)
    clean = torch.cat([CLEAN[:, :4], CORRUPTED[:, 4:]], 1)
    result = attribution_patch(model, clean, CORRUPTED, sites=site, metric=METRIC, exact=True)
    assert float(abs(result.effect).max()) > 1e-6
    assert float(result.correlation) > 0.98
    np.testing.assert_allclose(result.attribution, result.effect, atol=0.1 * float(abs(result.effect).max()))


def _nearly_the_same(resid, hook):
    """Embeddings that differ by a twentieth of what they did."""
    centre = torch.linspace(-1, 1, resid.shape[-1], dtype=resid.dtype)
    return centre + (resid - centre) * 5e-2


def test_correlation_is_that_of_attribution_and_effect_and_batches_do_not_matter():
    model = random_hooked("olmo2", "bridge")
    options = {"sites": ["attn_out", "mlp_out"], "metric": METRIC}
    result = attribution_patch(model, CLEAN, CORRUPTED, exact=True, **options)
    expected = np.corrcoef(result.attribution.values.ravel(), result.effect.values.ravel())[0, 1]
    assert float(result.correlation) == pytest.approx(expected, abs=1e-6)
    assert float(result.correlation_low) <= expected <= float(result.correlation_high)
    exact = patch(model, CLEAN, CORRUPTED, **options)
    np.testing.assert_allclose(result.effect, exact.patched - exact.corrupted, atol=1e-6)
    np.testing.assert_allclose(result.estimated, result.attribution + result.corrupted, atol=1e-6)
    single = attribution_patch(model, CLEAN, CORRUPTED, max_bytes=1, **options)
    np.testing.assert_allclose(result.attribution, single.attribution, atol=1e-4)
    for parameter in model.parameters():
        assert parameter.grad is None
        parameter.requires_grad_(False)
    frozen = attribution_patch(model, CLEAN, CORRUPTED, **options)
    np.testing.assert_allclose(result.attribution, frozen.attribution, atol=1e-5)
    noise = attribution_patch(model, CORRUPTED, CLEAN, direction="noise", **options)
    np.testing.assert_allclose(result.attribution, noise.attribution, atol=1e-6)
    np.testing.assert_allclose(noise.estimated, noise.attribution + noise.clean, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "residual"}, "sites must be one of"),
        ({"sites": ["z", "resid_pre"]}, "different dims"),
        ({"sites": ["q", "k"]}, "different dims"),
        ({"sites": []}, "sites must be"),
        ({"sites": "resid_pre", "position": 1}, "position is for heads"),
        ({"sites": "z", "position": 5}, "positions must lie in -5..4"),
        ({"direction": "both"}, "direction must be one of denoise, noise"),
        ({"corrupted": CORRUPTED[:, :4]}, "correspond position by position"),
    ],
)
@pytest.mark.parametrize("function", [patch, attribution_patch])
def test_patches_that_cannot_be_made_are_refused(function, options, message):
    arguments = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC, **options}
    with pytest.raises(ValueError, match=message):
        function(random_hooked("llama-gqa", "bridge"), **arguments)


def test_a_metric_without_gradients_is_refused_for_attribution():
    with pytest.raises(ValueError, match="not differentiable"):
        attribution_patch(
            random_hooked("llama", "bridge"), CLEAN, CORRUPTED, metric=lambda logits, rows: logits.detach()[:, -1, 0]
        )
    with pytest.raises(ValueError, match="resid_mid does not exist"):
        patch(random_hooked("gpt_neox", "bridge"), CLEAN, CORRUPTED, sites="resid_mid", metric=METRIC)

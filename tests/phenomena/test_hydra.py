from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from random_models import (
    ARCHITECTURES,
    CLASSES,
    EVERY_MODEL,
    HAS_HOOKED_TRANSFORMER,
    random_hf,
    random_hooked,
    random_tokens,
)
from scipy import stats

import mechhier as mh
from mechhier.models import load_model
from mechhier.models.planted import planted_backup, planted_inert
from mechhier.phenomena.hydra.effects import Effects
from mechhier.phenomena.hydra.statistics import median_bounds, repair_share
from mechhier.probes import MLP, Attention, Head, Hooked, ablate, ablated
from mechhier.probes.ablation import draw_donors
from mechhier.probes.attribution import target_directions
from mechhier.results import MeasurementWarning, mean_interval, scored

TERMS = ("own_change", "attention_growth", "mlp_change", "norm_change")


def measure(model, **options):
    return mh.phenomena.hydra(model, random_tokens(6, 12), **{"min_probability": 0.0, "n_patches": 3, **options})


ABLATIONS = ("resample", "mean", "zero")
# Every ablation on each kind of block, and one on the post-norms that only the bridge has: other settings of the same
# blocks differ in how a write comes about, which the identity does not see.
IDENTITY = [
    *((name, kind, ablation) for name, kind in EVERY_MODEL if name in ARCHITECTURES for ablation in ABLATIONS),
    *((name, "bridge", "resample") for name in ("olmo2-biases", "gemma2")),
]


@pytest.mark.parametrize(("architecture", "kind", "ablation"), IDENTITY)
def test_identity_is_exact(architecture, kind, ablation):
    result = measure(random_hooked(architecture, kind), ablation=ablation)
    assert result.identity_error < 1e-4
    assert result.no_op_error < 1e-4
    total = sum(result[term] for term in TERMS)
    np.testing.assert_allclose(total, result.total_effect, atol=1e-4)
    assert abs(result.total_effect).min() > 1e-3


@pytest.mark.parametrize("architecture", ["llama", "olmo2", "gpt2", "gpt_neox"])
def test_total_effect_of_mean_ablation_equals_raw_pytorch_hooks(architecture):
    """Brute force on the Hugging Face model: one full pass with one layer's attention replaced by its mean."""
    hf, tokens = random_hf(architecture), random_tokens(6, 12)
    result = measure(load_model(hf), ablation="mean")
    body = hf.base_model
    blocks = getattr(body, "layers", None) or body.h
    with torch.no_grad():
        clean = hf(tokens).logits
    target = clean.argmax(-1, keepdim=True)
    for layer, block in enumerate(blocks):
        attention = getattr(block, "self_attn", None) or getattr(block, "attn", None) or block.attention
        writer = block.post_attention_layernorm if architecture == "olmo2" else attention

        def to_mean(module, inputs, output):
            write = output[0] if isinstance(output, tuple) else output
            mean = write.mean((0, 1), keepdim=True).expand_as(write)
            return (mean, *output[1:]) if isinstance(output, tuple) else mean

        handle = writer.register_forward_hook(to_mean)
        with torch.no_grad():
            ablated = hf(tokens).logits
        handle.remove()
        effect = (ablated - ablated.mean(-1, keepdim=True)) - (clean - clean.mean(-1, keepdim=True))
        expected = effect.gather(-1, target).mean()
        assert float(result.total_effect.sel(component="attention", layer=layer)) == pytest.approx(
            float(expected), abs=1e-4
        )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_direct_effect_equals_removing_the_write_from_the_last_residual_stream(architecture):
    """With the scale frozen the direct effect is what is lost when the write alone is subtracted before the final norm."""
    hf = random_hf(architecture)
    hooked, tokens = Hooked(load_model(hf)), random_tokens(6, 12)
    writes, stream, scale = [], [], []
    logits = hooked.run(
        tokens,
        [("mlp_out", 1, writes.append), ("resid_post", 2, stream.append), ("final_scale", None, scale.append)],
    )
    norm = hf.transformer.ln_f if architecture == "gpt2" else hf.model.norm
    bias = norm.bias if architecture == "gpt2" else 0.0

    def frozen(x):
        x = x - x.mean(-1, keepdim=True) if architecture == "gpt2" else x
        out = (x / scale[0] * norm.weight + bias) @ hf.lm_head.weight.T
        return (out - out.mean(-1, keepdim=True)).gather(-1, logits.argmax(-1, keepdim=True))

    expected = (frozen(stream[0]) - frozen(stream[0] - writes[0])).mean()
    result = measure(load_model(hf))
    assert float(result.direct_effect.sel(component="mlp", layer=1)) == pytest.approx(expected.item(), abs=1e-4)


def test_resampling_equals_a_plain_loop_over_donors():
    model, tokens = load_model(random_hf("llama")), random_tokens(6, 12)
    hooked = Hooked(model)
    writes = []
    clean = hooked.run(tokens, [("attn_out", 0, writes.append)])
    target = clean.argmax(-1, keepdim=True)
    effects = []
    shifts = torch.randperm(5, generator=torch.Generator().manual_seed(0))[:3] + 1
    for row in range(6):
        for shift in shifts.tolist():
            donor = writes[0][(row + shift) % 6][None]
            logits = hooked.run(tokens[row : row + 1], [("attn_out", 0, lambda _, donor=donor: donor)])
            change = (logits - logits.mean(-1, keepdim=True)) - (clean - clean.mean(-1, keepdim=True))[row : row + 1]
            effects.append(change.gather(-1, target[row : row + 1]).mean())
    result = measure(model)
    expected = float(torch.stack(effects).mean())
    assert float(result.total_effect.sel(component="attention", layer=0)) == pytest.approx(expected, abs=1e-4)


def test_resampling_draws_the_donors_that_ablate_draws():
    """One seed, the same total effect by both."""
    model, tokens = random_hooked("llama", None), random_tokens(9, 12)
    target = Hooked(model).run(tokens).argmax(-1, keepdim=True)

    def centred_logit(logits, rows):
        return (logits.gather(-1, target[rows])[..., 0] - logits.mean(-1)).mean(-1)

    places = ({"component": "attention", "layer": 1}, {"component": "mlp", "layer": 0})
    for seed in (0, 1):
        options = {"n_patches": 3, "seed": seed}
        expected = ablate(model, [Attention(1), MLP(0)], tokens, metric=centred_logit, **options).effect
        found = mh.phenomena.hydra(model, tokens, min_probability=0.0, n_null=0, **options).total_effect
        for effect, place in zip(expected, places, strict=True):
            assert float(found.sel(place)) == pytest.approx(float(effect), abs=1e-4)


def test_rows_in_order_of_likeness_are_not_given_their_neighbours():
    """Rows of four kinds, one kind behind the other: the donors are of other kinds as often as in shuffled rows."""
    donors = [draw_donors(32, 32, 8, own=True, generator=torch.Generator().manual_seed(seed)) for seed in range(200)]
    kind = torch.arange(32) // 8
    alike = [float((kind[each] == kind).float().mean()) for each in donors]
    assert np.mean(alike) == pytest.approx(7 / 31, abs=0.03)
    for each in donors:
        assert (each != torch.arange(32)).all()
        assert all(len(column.unique()) == 8 for column in each.T)


@pytest.mark.parametrize(("n", "expected"), [(2, 1), (10, 9), (20, 16)])
def test_as_many_patches_as_there_are_unless_a_number_is_given(n, expected):
    model, tokens = random_hooked("llama", None), random_tokens(n, 5)
    options = {"min_probability": 0.0, "n_null": 0}
    found = mh.phenomena.hydra(model, tokens, **options)
    assert found.attrs["n_patches"] == expected
    assert ablate(model, [Attention(0)], tokens).attrs["n_patches"] == expected
    np.testing.assert_array_equal(
        found.total_effect, mh.phenomena.hydra(model, tokens, n_patches=expected, **options).total_effect
    )
    for measure_it in (
        lambda **k: mh.phenomena.hydra(model, tokens, **k),
        lambda **k: ablate(model, [MLP(0)], tokens, **k),
    ):
        with pytest.raises(ValueError, match=f"n_patches must lie in 1..{n - 1}, got {n}"):
            measure_it(n_patches=n)
    with pytest.raises(ValueError, match="at least 2 sequences, got 1"):
        mh.phenomena.hydra(model, tokens[:1])


@pytest.mark.parametrize("kind", CLASSES)
def test_last_layer_of_a_parallel_model_repairs_only_through_the_norm(kind):
    last = measure(random_hooked("gpt_neox", kind)).sel(layer=2)
    np.testing.assert_array_equal(last.attention_growth, 0.0)
    np.testing.assert_array_equal(last.mlp_change, 0.0)
    np.testing.assert_allclose(last.self_repair, last.norm_change, atol=1e-4)
    assert abs(last.norm_change).min() > 1e-4


def test_response_matrix_is_causal_and_adds_up_to_growth():
    result = measure(random_hooked("llama", None))
    for component in ("attention", "mlp"):
        for layer in range(3):
            row = result.response.sel(component=component, layer=layer)
            assert (row.sel(responding_layer=slice(0, layer - 1)) == 0).all() if layer else True
            assert (row.sel(responding_component="attention", responding_layer=layer) == 0).all()
            growth = row.sel(responding_component="attention").sum()
            np.testing.assert_allclose(growth, result.attention_growth.sel(component=component, layer=layer), atol=1e-5)


def test_compensation_is_the_least_squares_slope():
    """Against numpy's polyfit on the same points, taken from a run with one donor."""
    model, tokens = load_model(random_hf("llama")), random_tokens(6, 12)
    result = mh.phenomena.hydra(model, tokens, ablation="zero", min_probability=0.0)
    hooked, W_U = Hooked(model), model.W_U.detach()
    seen = {}
    clean = hooked.run(
        tokens, [("mlp_out", 0, lambda x: seen.update(w=x)), ("final_scale", None, lambda x: seen.update(s=x))]
    )
    target = clean.argmax(-1)
    u = ((W_U - W_U.mean(1, keepdim=True)) * hooked.final_gain[:, None]).T[target]
    direct = ((seen["w"] * u).sum(-1) / seen["s"][..., 0]).flatten()
    ablated = hooked.run(tokens, [("mlp_out", 0, torch.zeros_like)])
    centred = [x.gather(-1, target[..., None])[..., 0] - x.mean(-1) for x in (ablated, clean)]
    repair = (centred[0] - centred[1]).flatten() + direct
    slope = np.polyfit(direct.double().numpy(), repair.double().numpy(), 1)[0]
    assert float(result.compensation.sel(component="mlp", layer=0)) == pytest.approx(slope, abs=1e-4)


def test_inert_layers_have_no_effect_and_no_repair():
    result = mh.phenomena.hydra(load_model(planted_inert().model), min_probability=0.0, n_patches=4, n_sequences=8)
    for term in ("total_effect", *TERMS, "self_repair"):
        np.testing.assert_allclose(result[term], 0.0, atol=1e-5)


def test_results_do_not_depend_on_batch_size_or_class(monkeypatch):
    whole = measure(random_hooked("llama-gqa", "bridge"))
    monkeypatch.setattr(Hooked, "batch_size", lambda self, length: 4)
    for kind in ("bridge", None):
        other = measure(random_hooked("llama-gqa", kind))
        for name in ("total_effect", "attention_growth", "response", "compensation", "self_repair_null"):
            np.testing.assert_allclose(whole[name], other[name], atol=1e-4)


def test_positions_count_where_hugging_faces_top_probability_exceeds_the_threshold():
    hf, tokens = random_hf("llama"), random_tokens(6, 12)
    with torch.no_grad():
        clean = hf(tokens).logits
    probability, target = clean.softmax(-1).max(-1)
    threshold = float(probability.median()) + 1e-4
    chosen = probability > threshold
    hooked = Hooked(load_model(hf))
    result = mh.phenomena.hydra(hooked.model, tokens, ablation="zero", min_probability=threshold, n_null=0)
    assert int(result.n_positions) == int(chosen.sum())
    assert 0 < int(chosen.sum()) < chosen.numel()
    seen = {}
    hooked.run(tokens, [("attn_out", 1, lambda x: seen.update(w=x)), ("final_scale", None, lambda x: seen.update(s=x))])
    ablated = hooked.run(tokens, [("attn_out", 1, torch.zeros_like)])
    change = [x.gather(-1, target[..., None])[..., 0] - x.mean(-1) for x in (ablated, clean)]
    total = (change[0] - change[1])[chosen]
    unembed = (hf.lm_head.weight - hf.lm_head.weight.mean(0)).detach() * hf.model.norm.weight.detach()
    direct = ((seen["w"] * unembed[target]).sum(-1) / seen["s"][..., 0])[chosen]
    attention = result.sel(component="attention", layer=1)
    assert float(attention.total_effect) == pytest.approx(float(total.mean()), abs=1e-4)
    assert float(attention.direct_effect) == pytest.approx(float(direct.mean()), abs=1e-4)
    slope = np.polyfit(direct.double().numpy(), (total + direct).double().numpy(), 1)[0]
    assert float(attention.compensation) == pytest.approx(slope, abs=1e-3)


def test_null_follows_the_seed():
    model = random_hooked("llama", None)
    first, again, other = (measure(model, seed=seed).total_effect_null for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


WRITERS = {
    "llama": lambda block: (block.self_attn.o_proj, block.mlp.down_proj),
    "gpt_neox": lambda block: (block.attention.dense, block.mlp.dense_4h_to_h),
}


@pytest.mark.parametrize("architecture", list(WRITERS))
@pytest.mark.parametrize("level", ["layer", "head"])
def test_null_is_the_measurement_of_a_model_with_turned_output_weights(architecture, level):
    """Zero ablation of Hugging Face models whose output matrices are multiplied by the rotation."""
    tokens, n_draws = random_tokens(6, 12), 3
    result = measure(load_model(random_hf(architecture)), level=level, ablation="zero", n_null=n_draws)
    rng = np.random.default_rng(0)
    rotations = [
        torch.as_tensor(stats.ortho_group.rvs(64, random_state=rng), dtype=torch.float32) for _ in range(n_draws)
    ]
    for layer, component, head in [(0, 0, 1), (1, 0, 3), *([(1, 1, None)] if level == "layer" else [])]:
        found = []
        for rotation in rotations:
            hf = random_hf(architecture)
            body = hf.base_model
            writer = WRITERS[architecture](body.layers[layer])[component]
            columns = slice(None) if level == "layer" else slice(16 * head, 16 * (head + 1))
            with torch.no_grad():
                # weight is [d_model, inputs]: its transpose times R.
                writer.weight[:, columns] = rotation.T @ writer.weight[:, columns]
                if writer.bias is not None and level == "layer":
                    writer.bias.copy_(writer.bias @ rotation)
                turned = hf(tokens).logits
                if writer.bias is not None and level == "layer":
                    writer.bias.zero_()
                writer.weight[:, columns] = 0.0
                zeroed = hf(tokens).logits
            target = turned.argmax(-1, keepdim=True)
            change = (zeroed - zeroed.mean(-1, keepdim=True)) - (turned - turned.mean(-1, keepdim=True))
            found.append(float(change.gather(-1, target).mean()))
        place = {"component": component, "layer": layer} if level == "layer" else {"layer": layer, "head": head}
        null = result.isel(place)
        assert float(null.total_effect_null) == pytest.approx(np.mean(found), abs=1e-4)
        reach = 4.3027 * np.std(found, ddof=1) * np.sqrt(1 + 1 / n_draws)
        assert float(null.total_effect_null_high) == pytest.approx(np.mean(found) + reach, abs=1e-3)
        assert float(null.total_effect_null_low) == pytest.approx(np.mean(found) - reach, abs=1e-3)


@pytest.mark.parametrize("ablation", ["resample", "mean"])
@pytest.mark.parametrize(("architecture", "level"), [("llama", "layer"), ("olmo2", "layer"), ("gpt2", "head")])
def test_null_turns_what_the_part_adds_to_the_stream_about_what_the_ablation_leaves(architecture, level, ablation):
    """Against full runs with the written-out edit, for every term of it that full runs show."""
    model, tokens = random_hooked(architecture, None), random_tokens(6, 12)
    result = measure(model, level=level, ablation=ablation, n_null=1)
    hooked, seen = Hooked(model), {}
    hooked.run(tokens, [("attn_out", 1, lambda x: seen.update(out=x)), ("z", 1, lambda z: seen.update(z=z))])
    write = seen["out"] if level == "layer" else seen["z"][:, :, 2] @ hooked.W_O(1)[2]
    rotation = torch.as_tensor(stats.ortho_group.rvs(64, random_state=np.random.default_rng(0)), dtype=torch.float32)
    centre = write.mean(0, keepdim=True) if ablation == "resample" else write.mean((0, 1), keepdim=True)
    shift = int(torch.randperm(5, generator=torch.Generator().manual_seed(0))[0]) + 1
    left = write.roll(-shift, 0) if ablation == "resample" else centre.expand_as(write)
    runs, own, scale = [], [], []
    for what in (write, left):
        turned = centre + (what - centre) @ rotation
        edit = seen["out"] - write + turned
        read = [("final_scale", None, scale.append)]
        runs.append(hooked.run(tokens, [("attn_out", 1, lambda _, edit=edit: edit), *read]))
        own.append(turned)
    target = runs[0].argmax(-1)
    change = [x.gather(-1, target[..., None])[..., 0] - x.mean(-1) for x in runs]
    null = result.sel({"component": "attention"} if level == "layer" else {"head": 2}).sel(layer=1)
    total = float((change[1] - change[0]).mean())
    assert float(null.total_effect_null) == pytest.approx(total, abs=1e-4)
    directions = target_directions(hooked, target)
    lost = (((own[1] - own[0]) * directions).sum(-1) / scale[0][..., 0]).mean()
    assert float(null.self_repair_null) == pytest.approx(total - float(lost), abs=1e-4)
    direct = ((own[0] * directions).sum(-1) / scale[0][..., 0]).flatten()
    repair = (change[1] - change[0]).flatten() - (((own[1] - own[0]) * directions).sum(-1) / scale[0][..., 0]).flatten()
    slope = np.polyfit(direct.double().numpy(), repair.double().numpy(), 1)[0]
    assert float(null.compensation_null) == pytest.approx(slope, abs=1e-3)
    assert np.isnan(null.total_effect_null_low)  # One draw has no band.


def test_no_position_gives_nan_and_says_so_once():
    model, tokens = random_hooked("llama", None), random_tokens(6, 12)
    largest = float(Hooked(model).run(tokens).softmax(-1).max())
    with pytest.warns(MeasurementWarning) as said:
        result = mh.phenomena.hydra(model, tokens, min_probability=0.99, n_patches=3)
    assert len(said) == 1
    assert f"above 0.99 (min_probability), the largest is {largest:.3g}" in str(said[0].message)
    assert said[0].filename == __file__
    assert result.attrs["largest_probability"] == pytest.approx(largest, abs=1e-5)
    assert int(result.n_positions) == 0
    assert int(result.n_positions_total) == 72
    assert result.total_effect.isnull().all()
    assert result.repair_share_median.isnull()


def test_a_model_in_which_nothing_is_lost_says_why_its_ratios_are_nan():
    with pytest.warns(
        MeasurementWarning, match=r"no part loses more than 0\.1 logits.*direct effect does not vary"
    ) as said:
        result = mh.phenomena.hydra(
            load_model(planted_inert().model), random_tokens(8, 12), min_probability=0.0, n_patches=4, n_null=0
        )
    assert len(said) == 1
    assert result.repair_share.isnull().all()
    assert result.compensation.isnull().all()


def test_too_few_sequences_for_an_interval_have_no_repair_share():
    with pytest.warns(MeasurementWarning, match="only 3 sequences have a position") as said:
        result = mh.phenomena.hydra(random_hooked("llama", None), random_tokens(3, 12), min_probability=0.0)
    assert len(said) == 1
    assert result.repair_share.isnull().all()
    assert result.total_effect.notnull().all()


@pytest.mark.parametrize("where", ["layer", "unembedding"])
def test_weights_that_are_not_numbers_are_refused(where):
    model = random_hooked("llama", None)
    with torch.no_grad():
        (model.blocks[1].mlp.W_out if where == "layer" else model.W_U)[3, 5] = float("nan")
    with pytest.raises(RuntimeError, match="stream behind layer 1" if where == "layer" else "logits are not finite"):
        measure(model)


@pytest.mark.parametrize("level", ["layer", "head"])
@pytest.mark.parametrize("kind", CLASSES)
def test_terms_that_do_not_add_up_are_refused(kind, level):
    """A multiplier between the final norm and the unembedding that direct effects do not know of."""
    model = random_hooked("llama", kind)
    model.hook_dict["ln_final.hook_normalized"].add_hook(lambda x, hook: 1.5 * x)
    with pytest.raises(RuntimeError, match="miss its total effect by"):
        measure(model, level=level, n_null=0)


@pytest.mark.parametrize("layer", [1, 2])
def test_every_part_is_tried(layer):
    """A hook that acts only in runs that begin at one layer: other parts than that layer's do not meet it."""
    model, begun = random_hooked("llama", None), []
    for each in range(3):
        model.hook_dict[f"blocks.{each}.hook_resid_pre"].add_hook(lambda x, hook, each=each: begun.append(each))

    def disturb(x, hook):
        first = begun[0]
        begun.clear()
        return 1.01 * x if first == layer else x

    model.hook_dict["ln_final.hook_normalized"].add_hook(disturb)
    with pytest.raises(RuntimeError, match=f"replacing the output of attention {layer} by itself"):
        measure(model, n_null=0)


def test_a_model_whose_hooks_are_not_deterministic_is_refused():
    model = random_hooked("llama", None)
    model.hook_dict["blocks.1.attn.hook_z"].add_hook(lambda z, hook: z + torch.randn_like(z))
    with pytest.raises(RuntimeError, match="not deterministic"):
        measure(model)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_parallel_model_whose_mlp_is_made_to_see_its_attention_is_refused(kind):
    model, seen = random_hooked("gpt_neox", kind), {}
    measure(model, level="head", ablation="zero", n_null=0)
    model.hook_dict["blocks.1.hook_attn_out"].add_hook(lambda write, hook: seen.update(write=write) or write)
    model.hook_dict["blocks.1.hook_mlp_out"].add_hook(lambda write, hook: write + seen["write"])
    with pytest.raises(RuntimeError, match="one that a component cannot see"):
        measure(model, level="head", ablation="zero", n_null=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ablation": "zeros"}, "resample, mean, zero"), ({"n_patches": 6}, "n_patches must lie in 1..5")],
)
def test_ablations_that_cannot_be_done_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure(random_hooked("llama", None), **options)


@pytest.mark.parametrize("share", [0.0, 0.7])
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_planted_backup_repairs_its_share(ablation, kind, share):
    planted = planted_backup(share=share)
    tokens = torch.randint(1, 320, (6, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0  # the sink
    result = mh.phenomena.hydra(load_model(planted.model, as_=kind), tokens, ablation=ablation, n_patches=3)
    assert int(result.n_positions) == tokens.numel()
    ablated = result.sel(component="attention", layer=planted.heads["name_mover"][0])
    assert ablated.own_change < -10
    repaired = float(-ablated.attention_growth / ablated.own_change)
    assert repaired == pytest.approx(planted.expected[f"repair_share_{ablation}"], abs=1e-4)
    assert float(ablated.mlp_change) == 0.0
    # All repair but the norm's is the backup's, and the backup itself has nobody behind it and nothing to lose.
    backup = planted.heads["backup"][0]
    response = ablated.response.sel(responding_component="attention", responding_layer=backup)
    assert float(response) == pytest.approx(float(ablated.attention_growth), abs=1e-5)
    for term in ("direct_effect", "total_effect", "self_repair"):
        assert float(result[term].sel(component="attention", layer=backup)) == pytest.approx(0.0, abs=1e-4)
    # Names written in random directions are not what the backup waits for.
    assert abs(float(ablated.attention_growth_null)) < 0.02 * abs(float(ablated.own_change))


@pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has TransformerBridge only")
@pytest.mark.parametrize("architecture", ["llama", "olmo", "gpt2", "gpt_neox"])
def test_folding_the_weights_changes_no_effect(architecture):
    """What `HookedTransformer.from_pretrained` does by default."""
    plain, folded = random_hooked(architecture, "hooked"), random_hooked(architecture, "hooked")
    folded.process_weights_(fold_ln=True, center_writing_weights=architecture != "llama", center_unembed=True)
    assert folded.cfg.normalization_type.endswith("Pre")
    expected, result = (measure(model, ablation="zero") for model in (plain, folded))
    assert result.identity_error < 1e-4
    for term in ("total_effect", *TERMS):
        np.testing.assert_allclose(result[term], expected[term], atol=1e-4)


@pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has TransformerBridge only")
@pytest.mark.parametrize(("normalization", "attn_only"), [(None, False), ("LN", True), (None, True)])
def test_toy_models_without_norms_or_mlps_are_measured(normalization, attn_only):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 2, "d_model": 32, "d_head": 8, "n_heads": 4, "n_ctx": 48, "d_vocab": 50, "d_mlp": 64}
    config = HookedTransformerConfig(
        **sizes, act_fn="relu", normalization_type=normalization, attn_only=attn_only, seed=0, init_weights=True
    )
    model = HookedTransformer(config)
    result = measure(model)
    assert result.identity_error < 1e-5
    assert abs(result.total_effect.sel(component="attention")).min() > 1e-4
    if normalization is None:
        np.testing.assert_array_equal(result.norm_change, 0.0)
    if attn_only:
        for term in ("direct_effect", "total_effect", "mlp_change"):
            np.testing.assert_allclose(result[term].sel(component="mlp"), 0.0, atol=1e-5)


# -- heads ------------------------------------------------------------------------------------------------------------

HEAD_MODELS = [(name, kind) for name, kind in EVERY_MODEL if name in (*ARCHITECTURES, "gemma2", "olmo2-biases")]


@pytest.mark.parametrize(("architecture", "kind"), HEAD_MODELS)
def test_identity_is_exact_for_heads(architecture, kind):
    result = measure(random_hooked(architecture, kind), level="head", ablation="mean", n_null=1)
    assert result.total_effect.dims == ("layer", "head")
    assert result.identity_error < 1e-4
    assert result.no_op_error < 1e-4
    np.testing.assert_allclose(sum(result[term] for term in TERMS), result.total_effect, atol=1e-4)
    assert abs(result.total_effect).min() > 1e-4


@pytest.mark.parametrize("architecture", ["llama", "olmo2", "gpt2", "gpt_neox"])
def test_total_effect_of_zeroing_a_head_equals_raw_pytorch_hooks(architecture):
    """Brute force on the Hugging Face model: the head's columns of the output projection's input are set to zero."""
    hf, tokens = random_hf(architecture), random_tokens(6, 12)
    result = measure(load_model(hf), level="head", ablation="zero")
    body = hf.base_model
    with torch.no_grad():
        clean = hf(tokens).logits
    target = clean.argmax(-1, keepdim=True)
    for layer, block in enumerate(getattr(body, "layers", None) or body.h):
        attention = getattr(block, "self_attn", None) or getattr(block, "attn", None) or block.attention
        projection = next(getattr(attention, n) for n in ("o_proj", "c_proj", "dense") if hasattr(attention, n))
        for head in (0, 3):

            def without(module, inputs, head=head):
                z = inputs[0].clone()
                z[..., 16 * head : 16 * (head + 1)] = 0.0
                return (z, *inputs[1:])

            handle = projection.register_forward_pre_hook(without)
            with torch.no_grad():
                ablated = hf(tokens).logits
            handle.remove()
            change = (ablated - ablated.mean(-1, keepdim=True)) - (clean - clean.mean(-1, keepdim=True))
            expected = float(change.gather(-1, target).mean())
            assert float(result.total_effect.sel(layer=layer, head=head)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("architecture", ["llama-gqa", "olmo2", "gpt2", "gpt_neox"])
def test_heads_direct_effects_and_responses_add_up_to_their_layers(architecture):
    """But for the output bias, whose direct effect no ablation changes."""
    options = {"ablation": "zero", "n_null": 0, "min_probability": 0.2}
    heads = measure(random_hooked(architecture, None), level="head", **options)
    layers = measure(random_hooked(architecture, None), **options)
    assert 0 < heads.n_positions < heads.n_positions_total
    if architecture in ("llama-gqa", "olmo2"):
        expected = layers.direct_effect.sel(component="attention")
        np.testing.assert_allclose(heads.direct_effect.sum("head"), expected, atol=1e-4)
    np.testing.assert_allclose(
        heads.head_response.sum("responding_head"), heads.response.sel(responding_component="attention"), atol=1e-4
    )
    assert not any(name.endswith("_null") for name in (*heads, *layers))


def test_planted_backup_head_repairs_what_the_name_mover_lost():
    planted = planted_backup(share=0.7)
    tokens = torch.randint(1, 320, (6, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0  # the sink
    result = mh.phenomena.hydra(load_model(planted.model), tokens, level="head", ablation="zero")
    mover, backup = planted.heads["name_mover"], planted.heads["backup"]
    expected = planted.expected["repair_share_zero"]
    ablated = result.sel(layer=mover[0], head=mover[1])
    assert float(-ablated.attention_growth / ablated.own_change) == pytest.approx(expected, abs=1e-4)
    assert float(ablated.repair_share) == pytest.approx(expected, abs=1e-3)
    response = ablated.head_response.sel(responding_layer=backup[0], responding_head=backup[1])
    assert float(response) == pytest.approx(float(ablated.attention_growth), abs=1e-4)
    # It is the only head with a direct effect of its own.
    assert int(result.repair_share.notnull().sum()) == 1
    assert float(result.repair_share_median) == pytest.approx(float(ablated.repair_share))


# -- statistics and settings ------------------------------------------------------------------------------------------


def shares_of(own, repair, *, seed=0):
    """`repair_share` of made-up effects: [part, sequence]."""
    effects = [Effects(terms={"own_change": a, "self_repair": b}) for a, b in zip(own, repair, strict=True)]
    n = own.shape[1]
    clean = SimpleNamespace(chosen=torch.ones(n, 1, dtype=torch.bool))
    shape = {"layer": 1, "head": len(own)}
    described = scored("own_change", list(shape), own.T[:, None], np.ones((n, 1, 1)), long_name="", units="", seed=seed)
    return repair_share(described, clean, effects, [], shape, min_lost=0.1, seed=seed)


def test_a_share_is_given_where_what_is_lost_surely_exceeds_the_gate():
    rng = np.random.default_rng(0)
    lost = np.array([1.0, 0.3, 0.12, 0.08, 0.0, -0.5])
    own = -(lost[:, None] + rng.normal(0, 0.2, (6, 32)))
    repair = rng.normal(0.2, 0.1, (6, 32))
    found = shares_of(own, repair)
    low = mean_interval(-own.T, np.ones((32, 1)), seed=0)[1]
    assert (low > 0.1).tolist() == [True, True, False, False, False, False]
    expected = mean_interval(repair.T, -own.T, seed=0)
    for suffix, value in zip(("", "_low", "_high"), expected, strict=True):
        np.testing.assert_allclose(found[f"repair_share{suffix}"][1][0], np.where(low > 0.1, value, np.nan))
    assert float(found["repair_share_median"][1]) == pytest.approx(np.mean(expected[0][:2]))
    nothing = shares_of(own[2:], repair[2:])
    assert all(np.isnan(nothing[f"repair_share_median{end}"][1]) for end in ("", "_low", "_high"))


def test_median_repair_shares_interval_equals_a_plain_loop_over_resamples():
    """Parts that are sure, one that may be above the gate, and one that is not."""
    rng = np.random.default_rng(0)
    n, lost = 24, np.array([1.0, 0.8, 0.6, 0.12, 0.02])
    own = -(lost[:, None] + rng.normal(0, 0.15, (5, n)))
    repair = np.array([0.1, 0.4, 0.5, 1.5, -1.0])[:, None] * -own + rng.normal(0, 0.05, (5, n))
    found = shares_of(own, repair)
    least, most = [], []
    for _ in range(4000):
        drawn = rng.integers(0, n, n)
        means = -own[:, drawn].mean(1)
        share = repair[:, drawn].mean(1) / np.maximum(means, 0.1)
        sets = [share[:3], share[:4] if means[3] > 0.1 else share[:3], share[:4]]
        least.append(min(np.median(each) for each in sets))
        most.append(max(np.median(each) for each in sets))
    widened = np.sqrt(n / (n - 1)) * 2.0687 / 1.96  # Student's t of 23 degrees of freedom.
    median = np.median((repair.sum(1) / -own.sum(1))[:3])
    expected = [median + widened * (end - median) for end in (np.quantile(least, 0.025), np.quantile(most, 0.975))]
    ends = [float(found[f"repair_share_median{end}"][1]) for end in ("_low", "_high")]
    np.testing.assert_allclose(ends, expected, atol=0.02)
    assert ends[0] < 0.4 < 0.45 < ends[1]  # The medians without and with the fourth part.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "lost", "share"),
    [
        *((n, (1.0, 0.8, near), (0.2, 0.5, 0.9)) for n in (4, 8, 24, 64) for near in (0.09, 0.102, 0.11, 0.13)),
        (24, (1.0, 0.8, 0.6, 0.11), (0.2, 0.3, 0.5, 0.9)),
        # Many parts that lose too little to count, each as unsure as near the gate.
        (24, (0.5, 0.6, 0.7, 0.8, 0.9, *[0.05] * 40), (0.1, 0.2, 0.3, 0.4, 0.5, *[0.9] * 40)),
    ],
)
def test_the_median_repair_shares_interval_covers_also_with_parts_near_the_gate(n, lost, share):
    """2,000 simulated data sets: how often it holds the median share of the parts whose true loss exceeds the gate."""
    rng, n_sets, lost, share = np.random.default_rng(0), 2000, np.array(lost), np.array(share)
    spread = 0.03 * np.sqrt(24)  # So that a loss of .1 is known to .03 from 24 sequences.
    covered, defined = 0, 0
    for _ in range(20):
        size = (n, n_sets // 20, len(lost))
        noise = np.sqrt(0.8) * rng.normal(size=size) + np.sqrt(0.2) * rng.normal(size=(*size[:2], 1))
        of_set = lost + spread * noise
        repaired = share * of_set + 0.3 * spread * rng.normal(size=size)
        _, low, high = mean_interval(of_set, np.ones((n, 1, 1)), seed=0)
        bounds = median_bounds(repaired, of_set, np.ones(n), low > 0.1, high > 0.1, min_lost=0.1, seed=0)
        truth = np.median(share[lost > 0.1])
        covered += int(((bounds[0] <= truth) & (truth <= bounds[1])).sum())
        defined += int(np.isfinite(bounds[0]).sum())
    assert defined > 0.95 * n_sets
    assert covered / defined > 0.92


def test_given_targets_are_measured_instead_of_the_top_token():
    model, tokens = random_hooked("llama", None), random_tokens(6, 12)
    hooked = Hooked(model)
    targets = torch.full_like(tokens, 7)
    result = measure(model, targets=targets, ablation="zero", n_null=0)
    clean, ablated = hooked.run(tokens), hooked.run(tokens, [("mlp_out", 1, torch.zeros_like)])
    centred = [x[..., 7] - x.mean(-1) for x in (ablated, clean)]
    expected = float((centred[0] - centred[1]).mean())
    assert float(result.total_effect.sel(component="mlp", layer=1)) == pytest.approx(expected, abs=1e-4)
    assert result.attrs["target"] == "given by the caller"
    whole, parts = (measure(model, targets=tokens, ablation="zero", n_null=0, max_bytes=size) for size in (2**30, 1))
    np.testing.assert_allclose(whole.total_effect, parts.total_effect, atol=1e-4)
    with pytest.raises(ValueError, match=r"one token per position, \[6, 12\], got \[6, 11\]"):
        measure(model, targets=targets[:, 1:])


@pytest.mark.parametrize("level", ["layer", "head"])
def test_a_small_memory_budget_changes_nothing(level):
    model = random_hooked("llama-gqa", None)
    whole, parts = (measure(model, level=level, max_bytes=budget) for budget in (2**30, 1))
    assert set(whole) == set(parts)
    for name in whole:
        np.testing.assert_allclose(whole[name], parts[name], atol=1e-5)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("architecture", ["llama", "olmo2"])
def test_bfloat16_models_are_measured_in_float32(architecture, kind):
    exact = measure(random_hooked(architecture, kind), n_null=0)
    result = measure(load_model(random_hf(architecture), as_=kind, dtype="bfloat16"), n_null=0)
    assert result.attrs["dtype"] == "bfloat16"
    # Rounding of the residual stream to eight bits, relative to logits of this size.
    size = float(abs(exact.direct_effect).max())
    assert 0.0 < result.identity_error < 0.1 * size
    np.testing.assert_allclose(result.direct_effect, exact.direct_effect, atol=0.15 * size)


@pytest.mark.parametrize(
    ("options", "message"), [({"level": "neuron"}, "layer, head"), ({"n_null": -1}, "n_null must be a whole number")]
)
def test_settings_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure(random_hooked("llama", None), **options)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("level", ["layer", "head"])
@pytest.mark.parametrize("n_null", [0, 2])
def test_forward_passes_are_as_many_as_the_docstring_says(level, kind, n_null):
    """Tokens that pass through MLPs, in units of a forward pass over the sequences."""
    model, n = random_hooked("llama", kind), 6
    hooked, run_blocks = Hooked(model), []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda mlp, inputs, output: run_blocks.append(output.shape[:2].numel()))
    measure(model, level=level, ablation="zero", n_null=n_null)
    n_layers, n_heads = hooked.n_layers, hooked.n_heads
    n_runs, from_each_layer = 1 + 2 * n_null, (n_layers + 1) / 2
    if level == "layer":
        allowed = 1 + n_layers * n_runs + n_null + from_each_layer / n
    else:
        allowed = 1 + n_heads * from_each_layer * (n_runs + 1 / n)
    # The bridge runs its first block once more to learn what blocks return.
    assert sum(run_blocks) <= (allowed * n_layers + 1) * n * 12


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_edit_of_the_callers_acts_once_in_every_run(kind, layer):
    """A steering vector on what enters a layer: against full runs of the steered model."""
    model, tokens = random_hooked("llama", kind), random_tokens(6, 12)
    steering = torch.linspace(-2.0, 2.0, 64)
    model.hook_dict[f"blocks.{layer}.hook_resid_pre"].add_hook(lambda resid, hook: resid + steering)
    hooked = Hooked(model)
    clean = hooked.run(tokens)
    target = clean.argmax(-1, keepdim=True)
    for level in ("layer", "head"):
        result = measure(model, level=level, ablation="zero", n_null=0)
        assert result.identity_error < 1e-4
        for removed in range(3):
            if level == "layer":
                edits, where = [("mlp_out", removed, torch.zeros_like)], {"component": "mlp", "layer": removed}
            else:
                edits = [("z", removed, lambda z: z * torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None])]
                where = {"head": 2, "layer": removed}
            logits = hooked.run(tokens, edits)
            change = (logits - logits.mean(-1, keepdim=True)) - (clean - clean.mean(-1, keepdim=True))
            expected = float(change.gather(-1, target).mean())
            assert float(result.total_effect.sel(where)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", CLASSES)
def test_inside_a_block_that_edits_rows_apart_nothing_depends_on_the_batches(kind):
    model, reference = random_hooked("llama", kind), random_tokens(4, 12, seed=3)
    with ablated(model, [Head(1, 2), MLP(0)], ablation="resample", reference=reference):
        for level in ("layer", "head"):
            whole, parts = (measure(model, level=level, max_bytes=size) for size in (2**30, 1))
            for name in whole:
                np.testing.assert_allclose(whole[name], parts[name], atol=1e-4, err_msg=name)
    assert abs(whole.total_effect - measure(model, level="head").total_effect).max() > 1e-2

"""Ablation against raw PyTorch hooks on Hugging Face's models, plain loops over donors, and planted models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_models import CLASSES, EVERY_MODEL, random_hf, random_hooked, random_tokens
from raw_hooks import BODIES, head_slice, logits_of, put, record, site_edit

import mechhier as mh
from mechhier.models.planted import planted_backup, planted_inert
from mechhier.probes import MLP, Attention, Head, Neurons, ablate, ablated, logit_difference, loss
from mechhier.probes.ablation import _same_role

TOKENS = random_tokens(4, 9)
METRIC = logit_difference(torch.arange(4), torch.arange(4) + 10)
ENTRIES = [Head(1, 2), Attention(0), MLP(1), Neurons(2, 10, 30), (Head(0, 1), Head(2, 3), MLP(1))]


def place_of(part):
    """Site and slice of a component in the Hugging Face model."""
    if isinstance(part, Head):
        return "z", head_slice(part.head)
    if isinstance(part, Neurons):
        return "mlp_post", slice(part.start, part.stop)
    return ("attn_out" if isinstance(part, Attention) else "mlp_out"), slice(None)


def differences(logits):
    return (logits[range(4), -1, range(4)] - logits[range(4), -1, range(10, 14)]).double().numpy()


def by_raw_hooks(hf, entry, value_of):
    parts = entry if isinstance(entry, tuple) else (entry,)
    edits = []
    for part in parts:
        site, where = place_of(part)
        value = value_of(record(hf, TOKENS, site, part.layer)[..., where])
        edits.append(site_edit(hf, site, part.layer, put(value, slice(None), where)))
    return logits_of(hf, TOKENS, edits)


VALUES = {"zero": torch.zeros_like, "mean": lambda x: x.mean((0, 1)).expand_as(x)}


@pytest.mark.parametrize("architecture", BODIES)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_ablating_equals_raw_hooks_on_the_hugging_face_model(architecture, kind, ablation):
    hf, model = random_hf(architecture), random_hooked(architecture, kind)
    result = ablate(model, ENTRIES, TOKENS, ablation=ablation, metric=METRIC)
    clean = differences(logits_of(hf, TOKENS))
    assert float(result.clean) == pytest.approx(clean.mean(), abs=1e-4)
    for number, entry in enumerate(ENTRIES):
        expected = by_raw_hooks(hf, entry, VALUES[ablation])
        assert float(result.edited[number]) == pytest.approx(differences(expected).mean(), abs=2e-4)
        assert float(result.effect[number]) == pytest.approx((differences(expected) - clean).mean(), abs=2e-4)
        with ablated(model, [entry], ablation=ablation, reference=TOKENS):
            torch.testing.assert_close(model(TOKENS, return_type="logits").detach(), expected, atol=1e-3, rtol=1e-4)
    assert result.ablated.values.tolist() == ["L1H2", "attn0", "mlp1", "mlp2[10:30]", "L0H1+L2H3+mlp1"]
    assert (result.effect_low <= result.effect).all()
    assert (result.effect <= result.effect_high).all()


@pytest.mark.parametrize("architecture", BODIES)
def test_resampling_equals_a_plain_loop_over_all_other_sequences(architecture):
    hf, model = random_hf(architecture), random_hooked(architecture, "bridge")
    result = ablate(model, ENTRIES, TOKENS, n_patches=3, metric=METRIC)
    for number, entry in enumerate(ENTRIES):
        effects = [differences(by_raw_hooks(hf, entry, lambda x, shift=shift: x.roll(shift, 0))) for shift in (1, 2, 3)]
        assert float(result.edited[number]) == pytest.approx(np.mean(effects), abs=2e-4)
    assert "fewer than the 15" in result.note


@pytest.mark.parametrize(("architecture", "kind"), EVERY_MODEL)
def test_every_model_is_ablated_alike_in_any_batches(architecture, kind):
    tokens = random_tokens(3, 6)
    options = {"n_patches": 2, "metric": loss(tokens)}
    model = random_hooked(architecture, kind)
    entries = [Head(1, 2), MLP(2), Neurons(0, 3, 40)]
    whole = ablate(model, entries, tokens, **options)
    single = ablate(model, entries, tokens, max_bytes=1, **options)
    np.testing.assert_allclose(whole.effect, single.effect, atol=1e-5)
    other = ablate(random_hooked(architecture, "bridge"), entries, tokens, **options)
    np.testing.assert_allclose(whole.effect, other.effect, atol=1e-4)
    assert (abs(whole.effect) > 1e-3).any()


@pytest.mark.parametrize("kind", CLASSES)
def test_other_sequences_donate_and_are_averaged(kind):
    """Every sequence donates once to each, so that the order of donors does not matter; longer ones are cut."""
    hf, model = random_hf("llama"), random_hooked("llama", kind)
    other = random_tokens(3, 12, seed=5)
    result = ablate(model, [Head(1, 2)], TOKENS, reference=other, n_patches=3, metric=METRIC)
    z = record(hf, other[:, :9], "z", 1)[..., head_slice(2)]
    expected = [
        differences(logits_of(hf, TOKENS, [site_edit(hf, "z", 1, put(donor, slice(None), head_slice(2)))])).mean()
        for donor in z
    ]
    assert float(result.edited[0]) == pytest.approx(np.mean(expected), abs=1e-4)
    mean = ablate(model, [Head(1, 2)], TOKENS, ablation="mean", reference=other, metric=METRIC)
    logits = logits_of(hf, TOKENS, [site_edit(hf, "z", 1, put(z.mean((0, 1)), slice(None), head_slice(2)))])
    assert float(mean.edited[0]) == pytest.approx(differences(logits).mean(), abs=1e-4)


def test_donors_of_a_role_are_drawn_uniformly_from_the_other_sequences():
    roles = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 2], [0, 2, 2, 1]])
    sequences, positions = _same_role(roles, 6000, torch.Generator().manual_seed(0))
    assert sequences.shape == (6000, 3, 4)
    assert (roles[sequences, positions] == roles).all()
    assert (sequences != torch.arange(3)[:, None]).all()
    # Position 0 of sequence 1 has role 1, of which there are two in sequence 0 and one in sequence 2.
    drawn = list(zip(sequences[:, 1, 0].tolist(), positions[:, 1, 0].tolist(), strict=True))
    for candidate in ((0, 1), (0, 2), (2, 3)):
        assert drawn.count(candidate) / 6000 == pytest.approx(1 / 3, abs=0.03)


def test_role_matched_donors_at_their_own_positions_are_the_position_matched_ones():
    tokens = random_tokens(2, 6)
    model = random_hooked("olmo2", "bridge")
    options = {"n_patches": 1, "metric": loss(tokens)}
    by_role = ablate(model, ENTRIES, tokens, roles=torch.arange(6).expand(2, 6), **options)
    by_position = ablate(model, ENTRIES, tokens, **options)
    np.testing.assert_allclose(by_role.effect, by_position.effect, atol=1e-6)
    assert "role" in by_role.donors
    same = ablate(model, ENTRIES, tokens, roles=torch.zeros(2, 6, dtype=torch.long), **options)
    assert abs(same.effect - by_position.effect).max() > 1e-3


@pytest.mark.parametrize("kind", CLASSES)
def test_a_context_resamples_every_row_from_another_sequence_of_the_reference(kind):
    hf, model = random_hf("gpt2"), random_hooked("gpt2", kind)
    z = record(hf, TOKENS, "z", 1)[..., head_slice(2)]
    with ablated(model, [Head(1, 2)], ablation="resample", reference=TOKENS, seed=3):
        found = model(TOKENS, return_type="logits").detach()
        shorter = model(TOKENS[:, :4], return_type="logits").detach()
        metric = logit_difference(torch.arange(4), torch.arange(4) + 10)
        measured = [ablate(model, [MLP(2)], TOKENS, ablation="zero", metric=metric, max_bytes=b) for b in (1, 2**30)]
    donors = []
    for row in range(4):
        options = [
            logits_of(hf, TOKENS[row : row + 1], [site_edit(hf, "z", 1, put(z[other], slice(None), head_slice(2)))])[0]
            for other in range(4)
        ]
        distances = [float((found[row] - option).abs().max()) for option in options]
        donors.append(int(np.argmin(distances)))
        assert min(distances) < 1e-3
    assert all(donor != row for row, donor in enumerate(donors))
    assert len(set(donors)) == 4
    torch.testing.assert_close(shorter, found[:, :4], atol=1e-4, rtol=0)
    assert float(measured[0].clean) == pytest.approx(differences(found).mean(), abs=1e-4)
    np.testing.assert_allclose(measured[0].effect, measured[1].effect, atol=1e-5)


@pytest.mark.parametrize("kind", CLASSES)
def test_planted_backup_shows_in_the_effect_of_its_ablation(kind):
    planted = planted_backup(share=0.7)
    tokens = planted.tokens(16)
    model = mh.load_model(planted.model, as_=kind)
    # Token 0 is the sink, which no ablation predicts.
    metric = logit_difference(tokens[:, 1], torch.zeros(16, dtype=torch.long))
    repaired = ablate(model, [Head(0, 0), Attention(0), Head(1, 0)], tokens, ablation="zero", metric=metric)
    np.testing.assert_allclose(repaired.effect, [-12.0, -12.0, 0.0], atol=0.01)
    silent = ablate(model, [Head(0, 0), (Head(0, 0), Head(1, 0))], tokens, n_patches=15, metric=metric)
    np.testing.assert_allclose(silent.effect, [-40.0, -40.0], atol=0.01)
    both = ablate(model, [(Head(0, 0), Head(1, 0))], tokens, ablation="zero", metric=metric)
    np.testing.assert_allclose(both.effect, [-40.0], atol=0.01)
    with ablated(model, [Head(1, 0)], ablation="zero"):
        without = ablate(model, [Head(0, 0)], tokens, ablation="zero", metric=metric)
    np.testing.assert_allclose(without.effect, [-40.0], atol=0.01)


def test_ablating_what_does_nothing_has_no_effect_on_any_sequence():
    """Nor has the interval a width: each sequence is compared with itself, however much sequences differ."""
    planted = planted_inert()
    model, tokens = mh.load_model(planted.model), planted.tokens(4)
    parts = [Attention(0), MLP(1), Head(1, 1)]
    metric = logit_difference(torch.where(torch.arange(4) < 2, tokens[:, -1], 1), 2)
    for ablation in ("zero", "mean", "resample"):
        result = ablate(model, parts, tokens, ablation=ablation, n_patches=3, metric=metric)
        assert max(abs(result[name]).max() for name in ("effect", "effect_low", "effect_high")) < 1e-4
        assert result.clean_high - result.clean_low > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_patches": 4}, "n_patches must lie in 1..3"),
        ({"n_patches": 0}, "n_patches must lie"),
        ({"ablation": "noise"}, "ablation must be one of"),
        ({"ablation": "mean", "roles": TOKENS}, "roles choose the donors"),
        ({"n_patches": 2, "roles": TOKENS[:, :3]}, "roles must be integer labels"),
        ({"n_patches": 2, "roles": torch.arange(36).reshape(4, 9)}, "occurs in one sequence only"),
        ({"ablation": "mean", "reference": TOKENS[:, :3]}, "at least as long"),
    ],
)
def test_ablations_that_cannot_be_done_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ablate(random_hooked("llama", "bridge"), [Head(0, 0)], TOKENS, **options)


def test_contexts_that_cannot_act_are_refused():
    model = random_hooked("llama", "bridge")
    with (
        pytest.raises(ValueError, match="give reference=tokens"),
        ablated(model, [Head(0, 0)], ablation="mean"),
    ):
        pass
    with (
        ablated(model, [Head(0, 0)], ablation="resample", reference=TOKENS[:, :5]),
        pytest.raises(ValueError, match="cannot resample position 8: the reference has 5"),
    ):
        model(TOKENS)

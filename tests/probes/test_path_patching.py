"""Path patching against raw PyTorch hooks on Hugging Face's models, the true final norm, and a linear model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_models import CLASSES, EVERY_MODEL, HAS_HOOKED_TRANSFORMER, random_hf, random_hooked, random_tokens
from raw_hooks import BODIES, _projection, blocks_of, head_slice, input_place, logits_of, put, record, site_edit

from mechhier.probes import MLP, Attention, Head, HeadInput, Neurons, logit_difference, path_patch, path_patched

CLEAN, CORRUPTED = random_tokens(3, 5), random_tokens(3, 5, seed=1)
METRIC = logit_difference(torch.arange(3), torch.arange(3) + 10)
SITES = {Head: "z", Attention: "attn_out", MLP: "mlp_out", Neurons: "mlp_post"}


def differences(logits):
    return (logits[range(3), -1, range(3)] - logits[range(3), -1, range(10, 13)]).double().numpy().mean()


def where_of(part):
    if isinstance(part, Head):
        return head_slice(part.head)
    return slice(part.start, part.stop) if isinstance(part, Neurons) else slice(None)


def sending(hf, sender, *, freeze_mlps):
    """Edits of run C: what is between frozen at the clean run's, then the sender's output."""
    edits = []
    for layer in range(sender.layer, 3):
        frozen = ["z"]
        if freeze_mlps and not (isinstance(sender, Neurons) and layer == sender.layer):
            frozen.append("mlp_out")
        for site in frozen:
            edits.append(site_edit(hf, site, layer, put(record(hf, CLEAN, site, layer), slice(None))))
    site, where = SITES[type(sender)], where_of(sender)
    sent = record(hf, CORRUPTED, site, sender.layer)[..., where]
    return [*edits, site_edit(hf, site, sender.layer, put(sent, slice(None), where))]


def received(hf, edits, receivers):
    """What arrives at the receivers in run C, as edits of run D."""
    kept, reading = {}, []
    for part in receivers:
        module, where = input_place(hf, part.layer, part.head, part.input)
        reading.append((module, "out", lambda x, part=part, where=where: kept.update({part: x[..., where].clone()})))
    logits_of(hf, CLEAN, [*edits, *reading])
    return [
        (module, "out", put(kept[part], slice(None), where))
        for part in receivers
        for module, where in [input_place(hf, part.layer, part.head, part.input)]
    ]


SENDERS = [Head(0, 1), Attention(0), MLP(0), Neurons(0, 7, 60), Head(1, 3)]


@pytest.mark.parametrize("architecture", [*BODIES, "gpt_neox-sequential"])
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("freeze_mlps", [False, True])
def test_paths_to_the_logits_equal_raw_hooks(architecture, kind, freeze_mlps):
    hf = random_hf(architecture)
    result = path_patch(
        random_hooked(architecture, kind), SENDERS, CLEAN, CORRUPTED, metric=METRIC, freeze_mlps=freeze_mlps
    )
    for number, sender in enumerate(SENDERS):
        expected = differences(logits_of(hf, CLEAN, sending(hf, sender, freeze_mlps=freeze_mlps)))
        assert float(result.patched[number, 0]) == pytest.approx(expected, abs=3e-4)
        clean = differences(logits_of(hf, CLEAN))
        assert float(result.effect[number, 0]) == pytest.approx(expected - clean, abs=3e-4)
    assert result.receiver.values.tolist() == ["logits"]


@pytest.mark.parametrize("architecture", [*BODIES, "gpt_neox-sequential"])
@pytest.mark.parametrize("kind", CLASSES)
def test_paths_to_heads_inputs_equal_raw_hooks(architecture, kind):
    hf = random_hf(architecture)
    receivers = [
        HeadInput(2, 2, "q"),
        HeadInput(1, 0, "k"),
        HeadInput(2, 1, "v"),
        (HeadInput(1, 0, "q"), HeadInput(2, 3, "v"), HeadInput(2, 3, "k")),
    ]
    result = path_patch(random_hooked(architecture, kind), SENDERS, CLEAN, CORRUPTED, receivers, metric=METRIC)
    clean = differences(logits_of(hf, CLEAN))
    for row, sender in enumerate(SENDERS):
        edits = sending(hf, sender, freeze_mlps=False)
        for column, entry in enumerate(receivers):
            parts = entry if isinstance(entry, tuple) else (entry,)
            downstream = [part for part in parts if part.layer > sender.layer]
            expected = differences(logits_of(hf, CLEAN, received(hf, edits, downstream))) if downstream else clean
            assert float(result.patched[row, column]) == pytest.approx(expected, abs=3e-4)
    assert float(result.effect.sel(sender="L1H3", receiver="L1H0.k")) == 0.0
    assert abs(result.effect.sel(sender="L1H3", receiver="L2H2.q")) > 1e-4


@pytest.mark.parametrize("architecture", [name for name in BODIES if name != "olmo2"])
@pytest.mark.parametrize("kind", CLASSES)
def test_with_frozen_mlps_the_path_to_the_logits_is_the_direct_effect_under_the_true_norm(architecture, kind):
    """The final norm and the unembedding of the last stream, with the head's write exchanged."""
    hf = random_hf(architecture)
    projection = _projection(blocks_of(hf)[1])
    z = {name: record(hf, tokens, "z", 1) for name, tokens in (("clean", CLEAN), ("corrupted", CORRUPTED))}
    exchanged = put(z["corrupted"][..., head_slice(2)], slice(None), head_slice(2))(z["clean"])
    with torch.no_grad():
        moved = projection(exchanged) - projection(z["clean"])
    expected = differences(logits_of(hf, CLEAN, [site_edit(hf, "resid_post", 2, lambda x: x + moved)]))
    result = path_patch(
        random_hooked(architecture, kind), [Head(1, 2)], CLEAN, CORRUPTED, metric=METRIC, freeze_mlps=True
    )
    assert float(result.patched[0, 0]) == pytest.approx(expected, abs=3e-4)


@pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has TransformerBridge only")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_a_linear_model_the_paths_of_all_heads_add_up_to_the_whole_difference():
    from transformer_lens import HookedTransformer

    sizes = {"n_layers": 2, "d_model": 32, "d_head": 8, "n_heads": 4, "n_ctx": 16, "d_vocab": 50, "attn_only": True}
    model = HookedTransformer({**sizes, "normalization_type": None, "seed": 0, "device": "cpu"})
    corrupted = CORRUPTED.clone()
    corrupted[:, -1] = CLEAN[:, -1]  # nothing differs along the embedding's own path
    heads = [Head(layer, head) for layer in range(2) for head in range(4)]
    result = path_patch(model, heads, CLEAN, corrupted, metric=METRIC)
    total = float(result.corrupted - result.clean)
    assert abs(total) > 1e-4
    assert float(result.effect.sum()) == pytest.approx(total, abs=1e-5)
    together = path_patch(model, [tuple(heads)], CLEAN, corrupted, metric=METRIC)
    assert float(together.recovered[0, 0]) == pytest.approx(0.0, abs=1e-3) or np.isnan(together.recovered[0, 0])
    assert float(together.patched[0, 0]) == pytest.approx(float(result.corrupted), abs=1e-5)


@pytest.mark.parametrize(("architecture", "kind"), EVERY_MODEL)
def test_every_model_has_the_same_paths_in_any_batches(architecture, kind):
    arguments = ([Head(0, 1), MLP(1)], CLEAN, CORRUPTED, [HeadInput(2, 2, "q"), HeadInput(2, 3, "v")])
    model = random_hooked(architecture, kind)
    whole = path_patch(model, *arguments, metric=METRIC)
    np.testing.assert_allclose(
        whole.effect, path_patch(model, *arguments, metric=METRIC, max_bytes=1).effect, atol=1e-5
    )
    other = path_patch(random_hooked(architecture, "bridge"), *arguments, metric=METRIC)
    np.testing.assert_allclose(whole.effect, other.effect, atol=1e-4)
    assert (abs(whole.effect) > 1e-4).any()


def test_a_sender_that_sends_what_it_sends_anyway_has_no_effect():
    result = path_patch(random_hooked("olmo2", "bridge"), SENDERS, CLEAN, CLEAN, metric=METRIC, freeze_mlps=True)
    np.testing.assert_allclose(result.effect, 0.0, atol=1e-5)
    assert np.isnan(result.recovered).all()


def test_paths_that_do_not_exist_are_refused():
    model = random_hooked("llama", "bridge")
    with pytest.raises(ValueError, match="receivers must be 'logits'"):
        path_patch(model, SENDERS, CLEAN, CORRUPTED, "logit", metric=METRIC)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="HeadInput"):
        path_patch(model, SENDERS, CLEAN, CORRUPTED, [Head(1, 0)], metric=METRIC)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"no L3H0\.q"):
        path_patch(model, SENDERS, CLEAN, CORRUPTED, [HeadInput(3, 0, "q")], metric=METRIC)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("architecture", ["llama-gqa", "olmo2", "gpt_neox"])
@pytest.mark.parametrize("freeze_mlps", [False, True])
def test_a_block_holds_the_run_that_the_function_measures(architecture, kind, freeze_mlps):
    model = random_hooked(architecture, kind)
    receivers = [(HeadInput(2, 2, "q"), HeadInput(2, 0, "v"), HeadInput(1, 1, "q"))]
    with torch.no_grad():
        before = model(CLEAN, return_type="logits")
        for to in ("logits", receivers):
            for sender in (MLP(0), (Head(0, 1), Head(0, 2))):
                options = {"freeze_mlps": freeze_mlps}
                expected = path_patch(model, [sender], CLEAN, CORRUPTED, to, metric=METRIC, **options)
                with path_patched(model, [sender], CLEAN, CORRUPTED, to, **options):
                    inside = model(CLEAN, return_type="logits")
                assert expected.patched.item() == pytest.approx(differences(inside), abs=1e-4)
                assert abs(differences(inside) - differences(before)) > 1e-3
        torch.testing.assert_close(model(CLEAN, return_type="logits"), before, atol=0, rtol=0)


def test_a_block_refuses_other_tokens_than_the_clean_ones():
    model = random_hooked("llama", None)
    with (
        path_patched(model, [Head(0, 1)], CLEAN, CORRUPTED),
        pytest.raises(ValueError, match="3 sequences of 5 tokens"),
    ):
        model(CLEAN[:2])

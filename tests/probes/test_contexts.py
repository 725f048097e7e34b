"""Contexts and functions together: they nest, see each other's edits and the caller's hooks, and leave nothing behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_models import CLASSES, random_hf, random_hooked, random_tokens
from raw_hooks import head_slice, logits_of, put, record, site_edit

from mechhier.probes import (
    MLP,
    Attention,
    Edge,
    Head,
    HeadInput,
    Resid,
    ablate,
    ablated,
    attribution_patch,
    force_pattern,
    forced_pattern,
    knock_out,
    knocked_out,
    logit_difference,
    patch,
    patched,
    path_patch,
)

CLEAN, CORRUPTED = random_tokens(3, 5), random_tokens(3, 5, seed=1)
METRIC = logit_difference(torch.arange(3), torch.arange(3) + 10)
CONTEXTS = {
    "zero": lambda model: ablated(model, [Head(0, 1), MLP(1)], ablation="zero"),
    "mean": lambda model: ablated(model, [Attention(1)], ablation="mean", reference=CLEAN),
    "resample": lambda model: ablated(model, [Head(0, 1), MLP(1)], ablation="resample", reference=CLEAN),
    "patched": lambda model: patched(model, [Head(0, 1), Resid(1)], CORRUPTED, positions=2),
    "knocked_out": lambda model: knocked_out(model, [Edge(layer=1, head=2, keys=1)]),
    "forced_pattern": lambda model: forced_pattern(model, [Head(1, 2)], "previous"),
}
FUNCTIONS = {
    "ablate": lambda model, **o: ablate(model, [Head(1, 0), MLP(2)], CLEAN, ablation="zero", metric=METRIC, **o),
    "patch": lambda model, **o: patch(model, CLEAN, CORRUPTED, metric=METRIC, **o),
    "attribution_patch": lambda model, **o: attribution_patch(model, CLEAN, CORRUPTED, sites="z", metric=METRIC, **o),
    "path_patch": lambda model, **o: path_patch(
        model, [Head(0, 0)], CLEAN, CORRUPTED, [HeadInput(2, 1, "q")], metric=METRIC, **o
    ),
    "knock_out": lambda model, **o: knock_out(model, [Edge(layer=2, keys=0)], CLEAN, metric=METRIC, **o),
    "force_pattern": lambda model, **o: force_pattern(model, [Head(2, 0)], CLEAN, "uniform", metric=METRIC, **o),
}
RESULTS = {"patch": "patched", "attribution_patch": "attribution", "path_patch": "patched"}


def differences(logits):
    return (logits[range(3), -1, range(3)] - logits[range(3), -1, range(10, 13)]).double().numpy().mean()


def logits(model, tokens=CLEAN):
    return model(tokens, return_type="logits").detach()


def traces(model):
    """All that a hook or an edit could leave in a model."""
    return {
        "hooks": {name: len(point.fwd_hooks) + len(point.bwd_hooks) for name, point in model.hook_dict.items()},
        "torch_hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for module in model.modules()
        ],
        "own_forwards": [name for name, module in model.named_modules() if "forward" in module.__dict__],
        "training": [module.training for module in model.modules()],
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "level": getattr(model, "context_level", 0),
        "enabled": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_acts_and_leaves_nothing_behind_also_after_an_exception(kind, name):
    model = random_hooked("llama", kind)
    model.train()
    expected, before = logits(model), traces(model)
    with CONTEXTS[name](model):
        inside = logits(model)
        with pytest.raises(RuntimeError, match="in between"), CONTEXTS["zero"](model):
            raise RuntimeError("in between")
        torch.testing.assert_close(logits(model), inside)
    assert (inside - expected).abs().max() > 1e-2
    assert traces(model) == before
    with pytest.raises(RuntimeError, match="in between"), CONTEXTS[name](model):
        raise RuntimeError("in between")
    assert traces(model) == before
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_leaves_nothing_behind_and_the_callers_hooks_act_once_in_it(kind, name):
    """An additive edit of the stream would act twice if a run began behind it and met it again."""
    hf, model = random_hf("llama"), random_hooked("llama", kind)
    for layer in range(3):
        model.hook_dict[f"blocks.{layer}.hook_resid_pre"].add_hook(lambda x, hook: x + 1.0)
        model.hook_dict[f"blocks.{layer}.hook_resid_post"].add_hook(lambda x, hook: x * 1.5)
    steering = [site_edit(hf, "resid_pre", layer, lambda x: x + 1.0) for layer in range(3)]
    steering += [site_edit(hf, "resid_post", layer, lambda x: x * 1.5) for layer in range(3)]
    logits(model)  # transformers' own hooks come with the first call
    before = traces(model)
    result = FUNCTIONS[name](model)
    assert traces(model) == before
    expected = differences(logits_of(hf, CLEAN, steering))
    assert float(result.clean) == pytest.approx(expected, abs=2e-4)
    if name == "ablate":
        edit = site_edit(hf, "mlp_out", 2, torch.zeros_like)
        assert float(result.edited[1]) == pytest.approx(differences(logits_of(hf, CLEAN, [*steering, edit])), abs=2e-4)
    if name == "patch":
        kept = []
        reading = site_edit(hf, "resid_pre", 2, lambda x: kept.append(x.clone()))
        logits_of(hf, CLEAN, [*steering, reading])
        edit = site_edit(hf, "resid_pre", 2, put(kept[0][:, 3], 3))
        found = differences(logits_of(hf, CORRUPTED, [*steering, edit]))
        assert float(result.patched[2, 3]) == pytest.approx(found, abs=2e-4)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_leaves_nothing_behind_after_an_exception(kind, name):
    model = random_hooked("gpt2", kind)
    logits(model)
    calls, n_calls = [], []
    model.hook_dict["blocks.2.hook_resid_pre"].add_hook(lambda x, hook: _raising_in_the_last_call(x, calls, n_calls))
    before = traces(model)
    FUNCTIONS[name](model)
    n_calls.append(len(calls))
    calls.clear()
    with pytest.raises(RuntimeError, match="in the last call"):
        FUNCTIONS[name](model)
    assert traces(model) == before


def _raising_in_the_last_call(resid, calls, n_calls):
    calls.append(1)
    if n_calls and len(calls) == n_calls[0]:
        raise RuntimeError("in the last call")
    return resid


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_see_the_edits_around_them_in_any_batches(kind, context, name):
    model = random_hooked("olmo2", kind)
    outside = FUNCTIONS[name](model)
    with CONTEXTS[context](model):
        expected = differences(logits(model))
        whole, single = (FUNCTIONS[name](model, max_bytes=n) for n in (2**30, 1))
    assert float(whole.clean) == pytest.approx(expected, abs=1e-4)
    variable = RESULTS.get(name, "edited")
    np.testing.assert_allclose(whole[variable], single[variable], atol=1e-4)
    assert abs(whole[variable] - outside[variable]).max() > 1e-4


@pytest.mark.parametrize("kind", CLASSES)
def test_a_patch_in_an_ablated_model_equals_both_edits_by_raw_hooks(kind):
    hf, model = random_hf("gpt_neox"), random_hooked("gpt_neox", kind)
    ablation = site_edit(hf, "z", 0, put(0.0, slice(None), head_slice(1)))
    with ablated(model, [Head(0, 1)], ablation="zero"):
        found = patch(model, CLEAN, CORRUPTED, sites="mlp_out", metric=METRIC)
    kept = []
    logits_of(hf, CLEAN, [ablation, site_edit(hf, "mlp_out", 1, lambda x: kept.append(x.clone()))])
    edit = site_edit(hf, "mlp_out", 1, put(kept[0][:, 2], 2))
    expected = differences(logits_of(hf, CORRUPTED, [ablation, edit]))
    assert float(found.patched[1, 2]) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_inner_edit_of_a_site_acts_last(kind):
    hf, model = random_hf("llama"), random_hooked("llama", kind)
    z = record(hf, CORRUPTED, "z", 1)[..., head_slice(2)]
    with ablated(model, [Head(1, 2)], ablation="zero"), patched(model, [Head(1, 2)], CORRUPTED):
        found = logits(model)
    expected = logits_of(hf, CLEAN, [site_edit(hf, "z", 1, put(z * 0, slice(None), head_slice(2)))])
    # The source is run inside the ablation, so that what is patched in is nothing.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    with patched(model, [Head(1, 2)], CORRUPTED), ablated(model, [Head(1, 2)], ablation="zero"):
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", ["zero", "mean", "resample", "knocked_out", "forced_pattern"])
@pytest.mark.filterwarnings("ignore")
def test_generation_with_cached_keys_is_edited_at_every_step(kind, name):
    """Greedy generation equals choosing the top token of full passes."""
    model = random_hooked("llama", kind)
    expected = CLEAN[:, :2]
    with CONTEXTS[name](model):
        found = model.generate(
            CLEAN[:, :2], max_new_tokens=3, do_sample=False, verbose=False, stop_at_eos=False, return_type="tokens"
        )
        for _ in range(3):
            expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], dim=1)
    assert found.tolist() == expected.tolist()

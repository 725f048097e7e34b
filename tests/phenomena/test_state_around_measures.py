"""Whatever a caller has set in torch, what is loaded and measured is the same, and the setting still holds afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_models import CLASSES, random_hf, random_hooked, random_tokens
from torch_states import STATES, state_of_torch

import mechhier as mh
from mechhier.grammars import DocumentGrammar
from mechhier.models import load_model
from mechhier.phenomena import PHENOMENA
from mechhier.phenomena.tasks import grammar_tasks
from mechhier.probes import (
    MLP,
    Edge,
    Head,
    HeadInput,
    Hooked,
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
    path_patched,
    reduce_patterns,
)

GRAMMAR = DocumentGrammar(n_words=12, n_connectors=1, lexicon=4, binding=1.0, p_chain=1.0)


CLEAN, CORRUPTED, ANSWERS = random_tokens(3, 5), random_tokens(3, 5, seed=1), torch.arange(3)
TEXT = random_tokens(6, 12)


# Copies are made in the state of the call: in inference mode they are tensors that autograd does not keep.
def pair():
    return CLEAN.clone(), CORRUPTED.clone()


def metric():
    return logit_difference(ANSWERS.clone(), ANSWERS + 10)


def tasks():
    return grammar_tasks(GRAMMAR, n_tasks=3, n_demonstrations=4, n_prompts=4)


CALLS = {
    "induction": lambda model: mh.phenomena.induction(model, TEXT.clone(), n_sequences=4, n_controls=1),
    "function_vectors": lambda model: mh.phenomena.function_vectors(model, tasks()),
    "function_vectors by attribution": lambda model: mh.phenomena.function_vectors(
        model, tasks(), effects="attribution"
    ),
    "hydra": lambda model: mh.phenomena.hydra(model, TEXT[:, :8].clone(), min_probability=0.0, n_patches=2, n_null=1),
    "hydra of heads": lambda model: mh.phenomena.hydra(
        model, TEXT[:, :8].clone(), level="head", ablation="zero", min_probability=0.0, n_null=1
    ),
    "published": lambda model: mh.phenomena.published(model, n_sequences=4),
    "ablate": lambda model: ablate(model, [Head(1, 0), MLP(2)], pair()[0], ablation="mean", metric=metric()),
    "patch": lambda model: patch(model, *pair(), metric=metric()),
    "attribution_patch": lambda model: attribution_patch(model, *pair(), sites="z", metric=metric(), exact=True),
    "path_patch": lambda model: path_patch(model, [Head(0, 0)], *pair(), [HeadInput(2, 1, "q")], metric=metric()),
    "knock_out": lambda model: knock_out(model, [Edge(layer=2, keys=0)], pair()[0], metric=metric()),
    "force_pattern": lambda model: force_pattern(model, [Head(2, 0)], pair()[0], "uniform", metric=metric()),
}
CONTEXTS = {
    "ablated": lambda model: ablated(model, [Head(0, 1), MLP(1)], ablation="mean", reference=pair()[0]),
    "patched": lambda model: patched(model, [Head(0, 1)], pair()[1], positions=2),
    "knocked_out": lambda model: knocked_out(model, [Edge(layer=1, head=2, keys=1)]),
    "path_patched": lambda model: path_patched(model, [Head(0, 0)], *pair(), [HeadInput(2, 1, "q")]),
    "forced_pattern": lambda model: forced_pattern(model, [Head(1, 2)], "previous"),
}


def numbers(result):
    return {name: values.values for name, values in result.data_vars.items()}


@pytest.fixture(scope="module")
def usual():
    """What every call gives in a fresh process's state, computed when it is first asked for."""
    found = {}

    def of(name, kind):
        if (name, kind) not in found:
            found[name, kind] = numbers(CALLS[name](random_hooked("llama-gqa", kind)))
        return found[name, kind]

    return of


def test_every_phenomenon_is_called():
    assert {name.split(" ")[0] for name in CALLS} >= set(PHENOMENA)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore::mechhier.results.MeasurementWarning")
def test_what_is_measured_does_not_depend_on_the_state_of_torch(usual, kind, state, name):
    expected, model = usual(name, kind), random_hooked("llama-gqa", kind)
    with STATES[state]():
        before = state_of_torch()
        found = numbers(CALLS[name](model))
        assert state_of_torch() == before
    for variable, values in expected.items():
        np.testing.assert_array_equal(found[variable], values, err_msg=variable)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("state", STATES)
def test_what_is_loaded_does_not_depend_on_the_state_of_torch(tmp_path, kind, state):
    random_hf("gpt_neox").save_pretrained(tmp_path)
    tokens = random_tokens()
    expected = load_model(tmp_path, as_=kind)
    with STATES[state]():
        found = load_model(tmp_path, as_=kind)
    for name, weight in expected.state_dict().items():
        assert found.state_dict()[name].dtype == weight.dtype
        assert torch.equal(found.state_dict()[name], weight), name
    assert torch.equal(found(tokens), expected(tokens))
    found(tokens).sum().backward()  # autograd takes none of the weights of inference mode


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", CONTEXTS)
def test_an_edit_that_was_entered_in_another_state_of_torch_is_the_same(kind, state, name):
    model, tokens = random_hooked("llama-gqa", kind), pair()[0]
    with CONTEXTS[name](model), torch.no_grad():
        expected = model(tokens, return_type="logits")
    with STATES[state]():
        context = CONTEXTS[name](model)
        context.__enter__()
    with torch.no_grad():
        found = model(tokens, return_type="logits")
    context.__exit__(None, None, None)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", CLASSES)
def test_attention_patterns_do_not_depend_on_the_state_of_torch(kind):
    model, tokens = random_hooked("llama-gqa", kind), random_tokens()

    def summed():
        return reduce_patterns(Hooked(model), tokens, lambda pattern: pattern.sum(0))

    expected = summed()
    for state in STATES.values():
        with state():
            found = summed()
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(found, expected, strict=True))

"""A result says which weights it was measured on: the same hash for every class, never that of weights gone by."""

from __future__ import annotations

import copy

import pytest
import torch
from random_models import (
    ARCHITECTURES,
    CLASSES,
    HAS_HOOKED_TRANSFORMER,
    VARIANTS,
    random_hf,
    random_hooked,
    random_tokens,
)

from mechhier.models import load_model
from mechhier.models.identity import parameters_hash, state_hash
from mechhier.models.loading import measured_weights, model_info
from mechhier.models.wrapping import to_bridge, to_hooked_transformer


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *VARIANTS])
def test_files_memory_and_both_classes_of_one_checkpoint_have_one_hash(architecture, tmp_path):
    hf = random_hf(architecture)
    hf.save_pretrained(tmp_path)
    kinds = ["hooked", "bridge"][not HAS_HOOKED_TRANSFORMER :]
    found = {measured_weights(load_model(source, as_=kind)) for source in (hf, tmp_path) for kind in kinds}
    assert found == {(state_hash(hf), "as loaded")}


def test_folded_weights_are_those_of_their_checkpoint(tmp_path):
    hf = random_hf("llama")
    assert measured_weights(load_model(hf, processing="folded")) == (state_hash(hf), "as loaded")


def test_other_weights_names_dtypes_and_shapes_have_other_hashes():
    def hash_of(**weights: torch.Tensor) -> str:
        module = torch.nn.Module()
        for name, weight in weights.items():
            module.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
        assert parameters_hash(module) == parameters_hash(copy.deepcopy(module))
        return state_hash(module)

    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3) + 1
    found = [
        hash_of(a=a, b=b),
        hash_of(a=b, b=a),
        hash_of(a=a, c=b),
        hash_of(a=a.flatten(), b=b),
        hash_of(a=a.T, b=b),
        hash_of(a=a.T.contiguous().reshape(2, 3), b=b),
        hash_of(a=a.double(), b=b),
        hash_of(a=a.bfloat16(), b=b),
        hash_of(a=a, b=a.clone()),
        hash_of(a=a),
        hash_of(a=a[:0], b=b),
    ]
    assert len(set(found)) == len(found)
    assert hash_of(a=a.T, b=b) == hash_of(a=a.T.contiguous(), b=b)


def test_tied_weights_count_once():
    hf = random_hf("llama-tied")
    untied = copy.deepcopy(hf)
    untied.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.detach().clone())
    assert len({state_hash(hf), state_hash(copy.deepcopy(hf)), state_hash(untied)}) == 2


EDITS = {
    "in place": lambda parameter: parameter.detach().mul_(1.5),
    "through data": lambda parameter: parameter.data.mul_(1.5),
    "one number": lambda parameter: parameter.data[(slice(-1, None),) * parameter.ndim].add_(1.0),
    "through numpy": lambda parameter: parameter.detach().numpy().__imul__(1.5),
    "two rows swapped": lambda parameter: parameter.data.copy_(parameter.data.flip(0).clone()),
}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_any_parameter_is_noticed_and_its_undoing_too(kind, edit):
    model = random_hooked("llama-gqa", kind)
    loaded = measured_weights(model)
    for parameter in model.parameters():
        if torch.equal(parameter, torch.zeros_like(parameter)):  # biases that the architecture does not have
            continue
        kept, version = parameter.detach().clone(), parameters_hash(model)
        EDITS[edit](parameter)
        assert measured_weights(model) == (parameters_hash(model), "changed since loading")
        assert parameters_hash(model) != version
        parameter.data.copy_(kept)
        assert measured_weights(model) == loaded


@pytest.mark.parametrize("kind", CLASSES)
def test_a_replaced_parameter_is_noticed(kind):
    model = random_hooked("gpt2", kind)
    module = next(module for module in model.modules() if dict(module.named_parameters(recurse=False)))
    name, parameter = next(iter(module.named_parameters(recurse=False)))
    module._parameters[name] = torch.nn.Parameter(parameter.detach() + 1)
    assert measured_weights(model)[1] == "changed since loading"


@pytest.mark.parametrize("kind", CLASSES)
def test_running_copying_and_asking_again_change_nothing(kind):
    model = random_hooked("gpt2", kind)
    loaded = measured_weights(model)
    with torch.no_grad():
        model(random_tokens())
    assert measured_weights(model) == measured_weights(copy.deepcopy(model)) == loaded
    cast = model.to(torch.float64)
    assert measured_weights(cast)[1] == "changed since loading"


@pytest.mark.parametrize("kind", CLASSES)
def test_a_model_that_someone_else_built_has_the_hash_of_its_own_parameters(kind):
    model = (to_hooked_transformer if kind == "hooked" else to_bridge)(random_hf("gpt2"))
    before = measured_weights(model)
    assert before == (parameters_hash(model), "not loaded by load_model")
    assert measured_weights(load_model(model)) == before
    assert model_info(model).weights_hash is None
    next(iter(model.parameters())).data.add_(1)
    assert measured_weights(model) == (parameters_hash(model), "not loaded by load_model") != before

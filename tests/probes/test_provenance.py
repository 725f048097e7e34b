from __future__ import annotations

import json

import pytest
import torch
from random_models import CLASSES, HAS_HOOKED_TRANSFORMER, random_hf, random_hooked
from transformers import AutoModelForCausalLM

import mechhier as mh
from mechhier.models import load_model
from mechhier.models.identity import state_hash
from mechhier.models.loading import model_info
from mechhier.models.run import Manifest
from mechhier.models.wrapping import to_bridge, to_hooked_transformer
from mechhier.probes import Hooked
from mechhier.probes.provenance import provenance

KINDS = ["hooked", "bridge"][not HAS_HOOKED_TRANSFORMER :]


def attributes(model):
    return provenance(Hooked(model), phenomenon="test", definition="nothing", source="nobody")


@pytest.mark.parametrize("kind", CLASSES)
def test_a_result_names_the_class_dtype_and_processing_of_its_model(kind):
    model = load_model(random_hf("olmo2"), as_=kind, dtype=torch.bfloat16)
    found = attributes(model)
    name = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}[kind]
    assert (found["model_class"], found["dtype"], found["processing"]) == (name, "bfloat16", "none")
    assert found["architecture"] == "olmo2"


@pytest.mark.parametrize("kind", CLASSES)
def test_weights_that_were_folded_after_loading_are_called_folded(kind):
    model = random_hooked("gpt2", kind)
    assert attributes(model)["processing"] == "none"
    if kind == "hooked":
        model.process_weights_(fold_ln=True)
    else:
        model.enable_compatibility_mode()
    assert model_info(model).processing == "none"
    assert attributes(model)["processing"] == "folded"


@pytest.mark.parametrize("kind", CLASSES)
def test_a_model_that_did_not_come_through_load_model_is_described_and_left_untouched(kind):
    wrap, expected = (to_hooked_transformer, "unknown") if kind == "hooked" else (to_bridge, "none")
    model = wrap(random_hf("gpt2"))
    assert attributes(model)["processing"] == expected
    assert model_info(model) is None


def test_a_result_on_a_runs_checkpoint_says_arm_seed_step_and_weights(tmp_path):
    grammar = mh.grammars.DocumentGrammar(n_words=3, n_connectors=2)
    settings = mh.TrainSpec(steps=3, batch_size=2, n_checkpoints=2, eval_rows=2, seed=5)
    spec = mh.ModelSpec("llama", n_layers=1, d_model=16, n_heads=2)
    run = mh.train(spec, grammar.corpus(600, context=12), tmp_path / "pool" / "run", train=settings, arm="pool")
    found = [attributes(run.load(step, as_=kind)) for step in run.steps for kind in KINDS]
    for result in found:
        assert (result["model"], result["arm"], result["training_seed"]) == ("pool_seed5", "pool", 5)
        assert result["weights"] == "as loaded"
    assert [result["checkpoint_step"] for result in found] == [step for step in run.steps for _ in KINDS]
    assert [result["weights_hash"] for result in found] == [
        state_hash(AutoModelForCausalLM.from_pretrained(run.checkpoint(step))) for step in run.steps for _ in KINDS
    ]


@pytest.mark.parametrize(("folder", "name"), [("mine", "mine"), ("pool/run", "pool"), ("run/run", "run")])
def test_a_run_without_an_arm_goes_by_its_folder(tmp_path, folder, name):
    manifest = Manifest(
        model=mh.ModelSpec("gpt2", n_layers=1, d_model=8, n_heads=2),
        train=mh.TrainSpec(),
        corpus=mh.grammars.DocumentGrammar(n_words=3, n_connectors=2).corpus(600).description,
        steps=1,
        device="",
        versions={},
    )
    old = {key: value for key, value in manifest.model_dump(mode="json").items() if key != "arm"} | {"format": 1}
    checkpoint = tmp_path / folder / "checkpoints" / "step-000001"
    random_hf("gpt2").save_pretrained(checkpoint)
    (tmp_path / folder / "manifest.json").write_text(json.dumps(old))
    found = attributes(load_model(checkpoint))
    assert (found["model"], found["arm"], found["training_seed"], found["checkpoint_step"]) == (name, "None", 0, 1)


def test_a_result_on_edited_weights_says_so_and_has_their_hash():
    model = random_hooked("llama", None)
    before = attributes(model)
    next(iter(model.parameters())).data.mul_(2.0)
    after = attributes(model)
    assert (before["weights"], after["weights"]) == ("as loaded", "changed since loading")
    assert after["weights_hash"] not in (before["weights_hash"], "None")

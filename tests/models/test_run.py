import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mechhier.models.loading import model_info
from mechhier.models.run import Manifest, MissingCheckpointError, Run, RunError


def test_a_run_opens_as_it_was_trained(plan, reference):
    run = Run.open(str(reference.path))
    assert run.spec == plan.spec
    assert run.train_spec == plan.train
    assert run.grammar == plan.corpus.grammar
    assert run.manifest.finished
    assert np.array_equal(run.corpus.rows(0, 40), plan.corpus.rows(0, 40))
    assert "llama" in repr(run)


def test_the_log_has_a_line_for_every_log_point(reference):
    log = reference.log
    assert log["step"].to_list() == list(range(13))
    assert log["tokens"].to_list() == [step * 4 * 12 for step in range(13)]
    assert np.isnan(log["loss"][0])
    assert log["loss"][1:].notna().all()
    assert log["learning_rate"].max() == pytest.approx(3e-3)


def test_checkpoints_are_named_by_step(reference):
    assert reference.checkpoint(12).name == "step-000012"
    assert reference.checkpoint(-1) == reference.checkpoint(12)
    with pytest.raises(MissingCheckpointError, match=r"no checkpoint of step 5; it has \[0, 1, 7, 12\]"):
        reference.checkpoint(5)
    with pytest.raises(LookupError):
        reference.load(-2)


@pytest.mark.parametrize(
    ("step", "found"), [("last", 12), (-1, 12), (1.0, 12), (0.0, 0), (0, 0), (1, 1), (0.5, 7), (0.9, 12)]
)
def test_checkpoints_are_found_by_step_by_name_and_by_the_nearest_fraction(reference, step, found):
    assert reference.checkpoint(step) == reference.checkpoint(found)


@pytest.mark.parametrize("step", ["first", 1.5, -0.5])
def test_what_names_no_checkpoint_is_refused(reference, step):
    with pytest.raises(MissingCheckpointError, match="no checkpoint of step"):
        reference.checkpoint(step)


def test_a_whole_run_passes_its_check_and_every_damage_is_listed(reference, tmp_path):
    reference.check()
    shutil.copytree(reference.path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    shutil.rmtree(run.checkpoint(7))
    file = run.checkpoint(12) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    log = run.path / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(RunError) as error:
        run.check()
    assert "no checkpoints of steps [7]" in str(error.value)
    assert "step-000012/model.safetensors is not there as it was written" in str(error.value)
    assert "log.jsonl is not there as it was written" in str(error.value)
    assert "other text" not in str(error.value)


def test_a_grammar_that_makes_other_text_is_noticed(reference, plan, monkeypatch):
    rows = type(plan.corpus).rows
    monkeypatch.setattr(type(plan.corpus), "rows", lambda self, *span: (rows(self, *span) + 1) % 5)
    with pytest.raises(RunError, match="makes other text than the model was trained on"):
        reference.check()


@pytest.mark.parametrize("step", [0, -1])
def test_loaded_checkpoints_equal_the_saved_weights_and_carry_the_grammar(plan, reference, step):
    tokens = torch.from_numpy(plan.corpus.rows(0, 2))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(reference.checkpoint(step))(tokens).logits
        hooked = reference.load(step)
        torch.testing.assert_close(hooked(tokens), expected, atol=1e-4, rtol=0)
    info = model_info(hooked)
    assert (info.name, info.step, info.seed) == (reference.path.parent.name, 12 if step else 0, 0)
    assert info.grammar == plan.corpus.grammar


def test_what_is_no_finished_run_is_refused(reference, tmp_path):
    with pytest.raises(RunError, match=r"no manifest\.json"):
        Run.open(tmp_path)
    reference.manifest.model_copy(update={"finished": False}).write(tmp_path)
    with pytest.raises(RunError, match="has not finished: call train"):
        Run.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "not json"])
def test_a_damaged_manifest_is_an_error_of_ours(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RunError, match="cannot read"):
        Run.open(tmp_path)


def test_a_manifest_with_unknown_fields_is_refused(reference, tmp_path):
    fields = json.loads(reference.manifest.model_dump_json())
    (tmp_path / "manifest.json").write_text(json.dumps(fields | {"optimizer": "lion"}))
    with pytest.raises(RunError, match="optimizer"):
        Run.open(tmp_path)


def test_manifests_survive_the_disk(reference, tmp_path):
    reference.manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == reference.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json"]

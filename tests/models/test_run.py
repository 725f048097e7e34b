import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mechhier.grammars import corpus as corpus_module
from mechhier.models import run as run_module
from mechhier.models import train
from mechhier.models.errors import ModelLoadError
from mechhier.models.loading import load_model, model_info
from mechhier.models.run import Manifest, MissingCheckpointError, Run, RunError, kept_steps, weights_sha256


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


@pytest.mark.parametrize(("step", "gone"), [("last", 12), (-1, 12), (1.0, 12), (0.0, 0), (0, 0), (0.5, 7)])
def test_a_checkpoint_that_is_gone_is_not_replaced_by_its_neighbour(reference, tmp_path, step, gone):
    run = _copied(reference, tmp_path)
    shutil.rmtree(run.checkpoint(gone))
    with pytest.raises(MissingCheckpointError, match=rf"checkpoint of step {gone} is gone from .* What to do"):
        run.load(step)
    shutil.rmtree(run.path / "checkpoints")
    with pytest.raises(MissingCheckpointError, match="is gone"):
        run.load(step)
    with pytest.raises(RunError, match="there are no checkpoints"):
        _ = run.evaluation


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


def _copied(reference, tmp_path):
    shutil.copytree(reference.path, tmp_path / "run")
    return Run.open(tmp_path / "run")


def _files(run):
    """Every file of a run but its lock, which holds nothing."""
    return sorted(path.relative_to(run.path) for path in run.path.rglob("*") if path.is_file() and path.name != ".lock")


def test_every_file_of_a_run_is_checked(reference, tmp_path):
    run = _copied(reference, tmp_path)
    for name in _files(run):
        path = run.path / name
        whole = path.read_bytes()
        flipped = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
        for damaged in (flipped, whole[: len(whole) // 2], b"", None):
            path.write_bytes(damaged) if damaged is not None else path.unlink()
            with pytest.raises(RunError, match=re.escape(path.name)):
                Run.open(run.path).check()
            path.write_bytes(whole)
    run.check()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "evaluation.json"])
def test_a_damaged_checkpoint_is_refused_by_name_before_it_is_used(reference, tmp_path, name):
    run = _copied(reference, tmp_path)
    path = run.checkpoint(7) / name
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    with pytest.raises(ModelLoadError, match=rf"step-000007 is damaged: {name} .* What to do"):
        run.load(7)
    with pytest.raises(ModelLoadError, match="is damaged"):
        load_model(run.checkpoint(7))
    run.load(12)


@pytest.mark.parametrize("damage", ["flipped", "cut", "absent"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("log.jsonl", lambda run: run.log),
        ("floor.nc", lambda run: run.floor),
        ("checkpoints/step-000007/evaluation.json", lambda run: run.evaluation),
    ],
)
def test_what_stands_beside_the_weights_is_named_when_it_is_damaged(reference, tmp_path, name, read, damage):
    run = _copied(reference, tmp_path)
    path = run.path / name
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes({"flipped": flipped, "cut": content[:middle], "absent": b""}[damage])
    if damage == "absent":
        path.unlink()
    with pytest.raises(RunError, match=rf"{path.name} is absent or damaged: .* What to do") as error:
        read(run)
    assert str(error.value).count("absent or damaged") == 1


@pytest.mark.parametrize("damage", ["flipped", "cut", "absent"])
def test_without_its_list_of_hashes_nothing_of_a_run_is_used_unchecked(reference, tmp_path, damage):
    run = _copied(reference, tmp_path)
    path = run.path / "files.sha256"
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:] if damage == "flipped" else content[: len(content) // 2])
    if damage == "absent":
        path.unlink()
    weights = run.checkpoint(12) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    for read in (lambda: run.load(12), lambda: run.log, lambda: run.floor, lambda: run.evaluation, run.check):
        with pytest.raises(ValueError, match=r"files\.sha256 is absent or damaged, .* What to do: copy it"):
            read()
    shutil.copytree(reference.checkpoint(12), tmp_path / "taken out")
    load_model(tmp_path / "taken out")


def test_a_checkpoint_that_training_did_not_write_is_refused(reference, tmp_path):
    run = _copied(reference, tmp_path)
    shutil.copytree(run.checkpoint(7), run.path / "checkpoints" / "step-000009")
    with pytest.raises(ModelLoadError, match=r"step-000009 has no hashes .* move it out of the run"):
        run.load(9)


def test_a_former_log_or_evaluation_that_has_no_hash_is_named_where_it_cannot_be_read(reference, tmp_path):
    run = _copied(reference, tmp_path)
    (run.path / "files.sha256").unlink()
    run.manifest.model_copy(update={"format": 2, "files_sha256": None}).write(run.path)
    run = Run.open(run.path)
    evaluation = run.checkpoint(7) / "evaluation.json"
    for text in ("", "{", "1\n", "null\n", '{"loss": "x"}\n', "\ud800"):
        for path, read in ((run.path / "log.jsonl", lambda: run.log), (evaluation, lambda: run.evaluation)):
            if text == '{"loss": "x"}\n' and path.name == "log.jsonl":
                text = '{"step": "x"}\n'
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            with pytest.raises(RunError, match=rf"{path.name} is absent or damaged: .* What to do") as error:
                read()
            assert str(error.value).count("What to do") == 1


def test_what_lies_beside_the_checkpoints_is_not_looked_at(reference, tmp_path):
    run = _copied(reference, tmp_path)
    shutil.copytree(run.checkpoint(7), run.path / "checkpoints" / "step-000007.bak")
    (run.path / "checkpoints" / "step-000009").write_text("a file")
    (run.path / "checkpoints" / "notes.txt").write_text("a file")
    assert run.steps == reference.steps
    run.check()
    run.load(7)


def test_the_list_of_hashes_is_what_sha256sum_reads(reference):
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum")
    subprocess.run(["sha256sum", "--check", "--quiet", "files.sha256"], cwd=reference.path, check=True)


def test_a_run_of_the_former_format_is_checked_by_the_hashes_it_has(reference, tmp_path):
    run = _copied(reference, tmp_path)
    (run.path / "files.sha256").unlink()
    fields = json.loads(reference.manifest.model_dump_json()) | {
        "format": 2,
        "weights_sha256": {step: weights_sha256(run.checkpoint(step)) for step in run.steps},
    }
    for new in ("files_sha256", "all_text_sha256"):
        del fields[new]
    (run.path / "manifest.json").write_text(json.dumps(fields))
    run = Run.open(run.path)
    run.check()
    run.load(7)
    assert len(run.evaluation.step) == len(run.log.dropna(subset=["eval_loss"]))
    weights = run.checkpoint(7) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(RunError, match="weights of step 7 are not those that were trained"):
        run.check()


def test_a_run_is_found_after_the_process_has_gone_elsewhere(reference, tmp_path, monkeypatch):
    _copied(reference, tmp_path)
    monkeypatch.chdir(tmp_path)
    run = Run.open("run")
    monkeypatch.setenv("HOME", str(tmp_path))
    home = Run.open("~/run")
    monkeypatch.chdir("/")
    assert run.steps == home.steps == reference.steps


def test_the_evaluation_of_many_checkpoints_lists_their_folder_once(reference, tmp_path, monkeypatch):
    run, listed = _copied(reference, tmp_path), []
    monkeypatch.setattr(run_module, "kept_steps", lambda path: listed.append(path) or kept_steps(path))
    assert len(run.evaluation.step) == 4
    assert len(listed) == 1


def test_all_of_the_text_is_checked_not_its_first_block(tmp_path, plan, monkeypatch):
    monkeypatch.setattr(corpus_module, "_TOKENS_PER_BLOCK", 12 * 7)
    run = train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)
    run.check()
    rows = type(plan.corpus).rows
    monkeypatch.setattr(
        type(plan.corpus),
        "rows",
        lambda self, a, b: rows(self, a, b) + (a <= 35 < b) * (np.arange(a, b) == 35)[:, None],
    )
    with pytest.raises(RunError, match="makes other text than the model was trained on"):
        run.check()


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

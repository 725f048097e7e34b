import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import stat
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from tensorboardX.proto.event_pb2 import Event
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from mechhier.models import training
from mechhier.models.run import Run, RunError
from mechhier.models.spec import ModelSpec, TrainSpec, checkpoint_steps
from mechhier.models.training import TrainingError, diverged, train


class KilledError(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(run: Run, step: int) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(run.checkpoint(step)).state_dict()


@pytest.fixture
def state_after_every_step(monkeypatch):
    monkeypatch.setattr(training, "_STATE_SECONDS", -1.0)
    monkeypatch.setattr(training, "_STATE_SHARE", -1.0)


def test_training_equals_a_plain_pytorch_loop(plan, reference):
    settings = plan.train
    model = plan.spec.build(vocab_size=plan.corpus.grammar.vocab_size, eos_token_id=0, n_ctx=12, seed=settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    rows = torch.from_numpy(plan.corpus.rows(0, 40))
    losses = []
    for step in range(12):
        warmup, progress = (step + 1) / 2, (step + 1 - 2) / (12 - 2)
        cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2
        optimizer.param_groups[0]["lr"] = 3e-3 * (warmup if step < 2 else cosine)
        batch = rows[[(step * 4 + i) % 40 for i in range(4)]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert reference.log["loss"].to_list()[1:] == pytest.approx(losses, abs=1e-5)
    for name, weight in weights(reference, 12).items():
        torch.testing.assert_close(weight, model.state_dict()[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("steps", "warmup", "rates"),
    [
        (6, 2, [0.5, 1, 1 - 0.9 * (1 - math.sqrt(0.5)) / 2, 0.55, 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2, 0.1]),
        (3, 0, [1, 0.55, 0.1]),
        (3, 1, [1, 0.55, 0.1]),
        (3, 2, [0.5, 1, 0.1]),
        (2, 0, [1, 0.1]),
        (1, 0, [0.1]),
    ],
)
def test_rates_rise_from_the_first_step_and_end_at_the_given_fraction(plan, tmp_path, steps, warmup, rates):
    settings = plan.train.model_copy(update={"steps": steps, "warmup_steps": warmup, "n_checkpoints": 2})
    run = train(plan.spec, plan.corpus, tmp_path / "run", train=settings)
    assert run.log["learning_rate"].to_list()[1:] == pytest.approx([3e-3 * rate for rate in rates], rel=1e-12)
    assert run.log["learning_rate"].iloc[-1] == 3e-3 * 0.1


def test_the_first_step_changes_the_weights(reference):
    untrained, first = weights(reference, 0), weights(reference, 1)
    assert all(not torch.equal(first[name], weight) for name, weight in untrained.items())


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 0), (3, 1), (10, 3), (299, 99), (300, 100), (360, 100)])
def test_the_default_warm_up_is_a_third_of_a_short_training(plan, steps, warmup):
    settings = TrainSpec(steps=steps, batch_size=4, n_checkpoints=2, eval_rows=6)
    assert training._plan(plan.spec, plan.corpus, settings).train.warmup_steps == warmup


def test_a_training_of_few_steps_needs_no_warm_up_given(plan, tmp_path):
    run = train(plan.spec, plan.corpus, tmp_path / "run", train=TrainSpec(batch_size=20, eval_rows=6, n_checkpoints=2))
    assert run.steps == [0, 2]
    assert run.train_spec.warmup_steps == 0
    train(plan.spec, plan.corpus, tmp_path / "run", train=TrainSpec(batch_size=20, eval_rows=6, n_checkpoints=2))


def test_eval_loss_is_hugging_faces_own_on_the_validation_rows(plan, reference):
    rows = torch.from_numpy(plan.corpus.held_out("validation", tokens=6 * 12).rows(0, 6))
    measured = reference.log.dropna(subset=["eval_loss"])
    assert measured["step"].to_list() == reference.steps
    for step, eval_loss in zip(measured["step"], measured["eval_loss"], strict=True):
        model = AutoModelForCausalLM.from_pretrained(reference.checkpoint(step))
        with torch.no_grad():
            assert eval_loss == pytest.approx(model(rows, labels=rows).loss.item(), abs=1e-5)


def test_the_held_out_loss_by_position_equals_hugging_faces_and_stands_beside_the_floor(plan, reference):
    held_out = plan.corpus.held_out("validation", tokens=6 * 12)
    rows, floor = torch.from_numpy(held_out.rows(0, 6)), held_out.floor(6)
    evaluation = reference.evaluation
    assert evaluation.step.values.tolist() == reference.steps
    assert evaluation.position.values.tolist() == list(range(1, 12))
    for step in reference.steps:
        model = AutoModelForCausalLM.from_pretrained(reference.checkpoint(step))
        with torch.no_grad():
            losses = cross_entropy(model(rows).logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none").numpy()
        measured = evaluation.sel(step=step)
        np.testing.assert_allclose(measured.eval_loss, losses.mean(0), atol=1e-5)
        half_width = 1.96 * losses.std(0, ddof=1) / math.sqrt(6)
        np.testing.assert_allclose(measured.eval_loss_high - measured.eval_loss, half_width, atol=1e-5)
    np.testing.assert_array_equal(evaluation.floor, floor.floor[1:])
    assert evaluation.attrs["method"] == floor.attrs["method"]
    assert reference.log["floor"].dropna().unique() == pytest.approx([float(floor.floor_mean)])


def test_a_stored_corpus_trains_the_same_run_as_one_made_while_training(plan, reference, tmp_path):
    stored = plan.corpus.save(tmp_path / "corpus")
    assert stored.path is not None
    run = train(plan.spec, stored, tmp_path / "run", train=plan.train)
    assert contents(run.path) == contents(reference.path)


def test_packed_rows_have_no_floor(plan, tmp_path):
    packed = plan.corpus.grammar.corpus(tokens=40 * 12, context=12, packed=True)
    run = train(plan.spec, packed, tmp_path / "run", train=plan.train)
    assert run.log["floor"].isna().all()
    assert "floor" not in run.evaluation
    run.check()


def test_a_finished_run_holds_its_checkpoints_and_nothing_to_resume(plan, reference):
    assert reference.steps == checkpoint_steps(12, 5)
    assert sorted(path.name for path in reference.path.iterdir()) == [
        ".lock",
        "checkpoints",
        "files.sha256",
        "floor.nc",
        "log.jsonl",
        "manifest.json",
    ]
    untrained = plan.spec.build(vocab_size=plan.corpus.grammar.vocab_size, eos_token_id=0, n_ctx=12, seed=0)
    for name, weight in weights(reference, 0).items():
        assert torch.equal(weight, untrained.state_dict()[name])


def test_a_finished_run_is_returned_without_training(plan, reference, monkeypatch):
    before = contents(reference.path)
    monkeypatch.setattr(training, "_Session", None)
    assert train(plan.spec, plan.corpus, reference.path, train=plan.train).steps == reference.steps
    assert contents(reference.path) == before


def test_a_kill_after_the_last_write_leaves_no_state_for_good(plan, reference, tmp_path, monkeypatch):
    remove = training.shutil.rmtree

    def killed(path, **options):
        if path.name == "trainer":
            raise KilledError
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training.shutil, "rmtree", killed)
        with pytest.raises(KilledError):
            train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)
    assert (tmp_path / "run" / "trainer").is_dir()
    train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)
    assert contents(tmp_path / "run") == contents(reference.path)


@pytest.mark.parametrize("write", [0, 1, 3, 9, 16, 27, 30])
def test_a_kill_before_any_write_is_harmless(plan, reference, state_after_every_step, tmp_path, monkeypatch, write):
    out, done = tmp_path / "run", []

    def killed_before(publish):
        def wrapper(path, target):
            if len(done) == write:
                raise KilledError
            done.append(path)
            return publish(path, target)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_before(Path.rename))
        patch.setattr(Path, "replace", killed_before(Path.replace))
        with pytest.raises(KilledError):
            train(plan.spec, plan.corpus, out, train=plan.train)
    train(plan.spec, plan.corpus, out, train=plan.train)
    assert contents(out) == contents(reference.path)


@pytest.mark.parametrize("file", [1, 8, 20])
def test_a_kill_while_the_trainers_state_is_written_is_harmless(
    plan, reference, state_after_every_step, tmp_path, monkeypatch, file
):
    out, done, write_bytes = tmp_path / "run", [], Path.write_bytes

    def killed_in_the_middle(path, content):
        if "trainer" in path.parts:
            done.append(path)
            if len(done) == file:
                write_bytes(path, content[:7])
                raise KilledError
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed_in_the_middle)
        with pytest.raises(KilledError):
            train(plan.spec, plan.corpus, out, train=plan.train)
    train(plan.spec, plan.corpus, out, train=plan.train)
    assert contents(out) == contents(reference.path)


@pytest.fixture
def interrupted(plan, tmp_path_factory):
    """A training that was killed at its tenth step, with the states of steps 8 and 9."""
    out, step = tmp_path_factory.mktemp("interrupted") / "run", training._Session.on_step_end

    def killed(self, args, state, control, **options):
        if state.global_step == 10:
            raise KilledError
        return step(self, args, state, control, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_STATE_SECONDS", -1.0)
        patch.setattr(training, "_STATE_SHARE", -1.0)
        patch.setattr(training._Session, "on_step_end", killed)
        with pytest.raises(KilledError):
            train(plan.spec, plan.corpus, out, train=plan.train)
    return out


def _one_of_each_kind(out):
    """Files but the manifest: of checkpoints those of the last, of states too."""
    paths = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    kinds = {(path.parts[0], path.name): path for path in paths if path.name not in ("manifest.json", ".lock")}
    assert len(kinds) == 3 + 6 + 6
    return [str(path) for path in kinds.values()]


@pytest.mark.parametrize("damage", ["flipped", "absent"])
def test_whatever_is_damaged_during_an_interruption_is_noticed_and_made_again(
    plan, reference, interrupted, tmp_path, damage, capfd
):
    for number, name in enumerate(_one_of_each_kind(interrupted)):
        out = tmp_path / str(number) / "run"
        shutil.copytree(interrupted, out)
        content = (out / name).read_bytes()
        middle = len(content) // 2
        (out / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        if damage == "absent":
            (out / name).unlink()
        train(plan.spec, plan.corpus, out, train=plan.train)
        assert contents(out) == contents(reference.path), name
        said = capfd.readouterr().err
        if "trainer/step-9/" in name:
            assert "the state of step 9 is not as it was written; going on from the state of step 8" in said
        elif "checkpoints/step-000007/" in name:
            assert "the checkpoint of step 7 is not as it was written; going on from the beginning" in said


def test_a_finished_training_is_not_trained_again_by_who_waited_for_it(plan, reference, tmp_path, monkeypatch):
    shutil.copytree(reference.path, tmp_path / "run")
    unfinished = reference.manifest.model_copy(update={"finished": False})
    unfinished.write(tmp_path / "run")
    only_process_in = training.only_process_in

    def finished_meanwhile(folder, **options):
        reference.manifest.write(folder)
        return only_process_in(folder, **options)

    monkeypatch.setattr(training, "only_process_in", finished_meanwhile)
    monkeypatch.setattr(training, "_Session", None)
    assert train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train).steps == reference.steps


def test_a_finished_training_is_returned_while_another_process_holds_its_folder(plan, reference, tmp_path):
    shutil.copytree(reference.path, tmp_path / "run")
    (tmp_path / "run" / "trainer").mkdir()  # as a kill just before the end leaves it
    with filelock.FileLock(tmp_path / "run" / ".lock"):
        assert train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train).steps == reference.steps
    assert contents(tmp_path / "run") == contents(reference.path)


def test_the_logs_hash_is_of_what_was_written(plan, tmp_path, monkeypatch):
    finish = training._finish

    def damaged(manifest, corpus, out, written):
        (out / "log.jsonl").write_text((out / "log.jsonl").read_text().replace("0.003", "0.004"))
        finish(manifest, corpus, out, written)

    monkeypatch.setattr(training, "_finish", damaged)
    run = train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)
    with pytest.raises(RunError, match=r"log\.jsonl is not there as it was written"):
        run.check()


def _refused_as_one_of_several(plan, out):
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(RunError, match="another process is training in"):
        train(plan.spec, plan.corpus, out, train=plan.train)


@pytest.mark.slow
def test_where_the_first_of_several_processes_is_refused_all_are(plan, tmp_path):
    (tmp_path / "run").mkdir()
    with filelock.FileLock(tmp_path / "run" / ".lock"):
        debug_launcher(_refused_as_one_of_several, args=(plan, tmp_path / "run"), num_processes=2)


@pytest.mark.parametrize("library", ["safetensors", "tokenizers"])
def test_what_a_library_cannot_write_is_an_error_that_names_the_checkpoint(plan, tmp_path, monkeypatch, library):
    def full(*_, **__):
        raise (SafetensorError if library == "safetensors" else Exception)("No space left on device (os error 28)")

    owner = PreTrainedModel if library == "safetensors" else PreTrainedTokenizerFast
    monkeypatch.setattr(owner, "save_pretrained", full)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device.*step-000000'"):
        train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)


def test_files_of_a_run_have_the_modes_of_the_umask(reference):
    mask = os.umask(0)
    os.umask(mask)
    for path in reference.path.rglob("*"):
        if path.is_file() and path.name != ".lock":
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path


def test_text_that_no_file_can_hold_is_refused_before_anything_is_written(plan, tmp_path):
    with pytest.raises(ValueError, match="arm: holds half a surrogate pair"):
        train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train, arm="\ud800")
    assert not (tmp_path / "run").exists()


def test_a_kill_between_two_log_lines_loses_no_loss(plan, state_after_every_step, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_LOG_LINES", 2)  # a line every 6 steps, and at checkpoints
    expected = train(plan.spec, plan.corpus, tmp_path / "uninterrupted", train=plan.train)
    assert expected.log["step"].to_list() == [0, 1, 6, 7, 12]
    step = training._Session.on_step_end

    def killed(self, args, state, control, **options):
        if state.global_step == 5:
            raise KilledError
        return step(self, args, state, control, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training._Session, "on_step_end", killed)
        with pytest.raises(KilledError):
            train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)
    run = train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)
    assert contents(run.path) == contents(expected.path)


def test_resuming_does_not_repeat_finished_steps(plan, state_after_every_step, tmp_path, monkeypatch):
    steps = []
    step = training._Session.on_step_end

    def counted(self, args, state, control, **options):
        if len(steps) == 7:
            steps.append("killed")
            raise KilledError
        steps.append(state.global_step)
        return step(self, args, state, control, **options)

    monkeypatch.setattr(training._Session, "on_step_end", counted)
    with pytest.raises(KilledError):
        train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)
    train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)
    assert steps == [1, 2, 3, 4, 5, 6, 7, "killed", 8, 9, 10, 11, 12]


def _train_in_a_child(plan, out):
    """Train in a forked process, which has nothing to import; its state is saved after every step."""

    def child():
        training._STATE_SECONDS = training._STATE_SHARE = -1.0
        train(plan.spec, plan.corpus, out, train=plan.train)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


@pytest.mark.slow
def test_after_ten_sigkills_the_same_call_ends_as_if_uninterrupted(plan, tmp_path):
    plan.train = plan.train.model_copy(update={"steps": 120, "n_checkpoints": 12})
    whole = _train_in_a_child(plan, tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    out, generator = tmp_path / "run", random.Random(0)

    def last_step():
        return max(training._state_steps(out), default=0)

    for _ in range(10):
        process, step = _train_in_a_child(plan, out), last_step() + generator.randint(0, 9)
        deadline = time.monotonic() + 120
        while process.is_alive() and last_step() < step:
            assert time.monotonic() < deadline
            process.join(0.002)
        process.join(generator.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the training ended before it could be killed ten times"
    assert last_step() > 10
    with pytest.raises(RunError, match="has not finished"):
        Run.open(out)
    train(plan.spec, plan.corpus, out, train=plan.train)
    assert contents(out) == contents(tmp_path / "whole")
    Run.open(out).check()


def _train_as_one_of_several(plan, out):
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, which was alone
    train(plan.spec, plan.corpus, out, train=plan.train)


@pytest.mark.slow
def test_two_processes_that_share_the_batches_equal_one(plan, reference, tmp_path):
    debug_launcher(_train_as_one_of_several, args=(plan, tmp_path / "run"), num_processes=2)
    run = Run.open(tmp_path / "run")
    assert run.manifest.device == "2 x cpu, float32"
    columns = ["loss", "eval_loss", "floor"]
    pd.testing.assert_frame_equal(run.log[columns], reference.log[columns], atol=1e-4, rtol=0)
    for name, weight in weights(run, 12).items():
        torch.testing.assert_close(weight, weights(reference, 12)[name], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_two_processes_go_on_from_the_state_that_the_first_finds_whole(plan, reference, interrupted, capfd):
    optimizer = interrupted / "trainer" / "step-9" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    debug_launcher(_train_as_one_of_several, args=(plan, interrupted), num_processes=2)
    assert (
        capfd.readouterr().err.count("the state of step 9 is not as it was written; going on from the state of step 8")
        == 1
    )
    run = Run.open(interrupted)
    run.check()
    for name, weight in weights(run, 12).items():
        torch.testing.assert_close(weight, weights(reference, 12)[name], atol=1e-4, rtol=0)


def test_a_folder_in_which_another_process_trains_is_refused(plan, tmp_path):
    (tmp_path / "run").mkdir()
    with (
        filelock.FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(RunError, match="another process is training in"),
    ):
        train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)


def test_another_training_in_the_same_folder_is_refused_and_nothing_is_touched(plan, reference):
    before = contents(reference.path)
    other = plan.spec.model_copy(update={"d_mlp": 32})
    with pytest.raises(RunError, match=r"model\.d_mlp: 16 -> 32"):
        train(other, plan.corpus, reference.path, train=plan.train)
    with pytest.raises(RunError, match=r"train\.learning_rate: 0\.003 -> 0\.1"):
        train(plan.spec, plan.corpus, reference.path, train=plan.train.model_copy(update={"learning_rate": 0.1}))
    other_text = plan.corpus.grammar.corpus(tokens=480, context=12, seed=5)
    with pytest.raises(RunError, match=r"corpus\.seed: 0 -> 5"):
        train(plan.spec, other_text, reference.path, train=plan.train)
    assert contents(reference.path) == before


def test_a_run_of_the_former_schedule_is_returned_if_finished_and_never_gone_on_with(plan, reference, tmp_path):
    shutil.copytree(reference.path, tmp_path / "run")
    former = reference.manifest.model_copy(update={"format": 1})
    former.write(tmp_path / "run")
    assert train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train).manifest == former
    former.model_copy(update={"finished": False}).write(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match="this version cannot go on with it"):
        train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)
    assert contents(tmp_path / "run") == before


def test_a_folder_with_other_things_is_refused(plan, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not empty and not a run"):
        train(plan.spec, plan.corpus, tmp_path, train=plan.train)
    with pytest.raises(RunError, match="is a file"):
        train(plan.spec, plan.corpus, tmp_path / "thesis.tex", train=plan.train)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"steps": None, "warmup_steps": 10}, "10 steps of 4 rows"), ({"steps": None, "batch_size": 41}, "0 steps")],
)
def test_a_corpus_too_short_for_one_pass_is_refused(plan, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train.model_copy(update=changes))
    assert not (tmp_path / "run").exists()


def test_rows_longer_than_the_context_are_refused(plan, tmp_path):
    with pytest.raises(ValueError, match="rows of 12 tokens do not fit the model's n_ctx=8"):
        train(plan.spec.model_copy(update={"n_ctx": 8}), plan.corpus, tmp_path / "run", train=plan.train)
    assert not (tmp_path / "run").exists()


def test_one_pass_over_the_corpus_is_the_default_length(plan, tmp_path):
    settings = plan.train.model_copy(update={"steps": None, "n_checkpoints": 2})
    assert train(plan.spec, plan.corpus, tmp_path / "run", train=settings).steps == [0, 10]


def test_a_loss_that_is_not_a_number_stops_training_at_the_last_good_checkpoint(plan, tmp_path, monkeypatch):
    settings = plan.train.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(TrainingError, match=r"not finite at step \d+; the last good checkpoint is that of step 1"):
        train(plan.spec, plan.corpus, tmp_path / "run", train=settings)
    finite = (tmp_path / "run" / "log.jsonl").read_text().splitlines()  # a line every step
    assert "NaN" not in finite[-1]
    monkeypatch.setattr(training, "_LOG_LINES", 2)  # a line every 6 steps: the bad step lies between two
    with pytest.raises(TrainingError, match=f"not finite at step {len(finite)};"):
        train(plan.spec, plan.corpus, tmp_path / "other", train=settings)
    for folder in (tmp_path / "other" / "checkpoints").glob("step-*"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_training_that_diverges_with_finite_losses_stops(plan, tmp_path):
    settings = plan.train.model_copy(update={"learning_rate": 3.0, "steps": 40})
    with pytest.raises(TrainingError, match=r"diverged: since step \d+ .* last good checkpoint .* lower learning_rate"):
        train(plan.spec, plan.corpus, tmp_path / "run", train=settings)


def a_log(*losses, untrained=5.0):
    first = {"step": 0, "loss": None, "eval_loss": untrained}
    return [first, *({"step": 10 * i, "loss": loss, "eval_loss": None} for i, loss in enumerate(losses, 1))]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            [5.0, 2.0, *[3.6] * 10],
            r"since step 30 .* above 3\.5 nats, 3\.6 at step 120 \(lowest so far 2, untrained 5\)",
        ),
        ([*[6.1] * 10], r"since step 10 .* above 6 nats"),
        ([5.0, 2.0, *[3.6] * 9], None),
        ([5.0, 2.0, *[3.6] * 9, 3.4], None),
        ([5.0, 2.0, *[3.6] * 9, 3.4, *[3.6] * 9], None),
        ([5.0, 4.6, *[5.3] * 30], None),
    ],
)
def test_a_loss_has_diverged_after_ten_bad_log_points_in_a_row(losses, message):
    found = diverged(a_log(*losses))
    assert (found is None) if message is None else re.search(message, found)


@given(st.lists(st.floats(0.0, 5.9), min_size=1, max_size=40))
def test_a_loss_that_only_falls_has_never_diverged(losses):
    assert diverged(a_log(*sorted(losses, reverse=True))) is None


@pytest.mark.parametrize("changes", [{"gradient_accumulation": 2}, {"gradient_accumulation": 4}, {"compile": True}])
def test_the_way_a_step_is_computed_does_not_change_what_is_learned(plan, reference, tmp_path, monkeypatch, changes):
    settings = plan.train.model_copy(update=changes)
    compiled, compile_model = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: compiled.append(how) or compile_model(model, **how))
    with torch.compiler.set_stance("force_eager"):  # all but the kernels of torch.compile, which need a compiler
        run = train(plan.spec, plan.corpus, tmp_path / "run", train=settings)
    assert len(compiled) == ("compile" in changes)
    columns = ["loss", "eval_loss", "learning_rate"]
    pd.testing.assert_frame_equal(run.log[columns], reference.log[columns], atol=1e-5, rtol=0)
    for name, weight in weights(run, 12).items():
        torch.testing.assert_close(weight, weights(reference, 12)[name], atol=1e-5, rtol=0)
    assert run.manifest.device == "1 x cpu, float32" + ", compiled" * ("compile" in changes)


def test_bfloat16_keeps_float32_weights_and_nearly_the_same_losses(plan, reference, tmp_path):
    settings = plan.train.model_copy(update={"precision": "bfloat16"})
    run = train(plan.spec, plan.corpus, tmp_path / "run", train=settings)
    assert {weight.dtype for weight in weights(run, 12).values()} == {torch.float32}
    assert run.log["loss"][1:].to_list() == pytest.approx(reference.log["loss"][1:].to_list(), abs=0.02)
    assert run.log["loss"][12] != reference.log["loss"][12]
    assert "bfloat16 autocast" in run.manifest.device


def test_evaluation_is_in_float32_whatever_the_precision_of_training(plan, tmp_path):
    settings = plan.train.model_copy(update={"precision": "bfloat16"})
    run = train(plan.spec, plan.corpus, tmp_path / "run", train=settings)
    rows = torch.from_numpy(plan.corpus.held_out("validation", tokens=6 * 12).rows(0, 6))
    model = AutoModelForCausalLM.from_pretrained(run.checkpoint(12))
    with torch.no_grad():
        assert run.log["eval_loss"][12] == pytest.approx(model(rows, labels=rows).loss.item(), abs=1e-6)


def test_listed_checkpoints_are_kept_besides_the_grid(plan, reference, tmp_path):
    settings = plan.train.model_copy(update={"checkpoints_at": (0, 3, 5)})
    run = train(plan.spec, plan.corpus, tmp_path / "run", train=settings)
    assert run.steps == [0, 1, 3, 5, 7, 12]
    assert run.log["eval_loss"].notna().sum() == 6
    for name, weight in weights(run, 12).items():
        assert torch.equal(weight, weights(reference, 12)[name])


def test_listed_checkpoints_beyond_one_pass_are_refused(plan, tmp_path):
    settings = plan.train.model_copy(update={"steps": None, "checkpoints_at": (11,)})
    with pytest.raises(ValueError, match=r"checkpoints_at=\[11\] lie beyond the 10 steps"):
        train(plan.spec, plan.corpus, tmp_path / "run", train=settings)


def test_disk_use_is_announced_and_too_small_a_disk_refused(plan, tmp_path, capfd, monkeypatch):
    n_bytes = plan.spec.n_bytes(plan.corpus.grammar.vocab_size)
    free = SimpleNamespace(free=(4 + 6) * n_bytes)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda path: free)
    train(plan.spec, plan.corpus, tmp_path / "fits", train=plan.train)
    assert "Disk: 4 checkpoints of 8.9 kB, 35.6 kB in all" in capfd.readouterr().err
    free.free -= 1
    with pytest.raises(TrainingError, match=r"89\.0 kB are needed on disk"):
        train(plan.spec, plan.corpus, tmp_path / "does not", train=plan.train)
    assert [path.name for path in (tmp_path / "does not").iterdir()] == [".lock"]


def test_the_log_goes_to_tensorboard_too_where_asked(plan, reference, tmp_path):
    run = train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train, report_to=["tensorboard"])
    (events,) = (run.path / "tensorboard").iterdir()
    assert logged_scalars(events, "train/loss") == pytest.approx(reference.log["loss"][1:].to_list())
    assert logged_scalars(events, "eval/loss") == pytest.approx(reference.log["eval_loss"].dropna().to_list())
    assert len(logged_scalars(events, "train/tokens_per_second")) == 12
    run.check()


def logged_scalars(events: Path, tag: str) -> list[float]:
    """Values of a tag in TensorBoard's file: records of length, checksum, message, checksum."""
    data, found = events.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        found += [value.simple_value for value in event.summary.value if value.tag == tag]
        data = data[16 + length :]
    return found


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "olmo", "olmo2"])
def test_every_architecture_learns(plan, tmp_path, architecture):
    spec = ModelSpec(architecture, n_layers=1, d_model=16, n_heads=2)
    run = train(spec, plan.corpus, tmp_path / "run", train=plan.train)
    evaluated = run.log["eval_loss"].dropna().to_list()
    assert evaluated[-1] < evaluated[0] - 0.05


def test_the_callers_random_state_and_terminal_are_left_alone(plan, tmp_path, capfd):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)
    assert draw() == expected
    assert capfd.readouterr().out.strip() == ""


@pytest.mark.parametrize("stride", [4, 8, 1000])
def test_batches_are_consecutive_rows_and_wrap_around(plan, stride):
    rows = training._Rows(plan.corpus, 1000, stride=stride)
    everything = plan.corpus.rows(0, 40)
    for start, n in [(0, 4), (4, 4), (8, 4), (36, 8), (77, 6), (38, 90), (992, 8)]:
        indices = list(range(start, start + n))
        assert np.array_equal(rows.__getitems__(indices).numpy(), everything[np.array(indices) % 40])


def test_the_next_batch_is_read_while_this_one_is_trained_on(plan, monkeypatch):
    read = []
    rows_of = type(plan.corpus).rows
    monkeypatch.setattr(type(plan.corpus), "rows", lambda self, *span: read.append(span) or rows_of(self, *span))
    rows = training._Rows(plan.corpus, 1000, stride=8)
    for start in (4, 12, 20):
        rows.__getitems__(list(range(start, start + 4)))
    rows._ahead[1].result()
    assert read == [(4, 8), (12, 16), (20, 24), (28, 32)]


def test_the_tokenizer_reads_the_grammars_words_and_does_not_invent_others(plan, reference):
    grammar = plan.corpus.grammar
    tokenizer = AutoTokenizer.from_pretrained(reference.checkpoint(-1))
    assert tokenizer(" ".join(grammar.vocabulary))["input_ids"] == list(range(grammar.vocab_size))
    assert tokenizer.decode([0, 3]) == f"{grammar.vocabulary[0]} {grammar.vocabulary[3]}"
    assert tokenizer.eos_token_id == grammar.eos_token_id
    unknown = tokenizer("dragon", return_tensors="pt")["input_ids"]
    with pytest.raises(IndexError):
        AutoModelForCausalLM.from_pretrained(reference.checkpoint(-1))(unknown)

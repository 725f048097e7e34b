import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechhier.models import training
from mechhier.models.run import Run, RunError
from mechhier.models.spec import ModelSpec
from mechhier.models.training import TrainingError, train


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
        warmup, progress = step / 2, (step - 2) / (12 - 2)
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


def test_eval_loss_is_hugging_faces_own_on_the_validation_rows(plan, reference):
    rows = torch.from_numpy(plan.corpus.held_out("validation", tokens=6 * 12).rows(0, 6))
    measured = reference.log.dropna(subset=["eval_loss"])
    assert measured["step"].to_list() == reference.steps
    for step, eval_loss in zip(measured["step"], measured["eval_loss"], strict=True):
        model = AutoModelForCausalLM.from_pretrained(reference.checkpoint(step))
        with torch.no_grad():
            assert eval_loss == pytest.approx(model(rows, labels=rows).loss.item(), abs=1e-5)


def test_a_finished_run_holds_its_checkpoints_and_nothing_to_resume(plan, reference):
    assert reference.steps == training.checkpoint_steps(12, 5)
    assert sorted(path.name for path in reference.path.iterdir()) == ["checkpoints", "log.jsonl", "manifest.json"]
    untrained = plan.spec.build(vocab_size=plan.corpus.grammar.vocab_size, eos_token_id=0, n_ctx=12, seed=0)
    for name, weight in weights(reference, 0).items():
        assert torch.equal(weight, untrained.state_dict()[name])


def test_a_finished_run_is_returned_without_training(plan, reference, monkeypatch):
    before = contents(reference.path)
    monkeypatch.setattr(training, "_Session", None)
    assert train(plan.spec, plan.corpus, reference.path, train=plan.train).steps == reference.steps
    assert contents(reference.path) == before


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
    out, done = tmp_path / "run", []

    def killed_in_the_middle(save):
        def wrapper(data, path):
            done.append(path)
            save(data, path)
            if len(done) == file:
                Path(path).write_bytes(Path(path).read_bytes()[:7])
                raise KilledError

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed_in_the_middle(torch.save))
        with pytest.raises(KilledError):
            train(plan.spec, plan.corpus, out, train=plan.train)
    train(plan.spec, plan.corpus, out, train=plan.train)
    assert contents(out) == contents(reference.path)


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


SLOWED_TRAINING = """
import sys, time
from mechhier.models import training

sys.path.insert(0, sys.argv[1])
from conftest import tiny_plan

write = training.write_whole
training._STATE_SECONDS = training._STATE_SHARE = -1.0
training.write_whole = lambda *args: (time.sleep(0.1), write(*args))  # leaves time to be killed between writes
plan = tiny_plan()
training.train(plan.spec, plan.corpus, sys.argv[2], train=plan.train)
"""


@pytest.mark.slow
def test_after_sigkill_the_same_call_ends_as_if_uninterrupted(plan, reference, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", SLOWED_TRAINING, str(Path(__file__).parent), str(out)])
    pointer, deadline = out / "trainer" / "latest.json", time.monotonic() + 120
    while not (pointer.exists() and json.loads(pointer.read_text())["step"] >= 4):
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(RunError, match="has not finished"):
        Run.open(out)
    train(plan.spec, plan.corpus, out, train=plan.train)
    assert contents(out) == contents(reference.path)


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


def test_a_diverged_training_stops_with_the_last_good_checkpoint(plan, tmp_path):
    settings = plan.train.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(TrainingError, match=r"between steps \d+ and \d+.*last good checkpoint is that of step (\d+)"):
        train(plan.spec, plan.corpus, tmp_path / "run", train=settings)
    for folder in (tmp_path / "run" / "checkpoints").glob("step-*"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "olmo"])
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


def test_batches_are_consecutive_rows_and_wrap_around(plan):
    rows = training._Rows(plan.corpus, 1000)
    everything = plan.corpus.rows(0, 40)
    for start, n in [(0, 4), (36, 8), (77, 6), (38, 90)]:
        indices = list(range(start, start + n))
        assert np.array_equal(rows.__getitems__(indices).numpy(), everything[np.array(indices) % 40])


def test_the_tokenizer_reads_the_grammars_words_and_does_not_invent_others(plan, reference):
    grammar = plan.corpus.grammar
    tokenizer = AutoTokenizer.from_pretrained(reference.checkpoint(-1))
    assert tokenizer(" ".join(grammar.vocabulary))["input_ids"] == list(range(grammar.vocab_size))
    assert tokenizer.decode([0, 3]) == f"{grammar.vocabulary[0]} {grammar.vocabulary[3]}"
    assert tokenizer.eos_token_id == grammar.eos_token_id
    unknown = tokenizer("dragon", return_tensors="pt")["input_ids"]
    with pytest.raises(IndexError):
        AutoModelForCausalLM.from_pretrained(reference.checkpoint(-1))(unknown)

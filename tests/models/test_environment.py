"""What is trained is what the settings say, whatever the environment and torch's process-wide state say."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch_states import STATES, state_of_torch

import mechhier
from mechhier import progress
from mechhier.models.environment import EnvironmentVariableError
from mechhier.models.run import Run
from mechhier.models.training import train

WEIGHTS = "checkpoints/step-000012/model.safetensors"


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


@pytest.mark.parametrize("name", STATES)
def test_training_is_the_same_in_every_state_of_torch_and_leaves_it(plan, reference, tmp_path, name):
    with STATES[name]():
        before = state_of_torch()
        run = train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)
        assert state_of_torch() == before
    assert (run.path / WEIGHTS).read_bytes() == (reference.path / WEIGHTS).read_bytes()
    assert run.log.equals(reference.log)


@pytest.mark.parametrize(
    "variables",
    [
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        {"ACCELERATE_MIXED_PRECISION": "fp8"},
        {"ACCELERATE_DYNAMO_BACKEND": "inductor"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        {"ACCELERATE_GRADIENT_CLIPPING": "0.01"},
        {"ACCELERATE_USE_SAGEMAKER": "true"},
        {"RANK": "0"},
        {"RANK": "1"},
        {"LOCAL_RANK": "0"},
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
    ],
)
def test_the_environment_does_not_change_what_is_trained_and_is_left_as_it_was(
    plan, reference, tmp_path, monkeypatch, capfd, variables
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    run = train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)
    assert dict(os.environ) == before
    assert (run.path / WEIGHTS).read_bytes() == (reference.path / WEIGHTS).read_bytes()
    assert run.manifest.device == "1 x cpu, float32"
    said = capfd.readouterr().err
    for name, value in variables.items():
        assert (f"{name}={value}" in said) == (name.startswith("ACCELERATE"))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE=2: .* one of several .* MASTER_ADDR, RANK are not set"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, "MASTER_ADDR is not set"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2: .* MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, "'two' is no number"),
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP asks accelerate to divide the model"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "ACCELERATE_USE_PARALLELISM_CONFIG"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name_before_anything_is_written(
    plan, reference, tmp_path, monkeypatch, variables, message
):
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        before = dict(os.environ)
        with pytest.raises(EnvironmentVariableError, match=message):
            train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)
        assert dict(os.environ) == before
        assert not (tmp_path / "run").exists()
    run = train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)  # the same process is not spoiled
    assert (run.path / WEIGHTS).read_bytes() == (reference.path / WEIGHTS).read_bytes()


def test_processes_that_do_not_come_together_are_named_and_spoil_nothing(plan, reference, tmp_path, monkeypatch):
    def fail(**_):
        raise RuntimeError("no route to host")

    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr(torch.distributed, "init_process_group", fail)
        with pytest.raises(EnvironmentVariableError, match=r"MASTER_ADDR=nowhere.* did not come together: no route"):
            train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)
        assert not (tmp_path / "run").exists()
    run = train(plan.spec, plan.corpus, tmp_path / "run", train=plan.train)
    assert (run.path / WEIGHTS).read_bytes() == (reference.path / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "1"}, True),
        ({"RANK": "1", "WORLD_SIZE": "1"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
    ],
)
def test_only_a_launchers_rank_silences_a_process(monkeypatch, variables, first):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert progress._first_process() == first


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "n_processes"), [("torch.distributed.run", 2), ("accelerate.commands.launch", 1)])
def test_launched_processes_train_what_one_does(plan, reference, tmp_path, launcher, n_processes):
    """On a CPU accelerate's launcher starts one process, and torch's as many as one likes."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            f"""
            from mechhier.grammars import DocumentGrammar
            from mechhier.models.spec import ModelSpec, TrainSpec
            from mechhier.models.training import train
            train(
                ModelSpec(**{plan.spec.model_dump()!r}),
                DocumentGrammar(n_words=3, n_connectors=2).corpus(tokens=480, context=12),
                {str(tmp_path / "run")!r},
                train=TrainSpec(**{plan.train.model_dump()!r}),
            )
            """
        )
    )
    options = ["--master_port", free_port(), "--nproc_per_node", "2"]
    if n_processes == 1:
        options = ["--cpu", "--num_processes", "1", "--mixed_precision", "bf16", "--dynamo_backend", "no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "bf16"}
    environment["PYTHONPATH"] = str(Path(mechhier.__file__).parents[1])
    command = [sys.executable, "-m", launcher, *options, str(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    run = Run.open(tmp_path / "run")
    assert run.manifest.device == f"{n_processes} x cpu, float32"
    columns = ["loss", "eval_loss", "floor"]
    assert (run.log[columns] - reference.log[columns]).abs().max().max() < 1e-4

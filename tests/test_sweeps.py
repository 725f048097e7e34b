from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import xarray as xr

import mechhier as mh
from mechhier import results, sweeps
from mechhier.files import only_process_in
from mechhier.models.loading import measured_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    grammar = mh.grammars.DocumentGrammar(
        n_words=9,
        n_connectors=2,
        lexicon=4,
        binding=1.0,
        p_chain=1.0,
        n_sections=1,
        n_paragraphs=1,
        n_sentences=12,
        context=40,
    )
    spec = mh.TrainSpec(steps=4, warmup_steps=1, n_checkpoints=3, batch_size=4, eval_rows=4)
    out = tmp_path_factory.mktemp("run")
    return mh.train(mh.ModelSpec("llama", n_layers=2, d_model=16, n_heads=2), grammar.corpus(700), out, train=spec)


@pytest.fixture
def fresh(run, tmp_path):
    """The same run in a folder of its own, without results."""
    shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns("results"))
    return mh.Run.open(tmp_path / "run")


INDUCTION = {"induction": {"n_sequences": 4}}


def test_sweep_stacks_every_checkpoint_along_step(fresh):
    tree = mh.sweep(fresh, {**INDUCTION, "published": {"n_sequences": 2}})
    assert set(tree.children) == {"induction", "published"}
    assert tree["induction"].ds.step.values.tolist() == fresh.steps
    alone = mh.phenomena.induction(fresh.load(-1), n_sequences=4)
    xr.testing.assert_allclose(tree["induction"].ds.isel(step=-1).IND.drop_vars(["step", "weights_hash"]), alone.IND)
    arms = mh.sweep({"a": fresh, "b": fresh}, INDUCTION, steps=[0])
    assert set(arms.children) == {"a", "b"}
    assert arms["a/induction"].ds.attrs["phenomenon"] == "induction"


def test_second_sweep_reads_what_the_first_wrote_and_other_options_are_measured_again(fresh, monkeypatch):
    first = mh.sweep(fresh, INDUCTION)
    calls = []
    measure = sweeps.PHENOMENA["induction"]
    monkeypatch.setitem(
        sweeps.PHENOMENA, "induction", functools.wraps(measure)(lambda *a, **k: calls.append(k) or measure(*a, **k))
    )
    second = mh.sweep(fresh, INDUCTION)
    assert calls == []
    xr.testing.assert_identical(first["induction"].ds, second["induction"].ds)
    mh.sweep(fresh, {"induction": {"n_sequences": 6}}, steps=[0])
    mh.sweep(fresh, {"induction": {"n_sequences": 6}}, steps=[0], seed=1)
    assert len(calls) == 2


def test_a_sweep_says_which_weights_were_measured(fresh):
    tree = mh.sweep(fresh, INDUCTION)
    found = tree["induction"].ds.weights_hash.values.tolist()
    assert found == [measured_weights(fresh.load(step))[0] for step in fresh.steps]
    assert len(set(found)) == len(fresh.steps)  # the first step changed the weights
    results.save(tree, fresh.path / "all.nc")
    assert results.load(fresh.path / "all.nc")["induction"].ds.weights_hash.values.tolist() == found


def test_weights_that_are_not_those_that_were_trained_are_not_measured_and_no_older_result_is_taken_for_theirs(fresh):
    mh.sweep(fresh, INDUCTION)
    first, last = (fresh.checkpoint(step) / "model.safetensors" for step in (0, -1))
    last.write_bytes(first.read_bytes())
    with pytest.warns(sweeps.SweepWarning, match="1 of 3 measurements failed"):
        tree = mh.sweep(fresh, INDUCTION)
    (failure,) = sweeps.failures(tree)
    assert (failure.phenomenon, failure.step) == ("induction", fresh.steps[-1])
    assert "model.safetensors are not there as they were written" in failure.error
    assert tree["induction"].ds.step.values.tolist() == fresh.steps[:-1]


def test_a_truncated_result_is_measured_again(fresh):
    first = mh.sweep(fresh, INDUCTION)
    path = fresh.path / "results" / "induction" / "step-000000.nc"
    path.write_bytes(path.read_bytes()[:2000])
    xr.testing.assert_identical(mh.sweep(fresh, INDUCTION)["induction"].ds, first["induction"].ds)
    assert results.load(path).attrs["phenomenon"] == "induction"


def test_a_failing_checkpoint_is_recorded_and_retried_and_drops_no_other(fresh):
    weights = fresh.checkpoint(fresh.steps[1]) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.warns(sweeps.SweepWarning, match="1 of 3 measurements failed"):
        tree = mh.sweep(fresh, INDUCTION)
    assert tree["induction"].ds.step.values.tolist() == [fresh.steps[0], fresh.steps[2]]
    error = fresh.path / "results" / "induction" / f"step-{fresh.steps[1]:06d}.error.json"
    assert "traceback" in error.read_text()
    weights.write_bytes(whole)
    assert mh.sweep(fresh, INDUCTION)["induction"].ds.step.values.tolist() == fresh.steps
    assert not error.exists()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_results(run, fresh):
    program = textwrap.dedent(
        f"""
        import functools, os, signal
        import mechhier as mh
        from mechhier import results, sweeps
        measure, done = sweeps.PHENOMENA["induction"], []
        @functools.wraps(measure)
        def killed_in_the_second(*args, **kwargs):
            if done:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(1)
            return measure(*args, **kwargs)
        sweeps.PHENOMENA["induction"] = killed_in_the_second
        mh.sweep(mh.Run.open({str(fresh.path)!r}), {INDUCTION!r})
        """
    )
    killed = subprocess.run([sys.executable, "-c", program], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (fresh.path / "results" / "induction").iterdir()] == ["step-000000.nc"]
    resumed, uninterrupted = mh.sweep(fresh, INDUCTION), mh.sweep(run, INDUCTION)
    assert set(resumed["induction"].ds) == set(uninterrupted["induction"].ds)
    for name, values in uninterrupted["induction"].ds.data_vars.items():
        if values.dtype.kind == "U":
            np.testing.assert_array_equal(resumed["induction"].ds[name], values)
        else:
            np.testing.assert_allclose(resumed["induction"].ds[name], values, atol=1e-6)


def test_what_failed_is_listed_in_the_tree_and_in_what_is_saved_of_it_and_leaves_a_gap_in_figures(fresh):
    shutil.rmtree(fresh.checkpoint(fresh.steps[1]))
    steps = fresh.manifest.checkpoint_steps
    with pytest.warns(
        sweeps.SweepWarning, match=r"induction, a step 1: MissingCheckpointError: the checkpoint of step 1 is gone"
    ):
        tree = mh.sweep({"a": fresh}, INDUCTION)
    for found in (tree, results.load(results.save(tree, fresh.path / "all.nc"))):
        (failure,) = sweeps.failures(found)
        assert failure[:3] == ("a", "induction", steps[1])
        assert found["a/induction"].ds.step.values.tolist() == [steps[0], steps[2]]
        for figure in (mh.plot(found), mh.plot(found["a/induction"].to_dataset())):
            lines = [line for line in figure.data if line.mode and "lines" in line.mode and len(line.x) == len(steps)]
            assert lines
            assert all(np.isnan(line.y[1]) for line in lines)


def test_a_checkpoint_that_is_there_again_is_no_failure_any_more(fresh):
    shutil.move(fresh.checkpoint(1), fresh.path / "away")
    with pytest.warns(sweeps.SweepWarning):
        mh.sweep(fresh, INDUCTION)
    shutil.move(fresh.path / "away", fresh.path / "checkpoints" / "step-000001")
    assert sweeps.failures(mh.sweep(fresh, INDUCTION)) == []


@pytest.mark.parametrize(
    "of", [lambda run: run.path, lambda run: str(run.path), lambda run: [run], lambda run: {"x": run.path}]
)
def test_runs_are_given_as_runs_folders_lists_and_mappings(fresh, of):
    tree = mh.sweep(of(fresh), INDUCTION, steps=np.array([0]), seed=np.int64(0))
    (name,) = {"/".join(node.path.strip("/").split("/")[:-1]) for node in tree.subtree if node.data_vars}
    assert name == {list: fresh.manifest.name(fresh.path), dict: "x"}.get(type(of(fresh)), "")


WRONG = [
    (lambda run: mh.sweep(None, ["induction"]), "sweep takes a run .* not nothing"),
    (lambda run: mh.sweep(run.load(0), ["induction"]), "not a HookedTransformer. A model is measured by itself"),
    (lambda run: mh.sweep({}, ["induction"]), "there is no run to sweep"),
    (lambda run: mh.sweep([], ["induction"]), "there is no run to sweep"),
    (lambda run: mh.sweep([run, run], ["induction"]), "several runs are called .*: give a mapping"),
    (lambda run: mh.sweep({"a": 3}, ["induction"]), "sweep takes a run .* not 3"),
    (lambda run: mh.sweep({"a/b": run}, ["induction"]), "'a/b' is no name of an arm"),
    (lambda run: mh.sweep(run.path / "nowhere", ["induction"]), "is not a run"),
    (lambda run: mh.sweep(run, ["inductions"]), "inductions: no such phenomenon; did you mean induction"),
    (lambda run: mh.sweep(run, []), "phenomena must be names"),
    (lambda run: mh.sweep(run, None), "phenomena must be names"),
    (lambda run: mh.sweep(run, {"hydra": {"n_patch": 3}}), "hydra.n_patch: no such option; did you mean n_patches"),
    (lambda run: mh.sweep(run, {"hydra": {"n_patches": "3"}}), "hydra.n_patches: must be a whole number, got '3'"),
    (lambda run: mh.sweep(run, {"hydra": 3}), "hydra: takes options by name, not 3"),
    (lambda run: mh.sweep(run, ["induction"], steps=[3]), "no checkpoint at steps .3.; it has"),
    (lambda run: mh.sweep(run, ["induction"], steps=3), "steps must be a list of steps, not 3"),
    (lambda run: mh.sweep(run, ["induction"], steps="last"), "steps must be a list of steps, not 'last'"),
    (lambda run: mh.sweep(run, ["induction"], steps=["last"]), "steps must be a whole number, got 'last'"),
    (lambda run: mh.sweep(run, ["induction"], seed=-1), "seed must be at least 0"),
    (lambda run: mh.sweep(run, ["induction"], seed=0.5), "seed must be a whole number"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_what_cannot_be_swept_is_refused_before_anything_is_loaded(run, monkeypatch, call, message):
    if "HookedTransformer" not in message:
        monkeypatch.setattr(mh.Run, "load", None)
    with pytest.raises(ValueError, match=message):
        call(run)


def test_what_is_all_there_is_read_without_the_lock_as_from_a_folder_that_cannot_be_written(fresh, monkeypatch):
    first = mh.sweep(fresh, INDUCTION)
    for writes in ("only_process_in", "make_folder", "write_whole"):
        monkeypatch.setattr(sweeps, writes, None)
    xr.testing.assert_identical(mh.sweep(fresh, INDUCTION)["induction"].ds, first["induction"].ds)


def test_a_run_in_which_another_process_measures_is_refused(fresh):
    with (
        only_process_in(fresh.path / "results", otherwise=ValueError()),
        pytest.raises(sweeps.SweepError, match=r"another process is measuring in .*: wait for it"),
    ):
        mh.sweep(fresh, INDUCTION)


def test_what_is_undefined_is_said_once_for_all_checkpoints(fresh):
    with pytest.warns(mh.results.MeasurementWarning) as said:
        mh.sweep(fresh, {"hydra": {"min_probability": 0.999, "n_sequences": 6, "n_null": 0}})
    (one,) = [each for each in said if issubclass(each.category, mh.results.MeasurementWarning)]
    assert re.match(
        r"3 of 3 measurements hold NaN, the first of them \(hydra, step 0\): hydra: no position", str(one.message)
    )
    assert one.filename == __file__

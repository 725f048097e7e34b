from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import xarray as xr

import mechhier as mh
from mechhier import results, sweeps
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
    import shutil

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
    monkeypatch.setitem(sweeps.PHENOMENA, "induction", lambda *a, **k: calls.append(k) or measure(*a, **k))
    second = mh.sweep(fresh, INDUCTION)
    assert calls == []
    xr.testing.assert_identical(first["induction"].ds, second["induction"].ds)
    mh.sweep(fresh, {"induction": {"n_sequences": 6}}, steps=[0])
    mh.sweep(fresh, {"induction": {"n_sequences": 6}}, steps=[0], seed=1)
    assert len(calls) == 2


def test_a_sweep_says_which_weights_were_measured_and_measures_others_again(fresh):
    tree = mh.sweep(fresh, INDUCTION)
    found = tree["induction"].ds.weights_hash.values.tolist()
    assert found == [measured_weights(fresh.load(step))[0] for step in fresh.steps]
    assert len(set(found)) == len(fresh.steps)  # the first step changed the weights
    results.save(tree, fresh.path / "all.nc")
    saved = xr.load_datatree(fresh.path / "all.nc", engine="h5netcdf")
    assert saved["induction"].ds.weights_hash.values.tolist() == found
    first, last = (fresh.checkpoint(step) / "model.safetensors" for step in (0, -1))
    last.write_bytes(first.read_bytes())
    again = mh.sweep(fresh, INDUCTION)["induction"].ds.weights_hash.values.tolist()
    assert again == [*found[:-1], found[0]]


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
        import os, signal
        import mechhier as mh
        from mechhier import results, sweeps
        measure, done = sweeps.PHENOMENA["induction"], []
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


@pytest.mark.parametrize(
    ("phenomena", "options", "message"),
    [
        (["inductions"], {}, "unknown phenomena .'inductions'.: choose from induction"),
        (["induction"], {"steps": [3]}, "no checkpoint at steps .3.; it has"),
    ],
)
def test_what_cannot_be_swept_is_refused(run, phenomena, options, message):
    with pytest.raises(ValueError, match=message):
        mh.sweep(run, phenomena, **options)

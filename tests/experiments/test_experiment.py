from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import xarray as xr
import yaml
from typer.testing import CliRunner

from mechhier import results
from mechhier.cli import app
from mechhier.experiments import Experiment
from mechhier.files import only_process_in
from mechhier.grammars import AnyGrammar, FittedNGram, cfg3, random_hierarchy
from mechhier.grammars.families import FAMILIES
from mechhier.models import Run
from mechhier.models.run import weights_sha256
from mechhier.specs import SpecError
from mechhier.sweeps import failures

ARM = {
    "title": "A pool",
    "about": "A pool of lexicons.",
    "grammar": {
        "kind": "document",
        "n_words": 9,
        "n_connectors": 2,
        "lexicon": 4,
        "binding": 1.0,
        "p_chain": 1.0,
        "n_sections": 1,
        "n_paragraphs": 1,
        "n_sentences": 12,
        "context": 40,
    },
    "train": {"steps": 6, "warmup_steps": 1, "n_checkpoints": 3, "batch_size": 4, "eval_rows": 4},
}
TINY = {
    "title": "Tiny",
    "arms": {"pool": ARM, "ngram": {**ARM, "grammar": {"kind": "ngram", "n_tokens": 40, "context": 40}}},
    "model": {"architecture": "llama", "n_layers": 2, "d_model": 16, "n_heads": 2},
    "phenomena": {
        "induction": {"n_sequences": 4},
        "function_vectors": {"n_tasks": 3, "n_prompts": 3},
        "hydra": {"n_sequences": 6, "n_patches": 3, "min_probability": 0.0},
        "published": {"n_sequences": 4},
    },
}


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.mark.slow
def test_one_command_leaves_report_and_results_and_says_where(spec, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["run", str(spec), "--out", str(out)])
    assert result.exit_code == 0, result.output
    page = (out / "report.html").read_text()
    for text in ("Induction heads", "Hydra effect", "Function vectors", "uniform attention", "random directions"):
        assert text in page
    tree = xr.open_datatree(out / "results.nc", engine="h5netcdf")
    assert {arm: set(tree[arm].children) for arm in tree.children} == {
        arm: set(TINY["phenomena"]) for arm in TINY["arms"]
    }
    assert tree["pool/hydra"].ds.identity_error.max() < 1e-4
    again = CliRunner().invoke(app, ["run", str(spec), "--out", str(out)])
    assert again.exit_code == 0, again.output
    xr.testing.assert_identical(results.load(out / "results.nc"), tree.load())

    # A damaged last checkpoint is a failure of all its measurements, and its neighbour does not stand for it.
    weights = out / "pool" / "run" / "checkpoints" / "step-000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    failed = CliRunner().invoke(app, ["run", str(spec), "--out", str(out)])
    assert failed.exit_code == 3, failed.output
    assert "4 measurements failed; the same command tries them again:" in failed.output
    assert "hydra, pool step 6: ModelLoadError" in failed.output
    assert {failure.phenomenon for failure in failures(results.load(out / "results.nc"))} == set(TINY["phenomena"])
    page = (out / "report.html").read_text()
    assert "Failed measurements" in page
    assert page.count("There is no measurement at the end of pool: it failed") == 4
    for name in TINY["phenomena"]:
        assert (out / "pool" / "run" / "results" / name / "step-000006.error.json").is_file()

    # Another experiment is refused, and nothing is touched; other words and phenomena are the same one.
    other = copy.deepcopy(TINY)
    other["arms"]["ngram"]["train"]["steps"] = 5
    spec.write_text(yaml.safe_dump(other))
    refused = CliRunner().invoke(app, ["run", str(spec), "--out", str(out)])
    assert refused.exit_code == 1
    assert "holds another experiment" in refused.output
    assert "trainings.ngram.train.steps: 6 -> 5" in refused.output
    spec.write_text(yaml.safe_dump({**TINY, "title": "Other words", "phenomena": {"published": {"n_sequences": 4}}}))
    with only_process_in(out, otherwise=ValueError()):
        busy = CliRunner().invoke(app, ["run", str(spec), "--out", str(out)])
        assert busy.exit_code == 1
        assert "another process is working in" in busy.output
    assert CliRunner().invoke(app, ["run", str(spec), "--out", str(out)]).exit_code == 3


@pytest.mark.slow
def test_sigkill_and_the_same_command_give_the_results_of_an_uninterrupted_one(spec, tmp_path):
    """Killed once in training and once in the sweep, by a hook in the process that does the work."""
    program = (
        "import functools, os, signal, sys\n"
        "import mechhier.sweeps as sweeps, mechhier.models.training as training\n"
        "where = sys.argv.pop(1)\n"
        "die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if where == 'training':\n"
        "    loss, calls = training.cross_entropy, []\n"
        "    training.cross_entropy = lambda *a, **k: die() if len(calls) > 6 else calls.append(1) or loss(*a, **k)\n"
        "elif where == 'sweep':\n"
        "    sweeps.PHENOMENA['hydra'] = functools.wraps(sweeps.PHENOMENA['hydra'])(die)\n"
        "from mechhier.cli import app\n"
        "app()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(where, out):
        arguments = [sys.executable, "-c", program, where, "run", str(spec), "--out", str(out)]
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)

    assert command("training", tmp_path / "killed").returncode == -signal.SIGKILL
    assert command("sweep", tmp_path / "killed").returncode == -signal.SIGKILL
    for out in ("killed", "whole"):
        finished = command("nowhere", tmp_path / out)
        assert finished.returncode == 0, finished.stderr
    for arm in TINY["arms"]:
        weights = [
            (tmp_path / out / arm / "run" / "checkpoints" / "step-000006" / "model.safetensors").read_bytes()
            for out in ("killed", "whole")
        ]
        assert weights[0] == weights[1]
    trees = [xr.load_datatree(tmp_path / out / "results.nc", engine="h5netcdf") for out in ("killed", "whole")]
    xr.testing.assert_identical(*trees)


@pytest.mark.slow
def test_several_seeds_are_trained_apart_and_stand_side_by_side_in_the_report(tmp_path):
    spec = {**TINY, "seeds": [3, 5], "phenomena": {"induction": {"n_sequences": 4}}}
    path, out = tmp_path / "tiny.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(spec))
    options = ["--out", str(out), "--only", "pool_seed5", "--report-to", "tensorboard"]
    only = CliRunner().invoke(app, ["train", str(path), *options])
    assert only.exit_code == 0, only.output
    assert list((out / "pool_seed5" / "run" / "tensorboard").iterdir())
    assert [folder.name for folder in out.iterdir()] == ["pool_seed5"]
    wrong = CliRunner().invoke(app, ["train", str(path), "--out", str(out), "--only", "pool"])
    assert wrong.exit_code == 1
    assert "choose from ngram_seed3, ngram_seed5, pool_seed3, pool_seed5" in wrong.output
    result = CliRunner().invoke(app, ["run", str(path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    runs = {seed: Run.open(out / f"pool_seed{seed}" / "run") for seed in (3, 5)}
    for seed, run in runs.items():
        assert (run.train_spec.seed, run.corpus.seed) == (seed, seed)
    assert weights_sha256(runs[3].checkpoint(0)) != weights_sha256(runs[5].checkpoint(0))
    assert runs[3].manifest.text_sha256 != runs[5].manifest.text_sha256
    assert [run.grammar.language_seed for run in runs.values()] == [3, 5]
    assert "ngram_seed5" in (out / "report.html").read_text()
    result = xr.open_datatree(out / "results.nc", engine="h5netcdf")["pool_seed5/induction"].ds
    assert (result.attrs["model"], result.attrs["arm"], result.attrs["training_seed"]) == ("pool_seed5", "pool", 5)
    assert len(set(result.weights_hash.values)) == result.sizes["step"]


def test_packaged_demo_is_valid_and_reads_nothing_twice():
    demo = Experiment.read("demo")
    assert list(demo.arms) == ["pool", "per_document", "fixed", "ngram"]
    for arm, training in demo.trainings.items():
        corpus = demo.trainings[arm].corpus()
        assert corpus.grammar == demo.arms[arm].grammar  # the language as it is written
        assert corpus.n_tokens == training.arm.train.steps * training.arm.train.batch_size * corpus.grammar.context


LANGUAGES = {
    "fixed": {"kind": "document", "n_words": 9, "n_connectors": 2, "lexicon": "fixed", "context": 40},
    "pool": {"kind": "document", "n_words": 9, "n_connectors": 2, "lexicon": 4, "context": 40, "language_seed": 7},
    "ngram": {"kind": "ngram", "n_tokens": 40, "context": 40},
    "cfg3": {"kind": "cfg3", "n_levels": 3, "seed": 4},
    "random_hierarchy": {"kind": "random_hierarchy", "context": 64},
}
NOTHING_DRAWN = {
    "per_document": {"kind": "document", "n_words": 9, "n_connectors": 2, "lexicon": "per_document", "context": 40},
    "dyck": {"kind": "dyck", "context": 40},
    "pcfg": {"kind": "pcfg", "start": "S", "terminals": ["a"], "rules": [["S", ["a"], 1.0]]},
}


def experiment_of(languages, **fields):
    arms = {name: {**ARM, "grammar": grammar} for name, grammar in languages.items()}
    return Experiment.model_validate({**TINY, "arms": arms, **fields})


def law(grammar, arm):
    """What a language says of the next token, on text of the arm's language as it is written."""
    written = experiment_of(LANGUAGES | NOTHING_DRAWN).arms[arm].grammar
    return grammar.next_token_probabilities(written.corpus(80, context=40).rows(0, 2))


@pytest.mark.parametrize("arm", LANGUAGES)
def test_every_seed_draws_the_language_anew_and_seed_0_is_the_language_as_written(arm):
    experiment = experiment_of(LANGUAGES, seeds=[0, 1, 2])
    written = experiment.arms[arm].grammar
    languages = [experiment.trainings[f"{arm}_seed{seed}"].corpus().grammar for seed in (0, 1, 2)]
    assert languages[0] == written
    if not arm.startswith("random") and arm != "cfg3":
        assert languages[2] == written.model_copy(update={"language_seed": written.language_seed + 2})
        assert not np.allclose(law(languages[1], arm), law(languages[0], arm))
        assert not np.allclose(law(languages[1], arm), law(languages[2], arm))
    else:
        family = {"cfg3": cfg3, "random_hierarchy": random_hierarchy}[arm]
        options = {name: value for name, value in LANGUAGES[arm].items() if name != "kind"}
        assert languages[2] == family(**options | {"seed": options.get("seed", 0) + 2})
        assert len({language.rules for language in languages}) == 3
    shared = experiment_of(LANGUAGES, seeds=[0, 1, 2], vary_language=False)
    assert all(shared.trainings[f"{arm}_seed{seed}"].corpus().grammar == written for seed in (0, 1, 2))


@pytest.mark.parametrize("arm", NOTHING_DRAWN)
def test_a_language_that_draws_nothing_is_the_same_for_all_seeds(arm):
    experiment = experiment_of(NOTHING_DRAWN, seeds=[0, 1])
    trainings = [experiment.trainings[f"{arm}_seed{seed}"] for seed in (0, 1)]
    assert [training.language_seed for training in trainings] == [None, None]
    assert [training.corpus().seed for training in trainings] == [0, 1]
    assert {training.corpus().grammar == experiment.arms[arm].grammar for training in trainings} == {True}
    if arm == "per_document":
        other = experiment.arms[arm].grammar.model_copy(update={"language_seed": 1})
        np.testing.assert_array_equal(law(other, arm), law(experiment.arms[arm].grammar, arm))


def test_every_kind_of_grammar_and_every_family_is_among_those():
    kinds = {grammar["kind"] for grammar in (*LANGUAGES.values(), *NOTHING_DRAWN.values())}
    every = {cls.model_fields["kind"].default for cls in get_args(get_args(AnyGrammar)[0])} | set(FAMILIES)
    assert kinds == every - {"fitted_ngram"}  # a table that was counted: there is nothing to draw
    assert not FittedNGram.is_drawn.fget(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.update(sed=3), "sed: no such field; did you mean seeds"),
        (lambda spec: spec["model"].update(layers=3), "model.layers: no such field; did you mean n_layers"),
        (
            lambda spec: spec["arms"]["pool"]["grammar"].update(n_word=3),
            "pool.grammar.n_word: no such field; did you mean n_words",
        ),
        (lambda spec: spec["arms"]["pool"]["grammar"].update(n_words=0), "at least 1"),
        (lambda spec: spec["arms"]["pool"]["train"].pop("steps"), "train.steps is required"),
        (lambda spec: spec["arms"]["pool"]["train"].update(seed=1), "train.seed is given by the experiment's seeds"),
        (lambda spec: spec.update(seeds=[1, 1]), "seeds=.1, 1. repeat"),
        (lambda spec: spec.update(seeds=[]), "seeds: must have at least 1 items"),
        (lambda spec: spec["phenomena"].update(hidra={}), "phenomena.hidra: no such phenomenon; did you mean hydra"),
        (
            lambda spec: spec["phenomena"]["hydra"].update(n_patch=3),
            "hydra.n_patch: no such option; did you mean n_patches",
        ),
        (
            lambda spec: spec["phenomena"]["hydra"].update(seed=3),
            "phenomena.hydra.seed: no such option; there are level",
        ),
        (lambda spec: spec["arms"].update({"../x": ARM}), "letters, digits and underscores"),
        (lambda spec: spec.pop("model"), "model: is missing"),
    ],
)
def test_every_field_is_used_or_refused(tmp_path, change, message):
    spec = copy.deepcopy(TINY)
    change(spec)
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    with pytest.raises(SpecError, match=message):
        Experiment.read(path)
    result = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_missing_files_and_other_text_are_refused(tmp_path):
    with pytest.raises(SpecError, match=r"no packaged experiment of that name \(demo\)"):
        Experiment.read("demos")
    path = tmp_path / "spec.yaml"
    path.write_text("[1, 2")
    with pytest.raises(SpecError, match="is not YAML"):
        Experiment.read(path)
    path.write_text("- 1")
    with pytest.raises(SpecError, match="must hold the fields title, seeds, vary_language, arms"):
        Experiment.read(path)


def test_yaml_cannot_make_python_objects(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("title: !!python/object/apply:os.getcwd []")
    with pytest.raises(SpecError, match=r"line 1: the tag !!python/object/apply:os\.getcwd: tags are not read"):
        Experiment.read(path)

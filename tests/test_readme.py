"""README's Python and the spec in docs/training.md do what they say, at a size for a laptop."""

import importlib.metadata
import re
from pathlib import Path

import pytest

import mechhier as mh
from mechhier.experiments import Experiment

ROOT = Path(__file__).parents[1]

# What README says, and what runs here instead. Each must occur in README: one who changes README sees it here.
SMALLER = {
    "n_words=30,": "n_words=6,",
    "context=192)": "context=64)",
    "tokens=3_000_000,": "tokens=64 * 200,",
    "n_layers=2, d_model=64, n_heads=4),": "n_layers=2, d_model=16, n_heads=2),",
    'out="runs/pcfg")': 'out="runs/pcfg", train=mh.TrainSpec(steps=4, batch_size=4, n_checkpoints=2, eval_rows=8))',
    "mh.phenomena.induction(model)": "mh.phenomena.induction(model, n_sequences=8)",
    "mh.phenomena.hydra(model, n_sequences=24)": "mh.phenomena.hydra(model, n_sequences=4, min_probability=0.0)",
    'mh.sweep(run, ["induction"])': 'mh.sweep(run, {"induction": {"n_sequences": 8}})',
    "mh.phenomena.hydra(olmo)": "mh.phenomena.hydra(olmo, n_sequences=4, min_probability=0.0)",
    '"allenai/OLMo-1B-hf"': '"mirror/OLMo-1B-hf"',
}


def blocks(path, language):
    """The fenced blocks of a language in a Markdown file."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / path).read_text(encoding="utf-8"), flags=re.M | re.S)


def smaller(code):
    for said, instead in SMALLER.items():
        assert code.count(said) == 1, f"README no longer says {said} once: change SMALLER"
        code = code.replace(said, instead)
    return code


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """The working folder, with a tiny OLMo in the place of the one on the hub."""
    monkeypatch.chdir(tmp_path)
    olmo = mh.ModelSpec("olmo", n_layers=2, d_model=16, n_heads=2).build(vocab_size=40, eos_token_id=0, n_ctx=128)
    olmo.save_pretrained(tmp_path / "mirror" / "OLMo-1B-hf" / "step1000-tokens4B")


@pytest.mark.slow
@pytest.mark.usefixtures("mirror")
def test_python_of_readme_runs_block_after_block_in_one_namespace():
    code = smaller("\n".join(blocks("README.md", "python")))
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["run"].path.samefile("runs/pcfg")
    assert names["result"].sizes


def test_hooked_transformer_of_readme_is_in_transformer_lens_3_alone():
    """README names `HookedTransformer.from_pretrained`; gpt2 itself is not fetched here."""
    assert "HookedTransformer.from_pretrained(" in (ROOT / "README.md").read_text(encoding="utf-8")
    version = importlib.metadata.version("transformer_lens")
    if int(version.split(".")[0]) >= 4:
        pytest.skip(f"TransformerLens {version} has no HookedTransformer, as README says")
    from transformer_lens import HookedTransformer

    assert callable(HookedTransformer.from_pretrained)


def test_spec_of_the_training_page_is_read(tmp_path):
    (spec,) = blocks("docs/training.md", "yaml")
    path = tmp_path / "spec.yaml"
    path.write_text(spec, encoding="utf-8")
    assert len(Experiment.read(path).trainings) == 6

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mechhier.models.spec import ModelSpec, TrainSpec, checkpoint_steps
from mechhier.specs import SpecError

ARCHITECTURES = ["llama", "gpt2", "gpt_neox", "olmo", "olmo2"]


def tiny(architecture, **sizes):
    return ModelSpec(architecture, **{"n_layers": 2, "d_model": 32, "n_heads": 4, **sizes})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_build_makes_the_described_model(architecture):
    model = tiny(architecture, d_mlp=40).build(vocab_size=11, n_ctx=16, eos_token_id=10, seed=3)
    config = model.config
    assert config.model_type == architecture
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 32, 4)
    assert (config.vocab_size, config.max_position_embeddings) == (11, 16)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (10, None, None)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} <= {0.0}
    widths = {w.shape for name, w in model.named_parameters() if "mlp" in name and w.ndim == 2}
    assert {frozenset(shape) for shape in widths} == {frozenset({32, 40})}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_are_counted_without_building(architecture):
    spec = tiny(architecture)
    model = spec.build(vocab_size=11, n_ctx=16, eos_token_id=10)
    assert spec.n_parameters(11, n_ctx=16) == sum(p.numel() for p in model.parameters())


def test_parameter_count_of_llama_in_closed_form():
    vocab, d, d_mlp, layers, d_kv = 11, 32, 48, 3, 16
    attention, mlp, norms = 2 * d * d + 2 * d * d_kv, 3 * d * d_mlp, 2 * d
    spec = ModelSpec("llama", n_layers=layers, d_model=d, n_heads=4, n_key_value_heads=2, d_mlp=d_mlp)
    assert spec.n_parameters(vocab) == 2 * vocab * d + layers * (attention + mlp + norms) + d


def test_a_checkpoint_takes_the_bytes_that_the_spec_says(tmp_path):
    spec = tiny("olmo2", n_key_value_heads=2)
    spec.build(vocab_size=11, n_ctx=16, eos_token_id=10).save_pretrained(tmp_path)
    assert spec.n_bytes(11) == sum(w.nbytes for w in load_file(tmp_path / "model.safetensors").values())
    assert spec.n_bytes(11, dtype=torch.bfloat16) == spec.n_bytes(11) / 2


def test_presets_are_the_papers_and_a_tiny_model_and_can_be_changed():
    paper = ModelSpec(preset="paper")
    assert paper == ModelSpec("llama", n_layers=16, d_model=256, n_heads=4, d_mlp=1024, n_ctx=512)
    assert ModelSpec.model_validate({"preset": "tiny", "n_layers": 3}) == ModelSpec(
        "llama", n_layers=3, d_model=64, n_heads=4
    )
    assert ModelSpec("gpt2", preset="tiny").architecture == "gpt2"
    with pytest.raises(SpecError, match="no preset 'huge': choose from tiny, paper"):
        ModelSpec(preset="huge")


def test_weights_depend_on_the_seed_alone_and_leave_the_callers_random_state():
    spec, sizes = tiny("llama"), {"vocab_size": 11, "n_ctx": 16, "eos_token_id": 10}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = spec.build(**sizes, seed=1).lm_head.weight
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, spec.build(**sizes, seed=1).lm_head.weight)
    assert not torch.equal(first, spec.build(**sizes, seed=2).lm_head.weight)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_embedding_row_is_trained(architecture):
    model = tiny(architecture).build(vocab_size=11, n_ctx=16, eos_token_id=10)
    tokens = torch.arange(11)[None]
    model(tokens).logits.square().sum().backward()
    assert (model.get_input_embeddings().weight.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 30}, "divisible by n_heads"),
        ({"d_model": 12}, "in pairs"),
        ({"architecture": "gpt_neox", "d_model": 8}, "8 or more"),
        ({"architecture": "gpt_neox", "d_model": 48}, "in pairs"),
        ({"architecture": "olmo", "n_key_value_heads": 2}, "applies to llama and olmo2"),
        ({"n_key_value_heads": 3}, "must divide"),
        ({"n_layers": 0}, "at least 1"),
        ({"architecture": "mamba"}, "'llama', 'gpt2', 'gpt_neox', 'olmo' or 'olmo2'"),
        ({"width": 3}, "width: no such field"),
    ],
)
def test_impossible_shapes_are_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        ModelSpec(**{"architecture": "llama", "n_layers": 1, "d_model": 32, "n_heads": 4, **fields})


def test_a_missing_architecture_is_reported_like_any_missing_field():
    with pytest.raises(SpecError, match="architecture: is missing"):
        ModelSpec(n_layers=1, d_model=8, n_heads=2)


def test_an_open_context_must_be_given():
    with pytest.raises(ValueError, match="n_ctx is open"):
        tiny("gpt2").build(vocab_size=11, eos_token_id=10)
    with pytest.raises(ValueError, match="n_ctx is open"):
        tiny("gpt2").n_parameters(11)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_specs_survive_json(architecture):
    spec = tiny(architecture, n_ctx=64)
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"betas": (0.9, 1.0)},
        {"final_lr_fraction": 1.5},
        {"n_checkpoints": 1},
        {"steps": 50, "warmup_steps": 50},
        {"steps": 50, "warmup_steps": 5, "checkpoints_at": (51,)},
        {"checkpoints_at": (-1,)},
        {"batch_size": 6, "gradient_accumulation": 4},
        {"precision": "float16"},
        {"eval_rows": 1},
        {"scheduler": "linear"},
    ],
)
def test_impossible_training_is_refused(fields):
    with pytest.raises(SpecError):
        TrainSpec(**fields)


@given(steps=st.integers(1, 10**6), n=st.integers(2, 200))
def test_checkpoints_begin_untrained_end_trained_and_are_never_more_than_asked(steps, n):
    grid = checkpoint_steps(steps, n)
    assert grid[0] == 0
    assert grid[-1] == steps
    assert grid == sorted(set(grid))
    assert len(grid) <= n
    if steps >= 100 * n * n:  # far enough apart that rounding makes none coincide
        assert len(grid) == n


def test_checkpoints_are_spaced_in_log_to_a_tenth_of_training_then_evenly():
    grid = checkpoint_steps(100_000, 12)
    early, late = grid[1:6], grid[5:]
    assert (early[0], early[-1]) == (1_000, 10_000)
    ratios = [b / a for a, b in pairwise(early)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-3)
    assert {b - a for a, b in pairwise(late)} == {15_000}


@pytest.mark.parametrize(("steps", "n"), [(0, 5), (10, 1)])
def test_an_empty_grid_is_refused(steps, n):
    with pytest.raises(ValueError, match="must be at least"):
        checkpoint_steps(steps, n)

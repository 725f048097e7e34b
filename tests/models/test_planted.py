import pytest
import torch

from mechhier.models.loading import load_model
from mechhier.models.planted import planted_duplicate, planted_induction, planted_inert

LENGTH = 12


def repeated_tokens(vocab_size: int) -> torch.Tensor:
    """Rows r r with distinct tokens in r, so that every token has one earlier copy."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(vocab_size, generator=generator)[:LENGTH] for _ in range(5)])
    return torch.cat([rows, rows], dim=1)


def hf_attentions(planted, tokens):
    """Hugging Face's own attention, [layer][batch, head, query, key]."""
    planted.model.set_attn_implementation("eager")
    with torch.no_grad():
        return planted.model(tokens, output_attentions=True).attentions


def scores(pattern: torch.Tensor) -> dict[str, float]:
    query = torch.arange(LENGTH, 2 * LENGTH)
    later = torch.arange(1, 2 * LENGTH)
    return {
        "IND": pattern[:, query, query - LENGTH + 1].mean().item(),
        "DUP": pattern[:, query, query - LENGTH].mean().item(),
        "PREV": pattern[:, later, later - 1].mean().item(),
    }


@pytest.fixture(params=[(16, 24), (320, 128)], ids=["small", "default"])
def sizes(request):
    return request.param


def test_induction_head_attends_to_the_token_after_the_earlier_copy(sizes):
    planted = planted_induction(*sizes)
    attentions = hf_attentions(planted, repeated_tokens(sizes[0]))
    layer, head = planted.heads["induction"]
    measured = scores(attentions[layer][:, head])
    assert measured["IND"] == pytest.approx(planted.expected["IND"], abs=1e-6)
    assert measured["DUP"] == pytest.approx(planted.expected["DUP"], abs=1e-6)
    layer, head = planted.heads["previous_token"]
    assert scores(attentions[layer][:, head])["PREV"] == pytest.approx(planted.expected["PREV"], abs=1e-6)


def test_induction_model_predicts_the_repeat(sizes):
    tokens = repeated_tokens(sizes[0])
    with torch.no_grad():
        prediction = planted_induction(*sizes).model(tokens).logits.argmax(-1)
    assert torch.equal(prediction[:, LENGTH:-1], tokens[:, LENGTH + 1 :])


def test_induction_head_shares_its_attention_among_several_copies():
    planted = planted_induction(8, 16)
    pattern = hf_attentions(planted, torch.tensor([[3, 1, 3, 2, 5, 3]]))[1][0, 0]
    assert pattern[-1, [1, 3]].tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


def test_induction_head_ignores_the_first_position_which_has_no_previous_token():
    planted = planted_induction(8, 16)
    pattern = hf_attentions(planted, torch.tensor([[0, 1, 2, 3, 4]]))[1][0, 0]
    assert pattern[4].tolist() == pytest.approx([0, 0.25, 0.25, 0.25, 0.25], abs=1e-6)


def test_duplicate_head_attends_to_earlier_copies_and_never_to_itself(sizes):
    planted = planted_duplicate(*sizes)
    layer, head = planted.heads["duplicate_token"]
    pattern = hf_attentions(planted, repeated_tokens(sizes[0]))[layer][:, head]
    measured = scores(pattern)
    assert measured["DUP"] == pytest.approx(planted.expected["DUP"], abs=1e-6)
    assert measured["IND"] == pytest.approx(planted.expected["IND"], abs=1e-6)
    assert pattern.diagonal(dim1=1, dim2=2)[:, 1:].max() < 1e-6


def test_inert_model_attends_uniformly_and_writes_nothing(sizes):
    planted = planted_inert(*sizes)
    tokens = repeated_tokens(sizes[0])
    uniform = torch.ones(2 * LENGTH, 2 * LENGTH).tril() / torch.arange(1, 2 * LENGTH + 1)[:, None]
    for attention in hf_attentions(planted, tokens):
        torch.testing.assert_close(attention, uniform.expand_as(attention), atol=1e-6, rtol=0)
    with torch.no_grad():
        prediction = planted.model(tokens).logits.argmax(-1)
    assert torch.equal(prediction, tokens)


@pytest.mark.parametrize("make", [planted_induction, planted_duplicate, planted_inert])
def test_planted_models_load_as_hooked_models_with_the_same_attention(make):
    planted = make(16, 24)
    tokens = repeated_tokens(16)
    expected = hf_attentions(planted, tokens)
    _, cache = load_model(planted.model).run_with_cache(tokens)
    for layer, attention in enumerate(expected):
        torch.testing.assert_close(cache[f"blocks.{layer}.attn.hook_pattern"], attention, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("vocab_size", "n_ctx"), [(1, 8), (8, 1), (0, 0)])
def test_sizes_without_a_past_or_a_choice_are_refused(vocab_size, n_ctx):
    with pytest.raises(ValueError, match="at least 2"):
        planted_induction(vocab_size, n_ctx)

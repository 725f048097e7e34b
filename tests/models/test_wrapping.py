"""Conversion without a copy: what the hooked model shares with the Hugging Face model, and what it must not share."""

from __future__ import annotations

import copy

import pytest
import torch
from random_models import (
    ARCHITECTURES,
    BRIDGE_ONLY,
    HAS_HOOKED_TRANSFORMER,
    VARIANTS,
    random_hf,
    random_tokens,
)
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, Olmo2ForCausalLM

from mechhier.models.errors import UnsupportedModelError
from mechhier.models.wrapping import to_bridge, to_hooked_transformer

needs_hooked_transformer = pytest.mark.skipif(
    not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has only the bridge"
)
TIED = [name for name in ARCHITECTURES | VARIANTS if name.endswith("-tied") or name in ("gpt2", "gpt2-scaled-by-layer")]


def storages(parameters):
    return {parameter.untyped_storage().data_ptr() for parameter in parameters}


@needs_hooked_transformer
@pytest.mark.parametrize("architecture", ARCHITECTURES | VARIANTS)
def test_weights_are_not_copied_but_a_tied_unembedding(architecture):
    hf = random_hf(architecture)
    hooked = to_hooked_transformer(hf)
    # Vectors that Hugging Face does not have are made anew: zero biases, and gains of one.
    matrices = {name: p for name, p in hooked.named_parameters() if "W_" in name}
    own = {name for name, p in matrices.items() if p.untyped_storage().data_ptr() not in storages(hf.parameters())}
    assert own == ({"unembed.W_U"} if architecture in TIED else set())
    assert len(matrices) >= 3 * 6


@needs_hooked_transformer
@pytest.mark.parametrize("architecture", ARCHITECTURES | VARIANTS)
def test_an_edit_of_one_parameter_changes_no_other(architecture):
    parameters = list(to_hooked_transformer(random_hf(architecture)).parameters())
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in parameters)
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            parameter.fill_(index)
    assert all((parameter == index).all() for index, parameter in enumerate(parameters))


@needs_hooked_transformer
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_equal_hugging_faces_and_stay_in_the_hooked_model(architecture):
    hf, tokens = random_hf(architecture), random_tokens()
    twin = copy.deepcopy(hf)
    twin(tokens).logits.square().sum().backward()
    hooked = to_hooked_transformer(hf)
    hooked(tokens).square().sum().backward()
    assert all(parameter.grad is None for parameter in hf.parameters())
    W_E, W_U = hooked.embed.W_E.grad, hooked.unembed.W_U.grad
    if architecture == "llama":
        grad = twin.model.layers[1].self_attn.o_proj.weight.grad
        ours = hooked.blocks[1].attn.W_O.grad.flatten(0, 1).T
        torch.testing.assert_close(ours, grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item())
    else:
        # The gradient of a tied matrix is that of its two uses together.
        grad = twin.transformer.wte.weight.grad
        torch.testing.assert_close(W_E + W_U.T, grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item())


@needs_hooked_transformer
@pytest.mark.parametrize("architecture", ["gpt2", "llama-gqa", "olmo2"])
def test_a_copy_is_independent_and_a_cast_reaches_every_weight(architecture):
    tokens = random_tokens()
    hooked = to_hooked_transformer(random_hf(architecture))
    expected = hooked(tokens)
    assert not storages(copy.deepcopy(hooked).parameters()) & storages(hooked.parameters())
    double = copy.deepcopy(hooked).to(torch.float64, print_details=False)
    assert {parameter.dtype for parameter in double.parameters()} == {torch.float64}
    with torch.no_grad():
        torch.testing.assert_close(double(tokens).float(), expected, atol=1e-4, rtol=0)
        for parameter in double.parameters():
            parameter.zero_()
        torch.testing.assert_close(hooked(tokens), expected, atol=0, rtol=0)


@needs_hooked_transformer
@pytest.mark.parametrize("architecture", ["olmo", "gpt2"])
def test_everything_is_on_the_device_of_the_weights(architecture):
    """The meta device stands in for an accelerator: converters make some biases, and rotary tables, on the CPU."""
    hooked = to_hooked_transformer(random_hf(architecture).to("meta"))
    tensors = dict(hooked.named_parameters()) | dict(hooked.named_buffers())
    assert {name for name, tensor in tensors.items() if tensor.device.type != "meta"} == set()
    assert torch.device(hooked.cfg.device).type == "meta"


@needs_hooked_transformer
def test_tied_embeddings_are_two_parameters_of_a_hooked_transformer():
    """Otherwise folding the final norm into the unembedding would change what every token reads."""
    hooked, tokens = to_hooked_transformer(random_hf("gpt2")), random_tokens()
    before = hooked.embed.W_E.detach().clone()
    with torch.no_grad():
        expected = hooked(tokens).log_softmax(-1)
        hooked.process_weights_(fold_ln=True, center_writing_weights=False)
        assert hooked.cfg.normalization_type == "LNPre"
        torch.testing.assert_close(hooked.embed.W_E, before, atol=0, rtol=0)
        torch.testing.assert_close(hooked(tokens).log_softmax(-1), expected, atol=1e-4, rtol=0)


@needs_hooked_transformer
@pytest.mark.parametrize("architecture", BRIDGE_ONLY)
def test_a_setting_that_hooked_transformer_cannot_represent_is_named(architecture):
    with pytest.raises(UnsupportedModelError, match=BRIDGE_ONLY[architecture][1]):
        to_hooked_transformer(random_hf(architecture))


@needs_hooked_transformer
def test_post_norms_do_not_depend_on_the_name_of_the_class():
    class Renamed(Olmo2ForCausalLM):
        pass

    hf, tokens = random_hf("olmo2"), random_tokens()
    hf.__class__ = Renamed
    with torch.no_grad():
        torch.testing.assert_close(to_hooked_transformer(hf)(tokens), hf(tokens).logits, atol=1e-4, rtol=0)


@needs_hooked_transformer
def test_weights_of_another_shape_than_the_config_says_are_refused():
    hf = random_hf("llama")
    hf.lm_head = torch.nn.Linear(64, 51, bias=False)
    with pytest.raises(UnsupportedModelError, match="do not fit"):
        to_hooked_transformer(hf)


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        (
            lambda: GPTNeoXForCausalLM(
                GPTNeoXConfig(
                    attention_bias=False,
                    vocab_size=9,
                    hidden_size=32,
                    intermediate_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                )
            ),
            "attention_bias=False",
        ),
        (
            lambda: GPT2LMHeadModel(GPT2Config(scale_attn_weights=False, vocab_size=9, n_embd=8, n_layer=1, n_head=2)),
            "scale_attn_weights=False",
        ),
    ],
)
def test_a_setting_that_the_bridge_gets_wrong_is_named(model, setting):
    with pytest.raises(UnsupportedModelError, match=f"TransformerBridge cannot represent .* {setting}"):
        to_bridge(model())


@needs_hooked_transformer
def test_unscaled_attention_of_gpt2_equals_hugging_faces_in_hooked_transformer():
    config = GPT2Config(scale_attn_weights=False, vocab_size=50, n_embd=32, n_layer=2, n_head=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf, tokens = GPT2LMHeadModel(config).eval(), random_tokens()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(5.0)
        torch.testing.assert_close(to_hooked_transformer(hf)(tokens), hf(tokens).logits, atol=1e-4, rtol=1e-5)

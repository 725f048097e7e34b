"""Tiny Hugging Face models with random weights large enough that every component matters."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
import transformers

from mechhier.models import load_model

VOCAB, CONTEXT = 50, 48
HAS_HOOKED_TRANSFORMER = int(version("transformer_lens").split(".")[0]) < 4

_TOKENS = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "attn_implementation": "eager",
    **_TOKENS,
}


def _llama(**settings) -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, **settings))


def _olmo(**settings) -> transformers.PreTrainedModel:
    return transformers.OlmoForCausalLM(transformers.OlmoConfig(**_SIZES, **settings))


def _olmo2(**settings) -> transformers.PreTrainedModel:
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**_SIZES, **settings))


def _neox(**settings) -> transformers.PreTrainedModel:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**_SIZES, **settings))


def _gpt2(**settings) -> transformers.PreTrainedModel:
    sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT, "attn_implementation": "eager"}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **_TOKENS, **settings))


def _gemma2() -> transformers.PreTrainedModel:
    """Norms before and after every component, and gains stored as gamma - 1."""
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(num_key_value_heads=2, head_dim=16, final_logit_softcapping=None, **_SIZES)
    )


ARCHITECTURES = {
    "llama": _llama,
    "llama-gqa": lambda: _llama(num_key_value_heads=2),
    "olmo": _olmo,
    "olmo2": _olmo2,
    "gpt2": _gpt2,
    "gpt_neox": _neox,
    "gpt_neox-sequential": lambda: _neox(use_parallel_residual=False),
}
"""One of each kind of block, for tests of what is built on the adapter. GPT-2's embeddings are tied, as published."""
VARIANTS = {
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-wide-heads": lambda: _llama(head_dim=24, num_key_value_heads=2),
    "olmo-clipped": lambda: _olmo(clip_qkv=0.5),
    "olmo-tied": lambda: _olmo(tie_word_embeddings=True),
    "olmo2-tied": lambda: _olmo2(tie_word_embeddings=True),
    "gpt2-untied": lambda: _gpt2(tie_word_embeddings=False),
    "gpt2-scaled-by-layer": lambda: _gpt2(scale_attn_by_inverse_layer_idx=True),
    "gpt_neox-tied": lambda: _neox(tie_word_embeddings=True),
}
"""Settings of those architectures that both classes represent, for tests of the adapter itself."""
BRIDGE_ONLY = {
    "llama-biases": (lambda: _llama(attention_bias=True, num_key_value_heads=2), "attention_bias=True"),
    "llama-mlp-biases": (lambda: _llama(mlp_bias=True), "mlp_bias=True"),
    "olmo-gqa": (lambda: _olmo(num_key_value_heads=2), "num_key_value_heads=2"),
    "olmo-biases": (lambda: _olmo(attention_bias=True), "attention_bias=True"),
    "olmo2-gqa": (lambda: _olmo2(num_key_value_heads=2), "num_key_value_heads=2"),
    "olmo2-biases": (lambda: _olmo2(attention_bias=True), "attention_bias=True"),
    "olmo2-wide-heads": (lambda: _olmo2(head_dim=24), "head_dim=24"),
    "gpt2-quick-gelu": (lambda: _gpt2(activation_function="quick_gelu"), "quick_gelu"),
    "gemma2": (_gemma2, "gemma2"),
}
"""What `HookedTransformer` refuses, and the words with which it does."""
_BUILDERS = ARCHITECTURES | VARIANTS | {name: build for name, (build, _) in BRIDGE_ONLY.items()}
CLASSES = [
    pytest.param(
        "hooked",
        marks=pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has TransformerBridge only"),
    ),
    "bridge",
]
EVERY_MODEL = [
    *((name, kind) for name in ARCHITECTURES | VARIANTS for kind in ("hooked", "bridge")[not HAS_HOOKED_TRANSFORMER :]),
    *((name, "bridge") for name in BRIDGE_ONLY),
]
"""(architecture, class) for every combination that exists."""


def random_hf(architecture: str) -> transformers.PreTrainedModel:
    """The same weights for the same architecture, every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _BUILDERS[architecture]()
        for name, parameter in model.named_parameters():
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            torch.nn.init.normal_(parameter, mean=float(is_gain), std=0.2)
    return model.eval()


def random_hooked(architecture: str, kind: str | None):
    return load_model(random_hf(architecture), as_=kind)


def random_tokens(n: int = 4, length: int = 20, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))

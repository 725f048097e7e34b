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


def _gpt2() -> transformers.PreTrainedModel:
    sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT, "attn_implementation": "eager"}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **_TOKENS))


def _neox(parallel: bool) -> transformers.PreTrainedModel:
    config = transformers.GPTNeoXConfig(use_parallel_residual=parallel, **_SIZES)
    return transformers.GPTNeoXForCausalLM(config)


ARCHITECTURES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES)),
    "llama-gqa": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **_SIZES)),
    "olmo": lambda: transformers.OlmoForCausalLM(transformers.OlmoConfig(**_SIZES)),
    "gpt2": _gpt2,
    "gpt_neox": lambda: _neox(parallel=True),
    "gpt_neox-sequential": lambda: _neox(parallel=False),
}
CLASSES = [
    pytest.param(
        "hooked",
        marks=pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has TransformerBridge only"),
    ),
    "bridge",
]


def random_hf(architecture: str) -> transformers.PreTrainedModel:
    """The same weights for the same architecture, every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ARCHITECTURES[architecture]()
        for name, parameter in model.named_parameters():
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            torch.nn.init.normal_(parameter, mean=float(is_gain), std=0.2)
    return model.eval()


def random_hooked(architecture: str, kind: str):
    return load_model(random_hf(architecture), as_=kind)


def random_tokens(n: int = 4, length: int = 20, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))

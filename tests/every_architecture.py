"""Every causal language model that transformers can build small: a list that this module makes, so that a new one is in it.

No setting here belongs to one architecture: names of sizes that many configs share are set where a config has them, and
what cannot be built small in this way is left out.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, CONTEXT, N_LAYERS, N_HEADS, WIDTH = 50, 48, 4, 4, 64
MAX_PARAMETERS = 4_000_000

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "n_positions": CONTEXT,
    "n_embd": WIDTH,
    "n_head": N_HEADS,
    "n_layer": N_LAYERS,
    "ffn_dim": 96,
    "d_model": WIDTH,
    "n_layers": N_LAYERS,
    "n_heads": N_HEADS,
    "d_ff": 96,
    "num_layers": N_LAYERS,
    "num_heads": N_HEADS,
    "word_embed_proj_dim": WIDTH,
    "decoder_layers": N_LAYERS,
    "decoder_attention_heads": N_HEADS,
    "decoder_ffn_dim": 96,
    "encoder_layers": N_LAYERS,
    "attention_hidden_size": WIDTH,
    "lru_width": WIDTH,
    "state_size": 16,
    "mamba_d_state": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "n_groups": 1,
    "mamba_n_groups": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "global_head_dim": 16,
    "rotary_dim": 8,
    "sliding_window": 8,
    "window_size": 8,
    "attention_window": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "cross_layer_attention_num": 1,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
    "layer_norm_eps": 1e-5,
}


def _rope(**settings: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **settings}


_AS_LONG_AS_LAYERS = ("layer_types", "attention_types", "mlp_layer_types", "layers_block_type", "block_types")


_INSTEAD: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": N_HEADS},
    {"head_dim": 8},
    {"head_dim": ...},
    {"pad_token_id": ..., "bos_token_id": ..., "eos_token_id": ...},
)
"""Sizes that some configs derive from others, and token ids that some must have; `...` is the config's own default."""


def small_config(model_type: str, *, instead: dict[str, Any]) -> Any:
    """The architecture's own default settings with small sizes."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    default = config_class()
    text = default.get_text_config()
    given = {name: instead.get(name, value) for name, value in _small(text).items()}
    given = {name: value for name, value in given.items() if value is not ...}
    if text is default:
        return config_class(**given)
    within = {name: type(text)(**given) for name, sub in vars(default).items() if sub is text}
    return config_class(**within)


def _small(config: Any) -> dict[str, Any]:
    given = {name: value for name, value in _SIZES.items() if name in set(vars(config)) | set(config.attribute_map)}
    for name in set(_AS_LONG_AS_LAYERS) & set(vars(config)):
        types = getattr(config, name)
        if isinstance(types, list) and types and isinstance(types[0], str):
            # Every kind of layer that the architecture has, as far as there is room.
            given[name] = (list(dict.fromkeys(types)) * N_LAYERS)[:N_LAYERS]
    if isinstance(given_types := getattr(config, "attention_types", None), list):
        given["attention_types"] = [[given_types[0][0], N_LAYERS // len(given_types[0][0])]]
    return given


def build_small(model_type: str) -> transformers.PreTrainedModel | None:
    """A model with random weights large enough that every component matters; None if it cannot be built small."""
    for instead in _INSTEAD:
        try:
            model = _build(small_config(model_type, instead=instead))
            if model is not None:
                with torch.no_grad():
                    model(torch.zeros(1, 8, dtype=torch.long), use_cache=False)
            return model
        except Exception:  # noqa: BLE001  whatever it has against small sizes: then it is not in the list
            continue
    return None


def _build(config: Any) -> transformers.PreTrainedModel | None:
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    if size > MAX_PARAMETERS:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                gain = parameter.ndim == 1 and name.endswith("weight") and bool((parameter == 1).all())
                torch.nn.init.normal_(parameter, mean=float(gain), std=0.2)
    return model


# Attention of every kind, and multipliers that are not 1: settings that the defaults above do not reach.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "granite, multiplied": (
        "granite",
        {"logits_scaling": 8.0, "residual_multiplier": 0.4, "embedding_multiplier": 6.0, "attention_multiplier": 0.1},
    ),
    "falcon, ALiBi": ("falcon", {"alibi": True, "new_decoder_architecture": False, "parallel_attn": False}),
    "falcon, sequential": ("falcon", {"parallel_attn": False, "new_decoder_architecture": False}),
    "bloom, norm after": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "gpt_neox, partial rotary": ("gpt_neox", {"rope_parameters": _rope(partial_rotary_factor=0.375)}),
    "gpt_neox, odd partial rotary": ("gpt_neox", {"rope_parameters": _rope(partial_rotary_factor=0.3125)}),
    "phi, odd partial rotary": ("phi", {"rope_parameters": _rope(partial_rotary_factor=0.3125)}),
    "llama, linear": ("llama", {"rope_parameters": _rope(rope_type="linear", factor=4.0)}),
    "llama, dynamic": (
        "llama",
        {"rope_parameters": _rope(rope_type="dynamic", factor=4.0), "max_position_embeddings": 12},
    ),
    "llama, yarn": (
        "llama",
        {"rope_parameters": _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=12)},
    ),
    "llama, llama3": (
        "llama",
        {
            "rope_parameters": _rope(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=12,
            )
        },
    ),
    "phi3, longrope": (
        "phi3",
        {
            "rope_parameters": _rope(
                rope_type="longrope",
                short_factor=[1.0] * 8,
                long_factor=[4.0] * 8,
                original_max_position_embeddings=12,
                partial_rotary_factor=1.0,
            ),
            "original_max_position_embeddings": 12,
        },
    ),
    "mistral, sliding": ("mistral", {"sliding_window": 5}),
    "gemma2, capped": ("gemma2", {"sliding_window": 5, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0}),
    "gpt_oss, sinks": ("gpt_oss", {"sliding_window": 5}),
    "gpt_oss, sinks without windows": ("gpt_oss", {"layer_types": ["full_attention"] * N_LAYERS}),
    "qwen2, one group": ("qwen2", {"num_key_value_heads": 1}),
    "stablelm, norms of queries": ("stablelm", {"qk_layernorm": True}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.5}),
    "gpt2, unscaled": ("gpt2", {"scale_attn_weights": False}),
    "opt, norm after": ("opt", {"do_layer_norm_before": False}),
    "opt, projected": ("opt", {"word_embed_proj_dim": 32}),
}


def build_variant(name: str) -> transformers.PreTrainedModel | None:
    """A model of `VARIANTS`."""
    model_type, settings = VARIANTS[name]
    config = small_config(model_type, instead={})
    described = {**config.to_dict(), **settings}
    return _build(type(config).from_dict(described))


MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""The architectures that transformers has as causal language models."""

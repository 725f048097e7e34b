"""Hugging Face model in, hooked model out: the one place that touches TransformerLens's private interfaces.

Neither class offers a public, offline way from a model in memory of any size and without a tokenizer. The routes used
here process no weights: nothing is folded or centred, so logits equal the Hugging Face model's.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

# Versions of transformers name the same rotary embedding without scaling in these ways.
_PLAIN_ROPE = {None, "default"}


class UnsupportedModelError(ValueError):
    """The model has a feature that the requested hooked class cannot represent exactly."""


def hooked_transformer_class() -> type[HookedTransformer] | None:
    """The `HookedTransformer` class, or None on TransformerLens 4, which no longer has it."""
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return None
    return HookedTransformer


def _sizes(config: Any) -> dict[str, Any]:
    """The settings that all rotary architectures share, by `HookedTransformerConfig`'s names."""
    return {
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "d_model": config.hidden_size,
        "d_head": config.hidden_size // config.num_attention_heads,
        "d_mlp": config.intermediate_size,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "act_fn": config.hidden_act,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_base": config.rope_parameters["rope_theta"],
    }


def _llama(config: Any) -> dict[str, Any]:
    _refuse(config, attention_bias=False, mlp_bias=False, head_dim=config.hidden_size // config.num_attention_heads)
    grouped = config.num_key_value_heads != config.num_attention_heads
    return _sizes(config) | {
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "n_key_value_heads": config.num_key_value_heads if grouped else None,
    }


def _olmo(config: Any) -> dict[str, Any]:
    _refuse(config, attention_bias=False, num_key_value_heads=config.num_attention_heads)
    # OlmoLayerNorm has neither gain nor bias, and its epsilon is fixed at 1e-5 in the source of transformers.
    return _sizes(config) | {
        "eps": 1e-5,
        "normalization_type": "LN",
        "gated_mlp": True,
        "clip_qkv": config.clip_qkv,
    }


def _gpt_neox(config: Any) -> dict[str, Any]:
    _refuse(config, attention_bias=True)
    d_head = config.hidden_size // config.num_attention_heads
    return _sizes(config) | {
        "eps": config.layer_norm_eps,
        "normalization_type": "LN",
        "parallel_attn_mlp": config.use_parallel_residual,
        "rotary_dim": int(d_head * config.rope_parameters["partial_rotary_factor"]),
    }


def _gpt2(config: Any) -> dict[str, Any]:
    return {
        "n_layers": config.n_layer,
        "n_heads": config.n_head,
        "d_model": config.n_embd,
        "d_head": config.n_embd // config.n_head,
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "n_ctx": config.n_positions,
        "d_vocab": config.vocab_size,
        "act_fn": config.activation_function,
        "eps": config.layer_norm_epsilon,
        "normalization_type": "LN",
        "use_attn_scale": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
    }


# model_type -> (settings of HookedTransformerConfig, name of TransformerLens's weight converter)
_HOOKED_TRANSFORMER: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "llama": (_llama, "convert_llama_weights"),
    "olmo": (_olmo, "convert_olmo_weights"),
    "gpt_neox": (_gpt_neox, "convert_neox_weights"),
    "gpt2": (_gpt2, "convert_gpt2_weights"),
}


def _refuse(config: Any, **required: Any) -> None:
    """Raise for a setting that `HookedTransformer`'s converters ignore, and whose logits would silently be wrong."""
    wrong = {name: getattr(config, name) for name, value in required.items() if getattr(config, name, value) != value}
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in _PLAIN_ROPE:
        wrong["rope_type"] = rope["rope_type"]
    if wrong:
        settings = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise UnsupportedModelError(f"HookedTransformer cannot represent a {config.model_type} model with {settings}")


def to_hooked_transformer(
    model: PreTrainedModel, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> HookedTransformer:
    """Copy a Hugging Face model's weights, unprocessed, into a `HookedTransformer` of the same device and dtype.

    Args:
        model: A causal language model; left as it is. Memory: one more copy of its weights.
        tokenizer: Attached to the result where given.

    Raises:
        UnsupportedModelError: TransformerLens 4, an architecture outside llama, olmo, gpt_neox and gpt2, or a setting
            that the converters would silently ignore (scaled rotary embeddings, biases where they expect none).
    """
    cls = hooked_transformer_class()
    if cls is None:
        raise UnsupportedModelError("TransformerLens 4 no longer has HookedTransformer")
    model_type = model.config.model_type
    if model_type not in _HOOKED_TRANSFORMER:
        accepted = ", ".join(_HOOKED_TRANSFORMER)
        raise UnsupportedModelError(f"no HookedTransformer conversion of {model_type!r} models (there is: {accepted})")
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions

    settings, converter = _HOOKED_TRANSFORMER[model_type]
    config = HookedTransformerConfig(
        **settings(model.config),
        model_name=model.config.name_or_path or model_type,
        original_architecture=type(model).__name__,
        device=str(model.device),
        dtype=model.dtype,
        init_weights=False,
        default_prepend_bos=_prepends_bos(tokenizer, model_type),
    )
    with warnings.catch_warnings():
        # HookedTransformer announces its removal in 4.0 on every construction; we support both lines on purpose.
        warnings.simplefilter("ignore", DeprecationWarning)
        hooked = cls(config, tokenizer=tokenizer)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        weights = getattr(weight_conversions, converter)(model, config)
        missing, unexpected = hooked.load_state_dict(weights, strict=False)
        # Masks and rotary tables are buffers and follow from the config. Converters leave out some of the biases that
        # an architecture does not have; any other parameter would stay uninitialised.
        absent = {name: parameter for name, parameter in hooked.named_parameters() if name in missing}
        biases = {name for name in absent if name.rsplit(".", 1)[-1].startswith("b_")}
        for name in biases:
            absent[name].zero_()
    if unexpected or set(absent) - biases:
        raise UnsupportedModelError(
            f"the weights of {model_type} do not match this TransformerLens: "
            f"missing {sorted(set(absent) - biases)}, unexpected {sorted(unexpected)}"
        )
    return hooked.eval()


def to_bridge(model: PreTrainedModel, *, tokenizer: PreTrainedTokenizerBase | None = None) -> TransformerBridge:
    """Wrap a Hugging Face model in a `TransformerBridge`, unprocessed.

    Args:
        model: A causal language model. **Changed in place**: the bridge puts its own components into it, so
            afterwards it still runs but no longer saves. Pass a copy to keep yours.
        tokenizer: Attached to the result where given.

    Raises:
        UnsupportedModelError: TransformerLens has no adapter for the architecture, or its builder moved and there is no
            tokenizer to go through the public route with.
    """
    from transformer_lens.model_bridge import TransformerBridge

    try:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    except ImportError:
        build_bridge_from_module = None
    architecture = type(model).__name__
    name = model.config.name_or_path or model.config.model_type
    prepends_bos = _prepends_bos(tokenizer, model.config.model_type)  # before TransformerLens edits the tokenizer
    try:
        if build_bridge_from_module is not None:
            bridge = build_bridge_from_module(
                model, architecture, hf_config=copy.deepcopy(model.config), tokenizer=tokenizer, model_name=name
            )
        elif tokenizer is not None:
            bridge = TransformerBridge.boot_transformers(
                name, hf_model=model, tokenizer=tokenizer, device=model.device, dtype=model.dtype
            )
        else:
            raise UnsupportedModelError(
                "this TransformerLens has no way to wrap a model without a tokenizer; save a tokenizer beside the model"
            )
    except (ValueError, KeyError, AttributeError) as error:
        if isinstance(error, UnsupportedModelError):
            raise
        raise UnsupportedModelError(f"TransformerBridge cannot wrap a {architecture}: {error}") from error
    bridge.cfg.default_prepend_bos = prepends_bos
    return bridge.eval()


def _prepends_bos(tokenizer: PreTrainedTokenizerBase | None, model_type: str) -> bool:
    """Whether string input should get a beginning-of-sequence token: only where the model was trained with one.

    TransformerLens invents one from the end-of-sequence token otherwise. GPT-NeoX models name one but were not trained
    with it (TransformerLens's own setting for them, too).
    """
    return tokenizer is not None and tokenizer.bos_token is not None and model_type != "gpt_neox"

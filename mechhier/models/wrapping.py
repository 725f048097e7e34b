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
from accelerate import init_empty_weights
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mechhier.models.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

# Versions of transformers name the same rotary embedding without scaling in these ways.
_PLAIN_ROPE = {None, "default"}


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
        "d_head": _d_head(config),
        "d_mlp": config.intermediate_size,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "act_fn": config.hidden_act,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_base": config.rope_parameters["rope_theta"],
    }


def _d_head(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _llama(config: Any) -> dict[str, Any]:
    _refuse(config, attention_bias=False, mlp_bias=False)
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


def _olmo2(config: Any) -> dict[str, Any]:
    # The norms of queries and keys are as wide as the residual stream in HookedTransformer.
    d_head = config.hidden_size // config.num_attention_heads
    _refuse(config, attention_bias=False, num_key_value_heads=config.num_attention_heads, head_dim=d_head)
    return _sizes(config) | {
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
    }


def _gpt_neox(config: Any) -> dict[str, Any]:
    _refuse(config, attention_bias=True)
    d_head = config.hidden_size // config.num_attention_heads
    return _sizes(config) | {
        "d_head": d_head,
        "eps": config.layer_norm_eps,
        "normalization_type": "LN",
        "parallel_attn_mlp": config.use_parallel_residual,
        "rotary_dim": int(d_head * config.rope_parameters["partial_rotary_factor"]),
    }


def _gpt2(config: Any) -> dict[str, Any]:
    _refuse(config, add_cross_attention=False)
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
    "olmo2": (_olmo2, "convert_olmo2_weights"),
    "gpt_neox": (_gpt_neox, "convert_neox_weights"),
    "gpt2": (_gpt2, "convert_gpt2_weights"),
}

# Settings that TransformerBridge cannot do without: it cannot be built or run, or its logits are silently wrong.
_BRIDGE_REQUIRES: dict[str, dict[str, Any]] = {
    "gpt_neox": {"attention_bias": True},
    "gpt2": {"scale_attn_weights": True, "add_cross_attention": False},
    "gpt_bigcode": {"scale_attn_weights": True, "multi_query": True},
    "falcon": {"new_decoder_architecture": False},
    "opt": {"do_layer_norm_before": True},
    "phi": {"qk_layernorm": False},
}


def _refuse(config: Any, **required: Any) -> None:
    """Raise for a setting that `HookedTransformer`'s converters ignore, and whose logits would silently be wrong."""
    wrong = _differing(config, required)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in _PLAIN_ROPE:
        wrong["rope_type"] = rope["rope_type"]
    if wrong:
        raise _unrepresentable("HookedTransformer", config, wrong)


def _differing(config: Any, required: dict[str, Any]) -> dict[str, Any]:
    return {
        name: getattr(config, name)
        for name, value in required.items()
        if getattr(config, name, None) not in (None, value)
    }


def _unrepresentable(class_name: str, config: Any, settings: dict[str, Any]) -> UnsupportedModelError:
    named = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return UnsupportedModelError(f"{class_name} cannot represent {config.model_type} models with {named}")


def to_hooked_transformer(
    model: PreTrainedModel, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> HookedTransformer:
    """Give a Hugging Face model's weights, unprocessed, to a `HookedTransformer` of the same device and dtype.

    Memory: the weights are not copied. **The result shares storage with `model`**: an edit of the one is an edit of
    the other, so pass a copy to keep yours. Only an unembedding that is tied to the embedding is copied
    (d_vocab x d_model numbers), because `HookedTransformer` treats the two as separate parameters, and folding or
    training the one would change the other. No two parameters of the result overlap in memory.

    Args:
        model: A causal language model; not changed.
        tokenizer: Attached to the result where given.

    Raises:
        UnsupportedModelError: TransformerLens 4, an architecture outside llama, olmo, olmo2, gpt_neox and gpt2, or a
            setting that the converters would silently ignore (scaled rotary embeddings, biases where they expect none,
            grouped queries of OLMo), or one that `HookedTransformer` does not have (an activation function).
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
    from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

    settings, converter = _HOOKED_TRANSFORMER[model_type]
    try:
        chosen = settings(model.config)
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UnsupportedModelError(f"HookedTransformer cannot read this {model_type}'s config: {error!r}") from None
    if chosen["act_fn"] not in SUPPORTED_ACTIVATIONS:
        raise _unrepresentable("HookedTransformer", model.config, {"activation": chosen["act_fn"]})
    config = HookedTransformerConfig(
        **chosen,
        model_name=model.config.name_or_path or model_type,
        # HookedTransformer decides by this name where the norms of OLMo-2 are: not to be left to a subclass's name.
        original_architecture=MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type],
        device=str(model.device),
        dtype=model.dtype,
        init_weights=False,
        default_prepend_bos=_prepends_bos(tokenizer),
    )
    with warnings.catch_warnings(), init_empty_weights(include_buffers=False):
        # HookedTransformer announces its removal in 4.0 on every construction; we support both lines on purpose.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            hooked = cls(config, tokenizer=tokenizer, move_to_device=False)  # pyright: ignore[reportArgumentType]
        except Exception as error:  # noqa: BLE001  sizes and tokenizers can fail in any way
            raise UnsupportedModelError(f"HookedTransformer cannot be made of this {model_type}: {error}") from None
    # TransformerLens takes any token around an empty text for one in front, an end-of-sequence token too.
    hooked.cfg.tokenizer_prepends_bos = _prepends_bos(hooked.tokenizer)
    with torch.no_grad():
        weights = getattr(weight_conversions, converter)(model, config)
    _give(hooked, weights, model_type)
    hooked.to(model.device, print_details=False)
    return hooked.eval()


def _give(hooked: HookedTransformer, weights: dict[str, torch.Tensor], model_type: str) -> None:
    """Make `weights` the parameters of a model that has none yet."""
    # The same parameter object in both models would have one gradient.
    weights = {name: weight.detach() for name, weight in weights.items()}
    if _share_storage(weights["embed.W_E"], weights["unembed.W_U"]):
        # Transposed back, so that the copy is in the order in which the forward pass reads it.
        weights["unembed.W_U"] = weights["unembed.W_U"].T.clone(memory_format=torch.contiguous_format).T
    # Masks and rotary tables are buffers and follow from the config. Converters leave out some of the biases that an
    # architecture does not have; any other parameter would have no value.
    absent = {name: parameter for name, parameter in hooked.named_parameters() if name not in weights}
    unexpected = set(weights) - set(hooked.state_dict())
    biases = {name for name in absent if name.rsplit(".", 1)[-1].startswith(("b_", "_b_"))}
    if unexpected or set(absent) - biases:
        raise UnsupportedModelError(
            f"the weights of {model_type} do not match this TransformerLens: "
            f"missing {sorted(set(absent) - biases)}, unexpected {sorted(unexpected)}"
        )
    weights |= {name: torch.zeros(absent[name].shape, dtype=absent[name].dtype) for name in biases}
    try:
        hooked.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise UnsupportedModelError(f"the weights of {model_type} do not fit their config: {error}") from error


def _share_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def to_bridge(model: PreTrainedModel, *, tokenizer: PreTrainedTokenizerBase | None = None) -> TransformerBridge:
    """Wrap a Hugging Face model in a `TransformerBridge`, unprocessed.

    Args:
        model: A causal language model. **Changed in place**: the bridge puts its own components into it, so
            afterwards it still runs but no longer saves. Pass a copy to keep yours.
        tokenizer: Attached to the result where given.

    Raises:
        UnsupportedModelError: TransformerLens has no adapter for the architecture, or the adapter gets a setting wrong
            (GPT-NeoX without attention biases, GPT-2 with unscaled attention), or TransformerLens's builder moved and
            there is no tokenizer to go through the public route with.

    Memory: the weights are not copied.
    """
    if wrong := _differing(model.config, _BRIDGE_REQUIRES.get(model.config.model_type, {})):
        raise _unrepresentable("TransformerBridge", model.config, wrong)
    from transformer_lens.model_bridge import TransformerBridge

    try:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    except ImportError:
        build_bridge_from_module = None
    architecture = type(model).__name__
    config = copy.deepcopy(model.config)
    config.architectures = [architecture]  # TransformerLens reads it, and a file may say anything here
    name = model.config.name_or_path or model.config.model_type
    prepends_bos = _prepends_bos(tokenizer)  # before TransformerLens edits the tokenizer
    try:
        if build_bridge_from_module is not None:
            bridge = build_bridge_from_module(
                model, architecture, hf_config=config, tokenizer=tokenizer, model_name=name
            )
        elif tokenizer is not None:
            bridge = TransformerBridge.boot_transformers(
                name, hf_model=model, tokenizer=tokenizer, device=model.device, dtype=model.dtype
            )
        else:
            raise UnsupportedModelError(
                "this TransformerLens has no way to wrap a model without a tokenizer; save a tokenizer beside the model"
            )
    except UnsupportedModelError:
        raise
    except Exception as error:  # noqa: BLE001  an adapter can fail in any way
        raise UnsupportedModelError(f"TransformerBridge cannot wrap a {architecture}: {error}") from None
    bridge.cfg.default_prepend_bos = prepends_bos
    # TransformerLens takes any token around an empty text for one in front, an end-of-sequence token too.
    bridge.cfg.tokenizer_prepends_bos = _prepends_bos(bridge.tokenizer)
    return bridge.eval()


def _prepends_bos(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether string input should get a beginning-of-sequence token: only where the tokenizer itself puts one there.

    A tokenizer may name one that the model was not trained to see at every beginning (GPT-2's, GPT-NeoX's), and
    TransformerLens invents one from the end-of-sequence token where none is named. What is in front of text when the
    tokenizer is called with its defaults is what Hugging Face's model sees, and so what a hooked model sees.
    """
    if tokenizer is None or tokenizer.bos_token_id is None:
        return False
    with_special, without = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    return len(with_special) > len(without) and with_special[0] == tokenizer.bos_token_id

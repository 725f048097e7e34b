"""A config against the weights beside it, or in memory: what can be known of a model before any of its numbers is read.

Names and shapes are compared by transformers' own loading, run on the device `meta`, where tensors have no numbers:
whatever it renames, merges, ties or ignores is renamed, merged, tied or ignored here, and nothing is allocated.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from mechhier.models.changes import is_plain_attention
from mechhier.models.errors import (
    ChangedModelError,
    IncompleteWeightsError,
    ModelLoadError,
    ModelNotFoundError,
    QuantizedWeightsError,
    UnexpectedWeightsError,
    UnsupportedModelError,
    WeightShapeError,
)
from mechhier.models.folder import ModelFiles, read_settings
from mechhier.models.weights import quantized_weights, shortened

_MOST_LAYERS = 1000
"""Eight times those of the deepest published model. Each costs a millisecond before anything is compared."""
_MOST_LABELS = 10_000
"""Of a classifier that a config may once have had: transformers makes a table of them."""
_LAYERS = re.compile(r"(num|n)_(\w+_)?layers?|(en|de)coder_layers")
_SIZES = re.compile(r"\w*(size|dim|heads?|embd|inner|width)|d_\w+")
_LARGE_SIZE = 1_000_000
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_LABELS = ("num_labels", "id2label", "label2id")
_IMPLEMENTATIONS = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_QUANTIZED = ("quantization_config", "compression_config")
_LOCAL_ATTENTION = (None, "eager", "sdpa")
_LOCAL_EXPERTS = (None, "eager", "batched_mm", "grouped_mm")
"""What needs no package but torch, and fetches nothing."""
# Buffers that old versions of transformers saved and that follow from the config: causal masks, rotary frequencies.
_NO_WEIGHTS = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias)$|(^|\.)inv_freq$|(^|\.)position_ids$")


def read_config(files: ModelFiles) -> PreTrainedConfig:
    """The config of a folder, if it is one of a plain causal language model that transformers itself has.

    How attention is computed is not the config's to say: what it names other than torch's own ways (flash attention,
    kernels of a hub) computes the same numbers, and is replaced by the plain way, which needs no other package and
    fetches nothing.

    Raises:
        ChangedModelError: There is an adapter beside the model.
        IncompleteWeightsError: More layers than any model has.
        QuantizedWeightsError: The config says how the weights were quantised.
        UnsupportedModelError: transformers has no causal language model for it, or it names other weight files.
        UnreadableFileError: It cannot be read.
        ModelLoadError: No model can be made as it says.
    """
    check_no_adapter(files)
    settings = _settings_of(files)
    _check_settings(files, settings)
    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError) as error:
        known = isinstance(model_type := settings.get("model_type"), str) and model_type in CONFIG_MAPPING
        # What transformers says of a type that it does not know is a page about how to install it.
        reason = (
            str(error) if known else f"config.json says model_type={model_type!r}, which transformers does not have"
        )
        raise UnsupportedModelError(
            f"cannot load {files.what}: {reason}. What to do: only architectures that transformers itself has are "
            "loaded, and no code of a model's repository is run; look for a conversion (OLMo's are named -hf)"
        ) from None
    except OSError as error:
        raise ModelLoadError(f"cannot load {files.what}: {error}. What to do: {files.repair}") from None
    except Exception as error:  # noqa: BLE001
        # Configs compute sizes from sizes: a value of any kind can fail in any way.
        raise _no_such_model(files, error) from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"cannot load {files.what}: {config.model_type!r} is no causal language model. What to do: load a model "
            "that predicts the next token, such as GPT-2, Llama, Pythia or OLMo"
        )
    parts = list(_parts(config))
    if foreign := [part._attn_implementation for part in parts if not is_plain_attention(part._attn_implementation)]:
        raise UnsupportedModelError(
            f"cannot load {files.what}: config.json says that attention is computed by {foreign[0]!r}, which transformers "
            "does not have. What to do: remove attn_implementation from config.json if the plain one is meant"
        )
    if any(part._attn_implementation not in _LOCAL_ATTENTION for part in parts):
        config._attn_implementation = "eager"
    if any(getattr(part, "_experts_implementation", None) not in _LOCAL_EXPERTS for part in parts):
        config._experts_implementation = "eager"
    return config


def check_no_adapter(files: ModelFiles) -> None:
    """Refuse a folder with an adapter, beside a model or alone.

    Raises:
        ChangedModelError: There is one.
    """
    if os.path.lexists(files.folder / "adapter_config.json"):
        raise ChangedModelError(
            f"cannot load {files.what}: adapter_config.json says that it holds an adapter (LoRA or the like), which a "
            "hooked model would leave out. What to do: merge it into the weights once, with the package peft,\n"
            f"  AutoPeftModelForCausalLM.from_pretrained({files.original}).merge_and_unload().save_pretrained(FOLDER)\n"
            "and load FOLDER; or, to measure the model without it, load the base model's own folder or name"
        )


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            yield from _parts(part)


def _check_settings(files: ModelFiles, settings: dict[str, Any]) -> None:
    """Refuse what can be read off the bare text of a config, before transformers acts on it."""
    for name, value in _settings(settings):
        wrong = None
        if _LAYERS.fullmatch(name) and isinstance(value, int) and value > _MOST_LAYERS:
            raise IncompleteWeightsError(
                f"cannot load {files.what}: config.json says {name}={value:,}, more layers than any model has. What to "
                f"do: {files.repair}"
            )
        if name in _QUANTIZED and value:
            method = value.get("quant_method") if isinstance(value, dict) else None
            raise quantized_weights(files, [f"{name} in config.json" + (f" (method {method})" if method else "")])
        if name in ("transformers_weights", "fusion_config") and value:
            raise UnsupportedModelError(
                f"cannot load {files.what}: config.json says {name}={value!r}, with which transformers would load "
                "something else than the model in model.safetensors. What to do: remove the setting, if that is the "
                "model that you mean"
            )
        if (
            name in _LABELS
            and (value if isinstance(value, int) else len(value) if isinstance(value, dict) else 0) > _MOST_LABELS
        ):
            wrong = f"more labels than {_MOST_LABELS:,}: it is a classifier's"
        elif isinstance(value, float) and not math.isfinite(value):
            wrong = "which is no number"
        elif name in _CONTEXT and isinstance(value, int) and value < 1:
            wrong = "which leaves no room for a token"
        elif _IMPLEMENTATIONS.fullmatch(name) and not isinstance(value, (str, dict, type(None))):
            wrong = "which is no name"
        if wrong:
            raise ModelLoadError(
                f"cannot load {files.what}: config.json says {name}={str(value)[:80]}, {wrong}. What to do: {files.repair}"
            )


def _settings_of(files: ModelFiles) -> dict[str, Any]:
    settings = read_settings(files, "config.json")
    if settings is None:
        raise ModelNotFoundError(f"cannot load {files.what}: it has no config.json. What to do: {files.repair}")
    return settings


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    left = [config]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield from part.items()
            left.extend(part.values())


def check_weights(files: ModelFiles, config: PreTrainedConfig, headers: dict[str, torch.Tensor]) -> int:
    """Refuse weights that are not those that the config asks for, by name, shape and dtype.

    Masks and tables that follow from the config, which old files hold, and whatever transformers itself says it can
    leave out of an architecture's files, are accepted.

    Returns:
        How many numbers the model holds beyond its weights: masks and tables of the length that the config says.

    Raises:
        QuantizedWeightsError: A weight has a dtype of less than 16 bits, or none of floating point.
        WeightShapeError: A shape differs.
        IncompleteWeightsError: A weight is missing.
        UnexpectedWeightsError: There are weights that the config does not ask for.

    Cost: the model is built without numbers, milliseconds for each layer and no memory; twice where a dtype is odd.
    """
    _check_sizes(files, sum(header.numel() for header in headers.values()))
    compared = _compare(files, config, headers)
    plain = {name: header for name, header in headers.items() if _is_plain(header.dtype)}
    if len(plain) < len(headers):
        # Which weights of the model those of other dtypes become, after all renaming: those that are missing without.
        needed = _compare(files, config, plain).missing - compared.missing
        entries = compared.model.state_dict()
        quantized = sorted(name for name in needed if entries[name].is_floating_point())
        if quantized:
            dtypes = sorted({str(header.dtype) for header in headers.values() if not _is_plain(header.dtype)})
            raise quantized_weights(files, [*quantized[:3], f"dtypes {', '.join(dtypes)}"])
    facts = _differences(compared, "in the files")
    if not facts:
        return sum(buffer.numel() for buffer in compared.model.buffers())
    if unknown := _unknown_settings(files, config):
        facts.append(
            f"config.json has settings that {config.model_type!r} in transformers does not: {shortened(unknown)} (if they "
            "are the sizes, a conversion of the model is wanted; OLMo's are named -hf)"
        )
    raise _error(compared)(f"cannot load {files.what}: {'; '.join(facts)}. What to do: {_remedy(files, compared)}")


def _check_sizes(files: ModelFiles, n_numbers: int) -> None:
    """Refuse sizes beyond all that is there: tables of them are made before any weight is compared."""
    for name, value in _settings(_settings_of(files)):
        if _SIZES.fullmatch(name) and isinstance(value, int) and value > max(_LARGE_SIZE, n_numbers):
            raise WeightShapeError(
                f"cannot load {files.what}: config.json says {name}={str(value)[:30]}, but all weights in the files together "
                f"have {n_numbers:,} numbers. What to do: take config.json and weights from the same place and revision"
            )


def check_own_weights(model: PreTrainedModel) -> None:
    """Refuse a model in memory whose weights are not those that its class makes from its config.

    Raises:
        QuantizedWeightsError: A weight has less than 16 bits, is no number of floating point, or no plain tensor.
        WeightShapeError, IncompleteWeightsError, UnexpectedWeightsError: As `check_weights`, for example of a model
            from which layers were taken.
    """
    quantized = [
        name
        for name, weight in model.named_parameters()
        if not _is_plain(weight.dtype) or type(weight.data) is not torch.Tensor
    ]
    own = {name: value.shape for name, value in model.state_dict().items()}
    try:
        with _quiet(), torch.device("meta"):
            asked = {name: value.shape for name, value in type(model)(copy.deepcopy(model.config)).state_dict().items()}
    except Exception:  # noqa: BLE001  a class of someone's own may be made from anything
        asked = own
    compared = _Comparison(
        missing=asked.keys() - own.keys(),
        unexpected={name for name in own.keys() - asked.keys() if not _NO_WEIGHTS.search(name)},
        shapes={name: (list(own[name]), list(asked[name])) for name in own.keys() & asked if own[name] != asked[name]},
        model=model,
    )
    facts = _differences(compared, "in the model")
    what = f"cannot load this {type(model).__name__}"
    if quantized or (facts and getattr(model, "is_quantized", False)):
        raise QuantizedWeightsError(
            f"{what}: its weights are quantised: {shortened(quantized or facts)}. What to do: load the model that it was "
            "made from, or give model.dequantize()"
        )
    if facts:
        raise _error(compared)(
            f"{what}: {'; '.join(facts)}. What to do: set the sizes in model.config to those of the model, where they "
            "were left behind, or load the model anew"
        )


def _differences(compared: _Comparison, where: str) -> list[str]:
    facts = []
    if compared.shapes:
        shown = [
            f"{name} is {stored} {where} and {asked} by the config"
            for name, (stored, asked) in sorted(compared.shapes.items())
        ]
        facts.append(f"shapes differ: {shortened(shown)}")
    if compared.missing:
        facts.append(f"it has no weights for {_listed(compared.missing)}")
    if compared.unexpected:
        facts.append(f"it has weights that the config does not ask for: {_listed(compared.unexpected)}")
    return facts


def _error(compared: _Comparison) -> type[ModelLoadError]:
    if compared.shapes:
        return WeightShapeError
    return IncompleteWeightsError if compared.missing else UnexpectedWeightsError


def _remedy(files: ModelFiles, compared: _Comparison) -> str:
    if compared.missing and not (compared.shapes or compared.unexpected):
        return files.repair
    together = "take config.json and weights from the same place and revision"
    if compared.shapes or compared.missing:
        return together
    return (
        f"{together}; or, if those weights are no part of the model, write it once without them, with\n"
        f"  AutoModelForCausalLM.from_pretrained({files.original}).save_pretrained(FOLDER)\nand load FOLDER"
    )


def _is_plain(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2


def _listed(names: set[str]) -> str:
    return f"[{shortened([repr(name) for name in sorted(names)])}]"


def _unknown_settings(files: ModelFiles, config: PreTrainedConfig) -> list[str]:
    known = {*type(config)().to_dict(), *config.attribute_map, *PreTrainedConfig().to_dict(), "torch_dtype", "auto_map"}
    return sorted(name for name in _settings_of(files) if name not in known and not name.startswith("_"))


@dataclass(frozen=True)
class _Comparison:
    missing: set[str]
    unexpected: set[str]
    shapes: dict[str, tuple[list[int], list[int]]]
    """Of the weights that differ: in the files, by the config."""
    model: PreTrainedModel


def _compare(files: ModelFiles, config: PreTrainedConfig, headers: dict[str, torch.Tensor]) -> _Comparison:
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    by_name = {cls.__name__: cls for cls in (classes if isinstance(classes, (list, tuple)) else (classes,))}
    architectures = config.architectures if isinstance(config.architectures, list) else []
    named = [by_name[name] for name in architectures if isinstance(name, str) and name in by_name]
    cls = (named or list(by_name.values()))[0]
    if cls.config_class is not type(config) and cls.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()  # as transformers' AutoModelForCausalLM does
    try:
        with _quiet(), _bounded(len(headers)):
            model, report = cls.from_pretrained(
                None,
                config=config,
                state_dict=headers,
                dtype=torch.float32,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except _TooManyWeightsError as error:
        layers = getattr(config, "num_hidden_layers", None)
        raise IncompleteWeightsError(
            f"cannot load {files.what}: config.json asks for more than {error.args[0]:,} weights (num_hidden_layers="
            f"{layers}), but the files hold {len(headers):,}. What to do: {files.repair}"
        ) from None
    except Exception as error:  # noqa: BLE001  a value of any kind can fail in any way
        raise _no_such_model(files, error) from None
    return _Comparison(
        missing=set(report["missing_keys"]),
        unexpected={name for name in report["unexpected_keys"] if not _NO_WEIGHTS.search(name)},
        shapes={name: (list(stored), list(asked)) for name, stored, asked in report["mismatched_keys"]},
        model=model,
    )


def _no_such_model(files: ModelFiles, error: Exception) -> ModelLoadError:
    shown = str(error)[:500]
    return ModelLoadError(
        f"cannot load {files.what}: no model can be made as config.json says, or not from these weights "
        f"({type(error).__name__}: {shown}). What to do: take config.json and weights from the same place and revision"
    )


class _TooManyWeightsError(Exception):
    pass


@contextmanager
def _bounded(n_stored: int) -> Iterator[None]:
    """Stop a model from being built that has many times the weights that there are: a count of layers can be anything."""
    limit, built = 4 * n_stored + 1000, 0

    def count(*_: Any) -> None:
        nonlocal built
        built += 1
        if built > limit:
            raise _TooManyWeightsError(limit)

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers would warn of here becomes an error of ours, or is what it always ignores."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)

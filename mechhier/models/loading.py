"""One door to every hooked model: a run's checkpoint, a folder, a hub name with a revision, or a model in memory."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mechhier.grammars import Corpus
from mechhier.models.quiet import quiet_transformers
from mechhier.models.run import CHECKPOINTS, MANIFEST, Manifest, RunError
from mechhier.models.wrapping import UnsupportedModelError, hooked_transformer_class, to_bridge, to_hooked_transformer

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

    from mechhier.grammars import Grammar

    HookedModel = HookedTransformer | TransformerBridge

ModelClass = Literal["hooked", "bridge"]

_ATTRIBUTE = "_mechhier_model_info"
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_HUB_STEP = re.compile(r"step[-_]?(\d+)")


class ModelLoadError(ValueError):
    """A model could not be loaded; the message says what was wrong and what to do."""


@dataclass(frozen=True)
class ModelInfo:
    """What is known about where a hooked model comes from."""

    name: str
    """The run's name, the folder's name, the hub name or the model's own."""
    architecture: str
    """Hugging Face's `model_type`: llama, gpt2, gpt_neox, olmo, ..."""
    step: int | None = None
    """Training step, where the source says it (a run's checkpoint, a hub revision such as `step1000-tokens4B`)."""
    revision: str | None = None
    """The hub revision that was asked for."""
    grammar: Grammar | None = None
    """The grammar that the model was trained on, for a checkpoint of one of our runs."""
    processing: str = "none"
    """`none` if the weights are the trained ones, `folded` if the norms' gains were folded into the next weights,
    `unknown` for a `HookedTransformer` that someone else built."""


def load_model(
    source: str | Path | PreTrainedModel | HookedModel,
    *,
    revision: str | None = None,
    as_: ModelClass | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> HookedModel:
    """Load a model, with its weights unprocessed, as a hooked model.

    Nothing is folded or centred: logits equal the Hugging Face model's (to 1e-4 in float32). Only safetensors are
    read, no code of a model's repository is run, and a tokenizer is attached where there is one. `model_info` says
    where the model came from; a checkpoint of a run also carries its grammar.

    Args:
        source: One of: the folder of a run's checkpoint or of any Hugging Face model; a hub name such as
            `"allenai/OLMo-1B-hf"`; a Hugging Face causal language model in memory (copied, never changed); a
            `HookedTransformer` or `TransformerBridge` (returned as it is).
        revision: Branch, tag or commit of a hub model.
        as_: `"hooked"` for `HookedTransformer` (TransformerLens 3 only), `"bridge"` for `TransformerBridge`; None takes
            the first where it can represent the model exactly, else the second.
        device: Where to put the model. None: a model in memory stays where it is; else CUDA where there is one, else
            the CPU.
        dtype: None: a model in memory keeps its own; else float32.

    Raises:
        ModelLoadError: Missing folder or revision, no network, an unsupported architecture, weights that are not
            safetensors, or options that do not apply to the source.

    Cost: no forward pass; memory for two copies of the weights while a `HookedTransformer` is built.

    Example:
        >>> from mechhier.models.planted import planted_inert
        >>> model = load_model(planted_inert(vocab_size=8, n_ctx=8).model)
        >>> model_info(model).architecture
        'gpt2'
    """
    if as_ not in (None, "hooked", "bridge"):
        raise ModelLoadError(f"as_ must be 'hooked', 'bridge' or None, not {as_!r}")
    if not isinstance(source, (str, Path)):
        if revision is not None:
            raise ModelLoadError("revision applies to hub names only; this model is already in memory")
        return _from_memory(source, as_=as_, device=device, dtype=dtype)
    folder = _existing_folder(source)
    if folder is not None and revision is not None:
        raise ModelLoadError(f"revision applies to hub names only; {folder} is a local folder")
    run = None if folder is None else _run_of(folder)  # first, so that a broken manifest is not found after a long load
    name = str(source) if folder is None else str(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with quiet_transformers():
        model = _read_weights(name, revision=revision, local=folder is not None, dtype=dtype or torch.float32)
        model.to(device)  # pyright: ignore[reportArgumentType, reportCallIssue]
        hooked = _wrap(model, tokenizer=_read_tokenizer(name, revision=revision), as_=as_)
    info = ModelInfo(name=name, architecture=model.config.model_type, revision=revision)
    if folder is None:
        step = _HUB_STEP.search(revision or "")
        return _attach(hooked, replace(info, step=int(step[1]) if step else None))
    if run is None:
        return _attach(hooked, replace(info, name=folder.resolve().name))
    path, manifest = run
    step = int(folder.resolve().name.removeprefix("step-"))
    return _attach(
        hooked, replace(info, name=path.name, step=step, grammar=Corpus.from_description(manifest.corpus).grammar)
    )


def model_info(model: torch.nn.Module) -> ModelInfo | None:
    """What `load_model` recorded about a hooked model; None for a model that did not come through it."""
    return model.__dict__.get(_ATTRIBUTE)


def _attach(model: HookedModel, info: ModelInfo) -> HookedModel:
    # Both classes route setattr through nn.Module or their own aliases; the instance dictionary is common, and is
    # copied by deepcopy.
    model.__dict__[_ATTRIBUTE] = info
    return model


def _existing_folder(source: str | Path) -> Path | None:
    """The folder that the source names, or None for a hub name."""
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        if (path / "checkpoints").is_dir():
            raise ModelLoadError(
                f"{path} is a run, not a checkpoint: use Run.open({str(path)!r}).load(step) or one of the folders in "
                f"{path / 'checkpoints'}"
            )
        raise ModelLoadError(f"{path} holds no model: there is no config.json in it")
    if isinstance(source, Path) or not _HUB_NAME.fullmatch(source):
        raise ModelLoadError(f"no folder {path}, and {str(source)!r} is not a hub name of the form 'owner/name'")
    return None


def _run_of(folder: Path) -> tuple[Path, Manifest] | None:
    """The run that a folder is a checkpoint of, if it is one."""
    folder = folder.resolve()
    path = folder.parent.parent
    if folder.parent.name != CHECKPOINTS or not (path / MANIFEST).is_file():
        return None
    try:
        return path, Manifest.read(path)
    except RunError as error:
        raise ModelLoadError(f"{folder} belongs to a run whose manifest cannot be read: {error}") from error


def _read_weights(name: str, *, revision: str | None, local: bool, dtype: torch.dtype) -> PreTrainedModel:
    where = f"folder {name}" if local else f"{name!r} (revision {revision or 'main'})"
    try:
        model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            name,
            revision=revision or "main",
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        advice = (
            "the folder must hold the config.json and the safetensors weights of a causal language model"
            if local
            else "check the name, the revision and the network; a private model needs `hf auth login`; "
            "only safetensors weights are read and no remote code is run"
        )
        raise ModelLoadError(f"cannot load {where}: {error}\nWhat to do: {advice}") from error
    if report["missing_keys"]:
        # transformers would fill these with random numbers.
        raise ModelLoadError(f"cannot load {where}: it has no weights for {sorted(report['missing_keys'])}")
    return model


def _read_tokenizer(name: str, *, revision: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights; None where there is none, which every probe accepts."""
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _wrap(model: PreTrainedModel, *, tokenizer: PreTrainedTokenizerBase | None, as_: ModelClass | None) -> HookedModel:
    try:
        if as_ == "bridge" or (as_ is None and hooked_transformer_class() is None):
            return to_bridge(model, tokenizer=tokenizer)
        try:
            return to_hooked_transformer(model, tokenizer=tokenizer)
        except UnsupportedModelError:
            if as_ == "hooked":
                raise
            return to_bridge(model, tokenizer=tokenizer)
    except UnsupportedModelError as error:
        advice = "load it with as_='bridge'" if as_ == "hooked" else "TransformerLens lists the models it supports"
        raise ModelLoadError(f"{error}. What to do: {advice}") from error


def _from_memory(
    source: Any, *, as_: ModelClass | None, device: str | torch.device | None, dtype: torch.dtype | None
) -> HookedModel:
    if isinstance(source, PreTrainedModel):
        # The bridge changes the model it wraps, and .to() moves in place: work on a copy.
        model = copy.deepcopy(source)
        model.to(device=device or source.device, dtype=dtype or source.dtype)  # pyright: ignore[reportCallIssue]
        name = source.config.name_or_path or type(source).__name__
        info = ModelInfo(name=name, architecture=source.config.model_type)
        return _attach(_wrap(model, tokenizer=None, as_=as_), info)
    kind = _hooked_kind(source)
    if kind is None:
        raise ModelLoadError(
            f"cannot load a {type(source).__name__}: give a folder, a hub name, a Hugging Face causal language model, "
            "a HookedTransformer or a TransformerBridge"
        )
    if as_ not in (None, kind):
        raise ModelLoadError(f"the model is already a {type(source).__name__}; as_={as_!r} cannot convert it")
    if device is not None or dtype is not None:
        raise ModelLoadError(
            "a hooked model is returned as it is: move or cast it yourself, or load it from its source"
        )
    return source if model_info(source) else _attach(source, _info_of_hooked(source, kind))


def _hooked_kind(model: Any) -> ModelClass | None:
    from transformer_lens.model_bridge import TransformerBridge

    if isinstance(model, TransformerBridge):
        return "bridge"
    cls = hooked_transformer_class()
    return "hooked" if cls is not None and isinstance(model, cls) else None


def _info_of_hooked(model: HookedModel, kind: ModelClass) -> ModelInfo:
    cfg: Any = model.cfg
    class_name = cfg.architecture if kind == "bridge" else cfg.original_architecture
    architectures = {
        "LlamaForCausalLM": "llama",
        "GPT2LMHeadModel": "gpt2",
        "GPTNeoXForCausalLM": "gpt_neox",
        "OlmoForCausalLM": "olmo",
    }
    folded = str(cfg.normalization_type).endswith("Pre") or getattr(model, "compatibility_mode", False)
    unprocessed = "none" if kind == "bridge" else "unknown"
    return ModelInfo(
        name=cfg.model_name,
        architecture=architectures.get(class_name, class_name or "unknown"),
        processing="folded" if folded else unprocessed,
    )

"""One door to every hooked model: a run's checkpoint, a folder, a hub name with a revision, or a model in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mechhier.grammars import Corpus
from mechhier.models import verification
from mechhier.models.agreement import check_no_adapter, check_own_weights, check_weights, read_config
from mechhier.models.changes import check_unchanged, is_adapter, own_copy
from mechhier.models.errors import (
    HubUnreachableError,
    MissingRevisionError,
    ModelLoadError,
    ModelNotFoundError,
    UnsupportedModelError,
    WrongDtypeError,
)
from mechhier.models.folder import ModelFiles, is_there, read_settings
from mechhier.models.hooked import VERIFICATION
from mechhier.models.identity import parameters_hash, state_hash
from mechhier.models.planted.answers import PlantedModel
from mechhier.models.quiet import quiet_transformers
from mechhier.models.revision import (
    cached_hub_revisions,
    hub_revisions,
    is_run,
    missing_revision,
    no_such_hub_model,
    parse_revision,
    revision_folders,
)
from mechhier.models.run import CHECKPOINTS, MANIFEST, Manifest, Run, RunError, check_checkpoint
from mechhier.models.spec import ModelSpec
from mechhier.models.tokenizer import read_tokenizer
from mechhier.models.torch_state import in_default_torch_state
from mechhier.models.weights import check_memory, read_headers
from mechhier.models.wrapping import hooked_transformer_class, to_bridge, to_hooked_transformer

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

    from mechhier.grammars import Grammar

    HookedModel = HookedTransformer | TransformerBridge

ModelClass = Literal["hooked", "bridge"]
Processing = Literal["none", "folded"]

_ATTRIBUTE = "_mechhier_model_info"
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_HUB_FILES = ("*.json", "*.txt", "*.model", "model.safetensors", "model-*.safetensors")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
# Where folding was compared with the raw model, on both classes. On OLMo-2, whose norms come after the layers,
# TransformerLens folds without an error, and probabilities are wrong.
_FOLDABLE = ("llama", "olmo", "gpt2", "gpt_neox")


@dataclass(frozen=True)
class ModelInfo:
    """What is known about where a hooked model comes from."""

    name: str
    """Of a training of an experiment its arm and seed; else the name of the run's folder (of `<name>/run` the outer one's)
    or of the folder (of a folder of revisions the outer one's), the hub name, or the model's own."""
    architecture: str
    """Hugging Face's `model_type`: llama, gpt2, gpt_neox, olmo, ..."""
    step: int | None = None
    """Training step, where the source says it (a run's checkpoint, a revision such as `step1000-tokens4B`)."""
    revision: str | None = None
    """The revision that was asked for."""
    arm: str | None = None
    """The arm of the experiment that trained the model."""
    seed: int | None = None
    """The seed of the model's training, for a checkpoint of one of our runs."""
    grammar: Grammar | None = None
    """The grammar that the model was trained on, for a checkpoint of one of our runs."""
    processing: str = "none"
    """`none` if the weights are the trained ones, `folded` if the norms' gains were folded into the next weights,
    `unknown` for a `HookedTransformer` that someone else built."""
    verification: str = field(default="not verified", compare=False)
    """What was seen of the model when it was loaded (`mechhier.models.verification`)."""
    weights_hash: str | None = field(default=None, compare=False)
    """Hash of the weights as they were loaded (`mechhier.models.identity.state_hash`): the same for both classes, and
    whether folded or not. None for a hooked model that someone else built."""
    parameters_hash: str | None = field(default=None, compare=False)
    """Hash of the hooked model's own parameters at that time, by which a later change is noticed."""


@in_default_torch_state
def load_model(
    source: str | os.PathLike[str] | Run | PreTrainedModel | PlantedModel | HookedModel,
    *,
    revision: str | None = None,
    as_: ModelClass | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    processing: Processing = "none",
    verify: bool = True,
) -> HookedModel:
    """Load a model as a hooked model, its weights as they were trained unless asked otherwise, and look at it.

    By default nothing is folded or centred: logits equal the Hugging Face model's (to 1e-4 of the largest in float32).
    Whether they do, and whether edits, restarted runs and sums of writes are what they should be, is seen on three rows
    of 16 tokens (`mechhier.models.verification`): what is wrong is refused, or that capability alone is switched off and
    says so when it is asked for. Every result carries what was seen (attribute `verification`). Only
    safetensors are read, no code of a model's repository is run, no kernel is fetched (attention that a config leaves to
    other packages is computed in the plain way), and a tokenizer is attached where there is one. Text gets a
    beginning-of-sequence token only where that tokenizer itself puts one in front. The config is compared with the
    files' headers before anything is allocated; a model in memory must compute what its class does with its weights.
    `model_info` says where the model came from; a checkpoint of a run also carries its grammar. A hub model that is in
    the hub's cache (of this machine, or shared by a cluster) loads without network.

    Args:
        source: One of: the folder of a run's checkpoint or of any Hugging Face model; a finished run or its folder, for
            its last checkpoint (`Run.load` takes any step); a folder of revisions, that is with one such folder for
            each (`OLMo-1B-hf/step1000-tokens4B/`, `output/checkpoint-500/`); a hub name such as
            `"allenai/OLMo-1B-hf"`; a Hugging Face causal language model in memory (copied, never changed), a planted
            model too; a `HookedTransformer` or `TransformerBridge` (returned as it is).
        revision: Branch, tag or commit of a hub model, or the subfolder of a folder of revisions or of a run;
            `revisions` lists them.
        as_: `"hooked"` for `HookedTransformer` (TransformerLens 3 only), `"bridge"` for `TransformerBridge`; None takes
            the first where it can represent the model exactly, else the second.
        device: Where to put the model. None: a model in memory stays where it is; else CUDA where there is one, else
            the CPU.
        dtype: float32, bfloat16, float16 or float64, as `torch.bfloat16` or as `"bfloat16"`, whatever the files hold.
            None: a model in memory keeps its own; else float32.
        processing: `"none"`, or `"folded"` for TransformerLens's processed weights: gains and biases of norms folded
            into the weights that read them, weights that write to the residual stream centred (where the norm is a
            LayerNorm), the unembedding centred, value biases folded into the output bias. Logits then differ from
            the raw model's by a constant at each position, so probabilities are the same. Only for llama, olmo, gpt2
            and gpt_neox in float32 or float64.
        verify: Whether to look at the model. Without it a wrong model is measured in silence.

    Raises:
        ModelNotFoundError: No such folder or hub name, or a folder without a model.
        MissingRevisionError: The source has no such revision, or it is a folder of revisions and none was named.
        HubUnreachableError: No network, and the hub's cache has not got the revision.
        IncompleteWeightsError: Weight files that are absent or cut short, or that lack weights of the model.
        UnexpectedWeightsError: Weight files with weights that the config does not ask for.
        WeightShapeError: A weight of another shape than the config's.
        QuantizedWeightsError: Weights of less than 16 bits, by the config or by their dtype.
        NoSafetensorsError: No safetensors weights.
        ChangedModelError: A model with an adapter (in memory or in the folder), with forward hooks, parametrized
            weights or replaced functions, or whose weights are not in memory: a hooked model would leave them out.
        TokenizerError: Files of a tokenizer that give none, or one with words that the model has no embedding for.
        UnsupportedModelError: An architecture that transformers or TransformerLens does not know, or whose folded
            weights would be wrong, or a setting that TransformerLens ignores; a hooked model whose logits are not Hugging
            Face's or not finite, that is not causal, or that has no attention and residual stream in every layer.
        UnreadableFileError: A file that may not be read, is none (a folder, a pipe), is no JSON where it should be, or is
            larger than any of its kind.
        WrongDtypeError: None of the four dtypes, or folding in less than float32.
        NotEnoughMemoryError: The weights do not fit into the device's free memory.
        ModelLoadError: Options that do not apply to the source; the base class of all of the above.

    Cost: the weights are read twice more, for their hash, and some tokens are run through the model (see
    `mechhier.models.verification.verify`; 30 layers: as long as six passes of 256 tokens). Memory: the weights in
    the wanted dtype and about a tenth more while they are read, for both
    classes; a `HookedTransformer` with rotary positions also has its tables, 2 x n_layers x n_ctx x d_head numbers,
    which count only where the context is long for the width. On the CPU, in the dtype of the files, weights stay in
    the files' pages until they are changed: the files must not be overwritten in place while the model is in use. A
    model in memory is copied, and folding needs two more copies of the weights.

    Example:
        >>> from mechhier.models import ModelSpec
        >>> hf = ModelSpec("gpt2", n_layers=1, d_model=8, n_heads=2).build(vocab_size=8, n_ctx=8, eos_token_id=0)
        >>> model_info(load_model(hf)).architecture
        'gpt2'
    """
    if as_ not in (None, "hooked", "bridge"):
        raise ModelLoadError(f"as_ must be 'hooked', 'bridge' or None, not {as_!r}")
    if processing not in ("none", "folded"):
        raise ModelLoadError(f"processing must be 'none' or 'folded', not {processing!r}")
    chosen_dtype = None if dtype is None else _floating(dtype)
    chosen_device = None if device is None else _present(device)
    if isinstance(source, Run):
        source = source.path
    elif isinstance(source, PlantedModel):
        source = source.model
    if revision is not None and not isinstance(revision, str):
        raise ModelLoadError(f"revision must be the name of one, such as 'step1000-tokens4B', not {revision!r}")
    if not isinstance(source, (str, os.PathLike)):
        if revision is not None:
            raise ModelLoadError("revision applies to hub names and folders of revisions; this model is in memory")
        return _from_memory(
            source, as_=as_, device=chosen_device, dtype=chosen_dtype, processing=processing, verify=verify
        )
    files, info = _locate(source, revision)
    return _from_files(
        files,
        info,
        as_=as_,
        device=chosen_device or torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=chosen_dtype or torch.float32,
        processing=processing,
        verify=verify,
    )


def model_info(model: torch.nn.Module) -> ModelInfo | None:
    """What `load_model` recorded about a hooked model; None for a model that did not come through it."""
    return model.__dict__.get(_ATTRIBUTE)


def measured_weights(model: HookedModel) -> tuple[str, str]:
    """Hash of a hooked model's weights as they are now, and what it is of.

    The second is `as loaded`, `changed since loading`, or `not loaded by load_model`. As loaded, the hash is
    `ModelInfo.weights_hash`; else that of the model's own parameters, which differs between the classes.

    Cost: reads the weights once (see `mechhier.models.identity.parameters_hash`).
    """
    info, now = model_info(model), parameters_hash(model)
    if info is None or info.weights_hash is None:
        return now, "not loaded by load_model"
    return (info.weights_hash, "as loaded") if now == info.parameters_hash else (now, "changed since loading")


def weight_processing(model: HookedModel) -> str:
    """What has been done to a hooked model's weights, in `ModelInfo.processing`'s words, read off it as it is now.

    It is `load_model`'s word, unless someone has folded the model since; else `none` for a `TransformerBridge` and
    `unknown` for a `HookedTransformer`, which does not say whether its weights are centred.
    """
    cfg: Any = model.cfg
    if str(cfg.normalization_type).endswith("Pre") or getattr(model, "compatibility_mode", False):
        return "folded"
    info = model_info(model)
    if info is not None:
        return info.processing
    return "none" if _hooked_kind(model) == "bridge" else "unknown"


def bos_token_id(model: HookedModel) -> int | None:
    """The beginning-of-sequence token that is put in front of text and of random tokens, or None.

    For a model that `load_model` made it is there only if the model's own tokenizer puts it in front of text by
    default, so that text is what it is in transformers; models of a grammar have none. For a hooked model that someone
    else made, it is that model's own setting (`cfg.default_prepend_bos`; TransformerLens sets it for GPT-2 too).
    """
    info = model_info(model)
    if (info is not None and info.grammar is not None) or not getattr(model.cfg, "default_prepend_bos", False):
        return None
    return getattr(getattr(model, "tokenizer", None), "bos_token_id", None)


def _attach(model: HookedModel, info: ModelInfo) -> HookedModel:
    info = replace(info, verification=str(model.__dict__[VERIFICATION]))
    # Both classes route setattr through nn.Module or their own aliases; the instance dictionary is common, and is
    # copied by deepcopy.
    if info.weights_hash is not None:
        info = replace(info, parameters_hash=parameters_hash(model))
    model.__dict__[_ATTRIBUTE] = info
    return model


def _floating(dtype: torch.dtype | str) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise WrongDtypeError(
            f"dtype must be one of {', '.join(_DTYPES)} (as torch.float32 or as 'float32'), not {dtype!r}"
        )
    return _DTYPES[name]


def _present(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ModelLoadError(f"device={device!r} is no device of torch: try 'cpu' or 'cuda'") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ModelLoadError(
            f"device={device!r}, but torch sees {torch.cuda.device_count()} CUDA devices here. What to do: "
            "device='cpu', or start the program where there is a GPU"
        )
    return chosen


# Where the files are.


def _locate(source: str | os.PathLike[str], revision: str | None) -> tuple[ModelFiles, ModelInfo]:
    """The files, and all that is known of the model but its architecture, which the config will say."""
    name = os.fspath(source)
    path = _path(name)
    if path is not None and path.is_dir():
        return _folder(path) if revision is None else _folder_of_revision(path, revision)
    if path is not None and path.exists():
        raise ModelNotFoundError(
            f"{path} is a file. What to do: give the folder that it lies in, {str(path.resolve().parent)!r}, if that holds "
            "config.json and the weights as safetensors; no other kind of file holds a whole model"
        )
    if not isinstance(source, str) or not _HUB_NAME.fullmatch(name):
        hub = re.search(r"huggingface\.co/([\w.-]+/[\w.-]+)", name)
        raise ModelNotFoundError(
            f"there is no folder {name!r}, and it is no hub name of the form 'owner/name'. What to do: "
            + (f"load_model({hub[1]!r})" if hub else "check the spelling, and the folder that the program runs in")
        )
    return _hub_model(name, revision)


def _path(name: str) -> Path | None:
    """Where a name points to; None where no file system has such names."""
    if not name:
        return None  # and not the folder that the program runs in
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, the home of nobody
        return None
    return path


def _folder(path: Path) -> tuple[ModelFiles, ModelInfo]:
    files = ModelFiles(path, what=f"folder {path}", original=repr(str(path)))
    check_no_adapter(files)
    if not is_there(files, "config.json"):
        if is_run(path):
            return _folder(_last_checkpoint(path))
        raise _no_model(path)
    folder = path.resolve()
    info = ModelInfo(name=folder.name, architecture="", step=_step(folder.name))
    run = _run_of(path)
    if run is not None:
        home, manifest = run
        info = replace(
            info,
            name=manifest.name(home),
            grammar=Corpus.from_description(manifest.corpus).grammar,
            arm=manifest.arm,
            seed=manifest.train.seed,
        )
    return files, info


def _last_checkpoint(run: Path) -> Path:
    try:
        return Run.open(run).checkpoint("last")
    except RunError as error:
        checkpoints = run / CHECKPOINTS
        raise ModelNotFoundError(
            f"cannot load the last checkpoint of {run}: {error}. Those that there are: "
            f"mechhier.models.revisions({str(run)!r}) lists them, load_model({str(run)!r}, revision=...) loads one of them "
            f"(they lie in {checkpoints})"
        ) from None


def _no_model(path: Path) -> ModelLoadError:
    names = revision_folders(path)
    if names:
        return MissingRevisionError(
            f"{path} is a folder of {len(names)} revisions; say which one with revision=, for example "
            f"{', '.join(map(repr, names[:3]))}. mechhier.models.revisions({str(path)!r}) lists them in order of training"
        )
    return ModelNotFoundError(f"{path} holds no model: there is no config.json in it, nor in its subfolders")


def _folder_of_revision(path: Path, revision: str) -> tuple[ModelFiles, ModelInfo]:
    names = revision_folders(path)
    if not names:
        raise ModelLoadError(
            f"revision applies to hub names, runs and folders of revisions only; {path} has no subfolder with a model"
        )
    if revision not in names:
        raise missing_revision(revision, names, where=str(path))
    if is_run(path):
        return _folder(path / CHECKPOINTS / revision)
    folder = path / revision
    name = path.resolve().name
    info = ModelInfo(name=name, architecture="", revision=revision, step=_step(revision))
    run = _run_of(folder)
    if run is not None:
        files, info = _folder(folder)
        return files, info
    return ModelFiles(folder, what=f"folder {folder}", original=repr(str(folder))), info


def _hub_model(name: str, revision: str | None) -> tuple[ModelFiles, ModelInfo]:
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    what = f"{name!r} (revision {revision or 'main'})"
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES), ignore_patterns="*/*")
    except RevisionNotFoundError as error:
        raise missing_revision(
            str(revision), hub_revisions(name, refresh=True), where=f"{name!r} on the hub"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise no_such_hub_model(name) from error
    except (HTTPError, OSError) as error:
        raise _unreachable(name, revision, what=what, command=command, error=error) from error
    info = ModelInfo(name=name, architecture="", revision=revision, step=_step(revision))
    repair = f"on a machine with network and the same HF_HOME run\n  {command}"
    original = repr(name) + (f", revision={revision!r}" if revision else "")
    files = ModelFiles(Path(folder), what=what, original=original, repair=repair)
    check_no_adapter(files)
    if not is_there(files, "config.json"):
        raise ModelNotFoundError(f"{what} has no config.json. What to do: {repair}")
    return files, info


def _unreachable(name: str, revision: str | None, *, what: str, command: str, error: Exception) -> ModelLoadError:
    listed = cached_hub_revisions(name)
    if (
        revision is not None
        and listed
        and revision not in listed
        and not constants.REGEX_COMMIT_OID.fullmatch(revision)
    ):
        return missing_revision(revision, listed, where=f"{name!r} (as it was last listed; the hub cannot be reached)")
    refs = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs"
    present = sorted(str(ref.relative_to(refs)) for ref in refs.rglob("*") if ref.is_file())
    have = (
        f"it has these revisions of the model: {', '.join(present[:10])}" if present else "it has nothing of the model"
    )
    return HubUnreachableError(
        f"cannot load {what}: there is no such folder, the hub cannot be reached, and its cache in "
        f"{constants.HF_HUB_CACHE} has not got it whole; {have}. What to do: on a machine with network and the same "
        f"HF_HOME run\n  {command}\nThe hub's client says: {error}"
    )


def _step(revision: str | None) -> int | None:
    parsed = parse_revision(revision or "")
    return None if parsed is None else parsed.step


def _run_of(folder: Path) -> tuple[Path, Manifest] | None:
    """The run that a folder is a checkpoint of, if it is one."""
    folder = folder.resolve()
    path = folder.parent.parent
    if folder.parent.name != CHECKPOINTS or not (path / MANIFEST).is_file():
        return None
    try:
        manifest = Manifest.read(path)
        check_checkpoint(path, folder, manifest)
    except RunError as error:
        raise ModelLoadError(f"cannot load folder {folder}, a checkpoint of a run: {error}") from error
    return path, manifest


# From files to a hooked model. All that can be wrong is looked for before the weights are read.


def _from_files(
    files: ModelFiles,
    info: ModelInfo,
    *,
    as_: ModelClass | None,
    device: torch.device,
    dtype: torch.dtype,
    processing: Processing,
    verify: bool,
) -> HookedModel:
    with quiet_transformers():
        config = read_config(files)
        _check_processing(processing, config.model_type, dtype)
        headers = read_headers(files)
        n_weights = sum(header.numel() for header in headers.values())
        check_memory(files, n_weights, dtype=dtype, device=device)
        n_tables = check_weights(files, config, headers)
        check_memory(files, n_weights + n_tables, dtype=dtype, device=device)
        tokenizer = read_tokenizer(files, config.get_text_config().vocab_size)
        model = _read_weights(files, config, dtype=dtype, device=device)
        model.config.name_or_path = info.name
        info = replace(info, weights_hash=state_hash(model))
        hooked = _wrap(model, tokenizer=tokenizer, as_=as_, processing=processing, verify=verify)
    return _attach(hooked, replace(info, architecture=config.model_type, processing=processing))


def _read_weights(
    files: ModelFiles, config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    read_settings(files, "generation_config.json")  # transformers takes a damaged one for none
    try:
        return AutoModelForCausalLM.from_pretrained(
            files.folder,
            config=config,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:  # noqa: BLE001  generation_config.json can say anything
        raise ModelLoadError(
            f"cannot load {files.what}: {str(error)[:500]}\nWhat to do: the folder must hold the config.json, the "
            "generation_config.json (or none) and the safetensors weights of one causal language model"
        ) from None


def _wrap(
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    as_: ModelClass | None,
    processing: Processing,
    verify: bool,
) -> HookedModel:
    """The hooked model, looked at; takes over `model`, which must not be used afterwards."""
    # Before the bridge puts its own components into the model.
    expected = verification.hugging_face(model) if verify else None
    if as_ != "bridge" and (as_ == "hooked" or hooked_transformer_class() is not None):
        try:
            hooked = to_hooked_transformer(model, tokenizer=tokenizer)
            if processing == "folded":
                hooked.process_weights_()
            return _looked_at(hooked, expected)
        except UnsupportedModelError as error:
            if as_ == "hooked":
                raise UnsupportedModelError(_with_remedy(error, "load it with as_='bridge'")) from error
    try:
        bridge = to_bridge(model, tokenizer=tokenizer)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(_with_remedy(error, "TransformerLens lists the models it supports")) from error
    if processing == "folded":
        bridge.enable_compatibility_mode(disable_warnings=True)
    return _looked_at(bridge, expected)


def _with_remedy(error: UnsupportedModelError, remedy: str) -> str:
    return str(error) if "What to do" in str(error) else f"{error}. What to do: {remedy}"


def _looked_at(hooked: HookedModel, expected: verification.Expected | None) -> HookedModel:
    if expected is None:
        verification.skip(hooked)
    else:
        verification.verify(hooked, expected=expected)
    return hooked


def _check_processing(processing: Processing, architecture: str, dtype: torch.dtype) -> None:
    if processing == "none":
        return
    if architecture not in _FOLDABLE:
        raise UnsupportedModelError(
            f"processing='folded' is not exact for {architecture!r} models (it is for {', '.join(_FOLDABLE)}). What to "
            "do: leave processing at 'none'; every measure of this package takes raw weights"
        )
    if dtype not in (torch.float32, torch.float64):
        raise WrongDtypeError(
            f"processing='folded' needs float32 or float64, not {dtype}: folded weights are products, which rounding "
            "would change. What to do: dtype='float32'"
        )


def _from_memory(
    source: Any,
    *,
    as_: ModelClass | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
    processing: Processing,
    verify: bool,
) -> HookedModel:
    if isinstance(source, PreTrainedModel):
        _check_processing(processing, source.config.model_type, dtype or source.dtype)
        check_unchanged(source)
        check_own_weights(source)
        # The bridge changes the model it wraps, and HookedTransformer shares its weights.
        model = own_copy(source, device=device or source.device, dtype=dtype)
        name = source.config.name_or_path or type(source).__name__
        architecture, weights = source.config.model_type, state_hash(model)
        info = ModelInfo(name=name, architecture=architecture, processing=processing, weights_hash=weights)
        return _attach(_wrap(model, tokenizer=None, as_=as_, processing=processing, verify=verify), info)
    kind = _hooked_kind(source)
    if kind is None:
        if is_adapter(source):
            check_unchanged(source)
        raise ModelLoadError(
            f"cannot load {_a(source)}: give a folder, a hub name, a Run, a Hugging Face causal language model, "
            f"a HookedTransformer or a TransformerBridge{_instead_of(source)}"
        )
    if as_ not in (None, kind):
        raise ModelLoadError(f"the model is already a {type(source).__name__}; as_={as_!r} cannot convert it")
    if device is not None or dtype is not None or processing != "none":
        raise ModelLoadError(
            "a hooked model is returned as it is: move, cast or fold it yourself, or load it from its source"
        )
    if VERIFICATION not in source.__dict__:
        verification.verify(source) if verify else verification.skip(source)
    return source if model_info(source) else _attach(source, _info_of_hooked(source, kind))


def _a(source: Any) -> str:
    return "None" if source is None else f"a {type(source).__name__}"


def _instead_of(source: Any) -> str:
    """What was probably meant."""
    if isinstance(source, torch.nn.Module):
        inner = [name for name, child in source.named_children() if isinstance(child, PreTrainedModel)]
        return f"; here, the model within: .{inner[0]}" if inner else ""
    if isinstance(source, Corpus):
        return ". A corpus is what a model is trained on: mechhier.train(spec, corpus, out='runs/a').load('last')"
    if isinstance(source, ModelSpec):
        return ". A ModelSpec has no weights: give spec.build(...), or the run of mechhier.train(spec, corpus, out)"
    if isinstance(source, PreTrainedTokenizerBase):
        return f". A tokenizer has no weights: give the folder or the hub name of its model ({source.name_or_path!r}?)"
    if isinstance(source, PreTrainedConfig):
        return ". A config has no weights: AutoModelForCausalLM.from_config(config) makes random ones"
    if isinstance(source, Mapping):
        return ". Weights alone are no model: put them into one with model.load_state_dict(weights), and give that"
    if isinstance(source, (list, tuple, set)):
        return ". One at a time: [load_model(source) for source in sources]"
    if isinstance(source, bytes):
        return ". A path is text: give os.fsdecode(path)"
    return ""


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
        "Olmo2ForCausalLM": "olmo2",
    }
    return ModelInfo(
        name=cfg.model_name,
        architecture=architectures.get(class_name, class_name or "unknown"),
        processing=weight_processing(model),
    )

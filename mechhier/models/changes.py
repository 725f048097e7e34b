"""What was done to a model in memory since its class built it, and would be left out of a hooked model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from mechhier.models.errors import ChangedModelError, ModelLoadError, WrongDtypeError
from mechhier.models.weights import shortened

_OWN_PACKAGES = ("torch", "transformers")
"""Hooks of theirs only watch: records of attentions, gradients for adapters' inputs."""
_WEIGHT_HOOKS = "torch.nn.utils."
"""Hooks of torch that compute a weight before each run: pruning, weight normalisation of the old kind."""
_SAME_NUMBERS = re.compile(r"(paged\|)?(eager|sdpa|flex_attention|flash_attention_\d|.*/.*)")
"""Ways to compute attention that differ in speed alone; those with a slash are kernels of a hub."""
_MERGE = (
    "merge the adapter into the weights, with model = model.merge_and_unload() (package peft), and load that; or, to "
    "measure the model without it, load the base model anew"
)
_UNHOOK = (
    "remove them (handle.remove(); torch.nn.utils.prune.remove or remove_weight_norm where these put them there), and "
    "put hooks on the hooked model instead: model.add_hook, or a block such as mechhier.probes.ablated"
)
_UNPARAMETRIZE = "torch.nn.utils.parametrize.remove_parametrizations(module, name) makes the computed weight the weight"
_RESTORE = (
    "remove the replacement (del module.forward; accelerator.unwrap_model(model, keep_fp32_wrapper=False); "
    "model.use_kernels = False; model.set_attn_implementation('eager')), or load the model anew"
)
_ONE_DEVICE = (
    "load it whole on one device, AutoModelForCausalLM.from_pretrained(..., device_map={'': device}), or give "
    "load_model the folder or name that it comes from"
)


def check_unchanged(model: nn.Module) -> None:
    """Refuse a model that computes something else than its class does with its weights.

    A hooked model takes the weights by their names, or puts its own components in the place of modules: an adapter, a
    hook, a replaced function or a parametrized weight would be left out, and another model measured than the one that
    was handed in. Hooks of torch and transformers themselves, and hooks on gradients, change nothing and are accepted;
    so are accelerate's that only move tensors between devices.

    Raises:
        ChangedModelError: With the modules' names, and the way to make the change part of the weights or to take it
            back.
    """
    for describe, remedy in _CHANGES:
        found = [
            f"{name or type(model).__name__}: {what}"
            for name, module in model.named_modules()
            for what in describe(module)
        ]
        if found:
            raise ChangedModelError(
                f"cannot load this {type(model).__name__}: a hooked model would leave out what is not in its class and "
                f"weights ({shortened(found)}). What to do: {remedy}"
            )


def own_copy(model: PreTrainedModel, *, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    """A copy on one device and in one dtype (None: the model's own), which shares nothing with the original.

    It computes attention in the plain way.

    Raises:
        WrongDtypeError: It has weights of several dtypes, and none is given.
        ModelLoadError: It cannot be copied, because a run left part of a computation in it.
    """
    dtypes = {weight.dtype for weight in model.parameters()}
    if dtype is None and len(dtypes) > 1:
        raise WrongDtypeError(
            f"this {type(model).__name__} has weights of several dtypes ({', '.join(sorted(map(str, dtypes)))}), a hooked "
            "model of one. What to do: say which with dtype="
        )
    try:
        copied = copy.deepcopy(model)
    except RuntimeError as error:
        raise ModelLoadError(
            f"cannot copy this {type(model).__name__}: {error}. What to do: load it anew, and run it within "
            "torch.no_grad() before load_model"
        ) from error
    # accelerate puts a `to` of its own on a model that it has spread over devices: it would move the original.
    remove_hook_from_submodules(copied)
    for name in ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa"):
        vars(copied).pop(name, None)
    copied.to(device=device, dtype=dtype or model.dtype)  # pyright: ignore[reportCallIssue]
    if copied.config._attn_implementation not in ("eager", "sdpa"):
        copied.set_attn_implementation("eager")
    return copied


def is_plain_attention(implementation: str | None) -> bool:
    """Whether a way of computing attention is one that changes speed alone."""
    return implementation is None or _SAME_NUMBERS.fullmatch(implementation) is not None


def is_adapter(module: Any) -> bool:
    """Whether a module, or what holds a whole model, is of the package peft."""
    return any(_package(cls) == "peft" for cls in type(module).__mro__)


def _package(thing: Any) -> str:
    """The outermost package that a class, a function or an object's class comes from."""
    module = getattr(thing, "__module__", None) or type(thing).__module__
    return module.partition(".")[0]


def _adapters(module: nn.Module) -> Iterator[str]:
    if is_adapter(module):
        yield f"an adapter ({type(module).__name__})"


def _hooks(module: nn.Module) -> Iterator[str]:
    for kind, hooks in (("forward hook", module._forward_hooks), ("forward pre-hook", module._forward_pre_hooks)):
        for hook in map(_plain, hooks.values()):
            if _package(hook) not in _OWN_PACKAGES or type(hook).__module__.startswith(_WEIGHT_HOOKS):
                yield f"{kind} {getattr(hook, '__qualname__', type(hook).__name__)}"


def _plain(function: Any) -> Any:
    """The function within a partial or a bound method."""
    while (inner := getattr(function, "func", None) or getattr(function, "__func__", None)) is not None:
        function = inner
    return function


def _parametrizations(module: nn.Module) -> Iterator[str]:
    if parametrize.is_parametrized(module):
        for name in module.parametrizations:  # pyright: ignore[reportGeneralTypeIssues]
            yield f"{name} is parametrized"


def _placements(module: nn.Module) -> Iterator[str]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and not _only_moves(hook):
        yield f"accelerate's {type(hook).__name__}"
    elif any(weight.is_meta for weight in module.parameters(recurse=False)):
        yield "weights that are not in memory"


def _only_moves(hook: Any) -> bool:
    """Whether accelerate's hook does nothing but move inputs to where the weights are."""
    parts = getattr(hook, "hooks", (hook,))
    return all(type(part).__name__ == "AlignDevicesHook" and not part.offload for part in parts)


def _replacements(module: nn.Module) -> Iterator[str]:
    moved = hasattr(module, "_hf_hook")  # accelerate replaces `forward` with one that calls the old one
    for name, value in vars(module).items():
        if name == "forward" and moved:
            continue
        # Of a whole model only what computes: its other methods save, generate and the like.
        if isinstance(module, PreTrainedModel) and name != "forward":
            continue
        if callable(value) and isinstance(getattr(type(module), name, None), FunctionType):
            yield f"{name} replaced"
    config = getattr(module, "config", None) if isinstance(module, PreTrainedModel) else None
    if config is not None and not is_plain_attention(config._attn_implementation):
        yield f"attention computed by {config._attn_implementation!r}"
    if _package(type(module)) in _OWN_PACKAGES and _package(type(module).forward) not in _OWN_PACKAGES:
        yield f"{type(module).__name__}.forward replaced, in its class"


_CHANGES: tuple[tuple[Callable[[nn.Module], Iterator[str]], str], ...] = (
    (_adapters, _MERGE),
    (_placements, _ONE_DEVICE),
    (_hooks, _UNHOOK),
    (_parametrizations, _UNPARAMETRIZE),
    (_replacements, _RESTORE),
)

"""Torch's process-wide settings, which change numbers without a word: as in a fresh process while we compute."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def default_torch_state() -> Iterator[None]:
    """Compute as a fresh process would, whatever the caller set; afterwards the caller's settings hold again.

    Inside, new tensors are float32 and on the CPU unless told otherwise, autocast is off, float32
    products are float32 (no TF32, no bfloat16), gradients can be recorded, and inference mode is left. Tensors that were
    made in inference mode stay what they are: clone them where autograd must keep them.

    Example:
        >>> with torch.inference_mode(), torch.autocast("cpu"), default_torch_state():
        ...     product = torch.ones(2, 2, requires_grad=True) @ torch.ones(2, 2)
        >>> product.dtype, product.requires_grad
        (torch.float32, True)
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device() != torch.device("cpu"):
            # Only where it is needed: it costs something in every call of torch.
            stack.enter_context(torch.device("cpu"))
        accelerator = torch.accelerator.current_accelerator()
        for kind in {"cpu"} if accelerator is None else {"cpu", accelerator.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(full_matmul_precision())
        stack.callback(_restore_overall_precision, getattr(torch.backends, "fp32_precision", None))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def in_default_torch_state(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a function compute in `default_torch_state`."""

    # A decorator of ours, not contextlib's: a warning that points out of the package must not end up in contextlib.
    @functools.wraps(function)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with default_torch_state():
            return function(*args, **kwargs)

    return wrapper


def entered_in_default_torch_state(
    make: Callable[Arguments, AbstractContextManager[Result]],
) -> Callable[Arguments, AbstractContextManager[Result]]:
    """Make a context manager compute what it needs in `default_torch_state`; inside the block the caller's state holds."""

    @contextmanager
    @functools.wraps(make)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Iterator[Result]:
        with ExitStack() as stack:
            with default_torch_state():
                entered = stack.enter_context(make(*args, **kwargs))
            yield entered

    return wrapper


def _restore_overall_precision(before: str | None) -> None:
    """Undo what transformers sets for the whole process where it compiles a model (torch from 2.9)."""
    if before is not None and torch.backends.fp32_precision != before:  # pyright: ignore[reportAttributeAccessIssue]
        torch.backends.fp32_precision = before  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def full_matmul_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32, not in TF32 or bfloat16, which hardware may do where it is allowed to."""
    try:
        allowed = torch.get_float32_matmul_precision()
    except RuntimeError:
        allowed = None  # torch refuses to say once somebody has used its newer interface: then that one has the say
    if allowed == "highest":
        yield
    elif allowed is not None:
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)
    else:
        products: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # pyright: ignore
        before = [product.fp32_precision for product in products]
        try:
            for product in products:
                product.fp32_precision = "ieee"
            yield
        finally:
            for product, precision in zip(products, before, strict=True):
                product.fp32_precision = "none"  # as the setting above it says, which may have been the case before
                if product.fp32_precision != precision:
                    product.fp32_precision = precision

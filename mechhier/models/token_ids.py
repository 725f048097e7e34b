"""Token ids as people hold them - tensors, arrays, memory maps, nested lists - as one kind of tensor, or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechhier.arguments import shown

_SHAPES = {1: "[position]", 2: "[sequence, position]"}


def token_ids(tokens: Any, name: str = "tokens", *, n_dims: int = 2) -> Int[Tensor, "..."]:  # noqa: UP037
    """Integer ids of any integer dtype, as a long tensor where they lie: a copy only where the dtype is another.

    Args:
        tokens: A torch tensor, a NumPy array (`uint16` of a stored corpus too), or nested lists of whole numbers.
        name: What the error calls them.
        n_dims: 2: sequences of one length; 1: one sequence.

    Raises:
        TypeError: Text, floats, a mask, None, or anything else that holds no ids.
        ValueError: Another number of dims, rows of different lengths, or nothing in it.
    """
    wanted = f"{name} must be whole token ids of shape {_SHAPES[n_dims]}"
    if _is_text(tokens):
        raise TypeError(f"{wanted}, got text: tokenize it first, {name}=model.to_tokens(text)")
    if tokens is None:
        raise TypeError(f"{wanted}, got None")
    if isinstance(tokens, Tensor):
        ids = tokens
        if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
            raise TypeError(f"{wanted}, got {str(ids.dtype).removeprefix('torch.')}{_cast(ids.dtype == torch.bool)}")
        if ids.device.type == "meta":
            raise ValueError(f"{wanted}, got a tensor on the device 'meta', which has no values")
        if ids.layout != torch.strided:
            raise TypeError(f"{wanted}, got a sparse tensor; give {name}.to_dense()")
    else:
        ids = torch.from_numpy(_array(tokens, name, wanted))
    if ids.ndim != n_dims:
        raise ValueError(f"{wanted}, got {list(ids.shape)}{_reshape(name, ids.ndim, n_dims)}")
    if ids.numel() == 0:
        raise ValueError(f"{wanted}, got {list(ids.shape)}: there is no token in it")
    return ids.long()


def _array(tokens: Any, name: str, wanted: str) -> np.ndarray:
    if isinstance(tokens, Sequence) and any(isinstance(row, Tensor) for row in tokens):
        tokens = [row.tolist() if isinstance(row, Tensor) else row for row in tokens]
    if hasattr(tokens, "input_ids"):
        raise TypeError(f"{wanted}, got what a tokenizer returned: give {name}={name}['input_ids']")
    if not isinstance(tokens, np.ndarray | Sequence) and not hasattr(tokens, "__array__"):
        raise TypeError(f"{wanted}, got {shown(tokens)}")
    try:
        array = np.asarray(tokens)
    except (ValueError, OverflowError):
        array = np.empty(0, dtype=object)
    if array.dtype == object:
        lengths = {len(row) for row in tokens if hasattr(row, "__len__")}
        if len(lengths) > 1:
            raise ValueError(
                f"{wanted}, got rows of {min(lengths)} to {max(lengths)} tokens: cut them to one length, or measure "
                "them in groups of one length"
            )
        raise TypeError(f"{wanted}, got objects that are no whole numbers")
    if array.size == 0:
        raise ValueError(f"{wanted}, got {list(array.shape)}: there is no token in it")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{wanted}, got {array.dtype}{_cast(array.dtype.kind == 'b')}")
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{wanted}, got the id {array.max()}")
    # torch has no operations on unsigned integers, warns of read-only memory and knows one byte order.
    return np.array(array, dtype=np.int64)


def _is_text(tokens: Any) -> bool:
    if isinstance(tokens, str | bytes):
        return True
    if isinstance(tokens, np.ndarray):
        return tokens.dtype.kind in "US" or (tokens.dtype == object and tokens.size > 0 and _is_text(tokens.flat[0]))
    return isinstance(tokens, list | tuple) and len(tokens) > 0 and _is_text(tokens[0])


def _cast(is_mask: bool) -> str:
    if is_mask:
        return ": a mask holds no ids; choose with it first, tokens[mask]"
    return ": floats are no ids; if they are whole, give tokens.long() or tokens.astype(int)"


def _reshape(name: str, found: int, wanted: int) -> str:
    if (found, wanted) == (1, 2):
        return f": give one sequence as {name}[None]"
    if (found, wanted) == (2, 1):
        return f": give one sequence, {name}[0]"
    return f": they have {found} dims, not {wanted}"

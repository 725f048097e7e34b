"""Which weights were measured: a hash of their contents, taken when a model is loaded and looked at in every result."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import xxhash
from torch import Tensor


def state_hash(model: torch.nn.Module) -> str:
    """Hash of a Hugging Face model's state dict: names, dtypes, shapes and contents.

    It depends on nothing else: not on the files, the device, the class that will hook the model, or whether weights were
    folded afterwards. Weights that share memory (tied embeddings) count once, under the first of their names. Loaded in
    another dtype, weights are others.

    Cost: reads the weights once, at about 5 GB/s from memory on one core (XXH3 of 128 bits, alone 19 GB/s); a GPU's are
    copied to the CPU one by one.
    """
    return _hash(model.state_dict().items())


def parameters_hash(model: torch.nn.Module) -> str:
    """Hash of a hooked model's own parameters, which differ in names and shapes from class to class.

    Contents are read, so that no edit escapes it, neither one through `.data` nor one of a tensor that shares memory. It
    stays the same when the model is copied or moved to another device.

    Cost: as `state_hash`; what is not dense in memory (GPT-2's queries, keys and values) is copied, 3 GB/s in all.
    """
    return _hash(_in_order_of_memory(name, parameter) for name, parameter in model.named_parameters())


def _in_order_of_memory(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A tensor with its dims in the order in which they lie in memory, where it can be read without a copy."""
    order = sorted(range(tensor.ndim), key=lambda dim: -tensor.stride(dim) if tensor.shape[dim] > 1 else 0)
    return f"{name} {order}", tensor.permute(order)


def _hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest, seen = xxhash.xxh3_128(), set()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

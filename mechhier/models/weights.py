"""The weight files of a model: whether they are all there and whole, what their headers say, whether it fits."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open

from mechhier.models.errors import (
    IncompleteWeightsError,
    NoSafetensorsError,
    NotEnoughMemoryError,
    QuantizedWeightsError,
    UnreadableFileError,
)
from mechhier.models.folder import ModelFiles, is_there, read_settings

# Peak memory of a load over the weights in the wanted dtype: see benchmarks/loading.py.
_PEAK = 1.1
_SHOWN = 5
"""Names in one message."""
_INDEX = "model.safetensors.index.json"
_LONGEST_NAME = 255
_MOST_HEADER = 4 * 2**20
"""Bytes of one file's header: 30,000 weights. A file of a published model holds a tenth of that."""
_MANY, _LEAST_SIZE = 10_000, 1000
"""From so many weights on they have as many numbers each, on average: every weight costs time, before it is read."""
_STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors' names of those that can lie in a file that is accepted: integers as masks and positions."""
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_OWN_CONTROL_GROUPS = Path("/proc/self/cgroup")
# (folder of the memory controller, limit, use, the part of the use that is file cache), of version 2 and version 1.
_CONTROL_GROUP_FILES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def read_headers(files: ModelFiles) -> dict[str, torch.Tensor]:
    """Name, shape and dtype of every weight in the files, as tensors without numbers (on the device `meta`).

    Opening a file reads its header and compares what it announces with the file's size: a file that is cut short is
    found here, in milliseconds.

    Raises:
        NoSafetensorsError: There are no safetensors weights.
        IncompleteWeightsError: A file is absent, cut short or damaged, or two have a weight of one name.
        QuantizedWeightsError: A weight has a dtype that torch has no numbers for, of 4 or 6 bits.
        UnreadableFileError: A file may not be read or is none, or its header is larger than any model's.
    """
    headers: dict[str, torch.Tensor] = {}
    where: dict[str, str] = {}
    damaged, packed = [], []
    for path in _weight_files(files):
        _check_header_size(files, path)
        try:
            with safe_open(path, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    header = weights.get_slice(name)
                    if where.setdefault(name, path.name) != path.name:
                        raise _damaged(files, f"{name!r} is in {where[name]} and in {path.name}")
                    if (dtype := header.get_dtype()) in _STORED_DTYPES:
                        headers[name] = torch.empty(header.get_shape(), dtype=_STORED_DTYPES[dtype], device="meta")
                    else:
                        packed.append(f"{name} ({dtype})")
        except (SafetensorError, OSError, RuntimeError, OverflowError, TypeError) as error:
            damaged.append(f"{path.name} ({path.stat().st_size:,} bytes: {error})")
    if damaged:
        raise _damaged(files, f"cut short or damaged: {shortened(damaged)}")
    if packed:
        raise quantized_weights(files, packed)
    numbers = sum(header.numel() for header in headers.values())
    if len(headers) > _MANY and numbers < _LEAST_SIZE * len(headers):
        raise UnreadableFileError(
            f"cannot load {files.what}: {shortened(sorted(set(where.values())))} announce {len(headers):,} weights of "
            f"{numbers / len(headers):.0f} numbers on average, as no model has them. What to do: {files.repair}"
        )
    return headers


def _check_header_size(files: ModelFiles, path: Path) -> None:
    with path.open("rb") as file:
        announced = file.read(8)
    size = struct.unpack("<Q", announced)[0] if len(announced) == 8 else 0
    # More than the file holds is for safetensors to refuse.
    if _MOST_HEADER < size < path.stat().st_size:
        raise UnreadableFileError(
            f"cannot load {files.what}: {path.name} begins with a header of {size:,} bytes, more than any model's "
            f"({_MOST_HEADER:,}). What to do: {files.repair}"
        )


def _damaged(files: ModelFiles, reason: str) -> IncompleteWeightsError:
    return IncompleteWeightsError(f"cannot load {files.what}: {reason}. What to do: {files.repair}")


def quantized_weights(files: ModelFiles, what: list[str]) -> QuantizedWeightsError:
    """The refusal of weights in fewer than 16 bits, whose numbers are not the model's without more than their names."""
    return QuantizedWeightsError(
        f"cannot load {files.what}: its weights are quantised: {shortened(what)}. What to do: load the model that this "
        "was made from; or, where there is none, read it once with transformers and the library that quantised it, "
        "and save its plain weights with\n"
        f"  AutoModelForCausalLM.from_pretrained({files.original}).dequantize().save_pretrained(FOLDER)"
    )


def shortened(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _weight_files(files: ModelFiles) -> list[Path]:
    if is_there(files, "model.safetensors"):
        return [files.folder / "model.safetensors"]
    index = read_settings(files, _INDEX, error=IncompleteWeightsError)
    if index is None:
        raise _no_safetensors(files)
    named = index.get("weight_map")
    if not isinstance(named, dict) or not named:
        raise _damaged(files, f"{_INDEX} is damaged: it has no weight_map from weights to files")
    # An index may lead to any place of the machine: only files of the folder itself are the model's.
    wrong = [shard for shard in named.values() if not _is_plain_name(shard)]
    if wrong:
        raise _damaged(
            files, f"{_INDEX} is damaged: {str(wrong[0])[:80]!r} is no name of a safetensors file in the folder"
        )
    shards = sorted(set(named.values()))
    absent = [shard for shard in shards if not os.path.exists(files.folder / shard)]
    if absent:
        raise _damaged(
            files,
            f"{len(absent):,} of the {len(shards):,} files that {_INDEX} names are not there: {shortened(absent)}",
        )
    for shard in shards:
        is_there(files, shard)
    return [files.folder / shard for shard in shards]


def _is_plain_name(shard: object) -> bool:
    return (
        isinstance(shard, str)
        and shard.endswith(".safetensors")
        and len(shard.encode(errors="replace")) <= _LONGEST_NAME
        and not any(character in shard for character in "/\\:\0")
    )


def _no_safetensors(files: ModelFiles) -> NoSafetensorsError:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in files.folder.glob(pattern))
    instead = f", but {shortened(pickled)}" if pickled else ""
    return NoSafetensorsError(
        f"cannot load {files.what}: it has no model.safetensors and no {_INDEX}{instead}. Only "
        "safetensors are read, because opening a pickled file can run any code that its author put there. What to do: "
        "if you trust the author, convert it once, where that can do no harm, with\n"
        f"  AutoModelForCausalLM.from_pretrained({files.original}).save_pretrained(FOLDER)\n"
        "and load FOLDER"
    )


def check_memory(files: ModelFiles, n_weights: int, *, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what does not fit.

    Raises:
        NotEnoughMemoryError: The weights, and what is needed while they are read, exceed the device's free memory.
    """
    free = free_memory(device)
    needed = _PEAK * n_weights * dtype.itemsize
    if free is not None and needed > free:
        raise NotEnoughMemoryError(
            f"cannot load {files.what}: it needs about {needed / 1e9:.1f} GB ({n_weights:,} weights of {dtype.itemsize} "
            f"bytes, and a tenth more while they are read), but {device} has {free / 1e9:.1f} GB free. What to do: "
            "dtype='bfloat16' halves what float32 needs; another device; or free other models first"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that a load can use; None for kinds of devices that cannot be asked."""
    if device.type == "cuda":
        # What torch holds for reuse is not free to others, but it is to us.
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    if device.type in ("cpu", "mps"):
        return max(0, min([psutil.virtual_memory().available, *_free_in_control_groups()]))
    return None


def _free_in_control_groups() -> list[int]:
    """What the limits of a container or of a cluster's job leave, which the machine's free memory does not show."""
    try:
        lines = _OWN_CONTROL_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    own = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    left = []
    for controller, limit, use, cache in _CONTROL_GROUP_FILES:
        root = _CONTROL_GROUPS / controller
        folder = root / own.get(controller, "/").lstrip("/")
        for level in (folder, *folder.parents):
            if not level.is_relative_to(root):
                break
            try:
                statistics = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
                used = int((level / use).read_text()) - int(statistics[cache])
                left.append(int((level / limit).read_text()) - used)
            except (OSError, ValueError, KeyError):  # no such controller here, or "max": no limit
                continue
    return left

"""The weight files of a model: whether they are all there and whole, what their headers say, whether it fits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open

from mechhier.models.errors import (
    IncompleteWeightsError,
    NoSafetensorsError,
    NotEnoughMemoryError,
    QuantizedWeightsError,
)

# Peak memory of a load over the weights in the wanted dtype: see benchmarks/loading.py.
_PEAK = 1.1
_SHOWN = 5
"""Names in one message."""
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


@dataclass(frozen=True)
class ModelFiles:
    """A folder with a model in it, and how messages speak of it."""

    folder: Path
    what: str
    """What it is called."""
    original: str
    """The arguments with which transformers' `from_pretrained` would find it."""
    repair: str = "copy or download the folder once more"
    """What to do when files in it are absent or damaged."""


def read_headers(files: ModelFiles) -> dict[str, torch.Tensor]:
    """Name, shape and dtype of every weight in the files, as tensors without numbers (on the device `meta`).

    Opening a file reads its header and compares what it announces with the file's size: a file that is cut short is
    found here, in milliseconds.

    Raises:
        NoSafetensorsError: There are no safetensors weights.
        IncompleteWeightsError: A file is absent, cut short or damaged.
        QuantizedWeightsError: A weight has a dtype that torch has no numbers for, of 4 or 6 bits.
    """
    headers: dict[str, torch.Tensor] = {}
    damaged, packed = [], []
    for path in _weight_files(files):
        try:
            with safe_open(path, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    header = weights.get_slice(name)
                    if (dtype := header.get_dtype()) in _STORED_DTYPES:
                        headers[name] = torch.empty(header.get_shape(), dtype=_STORED_DTYPES[dtype], device="meta")
                    else:
                        packed.append(f"{name} ({dtype})")
        except (SafetensorError, OSError) as error:
            damaged.append(f"{path.name} ({path.stat().st_size:,} bytes: {error})")
    if damaged:
        raise IncompleteWeightsError(
            f"cannot load {files.what}: cut short or damaged: {', '.join(damaged)}. What to do: {files.repair}"
        )
    if packed:
        raise quantized_weights(files, packed)
    return headers


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
    single, index = files.folder / "model.safetensors", files.folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise _no_safetensors(files)
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IncompleteWeightsError(
            f"cannot load {files.what}: {index.name} is damaged ({error}). What to do: {files.repair}"
        ) from error
    absent = [shard for shard in shards if not (files.folder / shard).is_file()]
    if absent:
        raise IncompleteWeightsError(
            f"cannot load {files.what}: {len(absent)} of the {len(shards)} files that {index.name} names are not there: "
            f"{', '.join(absent)}. What to do: {files.repair}"
        )
    return [files.folder / shard for shard in shards]


def _no_safetensors(files: ModelFiles) -> NoSafetensorsError:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in files.folder.glob(pattern))
    instead = f", but {', '.join(pickled)}" if pickled else ""
    return NoSafetensorsError(
        f"cannot load {files.what}: it has no model.safetensors and no model.safetensors.index.json{instead}. Only "
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

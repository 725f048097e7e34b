"""What an ablated component's write is replaced by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Ablation: TypeAlias = Literal["resample", "mean", "zero"]


def check_ablation(ablation: str, n_sequences: int, n_patches: int) -> None:
    """Refuse an unknown ablation, and one that has too few donors.

    Raises:
        ValueError: The ablation is unknown, or resampling asks for more donors than there are other sequences.
    """
    if ablation not in get_args(Ablation):
        raise ValueError(f"ablation must be one of {', '.join(get_args(Ablation))}, got {ablation!r}")
    if ablation == "resample" and not 1 <= n_patches < n_sequences:
        raise ValueError(
            f"resample ablation patches from n_patches other sequences: with {n_sequences} sequences n_patches must lie "
            f"in 1..{n_sequences - 1}, got {n_patches}"
        )


def replacements(
    writes: Float[Tensor, "sequence pos d_model"], ablation: Ablation, *, n_patches: int
) -> Iterator[Float[Tensor, "sequence pos d_model"]]:
    """Every version of the ablated write: `n_patches` for "resample", one for "mean" and "zero".

    - "resample": the same position of another sequence; each sequence meets `n_patches` different donors.
    - "mean": the mean over all sequences and positions.
    - "zero": nothing.
    """
    if ablation == "resample":
        for shift in range(1, n_patches + 1):
            yield writes.roll(shift, dims=0)
    elif ablation == "mean":
        yield writes.float().mean(dim=(0, 1)).to(writes.dtype).expand_as(writes)
    else:
        yield torch.zeros_like(writes)


def matched_noise(
    writes: Float[Tensor, "sequence pos d_model"],
    replaced: Float[Tensor, "sequence pos d_model"],
    generator: torch.Generator,
) -> Float[Tensor, "sequence pos d_model"]:
    """`writes` moved as far as the ablation moved them, in a random direction: the null of an ablation."""
    noise = torch.randn(writes.shape, generator=generator).to(device=writes.device, dtype=torch.float32)
    distance = (replaced - writes).float().norm(dim=-1, keepdim=True)
    return writes + (noise / noise.norm(dim=-1, keepdim=True) * distance).to(writes.dtype)

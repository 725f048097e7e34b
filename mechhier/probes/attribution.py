"""Direct effects of components on a logit, with the final norm's scale frozen."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.models.hooked import Hooked


def target_directions(hooked: Hooked, targets: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """The direction u in the residual stream whose product with a write, over sigma, is its direct effect.

    The logit of token i, centred over the vocabulary and without biases, is `x . u / sigma` for the final residual
    stream x and the final norm's scale sigma; the direct effect of a component that writes a is `a . u / sigma`
    (McGrath et al. 2023, eq. 5, with sigma frozen at the clean run's). u = gamma * (W_U[:, i] - mean over tokens);
    under LayerNorm u is centred over d_model too, which centres every write. A multiplier of the logits (Granite) is in
    it. float32 whatever the model's dtype.

    Raises:
        CapabilityError: The model's logits are not the normed stream times the unembedding, or its components do not add
            up to the stream: then there are no direct effects.
    """
    hooked.require("direct effects")
    # Of the targets alone: a float32 copy of a large vocabulary's unembedding would be as large as some layers.
    of_targets = hooked.W_U.T[targets].float() - hooked.W_U.mean(dim=1, dtype=torch.float32)
    directions = of_targets * hooked.final_gain.float()
    if hooked.final_norm == "layer":
        directions = directions - directions.mean(dim=-1, keepdim=True)
    return directions * hooked.verification.logit_multiplier


def centred_logit(
    logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """The targets' logits minus the mean over the vocabulary, float32."""
    return logits.gather(-1, targets[..., None])[..., 0].float() - logits.float().mean(-1)

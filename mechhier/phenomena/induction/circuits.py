"""What the weights alone say of a head: whether it copies, and whether it reads a previous-token head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechhier.models.hooked import Hooked

N_SAMPLED_TOKENS = 2048
"""Tokens whose own logits give the copying score's interval; all of a smaller vocabulary."""
N_ROTATIONS = 20
"""Random rotations that give the baseline of K-composition."""
_Z = 1.96
"""Normal quantile of a 95 % interval."""
_CHUNK_BYTES = 2**26
_ROUNDING = 1e-6
"""Of float32, relative to the norms of the factors."""

Scored = tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"]]
"""Estimate, lower and upper bound."""


def why_not(hooked: Hooked) -> str | None:
    """What was seen of the model that makes scores of its weights meaningless; None if nothing."""
    wrong = hooked.verification.wrong
    return next((wrong[name] for name in ("head weights", "head writes", "direct effects") if name in wrong), None)


def _undefined(hooked: Hooked) -> Float[np.ndarray, "layer head"]:
    return np.full((hooked.n_layers, hooked.n_heads), np.nan)


def copying_scores(hooked: Hooked, *, seed: int) -> Scored:
    """Whether a head's OV circuit raises the logit of the token that it attends to, from the weights alone.

    The full OV circuit has the logits l[s, t] = x_s W_V W_O u_t: x_s is the embedding of the source token s after the
    norm before attention (applied to the embedding alone, without position; no norm in OLMo-2), u_t the unembedding of t
    times the final gain, centred over the vocabulary; gains are included, biases and the scales of later norms are
    not. The score is sum_i lambda_i / sum_i |lambda_i| over the eigenvalues of l (Elhage et al. 2021). The numerator is
    the trace: the sum over s of the logit of s on itself against the mean over all tokens. 1 copies every token, -1
    suppresses every token that it reads, about 0 is unrelated. 0 where no logit reads what the head writes. NaN where the
    weights were seen not to make the activations (`why_not`), as behind a norm of the embedding (BLOOM).

    The interval is what another vocabulary of that size would give: the standard error of the mean of the tokens' own
    logits (over `N_SAMPLED_TOKENS` of them), normal, with the denominator fixed.

    Cost: no forward pass; d_vocab x d_model^2 multiplications once, memory two float32 matrices d_model x d_model.
    """
    if why_not(hooked):
        return _undefined(hooked), _undefined(hooked), _undefined(hooked)
    generator = torch.Generator().manual_seed(seed)
    n_sampled = min(N_SAMPLED_TOKENS, hooked.d_vocab)
    sampled = torch.randperm(hooked.d_vocab, generator=generator)[:n_sampled].to(hooked.device)
    normed = hooked.attention_gains(0)[0] is not None
    unembedding_mean = _mean_unembedding(hooked)
    correlation = torch.zeros(hooked.d_model, hooked.d_model, dtype=torch.float64)
    for part in _chunks(hooked):
        embedded, unembedded = _embedded(hooked, part, normed), _unembedded(hooked, part) - unembedding_mean
        correlation += _exact(unembedded.T @ embedded)
    embedded, unembedded = _embedded(hooked, sampled, normed), _unembedded(hooked, sampled) - unembedding_mean
    estimates, widths = [], []
    for layer in range(hooked.n_layers):
        values, outputs = _reading(hooked, layer, hooked.W_V(layer)), _output_weights(hooked, layer)
        # The eigenvalues other than zero of X A U^T with A = W_V W_O are those of W_O (U^T X) W_V, d_head x d_head.
        circuit = _exact(outputs) @ correlation @ _exact(values)
        eigenvalues = torch.linalg.eigvals(circuit)
        total = eigenvalues.abs().sum(-1)
        # What a head writes into dims that no logit reads is rounding, not a circuit.
        size = torch.linalg.norm(_exact(outputs), dim=(1, 2)) * torch.linalg.norm(_exact(values), dim=(1, 2))
        writes = total > _ROUNDING * size * torch.linalg.norm(correlation)
        read, written = embedded @ values, unembedded @ outputs.transpose(1, 2)
        own = _exact((read * written).sum(-1))
        spread = own.std(-1) * hooked.d_vocab**0.5
        estimates.append(torch.where(writes, eigenvalues.real.sum(-1) / total, 0.0))
        widths.append(torch.where(writes, _Z * spread / total, 0.0))
    estimate, width = torch.stack(estimates).numpy(), torch.stack(widths).numpy()
    return estimate, np.maximum(estimate - width, -1.0), np.minimum(estimate + width, 1.0)


@dataclass(frozen=True)
class KComposition:
    """K-composition of every head with the best previous-token head before it; NaN in layer 0, and as `copying_scores`.

    Attributes:
        excess: Score minus its random baseline, with the bounds that the baseline's spread gives.
        baseline: Mean score of the same sender with its output subspace rotated at random.
        senders: Layer and head of the sender, by layer of the receivers; -1 for layer 0.
    """

    excess: Scored
    baseline: Float[np.ndarray, "layer head"]
    senders: list[tuple[int, int]]


def k_composition(hooked: Hooked, previous: Float[np.ndarray, "layer head"], *, seed: int) -> KComposition:
    """How much of what a head's keys read is what the best previous-token head of an earlier layer writes.

    ||W_OV W_QK^T||_F / (||W_OV||_F ||W_QK||_F) for the sender's W_OV = W_V W_O and the receiver's W_QK = W_Q W_K^T
    (Elhage et al. 2021), norms' gains folded in, and centring where the norm is a LayerNorm, minus the mean of the same
    score with the sender's output subspace rotated at random `N_ROTATIONS` times (about 1/sqrt(d_model)). Learned
    positions leave it exact as to weights; a rotary model rotates keys and queries by position, and norms of keys and
    queries scale them: both are left out, and there the score is an approximation.

    Args:
        hooked: The model.
        previous: The previous-token score of every head, which chooses the sender.
        seed: Seed of the rotations.

    Cost: no forward pass; products of d_head x d_model matrices only.
    """
    generator = torch.Generator().manual_seed(seed)
    score, baseline, spread = _undefined(hooked), _undefined(hooked), _undefined(hooked)
    senders = [(-1, -1)]
    written, rotated = torch.empty(0), []
    defined = not why_not(hooked)
    for layer in range(1, hooked.n_layers):
        sender = np.unravel_index(np.argmax(previous[:layer]), previous[:layer].shape)
        senders.append((int(sender[0]), int(sender[1])))
        if not defined:
            continue
        if senders[-1] != senders[-2]:
            written, rotated = _written(hooked, *senders[-1], generator)
        keys, queries = (_exact(_reading(hooked, layer, weights(layer))) for weights in (hooked.W_K, hooked.W_Q))
        # ||A W_Q^T|| = ||A R^T|| for W_Q = Q R with orthonormal columns Q.
        receivers = keys @ torch.linalg.qr(queries).R.transpose(1, 2)
        size = receivers.flatten(1).norm(dim=1) * written.norm()
        score[layer] = ((written @ receivers).flatten(1).norm(dim=1) / size).numpy()
        random = torch.stack([(each @ receivers).flatten(1).norm(dim=1) / size for each in rotated])
        baseline[layer], spread[layer] = random.mean(0).numpy(), random.std(0).numpy()
    excess = score - baseline
    return KComposition((excess, excess - _Z * spread, excess + _Z * spread), baseline, senders)


def _written(
    hooked: Hooked, layer: int, head: int, generator: torch.Generator
) -> tuple[Float[Tensor, "rank d_model"], list[Float[Tensor, "rank d_model"]]]:
    """A matrix with the Gram matrix of W_OV, and versions of it whose row space is a random one."""
    values = _exact(_reading(hooked, layer, hooked.W_V(layer))[head])
    outputs = _exact(_output_weights(hooked, layer)[head])
    written = torch.linalg.qr(values).R @ outputs
    singular = torch.linalg.svdvals(written)
    rotated = []
    for _ in range(N_ROTATIONS):
        noise = torch.randn(hooked.d_model, len(singular), generator=generator, dtype=torch.float64)
        frame = torch.linalg.qr(noise).Q
        rotated.append(singular[:, None] * frame.T)
    return written, rotated


def _exact(weights: Tensor) -> Tensor:
    """In float64, on the processor: not every accelerator has float64."""
    return weights.cpu().double()


def _chunks(hooked: Hooked) -> list[slice]:
    size = max(1, _CHUNK_BYTES // (8 * hooked.d_model))
    return [slice(start, start + size) for start in range(0, hooked.d_vocab, size)]


def _embedded(hooked: Hooked, tokens: slice | Tensor, normed: bool) -> Float[Tensor, "token d_model"]:
    """What the first norm makes of the tokens' embeddings, before its gain."""
    embedded = hooked.W_E[tokens].float()
    if not normed:
        return embedded
    if hooked.final_norm == "layer":
        embedded = embedded - embedded.mean(-1, keepdim=True)
    return embedded / (embedded.pow(2).mean(-1, keepdim=True) + hooked.eps).sqrt()


def _unembedded(hooked: Hooked, tokens: slice | Tensor) -> Float[Tensor, "token d_model"]:
    unembedded = hooked.W_U[:, tokens].float().T * hooked.final_gain.float()
    return unembedded - unembedded.mean(-1, keepdim=True) if hooked.final_norm == "layer" else unembedded


def _mean_unembedding(hooked: Hooked) -> Float[Tensor, " d_model"]:
    return sum((_unembedded(hooked, part).sum(0) for part in _chunks(hooked)), start=0.0) / hooked.d_vocab


def _reading(
    hooked: Hooked, layer: int, weights: Float[Tensor, "head d_model d_head"]
) -> Float[Tensor, "head d_model d_head"]:
    """Weights that read the residual stream, with the gain (and centring) of the norm before them folded in."""
    gain = hooked.attention_gains(layer)[0]
    if gain is None:
        return weights.float()
    weights = weights.float() * gain.float()[:, None]
    return weights - weights.mean(1, keepdim=True) if hooked.final_norm == "layer" else weights


def _output_weights(hooked: Hooked, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """W_O, with the gain of the norm after the heads folded in where there is one."""
    gain = hooked.attention_gains(layer)[1]
    return hooked.W_O(layer).float() if gain is None else hooked.W_O(layer).float() * gain.float()

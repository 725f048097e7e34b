"""Which heads carry a task: indirect effects of patching their mean output, exact and to first order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.models.hooked import Hook, Hooked
from mechhier.phenomena.tasks import Kind, Prompts
from mechhier.probes.last_position import last_positions


def mean_heads(
    hooked: Hooked, prompts: Prompts, kind: Kind
) -> tuple[Float[Tensor, "layer head d_head"], Float[Tensor, "layer head d_model"]]:
    """Means over prompts, at the last token, of every head's z and of its write to the residual stream, float32.

    Cost: one forward pass without the unembedding.
    """
    n = len(prompts.answers)
    mean_z = torch.zeros(hooked.n_layers, hooked.n_heads, hooked.d_head, device=hooked.device)
    mean_write = torch.zeros(hooked.n_layers, hooked.n_heads, hooked.d_model, device=hooked.device)

    def add(z: Tensor, layer: int) -> None:
        mean_z[layer] += z[:, -1].float().sum(0) / n
        writes, _ = hooked.head_writes(layer, z[:, -1:])
        mean_write[layer] += writes.sum((0, 1)) / n

    hooks: list[Hook] = [("z", layer, partial(add, layer=layer)) for layer in range(hooked.n_layers)]
    for rows, tokens in prompts.same_length(kind):
        for part in torch.arange(len(rows)).split(hooked.batch_size(tokens.shape[1])):
            batch = hooked.check_tokens(tokens)[part]
            hooked.run(batch, hooks, stop=hooked.n_layers - 1, rows=torch.as_tensor(rows)[part])
    return mean_z, mean_write


def indirect_effects(
    hooked: Hooked,
    prompts: Prompts,
    means: list[Float[Tensor, "prompt layer head d_head"]],
    advance: Callable[..., None],
) -> list[Float[np.ndarray, "prompt layer head"]]:
    """Change of P(answer) on shuffled prompts when one head's last z is replaced by its row of `means`, for each of them.

    The patch changes the last position only, so that each patched run costs one position (`LastPosition`); the heads of
    a layer run as rows of one batch.

    Cost: one forward pass, and for each of `means` n_heads (n_layers + 1) / 2 passes of one position.
    """
    n_heads = hooked.n_heads
    effects = [np.zeros((len(prompts.answers), hooked.n_layers, n_heads)) for _ in means]
    answers = torch.as_tensor(prompts.answers, device=hooked.device)
    for rows, tokens in prompts.same_length("shuffled"):
        for part, last in last_positions(hooked, hooked.check_tokens(tokens), torch.as_tensor(rows)):
            chosen = torch.as_tensor(rows[part], device=hooked.device)
            before = answer_probability(last.logits, answers[chosen])
            index = torch.arange(len(chosen), device=hooked.device).repeat_interleave(n_heads)
            heads = torch.arange(n_heads, device=hooked.device).repeat(len(chosen))
            for layer in range(hooked.n_layers):
                for mean, into in zip(means, effects, strict=True):
                    for batch in last.batches(index):
                        of_prompt, head = index[batch], heads[batch]

                        def patch(
                            z: Tensor, head: Tensor = head, new: Tensor = mean[chosen[of_prompt], layer, head]
                        ) -> Tensor:
                            z = z.clone()
                            z[torch.arange(len(z)), -1, head] = new.to(z.dtype)
                            return z

                        start = None if layer == 0 else (layer, last.streams[layer - 1][of_prompt])
                        logits = last.run(of_prompt, [("z", layer, patch)], start=start)
                        change = answer_probability(logits, answers[chosen[of_prompt]]) - before[of_prompt]
                        into[rows[part][of_prompt.cpu().numpy()], layer, head.cpu().numpy()] = change.cpu().numpy()
                advance(len(chosen))
    return effects


def attributed_effects(
    hooked: Hooked, prompts: Prompts, means: Float[Tensor, "prompt layer head d_head"]
) -> Float[np.ndarray, "prompt layer head"]:
    """`indirect_effects` to first order: (mean - z) times the gradient of P(answer) (attribution patching, Nanda 2023).

    Cost: one forward and one backward pass, whatever the number of heads. Memory: the pass's activations of all layers.
    """
    effects = np.zeros((len(prompts.answers), hooked.n_layers, hooked.n_heads))
    answers = torch.as_tensor(prompts.answers, device=hooked.device)
    for rows, tokens in prompts.same_length("shuffled"):
        # All layers' activations exist at a time.
        size = max(1, hooked.batch_size(tokens.shape[1]) // hooked.n_layers)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            chosen = torch.as_tensor(part, device=hooked.device)
            batch = hooked.check_tokens(tokens[start : start + size])
            outputs, gradients = _gradients(hooked, batch, answers[chosen], torch.as_tensor(part))
            moved = means[chosen].transpose(0, 1) - outputs
            effects[part] = (moved * gradients).sum(-1).transpose(0, 1).cpu().numpy()
    return effects


def _gradients(
    hooked: Hooked,
    tokens: Int[Tensor, "prompt pos"],
    answers: Int[Tensor, " prompt"],
    rows: Int[Tensor, " prompt"],
) -> tuple[Float[Tensor, "layer prompt head d_head"], Float[Tensor, "layer prompt head d_head"]]:
    """Every head's z at the last token, and the gradient of the answer's probability with respect to it; float32."""
    outputs: list[Tensor] = []

    def leaf(resid: Tensor) -> Tensor:
        # Gradients flow from here, also in a model whose parameters are frozen.
        return resid.detach().requires_grad_()

    hooks: list[Hook] = [("z", layer, outputs.append) for layer in range(hooked.n_layers)]
    hooks.append(("embed", None, leaf))
    logits = hooked.run(tokens, hooks, gradients=True, rows=rows)
    with torch.enable_grad():
        probability = answer_probability(logits[:, -1], answers).sum()
    gradients = torch.autograd.grad(probability, outputs)
    return torch.stack([z.detach()[:, -1] for z in outputs]).float(), torch.stack([g[:, -1] for g in gradients]).float()


def answer_probability(
    logits: Float[Tensor, "prompt d_vocab"], answers: Int[Tensor, " prompt"]
) -> Float[Tensor, " prompt"]:
    """P(answer) from the logits at the last token, float32."""
    return logits.float().softmax(-1).gather(-1, answers[:, None])[:, 0]


def by_query(
    values: Float[np.ndarray, "prompt ..."], prompts: Prompts
) -> tuple[Float[np.ndarray, "query ..."], Float[np.ndarray, "query ..."]]:
    """Sums of values over the prompts that ask the same query of the same task, and how many; NaN is not counted.

    Such prompts differ in their demonstrations only and are not independent: the bootstrap draws queries.
    """
    _, index = np.unique(prompts.queries, return_inverse=True)
    index = index.reshape(-1)
    known = np.isfinite(values)
    sums, counts = (np.zeros((index.max() + 1, *values.shape[1:])) for _ in range(2))
    np.add.at(sums, index, np.where(known, values, 0.0))
    np.add.at(counts, index, known)
    return sums, counts

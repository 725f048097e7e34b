"""The probes against straightforward code on the same model: patterns reduced or stacked, ablations restarted or not."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.timing import interleaved, report
from mechhier.models import ModelSpec, load_model
from mechhier.phenomena import hydra
from mechhier.probes import Hooked, reduce_patterns

N_LAYERS, N_SEQUENCES, LENGTH = 8, 8, 128


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    spec = ModelSpec("llama", n_layers=N_LAYERS, d_model=64, n_heads=4)
    model = load_model(spec.build(vocab_size=500, eos_token_id=0, n_ctx=LENGTH))
    hooked = Hooked(model)
    tokens = torch.as_tensor(np.random.default_rng(0).integers(0, 500, (N_SEQUENCES, LENGTH)))
    second = torch.arange(LENGTH // 2, LENGTH)

    def stacked() -> torch.Tensor:
        patterns = torch.stack(reduce_patterns(hooked, tokens, torch.clone))
        return patterns[..., second, second - LENGTH // 2 + 1].mean(-1)

    report(
        f"Induction scores, {N_LAYERS} layers",
        interleaved(
            {
                "stack all patterns": stacked,
                "reduced in hooks": lambda: reduce_patterns(
                    hooked, tokens, lambda pattern: pattern[..., second, second - LENGTH // 2 + 1].mean(-1)
                ),
                "forward pass alone": lambda: hooked.run(tokens),
            }
        ),
        baseline="stack all patterns",
    )

    def one_forward_per_ablation() -> None:
        """Zero ablation of every component, with the null's draws, from the tokens each time."""
        hooked.run(tokens)
        for layer in range(N_LAYERS):
            for site in ("attn_out", "mlp_out"):
                for _ in range(5):
                    hooked.run(tokens, [(site, layer, torch.zeros_like)])

    report(
        f"Hydra, {2 * N_LAYERS} components, zero ablation and 4 null draws each",
        interleaved(
            {
                "a forward pass per ablation": one_forward_per_ablation,
                "hydra": lambda: hydra(model, tokens, ablation="zero", min_probability=0.0),
            },
            rounds=3,
        ),
        baseline="a forward pass per ablation",
    )


if __name__ == "__main__":
    main()

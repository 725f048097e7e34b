"""Every architecture in every class of TransformerLens against Hugging Face's own eager forward pass of the same weights.

Run `python -m benchmarks.agreement` in the repository's root, once with TransformerLens 3 and once with 4.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version

import torch
from rich.console import Console
from rich.table import Table

from mechhier.models import load_model
from mechhier.models.errors import ModelLoadError
from mechhier.models.hooked import Hook, SiteName
from mechhier.models.wrapping import hooked_transformer_class
from mechhier.probes import Hooked
from tests.random_models import ARCHITECTURES, BRIDGE_ONLY, VARIANTS, random_hf, random_tokens

SITES: tuple[SiteName, ...] = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "pattern")
COLUMNS = ("logits", "patterns", "residual stream", "sum of writes", "sum of heads")


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value where that exceeds 1."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def agreement(architecture: str, kind: str) -> dict[str, float]:
    """Largest difference of each quantity over layers and positions, on random weights and tokens in float32."""
    hf, tokens = random_hf(architecture), random_tokens()
    with torch.no_grad():
        expected = hf(tokens, output_attentions=True, output_hidden_states=True)
    hooked = Hooked(load_model(hf, as_=kind))  # pyright: ignore[reportArgumentType]
    seen: dict[tuple[SiteName, int], torch.Tensor] = {}

    def keep(site: SiteName, layer: int) -> Hook:
        return site, layer, lambda activation: seen.update({(site, layer): activation.clone()})

    layers = range(hooked.n_layers)
    logits = hooked.run(tokens, [keep(site, layer) for site in SITES for layer in layers])
    stream = seen[("resid_pre", 0)]
    heads = []
    for layer in layers:
        stream = stream + seen[("attn_out", layer)] + seen[("mlp_out", layer)]
        writes, bias = hooked.head_writes(layer, seen[("z", layer)])
        heads.append(difference(writes.sum(2) + bias, seen[("attn_out", layer)]))
    last = hooked.n_layers - 1
    return {
        "logits": float((logits - expected.logits).abs().max()),
        "patterns": max(difference(seen[("pattern", layer)], expected.attentions[layer]) for layer in layers),
        "residual stream": max(difference(seen[("resid_pre", n)], expected.hidden_states[n]) for n in layers),
        "sum of writes": difference(stream, seen[("resid_post", last)]),
        "sum of heads": max(heads),
    }


def main() -> None:
    """Print the table; a refusal is a row, with its reason."""
    warnings.simplefilter("ignore", DeprecationWarning)
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformer_lens", "transformers", "torch"))
    table = Table(
        title=f"Largest difference to Hugging Face eager ({versions})",
        caption="Logits and patterns absolute; streams relative to their largest value where it exceeds 1. "
        "Sum of writes: embedding + attn_out + mlp_out against the final residual stream. "
        "Sum of heads: head writes + bias against attn_out.",
    )
    for column in ("architecture", "class", *COLUMNS):
        table.add_column(column, overflow="fold")
    kinds = ("bridge",) if hooked_transformer_class() is None else ("hooked", "bridge")
    for architecture in ARCHITECTURES | VARIANTS | BRIDGE_ONLY:
        for kind in kinds:
            try:
                found = agreement(architecture, kind)
            except ModelLoadError as error:
                reason = str(error).split(". What to do")[0].removeprefix("HookedTransformer cannot represent ")
                table.add_row(architecture, kind, f"refused: {reason}")
                continue
            table.add_row(architecture, kind, *(f"{found[column]:.1e}" for column in COLUMNS))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()

"""What is seen of every architecture when it is loaded; writes docs/architectures.md.

Run `python -m benchmarks.architectures` in the repository's root. Models are small, with random weights.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import transformers

from mechhier.models import load_model
from mechhier.models.errors import ModelLoadError
from mechhier.models.hooked import VERIFICATION, Verification
from mechhier.models.wrapping import hooked_transformer_class
from tests.every_architecture import MODEL_TYPES, VARIANTS, build_small, build_variant

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
MARK = "<!-- Below this line the page is written by benchmarks/architectures.py. -->\n"
COLUMNS = ("logits", "edits", "restart", "cached keys", "writes", "direct effects", "head weights", "causal")
_EDITS = ("pattern", "v", "z", "q", "k", "attn_out", "mlp_out", "mlp_post", "resid_post")
_WRITES = ("component writes", "head writes")
NOT_IN_TRANSFORMERLENS = "Unsupported architecture"


def row(seen: Verification) -> list[str]:
    """The cells of an accepted architecture: yes, or what is switched off; the whole run takes the place of the rest."""

    def cell(names: tuple[str, ...]) -> str:
        off = [name for name in names if name in seen.wrong or f"{name} edits" in seen.wrong]
        return "yes" if not off else "not " + ", ".join(off)

    def instead(name: str) -> str:
        return "yes" if name not in seen.wrong else "whole runs"

    off = [name for name in seen.wrong if name not in ("restart", "cached keys")]
    return [
        "yes",
        cell(_EDITS),
        instead("restart"),
        instead("cached keys"),
        cell(_WRITES),
        cell(("direct effects",)),
        cell(("head weights",)),
        "yes",
        "right" if not off else "right, but for what is switched off",
    ]


def table(kind: str) -> Iterator[str]:
    """The rows of every architecture and kind of attention that TransformerLens has and that can be built small."""
    yield f"| architecture | {' | '.join(COLUMNS)} | verdict |"
    yield "|---" * (len(COLUMNS) + 2) + "|"
    builders = {name: (build_small, name) for name in MODEL_TYPES} | {name: (build_variant, name) for name in VARIANTS}
    for name, (build, argument) in builders.items():
        model = build(argument)
        if model is None:
            continue
        try:
            seen = load_model(model, as_=kind).__dict__[VERIFICATION]  # pyright: ignore[reportArgumentType]
        except ModelLoadError as refusal:
            words = str(refusal).split(". What to do")[0]
            no_conversion = NOT_IN_TRANSFORMERLENS in words or "no HookedTransformer conversion" in words
            if not no_conversion:
                yield f"| {name} |{' |' * len(COLUMNS)} refused: {words.replace('|', '/')[:160]} |"
        else:
            yield f"| {name} | {' | '.join(row(seen))} |"


def main() -> None:
    """Rewrite what is below the mark."""
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    classes = {"bridge": "TransformerBridge"} | ({"hooked": "HookedTransformer"} if hooked_transformer_class() else {})
    parts = [
        f"## {name}, TransformerLens {version('transformer_lens')}, transformers {version('transformers')}\n\n"
        + "\n".join(table(kind))
        for kind, name in classes.items()
    ]
    before = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    PAGE.write_text(before + MARK + "\n" + "\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Attention patterns as interactive CircuitsVis views that need no network.

CircuitsVis's own HTML loads its script from a CDN, leaves its `<div>` open and writes props unescaped; here the script
that its wheel ships is inlined once a page, the element is closed and every token is escaped.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

MAX_POSITIONS = 128  # the view draws an object for every cell: 12 heads of 128² cells are about as much as a page bears
MAX_HEADS = 12
MAX_TOKEN_LENGTH = 24
DECIMALS = 3
TOP_HEADS = 6  # shown of a score; a row of the view's small patterns
VIEW_WIDTH = 640  # pixels; the enlarged head is a square of this size
SMALL_PATTERNS_IN_A_ROW = 6
SHARE = f"{100 / SMALL_PATTERNS_IN_A_ROW:.3f}%"

# CircuitsVis sets its own heading sizes, and small patterns whose size follows the window; keep both to the view.
STYLE = f"""
.attention-view {{ width: {VIEW_WIDTH}px; position: relative; font: 13px/1.4 system-ui, sans-serif; }}
.attention-view h2 {{ font-size: 14px; font-weight: 600; }}
.attention-view h3 {{ font-size: 13px; font-weight: 600; margin: 6px 0; }}
.attention-view h4 {{ font-size: 10px; font-weight: 600; line-height: 1.2; }}
.attention-view div:has(> div > div > h4) {{ flex: 0 0 {SHARE} !important; max-width: {SHARE} !important; }}
"""


@cache
def circuitsvis_script() -> str:
    """Return CircuitsVis's bundled JavaScript (1.3 MB), safe inside one classic `<script>` element of a page.

    The file is read without importing the package, which would import torch.

    Raises:
        FileNotFoundError: if the installed CircuitsVis has no such file.
    """
    path = Path(str(distribution("circuitsvis").locate_file("circuitsvis/dist/cdn/iife.js")))
    if not path.is_file():
        raise FileNotFoundError(
            f"CircuitsVis has no bundled script at {path}; install circuitsvis>=1.43 from its wheel"
        )
    return path.read_text(encoding="utf-8").replace("</script", "<\\/script")


@dataclass(frozen=True, eq=False)
class AttentionView:
    """Attention heads over one sequence, shown by the notebook that it is the last value of, or in a report.

    Attributes:
        tokens: the token strings, shortened where they are long, [position].
        patterns: attention from the query (row) to the key (column), rounded.
        head_names: one for every head, such as `L1H0`.
        cut: what was left out, in words; empty if nothing was.
    """

    tokens: tuple[str, ...]
    patterns: Float[np.ndarray, "head query key"]
    head_names: tuple[str, ...]
    cut: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"AttentionView({len(self.head_names)} heads, {len(self.tokens)} tokens)"

    @property
    def element_id(self) -> str:
        """The id of the view's element: the same view gets the same id, so that a page is reproducible."""
        content = hashlib.sha256(self.patterns.tobytes() + repr((self.tokens, self.head_names)).encode())
        return f"attention-{content.hexdigest()[:12]}"

    def fragment(self, element_id: str) -> str:
        """Return the view's element and the call that fills it, to stand after `circuitsvis_script()` in a page.

        Args:
            element_id: unique in the page; letters, digits and hyphens, beginning with a letter.
        """
        props = {
            "tokens": self.tokens,
            "attention": self.patterns.tolist(),
            "attentionHeadNames": self.head_names,
        }
        # "<" is the only way out of a script element; U+2028 and U+2029 are escaped by json.dumps.
        data = json.dumps(props, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        return (
            f'<div class="attention-view"><div id="{element_id}"></div></div>\n'
            f'<script>CircuitsVis.render("{element_id}", CircuitsVis.AttentionHeads, {data});</script>'
        )

    def to_html(self) -> str:
        """Return a complete page with this view alone; it opens offline (1.3 MB and the patterns)."""
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.cut)
        return (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Attention heads</title>'
            f"<style>body {{ margin: 8px; font: 13px system-ui, sans-serif; }}{STYLE}</style>"
            f"<script>{circuitsvis_script()}</script></head><body>{self.fragment(self.element_id)}{notes}</body></html>"
        )

    def _repr_html_(self) -> str:
        """Return an `<iframe>` that holds the page itself: works offline, and apart from the notebook's own scripts."""
        thumbnails = math.ceil(len(self.head_names) / SMALL_PATTERNS_IN_A_ROW) * (VIEW_WIDTH // SMALL_PATTERNS_IN_A_ROW)
        height = 110 + thumbnails + VIEW_WIDTH + 40 * len(self.cut)
        return (
            f'<iframe srcdoc="{html.escape(self.to_html(), quote=True)}" sandbox="allow-scripts" '
            f'style="width: 100%; min-width: {VIEW_WIDTH + 40}px; height: {height}px; border: 0;" '
            'title="Attention heads"></iframe>'
        )


def attention_heads(
    tokens: Sequence[str], patterns: Float[np.ndarray, "head query key"], head_names: Sequence[str]
) -> AttentionView:
    """Show attention patterns of some heads over one sequence.

    The view keeps at most the first 128 positions and the first 12 heads, and rounds to 3 decimals: a browser holds an
    object for every cell. What is left out is said under the view. The rows kept of causal attention are whole. Token
    strings longer than 24 characters are shortened, because the axis labels would leave no room for the pattern.

    Args:
        tokens: the token strings, [position].
        patterns: attention weights; entries that are not finite are shown as 0 and counted under the view.
        head_names: a name for every head; put the heads that matter first.

    Raises:
        ValueError: if the shapes do not fit, or there is no head or no token.

    Example:
        >>> attention_heads(["s1", "v2"], np.array([[[1.0, 0.0], [0.25, 0.75]]]), ["L0H0"]).patterns.tolist()
        [[[1.0, 0.0], [0.25, 0.75]]]
    """
    weights = np.asarray(patterns, dtype=float)
    expected = (len(head_names), len(tokens), len(tokens))
    if weights.shape != expected or weights.size == 0:
        raise ValueError(
            f"patterns have the shape {weights.shape}, but {len(head_names)} head names and {len(tokens)} tokens need "
            f"{expected}, with at least one head and one token"
        )
    cut: list[str] = []
    if len(tokens) > MAX_POSITIONS:
        cut.append(f"Shown are the first {MAX_POSITIONS} of {len(tokens)} positions.")
    if len(head_names) > MAX_HEADS:
        cut.append(f"Shown are the first {MAX_HEADS} of {len(head_names)} heads.")
    weights = weights[:MAX_HEADS, :MAX_POSITIONS, :MAX_POSITIONS]
    undefined = int((~np.isfinite(weights)).sum())
    if undefined:
        cut.append(f"{undefined} weights are not finite numbers and are shown as 0.")
        weights = np.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0)
    return AttentionView(
        tokens=tuple(_shortened(str(token)) for token in tokens[:MAX_POSITIONS]),
        patterns=weights.round(DECIMALS),
        head_names=tuple(str(name) for name in head_names[:MAX_HEADS]),
        cut=tuple(cut),
    )


def _shortened(token: str) -> str:
    return token if len(token) <= MAX_TOKEN_LENGTH else token[: MAX_TOKEN_LENGTH - 1] + "…"


def show_attention(
    model: Any, tokens: Int[Any, " position"] | Sequence[int], *, heads: xr.DataArray | Sequence[tuple[int, int]]
) -> AttentionView:
    """Show what a model's heads attend to in one sequence; the last value of a notebook cell shows itself.

    One forward pass; memory is that of the chosen heads' patterns. See `attention_heads` for what a view leaves out.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        tokens: ids of one sequence; their strings come from the model's grammar or its tokenizer, if it has one.
        heads: `Head`s or `(layer, head)` pairs, or a score [layer, head] such as `mh.phenomena.induction(model).IND`, whose six
            highest heads are shown, the highest first.

    Raises:
        TypeError: for what is no hooked model, no token ids, or no heads.
        ValueError: for more than one sequence, a head that the model does not have, or a score with other dims.
    """
    from mechhier.models.token_ids import token_ids
    from mechhier.probes import Head, Hooked
    from mechhier.probes.attention import patterns
    from mechhier.probes.components import grouped

    hooked = Hooked.of(model)
    ids = token_ids(tokens, n_dims=1)
    chosen: Any = _top_heads(heads) if isinstance(heads, xr.DataArray) else heads
    parts = [part for entry in grouped(chosen, accepted=(Head,), name="heads") for part in entry]
    weights = patterns(hooked, ids[None], parts)[0]
    return attention_heads(_token_strings(hooked.model, ids.tolist()), weights, [str(part) for part in parts])


def _top_heads(scores: xr.DataArray) -> list[tuple[int, int]]:
    """Return the heads of highest score, the highest first; heads without a score are passed over."""
    if set(scores.dims) != {"layer", "head"}:
        raise ValueError(f"a score of heads has the dims layer and head, got {scores.dims}; select one of the others")
    ranked = scores.stack(pair=("layer", "head")).dropna("pair")
    best = ranked.isel(pair=np.argsort(-ranked.to_numpy(), kind="stable")[:TOP_HEADS])
    return [(int(layer), int(head)) for layer, head in best["pair"].to_numpy()]


def _token_strings(model: Any, ids: list[int]) -> list[str]:
    from mechhier.models import model_info

    info = model_info(model)
    tokenizer = getattr(model, "tokenizer", None)
    if info is not None and info.grammar is not None:
        return [info.grammar.vocabulary[i] for i in ids]
    return [str(i) for i in ids] if tokenizer is None else [str(t) for t in tokenizer.convert_ids_to_tokens(ids)]

"""The look that every figure of the package shares: colours, step axis, text; nothing global is changed.

Colours are those of Okabe and Ito (2008, "Color Universal Design"), distinguishable with every common form of colour
blindness; the yellow is left out because it is too light for a line on white.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

BLACK, GREY = "#000000", "#6b6b6b"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")

SEQUENTIAL = ((0.0, "#ffffff"), (0.5, "#6aaed6"), (1.0, "#08406b"))
DIVERGING = ((0.0, "#8a3d00"), (0.25, "#eb9a5f"), (0.5, "#ffffff"), (0.75, "#6aaed6"), (1.0, "#08406b"))

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
FONT_SIZE, TITLE_SIZE, PANEL_TITLE_SIZE = 12, 16, 13


def color(index: int) -> str:
    """Return the palette's colour for the `index`-th line; after seven lines the colours repeat."""
    return PALETTE[index % len(PALETTE)]


def symbol(index: int) -> str:
    """Return the marker for the `index`-th line, so that lines differ in more than colour."""
    return SYMBOLS[index % len(SYMBOLS)]


def translucent(hex_color: str, alpha: float) -> str:
    """Return `#rrggbb` as an `rgba(...)` string with the given opacity in [0, 1]."""
    red, green, blue = (int(hex_color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def text(value: object) -> str:
    """Escape a name for plotly, whose labels understand a subset of HTML (a token may read `<eos>`)."""
    return html.escape(str(value), quote=False)


def wrapped(value: object, width: int) -> str:
    """Escape a name and break it into lines of at most `width` characters, and at its own line breaks."""
    lines = [line for part in str(value).split("\n") for line in textwrap.wrap(part, width)]
    return "<br>".join(map(text, lines)) or "&nbsp;"


def capital(words: str) -> str:
    """Return words with a capital, as a title; a one-letter symbol such as the k of k-order stays small."""
    return words[:1].upper() + words[1:] if words[1:2].islower() else words


def number(value: float) -> str:
    """Format a value for a label: three significant digits, an en dash for a value that is not a number."""
    return "–" if not math.isfinite(value) else f"{value:.3g}"


def step_label(step: float) -> str:
    """Format a training step: 0, 250, 1,000, 20k, 3M."""
    for size, suffix in ((1e6, "M"), (1e4, "k")):
        if step >= size:
            return f"{step / (1e6 if suffix == 'M' else 1e3):g}{suffix}"
    return f"{step:,g}"


@dataclass(frozen=True)
class StepScale:
    """A training-step axis that is logarithmic but can show step 0.

    A step s is drawn at log10(1 + s / threshold), where `threshold` is the smallest positive step shown: close to
    linear below it, logarithmic above it. Ticks are labelled with the step itself.
    """

    threshold: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, steps: Iterable[float]) -> StepScale:
        """Return the scale for all `steps` that one figure shows."""
        known = [float(step) for step in steps]
        positive = [step for step in known if step > 0]
        return cls(
            threshold=min(positive, default=1.0), smallest=min(known, default=0.0), largest=max(known, default=1.0)
        )

    @property
    def note(self) -> str:
        """What a reader must know of the axis."""
        if self.smallest > 0:
            return "Training steps on a logarithmic axis."
        return f"Training steps on a logarithmic axis, linear below {step_label(self.threshold)} so that step 0 shows."

    def position(self, steps: Iterable[float]) -> Float[np.ndarray, " step"]:
        """Return where the steps lie on the axis."""
        return np.log10(1 + np.asarray(list(steps), dtype=float) / self.threshold)

    def axis(self, *, title: bool, spacing: float) -> dict[str, Any]:
        """Return the plotly settings of this axis.

        Args:
            title: whether its title is written.
            spacing: smallest distance of two tick labels, as a share of the axis.
        """
        decades = range(math.floor(math.log10(self.threshold)), math.ceil(math.log10(max(self.largest, 1))) + 1)
        rounds = [m * 10.0**k for k in decades for m in (1, 2, 5)]
        candidates = [step for step in (0.0, *rounds) if self.smallest <= step <= self.largest] or [self.smallest]
        start, end = self.position([self.smallest, self.largest]).tolist()
        length = end - start or 1.0
        ticks: list[float] = []
        # Powers of ten first, then 5, then 2, each only where it keeps clear of the labels already there.
        for step in sorted(candidates, key=lambda s: ({"0": -1, "1": 0, "5": 1}.get(f"{s:e}"[0], 2), s)):
            at = float(self.position([step])[0])
            if all(abs(at - float(self.position([other])[0])) > spacing * length for other in ticks):
                ticks.append(step)
        return {
            "tickmode": "array",
            "tickvals": self.position(sorted(ticks)).tolist(),
            "ticktext": [step_label(step) for step in sorted(ticks)],
            "tickangle": 0,
            "range": [start - 0.05 * length, end + 0.05 * length],
            "title": {"text": "training step" if title else None, "standoff": 6},
        }


def base_layout(figure: go.Figure, *, title: str, height: float, top: float, bottom: float, right: float) -> None:
    """Give a figure the common look; sizes are pixels, the width is the page's."""
    figure.update_layout(
        template="plotly_white",
        font={"family": FONT, "size": FONT_SIZE, "color": "#222222"},
        title={"text": title, "x": 0, "xref": "paper", "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 12}},
        title_font_size=TITLE_SIZE,
        height=height,
        margin={"l": 64, "r": right, "t": top, "b": bottom},
        hoverlabel={"font": {"family": FONT}},
    )
    axes = {
        "title_font_size": FONT_SIZE,
        "showline": True,
        "linecolor": "#999999",
        "ticks": "outside",
        "ticklen": 4,
        "zeroline": False,
    }
    figure.update_xaxes(**axes)
    figure.update_yaxes(**axes, exponentformat="power", showexponent="last")

"""What a figure shows, as plain data: panels of curves with bands, heatmaps, bars, histograms and trees.

A phenomenon says *what* is shown, as a list of panels; `mechhier.report.drawing.draw` decides how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from mechhier.report import style

Vector = Float[np.ndarray, " point"]
Matrix = Float[np.ndarray, "row column"]


@dataclass(frozen=True)
class Curve:
    """One line: values with an optional interval band and an optional null in the same colour, dashed.

    Attributes:
        label: name in the legend; lines of one label share it over all panels.
        x: positions (training steps, or a plain number such as the layer).
        y: values; NaN breaks the line.
        color: `#rrggbb`.
        low: lower end of the interval at every point.
        high: upper end.
        null: the value under the null (uniform attention, random directions ...) at every point.
        dash: plotly's dash style.
        symbol: marker, or None for a line without markers.
        line: whether the points are joined.
        names: what every point is, for its hover label, if its position does not say it.
    """

    label: str
    x: Vector
    y: Vector
    color: str
    low: Vector | None = None
    high: Vector | None = None
    null: Vector | None = None
    dash: str = "solid"
    symbol: str | None = "circle"
    line: bool = True
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class CurvePanel:
    """Curves over training (`scale` given) or over a plain number.

    Attributes:
        title: what is measured, in words.
        y_title: units.
        curves: the lines.
        scale: the step axis, or None for an ordinary linear axis of whole numbers.
        x_title: title of an ordinary axis.
        band: horizontal band (lower, upper) to shade, for a quantity known only between bounds.
        from_zero: whether the axis must include zero.
        log: whether both axes are logarithmic (without `scale`); values that are not positive are left out, and what
            lies below the smallest positive value and null is cut off.
    """

    title: str
    y_title: str
    curves: Sequence[Curve]
    scale: style.StepScale | None = None
    x_title: str = ""
    band: tuple[float, float] | None = None
    from_zero: bool = True
    log: bool = False


@dataclass(frozen=True)
class HeatPanel:
    """A matrix as coloured cells.

    Attributes:
        title: what is measured, in words, and its units.
        z: the values; NaN stays empty.
        x_title: name of the columns.
        y_title: name of the rows.
        x: column labels, or numbers if `scale` is given.
        y: row labels.
        limits: the colour scale's ends; diverging colours if the lower is below zero.
        hover: text of every cell's hover label, row by row.
        marks: cells to mark with a star.
        scale: the step axis, if the columns are training steps.
    """

    title: str
    z: Matrix
    x_title: str
    y_title: str
    x: Sequence[object]
    y: Sequence[object]
    limits: tuple[float, float]
    hover: Sequence[Sequence[str]]
    marks: np.ndarray | None = None
    scale: style.StepScale | None = None


@dataclass(frozen=True)
class Bars:
    """One series of a bar panel: a value, an interval and a null for every group."""

    label: str
    y: Vector
    color: str
    low: Vector | None = None
    high: Vector | None = None
    null: Vector | None = None


@dataclass(frozen=True)
class BarPanel:
    """Grouped bars; `groups` are the labels on the x axis, `series` the bars of every group."""

    title: str
    y_title: str
    x_title: str
    groups: Sequence[str]
    series: Sequence[Bars]


@dataclass(frozen=True)
class HistogramPanel:
    """Shares of a number in bins, and the law they are drawn from where it is known.

    Attributes:
        title: what is counted, in words.
        y_title: units of the bars.
        x_title: the number.
        edges: borders of the bins, one more than there are bins.
        bars: the share of every bin.
        law: its probability; NaN where it is not known.
    """

    title: str
    y_title: str
    x_title: str
    edges: Vector
    bars: Bars
    law: Curve | None = None


@dataclass(frozen=True)
class Node:
    """One node of a drawn tree: where it is, in columns and levels from the root, and what is written there.

    Attributes:
        label: what is written.
        x: place from left to right, in pixels.
        level: 0 for a root.
        parent: index of the node above it, or None for a root.
        hover: text of the hover label, escaped.
        is_leaf: whether it is a token.
    """

    label: str
    x: float
    level: int
    parent: int | None
    hover: str
    is_leaf: bool


@dataclass(frozen=True)
class TreePanel:
    """Trees, roots at the top; the panel takes a whole row of the figure.

    Attributes:
        title: what it is the tree of.
        nodes: all nodes, parents before their children.
    """

    title: str
    nodes: Sequence[Node]


Panel = CurvePanel | HeatPanel | BarPanel | HistogramPanel | TreePanel


def with_prefix(panel: Panel, prefix: str) -> Panel:
    """Return the panel with `prefix` (an arm, a phenomenon) before its title."""
    return replace(panel, title=f"{prefix}: {panel.title}") if prefix else panel


def color_limits(arrays: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return a colour scale for several matrices: (0, max), or symmetric about zero if any value is negative."""
    finite = np.concatenate([a[np.isfinite(a)].ravel() for a in arrays]) if arrays else np.zeros(0)
    if finite.size == 0:
        return (0.0, 1.0)
    largest = float(np.abs(finite).max()) or 1.0
    return (-largest, largest) if finite.min() < 0 else (0.0, largest)


def hover_text(head: str, value: float, low: float | None, high: float | None, null: float | None) -> str:
    """Return the lines of one hover label: a head, the value, its interval and its null."""
    lines = [head, f"value {style.number(float(value))}"]
    if low is not None and high is not None:
        lines.append(f"95 % interval {style.number(float(low))} to {style.number(float(high))}")
    if null is not None:
        lines.append(f"null {style.number(float(null))}")
    return "<br>".join(lines)


def heat_hover(
    z: Matrix,
    low: Matrix | None,
    high: Matrix | None,
    null: Matrix | None,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
) -> list[list[str]]:
    """Return the hover text of every cell: row, column, value, interval, null."""
    return [
        [
            hover_text(
                f"{style.text(rows[i])}, {style.text(columns[j])}",
                z[i, j],
                None if low is None else low[i, j],
                None if high is None else high[i, j],
                None if null is None else null[i, j],
            )
            for j in range(z.shape[1])
        ]
        for i in range(z.shape[0])
    ]

"""`draw`: a grid of panels as one plotly figure.

Grid, legend, colour bars and margins are laid out in pixels, so that titles, legends and labels do not meet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechhier.report import style
from mechhier.report.panels import (
    BarPanel,
    Curve,
    CurvePanel,
    HeatPanel,
    HistogramPanel,
    Panel,
    TreePanel,
    Vector,
    hover_text,
)

PAGE_WIDTH = 960  # pixels the sizes below are laid out for; a figure stretches with its page
PANEL_HEIGHT = 215
AXIS_HEIGHT = 52  # tick labels and axis title under a panel
LINE_HEIGHT = 17  # one line of a panel title or of the legend
TICK_SPACING = 0.058  # of the page's width: the least distance of two tick labels
MAX_CELL_LABELS = 80  # more cells than this in a heatmap: no number is written in them
LEAST_BINS = 9  # for which a histogram has room: a single one is a bar and not the whole panel
LEVEL_HEIGHT = 27  # one level of a tree
TREE_WIDTH = PAGE_WIDTH - 64 - 24  # of a tree's panel; what its nodes' places are laid out for
TREE_TEXT_SIZE = 11


@dataclass
class _Legend:
    """Which labels have been given a legend entry, and the note on dashed lines or marks."""

    shown: list[str] = field(default_factory=list)

    def entry(self, label: str) -> dict[str, Any]:
        first = bool(label) and label not in self.shown
        if first:
            self.shown.append(label)
        return {"name": style.text(label), "legendgroup": label, "showlegend": first}

    @property
    def rows(self) -> int:
        pixels = sum(48 + 6.4 * len(label) for label in self.shown)
        return math.ceil(pixels / (PAGE_WIDTH - 100))


def draw(panels: Sequence[Panel], *, title: str, columns: int, null_label: str = "") -> go.Figure:
    """Draw panels in a grid, row by row.

    Args:
        panels: at least one.
        title: of the whole figure.
        columns: panels in a row.
        null_label: what a dashed line or an open mark stands for, for the legend.

    Returns:
        A figure as wide as its page, its height fitting its rows.
    """
    columns = min(columns, sum(not isinstance(panel, TreePanel) for panel in panels) or 1)
    cells = _cells(panels, columns)
    heights = [PANEL_HEIGHT] * cells[-1][0]
    for (row, _), panel in zip(cells, panels, strict=True):
        if isinstance(panel, TreePanel):
            heights[row - 1] = LEVEL_HEIGHT * (1 + max(node.level for node in panel.nodes))
    wide = {row for (row, _), panel in zip(cells, panels, strict=True) if isinstance(panel, TreePanel)}
    rows = len(heights)
    titles = [style.wrapped(panel.title, _characters(panel, columns)) for panel in panels]
    title_height = max(t.count("<br>") + 1 for t in titles) * LINE_HEIGHT + 6
    gap = title_height + AXIS_HEIGHT
    plot_height = sum(heights) + (rows - 1) * gap
    figure = make_subplots(
        rows=rows,
        cols=columns,
        specs=[
            [{"colspan": columns}, *[None] * (columns - 1)] if row in wide else [{}] * columns
            for row in range(1, rows + 1)
        ],
        row_heights=heights,
        subplot_titles=_in_order(titles, cells, columns, wide),
        vertical_spacing=gap / plot_height if rows > 1 else 0.0,
        horizontal_spacing=(118 if any(isinstance(p, HeatPanel) for p in panels) else 74) / PAGE_WIDTH,
    )
    figure.update_annotations(font_size=style.PANEL_TITLE_SIZE, yanchor="bottom", yshift=2)
    legend = _Legend()
    has_null = False
    for index, panel in enumerate(panels):
        cell: dict[str, Any] = {"row": cells[index][0], "col": cells[index][1]}
        bottom = index + columns >= len(panels)
        left = panels[index - 1] if cell["col"] > 1 else None
        if isinstance(panel, CurvePanel) and isinstance(left, CurvePanel) and left.y_title == panel.y_title:
            panel = replace(panel, y_title="")  # said by its neighbour on the left
        if isinstance(panel, TreePanel):
            _tree(figure, panel, cell)
        elif isinstance(panel, HistogramPanel):
            _histogram(figure, panel, cell, legend)
        elif isinstance(panel, HeatPanel):
            _heat(figure, panel, cell, bottom, columns)
        elif isinstance(panel, BarPanel):
            has_null |= _bars(figure, panel, cell, legend)
        else:
            has_null |= _curves(figure, panel, cell, bottom, columns, legend)
    if has_null and null_label:
        entry = legend.entry(null_label)
        figure.add_scatter(
            x=[None], y=[None], mode="lines", line={"color": style.GREY, "width": 1.5, "dash": "dash"}, **entry
        )
    note = next((p.scale.note for p in panels if isinstance(p, CurvePanel | HeatPanel) and p.scale), "")
    axis_height = 12 if rows in wide else AXIS_HEIGHT
    bottom_height = axis_height + (LINE_HEIGHT + 8 if note else 4)
    if note:
        figure.add_annotation(
            x=0,
            y=0,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="top",
            yshift=-axis_height,
            showarrow=False,
            text=note,
            font={"size": 11, "color": style.GREY},
        )
    legend_height = legend.rows * (LINE_HEIGHT + 4) + (8 if legend.rows else 0)
    top = 44 + legend_height + title_height
    style.base_layout(
        figure,
        title=style.text(title),
        height=top + plot_height + bottom_height,
        top=top,
        bottom=bottom_height,
        right=70 if any(isinstance(p, HeatPanel) for p in panels) else 24,
    )
    figure.update_layout(
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1 + (title_height + 4) / plot_height,
            "yanchor": "bottom",
        }
    )
    return figure


def _cells(panels: Sequence[Panel], columns: int) -> list[tuple[int, int]]:
    """Return every panel's row and column, from 1; a tree has a row of its own."""
    cells: list[tuple[int, int]] = []
    row, column = 1, 0
    for index, panel in enumerate(panels):
        if column == columns or (index and isinstance(panel, TreePanel)):
            row, column = row + 1, 0
        cells.append((row, column + 1))
        column = columns if isinstance(panel, TreePanel) else column + 1
    return cells


def _characters(panel: Panel, columns: int) -> int:
    """Return how many characters of a panel's title fit in a line."""
    return int((PAGE_WIDTH - 64) / (1 if isinstance(panel, TreePanel) else columns) / 7.6) - 6


def _in_order(titles: Sequence[str], cells: Sequence[tuple[int, int]], columns: int, wide: set[int]) -> list[str]:
    """Return the titles as plotly takes them: one for every cell of the grid, empty ones too."""
    by_cell = dict(zip(cells, titles, strict=True))
    rows = max(row for row, _ in cells)
    return [
        by_cell.get((row, column), "")
        for row in range(1, rows + 1)
        for column in range(1, 2 if row in wide else columns + 1)
    ]


def _curves(
    figure: go.Figure, panel: CurvePanel, cell: dict[str, Any], bottom: bool, columns: int, legend: _Legend
) -> bool:
    has_null = False
    least = _least_positive(panel.curves) if panel.log else -np.inf
    for curve in panel.curves:
        x = curve.x if panel.scale is None else panel.scale.position(curve.x)
        if curve.low is not None and curve.high is not None:
            low = np.where(curve.high > least, np.maximum(curve.low, least), np.nan)
            figure.add_scatter(**_band(x, low, curve.high), **_band_style(curve), legendgroup=curve.label, **cell)
        if curve.null is not None and np.isfinite(curve.null).any():
            has_null = True
            line = {"color": curve.color, "width": 1.5, "dash": "dash"}
            figure.add_scatter(
                x=x,
                y=np.where(curve.null > 0, curve.null, np.nan) if panel.log else curve.null,
                mode="lines" if len(x) > 1 else "markers",
                marker={"symbol": "line-ew-open", "size": 14, "color": curve.color},
                line=line,
                legendgroup=curve.label,
                showlegend=False,
                hoverinfo="skip",
                **cell,
            )
        figure.add_scatter(
            x=x,
            y=np.where(curve.y > 0, curve.y, np.nan) if panel.log else curve.y,
            mode="+".join((["lines"] if curve.line else []) + (["markers"] if curve.symbol else [])),
            line={"color": curve.color, "width": 2, "dash": curve.dash},
            marker={"symbol": curve.symbol or "circle", "size": 6 if curve.line else 5},
            text=_curve_hover(curve, panel),
            hovertemplate="%{text}<extra></extra>",
            **legend.entry(curve.label),
            **cell,
        )
    if panel.band is not None:
        figure.add_hrect(
            y0=panel.band[0],
            y1=panel.band[1],
            fillcolor=style.translucent(style.GREY, 0.15),
            line_width=0,
            layer="below",
            **cell,
        )
    if not any(np.isfinite(curve.y).any() for curve in panel.curves):
        _say_empty(figure, cell)
    figure.update_yaxes(
        title={"text": style.wrapped(panel.y_title, 26), "standoff": 6},
        rangemode="tozero" if panel.from_zero else "normal",
        **cell,
    )
    if panel.scale is not None:
        figure.update_xaxes(**panel.scale.axis(title=bottom, spacing=TICK_SPACING * columns), **cell)
    elif panel.log:
        figure.update_xaxes(type="log", title={"text": style.text(panel.x_title), "standoff": 6}, **cell)
        figure.update_xaxes(**_log_ticks([curve.x for curve in panel.curves]), **cell)
        figure.update_yaxes(type="log", **_log_ticks([curve.y for curve in panel.curves]), **cell)
    else:
        figure.update_xaxes(title={"text": style.text(panel.x_title), "standoff": 6}, tickformat="d", **cell)
        figure.update_xaxes(**_whole_number_ticks([c.x for c in panel.curves]), **cell)
    return has_null


def _least_positive(curves: Sequence[Curve]) -> float:
    """Return half the smallest positive value or null of all curves: where a logarithmic axis can begin."""
    values = np.concatenate([np.zeros(0), *(v for curve in curves for v in (curve.y, curve.null) if v is not None)])
    return float(values[values > 0].min(initial=np.inf)) / 2


def _log_ticks(values: Sequence[Vector]) -> dict[str, Any]:
    """Return labels at powers of ten, and at 2 and 5 times them where there are few."""
    known = np.concatenate([np.zeros(0), *values])
    known = known[known > 0]
    decades = math.log10(known.max() / known.min()) if known.size else 1.0
    return {"dtick": "D2" if decades < 1.5 else math.ceil(decades / 8)}


def _whole_number_ticks(positions: Sequence[Vector]) -> dict[str, Any]:
    known = np.concatenate([*positions]) if positions else np.zeros(1)
    first, last = float(known.min()), float(known.max())
    pad = 0.06 * (last - first) or 0.5
    return {"range": [first - pad, last + pad], "dtick": max(1, math.ceil((last - first) / 8))}


def _band(x: Vector, low: Vector, high: Vector) -> dict[str, Any]:
    """Return one closed polygon for every run of points whose interval is known; runs are parted by None."""
    known = np.isfinite(low) & np.isfinite(high)
    starts = np.flatnonzero(known & ~np.r_[False, known[:-1]])
    ends = np.flatnonzero(known & ~np.r_[known[1:], False]) + 1
    xs: list[float | None] = []
    ys: list[float | None] = []
    for start, end in zip(starts, ends, strict=True):
        run = slice(start, end)
        xs += [*x[run].tolist(), *x[run][::-1].tolist(), None]
        ys += [*high[run].tolist(), *low[run][::-1].tolist(), None]
    return {"x": xs, "y": ys}


def _band_style(curve: Curve) -> dict[str, Any]:
    return {
        "mode": "lines",
        "fill": "toself",
        "fillcolor": style.translucent(curve.color, 0.18),
        "line": {"width": 1, "color": style.translucent(curve.color, 0.25)},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _curve_hover(curve: Curve, panel: CurvePanel) -> list[str]:
    where = "step" if panel.scale is not None else panel.x_title
    return [
        hover_text(
            (f"{style.text(curve.names[i])}<br>" if curve.names is not None else "")
            + f"{style.text(curve.label)}<br>{style.text(where)} {curve.x[i]:,g}",
            curve.y[i],
            None if curve.low is None else curve.low[i],
            None if curve.high is None else curve.high[i],
            None if curve.null is None else curve.null[i],
        )
        for i in range(len(curve.x))
    ]


def _heat(figure: go.Figure, panel: HeatPanel, cell: dict[str, Any], bottom: bool, columns: int) -> None:
    low, high = panel.limits
    marks = np.zeros(panel.z.shape, dtype=bool) if panel.marks is None else panel.marks
    labelled = panel.z.size <= MAX_CELL_LABELS and panel.scale is None
    labels = [
        [
            (_cell_label(value, max(abs(low), high)) if labelled else "") + ("★" if mark else "")
            for value, mark in zip(values, marked, strict=True)
        ]
        for values, marked in zip(panel.z.tolist(), marks.tolist(), strict=True)
    ]
    x_domain, y_domain = _domains(figure, cell)
    x = panel.x if panel.scale is None else panel.scale.position([float(str(step)) for step in panel.x])
    figure.add_heatmap(
        z=panel.z,
        x=[style.text(label) for label in panel.x] if panel.scale is None else _edges(np.asarray(x)),
        y=[style.text(label) for label in panel.y],
        zmin=low,
        zmax=high,
        colorscale=[list(stop) for stop in (style.DIVERGING if low < 0 else style.SEQUENTIAL)],
        xgap=1 if panel.scale is None else 0,
        ygap=1,
        text=labels,
        texttemplate="%{text}",
        customdata=panel.hover,
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        colorbar={
            "x": x_domain[1] + 6 / PAGE_WIDTH,
            "xpad": 0,
            "y": (y_domain[0] + y_domain[1]) / 2,
            "len": y_domain[1] - y_domain[0],
            "ypad": 0,
            "thickness": 9,
            "outlinewidth": 0,
            "nticks": 5,
            "tickfont": {"size": 10},
            "exponentformat": "power",
            "showexponent": "last",
        },
        **cell,
    )
    if not np.isfinite(panel.z).any():
        _say_empty(figure, cell)
    figure.update_yaxes(
        title={"text": style.text(panel.y_title), "standoff": 6},
        type="category",
        autorange="reversed",
        showgrid=False,
        tickvals=_thinned([style.text(label) for label in panel.y], 12),
        **cell,
    )
    if panel.scale is None:
        figure.update_xaxes(
            title={"text": style.text(panel.x_title), "standoff": 6},
            type="category",
            showgrid=False,
            tickangle=0,
            tickvals=_thinned([style.text(label) for label in panel.x], _room(panel.x, columns)),
            **cell,
        )
    else:
        spacing = 1.3 * TICK_SPACING * columns  # the colour bar makes the axis shorter
        figure.update_xaxes(**panel.scale.axis(title=bottom, spacing=spacing), showgrid=False, **cell)


def _cell_label(value: float, largest: float) -> str:
    """Return a cell's number, with as many decimals as the largest value of its colour scale calls for."""
    if not math.isfinite(value):
        return ""
    return f"{value:.2f}" if largest >= 0.1 else f"{value:.3f}" if largest >= 0.01 else f"{value:.1e}"


def _room(labels: Sequence[object], columns: int) -> int:
    """Return how many of these labels fit side by side under one panel."""
    longest = max((len(str(label)) for label in labels), default=1)
    return max(2, int(PAGE_WIDTH * 0.8 / columns / (7.5 * longest + 4)))


def _thinned(labels: Sequence[str], most: int) -> list[str]:
    """Return every n-th label, so that at most `most` are left."""
    return list(labels[:: max(1, math.ceil(len(labels) / most))])


def _edges(centers: Vector) -> Vector:
    """Return cell borders half-way between neighbouring positions (a heatmap's columns then tile the axis)."""
    if len(centers) == 1:
        return np.array([centers[0] - 0.5, centers[0] + 0.5])
    middle = (centers[1:] + centers[:-1]) / 2
    return np.concatenate([[centers[0] - (middle[0] - centers[0])], middle, [2 * centers[-1] - middle[-1]]])


def _bars(figure: go.Figure, panel: BarPanel, cell: dict[str, Any], legend: _Legend) -> bool:
    positions = np.arange(len(panel.groups), dtype=float)
    width = 0.8 / max(1, len(panel.series))
    has_null = False
    for index, bars in enumerate(panel.series):
        x = positions + (index - (len(panel.series) - 1) / 2) * width
        error = None
        if bars.low is not None and bars.high is not None:
            error = {
                "type": "data",
                "symmetric": False,
                "array": np.nan_to_num(np.maximum(bars.high - bars.y, 0)),
                "arrayminus": np.nan_to_num(np.maximum(bars.y - bars.low, 0)),
                "color": "#333333",
                "thickness": 1,
                "width": 2,
            }
        hover = [
            hover_text(
                f"{style.text(group)}<br>{style.text(bars.label)}",
                bars.y[i],
                None if bars.low is None else bars.low[i],
                None if bars.high is None else bars.high[i],
                None if bars.null is None else bars.null[i],
            )
            for i, group in enumerate(panel.groups)
        ]
        figure.add_bar(
            x=x,
            y=bars.y,
            width=width * 0.92,
            marker={"color": bars.color},
            error_y=error,
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            **legend.entry(bars.label),
            **cell,
        )
        if bars.null is not None and np.isfinite(bars.null).any():
            has_null = True
            half = width * 0.46
            xs = [value for center in x.tolist() for value in (center - half, center + half, None)]
            ys = [value for null in bars.null.tolist() for value in (null, null, None)]
            figure.add_scatter(
                x=xs,
                y=ys,
                mode="lines",
                line={"color": style.BLACK, "width": 2, "dash": "dot"},
                legendgroup=bars.label,
                showlegend=False,
                hoverinfo="skip",
                **cell,
            )
    if not any(np.isfinite(bars.y).any() for bars in panel.series):
        _say_empty(figure, cell)
    figure.update_xaxes(
        tickmode="array",
        tickvals=positions.tolist(),
        ticktext=[style.text(group) for group in panel.groups],
        range=[-0.6, len(panel.groups) - 0.4],
        title={"text": style.text(panel.x_title), "standoff": 6},
        showgrid=False,
        **cell,
    )
    figure.update_yaxes(title={"text": style.wrapped(panel.y_title, 26), "standoff": 6}, **cell)
    figure.add_hline(y=0, line={"color": "#999999", "width": 1}, **cell)
    return has_null


def _histogram(figure: go.Figure, panel: HistogramPanel, cell: dict[str, Any], legend: _Legend) -> None:
    centers = (panel.edges[1:] + panel.edges[:-1]) / 2
    first, last = np.ceil(panel.edges[:-1]).tolist(), np.ceil(panel.edges[1:] - 1).tolist()
    bins = [f"{a:,g}" if a == b else f"{a:,g} to {b:,g}" for a, b in zip(first, last, strict=True)]
    where = style.text(panel.x_title)
    figure.add_bar(
        x=centers,
        y=panel.bars.y,
        width=np.diff(panel.edges),
        marker={"color": style.translucent(panel.bars.color, 0.55), "line": {"width": 0}},
        hovertext=[
            f"{style.text(panel.bars.label)}<br>{where} {b}<br>value {style.number(y)}"
            for b, y in zip(bins, panel.bars.y.tolist(), strict=True)
        ],
        hovertemplate="%{hovertext}<extra></extra>",
        **legend.entry(panel.bars.label),
        **cell,
    )
    if panel.law is not None:
        figure.add_scatter(
            x=centers,
            y=panel.law.y,
            mode="lines" if len(centers) > 1 else "markers",
            line={"color": panel.law.color, "width": 2, "dash": panel.law.dash},
            marker={"color": panel.law.color, "size": 8},
            text=[
                f"{style.text(panel.law.label)}<br>{where} {b}<br>value {style.number(y)}"
                for b, y in zip(bins, panel.law.y.tolist(), strict=True)
            ],
            hovertemplate="%{text}<extra></extra>",
            **legend.entry(panel.law.label),
            **cell,
        )
    if not (panel.bars.y > 0).any():
        _say_empty(figure, cell)
    pad = max(0, LEAST_BINS - len(centers)) / 2 * (panel.edges[1] - panel.edges[0])
    ends = [panel.edges[0] - pad, panel.edges[-1] + pad]
    figure.update_xaxes(title={"text": where, "standoff": 6}, range=ends, **cell)
    figure.update_yaxes(title={"text": style.wrapped(panel.y_title, 26), "standoff": 6}, rangemode="tozero", **cell)


def _tree(figure: go.Figure, panel: TreePanel, cell: dict[str, Any]) -> None:
    depth = max(node.level for node in panel.nodes)
    xs: list[float | None] = []
    ys: list[float | None] = []
    for node in panel.nodes:
        if node.parent is not None:
            above = panel.nodes[node.parent]
            # Right angles: a slanted line to a distant leaf would cross the labels between.
            xs += [above.x, above.x, node.x, node.x, None]
            ys += [above.level + 0.3, above.level + 0.45, above.level + 0.45, node.level - 0.3, None]
    edges = {"color": "#b0b0b0", "width": 1}
    figure.add_scatter(x=xs, y=ys, mode="lines", line=edges, hoverinfo="skip", showlegend=False, **cell)
    for is_leaf, color in ((False, style.BLUE), (True, style.VERMILLION)):
        nodes = [node for node in panel.nodes if node.is_leaf == is_leaf]
        figure.add_scatter(
            x=[node.x for node in nodes],
            y=[node.level for node in nodes],
            mode="text",
            text=[style.text(node.label) for node in nodes],
            textfont={"size": TREE_TEXT_SIZE, "color": color},
            customdata=[node.hover for node in nodes],
            hovertemplate="%{customdata}<extra></extra>",
            showlegend=False,
            **cell,
        )
    hidden = {"visible": False, "fixedrange": True}
    figure.update_xaxes(range=[0, TREE_WIDTH], **hidden, **cell)
    figure.update_yaxes(range=[depth + 0.5, -0.5], **hidden, **cell)


def _say_empty(figure: go.Figure, cell: dict[str, Any]) -> None:
    """Write into a panel that it has nothing to show (a plain white panel would look like a bug)."""
    x_domain, y_domain = _domains(figure, cell)
    figure.add_annotation(
        x=sum(x_domain) / 2,
        y=sum(y_domain) / 2,
        xref="paper",
        yref="paper",
        xanchor="center",
        yanchor="middle",
        showarrow=False,
        text="no value is defined here",
        font={"color": style.GREY},
        bgcolor="white",
    )


def _domains(figure: go.Figure, cell: dict[str, Any]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return a panel's place in the figure: its x and its y domain, as fractions of the plotting area."""
    subplot: Any = figure.get_subplot(cell["row"], cell["col"])
    return subplot.xaxis.domain, subplot.yaxis.domain

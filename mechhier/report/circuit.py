"""The drawing of a planted circuit: layers upward, positions to the right, an arrow for what a head reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from mechhier.report import style

if TYPE_CHECKING:
    from mechhier.models.planted import Circuit, Part, PlantedModel

ROW_HEIGHT = 46  # pixels of one attention or MLP layer
LEFT, RIGHT, TOP, BOTTOM = 130, 24, 72, 24  # margins: names of the layers; title and legend
LABEL_SHARE = 0.26  # of the width: labels of the last column
NODE = 16  # pixels
TITLE_WIDTH = 110  # characters

_KINDS = {
    "attention": ("attention head", style.BLUE, "circle"),
    "mlp": ("MLP", style.VERMILLION, "square"),
}
_STANDBY = ("silent unless an earlier part is ablated", style.BLUE, "circle-open")


def plot_circuit(planted: PlantedModel, *, title: str | None = None) -> go.Figure:
    """Draw a planted model's circuit on its example; see `mechhier.report.plot`.

    Grey lines are the residual streams of the example's tokens. A head is drawn where it writes, with an arrow from the
    stream that it reads; an MLP reads the stream that it writes to. Heads and MLPs that do nothing are left out.

    Args:
        planted: any planted model.
        title: of the figure; the default says what the model calibrates.

    Returns:
        A figure whose height fits the number of layers.
    """
    circuit = planted.circuit
    rows = _rows(circuit)
    top = len(rows) + 1
    figure = go.Figure()
    for index, (layer, component) in enumerate(rows):
        if layer % 2 == 0:
            figure.add_hrect(y0=index + 0.5, y1=index + 1.5, fillcolor="#f3f5f7", line_width=0, layer="below")
        label = f"layer {layer}, {'attention' if component == 'attention' else 'MLP'}"
        figure.add_annotation(
            x=0, xref="paper", xanchor="right", y=index + 1, text=label, showarrow=False, font_color=style.GREY
        )
    for column, token in enumerate(circuit.tokens):
        _arrow(figure, (column, 0.2), (column, top - 0.2), color="#b8bec4")
        figure.add_annotation(x=column, y=0, text=f"<b>{style.text(token)}</b>", showarrow=False, yanchor="middle")
    figure.add_annotation(
        x=len(circuit.tokens) - 1, y=top, text=f"predicts <b>{style.text(circuit.prediction)}</b>", showarrow=False
    )
    for part in circuit.parts:
        _part(figure, part, 1 + rows.index((part.layer, part.component)))
    entries = [_KINDS[kind] for kind in _KINDS if any(part.component == kind for part in circuit.parts)]
    if any(part.is_standby for part in circuit.parts):
        entries.append(_STANDBY)
    for label, color, symbol in entries:
        marker = {"symbol": symbol, "size": 12, "color": color, "line_width": 2, "line_color": color}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=label, marker=marker)
    words = title or f"{style.capital(planted.name.replace('_', ' '))}: {planted.purpose}"
    height = TOP + BOTTOM + ROW_HEIGHT * (len(rows) + 1)
    style.base_layout(
        figure, title=style.wrapped(words, TITLE_WIDTH), height=height, top=TOP, bottom=BOTTOM, right=RIGHT
    )
    figure.update_layout(
        margin_l=LEFT,
        showlegend=True,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
    )
    hidden = {"visible": False, "fixedrange": True}
    left, columns = 0.3, len(circuit.tokens) - 1
    figure.update_xaxes(range=[-left, columns + (left + columns) * LABEL_SHARE / (1 - LABEL_SHARE)], **hidden)
    figure.update_yaxes(range=[-0.35, top + 0.35], **hidden)
    return figure


def _rows(circuit: Circuit) -> list[tuple[int, str]]:
    """(layer, component) from below; MLPs only in a circuit that has any."""
    components = ["attention", "mlp"] if any(part.component == "mlp" for part in circuit.parts) else ["attention"]
    return [(layer, component) for layer in range(circuit.n_layers) for component in components]


def _part(figure: go.Figure, part: Part, row: int) -> None:
    _, color, symbol = _KINDS[part.component]
    for column in part.reads:
        if column != part.writes:
            dash = "dash" if part.is_standby else "solid"
            _arrow(figure, (column, row - 0.42), (part.writes - 0.035, row - 0.03), color=color, dash=dash)
    symbol = f"{symbol}-open" if part.is_standby else symbol
    words = f"<b>{style.text(part.role)}</b><br>writes {style.text(part.content)}"
    figure.add_scatter(
        x=[part.writes],
        y=[row],
        mode="markers",
        marker={"symbol": symbol, "size": NODE, "color": color, "line_width": 2, "line_color": color},
        showlegend=False,
        hovertemplate=f"{words}<extra></extra>",
    )
    figure.add_annotation(
        x=part.writes, y=row, text=words, showarrow=False, xanchor="left", xshift=NODE, align="left", font_color=color
    )


def _arrow(
    figure: go.Figure, start: tuple[float, float], end: tuple[float, float], *, color: str, dash: str = "solid"
) -> None:
    """A line with a head at its end; plotly's own arrows cannot be dashed."""
    figure.add_scatter(
        x=[start[0], end[0]],
        y=[start[1], end[1]],
        mode="lines+markers",
        line={"color": color, "width": 2, "dash": dash},
        marker={"symbol": "arrow", "size": [0, 11], "angleref": "previous", "color": color},
        showlegend=False,
        hoverinfo="skip",
    )

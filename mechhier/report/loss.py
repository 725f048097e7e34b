"""The loss over training and by position in the row, against what the ideal predictor of the language reaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from mechhier.report import style
from mechhier.report.drawing import draw
from mechhier.report.panels import Curve, CurvePanel

if TYPE_CHECKING:
    from mechhier.models import Run

UNITS = "loss (nats per token)"


def plot_run(run: Run, *, title: str | None = None) -> go.Figure:
    """Draw a run's loss over training, and at three checkpoints by position in the row, against the floor.

    Returns:
        A plotly figure of two panels.

    Raises:
        RunError: The run has no evaluation by position (runs of mechhier 0.2 and before have none).
    """
    evaluation = run.evaluation
    band = band_of(evaluation) if "floor" in evaluation else None
    panels = [
        _loss_panel("over training", run.log, band, style.StepScale.of(run.log["step"])),
        _position_panel("by position in the row", evaluation),
    ]
    return draw(panels, title=title or f"Loss ({'/'.join(run.path.parts[-2:])})", columns=2)


def plot_positions(evaluations: Mapping[str, xr.Dataset], *, title: str = "Loss by position") -> go.Figure:
    """Draw the held-out loss by position in the row at the first, the middle and the last checkpoint of every arm.

    Args:
        evaluations: arm -> the `evaluation` of its run.
        title: of the figure.

    Returns:
        A plotly figure, a panel per arm.
    """
    return draw([_position_panel(arm, found) for arm, found in evaluations.items()], title=title, columns=2)


def band_of(floor: xr.Dataset) -> tuple[float, float]:
    """Interval of the best possible loss in nats per predicted token; both ends are the same where it is exact."""
    estimate, error = float(floor.floor_mean), float(floor.floor_mean_error)
    if np.isnan(error):
        return float(floor.floor_lower_mean), float(floor.floor_upper_mean)
    return estimate - 1.96 * error, estimate + 1.96 * error


def plot_loss(
    logs: Mapping[str, pd.DataFrame], floors: Mapping[str, tuple[float, float]] | None = None, *, title: str = "Loss"
) -> go.Figure:
    """Draw the loss of every arm over training against the floor of its language.

    Args:
        logs: arm -> log with the columns step, loss (training) and eval_loss (held-out; NaN where not evaluated), in
            nats per token.
        floors: arm -> (lower, upper) bound in nats per token of the loss that no model can be below; equal where the
            floor is known exactly. Arms without one are drawn without.
        title: of the figure.

    Returns:
        A plotly figure, a panel per arm.

    Raises:
        ValueError: for no log, a log without the columns, or a floor of an arm that has no log.
    """
    if not logs:
        raise ValueError("cannot plot the loss: no log was given")
    floors = floors or {}
    unknown = sorted(set(floors) - set(logs))
    if unknown:
        raise ValueError(f"floors are given for arms without a log: {', '.join(unknown)}")
    for arm, log in logs.items():
        missing = sorted({"step", "loss"} - set(log.columns))
        if missing:
            raise ValueError(f"the log of arm {arm!r} lacks {', '.join(missing)}; it has {', '.join(log.columns)}")
    scale = style.StepScale.of(step for log in logs.values() for step in log["step"])
    panels = [_loss_panel(arm, log, floors.get(arm), scale) for arm, log in logs.items()]
    return draw(panels, title=title, columns=2)


def _loss_panel(arm: str, log: pd.DataFrame, floor: tuple[float, float] | None, scale: style.StepScale) -> CurvePanel:
    curves = [_logged(log, "loss", "training", color=style.SKY, symbol=None)]
    if "eval_loss" in log.columns:
        curves.append(_logged(log, "eval_loss", "held out", color=style.BLUE, symbol="circle"))
    band = None
    if floor is not None:
        lower, upper = floor
        ends = np.array([log["step"].min(), log["step"].max()], dtype=float)
        exact = bool(np.isclose(lower, upper))
        lines = {"floor (exact)": lower} if exact else {"floor: lower bound": lower, "floor: upper bound": upper}
        for (label, value), dash in zip(lines.items(), ("dash", "dot"), strict=False):
            curves.append(Curve(label, ends, np.full(2, value), style.VERMILLION, dash=dash, symbol=None))
        band = None if exact else (lower, upper)
    return CurvePanel(arm, UNITS, curves, scale, band=band, from_zero=False)


def _logged(log: pd.DataFrame, column: str, label: str, *, color: str, symbol: str | None) -> Curve:
    steps, values = log["step"].to_numpy(dtype=float), log[column].to_numpy(dtype=float)
    known = np.isfinite(values)
    return Curve(label, steps[known], values[known], color, symbol=symbol)


def _position_panel(arm: str, evaluation: xr.Dataset) -> CurvePanel:
    positions = evaluation.position.values.astype(float)
    n_steps = evaluation.sizes["step"]
    shown = dict.fromkeys([0, n_steps // 2, n_steps - 1])
    curves = []
    for index, color in zip(shown, (style.SKY, style.GREEN, style.BLUE), strict=False):
        at = evaluation.isel(step=index)
        curves.append(
            Curve(
                f"step {int(at.step):,}",
                positions,
                at.eval_loss.values,
                color,
                low=at.eval_loss_low.values,
                high=at.eval_loss_high.values,
                symbol=None,
            )
        )
    if "floor" in evaluation:
        exact = np.isfinite(evaluation.floor.values).all()
        names = (
            {"floor": "ideal predictor"}
            if exact
            else {"floor_lower": "floor: lower bound", "floor_upper": "floor: upper bound"}
        )
        for (name, label), dash in zip(names.items(), ("dash", "dot"), strict=False):
            curves.append(Curve(label, positions, evaluation[name].values, style.VERMILLION, dash=dash, symbol=None))
    return CurvePanel(arm, UNITS, curves, x_title="position in the row", from_zero=False)

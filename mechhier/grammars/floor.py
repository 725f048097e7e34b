"""The loss of the ideal predictor by position: what no model of the language can be better than on average."""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy import stats

from mechhier.grammars.base import Grammar, Sample
from mechhier.progress import track
from mechhier.results import CONFIDENCE

_ROWS_AT_A_TIME = 16  # an exact predictor holds a posterior per token


def floor(grammar: Grammar, sample: Sample) -> xr.Dataset:
    """Return the ideal predictor's loss by position, its bounds, and their means, in nats.

    Args:
        grammar: The language.
        sample: At least two rows of its text that begin documents.

    Returns:
        ``floor``, its standard error of estimation ``floor_error`` (see :class:`IdealLoss`), ``floor_lower`` and
        ``floor_upper`` over ``position``; scalars ``floor_mean``, ``floor_lower_mean`` and ``floor_upper_mean`` over
        positions 1 and later, with 95 % intervals (``_low``, ``_high``), and ``floor_mean_error``.

        The intervals are Student's, for the mean over all rows that the language has: of rows and of estimation alike,
        as each row's estimate has an error of its own. ``floor_mean_error`` is of estimation alone, and tells how well
        the mean of these very rows is known.

    Raises:
        ValueError: A row does not begin a document, or is not text of the language.
    """
    n_rows, context = sample.tokens.shape
    parts = []
    with track("the ideal predictor's loss", total=n_rows) as advance:
        for first in range(0, n_rows, _ROWS_AT_A_TIME):
            rows = slice(first, min(first + _ROWS_AT_A_TIME, n_rows))
            labels = {name: label[rows] for name, label in sample.labels.items()}
            parts.append(grammar.ideal_loss(Sample(sample.tokens[rows], labels)))
            advance(rows.stop - rows.start)
    result = xr.Dataset(
        coords={"position": ("position", np.arange(context), {"long_name": "position in the row"})},
        attrs={
            "definition": "-log P(token | the tokens before it in the row) of a predictor that knows the grammar",
            "method": "; ".join(dict.fromkeys(part.method for part in parts)),
            "grammar": grammar.model_dump_json(),
            "n_rows": n_rows,
            "context": context,
        },
    )
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, n_rows - 1)
    ideal = "the ideal predictor's loss"
    for field, name, what in (
        ("estimate", "floor", ideal),
        ("lower", "floor_lower", f"lower bound of {ideal}"),
        ("upper", "floor_upper", f"upper bound of {ideal}"),
    ):
        loss = np.concatenate([getattr(part, field) for part in parts])
        row_means = loss[:, 1:].mean(axis=1)
        mean, half_width = row_means.mean(), quantile * row_means.std(ddof=1) / np.sqrt(n_rows)
        result[name] = ("position", loss.mean(axis=0), {"long_name": what, "units": "nats"})
        for suffix, value, words in (
            ("_mean", mean, ""),
            ("_mean_low", mean - half_width, ", 95 % interval, low end"),
            ("_mean_high", mean + half_width, ", 95 % interval, high end"),
        ):
            long_name = f"{what}, mean over positions from 1{words}"
            result[name + suffix] = ((), float(value), {"long_name": long_name, "units": "nats"})
    # Rows are estimated independently.
    by_position = np.sqrt((np.concatenate([part.error for part in parts]) ** 2).sum(axis=0)) / n_rows
    of_mean = np.sqrt((np.concatenate([part.mean_error for part in parts]) ** 2).sum()) / n_rows
    words = {"long_name": "standard error of estimation of the ideal predictor's loss", "units": "nats"}
    result["floor_error"] = ("position", by_position, words)
    result["floor_mean_error"] = ((), float(of_mean), words)
    return result

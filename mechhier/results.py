"""What a result is: an `xarray.Dataset` with named dims, units, intervals as variables, and its provenance in attrs.

Conventions, kept by every phenomenon, sweep and figure:

- every variable has `long_name` and `units`;
- `X_low`, `X_high` are the bounds of the 95 % interval of `X`; `X_uniform`, `X_null` its baseline;
- attrs hold phenomenon, definition, source, model, dtype, seed, sample sizes and versions, as strings and numbers, so
  that what is returned is what is saved.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy import stats

from mechhier.files import replacing

CONFIDENCE = 0.95
N_RESAMPLES = 999
_BOOTSTRAP_BYTES = 2**26

Variables = dict[str, tuple[Sequence[str], np.ndarray, dict[str, str]]]


class MeasurementWarning(UserWarning):
    """A result holds NaN where a number could be expected; the message says where and why."""


def versions() -> dict[str, str]:
    """Versions of the packages that a number depends on, as result attributes."""
    return {f"{name}_version": version(name) for name in ("mechhier", "transformer_lens", "transformers", "torch")}


def ratio(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    """The mean of unequal samples along an axis."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums.sum(axis) / counts.sum(axis)


def mean_interval(
    sums: Float[np.ndarray, "sample ..."],
    counts: Float[np.ndarray, "sample ..."],
    *,
    seed: int,
    statistic: Callable[[np.ndarray, np.ndarray, int], np.ndarray] = ratio,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of unequal samples and its 95 % percentile-bootstrap interval, whole samples resampled.

    A sample is one sequence: its positions are not independent, so it is drawn as a whole. The estimate is
    `sums.sum(0) / counts.sum(0)`.

    Args:
        sums: Per sample, the sum of the measured values.
        counts: Per sample, how many values were summed; broadcast against `sums`.
        seed: Seed of the resampling.
        statistic: What is estimated from sums, counts and the axis of the samples, the mean unless given.

    Returns:
        Estimate, lower and upper bound, each of the shape of one sample; NaN where no value was counted. Samples that
        counted nothing are not resampled. With one sample the bounds are NaN.
    """
    sums, counts = np.broadcast_arrays(np.asarray(sums, np.float64), np.asarray(counts, np.float64))
    estimate = statistic(sums, counts, 0)
    counted = counts.reshape(len(counts), -1).any(axis=1)
    sums, counts = sums[counted], counts[counted]
    if len(sums) < 2:
        return estimate, np.full_like(estimate, np.nan), np.full_like(estimate, np.nan)
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        # Samples that are all alike have an interval of no width; scipy gives it, with a warning.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (sums, counts),
            statistic,
            paired=True,
            axis=0,
            vectorized=True,
            method="percentile",
            confidence_level=CONFIDENCE,
            n_resamples=N_RESAMPLES,
            batch=max(1, _BOOTSTRAP_BYTES // (8 * max(1, sums.size))),
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return estimate, interval.low, interval.high


def scored(
    name: str,
    dims: Sequence[str],
    sums: Float[np.ndarray, "sample ..."],
    counts: Float[np.ndarray, "sample ..."],
    *,
    long_name: str,
    units: str,
    seed: int,
) -> Variables:
    """The variables `name`, `name_low`, `name_high` of a mean over samples (see `mean_interval`)."""
    values = mean_interval(sums, counts, seed=seed)
    labels = (long_name, f"{long_name}, lower bound (95 %)", f"{long_name}, upper bound (95 %)")
    return {
        name + suffix: (dims, value, {"long_name": label, "units": units})
        for suffix, value, label in zip(("", "_low", "_high"), values, labels, strict=True)
    }


def best_of(
    sums: Float[np.ndarray, "sample layer head"], counts: Float[np.ndarray, "sample layer head"]
) -> tuple[int, int, slice]:
    """The head with the largest mean on every other sample, and the samples that did not choose it.

    A maximum over heads is biased up on the samples that chose it; on the others it is not.

    Returns:
        Layer, head, and the slice of the samples on which to score it.
    """
    sums, counts = np.broadcast_arrays(sums, counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums[::2].sum(0) / counts[::2].sum(0)
    layer, head = np.unravel_index(np.argmax(np.nan_to_num(means, nan=-np.inf)), means.shape)
    return int(layer), int(head), slice(1, None, 2)


def save(result: xr.Dataset | xr.DataTree, path: str | Path) -> Path:
    """Write a result, or the tree of a sweep, as netCDF, whole or not at all.

    Returns:
        The path written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        result.to_netcdf(temporary, engine="h5netcdf")
    return path


def load(path: str | Path) -> xr.Dataset:
    """Read a result into memory.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is not a whole netCDF file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no result at {path}")
    try:
        return xr.load_dataset(path, engine="h5netcdf")
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is not a readable result ({error}); delete it and measure again") from error


def netcdf_safe(attributes: dict[str, Any]) -> dict[str, str | int | float]:
    """Attributes that netCDF can hold: booleans as 0 and 1, None as text, the rest unchanged.

    Raises:
        TypeError: A value that is neither text, number, boolean nor None.
    """
    safe: dict[str, str | int | float] = {}
    for key, value in attributes.items():
        if value is None:
            safe[key] = str(value)
        elif isinstance(value, bool):
            safe[key] = int(value)
        elif isinstance(value, str | int | float):
            safe[key] = value
        else:
            raise TypeError(f"attribute {key!r} is a {type(value).__name__}; results hold text and numbers")
    return safe

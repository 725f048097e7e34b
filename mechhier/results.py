"""What a result is: an `xarray.Dataset` with named dims, units, intervals as variables, and its provenance in attrs.

Conventions, kept by every phenomenon, sweep and figure:

- every variable has `long_name` and `units`;
- `X_low`, `X_high` are the bounds of the 95 % interval of `X`; `X_uniform`, `X_null` its baseline;
- attrs hold phenomenon, definition, source, model, dtype, seed, sample sizes and versions, as strings and numbers, so
  that what is returned is what is saved.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from scipy import stats
from xarray.backends import H5NetCDFStore

from mechhier import netcdf
from mechhier.files import absolute, errors_name, make_folder, write_whole
from mechhier.specs import shown

_HASH = b"\nsha256 "
"""Between a saved result and the hash of its bytes."""
CONFIDENCE = 0.95
N_RESAMPLES = 999
"""Such that the quantiles of `CONFIDENCE` are resamples themselves."""
MIN_SAMPLES = 4
"""With fewer samples an interval is undefined: what spread they have says next to nothing."""
INTERVAL = (
    f"95 % studentised bootstrap over {{samples}}, {N_RESAMPLES} resamples, never narrower than Student's t, within the "
    f"variable's range; accuracies: Wilson, outcomes over their design effect; undefined (NaN) below {MIN_SAMPLES} {{samples}}"
)
"""The words for the intervals of `scored` in a result's attribute `interval`."""
_LEAST_SPREAD = 0.5
"""Of a resample, relative to 1/n of the samples' own. A resample that drew one sample n times has no spread, and its
Student statistic no bound; with this the statistic stays below 2 n times its numerator, and coverage as it was."""
_BOOTSTRAP_BYTES = 2**26
_TAIL = (1 - CONFIDENCE) / 2

FAILED_STEPS = "failed_steps"
"""Attribute of a phenomenon over training: the steps whose measurement failed, so that figures leave a gap there."""
UNBOUNDED = (-np.inf, np.inf)
RANGES = {
    "attention mass": (0.0, 1.0),
    "probability": (0.0, 1.0),
    "accuracy": (0.0, 1.0),
    "nats": (0.0, np.inf),
    "nat/token": (0.0, np.inf),
}
"""Smallest and largest value that a variable of these units can have; of other units, and of none, any."""

Variables = dict[str, tuple[Sequence[str], np.ndarray, dict[str, str]]]


class MeasurementWarning(UserWarning):
    """A result holds NaN where a number could be expected; the message says where and why."""


def warn_undefined(reason: str) -> None:
    """Say that a result holds NaN, and why: a `MeasurementWarning` attributed to the call from outside of the package."""
    # stacklevel 2 is this function's caller; wanted is the caller of the outermost function of the package.
    level, depth, frame = 2, 2, sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] == __package__:
            level = depth + 1
        depth, frame = depth + 1, frame.f_back
    warnings.warn(reason, MeasurementWarning, stacklevel=level)


def versions() -> dict[str, str]:
    """Versions of the packages that a number depends on, as result attributes."""
    return dict(_versions())


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    # Looked up in files, some milliseconds, which a sweep with nothing to do would spend on every measurement.
    return tuple(
        (f"{name}_version", version(name)) for name in ("mechhier", "transformer_lens", "transformers", "torch")
    )


def ratio(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    """The mean of unequal samples along an axis."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums.sum(axis) / counts.sum(axis)


def mean_interval(
    sums: Float[np.ndarray, "sample ..."],
    counts: Float[np.ndarray, "sample ..."],
    *,
    seed: int,
    strata: Int[np.ndarray, " sample"] | None = None,
    bounds: tuple[float, float] = UNBOUNDED,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of unequal samples and its 95 % interval, whole samples resampled.

    A sample is one sequence: its positions are not independent, so it is drawn as a whole. The estimate is
    `sums.sum(0) / counts.sum(0)`, and its interval the studentised bootstrap's (Efron 1981): quantiles of (resample's
    mean - mean) / (resample's standard error), times the standard error, which is that of a ratio to first order. It
    covers as stated from four samples on, skewed ones too, where percentiles of resampled means do not; but where most
    samples are alike it can be too narrow, so that it is never narrower than Student's t interval.

    What was laid out (the lengths of random repeats) is not resampled: with `strata` only what differs within a stratum
    makes the interval wide. The residuals within strata are pooled, and a stratum with one sample is joined with the
    next.

    Args:
        sums: Per sample, the sum of the measured values.
        counts: Per sample, how many values were summed; broadcast against `sums`.
        seed: Seed of the resampling.
        strata: Which stratum each sample is of, in an order in which neighbours are alike; for means only.
        bounds: Smallest and largest possible value.

    Returns:
        Estimate, lower and upper bound, each of the shape of one sample; NaN where no value was counted. Samples that
        counted nothing are not resampled. With fewer than `MIN_SAMPLES` samples that count for a value its bounds are
        NaN.

    Cost: `N_RESAMPLES` x samples x values multiplications, five times; memory 64 MiB.
    """
    sums, counts = np.broadcast_arrays(np.asarray(sums, np.float64), np.asarray(counts, np.float64))
    estimate = np.asarray(ratio(sums, counts, 0))
    counted = counts.any(axis=tuple(range(1, counts.ndim)))
    sums, counts = sums[counted], counts[counted]
    if len(sums) < MIN_SAMPLES:
        return estimate, np.full_like(estimate, np.nan), np.full_like(estimate, np.nan)
    of_counted = None if strata is None else np.asarray(strata)[counted]
    low, high = _studentised(sums.reshape(len(sums), -1), counts.reshape(len(sums), -1), of_counted, seed)
    low, high = (np.clip(bound.reshape(estimate.shape), *bounds) for bound in (low, high))
    return estimate, low, high


def proportion_interval(
    right: Float[np.ndarray, "sample ..."], counts: Float[np.ndarray, "sample ..."]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Proportion of outcomes that are 1 and its 95 % Wilson interval, for outcomes that are alike within a sample.

    Wilson's interval covers also near 0 and 1 and with few outcomes, where the bootstrap of samples that are all alike has
    no width. Outcomes of one sample (prompts that ask the same query) are not independent, so that the number of outcomes
    is the effective one: the outcomes over the design effect, which is the samples' variance over the binomial one,
    widened as Student's t is beside the normal, because it is estimated (Korn & Graubard 1998). It is no more than the
    outcomes and no less than the samples, which is what it is where all outcomes are alike.

    Args:
        right: Per sample, how many outcomes are 1.
        counts: Per sample, how many outcomes there are.

    Returns:
        As `mean_interval`.
    """
    right, counts = np.broadcast_arrays(np.asarray(right, np.float64), np.asarray(counts, np.float64))
    total, n = counts.sum(0), (counts > 0).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = right.sum(0) / total
        variance = ((right - share * counts) ** 2).sum(0) / total**2 * n / (n - 1)
        least = total**2 / (counts**2).sum(0)
        z = stats.norm.ppf(1 - _TAIL)
        effective = share * (1 - share) / variance * (z / stats.t.ppf(1 - _TAIL, n - 1)) ** 2
        effective = np.clip(np.where(np.isnan(effective), least, effective), least, total)
        centre = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
        half = z / (1 + z**2 / effective) * np.sqrt(share * (1 - share) / effective + z**2 / (4 * effective**2))
    low, high = (np.where(n >= MIN_SAMPLES, np.clip(bound, 0, 1), np.nan) for bound in (centre - half, centre + half))
    return share, low, high


def correlation_interval(
    one: Float[np.ndarray, "sample cell"], other: Float[np.ndarray, "sample cell"], *, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pearson's correlation over cells of two quantities' means over samples, and its 95 % interval.

    The studentised bootstrap of `mean_interval` on Fisher's scale (the inverse hyperbolic tangent of the correlation), so
    that it stays in [-1, 1]; whole samples are resampled, the cells are fixed. The standard error is that of the
    correlation to first order in the means.

    Returns:
        As `mean_interval`; NaN where a quantity is the same in all cells.
    """
    n = len(one)
    value, error = (each[0] for each in _correlation(one, other, np.ones((1, n))))
    if n < MIN_SAMPLES or not np.isfinite(value):
        return np.asarray(value), np.asarray(np.nan), np.asarray(np.nan)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=N_RESAMPLES).astype(np.float64)
    size = max(1, _BOOTSTRAP_BYTES // (8 * 6 * max(one.shape)))
    parts = [_correlation(one, other, drawn[start : start + size]) for start in range(0, len(drawn), size)]
    resampled, errors = (np.concatenate(each) for each in zip(*parts, strict=True))
    fisher, fisher_error = _fisher(value), error / (1 - _correctable(value) ** 2)
    spread = np.hypot(errors / (1 - _correctable(resampled) ** 2), _LEAST_SPREAD / n * fisher_error)
    freedom = np.array([n - 1.0])
    lower, upper = _students((_fisher(resampled) - fisher)[:, None], spread[:, None], freedom, freedom)
    low, high = (np.tanh(fisher - students[0] * fisher_error) for students in (upper, lower))
    return np.asarray(value), np.minimum(low, value), np.maximum(high, value)


def _correlation(
    one: Float[np.ndarray, "sample cell"],
    other: Float[np.ndarray, "sample cell"],
    weights: Float[np.ndarray, "draw sample"],
) -> tuple[Float[np.ndarray, " draw"], Float[np.ndarray, " draw"]]:
    """The correlation over cells of weighted sums over samples, and its standard error to first order."""
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = (weights @ each for each in (one, other))
        a, b = (each - each.mean(1, keepdims=True) for each in (a, b))
        size_a, size_b = (np.linalg.norm(each, axis=1, keepdims=True) for each in (a, b))
        a, b = a / size_a, b / size_b
        value = (a * b).sum(1).clip(-1, 1)
        # The correlation's gradient with respect to either sum, times what a sample adds to it.
        influence = (b - value[:, None] * a) / size_a @ one.T + (a - value[:, None] * b) / size_b @ other.T
    n = len(one)
    return value, np.sqrt((weights * influence**2).sum(1) * n / (n - 1))


def _correctable(correlation: np.ndarray) -> np.ndarray:
    """A correlation away from 1, where Fisher's scale ends, by more than rounding."""
    return np.clip(correlation, -1 + 1e-12, 1 - 1e-12)


def _fisher(correlation: np.ndarray) -> np.ndarray:
    return np.arctanh(_correctable(correlation))


def _studentised(
    sums: Float[np.ndarray, "sample value"],
    counts: Float[np.ndarray, "sample value"],
    strata: Int[np.ndarray, " sample"] | None,
    seed: int,
) -> tuple[Float[np.ndarray, " value"], Float[np.ndarray, " value"]]:
    n = len(sums)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=N_RESAMPLES).astype(np.float64)
    groups = None if strata is None else _joined(strata)
    size = max(1, _BOOTSTRAP_BYTES // (8 * 6 * N_RESAMPLES))
    parts = [
        _studentised_part(sums[:, start : start + size], counts[:, start : start + size], groups, drawn)
        for start in range(0, sums.shape[1], size)
    ]
    low, high = (np.concatenate(bounds) for bounds in zip(*parts, strict=True)) if parts else (np.empty(0),) * 2
    return low, high


@np.errstate(invalid="ignore", divide="ignore")
def _studentised_part(
    sums: Float[np.ndarray, "sample value"],
    counts: Float[np.ndarray, "sample value"],
    strata: Int[np.ndarray, " sample"] | None,
    drawn: Float[np.ndarray, "resample sample"],
) -> tuple[Float[np.ndarray, " value"], Float[np.ndarray, " value"]]:
    n, n_counting = len(sums), ((counts != 0) | (sums != 0)).sum(0)
    total = counts.sum(0)
    estimate = sums.sum(0) / total
    residuals = sums - estimate * counts
    freedom = n_counting - 1.0
    if strata is not None:
        sizes = np.bincount(strata)
        within = (strata == np.arange(len(sizes))[:, None]).astype(np.float64) @ residuals / sizes[:, None]
        residuals = (residuals - within[strata]) * np.sqrt((1 - 1 / n) * sizes / (sizes - 1))[strata, None]
        # To first order the sizes of the samples matter through the residuals alone, and the strata's are laid out.
        counts = np.broadcast_to(total / n, residuals.shape)
        freedom = freedom - (len(sizes) - 1)
    squares, products = residuals**2, residuals * counts
    error = np.sqrt(squares.sum(0) * n / (n - 1)) / np.abs(total)
    resampled_total = drawn @ counts
    shift = drawn @ residuals / resampled_total
    # Of the residuals about the resample's own mean.
    resampled = drawn @ squares - 2 * shift * (drawn @ products) + shift**2 * (drawn @ counts**2)
    spread = np.sqrt(np.maximum(resampled, 0) * n / (n - 1) / resampled_total**2 + (_LEAST_SPREAD / n * error) ** 2)
    # The resamples have the freedom of n samples, within strata there is less.
    lower, upper = _students(shift, spread, freedom, n_counting - 1.0)
    defined = (n_counting >= MIN_SAMPLES) & (freedom >= 1)
    low, high = (np.where(defined, estimate - students * error, np.nan) for students in (upper, lower))
    return low, high


@np.errstate(invalid="ignore", divide="ignore")
def _students(
    shift: Float[np.ndarray, "resample value"],
    error: Float[np.ndarray, "resample value"],
    freedom: Float[np.ndarray, " value"],
    resampled_freedom: Float[np.ndarray, " value"],
) -> tuple[Float[np.ndarray, " value"], Float[np.ndarray, " value"]]:
    """Lower and upper quantile of the Student statistics of the resamples, at least as far from 0 as Student's own."""
    # Without any spread nothing is shifted but by rounding; undefined resamples are sorted to the end.
    statistics = np.sort(np.where(error == 0, 0.0, shift / error), axis=0)
    places = (np.isfinite(statistics).sum(0) + 1) * np.array([[_TAIL], [1 - _TAIL]])
    places = np.clip(np.rint(places).astype(int) - 1, 0, len(statistics) - 1)
    lower, upper = np.take_along_axis(statistics, places, axis=0)
    students, resampled = (stats.t.ppf(1 - _TAIL, np.maximum(each, 1)) for each in (freedom, resampled_freedom))
    return np.minimum(lower * students / resampled, -students), np.maximum(upper * students / resampled, students)


def _joined(strata: Int[np.ndarray, " sample"]) -> Int[np.ndarray, " sample"]:
    """Strata numbered from 0, those of one sample joined with the next, the last with the one before."""
    labels = np.unique(strata, return_inverse=True)[1].reshape(-1)
    sizes = np.bincount(labels)
    joined, group, filled = np.zeros(len(sizes), dtype=int), 0, 0
    for label, size in enumerate(sizes):
        joined[label], filled = group, filled + size
        if filled > 1 and sizes[label + 1 :].sum() > 1:
            group, filled = group + 1, 0
    return joined[labels]


def scored(
    name: str,
    dims: Sequence[str],
    sums: Float[np.ndarray, "sample ..."],
    counts: Float[np.ndarray, "sample ..."],
    *,
    long_name: str,
    units: str,
    seed: int,
    strata: Int[np.ndarray, " sample"] | None = None,
    change: bool = False,
    bounds: tuple[float, float] | None = None,
) -> Variables:
    """The variables `name`, `name_low`, `name_high` of a mean over samples (see `mean_interval`).

    The units say which range the bounds stay in (`RANGES`), and that an accuracy is a proportion (`proportion_interval`).

    Args:
        name: Of the variable.
        dims: Of one sample.
        sums: As in `mean_interval`.
        counts: As in `mean_interval`.
        long_name: What it is.
        units: Its units.
        seed: As in `mean_interval`.
        strata: As in `mean_interval`.
        change: Whether the variable is a difference of two values in these units, which has another range.
        bounds: Its range where that is another (of what is estimated to first order, `UNBOUNDED`).
    """
    if bounds is None:
        low, high = RANGES.get(units, UNBOUNDED)
        bounds = (low - high, high - low) if change else (low, high)
    if units == "accuracy" and not change:
        values = proportion_interval(sums, counts)
    else:
        values = mean_interval(sums, counts, seed=seed, strata=strata, bounds=bounds)
    return with_bounds(name, dims, values, long_name=long_name, units=units)


def undefined(variables: Variables) -> tuple[list[str], list[str]]:
    """Names of the variables with bounds that are NaN somewhere, and of those of which only the bounds are."""
    names = [name for name in variables if f"{name}_low" in variables]
    values = [name for name in names if np.isnan(variables[name][1]).any()]
    bounds = [name for name in names if name not in values and np.isnan(variables[f"{name}_low"][1]).any()]
    return values, bounds


def with_bounds(
    name: str,
    dims: Sequence[str],
    values: Sequence[np.ndarray],
    *,
    long_name: str,
    units: str,
) -> Variables:
    """The variables `name`, `name_low`, `name_high` of an estimate and its lower and upper bound."""
    labels = (long_name, f"{long_name}, lower bound (95 %)", f"{long_name}, upper bound (95 %)")
    return {
        name + suffix: (dims, np.asarray(value), {"long_name": label, "units": units})
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

    The bytes are made in memory and then written like those of any file: HDF5 ends the process where a disk is full.

    Attributes that netCDF has no type for are stored as what it has: True and False as 1 and 0, None as the text `None`,
    paths and times as text, mappings and mixed lists as JSON text. They are loaded as what was stored.

    Args:
        result: What to write.
        path: Where to; `~` is the home, and folders that are missing are made.

    Returns:
        The path written.

    Raises:
        TypeError: It is no result, or an attribute cannot be stored; the message names it.
        ValueError: A text in it is none that a file can hold, or netCDF cannot hold a variable; the message names it.
        OSError: The file cannot be written; the message names it.

    Memory: a copy of the result.
    """
    path = absolute(path)
    if not isinstance(result, xr.Dataset | xr.DataTree):
        remedy = "; name its variable first: .to_dataset(name=...)" if isinstance(result, xr.DataArray) else ""
        raise TypeError(f"results are saved as an xarray Dataset or DataTree, not {shown(result)}{remedy}")
    storable = (
        xr.DataTree.from_dict(
            {node.path: _storable(node.to_dataset(inherit=False), node.path) for node in result.subtree}
        )
        if isinstance(result, xr.DataTree)
        else _storable(result, "")
    )
    try:
        content = _netcdf(storable)
    except (TypeError, ValueError, NotImplementedError, RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(f"cannot save {path}: netCDF cannot hold it: {error}") from error
    make_folder(path.parent)
    # Behind what HDF5 reads, which has no checksums: a changed bit would be another number.
    write_whole(path, content + _HASH + hashlib.sha256(content).hexdigest().encode())
    return path


def load(path: str | Path) -> Any:  # a union would have to be told apart at every use
    """Read a result into memory: a Dataset, or the DataTree of a sweep or an experiment.

    Args:
        path: What `save` has written, or any netCDF file; `~` is the home.

    Returns:
        An `xarray.Dataset`; of a file with groups an `xarray.DataTree`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is not a whole netCDF file; or it is a stranger's that reaches for other files, or is too
            large in memory (`mechhier.netcdf.ForeignFileError`).
    """
    path = absolute(path)
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise FileNotFoundError(f"no result at {path}: {what}")
    return netcdf.read(_checked(path), str(path))


def load_attribute(path: str | Path, name: str) -> str | int | float | None:
    """One attribute of a saved result, in a fraction of the time of `load`; None if there is none.

    Raises:
        FileNotFoundError, ValueError: As `load`.
    """
    path = absolute(path)
    return netcdf.attribute(_checked(path), str(path), name)


def _checked(path: Path) -> bytes:
    """The bytes of a netCDF file, if they are those that `save` wrote; a file of others has no hash to compare."""
    with errors_name(path):
        content = path.read_bytes()
    start = len(content) - len(_HASH) - 64
    if start < 0 or content[start:-64] != _HASH:
        return content
    if hashlib.sha256(content[:start]).hexdigest().encode() != content[-64:]:
        raise ValueError(f"{path} is damaged: its bytes are not those that were written; measure again")
    return content[:start]


def _netcdf(result: xr.Dataset | xr.DataTree) -> bytes:
    """The bytes of a netCDF file."""
    nodes = {"/": result}
    if isinstance(result, xr.DataTree):
        nodes = {node.path: node.to_dataset(inherit=False) for node in result.subtree}
    buffer = io.BytesIO()
    # By way of the store: `to_netcdf` made no bytes yet in xarray 2025.6, the last one for Python 3.10.
    with h5netcdf.File(buffer, "w") as file:
        for path, dataset in nodes.items():
            group = file if path == "/" else file.create_group(path) if path not in file else file[path]
            dataset.dump_to_store(H5NetCDFStore(group))
    return buffer.getvalue()


def netcdf_safe(attributes: Mapping[Any, Any], where: str = "") -> dict[str, Any]:
    """Attributes as netCDF holds them (see `save`).

    Args:
        attributes: By name.
        where: What they are of, for the message.

    Raises:
        TypeError: A name that is no text, or a value that cannot be stored.
        ValueError: A text that no file can hold.
    """
    of = f" of {where}" if where else ""
    for name in attributes:
        _check_name(f"an attribute{of}", name)
    return {name: _attribute(f"attribute {name!r}{of}", value) for name, value in attributes.items()}


def _storable(dataset: xr.Dataset, where: str) -> xr.Dataset:
    for name in {*dataset.variables, *dataset.sizes}:
        _check_name(f"a variable or dimension of {where}" if where.strip("/") else "a variable or dimension", name)
    # Without what was noted when it was loaded, so that the same result is the same bytes.
    copy = dataset.copy().drop_encoding()
    copy.attrs = netcdf_safe(copy.attrs, where.strip("/"))
    for name, variable in copy.variables.items():
        variable.attrs = netcdf_safe(variable.attrs, f"{where.strip('/')} {name}".strip())
    return copy


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{what} is called {shown(name)}; names are text")
    if not name or not name.isprintable():
        raise ValueError(f"{what} is called {shown(name)}; a name is text without invisible characters")


def _attribute(what: str, value: Any) -> Any:
    """An attribute as netCDF holds it."""
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{what} is {shown(value)}, which no file can hold") from None
        if "\0" in value:
            raise ValueError(f"{what} is {shown(value)}; netCDF ends a text at a character 0")
        return str(value)  # NumPy's text is none of HDF5's
    if isinstance(value, int | np.integer) and not -(2**63) <= int(value) < 2**64:
        raise ValueError(f"{what} is {shown(value)}; netCDF holds whole numbers from -2^63 to 2^64 - 1")
    if isinstance(value, int | float | np.integer | np.floating):
        return value
    if value is None or isinstance(
        value, os.PathLike | datetime.date | datetime.time | datetime.timedelta | np.datetime64
    ):
        return str(value)
    if isinstance(value, dict | list | tuple | np.ndarray):
        if not isinstance(value, dict) and _is_numbers(value):
            return value
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        try:
            return json.dumps(plain, default=str)
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"{what} cannot be stored as JSON text: {error}") from None
    raise TypeError(f"{what} is {shown(value)}; results hold text, numbers, lists of these, and mappings")


def _is_numbers(values: Any) -> bool:
    """Whether a list is an array of numbers; a ragged one is none."""
    try:
        return np.asarray(values).dtype.kind in "iuf"
    except (ValueError, TypeError, OverflowError, RecursionError):
        return False

"""Runs that an intervention is made of: activations of one layer, and a metric under many variants of one edit."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.arguments import shown
from mechhier.models.hooked import Hook, Hooked, SiteName
from mechhier.probes.components import Index, at
from mechhier.probes.metrics import Metric, name_of
from mechhier.results import MIN_SAMPLES, UNBOUNDED, Variables, mean_interval, scored, warn_undefined

Start: TypeAlias = "tuple[int, Float[Tensor, 'sequence pos d_model']] | None"
"""A layer and the stream of all sequences that enters it; None is the tokens."""
Site: TypeAlias = tuple[SiteName, int]

_ROUNDING = 1e-4
"""Of a metric, relative: differences below come from the order of float32 sums."""


@contextmanager
def acting(hooked: Hooked, hooks: Iterable[Hook]) -> Iterator[None]:
    """Hooks act in every call of the model inside the block and are gone afterwards, also after an exception."""
    with hooked.model.hooks(fwd_hooks=hooked.named(hooks)):
        yield


def run(
    hooked: Hooked,
    tokens: Int[Tensor, "sequence pos"],
    rows: Int[Tensor, " batch"],
    hooks: Iterable[Hook] = (),
    *,
    start: Start = None,
    stop: int | None = None,
    gradients: bool = False,
) -> Tensor:
    """One forward pass of the sequences `rows` (see `Hooked.run`); context managers around it learn which they are."""
    entering = None if start is None else (start[0], start[1][rows])
    return hooked.run(tokens[rows], hooks, start=entering, stop=stop, gradients=gradients, rows=rows)


def record(
    hooked: Hooked,
    tokens: Int[Tensor, "sequence pos"],
    sites: Iterable[Site],
    *,
    stop: int,
    start: Start = None,
    hooks: Callable[[Int[Tensor, " batch"]], list[Hook]] = lambda rows: [],
) -> tuple[dict[Site, Tensor], Float[Tensor, "sequence pos d_model"]]:
    """Activations of some sites, and the stream that leaves layer `stop`, all sequences; one pass over start..stop.

    `hooks` gives edits of the sequences of a batch; what is recorded are activations after them.

    A caller's edits of the stream that enters the next layer are not in it yet: they act when a run starts from it.
    """
    kept: dict[Site, list[Tensor]] = {site: [] for site in sites}
    reading: list[Hook] = [(name, layer, kept[name, layer].append) for name, layer in kept]
    left = [
        run(hooked, tokens, rows, [*hooks(rows), *reading], start=start, stop=stop)
        for rows in torch.arange(len(tokens)).split(hooked.batch_size(tokens.shape[1]))
    ]
    return {site: torch.cat(parts) for site, parts in kept.items()}, torch.cat(left)


def advance(hooked: Hooked, tokens: Int[Tensor, "sequence pos"], start: Start, layer: int) -> Start:
    """The stream that enters `layer`, from an earlier start."""
    if layer == (0 if start is None else start[0]):
        return start
    return layer, record(hooked, tokens, (), start=start, stop=layer - 1)[1]


def replacing(index: Index, value: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook function that puts `value`, [batch, pos, width] or what broadcasts to it, into a part of an activation."""

    def edit(activation: Tensor) -> Tensor:
        edited = activation.clone()
        edited[at(index)] = value.to(activation)
        return edited

    return edit


def measure(
    hooked: Hooked,
    tokens: Int[Tensor, "sequence pos"],
    metric: Metric,
    *,
    n_variants: int = 1,
    hooks: Callable[[Int[Tensor, " batch"], Int[Tensor, " batch"]], list[Hook]] = lambda variants, rows: [],
    start: Start = None,
) -> Float[np.ndarray, "variant sequence"]:
    """The metric of every sequence under every variant of an edit; batches hold several variants where they fit.

    Args:
        hooked: The model.
        tokens: All sequences.
        metric: Called with a batch's logits and rows.
        n_variants: Number of variants.
        hooks: Given the variant and the sequence of every row of a batch, the edit.
        start: Where the runs begin.
    """
    n, values = len(tokens), []
    for pairs in torch.arange(n_variants * n).split(hooked.batch_size(tokens.shape[1])):
        variants, rows = pairs // n, pairs % n
        logits = run(hooked, tokens, rows, hooks(variants, rows), start=start)
        values.append(check_metric(metric(logits, rows), metric, len(rows)))
    return torch.cat(values).reshape(n_variants, n).numpy()


def check_metric(values: Any, metric: Metric, n_rows: int) -> Float[Tensor, " row"]:
    """A metric's values in float64 on the CPU.

    Raises:
        ValueError: Not one finite real number for each row.
    """
    if not isinstance(values, Tensor) or values.shape != (n_rows,):
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"the metric {name_of(metric)[0]!r} must return one number per sequence of the batch, a tensor of shape "
            f"[{n_rows}], got {found}"
        )
    if values.is_complex() or not bool(values.detach().isfinite().all()):
        raise ValueError(
            f"the metric {name_of(metric)[0]!r} must return finite real numbers, got {shown(values.detach().tolist())}"
        )
    return values.detach().cpu().double()


def check_pair(hooked: Hooked, clean: Any, corrupted: Any) -> tuple[Int[Tensor, "sequence pos"], ...]:
    """Both runs' tokens.

    Raises:
        TypeError: What holds no token ids.
        ValueError: Tokens that the model cannot take, or of two shapes.
    """
    first, second = hooked.check_tokens(clean, "clean"), hooked.check_tokens(corrupted, "corrupted")
    if first.shape != second.shape:
        raise ValueError(
            f"clean and corrupted tokens must correspond position by position, got shapes {list(first.shape)} and "
            f"{list(second.shape)}"
        )
    return first, second


def change(
    dims: Sequence[str],
    clean: Float[np.ndarray, " sequence"],
    edited: Float[np.ndarray, "sequence ..."],
    metric: Metric,
    *,
    verb: str,
    seed: int,
) -> Variables:
    """`clean`, `edited` and `effect` = edited - clean, means over sequences with intervals."""
    name, units = name_of(metric)
    expanded = clean.reshape(-1, *[1] * (edited.ndim - 1))
    ones = np.ones_like
    if len(clean) < MIN_SAMPLES:
        warn_undefined(_no_bounds(len(clean)))
    return (
        scored("clean", (), clean, ones(clean), long_name=f"{name}, unedited run", units=units, seed=seed)
        | scored("edited", dims, edited, ones(edited), long_name=f"{name}, {verb}", units=units, seed=seed)
        | scored(
            "effect",
            dims,
            edited - expanded,
            ones(edited),
            long_name=f"change of the {name}, {verb}",
            units=units,
            seed=seed,
            change=True,
        )
    )


def recovery(
    dims: Sequence[str],
    clean: Float[np.ndarray, " sequence"],
    corrupted: Float[np.ndarray, " sequence"],
    patched: Float[np.ndarray, "sequence ..."],
    metric: Metric,
    *,
    seed: int,
    key: str = "patched",
) -> Variables:
    """`clean`, `corrupted`, `patched` (or what `key` calls it) and `recovered`, with intervals.

    recovered = (patched - corrupted) / (clean - corrupted), both differences summed over sequences. It is NaN where clean
    and corrupted are not known to differ: where the interval of their mean difference contains 0, where the difference is
    no more than rounding, and with fewer than `MIN_SAMPLES` sequences, which have no interval. That is said once.
    """
    name, units = name_of(metric)
    ones, variables = np.ones_like, {}
    for run_name, values in (("clean", clean), ("corrupted", corrupted)):
        words = f"{name}, {run_name} run"
        variables |= scored(run_name, (), values, ones(values), long_name=words, units=units, seed=seed)
    # What is estimated to first order has no range.
    bounds = None if key == "patched" else UNBOUNDED
    words = f"{name}, {key}"
    variables |= scored(key, dims, patched, ones(patched), long_name=words, units=units, seed=seed, bounds=bounds)
    expand = (slice(None), *[None] * (patched.ndim - 1))
    gap = (clean - corrupted)[expand]
    if len(clean) < MIN_SAMPLES:
        warn_undefined(f"{_no_bounds(len(clean))}, nor can the runs be known to differ: recovered is NaN")
        gap = np.full_like(gap, np.nan)
    elif not differ(clean, corrupted, seed=seed):
        warn_undefined(
            f"the {name} of the clean and of the corrupted run does not differ by more than its interval over "
            f"{len(clean)} sequences, so that there is nothing to recover: recovered is NaN"
        )
        gap = np.full_like(gap, np.nan)
    long_name = f"share of the {name} recovered"
    gain = patched - corrupted[expand]
    return variables | scored("recovered", dims, gain, gap, long_name=long_name, units="1", seed=seed)


def _no_bounds(n: int) -> str:
    return f"an interval needs {MIN_SAMPLES} sequences, of {n} there is none: all bounds are NaN"


def differ(clean: Float[np.ndarray, " sequence"], corrupted: Float[np.ndarray, " sequence"], *, seed: int) -> bool:
    """Whether two runs' means differ by more than noise: that over sequences, of which it needs four, and rounding."""
    mean, low, high = mean_interval(clean - corrupted, np.ones_like(clean), seed=seed)
    rounding = _ROUNDING * max(float(np.abs(clean).mean()), float(np.abs(corrupted).mean()))
    return bool(abs(mean) > rounding and (low > 0 or high < 0))


def labelled(variables: Variables, coords: dict[str, Any], attributes: dict[str, Any]) -> xr.Dataset:
    """A result; its coordinates have words too."""
    dataset = xr.Dataset(variables, coords=coords, attrs=attributes)
    for name in coords:
        dataset[name].attrs["long_name"] = name.replace("_", " ")
    return dataset


def label_coord(labels: Sequence[Hashable]) -> np.ndarray:
    """Labels of a dim, as strings.

    Raises:
        ValueError: The same label twice.
    """
    names = [str(name) for name in labels]
    if len(set(names)) < len(names):
        raise ValueError(
            f"entries are named twice: {', '.join(sorted({name for name in names if names.count(name) > 1}))}"
        )
    return np.array(names)

"""Intervals of every kind hold the truth in about 95 of 100 simulated data sets.

`python tests/test_coverage.py` prints the table of docs/measures.md, beside what percentiles of resampled means cover.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from mechhier import results
from mechhier.phenomena.hydra.statistics import median_bounds

N_DATA_SETS = 2000
SIZES = (4, 8, 16, 32)

Interval = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Kind:
    """A way of drawing data sets, and the least share of them whose interval should hold the truth.

    Attributes:
        draw: Given the number of samples, sums and counts [sample, data set] and what is estimated.
        least: For each of `SIZES`; two standard errors of 2,000 data sets are .01.
        most: Above it intervals are too wide.
        interval: Given sums, counts and the number of samples.
    """

    draw: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray, float]]
    least: tuple[float, float, float, float]
    most: float = 0.99
    interval: Callable[[np.ndarray, np.ndarray, int], Interval] = lambda sums, counts, n: results.mean_interval(
        sums, counts, seed=0
    )


def equal(noise: Callable[[np.random.Generator, tuple[int, int]], np.ndarray], truth: float):
    def draw(rng: np.random.Generator, n: int):
        return noise(rng, (n, N_DATA_SETS)), np.ones((n, 1)), truth

    return draw


def unequal(rng: np.random.Generator, n: int):
    """Sequences of 1 to 11 positions, which share what their sequence has."""
    counts = rng.integers(1, 12, (n, N_DATA_SETS)).astype(float)
    sums = counts * rng.normal(1.0, 1.0, counts.shape) + np.sqrt(counts) * rng.normal(size=counts.shape)
    return sums, counts, 1.0


def differences(rng: np.random.Generator, n: int):
    """Recovery: a gain relative to a gap that surely is one."""
    gaps = rng.normal(3.0, 1.0, (n, N_DATA_SETS))
    return 0.5 * gaps + rng.normal(0.0, 0.5, gaps.shape), gaps, 0.5


def proportions(share: float, per_query: int, alike: float):
    """Outcomes of 1 to 2 `per_query` - 1 prompts a query, which share the query's own probability of success."""

    def draw(rng: np.random.Generator, n: int):
        shape = (n, N_DATA_SETS)
        spread = (1 - alike) / alike if alike else np.inf
        own = rng.beta(share * spread, (1 - share) * spread, shape) if alike else np.full(shape, share)
        counts = rng.integers(1, 2 * per_query, shape)
        return rng.binomial(counts, own).astype(float), counts.astype(float), share

    return draw


def wilson(sums: np.ndarray, counts: np.ndarray, n: int) -> Interval:
    return results.proportion_interval(sums, counts)


def lengths(n: int) -> np.ndarray:
    """Those of `n` random repeats: laid out from 16 to 64."""
    of_group = np.linspace(16, 64, min(8, max(2, n // 4))).astype(int)
    return np.concatenate(
        [
            np.full(len(rows), length)
            for length, rows in zip(of_group, np.array_split(np.arange(n), len(of_group)), strict=True)
        ]
    )


def stratified(noise: Callable[[np.random.Generator, tuple[int, int]], np.ndarray], half: bool = False):
    """Attention of a nearly uniform head, which depends on the length; the spread within lengths is less for longer ones."""

    def draw(rng: np.random.Generator, n: int):
        counts = (lengths(2 * n)[1::2] if half else lengths(n))[:, None].astype(float)
        chance = 1 / counts
        means = chance + 0.2 * chance * noise(rng, (n, N_DATA_SETS))
        return means * counts, counts, float((chance * counts).sum() / counts.sum())

    return draw


def within_lengths(sums: np.ndarray, counts: np.ndarray, n: int) -> Interval:
    return results.mean_interval(sums, counts, seed=0, strata=counts[:, 0].astype(int))


def best_head(rng: np.random.Generator, n: int):
    """`X_best`: twelve equal heads, one chosen on the other half of 2 n sequences, scored on its own n."""
    values = rng.beta(0.5, 2.0, (12, 2 * n, N_DATA_SETS))
    chosen = values[:, ::2].mean(1).argmax(0)
    scored = np.take_along_axis(values[:, 1::2], chosen[None, None], axis=0)[0]
    return scored, np.ones((n, 1)), 0.2


def gaussian(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.normal(size=shape)


def exponential(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.exponential(size=shape)


def centred_exponential(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.exponential(size=shape) - 1


def mostly_nothing(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """An effect of either sign in three of ten sequences."""
    return rng.normal(size=shape) * (rng.random(shape) < 0.3)


KINDS = {
    "mean, normal": Kind(equal(gaussian, 0.0), (0.94, 0.94, 0.94, 0.94), 0.98),
    "mean, exponential": Kind(equal(exponential, 1.0), (0.92, 0.92, 0.93, 0.93), 0.98),
    "mean, log-normal": Kind(
        equal(lambda rng, shape: rng.lognormal(size=shape), np.exp(0.5)), (0.87, 0.88, 0.90, 0.91), 0.98
    ),
    "mean, probabilities near 0": Kind(
        equal(lambda rng, shape: rng.beta(0.5, 2.0, shape), 0.2), (0.91, 0.92, 0.93, 0.93), 0.98
    ),
    "mean, effects that most samples lack": Kind(equal(mostly_nothing, 0.0), (0.94, 0.94, 0.94, 0.94), 1.0),
    "mean of unequal samples": Kind(unequal, (0.93, 0.93, 0.94, 0.94), 0.985),
    "ratio of differences (recovery)": Kind(differences, (0.93, 0.93, 0.94, 0.94), 0.99),
    "head chosen on the other half (X_best)": Kind(best_head, (0.91, 0.92, 0.93, 0.93), 0.98),
    "within lengths, normal": Kind(stratified(gaussian), (0.92, 0.92, 0.93, 0.93), 0.975, within_lengths),
    "within lengths, exponential": Kind(
        stratified(centred_exponential), (0.86, 0.86, 0.89, 0.91), 0.975, within_lengths
    ),
    "within lengths, normal, a half": Kind(
        stratified(gaussian, half=True), (0.92, 0.92, 0.92, 0.93), 0.975, within_lengths
    ),
    "proportion .5": Kind(proportions(0.5, 1, 0.0), (0.86, 0.91, 0.90, 0.93), 0.99, wilson),
    "proportion .9": Kind(proportions(0.9, 1, 0.0), (0.92, 0.93, 0.90, 0.93), 0.99, wilson),
    "proportion .5, prompts share queries": Kind(proportions(0.5, 4, 0.5), (0.93, 0.92, 0.92, 0.92), 0.99, wilson),
    "proportion .9, prompts share queries": Kind(proportions(0.9, 4, 0.5), (0.93, 0.93, 0.91, 0.91), 0.99, wilson),
    "proportion .9, independent prompts": Kind(proportions(0.9, 4, 0.0), (0.94, 0.94, 0.94, 0.94), 1.0, wilson),
}


def coverage(interval: Interval, truth: float | np.ndarray) -> float:
    _, low, high = interval
    rounding = 1e-12
    return float(((low <= truth + rounding) & (truth - rounding <= high)).mean())


def percentiles(sums: np.ndarray, counts: np.ndarray) -> Interval:
    """What was used before: quantiles of means of resampled samples."""
    counts = np.broadcast_to(counts, sums.shape)
    n = len(sums)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=999)
    return sums.sum(0) / counts.sum(0), *np.quantile((drawn @ sums) / (drawn @ counts), (0.025, 0.975), axis=0)


N_CELLS = 16


def correlated(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Effects of heads and what they are to first order, of samples as noisy as the heads differ."""
    one = rng.normal(size=N_CELLS)
    other = 0.8 * one + 0.6 * rng.normal(size=N_CELLS)
    shared = rng.normal(size=(n, N_CELLS))
    return one + shared, other + 0.7 * shared + 0.7 * rng.normal(size=(n, N_CELLS)), np.corrcoef(one, other)[0, 1]


def correlations(n: int) -> tuple[float, float]:
    """Coverage by percentiles and by `correlation_interval`."""
    rng, before, after = np.random.default_rng(n), [], []
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=999)
    for seed in range(N_DATA_SETS):
        one, other, truth = correlated(rng, n)
        after.append(coverage(results.correlation_interval(one, other, seed=seed), truth))
        a, b = (drawn @ each for each in (one, other))
        a, b = (each - each.mean(1, keepdims=True) for each in (a, b))
        resampled = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
        before.append(coverage((resampled, *np.quantile(resampled, (0.025, 0.975))), truth))
    return float(np.mean(before)), float(np.mean(after))


def medians(n: int) -> tuple[float, float]:
    """The median over parts of repair shares: eleven parts that surely lose something, one of which lies apart."""
    rng, parts = np.random.default_rng(n), np.r_[np.linspace(0.3, 0.5, 10), 2.0]
    lost = rng.normal(2.0, 0.5, (n, N_DATA_SETS, 11))
    own, shared = 0.1 * rng.normal(size=lost.shape), 0.3 * rng.normal(size=(n, N_DATA_SETS, 1))
    repaired = parts * lost + shared + own
    median = np.median(repaired.sum(0) / lost.sum(0), axis=-1)
    all_parts, seed = np.ones((N_DATA_SETS, 11), dtype=bool), 0
    after = median, *median_bounds(repaired, lost, np.ones(n), all_parts, all_parts, min_lost=0.1, seed=seed)
    rows = rng.integers(0, n, (499, n))
    resampled = np.stack([np.median(repaired[row].sum(0) / lost[row].sum(0), axis=-1) for row in rows])
    before = median, *np.quantile(resampled, (0.025, 0.975), axis=0)
    return coverage(before, 0.4 + 0.1 / 9), coverage(after, 0.4 + 0.1 / 9)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_intervals_hold_the_truth(name):
    kind = KINDS[name]
    for n, least in zip(SIZES, kind.least, strict=True):
        sums, counts, truth = kind.draw(np.random.default_rng(n), n)
        found = coverage(kind.interval(sums, counts, n), truth)
        assert least <= found <= kind.most, f"{name}, {n} samples: {found}"


@pytest.mark.slow
@pytest.mark.parametrize(("covered", "least"), [(correlations, 0.92), (medians, 0.92)])
def test_intervals_of_other_statistics_hold_the_truth(covered, least):
    for n in SIZES[:3]:
        _, found = covered(n)
        assert least <= found <= 0.995, f"{n} samples: {found}"


def main() -> None:
    """Print the coverage in percent: percentiles of resampled means, then the interval that is used."""
    print("| | " + " | ".join(f"n = {n}" for n in SIZES) + " |\n|---|" + "---|" * len(SIZES))  # noqa: T201
    for name, kind in KINDS.items():
        cells = []
        for n in SIZES:
            sums, counts, truth = kind.draw(np.random.default_rng(n), n)
            before, after = percentiles(sums, counts), kind.interval(sums, counts, n)
            ratio = np.mean(after[2] - after[1]) / np.mean(before[2] - before[1])
            cells.append(f"{100 * coverage(before, truth):.0f}, **{100 * coverage(after, truth):.0f}** ({ratio:.1f})")
        print(f"| {name} | {' | '.join(cells)} |")  # noqa: T201
    for name, covered in (("correlation over 16 heads", correlations), ("median over 11 ratios", medians)):
        cells = [f"{100 * before:.0f}, **{100 * after:.0f}**" for before, after in map(covered, SIZES)]
        print(f"| {name} | {' | '.join(cells)} |")  # noqa: T201


if __name__ == "__main__":
    main()

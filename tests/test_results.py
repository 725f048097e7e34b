from __future__ import annotations

import datetime
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from scipy import stats

import mechhier as mh
from mechhier import results


def plain_studentised(sums, counts, seed, strata=None):
    """`mean_interval` of one value as loops over resamples and samples, from the formulas."""
    n, total = len(sums), sum(counts)
    estimate = sum(sums) / total
    residuals = [s - estimate * c for s, c in zip(sums, counts, strict=True)]
    freedom = n - 1
    if strata is not None:
        members = {stratum: [i for i in range(n) if strata[i] == stratum] for stratum in strata}
        pooled = list(residuals)
        for rows in members.values():
            mean = sum(residuals[i] for i in rows) / len(rows)
            for i in rows:
                pooled[i] = (residuals[i] - mean) * math.sqrt(len(rows) / (len(rows) - 1) * (n - 1) / n)
        residuals, counts, freedom = pooled, [total / n] * n, n - len(members)
    error = math.sqrt(n / (n - 1) * sum(r * r for r in residuals)) / total
    statistics = []
    for drawn in np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=results.N_RESAMPLES):
        rows = [i for i in range(n) for _ in range(drawn[i])]
        count = sum(counts[i] for i in rows)
        shift = sum(residuals[i] for i in rows) / count
        about = [residuals[i] - shift * counts[i] for i in rows]
        own = math.sqrt(n / (n - 1) * sum(r * r for r in about)) / count
        statistics.append(shift / math.hypot(own, error / (2 * n)))
    statistics.sort()
    student, of_resamples = stats.t.ppf(0.975, freedom), stats.t.ppf(0.975, n - 1)
    # 25th from either end of 999: shares of .025 of 1000.
    upper = max(statistics[974] * student / of_resamples, student)
    lower = min(statistics[24] * student / of_resamples, -student)
    return estimate, estimate - upper * error, estimate - lower * error


@pytest.mark.parametrize("strata", [None, np.repeat([16, 24, 40], 4)])
def test_mean_interval_equals_a_plain_loop(strata):
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, 12).astype(float)
    sums = counts * rng.lognormal(size=12)
    found = results.mean_interval(sums[:, None], counts[:, None], seed=3, strata=strata)
    np.testing.assert_allclose(np.ravel(found), plain_studentised(sums, counts, 3, strata), rtol=1e-9)


def test_quantiles_of_the_studentised_bootstrap_are_those_of_students_t_on_many_normal_samples():
    samples = np.random.default_rng(0).normal(2.0, 1.0, 200)
    mean, low, high = results.mean_interval(samples, np.ones(200), seed=0)
    expected = stats.t.interval(0.95, 199, loc=samples.mean(), scale=stats.sem(samples))
    assert mean == pytest.approx(samples.mean())
    assert (low, high) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("n", [4, 8, 16])
def test_bounds_are_never_inside_students_interval(n):
    samples = np.random.default_rng(0).exponential(size=(n, 200)) * (np.random.default_rng(1).random((n, 200)) < 0.5)
    mean, low, high = results.mean_interval(samples, np.ones((n, 1)), seed=0)
    half = stats.t.ppf(0.975, n - 1) * samples.std(0, ddof=1) / n**0.5
    assert (low <= mean - half + 1e-12).all()
    assert (high >= mean + half - 1e-12).all()
    # Skewed to the right: the upper bound is further away.
    assert np.median(high - mean) > 1.2 * np.median(mean - low)


def test_strata_leave_out_what_was_laid_out():
    """An exactly uniform head over repeats of four lengths: sums that differ between lengths alone."""
    lengths = np.repeat([16.0, 32.0, 48.0, 64.0], 4)
    masses = np.log(lengths)[:, None] * [1.0, 1e-3]
    mean, low, high = results.mean_interval(masses, lengths[:, None], seed=0)
    assert (high - low > 0.1 * mean).all()
    mean, low, high = results.mean_interval(masses, lengths[:, None], seed=0, strata=lengths.astype(int))
    np.testing.assert_allclose([low, high], [mean, mean], rtol=1e-12)


def test_a_stratum_of_one_sample_is_joined_with_its_neighbour():
    rng = np.random.default_rng(0)
    values, ones = rng.normal(size=(6, 1)), np.ones((6, 1))
    alone = results.mean_interval(values, ones, seed=0, strata=np.array([0, 0, 1, 2, 2, 3]))
    joined = results.mean_interval(values, ones, seed=0, strata=np.array([0, 0, 1, 1, 1, 1]))
    np.testing.assert_array_equal(alone, joined)
    apart = results.mean_interval(values, ones, seed=0, strata=np.arange(6))
    pairs = results.mean_interval(values, ones, seed=0, strata=np.array([0, 0, 1, 1, 2, 2]))
    np.testing.assert_array_equal(apart, pairs)


def test_bounds_stay_within_the_range_that_the_units_say():
    rng = np.random.default_rng(0)
    about = {"long_name": "x", "seed": 0}
    few, ones = rng.random((4, 50)) ** 4, np.ones((4, 1))
    unbounded = results.mean_interval(few, ones, seed=0)
    assert unbounded[1].min() < 0 < 1 < unbounded[2].max()
    for units, change, low, high in (
        ("probability", False, 0, 1),
        ("attention mass", False, 0, 1),
        ("probability", True, -1, 1),
        ("nats", False, 0, np.inf),
    ):
        found = results.scored("x", ["i"], few, ones, units=units, change=change, **about)
        np.testing.assert_allclose(found["x_low"][1], unbounded[1].clip(low, high))
        np.testing.assert_allclose(found["x_high"][1], unbounded[2].clip(low, high))
    for units in ("nats", "logit"):
        found = results.scored("x", ["i"], few, ones, units=units, change=True, **about)
        np.testing.assert_allclose(found["x_low"][1], unbounded[1])


def test_samples_that_are_all_alike_have_an_interval_without_width():
    for value in (0.0, 0.3, 1e6):
        found = results.mean_interval(
            np.full((8, 2), value) * np.arange(1, 9)[:, None], np.arange(1, 9)[:, None], seed=0
        )
        np.testing.assert_allclose(found, value, rtol=1e-12)


@pytest.mark.parametrize("samples", [[0, 0, 0, 1], [0, 0, 1, 1], [0] * 15 + [1], [0, 1e-9, 2e-9, 1]])
def test_resamples_without_spread_leave_finite_bounds(samples):
    mean, low, high = results.mean_interval(np.array(samples, dtype=float), np.ones(len(samples)), seed=0)
    assert -4 < low < mean < high < 5


def test_mean_interval_weighs_samples_by_their_counts():
    sums, counts = np.array([1.0, 0.0, 30.0, 2.0, 4.0]), np.array([1.0, 0.0, 10.0, 1.0, 2.0])
    mean, low, high = results.mean_interval(sums, counts, seed=0)
    assert mean == pytest.approx(37 / 14)
    assert low <= mean <= high


def test_intervals_of_fewer_than_four_samples_are_undefined():
    assert np.isnan(results.mean_interval(np.zeros(4), np.zeros(4), seed=0)).all()
    for n in (1, 2, 3):
        mean, low, high = results.mean_interval(np.arange(n) + 3.0, np.ones(n), seed=0)
        assert mean == 3 + (n - 1) / 2
        assert np.isnan([low, high]).all()
        assert np.isnan(results.proportion_interval(np.ones(n), np.ones(n))[1:]).all()
    # A value that three of five samples count for has three samples.
    counts = np.array([[1, 1], [1, 1], [1, 0], [1, 0], [1, 1]])
    mean, low, high = results.mean_interval(counts * np.arange(5.0)[:, None], counts, seed=0)
    assert np.isfinite(mean).all()
    assert np.isfinite(low).tolist() == np.isfinite(high).tolist() == [True, False]


@pytest.mark.parametrize(("right", "n"), [(8, 8), (0, 5), (3, 7), (17, 40)])
def test_proportion_of_independent_outcomes_has_wilsons_interval(right, n):
    outcomes = np.arange(n) < right
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert results.proportion_interval(outcomes, np.ones(n))[1:] == pytest.approx((expected.low, expected.high))


def test_an_accuracy_is_a_proportion_and_its_change_is_not():
    right, counts = np.array([1.0, 1, 1, 1, 1, 1]), np.ones(6)
    about = {"long_name": "x", "units": "accuracy", "seed": 0}
    level = results.scored("x", (), right, counts, **about)
    assert float(level["x_low"][1]) == pytest.approx(stats.binomtest(6, 6).proportion_ci(method="wilson").low)
    change = results.scored("x", (), np.array([-1.0, -1, -1, -1, 0, 0]), counts, change=True, **about)
    assert float(change["x_low"][1]) == -1
    assert float(change["x_high"][1]) > 0


def test_outcomes_that_are_alike_within_queries_count_as_the_queries():
    right = np.array([4, 0, 4, 4, 0, 4, 4, 4])
    expected = stats.binomtest(6, 8).proportion_ci(method="wilson")
    found = results.proportion_interval(right, np.full(8, 4))
    assert found == pytest.approx((0.75, expected.low, expected.high))
    # All right: how alike they are cannot be told.
    found = results.proportion_interval(np.full(8, 4), np.full(8, 4))
    assert found == pytest.approx((1.0, *stats.binomtest(8, 8).proportion_ci(method="wilson")))


def test_standard_error_of_a_correlation_is_the_jackknifes():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=10)
    one, other = truth + 0.5 * rng.normal(size=(60, 10)), truth + 0.5 * rng.normal(size=(60, 10))
    (value,), (error,) = results._correlation(one, other, np.ones((1, 60)))
    assert value == pytest.approx(np.corrcoef(one.mean(0), other.mean(0))[0, 1])
    without = [np.corrcoef(np.delete(one, i, 0).mean(0), np.delete(other, i, 0).mean(0))[0, 1] for i in range(60)]
    jackknife = np.sqrt(59 / 60 * ((without - np.mean(without)) ** 2).sum())
    assert error == pytest.approx(jackknife, rel=0.05)
    _, low, high = results.correlation_interval(one, other, seed=0)
    half = 2 * error / (1 - value**2)
    assert (low, high) == pytest.approx(np.tanh(np.arctanh(value) + np.array([-half, half])), abs=0.02)


def test_correlation_of_a_quantity_with_itself_is_one_and_with_a_constant_undefined():
    samples = np.random.default_rng(0).normal(size=(8, 20))
    np.testing.assert_allclose(results.correlation_interval(samples, 2 * samples, seed=0), 1.0)
    np.testing.assert_allclose(results.correlation_interval(samples, -samples, seed=0), -1.0)
    assert np.isnan(results.correlation_interval(samples, np.ones_like(samples), seed=0)).all()
    value, *bounds = results.correlation_interval(samples[:3], samples[3:6], seed=0)
    assert np.isfinite(value)
    assert np.isnan(bounds).all()


def test_undefined_values_are_said_where_the_package_was_called():
    with pytest.warns(results.MeasurementWarning, match="because") as caught:
        results.warn_undefined("nothing, because")
    assert caught[0].filename == __file__
    untrained = mh.load_model(
        mh.ModelSpec("llama", n_layers=1, d_model=16, n_heads=2).build(vocab_size=30, eos_token_id=0, n_ctx=16)
    )
    with pytest.warns(results.MeasurementWarning) as caught:
        mh.phenomena.induction(untrained, n_sequences=2)
    assert [each.filename for each in caught] == [__file__]


def test_best_head_is_not_biased_up_by_choosing_it():
    """Of pure noise the maximum over heads is far above zero; scored on the other half it is not."""
    noise = np.random.default_rng(0).normal(size=(40, 8, 16))
    layer, head, others = results.best_of(noise, np.ones((40, 1, 1)))
    assert noise[::2, layer, head].mean() > 0.4
    assert abs(noise[others, layer, head].mean()) < 0.4
    assert noise[others].shape == (20, 8, 16)


def test_saved_result_reads_back_equal_with_units_and_booleans(tmp_path):
    result = xr.Dataset(
        {"selected": (("layer", "head"), np.array([[True, False]]), {"units": "boolean"})},
        coords={"layer": [0], "head": [0, 1]},
        attrs=results.netcdf_safe({"phenomenon": "x", "has_function": True, "step": None, "n": 3}),
    )
    path = results.save(result, tmp_path / "deep" / "x.nc")
    loaded = results.load(path)
    xr.testing.assert_identical(loaded, result)
    assert loaded.selected.dtype == bool
    assert [file.name for file in path.parent.iterdir()] == ["x.nc"]


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = results.save(xr.Dataset({"a": 1.0}), tmp_path / "x.nc")
    with pytest.raises(ValueError, match="netCDF cannot hold it"):
        results.save(xr.Dataset({"a": ((), object())}), path)
    assert float(results.load(path).a) == 1.0
    assert [file.name for file in tmp_path.iterdir()] == ["x.nc"]


def test_missing_and_truncated_results_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no result at"):
        results.load(tmp_path / "x.nc")
    path = results.save(xr.Dataset({"a": ("i", np.arange(1000.0))}), tmp_path / "x.nc")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"x\.nc is not a whole netCDF file"):
        results.load(path)


class _Unknown:
    pass


ATTRIBUTES = [
    (True, 1),
    (np.bool_(False), 0),
    (None, "None"),
    (Path("a/b"), str(Path("a/b"))),
    (datetime.date(2026, 1, 2), "2026-01-02"),
    ({"a": [1, None]}, '{"a": [1, null]}'),
    ([1, "a"], '[1, "a"]'),
    ((1.5, 2.5), [1.5, 2.5]),
    ([], "[]"),
    (np.float32(0.5), 0.5),
    ("ü", "ü"),
]


@pytest.mark.parametrize(("given", "stored"), ATTRIBUTES)
@pytest.mark.parametrize("place", ["dataset", "variable", "coordinate", "node"])
def test_attributes_come_back_as_the_docstring_says(tmp_path, given, stored, place):
    result = xr.Dataset({"a": ("x", [1.0])}, coords={"x": [0]})
    holder = {"variable": result.a, "coordinate": result.x}.get(place, result)
    holder.attrs["mine"] = given
    saved = results.save(xr.DataTree.from_dict({"/arm": result}) if place == "node" else result, tmp_path / "x.nc")
    loaded = results.load(saved)
    if place == "node":
        loaded = loaded["arm"].to_dataset()
    found = {"variable": loaded.a, "coordinate": loaded.x}.get(place, loaded).attrs["mine"]
    assert np.all(found == stored)
    assert holder.attrs["mine"] is given, "the caller's result is left as it was"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"mine": _Unknown()}, TypeError, "attribute 'mine' of a is a _Unknown; results hold text, numbers"),
        ({3: "a"}, TypeError, "an attribute of a is called 3; names are text"),
        ({"mine": "\ud800"}, ValueError, r"attribute 'mine' of a is '\\ud800', which no file can hold"),
    ],
)
def test_attributes_that_netcdf_cannot_hold_are_refused_by_name(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        results.save(xr.Dataset({"a": ((), 1.0, given)}), tmp_path / "x.nc")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", [xr.DataArray([1.0]), {"a": 1}, None])
def test_what_is_no_result_is_not_saved(tmp_path, other):
    with pytest.raises(TypeError, match="results are saved as an xarray Dataset or DataTree, not"):
        results.save(other, tmp_path / "x.nc")


def test_a_tree_is_loaded_as_a_tree_and_home_and_folder_are_found(tmp_path, monkeypatch):
    tree = xr.DataTree.from_dict({"/a/b": xr.Dataset({"x": ("i", [1.0, 2.0])}), "/c": xr.Dataset({"y": 1})})
    tree.attrs["failed"] = "[]"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert results.save(tree, "~/x.nc") == tmp_path / "x.nc"
    loaded = results.load("~/x.nc")
    xr.testing.assert_identical(loaded, tree)
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        results.load(tmp_path)


def test_a_changed_bit_in_a_saved_result_is_noticed_and_other_readers_read_it(tmp_path):
    path = results.save(xr.Dataset({"a": ("x", np.arange(200.0))}, attrs={"n": 3}), tmp_path / "x.nc")
    xr.testing.assert_identical(xr.load_dataset(path, engine="h5netcdf"), results.load(path))
    assert results.load_attribute(path, "n") == 3
    content = path.read_bytes()
    for place in range(0, len(content) - 72, 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        for read in (results.load, lambda path: results.load_attribute(path, "n")):
            with pytest.raises(ValueError, match=r"x\.nc is damaged: its bytes are not those that were written"):
                read(path)


def test_a_result_that_was_loaded_is_saved_as_the_same_bytes(tmp_path):
    result = xr.Dataset({"a": ("x", [1.0, np.nan]), "b": ("x", ["p", "qq"]), "c": True}, coords={"x": [0, 1]})
    first = results.save(result, tmp_path / "a.nc").read_bytes()
    assert results.save(results.load(tmp_path / "a.nc"), tmp_path / "b.nc").read_bytes() == first
    tree = results.save(xr.DataTree.from_dict({"/t": result}), tmp_path / "c.nc").read_bytes()
    assert results.save(results.load(tmp_path / "c.nc"), tmp_path / "d.nc").read_bytes() == tree


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    program = (
        "import resource, signal, sys, numpy as np, xarray as xr\n"
        "from mechhier import results\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "results.save(xr.Dataset({'a': ('x', np.zeros(1000))}), sys.argv[1])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "x.nc")], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].endswith(f"File too large: '{tmp_path / 'x.nc'}'")
    assert list(tmp_path.iterdir()) == []


NESTED: list = []
for _ in range(5000):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (np.str_("x"), "x"),
        ([[1], [1, 2]], "[[1], [1, 2]]"),
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        (np.datetime64("2026-01-02"), "2026-01-02"),
        (np.float16(0.5), 0.5),
        (2**64 - 1, 2**64 - 1),
    ],
)
def test_attributes_of_numpy_and_uneven_lists_are_stored(tmp_path, given, stored):
    found = results.load(results.save(xr.Dataset(attrs={"x": given}), tmp_path / "x.nc")).attrs["x"]
    np.testing.assert_array_equal(found, stored)


@pytest.mark.parametrize(
    ("name", "given"),
    [("x", 2**70), ("x", 1j), ("x", np.complex64(1)), ("x", NESTED), ("x", "a\0b"), ("_NCProperties", 1)],
)
def test_attributes_that_cannot_be_stored_are_named_in_one_line(tmp_path, name, given):
    with pytest.raises((TypeError, ValueError), match=name) as refused:
        results.save(xr.Dataset({"a": 1.0}, attrs={name: given}), tmp_path / "x.nc")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", 3, "\ud800", "a\0b", "a\x1b[31m"])
def test_names_that_netcdf_cannot_hold_are_refused(tmp_path, name):
    named = xr.Dataset({"a": ("i", [1.0, 2.0])})
    for result in (named.rename(a=name), named.rename(i=name), named.assign_attrs({name: 1})):
        with pytest.raises((TypeError, ValueError), match=r"is called .*names? (are|is) text"):
            results.save(result, tmp_path / "x.nc")
    assert not list(tmp_path.iterdir())

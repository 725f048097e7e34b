from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from mechhier import results


def test_mean_interval_agrees_with_students_t_on_normal_samples():
    samples = np.random.default_rng(0).normal(2.0, 1.0, 200)
    mean, low, high = results.mean_interval(samples, np.ones(200), seed=0)
    expected = stats.t.interval(0.95, 199, loc=samples.mean(), scale=stats.sem(samples))
    assert mean == pytest.approx(samples.mean())
    assert (low, high) == pytest.approx(expected, abs=0.02)


def test_mean_interval_weighs_samples_by_their_counts():
    sums, counts = np.array([1.0, 0.0, 30.0]), np.array([1.0, 0.0, 10.0])
    mean, low, high = results.mean_interval(sums, counts, seed=0)
    assert mean == pytest.approx(31 / 11)
    assert low <= mean <= high


def test_mean_interval_covers_the_truth_in_about_95_of_100_samples():
    rng = np.random.default_rng(1)
    samples = rng.exponential(1.0, (60, 300))
    _, low, high = results.mean_interval(samples, np.ones((60, 1)), seed=0)
    assert 0.89 < ((low < 1.0) & (high > 1.0)).mean() < 0.98


def test_nothing_counted_is_nan_and_one_sample_has_no_interval():
    assert np.isnan(results.mean_interval(np.zeros(4), np.zeros(4), seed=0)).all()
    mean, low, high = results.mean_interval(np.array([3.0]), np.array([1.0]), seed=0)
    assert mean == 3.0
    assert np.isnan([low, high]).all()


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
    with pytest.raises(ValueError, match="cannot serialize"):
        results.save(xr.Dataset({"a": ((), object())}), path)
    assert float(results.load(path).a) == 1.0
    assert [file.name for file in tmp_path.iterdir()] == ["x.nc"]


def test_missing_and_truncated_results_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no result at"):
        results.load(tmp_path / "x.nc")
    path = results.save(xr.Dataset({"a": ("i", np.arange(1000.0))}), tmp_path / "x.nc")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="not a readable result"):
        results.load(path)


def test_attributes_that_netcdf_cannot_hold_are_refused():
    with pytest.raises(TypeError, match="'heads' is a list"):
        results.netcdf_safe({"heads": [1, 2]})

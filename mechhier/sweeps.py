"""Every phenomenon on every checkpoint: one file for each, so that an interrupted sweep goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from mechhier import results
from mechhier.files import write_whole
from mechhier.models.run import weights_sha256
from mechhier.phenomena import PHENOMENA
from mechhier.progress import track

if TYPE_CHECKING:
    from mechhier.models import Run

KEY = "measurement_key"
"""Attribute that says which measurement a file holds; a file with another key is measured again."""


class SweepWarning(UserWarning):
    """Some checkpoints could not be measured; the others were."""


def sweep(
    runs: Run | Mapping[str, Run],
    phenomena: Sequence[str] | Mapping[str, Mapping[str, Any]],
    *,
    steps: Sequence[int] | None = None,
    seed: int = 0,
) -> xr.DataTree:
    """Measure phenomena on every checkpoint of one run, or of several arms.

    Each measurement is saved in the run's folder as `results/<phenomenon>/step-<step>.nc`, whole or not at all. The same
    call again measures only what is missing or was measured with other options. A checkpoint that fails is recorded
    beside it (`step-<step>.error.json`), reported by a `SweepWarning` at the end, and tried again by the next call.

    Cost: each checkpoint's files are read once for their hash; for each that is measured one load, and what each
    phenomenon's docstring says.

    Args:
        runs: A run, or runs by the name of their arm.
        phenomena: Names (see `mechhier.phenomena.PHENOMENA`), or a mapping from names to keyword arguments.
        steps: Checkpoints to measure; all by default.
        seed: Seed handed to every phenomenon.

    Returns:
        A tree with one node per phenomenon, dims `step` (with the coordinate `weights_hash`) and the phenomenon's own;
        with several arms one such tree per arm. What failed is missing from it.

    Raises:
        ValueError: An unknown phenomenon, no run, or a step without a checkpoint.
    """
    options: dict[str, dict[str, Any]] = (
        {name: dict(keywords) for name, keywords in phenomena.items()}
        if isinstance(phenomena, Mapping)
        else {name: {} for name in ([phenomena] if isinstance(phenomena, str) else phenomena)}
    )
    unknown = sorted(set(options) - set(PHENOMENA))
    if unknown or not options:
        raise ValueError(f"unknown phenomena {unknown}: choose from {', '.join(PHENOMENA)}")
    arms = runs if isinstance(runs, Mapping) else {"": runs}
    if not arms:
        raise ValueError("there is no run to sweep")
    wanted: dict[str, list[int]] = {}
    for arm, run in arms.items():
        wanted[arm] = list(run.steps if steps is None else steps)
        missing = sorted(set(wanted[arm]) - set(run.steps))
        if missing:
            raise ValueError(f"{run.path} has no checkpoint at steps {missing}; it has {run.steps}")

    nodes: dict[str, xr.Dataset] = {}
    failed: list[Path] = []
    undefined: list[str] = []
    total = len(options) * sum(len(chosen) for chosen in wanted.values())
    with track("measuring checkpoints", total=total) as advance:
        for arm, run in arms.items():
            found: dict[str, list[xr.Dataset]] = {name: [] for name in options}
            for step in wanted[arm]:
                model, weights = None, weights_sha256(run.checkpoint(step))
                for name, keywords in options.items():
                    path = run.path / "results" / name / f"step-{step:06d}.nc"
                    key = _measurement_key(run, step, weights, name, keywords, seed)
                    measured = _finished(path, key)
                    if measured is None:
                        try:
                            model = run.load(step) if model is None else model
                            with _heard(undefined, f"{name}, {arm} step {step}".replace("  ", " ")):
                                measured = PHENOMENA[name](model, seed=seed, **keywords).assign_attrs({KEY: key})
                            results.save(measured, path)
                            _error_file(path).unlink(missing_ok=True)
                        except Exception as error:  # noqa: BLE001  one checkpoint must not take the others with it
                            failed.append(_record_error(path, error))
                            measured = None
                    if measured is not None:
                        found[name].append(_of_step(measured, step))
                    advance(note=f"{arm} step {step} {name}")
            for name, parts in found.items():
                if parts:
                    joined = xr.concat(parts, dim="step", data_vars="all", combine_attrs="drop_conflicts")
                    joined["step"].attrs = {"long_name": "training step", "units": "optimizer steps"}
                    nodes[f"{arm}/{name}" if arm else name] = joined
    if undefined:
        results.warn_undefined(f"{len(undefined)} of {total} measurements hold NaN, the first of them {undefined[0]}")
    if failed:
        listed = "\n".join(f"  {path}: {json.loads(path.read_text())['error']}" for path in failed)
        warnings.warn(
            f"{len(failed)} of {total} measurements failed; the same call tries them again:\n{listed}",
            SweepWarning,
            stacklevel=2,
        )
    return xr.DataTree.from_dict(nodes)


@contextmanager
def _heard(undefined: list[str], where: str) -> Iterator[None]:
    """Note what is NaN in a measurement, instead of a warning for every checkpoint; other warnings stay warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", results.MeasurementWarning)
        yield
    for each in caught:
        if issubclass(each.category, results.MeasurementWarning):
            undefined.append(f"({where}): {each.message}")
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno, source=each.source)


def _measurement_key(run: Run, step: int, weights: str, name: str, keywords: Mapping[str, Any], seed: int) -> str:
    """Hash of everything that the measurement depends on: training, checkpoint and its weights, options and versions."""
    described = {
        "run": run.manifest.model_dump(mode="json", include={"model", "train", "corpus", "steps"}),
        "step": step,
        "weights": weights,
        "phenomenon": name,
        "options": {key: repr(value) for key, value in sorted(keywords.items())},
        "seed": seed,
        "versions": results.versions(),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _of_step(measured: xr.Dataset, step: int) -> xr.Dataset:
    """A measurement as part of a sweep; the hash of what was measured would be lost as an attribute, which they differ in."""
    words = {"long_name": "hash of the weights that were measured"}
    coordinate = ("step", [measured.attrs.get("weights_hash", "unknown")], words)
    return measured.expand_dims(step=[step]).assign_coords(weights_hash=coordinate)


def _finished(path: Path, key: str) -> xr.Dataset | None:
    """The saved measurement, if it is there, whole, and the one asked for."""
    try:
        saved = results.load(path)
    except (FileNotFoundError, ValueError):
        return None
    return saved if saved.attrs.get(KEY) == key else None


def _error_file(path: Path) -> Path:
    return path.with_suffix(".error.json")


def _record_error(path: Path, error: Exception) -> Path:
    target = _error_file(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    described = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exception(error)}
    write_whole(target, json.dumps(described, indent=1))
    return target

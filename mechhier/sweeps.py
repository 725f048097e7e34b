"""Every phenomenon on every checkpoint: one file for each, so that an interrupted sweep goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import xarray as xr

from mechhier import results
from mechhier.files import LOCK, make_folder, only_process_in, remove_leftovers, write_whole
from mechhier.models.run import RESULTS, Run, weights_sha256
from mechhier.phenomena import PHENOMENA, check_options
from mechhier.progress import track
from mechhier.specs import shown, whole

if TYPE_CHECKING:
    from mechhier.models.loading import HookedModel

KEY = "measurement_key"
"""Attribute that says which measurement a file holds; a file with another key is measured again."""
FAILED = "failed"
"""Attribute of a sweep's tree that lists what failed; see `failures`."""

Runs = Run | str | os.PathLike[str]


class SweepWarning(UserWarning):
    """Some checkpoints could not be measured; the others were."""


class SweepError(ValueError):
    """Nothing can be swept; the message says what was given and what is accepted."""


class Failure(NamedTuple):
    """A measurement that failed."""

    arm: str
    phenomenon: str
    step: int
    error: str
    """Its class and message; the traceback is in `results/<phenomenon>/step-<step>.error.json` of the run."""

    def __str__(self) -> str:
        return f"{self.phenomenon}, {self.arm} step {self.step}: {self.error}".replace(",  ", ", ")


def sweep(
    runs: Runs | Sequence[Runs] | Mapping[str, Runs],
    phenomena: str | Sequence[str] | Mapping[str, Mapping[str, Any]],
    *,
    steps: Sequence[int] | None = None,
    seed: int = 0,
) -> xr.DataTree:
    """Measure phenomena on every checkpoint of one run, or of several arms.

    Each measurement is saved in the run's folder as `results/<phenomenon>/step-<step>.nc`, whole or not at all. The same
    call again measures only what is missing or was measured with other options. A checkpoint that fails is recorded
    beside it (`step-<step>.error.json`), listed in the tree (see `failures`), reported by a `SweepWarning` at the end, and
    tried again by the next call.

    Cost: each checkpoint's files are read once for their hash; for each that is measured one load, and what each
    phenomenon's docstring says.

    Args:
        runs: A run or its folder; several as a list, named as their results name them, or as a mapping by the name of the
            arm.
        phenomena: Names (see `mechhier.phenomena.PHENOMENA`), or a mapping from names to keyword arguments.
        steps: Checkpoints to measure; all that the training kept by default.
        seed: Seed handed to every phenomenon.

    Returns:
        A tree with one node per phenomenon, dims `step` (with the coordinate `weights_hash`) and the phenomenon's own;
        with several arms one such tree per arm. What failed is missing from it.

    Raises:
        SweepError: No run, or something else than runs; a step without a checkpoint; a run in which another process
            measures.
        SpecError: An unknown phenomenon, or an option that it has not got or does not accept; no model is loaded.
        RunError: A folder is no finished run.
    """
    options = _options(phenomena)
    arms = _arms(runs)
    seed = whole("seed", seed, least=0)
    wanted = {arm: _steps(run, steps) for arm, run in arms.items()}
    total = len(options) * sum(map(len, wanted.values()))
    nodes: dict[str, xr.Dataset] = {}
    failed: list[Failure] = []
    undefined: list[str] = []
    with ExitStack() as held, track("measuring checkpoints", total=total) as advance:
        folders = _Folders(held)
        for arm, run in arms.items():
            found: dict[str, list[xr.Dataset]] = {name: [] for name in options}
            lost: dict[str, list[int]] = {name: [] for name in options}
            for step in wanted[arm]:
                checkpoint = _Checkpoint(run, step, folders)
                for name, keywords in options.items():
                    where = f"{name}, {arm} step {step}".replace("  ", " ")
                    try:
                        with _heard(undefined, where):
                            measured = checkpoint.measured(name, keywords, seed)
                        found[name].append(_of_step(measured, step))
                    except SweepError:
                        raise
                    except Exception as error:  # noqa: BLE001  one checkpoint must not take the others with it
                        checkpoint.record(name, error)
                        failed.append(Failure(arm, name, step, _one_line(error)))
                        lost[name].append(step)
                    advance(note=f"{arm} step {step} {name}")
            for name, parts in found.items():
                if parts:
                    nodes[f"{arm}/{name}" if arm else name] = _joined(parts, lost[name])
    if undefined:
        results.warn_undefined(f"{len(undefined)} of {total} measurements hold NaN, the first of them {undefined[0]}")
    tree = xr.DataTree.from_dict(nodes)
    if failed:
        tree.attrs[FAILED] = json.dumps([failure._asdict() for failure in failed])
        listed = "\n".join(f"  {failure}" for failure in failed)
        warnings.warn(
            f"{len(failed)} of {total} measurements failed; the same call tries them again:\n{listed}",
            SweepWarning,
            stacklevel=2,
        )
    return tree


def failures(tree: xr.DataTree) -> list[Failure]:
    """The measurements of a sweep that failed, from its tree or from what was saved of it (an experiment's `results.nc`).

    Example:
        >>> failures(xr.DataTree())
        []
    """
    return [Failure(**failure) for failure in json.loads(tree.attrs.get(FAILED, "[]"))]


def _options(phenomena: Any) -> dict[str, dict[str, Any]]:
    """Keyword arguments by name of phenomenon, checked before anything is loaded."""
    if isinstance(phenomena, str):
        phenomena = [phenomena]
    if not isinstance(phenomena, Mapping | Sequence) or not phenomena:
        raise SweepError(
            f"phenomena must be names, or a mapping from names to options, not {shown(phenomena)}: choose from "
            f"{', '.join(PHENOMENA)}"
        )
    given = phenomena if isinstance(phenomena, Mapping) else {name: {} for name in phenomena}
    return {name: check_options(name, keywords) for name, keywords in given.items()}


def _arms(runs: Any) -> dict[str, Run]:
    """The runs by the name of their arm; the name of a single one is empty."""
    if isinstance(runs, Run | str | os.PathLike):
        return {"": _run(runs)}
    if isinstance(runs, Mapping):
        if not runs:
            raise SweepError("there is no run to sweep")
        for name in runs:
            if not isinstance(name, str) or not name or "/" in name:
                raise SweepError(f"{shown(name)} is no name of an arm: a name is text without a slash")
        return {name: _run(run) for name, run in runs.items()}
    if isinstance(runs, list | tuple):
        opened = [_run(run) for run in runs]
        named = {run.manifest.name(run.path): run for run in opened}
        if not opened or len(named) < len(opened):
            raise SweepError(
                "there is no run to sweep"
                if not opened
                else f"several runs are called {', '.join(sorted(named))}: give a mapping from names to runs"
            )
        return named
    raise SweepError(_no_run(runs))


def _run(run: Any) -> Run:
    if isinstance(run, Run):
        return run
    if isinstance(run, str | os.PathLike):
        return Run.open(os.fspath(run))
    raise SweepError(_no_run(run))


def _no_run(given: Any) -> str:
    model = ". A model is measured by itself: mechhier.phenomena.induction(model)" if hasattr(given, "forward") else ""
    return f"sweep takes a run (mechhier.Run.open(folder)), its folder, a list or a mapping of these, not {shown(given)}{model}"


def _steps(run: Run, steps: Any) -> list[int]:
    kept = run.manifest.checkpoint_steps
    if steps is None:
        return kept
    if isinstance(steps, str) or not isinstance(steps, Iterable):
        raise SweepError(f"steps must be a list of steps, not {shown(steps)}; the run has {kept}")
    wanted = list(dict.fromkeys(whole("steps", step, least=0) for step in steps))
    if missing := sorted(set(wanted) - set(kept)):
        raise SweepError(f"{run.path} has no checkpoint at steps {missing}; it has {kept}")
    return wanted


class _Folders:
    """The runs' folders of results, each held from the first measurement that is missing there until the sweep ends.

    What is all there is read without the lock: the folder may be one that cannot be written.
    """

    def __init__(self, held: ExitStack) -> None:
        self._held = held
        self._claimed: set[Path] = set()

    def claim(self, path: Path) -> None:
        """Be alone in the run's results, and make the folder of a measurement's file.

        Raises:
            SweepError: Another process measures there.
        """
        folder, results_of_run = path.parent.resolve(), path.parent.parent.resolve()
        if results_of_run not in self._claimed:
            busy = f"another process is measuring in {results_of_run} (it holds {results_of_run / LOCK}): wait for it"
            self._held.enter_context(only_process_in(results_of_run, otherwise=SweepError(busy)))
            self._claimed.add(results_of_run)
        if folder not in self._claimed:
            make_folder(folder)
            remove_leftovers(folder)
            self._claimed.add(folder)


class _Checkpoint:
    """One checkpoint of a sweep: loaded once, if anything of it is to be measured."""

    def __init__(self, run: Run, step: int, folders: _Folders) -> None:
        self.run = run
        self.step = step
        self.folders = folders

    @cached_property
    def weights(self) -> str:
        return weights_sha256(self.run.checkpoint(self.step))

    @cached_property
    def model(self) -> HookedModel:
        return self.run.load(self.step)

    def measured(self, name: str, options: Mapping[str, Any], seed: int) -> xr.Dataset:
        """The saved measurement if it is the one asked for, else a new one, saved."""
        path = self._path(name)
        key = _measurement_key(self.run, self.step, self.weights, name, options, seed)
        measured = _finished(path, key)
        if measured is None:
            self.folders.claim(path)
            measured = _finished(path, key)  # until then another process may have measured it
        if measured is None:
            measured = PHENOMENA[name](self.model, seed=seed, **options).assign_attrs({KEY: key})
            results.save(measured, path)
        _error_file(path).unlink(missing_ok=True)
        return measured

    def record(self, name: str, error: Exception) -> None:
        """Write down what failed; where not even that can be written, the sweep's list has it all the same."""
        described = {"error": _one_line(error), "traceback": traceback.format_exception(error)}
        with suppress(OSError):
            self.folders.claim(self._path(name))
            write_whole(_error_file(self._path(name)), json.dumps(described, indent=1))

    def _path(self, name: str) -> Path:
        return self.run.path / RESULTS / name / f"step-{self.step:06d}.nc"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).encode("utf-8", "backslashreplace").decode()


def _joined(parts: list[xr.Dataset], lost: list[int]) -> xr.Dataset:
    """The measurements of a phenomenon along `step`."""
    joined = xr.concat(parts, dim="step", data_vars="all", combine_attrs="drop_conflicts")
    joined["step"].attrs = {"long_name": "training step", "units": "optimizer steps"}
    return joined.assign_attrs({results.FAILED_STEPS: lost}) if lost else joined


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
        return results.load(path) if results.load_attribute(path, KEY) == key else None
    except (OSError, ValueError):
        return None


def _error_file(path: Path) -> Path:
    return path.with_suffix(".error.json")

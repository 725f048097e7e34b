"""A training run on disk: what was trained on what, its checkpoints, its log.

run/
  manifest.json                     model, training, corpus, versions, whether training has finished
  log.jsonl                         one line a log point: step, loss, eval_loss, floor, learning_rate
  floor.nc                          the ideal predictor's loss on the held-out rows, by position
  checkpoints/step-000400/          an ordinary Hugging Face model folder: safetensors, config, tokenizer; and
    evaluation.json                 the held-out loss by position
  files.sha256                      the hash of every file above but the manifest, taken when it was written
  results/<phenomenon>/             measurements of the checkpoints, one file for each (`mechhier.sweeps`)
  trainer/                          the optimizer's state, for resuming; removed when training has finished
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from mechhier import hashes
from mechhier.files import absolute, errors_name, write_whole
from mechhier.grammars import Corpus, Grammar
from mechhier.models.spec import MOST_STEPS, ModelSpec, TrainSpec, checkpoint_steps
from mechhier.reading import read_json, read_text
from mechhier.specs import Described, Flag, Size, Text

if TYPE_CHECKING:
    import pandas as pd
    import torch
    import xarray as xr

    from mechhier.models.loading import HookedModel, ModelClass

    Step = int | float | Literal["last"]

MANIFEST = "manifest.json"
LOG = "log.jsonl"
FLOOR = "floor.nc"
CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation.json"
RESULTS = "results"
_STEP = re.compile(r"step-(\d{6,})")
_MOST_MANIFEST_BYTES = 2**26


class RunError(ValueError):
    """A folder is not the run that was asked for; the message says what it is and what to do."""


class MissingCheckpointError(RunError, LookupError):
    """The run has no checkpoint of that step; the message lists those it has."""


class Manifest(Described):
    """The contents of `manifest.json`."""

    format: Literal[1, 2, 3] = 3
    """1: of mechhier 0.4 and before, whose schedules began at a rate of 0; 2: of 0.5, which hashed nothing but weights."""
    model: ModelSpec
    train: TrainSpec
    corpus: dict[Text, Any]
    """The corpus as its `description` says it: grammar, seed, sizes."""
    text_sha256: Text | None = None
    """Hash of the corpus's first block of text: the same description must mean the same text."""
    all_text_sha256: Text | None = None
    """Hash of all rows that were trained on, once training has finished."""
    steps: Annotated[Size, Field(le=MOST_STEPS)]
    """Optimizer steps of the whole training."""
    device: Text
    """Device and precision of the training; the same run on another one agrees only to rounding."""
    versions: dict[Text, Text]
    arm: Text | None = None
    """The arm of an experiment that was trained; None for a training of its own."""
    finished: Flag = False
    files_sha256: Text | None = None
    """Hash of the list of hashes, `files.sha256`, once training has finished."""
    weights_sha256: dict[int, Text] = Field(default_factory=dict)
    """Hash of each checkpoint's weights, in formats 1 and 2."""

    @field_validator("corpus")
    @classmethod
    def _check_corpus(cls, corpus: dict[str, Any]) -> dict[str, Any]:
        Corpus.from_description(corpus)
        return corpus

    @property
    def checkpoint_steps(self) -> list[int]:
        """The steps at which a checkpoint is kept, ascending."""
        return sorted({*checkpoint_steps(self.steps, self.train.n_checkpoints), *self.train.checkpoints_at})

    def name(self, run: Path) -> str:
        """What results call the training: arm and seed, or the folder's name (of `<name>/run` the outer one's)."""
        if self.arm is not None:
            return f"{self.arm}_seed{self.train.seed}"
        path = run.resolve()
        return path.parent.name if path.name == "run" and path.parent.name else path.name

    @classmethod
    def read(cls, run: Path) -> Manifest:
        """Read a run's manifest.

        Raises:
            RunError: No manifest, or one that this version cannot read.
        """
        path = run / MANIFEST
        if not path.is_file():
            raise RunError(f"{run} is not a run: there is no {MANIFEST} in it. Make one with train(spec, corpus, out)")
        try:
            return cls.model_validate(read_json(read_text(path, most_bytes=_MOST_MANIFEST_BYTES), path.name))
        except (ValueError, OSError) as error:
            raise RunError(
                f"cannot read {path}: {error}. What to do: copy it from a backup; without it nobody knows what was trained, "
                "and the folder can only be removed and trained again"
            ) from error

    def write(self, run: Path) -> None:
        """Write the manifest, whole or not at all."""
        write_whole(run / MANIFEST, self.model_dump_json(indent=2) + "\n")

    def differences(self, other: Manifest) -> list[str]:
        """Which settings of model, training and corpus differ, or its text, as `name: mine -> theirs`."""
        compared = {"model", "train", "corpus", "text_sha256"}
        return differences(*(m.model_dump(mode="json", include=compared) for m in (self, other)))


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Which leaves of two trees of settings differ, as `name: mine -> theirs`."""
    mine, theirs = _flat(mine), _flat(theirs)
    return [
        f"{name}: {mine.get(name)!r} -> {theirs.get(name)!r}"
        for name in sorted({*mine, *theirs})
        if mine.get(name) != theirs.get(name)
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    branches = (_flat(branch, f"{prefix}.{name}".lstrip(".")) for name, branch in tree.items())
    return {name: leaf for branch in branches for name, leaf in branch.items()}


def package_versions() -> dict[str, str]:
    """The versions that weights depend on."""
    packages = ("mechhier", "torch", "transformers", "accelerate", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def text_sha256(corpus: Corpus, n_rows: int | None = None) -> str:
    """Hash of a corpus's first rows; of its first block if `n_rows` is None.

    Cost: the rows are made or read once.
    """
    n_rows = min(corpus.n_rows, corpus.rows_per_block if n_rows is None else n_rows)
    digest = hashlib.sha256()
    for start in range(0, n_rows, corpus.rows_per_block):
        digest.update(corpus.rows(start, min(start + corpus.rows_per_block, n_rows)).tobytes())
    return digest.hexdigest()


def weights_sha256(checkpoint: Path) -> str:
    """Hash of a checkpoint's weights, over all its safetensors files."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with errors_name(path), path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return run / CHECKPOINTS / f"step-{step:06d}"


def kept_steps(run: Path) -> list[int]:
    """The steps of the checkpoints in a run's folder, ascending; what is named otherwise is not looked at."""
    folder = run / CHECKPOINTS
    entries = os.scandir(folder) if folder.is_dir() else ()
    return sorted(int(found[1]) for entry in entries if (found := _STEP.fullmatch(entry.name)) and entry.is_dir())


def written_hashes(run: Path, manifest: Manifest) -> dict[str, str]:
    """The hashes of a run's files when they were written, by name; a run of format 1 or 2 has none.

    Raises:
        RunError: The run has finished, and its list is absent or has changed: nothing could be compared with it.
    """
    if manifest.finished and manifest.format >= 3 and hashes.changed(run, {hashes.LIST: manifest.files_sha256 or ""}):
        raise RunError(
            f"{run / hashes.LIST} is absent or damaged, so that nobody can say whether the run's files are as they were "
            "written. What to do: copy it from a backup; or copy a checkpoint out of the run, where it loads unchecked"
        )
    return hashes.read(run / hashes.LIST)


def check_checkpoint(run: Path, folder: Path, manifest: Manifest) -> None:
    """Compare the files of a run's checkpoint with their hashes when they were written; a run of format 1 or 2 has none.

    Cost: reads them once.

    Raises:
        RunError: A file is absent or has changed, or has no hash.
    """
    inside = f"{folder.relative_to(run).as_posix()}/"
    of_folder = {name: digest for name, digest in written_hashes(run, manifest).items() if name.startswith(inside)}
    if manifest.format >= 3 and not of_folder:
        raise RunError(
            f"{folder} has no hashes in {run / hashes.LIST}: the training has not finished writing it. What to do: call train "
            "with the same model, corpus and folder, unless it is running; or, if you put it there, move it out of the run"
        )
    if changed := hashes.changed(run, of_folder):
        raise RunError(
            f"{folder} is damaged: {', '.join(name.removeprefix(inside) for name in changed)} are not there as they were "
            "written. What to do: copy them from a backup, or train again in another folder"
        )


class Run:
    """A finished training run; open one with `Run.open`, make one with `train`.

    Attributes:
        path: The run's folder.
        manifest: What was trained on what.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a finished run.

        Raises:
            RunError: The folder is no run, or its training has not finished.
        """
        path = absolute(path)
        manifest = Manifest.read(path)
        if not manifest.finished:
            raise RunError(
                f"the training in {path} has not finished: call train with the same model, corpus and folder to go on"
            )
        return cls(path, manifest)

    def __repr__(self) -> str:
        spec = self.spec
        return (
            f"Run({str(self.path)!r}: {spec.architecture}, {spec.n_layers} layers, d_model {spec.d_model}, "
            f"{type(self.grammar).__name__}, {len(self.steps)} checkpoints to step {self.manifest.steps})"
        )

    @property
    def spec(self) -> ModelSpec:
        """The model's shape."""
        return self.manifest.model

    @property
    def train_spec(self) -> TrainSpec:
        """How it was trained."""
        return self.manifest.train

    @property
    def grammar(self) -> Grammar:
        """The language it was trained on."""
        return self.corpus.grammar

    @property
    def corpus(self) -> Corpus:
        """The text it was trained on, generated again when it is read."""
        return Corpus.from_description(self.manifest.corpus)

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; 0 is the untrained model."""
        return kept_steps(self.path)

    @property
    def log(self) -> pd.DataFrame:
        """The training curve, a line a log point: step, tokens, loss, eval_loss, floor, learning_rate.

        `tokens` were read until then; `loss` is the mean over the steps since the line before; at checkpoints
        `eval_loss` is the mean over the held-out rows and `floor` the ideal predictor's loss on the same rows (NaN
        where only bounds of it are known: see `evaluation`); all in nats per predicted token. NaN where a line has no
        such value.

        Raises:
            RunError: It is absent or damaged.
        """
        import pandas as pd

        content = self._content(LOG)
        try:
            lines = [json.loads(line) for line in content.decode().splitlines()]
            log = pd.DataFrame(lines, columns=["step", "loss", "eval_loss", "floor", "learning_rate"]).astype("float64")
            log["step"] = log["step"].astype("int64")
        except (ValueError, TypeError) as error:
            raise self._damaged(LOG, error) from error
        if log.empty:
            raise self._damaged(LOG, "it has no lines")
        log.insert(1, "tokens", log["step"] * self.train_spec.batch_size * self.manifest.corpus["context"])
        return log

    @property
    def floor(self) -> xr.Dataset:
        """The ideal predictor's loss on the held-out rows, as `Corpus.floor` returns it.

        Raises:
            RunError: There is none: the rows are packed, or the run is of mechhier 0.2 or before; or it is damaged.
        """
        from mechhier import results

        if self.manifest.corpus["packed"]:
            raise RunError(f"{self.path} has no floor: its rows are packed, so that they begin inside documents")
        self._content(FLOOR)
        try:
            return results.load(self.path / FLOOR)
        except ValueError as error:
            raise self._damaged(FLOOR, error) from error

    @property
    def evaluation(self) -> xr.Dataset:
        """The loss on the held-out rows at every checkpoint, by position in the row, beside the floor.

        Returns:
            `eval_loss` with its 95 % interval over rows (`eval_loss_low`, `eval_loss_high`) over `step` and `position`,
            in nats, of the prediction of the token at that position (from 1); and all that `Corpus.floor` returns for
            the same rows, but for packed rows, which have no floor.

        Raises:
            RunError: A checkpoint has no evaluation (runs of mechhier 0.2 and before have none), or a damaged one.
        """
        import numpy as np
        import xarray as xr

        steps, parts = self.steps, []
        if not steps:
            raise self._damaged(CHECKPOINTS, "there are no checkpoints")
        for step in steps:
            name = f"{checkpoint_folder(self.path, step).relative_to(self.path).as_posix()}/{EVALUATION}"
            content = self._content(name)
            try:
                part = json.loads(content)
                parts.append([np.asarray(part[values], dtype=float) for values in ("loss", "loss_error")])
            except (ValueError, TypeError, KeyError) as error:
                raise self._damaged(name, error) from error
        loss, half = (np.array(values) for values in zip(*parts, strict=True))
        half *= 1.96
        long_name = "held-out loss"
        found = xr.Dataset(
            {
                name: (("step", "position"), values, {"long_name": long_name + words, "units": "nats"})
                for name, values, words in (
                    ("eval_loss", loss, ""),
                    ("eval_loss_low", loss - half, ", lower bound (95 %)"),
                    ("eval_loss_high", loss + half, ", upper bound (95 %)"),
                )
            },
            coords={
                "step": ("step", steps, {"long_name": "training step", "units": "optimizer steps"}),
                "position": ("position", np.arange(1, loss.shape[1] + 1), {"long_name": "position in the row"}),
            },
        )
        if self.manifest.corpus["packed"]:
            return found
        floor = self.floor
        return found.merge(floor.sel(position=found.position), combine_attrs="override").assign_attrs(floor.attrs)

    def checkpoint(self, step: Step) -> Path:
        """Folder of one checkpoint.

        Args:
            step: A member of `steps`; `"last"` or -1; or a fraction of the training as a float from 0.0 to 1.0, for the
                checkpoint nearest to it.

        Raises:
            MissingCheckpointError: There is none of that step.
        """
        steps = self.steps
        chosen = step
        if step in ("last", -1):
            chosen = self.manifest.steps
        elif isinstance(step, float) and 0 <= step <= 1:
            chosen = min(self.manifest.checkpoint_steps, key=lambda kept: abs(kept - step * self.manifest.steps))
        if chosen not in steps:
            if chosen in self.manifest.checkpoint_steps:  # and not its neighbour, which is another model
                raise MissingCheckpointError(
                    f"the checkpoint of step {chosen} is gone from {self.path / CHECKPOINTS}, which has {steps}. What to do: "
                    "copy it from a backup, or train again in another folder"
                )
            raise MissingCheckpointError(
                f"{self.path} has no checkpoint of step {step!r}; it has {steps}, 'last', and the nearest to a fraction "
                "from 0.0 to 1.0"
            )
        return checkpoint_folder(self.path, int(chosen))

    def load(
        self,
        step: Step = "last",
        *,
        as_: ModelClass | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> HookedModel:
        """Load one checkpoint as a hooked model that carries the run's grammar.

        Args:
            step: As for `checkpoint`.
            as_: This and the others as for `load_model`.
            device: Where to put it.
            dtype: Of the weights.

        Raises:
            MissingCheckpointError: There is none of that step.
        """
        from mechhier.models.loading import load_model

        return load_model(self.checkpoint(step), as_=as_, device=device, dtype=dtype)

    def check(self) -> None:
        """Compare all that is on disk with the hashes that were taken when it was written, and the text with its own.

        `sha256sum --check files.sha256` in the run's folder does the same for the files. Measurements (`results/`) have keys
        of their own, which `sweep` compares.

        Cost: reads all files once, and makes all of the text that was trained on (a run of format 1 or 2: its first block).

        Raises:
            RunError: Something is missing or has changed; the message lists all of it.
        """
        manifest, wrong = self.manifest, []
        if missing := sorted(set(manifest.checkpoint_steps) - set(self.steps)):
            wrong.append(f"there are no checkpoints of steps {missing}")
        if manifest.format < 3:
            for step in self.steps:
                if weights_sha256(checkpoint_folder(self.path, step)) != manifest.weights_sha256.get(step):
                    wrong.append(f"the weights of step {step} are not those that were trained")
        else:
            gone = tuple(f"{checkpoint_folder(Path(), step).as_posix()}/" for step in missing)
            listed = hashes.read(self.path / hashes.LIST)
            listed = {name: digest for name, digest in listed.items() if not name.startswith(gone)}
            wrong += [f"{name} is not there as it was written" for name in hashes.changed(self.path, listed)]
        try:
            logged = set(self.log["step"])
        except RunError as error:  # of the list of hashes, too
            wrong.append(str(error))
        else:
            if unlogged := sorted(set(manifest.checkpoint_steps) - logged):
                wrong.append(f"{LOG} has no lines of steps {unlogged}")
        if manifest.all_text_sha256 is None:
            same_text = text_sha256(self.corpus) == manifest.text_sha256
        else:
            n_rows = manifest.steps * manifest.train.batch_size
            same_text = text_sha256(self.corpus, n_rows) == manifest.all_text_sha256
        if not same_text:
            wrong.append("the grammar makes other text than the model was trained on, with this version of mechhier")
        if wrong:
            raise RunError(f"{self.path} is damaged:\n  " + "\n  ".join(wrong))

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return written_hashes(self.path, self.manifest)

    def _content(self, name: str) -> bytes:
        """A small file of the run, if it is as it was written.

        Raises:
            RunError: It is absent or has changed.
        """
        listed = self._hashes
        try:
            content = (self.path / name).read_bytes()
        except OSError as error:
            raise self._damaged(name, error.strerror) from error
        if name in listed and listed[name] != hashlib.sha256(content).hexdigest():
            raise self._damaged(name, "it is not what was written")
        return content

    def _damaged(self, name: str, why: object) -> RunError:
        return RunError(
            f"{self.path / name} is absent or damaged: {why}. What to do: copy it from a backup, or train again in another "
            "folder; the rest of the run is not touched by it (Run.check() lists all that is)"
        )

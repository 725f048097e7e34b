"""A training run on disk: what was trained on what, its checkpoints, its log.

run/
  manifest.json                     model, training, corpus, versions, whether training has finished
  log.jsonl                         one line a log point: step, loss, eval_loss, learning_rate
  checkpoints/step-000400/          an ordinary Hugging Face model folder: safetensors, config, tokenizer
  trainer/                          the optimizer's state, for resuming; removed when training has finished
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mechhier.files import write_whole
from mechhier.grammars import Corpus, Grammar
from mechhier.models.spec import ModelSpec, TrainSpec

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from mechhier.models.loading import HookedModel, ModelClass

MANIFEST = "manifest.json"
LOG = "log.jsonl"
CHECKPOINTS = "checkpoints"


class RunError(ValueError):
    """A folder is not the run that was asked for; the message says what it is and what to do."""


class MissingCheckpointError(RunError, LookupError):
    """The run has no checkpoint of that step; the message lists those it has."""


class Manifest(BaseModel):
    """The contents of `manifest.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    model: ModelSpec
    train: TrainSpec
    corpus: dict[str, Any]
    """The corpus as its `description` says it."""
    steps: int
    """Optimizer steps of the whole training."""
    device: str
    """Device and precision of the training; the same run on another one agrees only to rounding."""
    versions: dict[str, str]
    finished: bool = False

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
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise RunError(f"cannot read {path}: {error}") from error

    def write(self, run: Path) -> None:
        """Write the manifest, whole or not at all."""
        write_whole(run / MANIFEST, self.model_dump_json(indent=2) + "\n")

    def differences(self, other: Manifest) -> list[str]:
        """Which settings of model, training and corpus differ, as `name: mine -> theirs`."""
        mine, theirs = (_flat(m.model_dump(mode="json", include={"model", "train", "corpus"})) for m in (self, other))
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


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return run / CHECKPOINTS / f"step-{step:06d}"


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
        path = Path(path)
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
        folders = (self.path / CHECKPOINTS).glob("step-*")
        return sorted(int(folder.name.removeprefix("step-")) for folder in folders)

    @property
    def log(self) -> pd.DataFrame:
        """The training curve, a line a log point: step, loss, eval_loss, learning_rate.

        `loss` is the mean over the steps since the line before, `eval_loss` the mean over the validation rows, at
        checkpoints; both in nats per predicted token. NaN where a line has no such value.
        """
        import pandas as pd

        lines = (self.path / LOG).read_text(encoding="utf-8").splitlines()
        columns = {"step": "int64", "loss": "float64", "eval_loss": "float64", "learning_rate": "float64"}
        return pd.DataFrame([json.loads(line) for line in lines], columns=list(columns)).astype(columns)

    def checkpoint(self, step: int) -> Path:
        """Folder of one checkpoint.

        Args:
            step: A member of `steps`, or -1 for the last.

        Raises:
            MissingCheckpointError: There is none of that step.
        """
        steps = self.steps
        if step == -1 and steps:
            step = steps[-1]
        if step not in steps:
            raise MissingCheckpointError(f"{self.path} has no checkpoint of step {step}; it has {steps} (-1: the last)")
        return checkpoint_folder(self.path, step)

    def load(
        self,
        step: int = -1,
        *,
        as_: ModelClass | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> HookedModel:
        """Load one checkpoint as a hooked model that carries the run's grammar; options as for `load_model`.

        Raises:
            MissingCheckpointError: There is none of that step.
        """
        from mechhier.models.loading import load_model

        return load_model(self.checkpoint(step), as_=as_, device=device, dtype=dtype)

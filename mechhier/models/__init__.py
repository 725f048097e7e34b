"""From a corpus to weights, and from weights to a hooked model.

- `spec`: what to train and how; `training`: `train`; `run`: what a training leaves on disk.
- `loading`: `load_model`, with `weights` (the files), `agreement` (of a config with them), `changes` (of a model in
  memory), `revision` (public checkpoints in order), `errors`, `tokenizer`.
- `wrapping`: Hugging Face model in, TransformerLens model out; `hooked`: one view of TransformerLens's classes.
- `planted`: models with circuits written by hand, and what a sound measure must say of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mechhier.models.spec import ModelSpec, TrainSpec, checkpoint_steps

if TYPE_CHECKING:
    from mechhier.models import planted
    from mechhier.models.errors import ModelLoadError
    from mechhier.models.loading import ModelInfo, load_model, model_info
    from mechhier.models.revision import Revision, revisions
    from mechhier.models.run import Run, RunError
    from mechhier.models.training import TrainingError, train

__all__ = [
    "ModelInfo",
    "ModelLoadError",
    "ModelSpec",
    "Revision",
    "Run",
    "RunError",
    "TrainSpec",
    "TrainingError",
    "checkpoint_steps",
    "load_model",
    "model_info",
    "planted",
    "revisions",
    "train",
]

# Imported on first use: these modules need torch, transformers or pandas, which take seconds to import.
_LAZY = {
    "ModelInfo": "loading",
    "ModelLoadError": "errors",
    "load_model": "loading",
    "model_info": "loading",
    "Revision": "revision",
    "revisions": "revision",
    "Run": "run",
    "RunError": "run",
    "TrainingError": "training",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name == "planted":
        return importlib.import_module("mechhier.models.planted")
    if name in _LAZY:
        return getattr(importlib.import_module(f"mechhier.models.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

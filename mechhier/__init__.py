"""Grammars with known structure, transformers trained on them, and one probe suite for their circuits.

A grammar makes a corpus, a corpus trains a run, a run's checkpoints (or OLMo's) load as hooked models, a phenomenon
measures a hooked model, a sweep measures every checkpoint, a report shows it.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechhier import grammars, models, phenomena, probes, report, results
    from mechhier.experiments import Experiment
    from mechhier.grammars import Corpus
    from mechhier.models import ModelSpec, Run, TrainSpec, load_model, train
    from mechhier.report import plot, show_attention
    from mechhier.sweeps import sweep

__version__ = version("mechhier")

__all__ = [
    "Corpus",
    "Experiment",
    "ModelSpec",
    "Run",
    "TrainSpec",
    "grammars",
    "load_model",
    "models",
    "phenomena",
    "plot",
    "probes",
    "report",
    "results",
    "show_attention",
    "sweep",
    "train",
]

# Imported on first use: torch and TransformerLens take seconds.
_MODULES = ("grammars", "models", "phenomena", "probes", "report", "results")
_HOME = {
    "Corpus": "mechhier.grammars",
    "Experiment": "mechhier.experiments",
    "ModelSpec": "mechhier.models",
    "Run": "mechhier.models",
    "TrainSpec": "mechhier.models",
    "load_model": "mechhier.models",
    "plot": "mechhier.report",
    "show_attention": "mechhier.report",
    "sweep": "mechhier.sweeps",
    "train": "mechhier.models",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"mechhier.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mechhier' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

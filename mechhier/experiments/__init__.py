"""Experiments: a YAML spec of arms, a model, training and phenomena, and the one call that carries it out."""

from mechhier.experiments.experiment import Arm, Experiment, ExperimentError

__all__ = ["Arm", "Experiment", "ExperimentError"]

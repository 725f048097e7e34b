"""Interventions on any hooked model; knows nothing of grammars or phenomena.

| to | measure the effect | act inside a block | on |
|---|---|---|---|
| ablate components | `ablate` | `ablated` | `Head`, `Attention`, `MLP`, `Neurons` |
| put activations of one run into another | `patch` | `patched` | sites by layer and position or head; components |
| estimate all those patches by gradients | `attribution_patch` | | sites by layer and position or head |
| patch only what one component hands to another | `path_patch` | `path_patched` | components to `HeadInput`s or the logits |
| cut attention between positions | `knock_out` | `knocked_out` | `Edge` |
| replace attention patterns | `force_pattern` | `forced_pattern` | `Head` |
| read attention patterns | `patterns`, `reduce_patterns` | | heads |

Effects are measured by a metric, one number per sequence: `logit_difference`, `probability`, `log_probability`,
`kl_divergence`, `loss`, or any callable like them (`Metric`). Results are labelled `xarray.Dataset`s with intervals, which
`mechhier.plot` draws. Functions called inside a block see its edits; blocks nest, the inner edit of a site acting last.
`Hooked` is what all of them are built on.
"""

from mechhier.models.hooked import Hook, Hooked, SiteName
from mechhier.probes.ablation import ablate, ablated
from mechhier.probes.attention import (
    Edge,
    force_pattern,
    forced_pattern,
    knock_out,
    knocked_out,
    patterns,
    reduce_patterns,
)
from mechhier.probes.attribution_patching import attribution_patch
from mechhier.probes.components import MLP, Attention, Head, HeadInput, Neurons, Resid
from mechhier.probes.metrics import Metric, kl_divergence, log_probability, logit_difference, loss, probability
from mechhier.probes.patching import patch, patched
from mechhier.probes.path_patching import path_patch, path_patched

__all__ = [
    "MLP",
    "Attention",
    "Edge",
    "Head",
    "HeadInput",
    "Hook",
    "Hooked",
    "Metric",
    "Neurons",
    "Resid",
    "SiteName",
    "ablate",
    "ablated",
    "attribution_patch",
    "force_pattern",
    "forced_pattern",
    "kl_divergence",
    "knock_out",
    "knocked_out",
    "log_probability",
    "logit_difference",
    "loss",
    "patch",
    "patched",
    "path_patch",
    "path_patched",
    "patterns",
    "probability",
    "reduce_patterns",
]

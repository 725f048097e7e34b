"""Models whose circuit is known because it was written by hand, to calibrate every measure.

All are GPT-2 models of two heads a layer, so that they load through every route that trained models take. `builder` says
how their weights are written. Each comes with its `answers`: what a sound measure returns, for which component, within
which tolerance, and the `tokens` on which that holds; `SCORES` defines the scores.

Example: calibrate a measure of one's own.
    >>> import torch
    >>> from mechhier.models.planted import PLANTED
    >>> def previous_token_score(model, tokens, layer, head):
    ...     model.set_attn_implementation("eager")
    ...     with torch.no_grad():
    ...         pattern = model(tokens, output_attentions=True).attentions[layer][:, head]
    ...     return pattern.diagonal(-1, 1, 2).mean().item()
    >>> planted = PLANTED["previous_token"]()
    >>> answer = planted.answers["PREV"]
    >>> score = previous_token_score(planted.model, planted.tokens(8), answer.layer, answer.head)
    >>> abs(score - answer.value) <= answer.tolerance
    True
"""

from collections.abc import Callable, Mapping
from functools import partial

from mechhier.models.planted.answers import PUBLISHED, SCORES, Answer, Circuit, Part, PlantedModel
from mechhier.models.planted.attention_heads import (
    planted_duplicate,
    planted_induction,
    planted_inert,
    planted_previous_token,
)
from mechhier.models.planted.function_vector import planted_function_vector
from mechhier.models.planted.load import planted_one_layer_load, planted_uniform_load
from mechhier.models.planted.self_repair import planted_backup, planted_eraser

PLANTED: Mapping[str, Callable[..., PlantedModel]] = {
    "previous_token": planted_previous_token,
    "induction": planted_induction,
    "duplicate_token": planted_duplicate,
    "inert": planted_inert,
    "backup": planted_backup,
    "backup_watching_answer": partial(planted_backup, watches="answer"),
    "eraser": planted_eraser,
    "function_vector": planted_function_vector,
    "uniform_load": planted_uniform_load,
    "one_layer_load": planted_one_layer_load,
}
"""Every planted model by name; called without arguments each makes its default sizes."""

__all__ = [
    "PLANTED",
    "PUBLISHED",
    "SCORES",
    "Answer",
    "Circuit",
    "Part",
    "PlantedModel",
    "planted_backup",
    "planted_duplicate",
    "planted_eraser",
    "planted_function_vector",
    "planted_induction",
    "planted_inert",
    "planted_one_layer_load",
    "planted_previous_token",
    "planted_uniform_load",
]

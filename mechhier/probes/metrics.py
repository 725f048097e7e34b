"""What an intervention is measured by: one number per sequence, from its logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.arguments import shown
from mechhier.models.token_ids import token_ids
from mechhier.models.torch_state import in_default_torch_state


class Metric(Protocol):
    """A number for each of some sequences.

    Any callable will do. It is called with the logits of a batch and the places of the batch's sequences among all that
    are measured, so that sequences can be run in batches of any size and in any order; one sequence may come several
    times. Where gradients are asked for (`attribution_patch`) it must be differentiable. Attributes `name` and `units`
    name the result's variables, if it has them.
    """

    def __call__(
        self, logits: Float[Tensor, "batch pos d_vocab"], rows: Int[Tensor, " batch"], /
    ) -> Float[Tensor, " batch"]:
        """The metric of every sequence of the batch; `rows[i]` is the place of sequence i among all."""
        ...


@dataclass(frozen=True)
class _Named:
    """A metric with its words."""

    name: str
    units: str
    measure: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        return self.measure(logits, rows)


PerSequence: TypeAlias = "int | Int[Any, ' sequence']"


@in_default_torch_state
def logit_difference(answers: PerSequence, wrong: PerSequence, *, position: PerSequence = -1) -> Metric:
    """The logit of the right answer minus that of a wrong one, in logits.

    Args:
        answers: Token id, one for all sequences or one for each.
        wrong: Token id, likewise.
        position: Where the answer is predicted, one for all or one for each; negative from the end.

    Raises:
        TypeError: Text, or what is no number.
        ValueError: Not integers of that shape. When called: fewer of them than sequences, or a position or id outside
            of the logits.
    """
    right, other, where = _ids(answers, "answers"), _ids(wrong, "wrong"), _ids(position, "position")

    def measure(logits: Tensor, rows: Tensor) -> Tensor:
        at = _at(logits, rows, where)
        return _pick(at, right, rows) - _pick(at, other, rows)

    return _Named("logit difference", "logit", measure)


@in_default_torch_state
def log_probability(answers: PerSequence, *, position: PerSequence = -1) -> Metric:
    """The answer's log-probability, in nats; arguments and errors as `logit_difference`."""
    right, where = _ids(answers, "answers"), _ids(position, "position")

    def measure(logits: Tensor, rows: Tensor) -> Tensor:
        return _pick(_at(logits, rows, where).log_softmax(-1), right, rows)

    return _Named("log-probability of the answer", "nat", measure)


@in_default_torch_state
def probability(answers: PerSequence, *, position: PerSequence = -1) -> Metric:
    """The answer's probability; arguments and errors as `logit_difference`."""
    right, where = _ids(answers, "answers"), _ids(position, "position")

    def measure(logits: Tensor, rows: Tensor) -> Tensor:
        return _pick(_at(logits, rows, where).softmax(-1), right, rows)

    return _Named("probability of the answer", "probability", measure)


@in_default_torch_state
def kl_divergence(
    reference_logits: Float[Tensor, "sequence pos d_vocab"] | Float[Tensor, "sequence d_vocab"],
    *,
    position: PerSequence = -1,
) -> Metric:
    """KL(reference || run) of the next-token distributions at a position, in nats.

    Args:
        reference_logits: Of the run to compare with, at all positions or at `position` only. Memory: one position is kept.
        position: As in `logit_difference`.

    Raises:
        TypeError: Not a tensor of floats.
        ValueError: Logits of another shape.
    """
    where = _ids(position, "position")
    if not isinstance(reference_logits, Tensor) or not reference_logits.is_floating_point():
        raise TypeError(f"reference_logits must be a tensor of logits, model(tokens), got {shown(reference_logits)}")
    if reference_logits.ndim == 3:
        rows = torch.arange(len(reference_logits), device=reference_logits.device)
        reference_logits = _at(reference_logits, rows, where)
    if reference_logits.ndim != 2:
        raise ValueError(f"reference_logits must be [sequence, (pos,) d_vocab], got {list(reference_logits.shape)}")
    reference = _float(reference_logits.detach()).log_softmax(-1)

    def measure(logits: Tensor, rows: Tensor) -> Tensor:
        log_q = _at(logits, rows, where).log_softmax(-1)
        log_p = _of_rows(reference, rows, "reference_logits").to(log_q)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    return _Named("KL divergence from the reference", "nat", measure)


@in_default_torch_state
def loss(tokens: Int[Any, "sequence pos"]) -> Metric:
    """Mean next-token loss of a sequence, in nats per token.

    Args:
        tokens: What is predicted: position t + 1 from the logits at t. Usually the tokens that are run, or the clean ones.

    Raises:
        TypeError: Text, floats, or anything else that holds no ids.
        ValueError: Not of shape [sequence, pos], or fewer than two positions. When called: logits of another
            length, or more sequences than `tokens` has.
    """
    targets = token_ids(tokens)
    if targets.shape[1] < 2:
        raise ValueError(
            f"the loss is of the tokens after the first: tokens must have at least 2 positions, got {list(targets.shape)}"
        )

    def measure(logits: Tensor, rows: Tensor) -> Tensor:
        if logits.shape[1] != targets.shape[1]:
            raise ValueError(f"the loss is of {targets.shape[1]} tokens, the logits are of {logits.shape[1]}")
        following = _of_rows(targets.to(logits.device), rows, "tokens")[:, 1:]
        return torch.nn.functional.cross_entropy(
            _float(logits[:, :-1]).transpose(1, 2), following.long(), reduction="none"
        ).mean(1)

    return _Named("next-token loss", "nat/token", measure)


_MADE_WITH = {
    "logit_difference": "logit_difference(answers=ids, wrong=ids)",
    "probability": "probability(answers=ids)",
    "log_probability": "log_probability(answers=ids)",
    "kl_divergence": "kl_divergence(logits)",
    "loss": "loss(tokens)",
}


def check_callable(metric: Any) -> Metric:
    """A metric as it was given, known to be one that can be called.

    Raises:
        TypeError: A name, one of the functions that make a metric, or anything that cannot be called.
    """
    name = metric if isinstance(metric, str) else getattr(metric, "__wrapped__", metric)
    name = name if isinstance(name, str) else getattr(name, "__name__", "")
    is_maker = callable(metric) and getattr(metric, "__module__", "") == __name__ and name in _MADE_WITH
    if isinstance(metric, type) or not callable(metric) or is_maker:
        how = _MADE_WITH.get(name) or "one of " + ", ".join(_MADE_WITH.values())
        given = f"the function {name}" if is_maker else shown(metric)
        raise TypeError(
            f"metric must be a function of the logits and rows, got {given}: make one from mechhier.probes, metric={how}"
            if name in _MADE_WITH
            else f"metric must be a function of the logits and rows, {how}, got {given}"
        )
    return cast(Metric, metric)


def name_of(metric: Metric) -> tuple[str, str]:
    """What a metric calls itself, and its units; a plain function goes by its own name and has no units."""
    name = getattr(metric, "name", None) or getattr(metric, "__name__", type(metric).__name__)
    return str(name), str(getattr(metric, "units", "1"))


def _float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _ids(values: PerSequence, name: str) -> Tensor:
    wanted = f"{name} must be a whole number, or one for every sequence"
    try:
        # torch has few operations on unsigned integers.
        ids = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    except (TypeError, ValueError):
        text = ": tokens are ids here, model.to_single_token(text)" if np.asarray(values).dtype.kind in "US" else ""
        raise TypeError(f"{wanted}, got {shown(values)}{text}") from None
    if ids.ndim > 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{wanted}, got {shown(values)}")
    return ids.clone().long() if ids.is_inference() else ids.long()  # autograd keeps no tensor of inference mode


def _of_rows(values: Tensor, rows: Tensor, name: str) -> Tensor:
    if int(rows.max()) >= len(values):
        raise ValueError(f"the metric's {name} are of {len(values)} sequences, but sequence {int(rows.max())} was run")
    return values[rows.to(values.device)]


def _per_row(values: Tensor, rows: Tensor, name: str) -> Int[Tensor, " batch"]:
    return (values.expand(len(rows)) if values.ndim == 0 else _of_rows(values, rows, name)).to(rows.device)


def _at(logits: Tensor, rows: Tensor, position: Tensor) -> Float[Tensor, "batch d_vocab"]:
    where, length = _per_row(position, rows, "positions"), logits.shape[1]
    if int(where.min()) < -length or int(where.max()) >= length:
        raise ValueError(f"the metric's position must lie in {-length}..{length - 1}, got {where.tolist()}")
    where = where.to(logits.device)
    return _float(logits[torch.arange(len(logits), device=logits.device), where])


def _pick(scores: Float[Tensor, "batch d_vocab"], ids: Tensor, rows: Tensor) -> Float[Tensor, " batch"]:
    chosen = _per_row(ids, rows, "answers").to(scores.device)
    if int(chosen.min()) < 0 or int(chosen.max()) >= scores.shape[-1]:
        raise ValueError(f"the metric's token ids must lie in 0..{scores.shape[-1] - 1}, got {chosen.tolist()}")
    return scores.gather(-1, chosen[:, None])[:, 0]

"""Models that make up for what is ablated by a known share: a backup head, and an MLP that no longer erases."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, sqrt
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from mechhier.models.planted.answers import Answer, Circuit, Part, PlantedModel
from mechhier.models.planted.builder import SCORE_GAP, Builder

Watched: TypeAlias = Literal["flag", "answer"]

# What the name mover's write adds to its token's logit, before anything else does.
_LOGIT = 40.0
# What the current token adds to its own logit where a model is to predict it at position 0, which has no name to move.
_TOKEN_LOGIT = 10.0
# Of a direct effect: beside the carrier float32 resolves one part in ten thousand.
_TOLERANCE = 1e-4 * _LOGIT
MAX_LENGTH = 12
"""Longest of the sequences that the answers hold on."""


def planted_backup(
    vocab_size: int = 320, n_ctx: int = 128, *, share: float = 0.7, watches: Watched = "flag"
) -> PlantedModel:
    """A Hydra: when layer 0's attention is taken out, layer 1's writes `share` of what is missing.

    Head 0 of layer 0, the name mover, attends from everywhere to position 1 and writes its token, which the model
    predicts. Head 0 of layer 1, the backup, attends to position 1 and writes `share` of what the name mover writes if
    that has not been written, else attends to position 0. Sequences must begin with token 0, the sink, which
    has no value and is nowhere else, and have at least 8 tokens. MLPs are zero.

    What the backup watches decides which ablations it answers:

    - "flag": a mark that the name mover writes beside the name. Zero ablation alone takes it away: a resampled or a
      mean write still carries it, and the backup stays silent.
    - "answer": whether the name that was written is the one at position 1. It answers zero and resample ablation, and
      mean ablation over several names, each of which is in a quarter of the sequences at most.

    A constant far larger than all else keeps every LayerNorm's scale fixed, so that what the backup writes, and what the
    final norm lets through, does not depend on the ablation; the total effect is own change plus growth. A random
    perturbation of the same norm seldom hides flag or name with the default sizes, but can in a small model.

    Args:
        vocab_size: Number of tokens, at least 8; the model has `2 * (vocab_size + n_ctx)` dimensions.
        n_ctx: Longest sequence, at least 8.
        share: What the backup writes, as a share of what it stands in for.
        watches: What tells the backup that the name mover is missing.

    Raises:
        ValueError: A size that is too small, a negative share, or something else to watch.
    """
    if not (isfinite(share) and share >= 0):
        raise ValueError(f"share must not be negative, and must be finite, got {share}")
    if watches not in get_args(Watched):
        raise ValueError(f"watches must be one of {', '.join(get_args(Watched))}, got {watches!r}")
    build = Builder(vocab_size, n_ctx, min_vocab_size=8)
    factor = build.carrier()
    constant, flag, origin = build.constant(), build.subspace(1).start, build.subspace(1).start
    answer = build.previous  # No head of this model writes previous tokens.
    sink_position, name_position = build.position.start, build.position.start + 1
    _name_mover(build, origin, factor)
    query, key = build.maps(2)
    if watches == "flag":
        with torch.no_grad():
            build.attention(0).c_proj.weight[: build.d_head][build.token, flag] = 1.0
        # 1 with the flag, -1 without: times the key, position 0 gains what position 1 loses.
        query[flag, 0], query[constant, 0] = 2.0, -1.0
        key[sink_position, 0], key[name_position, 0] = 1.0, -1.0
    else:
        # Position 0 scores 1; position 1 scores 4, less 8 times what is written of its own token: -4 for all of it.
        query[constant, 0] = 1.0
        key[sink_position, 0], key[name_position, 0] = 1.0, 4.0
        names = slice(1, vocab_size)
        query[answer, names] = -8 * torch.eye(vocab_size)[:, names]
        key[build.token, names] = torch.eye(vocab_size)[:, names]
    query *= SCORE_GAP * sqrt(build.d_head) / factor**2
    value, output = _copy_name(build, origin, share / factor)
    query, key = build.read_against(origin, query), build.read_against(origin, key)
    build.head(1, query=query, key=key, value=value, output=output)
    with torch.no_grad():
        build.model.lm_head.weight[:, build.token] *= _TOKEN_LOGIT / factor
        build.model.lm_head.weight[:, answer] = torch.eye(vocab_size) * _LOGIT / factor

    mover = {"component": "attention", "layer": 0}
    # A name's direct effect on its own logit is 1 - 1/V, on another's -1/V, in units of the write.
    own = 1 - 1 / vocab_size
    repair = {"zero": (share, 1e-4), "mean": (0.0, 1e-4), "resample": (0.0, 1e-4)}
    if watches == "answer":
        # The own change is that from the name to another one, -1, the growth share (1 - 1/V).
        repair["resample"] = (share * own, 1e-4)
        # Of n names each is 1/n of the mean, which is not lost: share / (1 - 1/n) at most, where n is at least 16, or
        # all the names of a small vocabulary.
        repair["mean"] = (share, 1e-4 + 0.08 * share)
    # The first position writes nothing, and predicts the sink.
    length = _length(vocab_size, n_ctx)
    answers = {"direct_effect": Answer("direct_effect", _LOGIT * own * (length - 1) / length, _TOLERANCE, **mover)}
    for ablation, (repaired, tolerance) in repair.items():
        place = {"ablation": ablation, **mover}
        answers |= {
            f"repair_share_{ablation}": Answer("repair_share", repaired, tolerance, **place),
            f"total_effect_share_{ablation}": Answer("total_effect_share", 1 - repaired, tolerance, **place),
            f"mlp_share_{ablation}": Answer("mlp_share", 0.0, **place),
        }
    return PlantedModel(
        name="backup" if watches == "flag" else "backup_watching_answer",
        purpose="self-repair by a later head"
        + (", which zero ablation alone sets off" if watches == "flag" else ", which every ablation sets off"),
        model=build.model,
        answers=answers | {"hydra_drop": Answer("hydra_drop", _TOKEN_LOGIT / factor, 1e-4 * _TOKEN_LOGIT / factor)},
        heads={"name_mover": (0, 0), "backup": (1, 0)},
        circuit=Circuit(
            ("sink", "name", "c", "d"),
            (
                Part("name mover", "attention", 0, (1,), 3, "name + flag" if watches == "flag" else "name"),
                Part("backup", "attention", 1, (1,), 3, f"{share:g} x name, if missing", is_standby=True),
            ),
            2,
            "name",
        ),
        draw=_sink_and_names(vocab_size, n_ctx),
    )


def planted_eraser(vocab_size: int = 64, n_ctx: int = 32, *, share: float = 0.7) -> PlantedModel:
    """Self-repair through an MLP: layer 1's MLP erases `share` of what layer 0's attention writes, whatever that is.

    Head 0 of layer 0 attends from everywhere to position 1 and writes its token, which the model predicts. The MLP of
    layer 1 reads the subspace of the answer and writes minus `share` of what it finds there. Ablating the attention
    therefore changes the MLP's direct effect by `share` of the attention's own change, in the other direction, and
    1 - `share` of the own change is left as the total effect. A constant far larger than all else keeps every
    LayerNorm's scale fixed, so that this is exact for every ablation: zero, mean and resample. No attention answers.
    Sequences must begin with token 0, the sink, which has no value and is nowhere else.

    Args:
        vocab_size: Number of tokens, at least 8; the model has `2 * (vocab_size + n_ctx)` dimensions.
        n_ctx: Longest sequence, at least 8.
        share: What the MLP erases, as a share of what the attention writes; less than 1, so that the model predicts the
            name. Above 0.8 its probability may be less than a half, where the default of `hydra` looks at no position.

    Raises:
        ValueError: A size that is too small, or a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must lie in 0 <= share < 1, so that the model still predicts the name, got {share}")
    build = Builder(vocab_size, n_ctx, min_vocab_size=8, n_units=2 * vocab_size)
    factor, origin, answer = build.carrier(), build.subspace(1).start, build.previous
    _name_mover(build, origin, factor)
    build.linear_mlp(1, origin=origin, source=answer, target=answer, gain=-share / factor)
    with torch.no_grad():
        build.model.lm_head.weight.zero_()
        build.model.lm_head.weight[:, answer] = torch.eye(vocab_size) * _LOGIT / factor

    mover, eraser = {"component": "attention", "layer": 0}, {"component": "mlp", "layer": 1}
    direct = _LOGIT * (1 - 1 / vocab_size)
    answers = {
        "direct_effect": Answer("direct_effect", direct, _TOLERANCE, **mover),
        "direct_effect_mlp": Answer("direct_effect", -share * direct, _TOLERANCE, **eraser),
    }
    for ablation in ("zero", "mean", "resample"):
        answers |= {
            f"total_effect_share_{ablation}": Answer("total_effect_share", 1 - share, ablation=ablation, **mover),
            f"mlp_share_{ablation}": Answer("mlp_share", share, ablation=ablation, **mover),
            f"repair_share_{ablation}": Answer("repair_share", 0.0, ablation=ablation, **mover),
        }
    return PlantedModel(
        name="eraser",
        purpose="self-repair through an MLP, which is no Hydra effect: no attention grows",
        model=build.model,
        answers=answers | {"hydra_drop": Answer("hydra_drop", 0.0, _TOLERANCE / factor)},
        heads={"name_mover": (0, 0)},
        circuit=Circuit(
            ("sink", "name", "c", "d"),
            (
                Part("name mover", "attention", 0, (1,), 3, "name"),
                Part("eraser", "mlp", 1, (3,), 3, f"-{share:g} x name"),
            ),
            2,
            "name",
        ),
        draw=_sink_and_names(vocab_size, n_ctx),
    )


def _length(vocab_size: int, n_ctx: int) -> int:
    """Of the sequences that the answers hold on: a sink and distinct names."""
    return min(MAX_LENGTH, vocab_size, n_ctx)


def _copy_name(build: Builder, origin: int, gain: float) -> tuple[Tensor, Tensor]:
    """Value and output maps that write the attended name, not the sink, into the answer's subspace."""
    size = build.token.stop
    names = slice(1, size)
    value, read = build.maps(2)
    value[names, names] = torch.eye(size - 1) * gain
    read[build.previous, build.token] = torch.eye(size)
    return build.read_against(origin, value), read.T.clone()


def _name_mover(build: Builder, origin: int, factor: float) -> None:
    """Head 0 of layer 0 moves the token of position 1 into the answer's subspace.

    Its query is a bias, the same at every position; `factor` is what the LayerNorm multiplies by.
    """
    query, key = build.maps(2)
    key[build.position.start + 1, 0] = 1.0
    value, output = _copy_name(build, origin, 1 / factor)
    build.head(0, query=query, key=build.read_against(origin, key), value=value, output=output)
    with torch.no_grad():
        build.attention(0).c_attn.bias[0] = SCORE_GAP * sqrt(build.d_head) / factor


def _sink_and_names(vocab_size: int, n_ctx: int) -> Callable[[int, int], Int[Tensor, "sequence pos"]]:
    """The sink, then distinct names; the name at position 1 differs between sequences as long as there are names."""
    length = _length(vocab_size, n_ctx)

    def draw(n: int, seed: int) -> Int[Tensor, "sequence pos"]:
        generator = torch.Generator().manual_seed(seed)
        first = torch.randperm(vocab_size - 1, generator=generator) + 1
        rows = []
        for row in range(n):
            name = first[row % (vocab_size - 1)].reshape(1)
            others = torch.randperm(vocab_size - 1, generator=generator) + 1
            rows.append(torch.cat([torch.zeros(1, dtype=torch.long), name, others[others != name][: length - 2]]))
        return torch.stack(rows)

    return draw

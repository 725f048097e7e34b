"""Models in which it is known how evenly the layers share the direct effect on the target."""

from __future__ import annotations

from math import isclose, sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.models.planted.answers import Answer, Circuit, Component, Part, PlantedModel
from mechhier.models.planted.builder import SCORE_GAP, Builder

# The target's logit, in a vocabulary of any size a probability near 1.
_LOGIT = 20.0
MAX_LENGTH = 12
"""Longest of the sequences that the answers hold on."""
COMPONENTS: tuple[Component, ...] = ("attention", "mlp")


def planted_uniform_load(vocab_size: int = 64, n_ctx: int = 32, *, n_layers: int = 4) -> PlantedModel:
    """All layers carry the same load: attention and MLP of every layer write the same direct effect on the target.

    The target, which the model predicts, is the current token. Head 0 of every layer attends to its own position and
    writes the token there into the subspace of the answer; the MLP writes what it reads of the token itself. Each of the
    2L components writes 1/(2L) of the answer; the embedding writes none. A constant far larger than all else keeps
    every LayerNorm's scale fixed. Every layer's share is 1/L: normalised entropy 1, participation ratio L; counted over
    components 1/(2L) each, entropy 1, participation ratio 2L.

    Args:
        vocab_size: Number of tokens, at least 4; the model has `2 * (vocab_size + n_ctx)` dimensions.
        n_ctx: Longest sequence, at least 8.
        n_layers: L, at least 2.

    Raises:
        ValueError: A size that is too small.
    """
    _check_layers(n_layers)
    shares = torch.full((n_layers, 2), 1 / (2 * n_layers))
    answers = _answers(n_layers, layer_participation=n_layers, component_participation=2 * n_layers, entropy=1.0)
    for layer in range(n_layers):
        for component in COMPONENTS:
            place = {"component": component, "layer": layer}
            answers[f"component_share_{component}_{layer}"] = Answer("component_share", 1 / (2 * n_layers), **place)
        answers[f"layer_share_{layer}"] = Answer("layer_share", 1 / n_layers, layer=layer)
    purpose = "load sharing at its most even"
    return _model("uniform_load", purpose, vocab_size, n_ctx, shares, answers)


def planted_one_layer_load(
    vocab_size: int = 64, n_ctx: int = 32, *, n_layers: int = 4, layer: int = 1, component: Component = "attention"
) -> PlantedModel:
    """One component of one layer carries the whole load: entropy 0, participation ratio 1.

    As `planted_uniform_load`, but that the component writes the whole answer and all others write nothing.

    Args:
        vocab_size: As `planted_uniform_load`.
        n_ctx: As `planted_uniform_load`.
        n_layers: As `planted_uniform_load`.
        layer: The layer that carries the load.
        component: Its attention or its MLP.

    Raises:
        ValueError: A size that is too small, a layer that the model does not have, or no such component.
    """
    _check_layers(n_layers)
    if not isinstance(layer, int) or not 0 <= layer < n_layers:
        raise ValueError(f"layer must be one of 0..{n_layers - 1} in a model of {n_layers} layers, got {layer!r}")
    if component not in COMPONENTS:
        raise ValueError(f"component must be one of {', '.join(COMPONENTS)}, got {component!r}")
    shares = torch.zeros(n_layers, 2)
    shares[layer, COMPONENTS.index(component)] = 1.0
    answers = _answers(n_layers, layer_participation=1, component_participation=1, entropy=0.0)
    for each in range(n_layers):
        answers[f"layer_share_{each}"] = Answer("layer_share", float(each == layer), layer=each)
    for each in COMPONENTS:
        place: dict = {"component": each, "layer": layer}
        answers[f"component_share_{each}_{layer}"] = Answer("component_share", float(each == component), **place)
    purpose = "load sharing at its least even"
    return _model("one_layer_load", purpose, vocab_size, n_ctx, shares, answers)


def _check_layers(n_layers: int) -> None:
    if not isinstance(n_layers, int) or n_layers < 2:
        raise ValueError(
            f"n_layers must be a whole number of at least 2, or there is nothing to share, got {n_layers!r}"
        )


def _answers(
    n_layers: int, *, layer_participation: float, component_participation: float, entropy: float
) -> dict[str, Answer]:
    # The entropy of a share of 1 has an infinite slope: rounding errors of 1e-6 in the other shares show.
    tolerance = 1e-3
    return {
        "layer_entropy": Answer("layer_entropy", entropy, tolerance),
        "layer_participation": Answer("layer_participation", layer_participation, tolerance),
        "component_entropy": Answer("component_entropy", entropy, tolerance),
        "component_participation": Answer("component_participation", component_participation, tolerance),
    }


def _model(
    name: str,
    purpose: str,
    vocab_size: int,
    n_ctx: int,
    shares: Float[Tensor, "layer component"],
    answers: dict[str, Answer],
) -> PlantedModel:
    """The model whose components write these shares of the answer."""
    n_layers = len(shares)
    build = Builder(vocab_size, n_ctx, n_layers=n_layers, n_units=2 * vocab_size)
    factor, origin, answer = build.carrier(), build.subspace(1).start, build.previous
    parts = []
    for layer, (attention, mlp) in enumerate(shares.tolist()):
        if attention:
            query, key, value, read = build.maps(4)
            query[build.position, :n_ctx] = torch.eye(n_ctx) * SCORE_GAP * sqrt(build.d_head) / factor**2
            key[build.position, :n_ctx] = torch.eye(n_ctx)
            value[build.token, build.token] = torch.eye(vocab_size) * attention / factor
            read[answer, build.token] = torch.eye(vocab_size)
            query, key, value = (build.read_against(origin, maps) for maps in (query, key, value))
            build.head(layer, query=query, key=key, value=value, output=read.T)
            parts.append(Part("head 0", "attention", layer, (2,), 2, _written(attention)))
        if mlp:
            build.linear_mlp(layer, origin=origin, source=build.token, target=answer, gain=mlp / factor)
            parts.append(Part("MLP", "mlp", layer, (2,), 2, _written(mlp)))
    with torch.no_grad():
        build.model.lm_head.weight.zero_()
        build.model.lm_head.weight[:, answer] = torch.eye(vocab_size) * _LOGIT / factor
    length = min(MAX_LENGTH, n_ctx)

    def draw(n: int, seed: int) -> Int[Tensor, "sequence pos"]:
        return torch.randint(vocab_size, (n, length), generator=torch.Generator().manual_seed(seed))

    return PlantedModel(
        name=name,
        purpose=purpose,
        model=build.model,
        answers=answers,
        heads={},
        circuit=Circuit(("a", "b", "c"), tuple(parts), n_layers, "c"),
        draw=draw,
    )


def _written(share: float) -> str:
    return "c" if isclose(share, 1.0) else f"c / {round(1 / share)}"

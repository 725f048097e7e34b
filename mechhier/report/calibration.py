"""What this package's own measures return on a planted model, beside what they should."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr

from mechhier.models.hooked import Hooked
from mechhier.models.loading import load_model
from mechhier.phenomena.function_vectors import function_vectors
from mechhier.phenomena.hydra import hydra
from mechhier.phenomena.induction import induction
from mechhier.phenomena.published import published
from mechhier.phenomena.tasks import Task, concatenate, grammar_tasks
from mechhier.probes.attention import patterns

if TYPE_CHECKING:
    from mechhier.models.planted import Answer, PlantedModel

_EFFECTS = {"repair_share": "attention_growth", "mlp_share": "mlp_change", "total_effect_share": "total_effect"}


def measured(planted: PlantedModel, *, as_: Literal["hooked", "bridge"] | None = None) -> dict[str, float]:
    """Measure every answer of a planted model with this package's phenomena and probes.

    Cost: that of the phenomena that the model's answers name, on 16 short sequences; a second or less with the default
    sizes, some seconds for those with a published score or a function vector.

    Args:
        planted: Any planted model.
        as_: Class of the hooked model, as for `mechhier.load_model`.

    Returns:
        Name of the answer -> what was measured.
    """
    package = _Package(planted, load_model(planted.model, as_=as_))
    return {name: package.measure(answer) for name, answer in planted.answers.items()}


def calibration_table(planted: PlantedModel, results: dict[str, float]) -> str:
    """A planted model's answers and what was measured, as a Markdown table.

    Args:
        planted: The model.
        results: Its `measured` values.
    """
    lines = ["| score | of | ablation | expected | tolerance | measured |", "|---|---|---|---|---|---|"]
    for name, answer in planted.answers.items():
        score = answer.score if answer.is_sound else f"{answer.score} (published)"
        # A measured -0.0000 is a zero.
        value = f"{results[name] + 0.0:.4f}".replace("-0.0000", "0.0000")
        lines.append(
            f"| {score} | {answer.place} | {answer.ablation or ''} | {answer.value:.4f} | {answer.tolerance:.1g} | {value} |"
        )
    return "\n".join(lines)


class _Package:
    """The phenomena's results on one planted model, each measured once, when an answer first asks for it."""

    def __init__(self, planted: PlantedModel, model: Any) -> None:
        self.planted = planted
        self.model = model
        self.tokens = planted.tokens(16)
        self._results: dict[str, Any] = {}

    def measure(self, answer: Answer) -> float:
        score = answer.score
        if score.startswith(("IND", "DUP", "PREV", "copying")):
            result = self._once("induction", lambda: induction(self.model, n_sequences=8, n_controls=0))
            name = score.removesuffix("_minus_uniform")
            value = result[name].sel(layer=answer.layer, head=answer.head)
            return float(value - result[f"{name}_uniform"] if name != score else value)
        if score in ("AIE", "accuracy_clean", "accuracy_injected"):
            result = self._once("function_vectors", lambda: function_vectors(self.model, self._tasks()))
            if score == "AIE":
                return float(result.AIE.sel(layer=answer.layer, head=answer.head))
            if score == "accuracy_injected":
                return float(result.accuracy.sel(prompt="zero_shot", vector="function_vector", layer=[0, 1]).mean())
            return float(result.accuracy_clean)
        if score == "P_shuffled":
            return self._probability_shuffled()
        if score.startswith("vector_"):
            return self._vector(answer)
        if score == "k_order_induction":
            # `published` draws tokens of its own, with replacement; on these the score is exact.
            assert answer.layer is not None
            assert answer.head is not None
            attention = patterns(Hooked(self.model), self.tokens, [(answer.layer, answer.head)])[:, 0]
            return float(np.diagonal(attention, -self.tokens.shape[1] // 2, 1, 2).mean())
        if score == "hydra_drop":
            result = self._once("published", lambda: published(self.model, n_sequences=4))
            return float(result.hydra_drop.sel(distance=1, layer=1))
        result = self._hydra(answer.ablation or "zero")
        if score.startswith(("layer_", "component_")):
            return _load(result.direct_effect, answer)
        ablated = result.sel(component=answer.component, layer=answer.layer)
        if score in _EFFECTS:
            sign = 1 if score == "total_effect_share" else -1
            return float(sign * ablated[_EFFECTS[score]] / ablated.own_change)
        return float(ablated[score])

    def _once(self, name: str, measure: Any) -> Any:
        if name not in self._results:
            self._results[name] = measure()
        return self._results[name]

    def _hydra(self, ablation: Any) -> xr.Dataset:
        return self._once(ablation, lambda: hydra(self.model, self.tokens, ablation=ablation, n_patches=1))

    def _tasks(self) -> list[Task]:
        grammar = self.planted.grammar
        assert grammar is not None
        return self._once("tasks", lambda: grammar_tasks(grammar, n_prompts=8))

    def _probability_shuffled(self) -> float:
        prompts = concatenate([task.test for task in self._tasks()])
        hooked = Hooked(self.model)
        probabilities = hooked.run(hooked.check_tokens(prompts.shuffled))[:, -1].softmax(-1).cpu()
        return float(probabilities.gather(-1, torch.as_tensor(prompts.answers)[:, None]).mean())

    def _vector(self, answer: Answer) -> float:
        hooked = Hooked(self.model)
        assert answer.layer is not None
        found: list[torch.Tensor] = []
        directions = self.planted.directions["task"]
        tokens = self.planted.tokens(8 * len(directions))
        hooked.run(tokens, [("z", answer.layer, lambda z: found.append(z[:, -1, answer.head]))])
        writes = (found[0] @ hooked.W_O(answer.layer)[answer.head]).cpu().unflatten(0, (-1, len(directions))).mean(0)
        along = (writes * directions).sum(-1)
        return float((along if answer.score == "vector_size" else along / writes.norm(dim=-1)).mean())


def _load(direct: xr.DataArray, answer: Answer) -> float:
    """Shares, entropy and participation ratio of the direct effects, of layers or of components."""
    by_layer = answer.score.startswith("layer_")
    effects = abs(direct.sum("component") if by_layer else direct)
    shares = effects / effects.sum()
    if answer.score == "layer_share":
        return float(shares.sel(layer=answer.layer))
    if answer.score == "component_share":
        return float(shares.sel(component=answer.component, layer=answer.layer))
    if answer.score.endswith("participation"):
        return float(1 / (shares**2).sum())
    positive = shares.values[shares.values > 0]
    return float(-(positive * np.log(positive)).sum() / np.log(shares.size))

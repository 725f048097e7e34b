"""The report of an experiment: what each figure shows, what it does not, and the numbers with their nulls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from mechhier import results
from mechhier.report import (
    CONTROLS,
    Section,
    band_of,
    by_phenomenon,
    plot,
    plot_loss,
    plot_positions,
    show_attention,
    write_report,
)
from mechhier.sweeps import Failure, failures

if TYPE_CHECKING:
    from mechhier.experiments.experiment import Experiment
    from mechhier.models import Run

INTRO = """
Small transformers of one shape, one per language, measured at every checkpoint with the same probes. Every score stands
next to its null in the same figure: what uniform attention would score on the same queries, what a part that writes
in random directions does, what the untrained model (step 0) scores.

Intervals are over probe sequences of one trained model, not over trainings. A difference between two rows or curves is
therefore a difference between two trained models; whether it belongs to the languages takes several seeds, and arms that
differ in one thing at a time.
"""


def write_summary(experiment: Experiment, runs: Mapping[str, Run], tree: xr.DataTree, out: Path) -> Path:
    """Write `report.html` (and `figures/*.png` where a browser is found) for finished runs and their sweep.

    Returns:
        The report.
    """
    failed = failures(tree)
    # Of a tree in which everything failed nothing can be drawn.
    measured = by_phenomenon(tree) if tree.children else {}
    floors = {name: run.floor for name, run in runs.items()}
    sections = [_failed(failed)] if failed else []
    sections += [_languages(experiment, runs, floors), _loss(runs, floors)]
    writers = {
        "induction": _induction,
        "function_vectors": _function_vectors,
        "hydra": _hydra,
        "published": _published,
    }
    sections += [write(measured[name], runs) for name, write in writers.items() if name in measured]
    sections.append(_numbers(measured, runs, floors))
    report = write_report(
        out / "report.html",
        title=experiment.title,
        intro=INTRO,
        sections=sections,
        provenance={**results.versions(), "experiment": experiment.model_dump(mode="json", exclude_defaults=True)},
    )
    return report.path


def without_inference(floor: xr.Dataset) -> float:
    """Loss in nats per token of a predictor that infers nothing about a document's own lexicon; NaN if it has none."""
    upper = float(floor.floor_upper_mean)
    return upper if upper > float(floor.floor_mean) else np.nan


def _at(result: xr.Dataset, step: int) -> xr.Dataset | None:
    """The measurement of a step, by its number: the neighbour of one that failed is another model's."""
    return result.sel(step=step) if step in result.step else None


def _final(by_arm: Mapping[str, xr.Dataset], runs: Mapping[str, Run]) -> dict[str, xr.Dataset]:
    """The measurements of the last steps, of the arms that have one."""
    found = {arm: _at(result, runs[arm].manifest.steps) for arm, result in by_arm.items()}
    return {arm: result for arm, result in found.items() if result is not None}


def _lost(by_arm: Mapping[str, xr.Dataset], runs: Mapping[str, Run]) -> str:
    """Which arms have no measurement at the end, or of the untrained model, in a sentence; empty if all have both."""
    words = []
    for when, step_of in (("at the end", lambda run: run.manifest.steps), ("of the untrained model", lambda run: 0)):
        arms = [arm for arm, result in by_arm.items() if _at(result, step_of(runs[arm])) is None]
        if arms:
            words.append(f"There is no measurement {when} of {', '.join(arms)}: it failed (see Failed measurements).")
    return " ".join(["", *words])


def _failed(failed: Sequence[Failure]) -> Section:
    table = pd.DataFrame([failure._asdict() for failure in failed])
    return Section(
        heading="Failed measurements",
        shows=(
            f"{len(failed)} measurements failed; the same command tries them again. Figures have a gap there, and where the "
            "untrained or the last model is asked for, there is no number rather than that of the next checkpoint."
        ),
        does_not_show="The tracebacks are beside the measurements, in the runs' folders results/*/step-*.error.json.",
        table=table,
    )


def _languages(experiment: Experiment, runs: Mapping[str, Run], floors: Mapping[str, xr.Dataset]) -> Section:
    table = pd.DataFrame(
        [
            {
                "arm": name,
                "language": training.arm.title,
                "seed": training.seed,
                "language drawn from seed": "(nothing is drawn)"
                if training.language_seed is None
                else training.language_seed,
                "vocabulary": runs[name].grammar.vocab_size,
                "context": runs[name].corpus.context,
                "training tokens": runs[name].corpus.n_tokens,
                "floor (nats)": float(floors[name].floor_mean),
                "without inference in context (nats)": without_inference(floors[name]),
            }
            for name, training in experiment.trainings.items()
        ]
    )
    described = "\n\n".join(f"{name}: {arm.about}" for name, arm in experiment.arms.items())
    return Section(
        heading="The languages",
        shows=f"What each arm was trained on.\n\n{described}",
        does_not_show="The arms differ in vocabulary, entropy and length of a row as well as in structure.",
        table=table,
    )


def _loss(runs: Mapping[str, Run], floors: Mapping[str, xr.Dataset]) -> Section:
    return Section(
        heading="Loss against the floor",
        shows=(
            "Training and held-out loss, in nats per predicted token, against the loss of the best possible predictor of "
            "the language: a line where that predictor is known exactly, else a band. Where every document has a "
            "lexicon of its own the table above also has the loss of a predictor that infers nothing from the context: a loss "
            "below it is evidence of inference in context. The second figure shows at which positions in the row the loss "
            "falls, and where the ideal predictor's does."
        ),
        does_not_show=(
            "A loss at the floor says that the predictions are right, not how they are made: that is what the probes are for."
        ),
        figures=[
            plot_loss(
                {name: run.log for name, run in runs.items()}, {name: band_of(floor) for name, floor in floors.items()}
            ),
            plot_positions({name: run.evaluation for name, run in runs.items()}),
        ],
    )


def _induction(by_arm: Mapping[str, xr.Dataset], runs: Mapping[str, Run]) -> Section:
    final = _final(by_arm, runs)
    figures: list[Any] = [
        plot(by_arm),
        *(plot(result, title=f"{arm}: heads at the end") for arm, result in final.items()),
    ]
    gains = {arm: float(r.NEXT_text_best - r.NEXT_text_best_null) for arm, r in final.items() if "NEXT_text_best" in r}
    if gains:
        arm = max(gains, key=lambda name: gains[name])
        corpus = runs[arm].corpus.held_out("test", tokens=runs[arm].corpus.context)
        figures.append(
            show_attention(
                runs[arm].load(runs[arm].manifest.steps),
                corpus[0],
                heads=final[arm].NEXT_text - final[arm].NEXT_text_null,
            )
        )
        looked_at = (
            f" The last figure shows the heads of the arm {arm} with the most attention to copies of the next token "
            "beyond syntax."
        )
    else:
        looked_at = ""
    return Section(
        heading="Induction heads",
        shows=(
            "IND, DUP and PREV are a head's mean attention, on random repeated tokens, to the token after the earlier copy, "
            "to the earlier copy, and to the previous token. The text scores are measured on held-out text of the arm's own "
            "language: attention to tokens that follow an earlier copy (IND_text), to earlier copies (DUP_text), and to "
            "copies of the token that really comes next (NEXT_text). A curve shows one head for each checkpoint, chosen on "
            "one half of the sequences and scored on the other. The null of a text score is what the same head would "
            "score by syntax alone: its own attention to every category of words, spread evenly within the category. "
            "Finding the end of a clause is not induction; and a head that spreads its attention evenly over the earlier "
            "words of a category reads how often each occurs in the document, which needs no matching: its curve rises "
            f"above uniform attention, and its null with it.{looked_at}{_lost(by_arm, runs)}"
        ),
        does_not_show=(
            "Random repeats are far out of distribution for these models, so a low IND does not mean that nothing is copied "
            "on text. Attention alone is not an effect: see in the bars what the losses do when the heads with the largest "
            "IND are ablated, beside as many random heads of the same layers. The nulls differ between arms, because "
            "a commoner token has more copies; compare a curve with its own line. Attention to copies beyond syntax can "
            "come from a preference for frequent words as well as from matching."
        ),
        figures=figures,
    )


def _function_vectors(by_arm: Mapping[str, xr.Dataset], runs: Mapping[str, Run]) -> Section:
    final = _final(by_arm, runs)
    without = [arm for arm, result in final.items() if not result.attrs["has_function"]]
    missing = (
        f" The arms {', '.join(without)} have no function to carry; they are asked as controls." if without else ""
    )
    return Section(
        heading="Function vectors",
        shows=(
            "AIE is the gain in the answer's probability when one head's output at the last token of a prompt with shuffled "
            "demonstrations is replaced by its mean over intact ones. The function vector is the sum of the top heads' mean "
            "outputs; injected into a bare query, or into a prompt with shuffled demonstrations, it should bring back the "
            "right verb. The query never occurs in the demonstrations. Heads are chosen on some lexicons and judged on "
            "others, with other queries. Controls: another task's vector, random heads, a random vector of the same norm, "
            f"and the mean over tasks.{missing}{_lost(by_arm, runs)}"
        ),
        does_not_show=(
            "Accuracy after injection is bounded by what the model can do with intact demonstrations; compare with the clean "
            "and the exact predictor's accuracy in the table at the end. A vector that works here need not be the model's "
            "own way of carrying the task."
        ),
        figures=[plot(by_arm), *(plot(result, title=f"{arm}: at the end") for arm, result in final.items())],
    )


def _hydra(by_arm: Mapping[str, xr.Dataset], runs: Mapping[str, Run]) -> Section:
    final = {arm: result for arm, result in _final(by_arm, runs).items() if int(result.n_positions) > 0}
    return Section(
        heading="Hydra effect",
        shows=(
            "What ablating one layer's attention or MLP (its write replaced by that of other sequences) does to the logit of"
            " the clean run's top token, term by term: the change of the layer's own direct effect, of later attention (the "
            "Hydra effect), of later MLPs, and through the final norm's scale. The terms add up to the total effect exactly."
            " The null is the same part writing as much in random directions, its target the top token of that run. Only "
            "positions where the clean top token has a probability above one half count; where there are none, as in an "
            f"untrained model, there is no value.{_lost(by_arm, runs)}"
        ),
        does_not_show=(
            "With two layers there is little that could repair: the last MLP has nothing behind it but the norm. A change "
            "of downstream attention need not be compensation: it counts as repair only where it has the sign opposite to "
            "the ablated layer's own change, and lies outside the band of 95 % of the null's draws."
        ),
        figures=[plot(by_arm), *(plot(result, title=f"{arm}: at the end") for arm, result in final.items())],
    )


def _published(by_arm: Mapping[str, xr.Dataset], runs: Mapping[str, Run]) -> Section:
    return Section(
        heading="The scores as the paper published them",
        shows=(
            "The same checkpoints measured with the formulas of the paper's released code, so that its figures can be set "
            f"against the ones above.{_lost(by_arm, runs)}"
        ),
        does_not_show=(
            "They do not measure what their names say. The k-order score is attention to a token's own earlier copy: a "
            "perfect induction head scores 0. The Hydra score is the clean logit of the token just read, without the final "
            "norm: it holds no ablation. The function-vector prompts ask for an object that nothing in the prompt "
            "determines. Only the syntax masses are sound."
        ),
        figures=[plot(by_arm)],
    )


def contrasts(
    measured: Mapping[str, Mapping[str, xr.Dataset]], runs: Mapping[str, Run], floors: Mapping[str, xr.Dataset]
) -> pd.DataFrame:
    """One row per arm and score: its value at the end with the 95 % interval, at step 0, and its null."""
    rows: list[dict[str, Any]] = []

    def add(arm: str, score: str, interval: tuple[Any, Any, Any], untrained: Any, null: Any, null_is: str) -> None:
        names = ("arm", "score", "end", "low", "high", "untrained", "null", "null is")
        values = [float(value) for value in (*interval, untrained, null)]
        rows.append(dict(zip(names, (arm, score, *values, null_is), strict=True)))

    for arm, run in runs.items():
        held_out = run.log.set_index("step").eval_loss
        add(
            arm,
            "held-out loss (nats)",
            (held_out.get(run.manifest.steps, np.nan), np.nan, np.nan),
            held_out.get(0, np.nan),
            floors[arm].floor_mean,
            "ideal predictor",
        )
        if (both := _start_and_end(measured.get("induction", {}), arm, run)) is not None:
            start, end = both
            for score in ("IND", "PREV", "IND_text", "DUP_text", "NEXT_text"):
                best = f"{score}_best"
                nulls = {f"{score}_uniform": "uniform attention", f"{best}_null": "the same head's syntax alone"}
                for null, null_is in nulls.items():
                    if null in end:
                        add(arm, f"{score}, best head", _interval(end, best), start[best], end[null], null_is)
            changes = {"copy_loss_change": "copy loss", "ICL_score_change": "ICL score"}
            for name, loss in changes.items():
                if name in end:
                    score, null_is = f"{loss} (nats), best IND heads ablated", "random heads of the same layers"
                    add(arm, score, _interval(end, name), start[name], end[f"{name}_null"], null_is)
            if "ICL_score" in end:
                ideal = np.nan if end.attrs["ICL_floor"].startswith("nothing") else 0.0
                interval = _interval(end, "ICL_score")
                add(arm, "ICL score (nats)", interval, start["ICL_score"], ideal, "ideal predictor, 0 above its floor")
        if (both := _start_and_end(measured.get("function_vectors", {}), arm, run)) is not None:
            start, end = both
            for prompt in ("clean", "shuffled", "zero_shot"):
                name = f"accuracy_{prompt}"
                add(arm, f"verb accuracy, {prompt}", _interval(end, name), start[name], end.chance, "chance")
            for prompt in ("zero_shot", "shuffled"):
                with_fv = end.sel(prompt=prompt, vector="function_vector")
                layer = int(with_fv.accuracy.argmax("layer"))
                controls = end.accuracy.sel(prompt=prompt, layer=layer, vector=list(CONTROLS))
                add(
                    arm,
                    f"verb accuracy, {prompt} + FV at layer {layer}",
                    _interval(with_fv.sel(layer=layer), "accuracy"),
                    start.accuracy.sel(prompt=prompt, vector="function_vector", layer=layer),
                    controls.max(),
                    "best control vector, same layer",
                )
            where = end.AIE.argmax(("layer", "head"))
            top = end.isel({dim: int(index) for dim, index in where.items()})
            add(
                arm,
                "AIE, largest head",
                _interval(top, "AIE"),
                start.AIE.max(),
                top.AIE_null,
                "shuffled means",
            )
        if (both := _start_and_end(measured.get("hydra", {}), arm, run)) is not None:
            start, end = (result.sel(component="attention", layer=0) for result in both)
            for term in ("total_effect", "attention_growth", "mlp_change", "self_repair"):
                null, low, high = (float(bound) for bound in _interval(end, f"{term}_null"))
                null_is = f"written in random directions, 95 % in [{low:.3g}, {high:.3g}]"
                add(arm, f"{term}, attention 0 ablated", _interval(end, term), start[term], null, null_is)
    return pd.DataFrame(rows)


def _start_and_end(by_arm: Mapping[str, xr.Dataset], arm: str, run: Run) -> tuple[xr.Dataset, xr.Dataset] | None:
    """The measurements of the untrained model, undefined if there is none, and of the last one; None if there is none."""
    end = _at(by_arm[arm], run.manifest.steps) if arm in by_arm else None
    if end is None:
        return None
    start = _at(by_arm[arm], 0)
    return (end.where(False) if start is None else start), end


def _interval(result: xr.Dataset, name: str) -> tuple[Any, Any, Any]:
    return result[name], result[f"{name}_low"], result[f"{name}_high"]


def _numbers(
    measured: Mapping[str, Mapping[str, xr.Dataset]], runs: Mapping[str, Run], floors: Mapping[str, xr.Dataset]
) -> Section:
    return Section(
        heading="The numbers",
        shows=(
            "Each arm's scores at the end of training with their 95 % interval over probe sequences, at step 0 (the "
            "untrained model), and their null. Best heads are chosen on one half of the sequences and scored on the other; "
            "the layer of injection is the best on the test prompts and is therefore biased up."
        ),
        does_not_show="Every row is of one training: the intervals do not cover what another seed would give.",
        table=contrasts(measured, runs, floors),
    )

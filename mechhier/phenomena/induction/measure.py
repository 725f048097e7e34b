"""`induction`: every score of every head of one model."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.arguments import seed_number, whole_number
from mechhier.models.hooked import MAX_BYTES, Hooked
from mechhier.models.loading import model_info
from mechhier.models.torch_state import in_default_torch_state
from mechhier.phenomena._tokens import random_repeats
from mechhier.phenomena.induction.attention import Sums, on_repeats, on_text
from mechhier.phenomena.induction.causal import Effects, ablate, choose_heads, control_sets
from mechhier.phenomena.induction.circuits import N_ROTATIONS, N_SAMPLED_TOKENS, copying_scores, k_composition, why_not
from mechhier.phenomena.induction.kinds import KINDS, THRESHOLD, above_uniform, kinds_of
from mechhier.phenomena.induction.losses import copy_losses, early_and_late, late_minus_early, text_and_floor
from mechhier.probes.provenance import provenance
from mechhier.progress import track
from mechhier.results import (
    INTERVAL,
    MIN_SAMPLES,
    Variables,
    best_of,
    mean_interval,
    scored,
    undefined,
    warn_undefined,
    with_bounds,
)
from mechhier.specs import Drawn, DrawnOrNone, Size

DEFINITION = (
    "Mean attention A[q, k]. On random repeats [BOS] r r with |r| = n, q in the second copy: IND = A[q, q-n+1], "
    "DUP = A[q, q-n]; PREV = A[t, t-1] over all t. On text, over queries in the second half that have such a key: "
    "IND_text = mass on tokens that follow an earlier copy of the current token, DUP_text = mass on earlier copies of "
    "it, NEXT_text = mass on copies of the true next token, ROLE_text = mass on tokens that follow an earlier token of "
    "the current one's syntactic category. X_null = the head's own mass on every syntactic category, spread evenly over "
    "the category's tokens so far: what syntax alone would score. Best heads: largest excess over it. "
    "copying = sum(lambda) / sum(|lambda|), eigenvalues of the OV circuit from embedding to unembedding, gains folded in, "
    "the first norm applied to the embedding alone; sum(lambda) is the sum over tokens of a token's logit on itself "
    f"against the mean over all; interval: normal, over {N_SAMPLED_TOKENS} tokens. "
    "K_composition = ||W_OV W_QK^T||_F / (||W_OV||_F ||W_QK||_F) of the head with the largest PREV in an earlier layer, "
    f"gains folded in, minus its mean over {N_ROTATIONS} random rotations of what that head writes (their spread is the "
    "interval); rotary positions and norms of queries and keys are left out. "
    "copy_loss, first_copy_loss = loss on tokens 1 to n-1 of the second, first copy, mean over them, then over sequences. "
    "ICL_score = mean loss on text late in the sequence minus early in it. "
    "X_change = X without the induction heads (mean ablation of z) minus X, on the sequences that did not choose them; "
    "X_change_null = the same without as many random other heads of the same layers, mean over sets, its interval their "
    "2.5 and 97.5 % quantiles; X_change_p = (1 + sets that change it as much) / (1 + sets). "
    f"kind = the score of IND, DUP, PREV whose lower bound is furthest on the way from uniform attention to 1, if above "
    f"{THRESHOLD}."
)
SOURCE = (
    "Olsson et al. 2022, In-context Learning and Induction Heads; Elhage et al. 2021, A Mathematical Framework for "
    "Transformer Circuits (copying, K-composition); text scores: mechhier"
)

_LONG_NAMES = {
    "IND": "attention to the token after the earlier copy",
    "DUP": "attention to the earlier copy",
    "PREV": "attention to the previous token",
    "IND_text": "attention to tokens after an earlier copy, on text",
    "DUP_text": "attention to earlier copies of the current token, on text",
    "NEXT_text": "attention to copies of the true next token, on text",
    "ROLE_text": "attention to tokens after an earlier token of the same category, on text",
}
_LOSSES = {"copy_loss": "loss on the second copy", "ICL_score": "late minus early loss on text"}


@in_default_torch_state
def induction(
    model: Any,
    tokens: Int[Any, "batch pos"] | None = None,
    *,
    n_sequences: Drawn = 64,
    n_controls: DrawnOrNone = 10,
    seed: int = 0,
    max_bytes: Size = MAX_BYTES,
) -> xr.Dataset:
    """Induction heads: attention scores of every head, what heads copy and read, and what the model loses without them.

    Random repeats are far out of distribution for a small grammar model; the text scores are what it can show on the
    language it knows. Each attention score stands next to what uniform attention would score on the same queries.

    Cost: one forward pass over the random repeats and one over the text; memory beyond it is one layer's pattern of one
    batch. The ablations run over half of the sequences, `n_controls` + 3 times at most, from the first ablated layer
    on. The weights' scores need no pass (see `mechhier.phenomena.induction.circuits`).

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        tokens: Text to score in distribution, token ids without padding. By default held-out text of the grammar that
            the model was trained on; without a grammar the text scores are left out.
        n_sequences: Number of random-repeat sequences, and of text sequences drawn from the grammar. With fewer than 4
            bounds are undefined, and so is every head's kind; with fewer than 8 those of what half of them give.
        n_controls: Number of sets of random heads that are ablated beside the induction heads; 0 leaves the ablations
            out. Where layers have few heads there are fewer sets (the rest of `control` is NaN), and where they have
            one each there are none.
        seed: Seed of everything drawn.
        max_bytes: Working memory of one batch, from which the batch size follows.

    Returns:
        Attention mass in [0, 1], with `_low`, `_high` (95 %, studentised bootstrap over sequences, on repeats within
        lengths) and the scalar `_uniform`:
        `IND`, `DUP`, `PREV`, with text `IND_text`, `DUP_text`, `NEXT_text`, and with a grammar `ROLE_text`, each
        `[layer, head]`. With a grammar the first three text scores also have `_null` `[layer, head]`: what the head
        would score if it knew syntax alone. `X_best` is the score, on every other sequence, of the head
        (`X_best_layer`, `X_best_head`) that scored highest on the rest, above its `_null` where there is one (then also
        `X_best_null`).

        From the weights, with bounds: `copying` `[layer, head]` in [-1, 1], and `K_composition` `[layer, head]` with
        the best previous-token head of the earlier layers (`K_composition_sender_layer`, `K_composition_sender_head`,
        `[layer]`, -1 for layer 0, where it is NaN), above its random `K_composition_baseline` `[layer, head]`.

        In nats, with bounds: `copy_loss`, `first_copy_loss` and with text `ICL_score` (negative: improves with
        context), from which the grammar's exact floor is subtracted where it is known (attribute `ICL_floor`).

        `kind` `[layer, head]`: "induction", "duplicate token", "previous token" or "none". `ablated` `[layer, head]`: 1
        for the heads ablated as induction heads; `copy_loss_change` and with text `ICL_score_change`, with bounds,
        `_null` (mean over the random sets, bounds their quantiles), `_p`, and `_control` `[control]` for each set.

    Raises:
        TypeError: Not a hooked model, token ids, or whole numbers.
        ValueError: Tokens that the model cannot take, or too few sequences.

    Example:
        >>> import mechhier as mh
        >>> planted = mh.models.planted.planted_induction()
        >>> result = mh.phenomena.induction(mh.load_model(planted.model), n_sequences=8)
        >>> bool(result.IND.sel(layer=1, head=0) > 0.99)
        True
    """
    n_sequences = whole_number("n_sequences", n_sequences, at_least=1)
    n_controls = whole_number("n_controls", n_controls, at_least=0)
    seed = seed_number(seed)
    hooked = Hooked(model, max_bytes=max_bytes)
    text, categories, floor, text_source, floor_source = _text(hooked, tokens, n_sequences, seed)
    repeats = random_repeats(hooked, n_sequences, seed=seed)
    n_text = 0 if text is None else len(text)

    variables: Variables = {}
    with track("induction scores", total=n_sequences + n_text) as advance:
        scores, repeat_losses = on_repeats(hooked, repeats, advance)
        copies = [copy_losses(losses, length) for losses, (length, _) in zip(repeat_losses, repeats, strict=True)]
        for name, copy, words in (("copy_loss", 1, "second"), ("first_copy_loss", 0, "first")):
            values = np.concatenate([both[copy] for both in copies])
            long_name = f"loss on the {words} copy of random repeats"
            variables |= scored(
                name,
                (),
                values,
                np.ones(n_sequences),
                long_name=long_name,
                units="nats",
                seed=seed,
                strata=scores["IND"].lengths,
            )
        if text is not None:
            of_text, losses = on_text(hooked, text, categories, advance)
            scores |= of_text
            improvement = late_minus_early(losses if floor is None else losses - floor)
            long_name = _LOSSES["ICL_score"] + ("" if floor is None else ", above the floor")
            variables |= scored(
                "ICL_score",
                (),
                improvement,
                np.ones(len(text)),
                long_name=long_name,
                units="nats",
                seed=seed,
                change=True,
            )
    described: Variables = {}
    for name, sums in scores.items():
        described |= _describe(name, sums, seed=seed)
    variables = described | variables
    variables |= _from_weights(hooked, described["PREV"][1], seed=seed)
    lower = {name: described[f"{name}_low"][1] for name in KINDS}
    uniform = {name: float(described[f"{name}_uniform"][1]) for name in KINDS}
    label = {"long_name": "kind of the head by its attention on random repeats", "units": "name"}
    variables["kind"] = (("layer", "head"), kinds_of(lower, uniform), label)
    n_control_sets = 0
    if n_controls:
        ablations, n_control_sets = _ablations(hooked, scores["IND"], repeats, text, n_controls, seed=seed)
        variables |= ablations
    _warn_undefined(variables, n_sequences, n_text, of_weights=why_not(hooked))
    return xr.Dataset(
        variables,
        coords={"layer": np.arange(hooked.n_layers), "head": np.arange(hooked.n_heads)},
        attrs=provenance(
            hooked,
            phenomenon="induction",
            definition=DEFINITION,
            source=SOURCE,
            ablation="mean over sequences and positions" if n_control_sets else "none",
            seed=seed,
            n_sequences=n_sequences,
            n_text_sequences=n_text,
            n_control_sets=n_control_sets,
            text=text_source,
            ICL_floor=floor_source,
            ICL_positions=_positions(text),
            interval=f"{INTERVAL.format(samples='sequences')}; random repeats: within lengths",
        ),
    )


def _text(
    hooked: Hooked, tokens: Int[Any, "batch pos"] | None, n_sequences: int, seed: int
) -> tuple[
    Int[Tensor, "batch pos"] | None,
    Int[np.ndarray, "batch pos"] | None,
    Float[np.ndarray, "batch token"] | None,
    str,
    str,
]:
    """Text, its categories and its floor where known, and in words where text and floor come from."""
    info = model_info(hooked.model)
    grammar = None if info is None else info.grammar
    if tokens is not None:
        text = hooked.check_tokens(tokens)
        categories = None if grammar is None else grammar.token_categories[text.cpu().numpy()]
        return text, categories, None, "given by the caller", "nothing: the text was given by the caller"
    if grammar is None:
        without = "the model carries no grammar and no tokens were given"
        return None, None, None, f"none: {without}", "nothing: there is no text"
    sample, floor, method = text_and_floor(grammar, n_sequences, hooked.n_ctx, seed)  # pyright: ignore[reportArgumentType]
    categories = sample.labels["category"]
    return hooked.check_tokens(sample.tokens), categories, floor, "held-out text of the model's grammar", method


def _positions(text: Int[Tensor, "batch pos"] | None) -> str:
    if text is None:
        return "none"
    early, late = early_and_late(text.shape[1] - 1)
    return f"loss on the tokens at positions {early.start + 1}..{early.stop} and {late.start + 1}..{late.stop}"


def _describe(name: str, sums: Sums, *, seed: int) -> Variables:
    long_name, units, dims = _LONG_NAMES[name], "attention mass", ("layer", "head")
    counts = sums.n_queries[:, None, None]
    variables = scored(
        name, dims, sums.attention, counts, long_name=long_name, units=units, seed=seed, strata=sums.lengths
    )
    variables[f"{name}_uniform"] = (
        (),
        _mean(sums.uniform, sums.n_queries),
        {"long_name": f"{long_name}, uniform attention", "units": units},
    )
    null = np.zeros_like(sums.attention) if sums.category_null is None else sums.category_null
    layer, head, halves = best_of(sums.attention - null, counts)
    chosen = sums.attention[halves, layer, head], sums.n_queries[halves]
    best = f"{name}_best"
    variables |= scored(
        best,
        (),
        *chosen,
        long_name=f"{long_name}, head chosen on the other half",
        units=units,
        seed=seed,
        strata=None if sums.lengths is None else sums.lengths[halves],
    )
    if sums.category_null is not None:
        label = f"{long_name}, syntax alone"
        variables[f"{name}_null"] = (dims, _mean(null, counts), {"long_name": label, "units": units})
        variables[f"{best}_null"] = (
            (),
            _mean(null[halves, layer, head], sums.n_queries[halves]),
            {"long_name": f"{label}, head chosen on the other half", "units": units},
        )
    for which, index in (("layer", layer), ("head", head)):
        label = {"long_name": f"{which} of the head chosen for {name}", "units": "index"}
        variables[f"{best}_{which}"] = ((), np.asarray(index), label)
    return variables


def _mean(sums: Float[np.ndarray, "sequence ..."], counts: Float[np.ndarray, "sequence ..."]) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums.sum(0) / counts.sum(0))


def _warn_undefined(variables: Variables, n_sequences: int, n_text: int, *, of_weights: str | None) -> None:
    """Say once what is NaN, and why; but for the K-composition of the first layer, which there is not."""
    from_weights = ("K_composition", "copying")
    values, bounds = undefined({name: each for name, each in variables.items() if not name.startswith(from_weights)})
    reasons = [] if of_weights is None else [f"copying and K-composition are not defined: {of_weights}"]
    if values:
        reasons.append(
            f"nothing counts for {', '.join(values)}: no query has such a key, or no sequence is left that did not choose "
            "the head"
        )
    if bounds:
        reasons.append(
            f"an interval needs {MIN_SAMPLES} sequences that count, and twice as many where half of them choose the heads "
            f"(X_best, X_change): with {n_sequences} random repeats and {n_text} texts there is none of "
            f"{', '.join(bounds)}" + ("; and no head's kind can be told" if "IND" in bounds else "")
        )
    if reasons:
        warn_undefined(f"induction: {'; '.join(reasons)}")


def _from_weights(hooked: Hooked, previous: Float[np.ndarray, "layer head"], *, seed: int) -> Variables:
    dims = ("layer", "head")
    variables = with_bounds(
        "copying",
        dims,
        copying_scores(hooked, seed=seed),
        long_name="copying score of the OV circuit",
        units="dimensionless",
    )
    composition = k_composition(hooked, previous, seed=seed)
    rotary = " (approximate: rotary)" if getattr(hooked.cfg, "positional_embedding_type", "") == "rotary" else ""
    long_name = f"K-composition with the best previous-token head, above random{rotary}"
    variables |= with_bounds("K_composition", dims, composition.excess, long_name=long_name, units="dimensionless")
    label = {"long_name": "K-composition with that head randomly rotated", "units": "dimensionless"}
    variables["K_composition_baseline"] = (dims, composition.baseline, label)
    for place, which in enumerate(("layer", "head")):
        label = {"long_name": f"{which} of the previous-token head whose K-composition is measured", "units": "index"}
        senders = np.array([sender[place] for sender in composition.senders])
        variables[f"K_composition_sender_{which}"] = (("layer",), senders, label)
    return variables


def _ablations(
    hooked: Hooked,
    ind: Sums,
    repeats: list[tuple[int, Int[Tensor, "batch pos"]]],
    text: Int[Tensor, "batch pos"] | None,
    n_controls: int,
    *,
    seed: int,
) -> tuple[Variables, int]:
    """The ablations' variables, and the number of control sets; the heads are chosen on every other sequence."""
    sums, counts = ind.attention[::2], ind.n_queries[::2, None, None]
    lengths = None if ind.lengths is None else ind.lengths[::2]
    means, low, _ = mean_interval(sums, counts, seed=seed, strata=lengths)
    uniform = float(ind.uniform[::2].sum() / ind.n_queries[::2].sum())
    chosen = choose_heads(means, above_uniform(low, uniform) > THRESHOLD)
    ablated = np.zeros(means.shape, dtype=np.int64)
    ablated[tuple(np.array(chosen, dtype=int).reshape(-1, 2).T)] = 1
    label = {"long_name": "whether the head is ablated as an induction head", "units": "0 or 1"}
    variables: Variables = {"ablated": (("layer", "head"), ablated, label)}
    if not chosen:
        return variables, 0
    controls = control_sets(chosen, hooked.n_heads, n_controls, seed=seed)
    n_scored = sum(len(rows) for _, rows in repeats) // 2 + (0 if text is None else len(text) // 2)
    with track("ablating induction heads", total=n_scored * (1 + len(controls))) as advance:
        effects = ablate(hooked, chosen, controls, repeats, text, advance)
    for name, effect in effects.items():
        variables |= _effect(f"{name}_change", _LOSSES[name], effect, n_controls, seed=seed)
    return variables, len(controls)


def _effect(name: str, loss: str, effect: Effects, n_controls: int, *, seed: int) -> Variables:
    long_name = f"change of the {loss} without the induction heads"
    variables = scored(
        name,
        (),
        effect.top,
        np.ones(len(effect.top)),
        long_name=long_name,
        units="nats",
        seed=seed,
        strata=effect.lengths,
        change=True,
    )
    by_set = effect.controls.mean(1)
    null = (by_set.mean(), *np.quantile(by_set, (0.025, 0.975)))
    long_name = f"change of the {loss} without random heads of the same layers"
    variables |= with_bounds(f"{name}_null", (), null, long_name=long_name, units="nats")
    p = (1 + (by_set >= effect.top.mean()).sum()) / (1 + len(by_set))
    variables[f"{name}_p"] = (
        (),
        np.asarray(p),
        {"long_name": f"share of head sets that raise the {loss} as much", "units": "probability"},
    )
    padded = np.pad(by_set, (0, n_controls - len(by_set)), constant_values=np.nan)
    variables[f"{name}_control"] = (("control",), padded, {"long_name": f"{long_name}, by set", "units": "nats"})
    return variables

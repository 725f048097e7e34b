"""Function vectors: a direction, read off a few heads, that makes the model carry out a task it was not shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from pydantic import Field

from mechhier.arguments import one_of, seed_number, shown, whole_number
from mechhier.models.hooked import MAX_BYTES, Hooked
from mechhier.models.loading import model_info
from mechhier.models.torch_state import in_default_torch_state
from mechhier.phenomena.function_vectors.indirect import attributed_effects, by_query, indirect_effects, mean_heads
from mechhier.phenomena.function_vectors.injection import (
    ADDED,
    DOSES,
    PROMPTS,
    VECTORS,
    function_vectors_of,
    has_task_vector,
    injections,
)
from mechhier.phenomena.tasks import (
    Prompts,
    Task,
    concatenate,
    grammar_tasks,
    has_function,
    other_tasks,
    word_tasks,
)
from mechhier.probes.provenance import provenance
from mechhier.progress import track
from mechhier.results import (
    INTERVAL,
    MIN_SAMPLES,
    UNBOUNDED,
    Variables,
    correlation_interval,
    ratio,
    scored,
    undefined,
    warn_undefined,
    with_bounds,
)
from mechhier.specs import Drawn, Size

DEFINITION = (
    "abar_h^t = mean over clean prompts of z_h at the last token; CIE = P(y | shuffled, z_h := abar_h^t) - "
    "P(y | shuffled); AIE = mean over prompts and tasks. FV_t = sum over the top heads by AIE of the mean over clean "
    "prompts of what the head writes at the last token, abar_h^t W_O[h]; in a post-norm model (OLMo-2) a head's write is "
    "its share gamma z_h W_O[h] / sigma of attn_out, with the post-norm's sigma of each clean prompt. "
    "Injection adds FV_t to resid_post of a layer at the last token; a task vector (Hendel et al.) is put in its place: "
    "resid_post at the last token of the demonstrations and a dummy query. recovery = (patched - corrupt) / (clean - corrupt) "
    "of logit(f_t(x)) - logit(f_t'(x)), or, where f_t' does not know x, of another answer of t. Heads are chosen on the "
    "first two thirds of the tasks, injection is judged on the held-out rest; choice, estimation and test use disjoint "
    "queries."
)
SOURCE = "Todd et al. 2024, Function Vectors in Large Language Models; Hendel et al. 2023 (task vectors)"

MAX_TOP_HEADS = 10
"""Heads in a function vector at most (Todd et al. use 10 in models of hundreds); in small models a quarter of all."""

__all__ = ["DOSES", "PROMPTS", "VECTORS", "function_vectors"]


@in_default_torch_state
def function_vectors(
    model: Any,
    tasks: Sequence[Task] | None = None,
    *,
    effects: Literal["exact", "attribution"] = "exact",
    n_tasks: Annotated[Drawn, Field(ge=2)] = 8,
    n_prompts: Drawn = 32,
    max_bytes: Size = MAX_BYTES,
    seed: int = 0,
) -> xr.Dataset:
    """Which heads carry a task, and whether their summed output makes the model do it without being shown.

    Cost, in forward passes: 2 over the estimation prompts; over the selection prompts of two thirds of the tasks 3 for
    `AIE_attribution`, and for the exact effects 1 and H (L + 1) of *one position* (a patch at the last token leaves the
    earlier ones as they are, so their keys and values are computed once); over the test prompts of the rest 5, and 13 (L - 1)
    of one position. Memory: the mean writes, tasks x L x H x d_model; means and task vectors, prompts x L x d_model
    each; the activations of one batch.

    The function vector is added to the residual stream, so it is made of what heads add to the stream. A post-norm
    (OLMo-2) rescales their sum before it gets there; every head is given its share with the scale that the norm had on
    each clean prompt (`mechhier.probes.Hooked.head_writes`), so that the vector is as large as what the heads wrote.
    Patching needs no such choice: it replaces z before the norm.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        tasks: Tasks with prompts on disjoint queries. By default, where the model carries its grammar, `grammar_tasks`:
            subject -> verb of the lexicons of its pool (a language without a pool has no such function; fresh lexicons are
            asked instead, and every score should be chance: attribute `has_function`). Else all built-in `word_tasks`,
            for which the model needs a tokenizer.
        effects: "exact" patches every head; "attribution" leaves that out and chooses the heads by `AIE_attribution`.
        n_tasks: Number of grammar tasks to make when none are given; at least 2.
        n_prompts: Prompts per task and split when none are given.
        max_bytes: Working memory of one batch beyond the weights.
        seed: Seed of everything drawn.

    Returns:
        `AIE` `[layer, head]` (probability) with `_low`, `_high` and `AIE_null` (the same patch with the mean over
        shuffled prompts); `AIE_attribution`, the same to first order, and `attribution_correlation`, its correlation with
        `AIE` over heads; `selected` `[layer, head]`. By `prompt` ("zero_shot", "shuffled"), `vector` and `layer` behind
        which it acts, each with its interval: `accuracy` of f_t(x), `accuracy_other` of f_t'(x), `recovery` (NaN unless the
        clean prompts' logit difference is above the corrupt ones' beyond its interval). Vectors are "function_vector",
        its controls "other_task", "random_heads", "random_norm", "grand_mean", all added; and "task_vector" with its control
        "other_task_vector", put in place of the stream: NaN unless all prompts end in the same token of a template, because
        where the last token is the query itself (grammar tasks) the query would be replaced with it. By `dose`, multiples
        of the function vector: `dose_accuracy`, `dose_recovery`. Scalars `accuracy_clean`, `accuracy_shuffled`,
        `accuracy_zero_shot` (no injection), `accuracy_bayes` (the exact predictor on clean prompts; NaN where there is
        none or the tasks were given), `chance`.

    Raises:
        TypeError: Not a hooked model, or not tasks.
        ValueError: No tasks, no grammar and no tokenizer; fewer than two tasks; prompts longer than the context.
    """
    hooked = Hooked(model, max_bytes=max_bytes)
    one_of("effects", effects, get_args(_Effects))
    n_tasks = whole_number("n_tasks", n_tasks, at_least=2)
    n_prompts, seed = whole_number("n_prompts", n_prompts, at_least=1), seed_number(seed)
    if tasks is not None:
        tasks = _checked(tasks)
    info = model_info(model)
    grammar = None if info is None else info.grammar
    has, text = True, "given by the caller"
    of_grammar = tasks is None and grammar is not None
    if tasks is None and grammar is not None:
        tasks = grammar_tasks(grammar, n_tasks=n_tasks, n_prompts=n_prompts, seed=seed)
        has, text = has_function(grammar), "subject -> verb of the model's grammar"
    elif tasks is None and getattr(model, "tokenizer", None) is not None:
        tasks, text = word_tasks(model, n_prompts=n_prompts, seed=seed), "built-in word tasks"
    elif tasks is None:
        raise ValueError(
            "function vectors need tasks: this model carries neither a grammar nor a tokenizer to make them from; pass "
            "tasks=[Task(...), ...] with token ids (mechhier.phenomena.Task)"
        )
    if len(tasks) < 2:
        raise ValueError(f"function vectors need at least two tasks (one is the other's control), got {len(tasks)}")
    for prompts in (prompts for task in tasks for prompts in _splits(task)):
        for _, tokens in prompts.same_length("clean"):
            hooked.check_tokens(tokens)

    n_chosen_on = max(1, (2 * len(tasks)) // 3)
    held_out = list(range(n_chosen_on, len(tasks)))
    selection = concatenate([task.selection for task in tasks[:n_chosen_on]])
    task_of_row = np.repeat(np.arange(n_chosen_on), [len(task.selection.answers) for task in tasks[:n_chosen_on]])
    clean = [mean_heads(hooked, task.estimation, "clean") for task in tasks]
    of_clean = torch.stack([z for z, _ in clean])[task_of_row]
    variables: Variables = {}
    to_first_order = attributed_effects(hooked, selection, of_clean)
    if effects == "exact":
        shuffled = [mean_heads(hooked, task.estimation, "shuffled") for task in tasks[:n_chosen_on]]
        of_shuffled = torch.stack([z for z, _ in shuffled])[task_of_row]
        total = hooked.n_layers * len(selection.answers)
        with track("function vectors: patching heads", total=total) as advance:
            exact, null = indirect_effects(hooked, selection, [of_clean, of_shuffled], advance)
        variables |= _effects(exact, null, to_first_order, selection, seed=seed)
    variables |= scored(
        "AIE_attribution",
        ("layer", "head"),
        *by_query(to_first_order, selection),
        long_name="average indirect effect to first order (attribution patching)",
        units="probability",
        seed=seed,
        bounds=UNBOUNDED,
    )
    n_top = min(MAX_TOP_HEADS, max(1, hooked.n_layers * hooked.n_heads // 4))
    selected = _top(np.asarray(variables["AIE" if effects == "exact" else "AIE_attribution"][1]), n_top)
    label = {"long_name": "head is part of the function vector", "units": "boolean"}
    variables["selected"] = (("layer", "head"), selected, label)

    writes = torch.stack([write for _, write in clean])
    vectors = function_vectors_of(hooked, writes, selected, other_tasks(tasks), seed=seed)
    variables |= injections(hooked, tasks, held_out, vectors, seed=seed)
    test = concatenate([tasks[index].test for index in held_out])
    bayes = _bayes_accuracy(grammar, test) if of_grammar and has else float("nan")
    scalars = {
        "accuracy_bayes": (bayes, "accuracy of the exact predictor, clean prompts"),
        "chance": (1.0 / _n_answers(tasks), "accuracy of a uniform guess among the answers that the tasks have"),
    }
    for name, (value, long_name) in scalars.items():
        variables[name] = ((), np.asarray(value), {"long_name": long_name, "units": "accuracy"})
    _warn_undefined(variables, selection, test)
    return xr.Dataset(
        variables,
        coords={
            "layer": np.arange(hooked.n_layers),
            "head": np.arange(hooked.n_heads),
            "prompt": list(PROMPTS),
            "vector": list(VECTORS),
            "dose": list(DOSES),
        },
        attrs=provenance(
            hooked,
            phenomenon="function_vectors",
            definition=DEFINITION,
            source=SOURCE,
            ablation="mean activation over clean prompts, patched in at the last token",
            effects=effects,
            seed=seed,
            text=text,
            tasks=", ".join(task.name for task in tasks),
            n_excluded=sum(len(task.excluded) for task in tasks),
            n_sequences=len(selection.answers),
            n_test_prompts=len(test.answers),
            n_tasks=len(tasks),
            n_tasks_held_out=len(held_out),
            n_top_heads=n_top,
            has_function=has,
            n_task_vectors=int(has_task_vector(test).sum()),
            interval=f"{INTERVAL.format(samples='queries')}; attribution_correlation: on Fisher's scale",
        ),
    )


_Effects = Literal["exact", "attribution"]


def _effects(
    exact: Float[np.ndarray, "prompt layer head"],
    null: Float[np.ndarray, "prompt layer head"],
    to_first_order: Float[np.ndarray, "prompt layer head"],
    prompts: Prompts,
    *,
    seed: int,
) -> Variables:
    dims, label = ("layer", "head"), "average indirect effect on the answer's probability"
    sums, counts = by_query(exact, prompts)
    variables = scored("AIE", dims, sums, counts, long_name=label, units="probability", seed=seed, change=True)
    mean = ratio(*by_query(null, prompts), 0)
    label = "average indirect effect, mean over shuffled prompts"
    variables["AIE_null"] = (dims, mean, {"long_name": label, "units": "probability"})

    # Means and sums correlate alike: every head has the same number of prompts.
    flat = [by_query(each, prompts)[0].reshape(len(sums), -1) for each in (exact, to_first_order)]
    label = "correlation over heads of the indirect effect with its first order"
    interval = correlation_interval(*flat, seed=seed)
    return variables | with_bounds("attribution_correlation", (), interval, long_name=label, units="1")


def _warn_undefined(variables: Variables, selection: Prompts, test: Prompts) -> None:
    """Say once what is NaN, and why; but for task vectors where prompts have none, which an attribute says."""
    added = {
        name: (dims, values[:, : len(ADDED)] if "vector" in dims else values, attributes)
        for name, (dims, values, attributes) in variables.items()
    }
    values, bounds = undefined(added)
    recoveries = [name for name in values if "recovery" in name]
    reasons = []
    if recoveries:
        kinds = [kind for kind, each in zip(PROMPTS, added["recovery"][1], strict=True) if np.isnan(each).any()]
        reasons.append(
            f"the logit difference of clean prompts is not above that of {' and '.join(kinds)} prompts by more than its "
            f"interval over {_n_queries(test)} queries, so that there is nothing to recover: {', '.join(recoveries)} is NaN"
        )
    if "accuracy_other" in values:
        reasons.append("no other task knows a query that is asked: accuracy_other is NaN")
    if "attribution_correlation" in values:
        reasons.append("the effects of all heads are the same: attribution_correlation is NaN")
    if bounds:
        reasons.append(
            f"an interval needs {MIN_SAMPLES} queries; {_n_queries(selection)} choose heads and {_n_queries(test)} test them: "
            f"the bounds of {', '.join(bounds)} are NaN"
        )
    if reasons:
        warn_undefined(f"function_vectors: {'; '.join(reasons)}")


def _n_queries(prompts: Prompts) -> int:
    return len(np.unique(prompts.queries))


def _checked(tasks: Any) -> list[Task]:
    remedy = "make them with mechhier.phenomena.word_tasks(model), grammar_tasks(grammar), or Task(...) from token ids"
    if isinstance(tasks, str) or not isinstance(tasks, Iterable):
        raise TypeError(f"tasks must be a sequence of Task, got {shown(tasks)}: {remedy}")
    found = list(tasks)
    for task in found:
        if not isinstance(task, Task):
            raise TypeError(f"tasks must be a sequence of Task, got {shown(task)} among them: {remedy}")
    return found


def _splits(task: Task) -> tuple[Prompts, Prompts, Prompts]:
    return task.selection, task.estimation, task.test


def _n_answers(tasks: Sequence[Task]) -> int:
    return len({int(answer) for task in tasks for prompts in _splits(task) for answer in prompts.answers})


def _top(effects: Float[np.ndarray, "layer head"], n: int) -> np.ndarray:
    selected = np.zeros(effects.size, dtype=bool)
    selected[np.argsort(-effects.reshape(-1), kind="stable")[:n]] = True
    return selected.reshape(effects.shape)


def _bayes_accuracy(grammar: Any, prompts: Prompts) -> float:
    # The query is followed by a token to predict; any will do, its prediction depends on the tokens before it only.
    text = np.concatenate([prompts.clean, prompts.answers[:, None]], axis=1)
    predicted = np.concatenate(
        [grammar.next_token_probabilities(rows)[:, -1].argmax(-1) for rows in np.array_split(text, len(text) // 32 + 1)]
    )
    return float((predicted == prompts.answers).mean())

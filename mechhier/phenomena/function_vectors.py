"""Function vectors: a direction, read off a few heads, that makes the model carry out a task it was not shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.grammars import DocumentGrammar
from mechhier.models.loading import model_info
from mechhier.phenomena._provenance import provenance
from mechhier.phenomena.tasks import Prompts, Task, concatenate, grammar_tasks, has_function
from mechhier.probes.hooked import Hook, Hooked
from mechhier.progress import track
from mechhier.results import Variables, mean_interval, scored

DEFINITION = (
    "abar_h^t = mean over clean prompts of z_h at the last token; CIE = P(y | shuffled, z_h := abar_h^t) - "
    "P(y | shuffled); AIE = mean over prompts and tasks. FV_t = sum over the top heads by AIE of the mean over clean "
    "prompts of what the head writes at the last token, abar_h^t W_O[h]; in a post-norm model (OLMo-2) a head's write is "
    "its share gamma z_h W_O[h] / sigma of attn_out, with the post-norm's sigma of each clean prompt. "
    "Injection adds FV_t to resid_post of a layer at the last token. recovery = (patched - corrupt) / (clean - corrupt) "
    "of logit(f_t(x)) - logit(f_t'(x)). Heads are chosen on the first two thirds of the tasks, injection is judged on "
    "the held-out rest; choice, estimation and test use disjoint queries."
)
SOURCE = "Todd et al. 2024, Function Vectors in Large Language Models"

VECTORS = ("function_vector", "other_task", "random_heads", "random_norm", "grand_mean")
PROMPTS = ("zero_shot", "shuffled")
MAX_TOP_HEADS = 10
"""Heads in a function vector at most (Todd et al. use 10 in models of hundreds); in small models a quarter of all."""


def function_vectors(
    model: Any, tasks: Sequence[Task] | None = None, *, n_tasks: int = 8, n_prompts: int = 32, seed: int = 0
) -> xr.Dataset:
    """Which heads carry a task, and whether their summed output makes the model do it without being shown.

    Cost: 4 forward passes over the prompts of a split; 2 L H passes, from the head's layer on, over the selection
    prompts of two thirds of the tasks; 10 L passes, from the injected layer on, over the test prompts of the rest.
    Memory: the mean writes, tasks x L x H x d_model, and one batch's residual streams.

    The function vector is added to the residual stream, so it is made of what heads add to the stream. A post-norm
    (OLMo-2) rescales their sum before it gets there; every head is given its share with the scale that the norm had on
    each clean prompt (`mechhier.probes.Hooked.head_writes`), so that the vector is as large as what the heads wrote.
    Patching needs no such choice: it replaces z before the norm.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        tasks: Tasks with prompts on disjoint queries. By default `grammar_tasks` of the grammar that the model was
            trained on: subject -> verb of the lexicons of its pool. A language without a pool has no such function;
            fresh lexicons are asked instead, and every score should be chance (attribute `has_function`).
        n_tasks: Number of tasks to make when none are given; at least 2.
        n_prompts: Prompts per task and split when none are given.
        seed: Seed of everything drawn.

    Returns:
        `AIE` `[layer, head]` (probability) with `_low`, `_high` and `AIE_null` (the same patch with the mean over
        shuffled prompts); `selected` `[layer, head]`. By `prompt` ("zero_shot", "shuffled"), `vector` ("function_vector"
        and the controls "other_task", "random_heads", "random_norm", "grand_mean") and `layer` of injection:
        `accuracy` of f_t(x), `accuracy_other` of f_t'(x), `recovery` (NaN where clean and corrupt prompts do not differ),
        the first and last with intervals. Scalars `accuracy_clean`, `accuracy_shuffled`, `accuracy_zero_shot`
        (no injection), `accuracy_bayes` (the exact predictor on clean prompts; NaN where there is none), `chance`.

    Raises:
        TypeError: Not a hooked model.
        ValueError: No tasks and no grammar; fewer than two tasks; prompts longer than the context.
    """
    hooked = Hooked(model)
    info = model_info(model)
    grammar = None if info is None else info.grammar
    if tasks is None:
        if grammar is None:
            raise ValueError(
                "function vectors need tasks: this model carries no grammar to make them from; pass tasks=[Task(...), ...] "
                "with token ids (mechhier.phenomena.Task)"
            )
        tasks = grammar_tasks(grammar, n_tasks=n_tasks, n_prompts=n_prompts, seed=seed)
        has = has_function(grammar)
        n_verbs = min(grammar.sizes) if isinstance(grammar, DocumentGrammar) else grammar.vocab_size - 1
    else:
        has = True
        n_verbs = len({int(y) for task in tasks for split in _splits(task) for y in split.answers})
    if len(tasks) < 2:
        raise ValueError(f"function vectors need at least two tasks (one is the other's control), got {len(tasks)}")
    lengths = {prompts.clean.shape[1] for task in tasks for prompts in _splits(task)}
    if len(lengths) > 1:
        raise ValueError(f"prompts of all tasks must have one length, got lengths {sorted(lengths)}")
    for prompts in (prompts for task in tasks for prompts in _splits(task)):
        hooked.check_tokens(prompts.clean)

    n_chosen_on = max(1, (2 * len(tasks)) // 3)
    clean = [_mean_heads(hooked, task.estimation.clean) for task in tasks]
    shuffled = [_mean_heads(hooked, task.estimation.shuffled) for task in tasks]
    means = {"clean": torch.stack([z for z, _ in clean]), "shuffled": torch.stack([z for z, _ in shuffled])}
    writes = torch.stack([write for _, write in clean])
    with track("function vectors: patching heads", total=2 * hooked.n_layers * hooked.n_heads) as advance:
        selection = concatenate([task.selection for task in tasks[:n_chosen_on]])
        task_of_row = np.repeat(np.arange(n_chosen_on), [len(task.selection.clean) for task in tasks[:n_chosen_on]])
        cie, cie_null = (
            _indirect_effects(hooked, selection, means[kind][task_of_row], advance) for kind in ("clean", "shuffled")
        )
    dims = ("layer", "head")
    variables = scored(
        "AIE",
        dims,
        *_by_question(cie, selection),
        long_name="average indirect effect on the answer's probability",
        units="probability",
        seed=seed,
    )
    null, _, _ = mean_interval(*_by_question(cie_null, selection), seed=seed)
    variables["AIE_null"] = (
        dims,
        null,
        {"long_name": "average indirect effect, mean over shuffled prompts", "units": "probability"},
    )
    n_top = min(MAX_TOP_HEADS, max(1, hooked.n_layers * hooked.n_heads // 4))
    selected = _top(variables["AIE"][1], n_top)
    variables["selected"] = (dims, selected, {"long_name": "head is part of the function vector", "units": "boolean"})

    vectors = _vectors(hooked, writes, selected, seed=seed)
    held_out = list(range(n_chosen_on, len(tasks)))
    test = concatenate([tasks[index].test for index in held_out])
    rows = np.repeat(held_out, [len(tasks[index].test.clean) for index in held_out])
    variables |= _injections(hooked, test, {name: vector[rows] for name, vector in vectors.items()}, seed=seed)
    scalars = {
        "accuracy_bayes": (_bayes_accuracy(grammar, test), "accuracy of the exact predictor, clean prompts"),
        "chance": (1.0 / n_verbs, "accuracy of a uniform guess among the possible answers"),
    }
    for name, (value, long_name) in scalars.items():
        variables[name] = ((), np.asarray(value), {"long_name": long_name, "units": "accuracy"})
    return xr.Dataset(
        variables,
        coords={
            "layer": np.arange(hooked.n_layers),
            "head": np.arange(hooked.n_heads),
            "prompt": list(PROMPTS),
            "vector": list(VECTORS),
        },
        attrs=provenance(
            hooked,
            phenomenon="function_vectors",
            definition=DEFINITION,
            source=SOURCE,
            ablation="mean activation over clean prompts, patched in at the last token",
            seed=seed,
            n_sequences=len(selection.clean),
            n_test_prompts=len(test.clean),
            n_tasks=len(tasks),
            n_tasks_held_out=len(held_out),
            n_top_heads=n_top,
            has_function=has,
            interval="95 % percentile bootstrap over questions (task and query), 999 resamples",
        ),
    )


def _splits(task: Task) -> tuple[Prompts, Prompts, Prompts]:
    return task.selection, task.estimation, task.test


def _by_question(
    values: Float[np.ndarray, "prompt ..."], prompts: Prompts
) -> tuple[Float[np.ndarray, "question ..."], Float[np.ndarray, " question"]]:
    """Sums of values over the prompts that ask the same question of the same task, and their number.

    Such prompts differ in their demonstrations only and are not independent: the bootstrap draws questions.
    """
    questions = np.stack([prompts.clean[:, -1], prompts.answers], axis=1)
    _, index = np.unique(questions, axis=0, return_inverse=True)
    sums = np.zeros((index.max() + 1, *values.shape[1:]))
    np.add.at(sums, index.reshape(-1), values)
    counts = np.bincount(index.reshape(-1))
    return sums, counts.reshape(-1, *[1] * (values.ndim - 1))


def _batches(hooked: Hooked, n_rows: int, length: int) -> Iterator[slice]:
    size = hooked.batch_size(length)
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def _mean_heads(
    hooked: Hooked, prompts: Int[np.ndarray, "prompt pos"]
) -> tuple[Float[Tensor, "layer head d_head"], Float[Tensor, "layer head d_model"]]:
    """Means over prompts, at the last token, of every head's z and of its write to the residual stream, float32."""
    mean_z = torch.zeros(hooked.n_layers, hooked.n_heads, hooked.d_head, device=hooked.device)
    mean_write = torch.zeros(hooked.n_layers, hooked.n_heads, hooked.d_model, device=hooked.device)

    def add(z: Tensor, layer: int) -> None:
        mean_z[layer] += z[:, -1].float().sum(0) / len(prompts)
        writes, _ = hooked.head_writes(layer, z[:, -1:])
        mean_write[layer] += writes.sum((0, 1)) / len(prompts)

    hooks: list[Hook] = [("z", layer, partial(add, layer=layer)) for layer in range(hooked.n_layers)]
    tokens = hooked.check_tokens(prompts)
    for rows in _batches(hooked, len(tokens), tokens.shape[1]):
        hooked.run(tokens[rows], hooks)
    return mean_z, mean_write


def _indirect_effects(
    hooked: Hooked,
    prompts: Prompts,
    means: Float[Tensor, "prompt layer head d_head"],
    advance: Callable[..., None],
) -> Float[np.ndarray, "prompt layer head"]:
    """Change of P(answer) on shuffled prompts when one head's last z is replaced by its row of `means`."""
    effects = np.zeros((len(prompts.shuffled), hooked.n_layers, hooked.n_heads))
    tokens, answers = hooked.check_tokens(prompts.shuffled), torch.as_tensor(prompts.answers, device=hooked.device)
    for rows in _batches(hooked, len(tokens), tokens.shape[1]):
        streams: dict[int, Tensor] = {}

        def keep(resid: Tensor, layer: int, streams: dict[int, Tensor] = streams) -> None:
            streams[layer] = resid

        hooks: list[Hook] = [("resid_pre", layer, partial(keep, layer=layer)) for layer in range(hooked.n_layers)]
        before = _answer_probability(hooked.run(tokens[rows], hooks), answers[rows])
        for layer in range(hooked.n_layers):
            for head in range(hooked.n_heads):

                def patch(z: Tensor, layer: int = layer, head: int = head, rows: slice = rows) -> Tensor:
                    z = z.clone()
                    z[:, -1, head] = means[rows, layer, head].to(z.dtype)
                    return z

                logits = hooked.run(tokens[rows], [("z", layer, patch)], start=(layer, streams[layer]))
                effects[rows, layer, head] = (_answer_probability(logits, answers[rows]) - before).cpu().numpy()
                if rows.stop == len(tokens):
                    advance()
    return effects


def _answer_probability(logits: Tensor, answers: Int[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
    return logits[:, -1].float().softmax(-1).gather(-1, answers[:, None])[:, 0]


def _top(aie: Float[np.ndarray, "layer head"], n: int) -> np.ndarray:
    selected = np.zeros(aie.size, dtype=bool)
    selected[np.argsort(-aie.reshape(-1), kind="stable")[:n]] = True
    return selected.reshape(aie.shape)


def _vectors(
    hooked: Hooked, means: Float[Tensor, "task layer head d_model"], selected: np.ndarray, *, seed: int
) -> dict[str, Float[Tensor, "task d_model"]]:
    """The function vector of every task and its controls, float32."""
    writes = means.flatten(1, 2)
    chosen = torch.as_tensor(selected.reshape(-1), device=hooked.device)
    function_vector = writes[:, chosen].sum(1)
    generator = torch.Generator().manual_seed(seed)
    others = torch.nonzero(~chosen)[:, 0].cpu()
    n = min(int(chosen.sum()), len(others))
    random_heads = torch.stack(
        [task[others[torch.randperm(len(others), generator=generator)[:n]]].sum(0) for task in writes]
    )
    noise = torch.randn(function_vector.shape, generator=generator).to(hooked.device)
    return {
        "function_vector": function_vector,
        "other_task": function_vector.roll(-1, dims=0),
        "random_heads": random_heads,
        "random_norm": noise / noise.norm(dim=-1, keepdim=True) * function_vector.norm(dim=-1, keepdim=True),
        "grand_mean": function_vector.mean(0, keepdim=True).expand_as(function_vector),
    }


def _judge(
    logits: Float[Tensor, "prompt pos d_vocab"], prompts: Prompts, rows: slice
) -> Float[np.ndarray, "measure prompt"]:
    """Per prompt: f_t(x) is the top token, f_t'(x) is, and the difference of their logits."""
    last = logits[:, -1].float().cpu()
    answers, others = torch.as_tensor(prompts.answers[rows]), torch.as_tensor(prompts.other_answers[rows])
    top = last.argmax(-1)
    difference = (last.gather(-1, answers[:, None]) - last.gather(-1, others[:, None]))[:, 0]
    return torch.stack([(top == answers).double(), (top == others).double(), difference.double()]).numpy()


def _injections(
    hooked: Hooked, prompts: Prompts, vectors: dict[str, Float[Tensor, "prompt d_model"]], *, seed: int
) -> Variables:
    n_prompts = len(prompts.clean)
    judged = np.zeros((3, n_prompts, len(PROMPTS), len(VECTORS), hooked.n_layers))
    base = {}
    with track("function vectors: injecting", total=2 * len(VECTORS) * hooked.n_layers) as advance:
        for kind in ("clean", *PROMPTS):
            tokens = hooked.check_tokens(getattr(prompts, kind))
            base[kind] = np.zeros((3, n_prompts))
            for rows in _batches(hooked, n_prompts, tokens.shape[1]):
                streams: dict[int, Tensor] = {}

                def keep(resid: Tensor, layer: int, streams: dict[int, Tensor] = streams) -> None:
                    streams[layer] = resid

                hooks: list[Hook] = [
                    ("resid_pre", layer, partial(keep, layer=layer)) for layer in range(hooked.n_layers)
                ]
                base[kind][:, rows] = _judge(hooked.run(tokens[rows], hooks), prompts, rows)
                if kind == "clean":
                    continue
                for index, name in enumerate(VECTORS):
                    for layer in range(hooked.n_layers):

                        def add(resid: Tensor, added: Tensor = vectors[name][rows]) -> Tensor:
                            resid = resid.clone()
                            resid[:, -1] += added.to(resid.dtype)
                            return resid

                        logits = hooked.run(tokens[rows], [("resid_post", layer, add)], start=(layer, streams[layer]))
                        judged[:, rows, PROMPTS.index(kind), index, layer] = _judge(logits, prompts, rows)
                        if rows.stop == n_prompts:
                            advance()

    dims = ("prompt", "vector", "layer")
    units = "accuracy"
    variables = scored(
        "accuracy",
        dims,
        *_by_question(judged[0], prompts),
        long_name="accuracy of f_t(x) after injection",
        units=units,
        seed=seed,
    )
    other, _, _ = mean_interval(*_by_question(judged[1], prompts), seed=seed)
    variables["accuracy_other"] = (
        dims,
        other,
        {"long_name": "accuracy of f_t'(x), the other task's answer, after injection", "units": units},
    )
    for kind, values in base.items():
        variables |= scored(
            f"accuracy_{kind}",
            (),
            *_by_question(values[0], prompts),
            long_name=f"accuracy, {kind} prompts",
            units=units,
            seed=seed,
        )
    corrupt = np.stack([base[kind][2] for kind in PROMPTS], axis=1)
    gain = judged[2] - corrupt[:, :, None, None]
    possible = (base["clean"][2][:, None] - corrupt)[:, :, None, None]
    recovery = scored(
        "recovery",
        dims,
        _by_question(gain, prompts)[0],
        _by_question(possible, prompts)[0],
        long_name="recovered logit difference after injection",
        units="1",
        seed=seed,
    )
    _, low, _ = mean_interval(*_by_question(possible, prompts), seed=seed)
    for name, (_, values, attributes) in recovery.items():
        # A ratio to a difference that may be zero is not a number worth reading.
        variables[name] = (dims, np.where(low > 0, values, np.nan), attributes)
    return variables


def _bayes_accuracy(grammar: Any, prompts: Prompts) -> float:
    if grammar is None or not has_function(grammar):
        return float("nan")
    # The query is followed by a token to predict; any will do, its prediction depends on the tokens before it only.
    text = np.concatenate([prompts.clean, prompts.answers[:, None]], axis=1)
    predicted = np.concatenate(
        [grammar.next_token_probabilities(rows)[:, -1].argmax(-1) for rows in np.array_split(text, len(text) // 32 + 1)]
    )
    return float((predicted == prompts.answers).mean())

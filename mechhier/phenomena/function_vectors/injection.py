"""Whether a direction makes the model carry out a task: vectors and their controls, added or put at the last token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechhier.models.hooked import Hook, Hooked
from mechhier.phenomena.function_vectors.indirect import by_query
from mechhier.phenomena.tasks import Kind, Prompts, Task, concatenate, other_tasks
from mechhier.probes.last_position import LastPosition, last_positions
from mechhier.progress import track
from mechhier.results import Variables, mean_interval, proportion_interval, scored, with_bounds

ADDED = ("function_vector", "other_task", "random_heads", "random_norm", "grand_mean")
PUT = ("task_vector", "other_task_vector")
VECTORS = (*ADDED, *PUT)
PROMPTS: tuple[Kind, ...] = ("zero_shot", "shuffled")
DOSES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Multiples of the function vector."""


@dataclass(frozen=True)
class Judged:
    """What is read off the logits at the last token; every array is [prompt, ...]."""

    right: Float[np.ndarray, "prompt ..."]
    """Whether f_t(x) is the top token."""
    other: Float[np.ndarray, "prompt ..."]
    """Whether f_t'(x) is; NaN where there is no such answer."""
    difference: Float[np.ndarray, "prompt ..."]
    """Logit of f_t(x) minus that of f_t'(x), or, where that is unknown, of a wrong answer of the same task."""

    @classmethod
    def empty(cls, *shape: int) -> Judged:
        """Nothing judged yet."""
        return cls(*(np.full(shape, np.nan) for _ in range(3)))

    def put(self, where: tuple, logits: Float[Tensor, "row d_vocab"], prompts: Prompts, rows: np.ndarray) -> None:
        """Judge logits of the given rows."""
        logits = logits.float().cpu()
        answers, other = (torch.as_tensor(values[rows]) for values in (prompts.answers, prompts.other_answers))
        wrong = torch.as_tensor(prompts.wrong_answers[rows])
        top, known = logits.argmax(-1), other >= 0
        against = torch.where(known, other, wrong)
        difference = logits.gather(-1, answers[:, None]) - logits.gather(-1, against.clamp(min=0)[:, None])
        self.right[where] = (top == answers).numpy()
        self.other[where] = torch.where(known, (top == other).double(), torch.nan).numpy()
        self.difference[where] = torch.where(against >= 0, difference[:, 0].double(), torch.nan).numpy()


def function_vectors_of(
    hooked: Hooked,
    means: Float[Tensor, "task layer head d_model"],
    selected: np.ndarray,
    others: np.ndarray,
    *,
    seed: int,
) -> dict[str, Float[Tensor, "task d_model"]]:
    """The function vector of every task and the controls that are added like it, float32."""
    writes = means.flatten(1, 2)
    chosen = torch.as_tensor(selected.reshape(-1), device=hooked.device)
    function_vector = writes[:, chosen].sum(1)
    generator = torch.Generator().manual_seed(seed)
    rest = torch.nonzero(~chosen)[:, 0].cpu()
    n = min(int(chosen.sum()), len(rest))
    random_heads = torch.stack(
        [task[rest[torch.randperm(len(rest), generator=generator)[:n]]].sum(0) for task in writes]
    )
    noise = torch.randn(function_vector.shape, generator=generator).to(hooked.device)
    return {
        "function_vector": function_vector,
        "other_task": function_vector[torch.as_tensor(others, device=hooked.device)],
        "random_heads": random_heads,
        "random_norm": noise / noise.norm(dim=-1, keepdim=True) * function_vector.norm(dim=-1, keepdim=True),
        "grand_mean": function_vector.mean(0, keepdim=True).expand_as(function_vector),
    }


def injections(
    hooked: Hooked, tasks: Sequence[Task], held_out: Sequence[int], vectors: dict[str, Tensor], *, seed: int
) -> Variables:
    """Accuracy and recovered logit difference of the held-out tasks' test prompts after each injection at each layer.

    Cost: three forward passes over the test prompts, one over the dummy prompts of each task asked and its other task;
    2 x 13 passes of one position for each layer, from the layer behind it on.
    """
    prompts = concatenate([tasks[index].test for index in held_out])
    task_of_row = np.repeat(held_out, [len(tasks[index].test.answers) for index in held_out])
    by_row = {name: vector[task_of_row] for name, vector in vectors.items()}
    have_task_vector = has_task_vector(prompts)
    put, have_other = (
        _task_vectors(hooked, tasks, held_out) if have_task_vector.any() else ([], np.zeros_like(have_task_vector))
    )
    n = len(prompts.answers)
    base = {kind: Judged.empty(n) for kind in ("clean", *PROMPTS)}
    for rows, last in _last_positions(hooked, prompts, "clean"):
        base["clean"].put((rows,), last.logits, prompts, rows)
    judged = Judged.empty(n, len(PROMPTS), len(VECTORS), hooked.n_layers)
    dosed = Judged.empty(n, len(PROMPTS), len(DOSES), hooked.n_layers)
    with track("function vectors: injecting", total=n * len(PROMPTS) * hooked.n_layers) as advance:
        for k, kind in enumerate(PROMPTS):
            for rows, last in _last_positions(hooked, prompts, kind):
                base[kind].put((rows,), last.logits, prompts, rows)
                for layer in range(hooked.n_layers):
                    stream = last.streams[layer].float()
                    injected = [stream + by_row[name][rows] for name in ADDED]
                    injected += [vector[rows, layer] for vector in put]
                    doses = [stream + dose * by_row["function_vector"][rows] for dose in DOSES]
                    for into, variants in ((judged, injected), (dosed, doses)):
                        for v, logits in enumerate(_run(last, layer + 1, variants)):
                            into.put((rows, k, v, layer), logits, prompts, rows)
                    advance(len(rows))
    for values in (judged.right, judged.other, judged.difference):
        values[~have_task_vector, :, len(ADDED) :] = np.nan
        values[~have_other, :, VECTORS.index("other_task_vector")] = np.nan
    return _described(prompts, base, judged, dosed, seed=seed)


def has_task_vector(prompts: Prompts) -> np.ndarray:
    """Which prompts have a task vector: those with a dummy query, if all prompts end in one token of a template.

    Where the last token is the query itself (grammar tasks), what is put in place of the stream replaces the query too.
    """
    ends_alike = len(np.unique(np.concatenate([prompts.clean[:, -1], prompts.zero_shot[:, -1]]))) == 1
    return (prompts.lengths("dummy") > 0) & ends_alike


def _last_positions(hooked: Hooked, prompts: Prompts, kind: Kind) -> Iterator[tuple[np.ndarray, LastPosition]]:
    for rows, tokens in prompts.same_length(kind):
        for part, last in last_positions(hooked, hooked.check_tokens(tokens), torch.as_tensor(rows)):
            yield rows[part], last


def _run(last: LastPosition, layer: int, variants: list[Tensor]) -> Iterator[Float[Tensor, "sequence d_vocab"]]:
    """Logits of each variant of the stream that enters a layer; variants are rows of one batch."""
    n = len(variants[0])
    resid = torch.cat(variants).to(last.streams.dtype)
    index = torch.arange(n, device=resid.device).repeat(len(variants))
    logits = torch.cat([last.run(index[batch], start=(layer, resid[batch])) for batch in last.batches(index)])
    return iter(logits.split(n))


def _task_vectors(
    hooked: Hooked, tasks: Sequence[Task], held_out: Sequence[int]
) -> tuple[list[Float[Tensor, "prompt layer d_model"]], Bool[np.ndarray, " prompt"]]:
    """For each test prompt, the stream behind every layer at the last token of the demonstrations and a dummy query.

    Of its own task, zeros where it has no dummy query, and of a prompt of the other task that has one (Hendel et al.
    2023); and whether the other task has any.
    """
    others = other_tasks(tasks)
    streams: dict[int, Tensor] = {}
    for index in sorted({*held_out, *others[list(held_out)].tolist()}):
        prompts = tasks[index].test
        found = torch.zeros(len(prompts.answers), hooked.n_layers, hooked.d_model, device=hooked.device)
        for rows, tokens in prompts.same_length("dummy"):
            batch_size = hooked.batch_size(tokens.shape[1])
            for start in range(0, len(rows), batch_size):
                part = torch.as_tensor(rows[start : start + batch_size], device=hooked.device)

                def keep(resid: Tensor, layer: int, into: Tensor = found, part: Tensor = part) -> None:
                    into[part, layer] = resid[:, -1].float()

                hooks: list[Hook] = [
                    ("resid_post", layer, lambda resid, layer=layer, keep=keep: keep(resid, layer))
                    for layer in range(hooked.n_layers)
                ]
                batch = hooked.check_tokens(tokens[start : start + batch_size])
                hooked.run(batch, hooks, stop=hooked.n_layers - 1, rows=part)
        streams[index] = found
    of_other, known = [], []
    for index in held_out:
        donor = int(others[index])
        rows, donors = np.arange(len(streams[index])), np.flatnonzero(tasks[donor].test.lengths("dummy"))
        known.append(np.full(len(rows), len(donors) > 0))
        of_other.append(streams[donor][donors[rows % len(donors)]] if len(donors) else torch.zeros_like(streams[index]))
    return [torch.cat([streams[index] for index in held_out]), torch.cat(of_other)], np.concatenate(known)


def _described(prompts: Prompts, base: dict[str, Judged], judged: Judged, dosed: Judged, *, seed: int) -> Variables:
    dims = ("prompt", "vector", "layer")
    variables = _accuracy("accuracy", dims, judged.right, prompts, "accuracy of f_t(x) after injection")
    label = "accuracy of f_t'(x), the other task's answer, after injection"
    variables |= _accuracy("accuracy_other", dims, judged.other, prompts, label)
    for kind, values in base.items():
        variables |= _accuracy(f"accuracy_{kind}", (), values.right, prompts, f"accuracy, {kind} prompts")
    label = "recovered logit difference after injection"
    variables |= _recovery("recovery", dims, base, judged.difference, prompts, label, seed=seed)
    dims, by_dose = ("prompt", "dose", "layer"), "by multiple of the function vector"
    label = f"accuracy of f_t(x) after injection, {by_dose}"
    variables |= _accuracy("dose_accuracy", dims, dosed.right, prompts, label)
    label = f"recovered logit difference, {by_dose}"
    return variables | _recovery("dose_recovery", dims, base, dosed.difference, prompts, label, seed=seed)


def _accuracy(
    name: str, dims: Sequence[str], right: Float[np.ndarray, "prompt ..."], prompts: Prompts, long_name: str
) -> Variables:
    return with_bounds(
        name, dims, proportion_interval(*by_query(right, prompts)), long_name=long_name, units="accuracy"
    )


def _recovery(
    name: str,
    dims: Sequence[str],
    base: dict[str, Judged],
    difference: Float[np.ndarray, "prompt ..."],
    prompts: Prompts,
    long_name: str,
    *,
    seed: int,
) -> Variables:
    """(patched - corrupt) / (clean - corrupt), NaN where clean and corrupt do not differ beyond their interval."""
    corrupt = np.stack([base[kind].difference for kind in PROMPTS], axis=1)[:, :, None, None]
    gain = difference - corrupt
    possible = np.where(np.isfinite(gain), base["clean"].difference[:, None, None, None] - corrupt, np.nan)
    gains, (possibles, counts) = by_query(gain, prompts)[0], by_query(possible, prompts)
    ratio = scored(name, dims, gains, possibles, long_name=long_name, units="1", seed=seed)
    # A ratio to a difference that may be zero is not a number worth reading.
    _, low, _ = mean_interval(possibles, counts, seed=seed)
    return {each: (dims, np.where(low > 0, values, np.nan), about) for each, (dims, values, about) in ratio.items()}

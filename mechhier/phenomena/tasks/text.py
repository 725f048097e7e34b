"""Tasks from word lists, as prompts in English text for models with a tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mechhier.grammars.base import stable_generator
from mechhier.models.hooked import Hooked
from mechhier.phenomena._tokens import bos_token
from mechhier.phenomena.tasks.pairs import Pairs, built_in_tasks, read_pairs
from mechhier.phenomena.tasks.prompts import KINDS, UNKNOWN, Prompts, Task
from mechhier.progress import announce
from mechhier.specs import MOST_DRAWN, SpecError, shown, whole

DEMONSTRATION = "Q: {x}\nA: {y}\n\n"
QUERY = "Q: {x}\nA:"
"""Template of Todd et al. (2024, arXiv 2310.15213); the answer is a blank and the output."""
N_SPLITS = 3
MIN_QUERIES = 2 * N_SPLITS
"""Two queries a split; with one there is no interval."""
_MAX_DRAWS = 100
"""Redraws of a prompt whose text a tokenizer merges across words; with the tokenizers of the field none is needed."""

Encode: TypeAlias = Callable[[str], list[int]]


@dataclass(frozen=True)
class _Function:
    """A list of pairs, and what of it can be asked.

    Attributes:
        answers: The one token that is the output, by input, for the inputs that can be asked.
        excluded: The other pairs and why.
    """

    pairs: Pairs
    answers: dict[str, int]
    excluded: tuple[str, ...]


def word_tasks(
    model: Any,
    tasks: Sequence[str | Path] | None = None,
    *,
    n_demonstrations: int = 10,
    n_prompts: int = 32,
    seed: int = 0,
) -> list[Task]:
    r"""Tasks "the output of this word" for a model with a tokenizer, in the template of Todd et al. (2024).

    A prompt is `Q: x\nA: y\n\n` for `n_demonstrations` pairs of the list, then `Q: x\nA:` for a query that is not among
    them, behind the beginning-of-sequence token if the model was trained with one. Shuffled prompts permute the outputs
    so that none stays where it, or an equal one, was; therefore no output is shown in more than half of the
    demonstrations. The splits' queries are disjoint. What is drawn for a task depends on its list, its name and the
    seed, not on the other tasks; only t' does.

    The answer is what the tokenizer adds to the prompt's tokens for a blank and the output. Pairs with an answer of
    several tokens, or of one that the prompt's tokens change with, are shown as demonstrations but never asked; they
    are listed in `Task.excluded`, and counted in a line on standard error. An input that stands twice in a file keeps
    its first output.

    Task t' of `other_answers` (`Task.other`) is the one in the list that answers most queries of this task otherwise; of
    several, the next one, cyclically. `other_answers` is -1 for queries that t' cannot be asked or answers alike. The
    wrong answer is another query's, one that no demonstration shows if any is left.

    Args:
        model: A hooked model with a tokenizer.
        tasks: Names of built-in lists (`built_in_tasks`) and paths of JSON files `[{"input": "...", "output": "..."}, ...]`,
            the public format of Todd et al.; None: all built-in ones that can be asked with this tokenizer, with a
            line on standard error for each that cannot.
        n_demonstrations: Pairs shown in a prompt.
        n_prompts: Prompts per task and split. More prompts than queries ask these again with other demonstrations.
        seed: Seed of all that is drawn.

    Cost: no forward pass; about five calls of the tokenizer a prompt.

    Raises:
        TypeError: Not a hooked model.
        FileNotFoundError: No such file.
        ValueError: No tokenizer; an unknown name or a malformed file, by its row; two tasks of one name; too few pairs
            with one-token answers for three disjoint splits, or too few (different) outputs for the demonstrations; a
            prompt longer than the model's context. Of the built-in lists, with `tasks=None`, only if fewer than two can
            be asked.
    """
    hooked = Hooked(model)
    n_demonstrations = whole("n_demonstrations", n_demonstrations, least=2, why="outputs are shuffled")
    n_prompts = whole("n_prompts", n_prompts, least=1, most=MOST_DRAWN)
    if isinstance(tasks, str):
        raise SpecError(f"tasks is a list of names and paths, as in tasks=[{shown(tasks)}]")
    encode = _encoder(hooked)
    lists = [read_pairs(task) for task in (built_in_tasks() if tasks is None else tasks)]
    if repeated := [name for name, count in Counter(each.name for each in lists).items() if count > 1]:
        raise ValueError(f"tasks need different names, but {repeated[0]!r} is given more than once")
    functions = _askable([_function(hooked, encode, pairs) for pairs in lists], all_needed=tasks is not None)
    made = []
    for index, function in enumerate(functions):
        other = _other(function, functions[index + 1 :] + functions[:index])
        draw = _Draw(function, {} if other is None else other.answers, n_demonstrations, encode, seed)
        selection, estimation, test = draw.splits(n_prompts)
        for prompts in (selection, estimation, test):
            _check_length(hooked, function.pairs.name, prompts)
        other_name = None if other is None else other.pairs.name
        made.append(Task(function.pairs.name, selection, estimation, test, other_name, function.excluded))
    _announce_excluded(functions)
    return made


def _encoder(hooked: Hooked) -> Encode:
    tokenizer = getattr(hooked.model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            "word tasks are text, and this model has no tokenizer; pass tasks with token ids instead "
            "(mechhier.phenomena.Task), or for a model of a grammar mechhier.phenomena.grammar_tasks(grammar)"
        )
    bos = bos_token(hooked)
    prefix = [] if bos is None else [bos]
    return lambda text: prefix + tokenizer(text, add_special_tokens=False)["input_ids"]


def _added(encode: Encode, prompt: str, output: str) -> list[int] | None:
    """The tokens of a blank and the output behind a prompt; None if the prompt's own tokens change with them."""
    before, whole = encode(prompt), encode(f"{prompt} {output}")
    return whole[len(before) :] if whole[: len(before)] == before else None


def _function(hooked: Hooked, encode: Encode, pairs: Pairs) -> _Function:
    unknown = getattr(hooked.model.tokenizer, "unk_token_id", None)
    answers: dict[str, int] = {}
    excluded = list(pairs.repeated)
    for x, y in pairs.outputs.items():
        tokens = _added(encode, QUERY.format(x=x), y)
        if tokens is None:
            excluded.append(f"{x} -> {y}: the prompt's tokens change with it")
        elif len(tokens) != 1:
            excluded.append(f"{x} -> {y}: {len(tokens)} tokens")
        elif tokens[0] == unknown or tokens[0] >= hooked.d_vocab:
            excluded.append(f"{x} -> {y}: not in the vocabulary")
        else:
            answers[x] = tokens[0]
    return _Function(pairs, answers, tuple(excluded))


def _askable(functions: list[_Function], *, all_needed: bool) -> list[_Function]:
    """Those that can be asked with this tokenizer; all of them if they are needed, two otherwise."""
    shortages = [_shortage(function) for function in functions]
    askable = [function for function, shortage in zip(functions, shortages, strict=True) if shortage is None]
    for shortage in filter(None, shortages):
        if all_needed or len(askable) < 2:
            raise ValueError(shortage)
        announce(f"left out: {shortage}")
    return askable


def _shortage(function: _Function) -> str | None:
    """Why the task cannot be asked with this tokenizer, or None."""
    name, answers, excluded = function.pairs.name, function.answers, function.excluded
    if len(answers) < MIN_QUERIES:
        return (
            f"task {name!r}: {len(answers)} of its {len(function.pairs.outputs)} pairs have an answer of one token, and "
            f"three disjoint splits need at least {MIN_QUERIES}; excluded are for example: {'; '.join(excluded[:5]) or 'none'}"
        )
    if len(set(answers.values())) == 1:
        return f"task {name!r} has the same answer to every query: there is no wrong one"
    return None


def _other(function: _Function, following: Sequence[_Function]) -> _Function | None:
    """The first of those that answer most queries of the function otherwise; None if there are no others."""

    def contradictions(other: _Function) -> int:
        return sum(other.answers.get(x, answer) != answer for x, answer in function.answers.items())

    return max(following, key=contradictions, default=None)


class _Draw:
    """Draws the prompts of one task."""

    def __init__(
        self, function: _Function, other_answers: dict[str, int], n_demonstrations: int, encode: Encode, seed: int
    ):
        self.name = function.pairs.name
        self.outputs = function.pairs.outputs
        self.inputs = list(self.outputs)
        self.answers = function.answers
        self.other_answers = other_answers
        self.n_demonstrations = n_demonstrations
        self.encode = encode
        self.rng = stable_generator("word task", self.name, seed)
        if len(self.inputs) < n_demonstrations + 2:
            raise ValueError(
                f"task {self.name!r} has {len(self.inputs)} pairs; {n_demonstrations} demonstrations, a query and a dummy "
                f"query need {n_demonstrations + 2}: pass a smaller n_demonstrations"
            )

    def splits(self, n_prompts: int) -> list[Prompts]:
        """Prompts on disjoint queries; where there are fewer of these than prompts, they are asked again."""
        queries = self.rng.permutation([self.inputs.index(x) for x in self.answers])
        return [
            self._prompts(self.rng.permutation(np.resize(split, n_prompts)).tolist())
            for split in np.array_split(queries, N_SPLITS)
        ]

    def _prompts(self, queries: list[int]) -> Prompts:
        """One row for each query, given as its place in the list."""
        rows: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        answers, others, wrong = [], [], []
        for query in queries:
            x = self.inputs[query]
            shown, texts = self._texts(x)
            for kind, text in texts.items():
                rows[kind].append(self.encode(text))
            answers.append(self.answers[x])
            other = self.other_answers.get(x, UNKNOWN)
            others.append(UNKNOWN if other == self.answers[x] else other)
            wrong.append(self._wrong_answer(x, shown))
        return Prompts.from_rows(**rows, answers=answers, other_answers=others, wrong_answers=wrong, queries=queries)

    def _texts(self, x: str) -> tuple[list[str], dict[str, str]]:
        """Inputs shown before the query, and the prompts, whose tokens are as the answer's definition needs them."""
        for _ in range(_MAX_DRAWS):
            shown, dummy = self._shown(x)
            outputs = [self.outputs[each] for each in shown]
            right = _demonstrations(shown, outputs)
            texts = {
                "clean": right + QUERY.format(x=x),
                "shuffled": _demonstrations(shown, _deranged(outputs, self.rng)) + QUERY.format(x=x),
                "zero_shot": QUERY.format(x=x),
                "dummy": right + QUERY.format(x=dummy),
            }
            kept = all(
                _added(self.encode, texts[kind], self.outputs[x]) == [self.answers[x]] for kind in ("clean", "shuffled")
            )
            if kept and len(self.encode(texts["clean"])) == len(self.encode(texts["shuffled"])):
                return shown, texts
        raise ValueError(
            f"task {self.name!r}, query {x!r}: in {_MAX_DRAWS} draws of demonstrations the tokenizer always merged the "
            "answer with what is before it, or made shuffled prompts longer than clean ones"
        )

    def _shown(self, x: str) -> tuple[list[str], str]:
        """Inputs of the demonstrations, no output more than half of the time, and a dummy query."""
        others = [self.inputs[index] for index in self.rng.permutation(len(self.inputs)) if self.inputs[index] != x]
        shown: list[str] = []
        times: Counter[str] = Counter()
        for each in others:
            if len(shown) < self.n_demonstrations and times[self.outputs[each]] < self.n_demonstrations // 2:
                shown.append(each)
                times[self.outputs[each]] += 1
        if len(shown) < self.n_demonstrations:
            raise ValueError(
                f"task {self.name!r} has too few different outputs: among {self.n_demonstrations} demonstrations one "
                "output would be the majority, and could not be shuffled away from all its inputs"
            )
        rest = [each for each in others if each not in shown]
        return shown, rest[self.rng.integers(len(rest))]

    def _wrong_answer(self, x: str, shown: Iterable[str]) -> int:
        in_prompt = {self.outputs[each] for each in shown}
        wrong = {each: token for each, token in self.answers.items() if token != self.answers[x]}
        unseen = [token for each, token in wrong.items() if self.outputs[each] not in in_prompt]
        return int(self.rng.choice(unseen or list(wrong.values())))


def _demonstrations(inputs: list[str], outputs: list[str]) -> str:
    return "".join(DEMONSTRATION.format(x=x, y=y) for x, y in zip(inputs, outputs, strict=True))


def _deranged(outputs: list[str], rng: np.random.Generator) -> list[str]:
    """The outputs in another order, no place with what it had; possible if none is more than half of them.

    Equal outputs stand together in `order`; turned by the largest number of equal ones, no place meets its own.
    """
    group = dict(zip(sorted(set(outputs)), rng.permutation(len(set(outputs))).tolist(), strict=True))
    order = sorted(rng.permutation(len(outputs)).tolist(), key=lambda place: group[outputs[place]])
    largest = max(Counter(outputs).values())
    deranged = list(outputs)
    for place, source in zip(order, order[largest:] + order[:largest], strict=True):
        deranged[place] = outputs[source]
    return deranged


def _check_length(hooked: Hooked, name: str, prompts: Prompts) -> None:
    longest = max(int(prompts.lengths(kind).max()) for kind in KINDS)
    if longest > hooked.n_ctx:
        raise ValueError(
            f"task {name!r}: prompts of {longest} tokens are longer than the model's context of {hooked.n_ctx}: pass a "
            "smaller n_demonstrations"
        )


def _announce_excluded(functions: Sequence[_Function]) -> None:
    counts = [
        f"{function.pairs.name} {len(function.excluded)} of {len(function.excluded) + len(function.answers)}"
        for function in functions
        if function.excluded
    ]
    if counts:
        announce(f"word tasks: pairs that are not asked, their answer not being one token: {', '.join(counts)}")

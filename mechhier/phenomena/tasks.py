"""Tasks for function vectors: prompts that demonstrate a function, and the same prompts with the answers shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Int

from mechhier.grammars import DocumentGrammar, Grammar

MAX_NGRAM_WORDS = 16
"""Size of the token sets that stand for subjects, verbs and objects where a language has none."""


@dataclass(frozen=True)
class Prompts:
    """Prompts whose last token is the query x; every array has one row per prompt.

    Attributes:
        clean: k demonstrations of f_t, then x.
        shuffled: The same tokens with the demonstrations' answers permuted, then x.
        zero_shot: x without demonstrations.
        answers: f_t(x).
        other_answers: f_t'(x), the answer under another task t': the next one in the list of tasks (for the last, the
            first), whose function vector is the control.
    """

    clean: Int[np.ndarray, "prompt pos"]
    shuffled: Int[np.ndarray, "prompt pos"]
    zero_shot: Int[np.ndarray, "prompt short_pos"]
    answers: Int[np.ndarray, " prompt"]
    other_answers: Int[np.ndarray, " prompt"]

    def __post_init__(self) -> None:
        counts = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(counts.values())) != 1 or not len(self.clean):
            raise ValueError(f"prompts need the same number of rows, at least one, in every array; got {counts}")
        if self.clean.shape != self.shuffled.shape:
            raise ValueError(f"clean and shuffled prompts differ in shape: {self.clean.shape}, {self.shuffled.shape}")


@dataclass(frozen=True)
class Task:
    """One function, with prompts on three disjoint sets of queries.

    Attributes:
        name: What the function is.
        selection: Prompts that choose the heads.
        estimation: Prompts over which the heads' mean activations are taken.
        test: Prompts on which the function vector is judged.
    """

    name: str
    selection: Prompts
    estimation: Prompts
    test: Prompts


def concatenate(prompts: Sequence[Prompts]) -> Prompts:
    """All prompts in one, in order."""
    return Prompts(
        **{field.name: np.concatenate([getattr(each, field.name) for each in prompts]) for field in fields(Prompts)}
    )


def has_function(grammar: Grammar) -> bool:
    """Whether the language repeats functions from subject to verb across documents: a pool of lexicons, ranks tied."""
    return isinstance(grammar, DocumentGrammar) and isinstance(grammar.lexicon, int) and grammar.binding > 0


def grammar_tasks(
    grammar: Grammar, *, n_tasks: int = 8, n_demonstrations: int = 8, n_prompts: int = 32, seed: int = 0
) -> list[Task]:
    """Tasks "the verb of this subject" from a grammar: one task per lexicon.

    A prompt is `s v o <eos>` for `n_demonstrations` subjects of one lexicon, ranks tied, then another subject: the
    query occurs in no demonstration, so its verb cannot be copied, only inferred from which lexicon it is. Shuffled
    prompts permute verbs and objects, each by a derangement of its own, so that neither names the lexicon.

    Task t' of `other_answers` is the next task, and the first for the last; subjects on which the two agree are not
    asked. The lexicons are the pool's, `n_tasks` of them at most. A language without a pool has no function to carry:
    there the lexicons are fresh ones (for an n-gram language, of three arbitrary sets of tokens), and every score should
    be chance.

    Raises:
        ValueError: Too few words for disjoint splits of queries and the demonstrations, fewer than two tasks, or
            documents that end before the query.
    """
    rng = np.random.default_rng(seed)
    lexicons = _lexicons(grammar, n_tasks, rng)
    n_words = lexicons.shape[2]
    if len(lexicons) < 2:
        raise ValueError("function vectors need at least two tasks, so that one can be the other's control")
    if n_demonstrations < 3:
        raise ValueError(
            f"n_demonstrations must be at least 3 for shuffled answers to fit nowhere, got {n_demonstrations}"
        )
    if n_words < n_demonstrations + 1 or n_words < 3:
        raise ValueError(
            f"{n_demonstrations} demonstrations and a query that is not among them need {n_demonstrations + 1} words "
            f"a category; this grammar has {n_words}: pass a smaller n_demonstrations"
        )
    if isinstance(grammar, DocumentGrammar):
        if grammar.p_chain == 0:
            raise ValueError("the prompts are sentences s v o <eos>, which this grammar never makes: its p_chain is 0")
        if grammar.sentences_per_document <= n_demonstrations:
            raise ValueError(
                f"{n_demonstrations} demonstrations and a query are {n_demonstrations + 1} sentences, but this grammar's "
                f"documents, and with them the lexicon, end after {grammar.sentences_per_document}: pass a smaller "
                "n_demonstrations, or make longer documents"
            )
    queries = np.array_split(rng.permutation(n_words), 3)
    tasks = []
    for index, lexicon in enumerate(lexicons):
        other = lexicons[(index + 1) % len(lexicons)]
        splits = [
            _prompts(grammar, lexicon, other, ranks, n_demonstrations=n_demonstrations, n_prompts=n_prompts, rng=rng)
            for ranks in queries
        ]
        tasks.append(Task(f"lexicon {index}: subject -> verb", *splits))
    return tasks


def _lexicons(grammar: Grammar, n_tasks: int, rng: np.random.Generator) -> Int[np.ndarray, "task 3 rank"]:
    """Token ids of subject, verb and object by rank, for each task."""
    if not isinstance(grammar, DocumentGrammar):
        ordinary = np.setdiff1d(np.arange(grammar.vocab_size), [grammar.eos_token_id])
        n_words = min(MAX_NGRAM_WORDS, len(ordinary) // 3)
        words = np.tile(rng.permutation(ordinary)[: 3 * n_words].reshape(3, n_words), (n_tasks, 1, 1))
        return rng.permuted(words, axis=2)
    if has_function(grammar):
        pool = rng.permutation(len(grammar.lexicons))[:n_tasks]
        return grammar.lexicons[pool]
    return grammar.draw_lexicons(n_tasks, rng)[:, :, : min(grammar.sizes)]


def _prompts(
    grammar: Grammar,
    lexicon: Int[np.ndarray, "3 rank"],
    other: Int[np.ndarray, "3 rank"],
    ranks: Int[np.ndarray, " query"],
    *,
    n_demonstrations: int,
    n_prompts: int,
    rng: np.random.Generator,
) -> Prompts:
    n_words = lexicon.shape[1]
    verb_of = dict(zip(other[0].tolist(), other[1].tolist(), strict=True))
    differ = [rank for rank in ranks if lexicon[1, rank] != verb_of[int(lexicon[0, rank])]]
    queried = rng.permutation(np.resize(differ or ranks, n_prompts))
    clean, shuffled = [], []
    for query in queried:
        shown = rng.choice(np.delete(np.arange(n_words), query), n_demonstrations, replace=False)
        x = lexicon[0, query]
        for rows, verbs, objects in (
            (clean, shown, shown),
            (shuffled, np.roll(shown, 1), np.roll(shown, 2)),
        ):
            end = np.full(n_demonstrations, grammar.eos_token_id)
            clauses = np.stack([lexicon[0, shown], lexicon[1, verbs], lexicon[2, objects], end], axis=1)
            rows.append(np.append(clauses.reshape(-1), x))
    subjects = lexicon[0, queried]
    return Prompts(
        clean=np.stack(clean),
        shuffled=np.stack(shuffled),
        zero_shot=subjects[:, None],
        answers=lexicon[1, queried],
        other_answers=np.array([verb_of[int(x)] for x in subjects]),
    )

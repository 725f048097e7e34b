"""A model that carries a task in a known direction, written by a known head."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from mechhier.grammars import DocumentGrammar
from mechhier.models.planted.answers import Answer, Circuit, Part, PlantedModel
from mechhier.models.planted.builder import Builder

# The answer is written this much larger than the current token, so that it is the model's prediction.
_OUTPUT_SCALE = 4.0
# An MLP unit's input where its condition holds; minus that, or less, elsewhere. GELU's error at 10 is below 1e-6.
_UNIT_INPUT = 10.0
# What a verb's logit loses per id where the task is unknown: the guess is the first verb, not the rounding error's.
_TIE_BREAK = 1e-3
MAX_DEMONSTRATIONS = 8
"""Demonstrations in the prompts that the answers hold on, where words and context allow."""


def planted_function_vector(grammar: DocumentGrammar | None = None, n_ctx: int = 64) -> PlantedModel:
    """A model that carries out "the verb of this subject" in whichever lexicon of a pool the prompt demonstrates.

    Layer 0's head 0 writes the previous token; its MLP has a unit for every lexicon t and subject s that sees s at the
    previous and t's verb of s at the current position, and writes evidence for t. Head 0 of layer 1, the function-vector
    head, attends uniformly and writes `4 x (share of positions with evidence for t)` in a direction of t's own: 4k/(4k + 1)
    after k demonstrations of t, at most a few tenths by coincidence. Layer 2's MLP has a unit for every t and s that
    sees s and more than half of t's direction, and writes t's verb of s. Without a task the model gives every verb the
    same probability (the first a little more, so that its guess is always that one).

    `AIE` of the head (every other head: 0), `accuracy_clean`, `P_shuffled` and `accuracy_injected` (of a task's vector in a
    zero-shot prompt, at layers 0 and 1; at layer 2 it is too late) hold on `grammar_tasks(planted.grammar)`.
    `directions["task"]` has the direction of every lexicon of the pool; row i of `planted.tokens(n)` is a clean prompt of
    lexicon i modulo their number.

    Args:
        grammar: A document language with a pool of lexicons and binding 1. The MLPs have a unit for every lexicon and
            word. By default six lexicons of twelve words.
        n_ctx: Longest sequence; room for three demonstrations (13 tokens) at least.

    Raises:
        ValueError: The grammar has no pool, its ranks are not tied, or three demonstrations and a query do not fit.
    """
    if grammar is None:
        grammar = DocumentGrammar(n_words=12, n_connectors=1, lexicon=6, binding=1.0, p_chain=1.0)
    if not isinstance(grammar.lexicon, int) or grammar.binding != 1:
        raise ValueError(
            f"a function to carry needs a pool of lexicons and binding=1; the grammar has lexicon={grammar.lexicon!r} and "
            f"binding={grammar.binding}"
        )
    lexicons = torch.tensor(grammar.lexicons)
    n_tasks, _, n_words = lexicons.shape
    subjects, verbs = slice(0, n_words), slice(n_words, 2 * n_words)
    n_units = n_tasks * n_words
    k = min(MAX_DEMONSTRATIONS, n_words - 1, (n_ctx - 1) // 4)
    if k < 3:
        raise ValueError(
            f"three demonstrations and a query need 4 words and a context of 13 tokens, not {n_words} and {n_ctx}"
        )
    build = Builder(grammar.vocab_size, n_ctx, n_layers=3, n_units=n_units, n_extra=2 * n_tasks + n_words + 2)
    constant, origin = build.constant(), build.subspace(1).start
    evidence, task, answer = build.subspace(n_tasks), build.subspace(n_tasks), build.subspace(n_words)
    unit = torch.arange(n_units)
    unit_task = unit // n_words
    unit_subject, unit_verb = lexicons[:, 0].reshape(-1), lexicons[:, 1].reshape(-1)

    def conjunction(first: Tensor, second: Tensor, norm_factor: float) -> Tensor:
        """Units whose input is `_UNIT_INPUT` where both of two dimensions are 1, and minus that where one is."""
        read = torch.zeros(build.d_model, n_units)
        read[first, unit] = read[second, unit] = 1.0
        read[constant] = -1.5
        return build.read_against(origin, read) * 2 * _UNIT_INPUT / norm_factor

    def writing(dimensions: Tensor, size: float) -> Tensor:
        write = torch.zeros(n_units, build.d_model)
        write[unit, dimensions] = size / _UNIT_INPUT
        return write

    build.previous_token_head(3)
    # Token, position, constant and previous token.
    build.mlp(
        0,
        read=conjunction(build.previous.start + unit_subject, unit_verb, build.one_hot_size(4)),
        write=writing(evidence.start + unit_task, 1.0),
    )

    # One token in four is a verb, and its residual holds the evidence as a fifth 1.
    query, key, value, read = build.maps(4)
    value[evidence, :n_tasks] = torch.eye(n_tasks) * 4 / build.one_hot_size(5)
    read[task, :n_tasks] = torch.eye(n_tasks)
    build.head(1, query=query, key=key, value=build.read_against(origin, value), output=read.T)

    build.mlp(
        2,
        read=conjunction(unit_subject, task.start + unit_task, build.one_hot_size(5)),
        write=writing(answer.start + unit_verb - verbs.start, _OUTPUT_SCALE),
    )
    with torch.no_grad():
        unembedding = build.model.lm_head.weight
        unembedding.zero_()
        unembedding[verbs, answer] = torch.eye(n_words)
        unembedding[verbs, subjects] = 1 - _TIE_BREAK * torch.arange(n_words)[:, None].expand(-1, n_words)
    head = {"component": "attention", "layer": 1, "head": 0}
    size = 4 * k / (4 * k + 1)
    return PlantedModel(
        name="function_vector",
        purpose="indirect effects of heads, function vectors and their injection",
        model=build.model,
        answers={
            "AIE": Answer("AIE", 1 - 1 / n_words, 0.03, **head),
            "AIE_previous_token": Answer("AIE", 0.0, 1e-3, component="attention", layer=0, head=0),
            "accuracy_clean": Answer("accuracy_clean", 1.0),
            "P_shuffled": Answer("P_shuffled", 1 / n_words, 0.03),
            "accuracy_injected": Answer("accuracy_injected", 1.0),
            "vector_size": Answer("vector_size", size, 0.1 * size, **head),
            "vector_cosine": Answer("vector_cosine", 1.0, 0.05, **head),
        },
        heads={"previous_token": (0, 0), "function_vector": (1, 0)},
        circuit=Circuit(
            ("s", "v", "…", "s'"),
            (
                Part("previous-token head", "attention", 0, (0,), 1, "previous: s"),
                Part("evidence: s, v", "mlp", 0, (1,), 1, "lexicon t"),
                Part("function-vector head", "attention", 1, (0, 1, 2), 3, "direction of t"),
                Part("verb of s' in t", "mlp", 2, (3,), 3, "v'"),
            ),
            3,
            "v'",
        ),
        draw=_prompts(grammar, lexicons, k),
        grammar=grammar,
        directions={"task": torch.eye(build.d_model)[task]},
    )


def _prompts(grammar: DocumentGrammar, lexicons: Int[Tensor, "task 3 rank"], k: int):
    """Clean prompts: k clauses `s v o <eos>` of one lexicon, then a subject that is in none of them."""

    def draw(n: int, seed: int) -> Int[Tensor, "sequence pos"]:
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for row in range(n):
            lexicon = lexicons[row % len(lexicons)]
            ranks = torch.randperm(lexicon.shape[1], generator=generator)[: k + 1]
            clauses = torch.cat([lexicon[:, ranks[:k]], torch.full((1, k), grammar.eos_token_id)]).T.reshape(-1)
            rows.append(torch.cat([clauses, lexicon[:1, ranks[k]]]))
        return torch.stack(rows)

    return draw

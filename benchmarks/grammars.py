"""Tokens per second of the generators on one core and on two, each beside a plain-Python generator of its language.

Blocks of tokens as a corpus makes them, without labels; then the share of labels, and the cost of exact prediction.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.timing import interleaved, report
from mechhier.grammars import PCFG, DocumentGrammar, Grammar, NGram, cfg3

CONTEXT = 512
PLAIN_ROWS, ROWS = 200, 2000
SAVED_TOKENS = 20_000_000


def plain_document(grammar: DocumentGrammar, n_tokens: int) -> list[int]:
    """The document language one token at a time, as a first version would be written."""
    rng = random.Random(0)
    weights = [1 / (rank + 1) ** grammar.zipf for rank in range(grammar.sizes[0])]
    tokens: list[int] = []
    while len(tokens) < n_tokens:
        lexicon = [rng.sample(range(size), size) for size in grammar.sizes]
        for _ in range(grammar.sentences_per_document * grammar.repetitions):
            chain = rng.random() < grammar.p_chain
            n_clauses = rng.randint(1, grammar.max_clauses) if chain else 1
            for clause in range(n_clauses):
                ranks = [rng.choices(range(size), weights[:size])[0] for size in grammar.sizes]
                words = [grammar.offsets[c] + lexicon[c][ranks[c]] for c in range(3)]
                tokens += words if chain else [words[1], words[0], words[2]]
                if clause + 1 < n_clauses:
                    tokens.append(grammar.offsets[3] + rng.randrange(grammar.n_connectors))
            tokens.append(grammar.eos_token_id)
    return tokens[:n_tokens]


def plain_ngram(grammar: NGram, n_tokens: int) -> list[int]:
    """The n-gram language one token at a time, with Python's own hash of the history."""
    rng = random.Random(0)
    cumulative = np.cumsum(grammar.rows, axis=1).tolist()
    choices = range(grammar.n_tokens - 1)
    tokens: list[int] = []
    while len(tokens) < n_tokens:
        document: list[int] = []
        for _ in range(grammar.min_length + rng.randint(0, grammar.max_extra)):
            order = rng.choices(grammar.orders, grammar.order_probabilities.tolist())[0]
            row = hash(tuple(document[-order:])) % grammar.n_rows
            document += rng.choices(choices, cum_weights=cumulative[row])
        tokens += [*document, grammar.eos_token_id]
    return tokens[:n_tokens]


def plain_pcfg(grammar: PCFG, n_tokens: int) -> list[int]:
    """A context-free grammar by recursion over its rules."""
    rng = random.Random(0)
    rules: dict[str, tuple[list[tuple[str, ...]], list[float]]] = {}
    for rule in grammar.rules:
        sides, weights = rules.setdefault(rule.lhs, ([], []))
        sides.append(rule.rhs)
        weights.append(rule.probability)
    ids = {terminal: i for i, terminal in enumerate(grammar.terminals)}

    def expand(symbol: str) -> list[int]:
        if symbol in ids:
            return [ids[symbol]]
        return [token for child in rng.choices(*rules[symbol])[0] for token in expand(child)]

    tokens: list[int] = []
    while len(tokens) < n_tokens:
        tokens += [*expand(grammar.start), grammar.eos_token_id]
    return tokens[:n_tokens]


LANGUAGES: dict[str, tuple[Grammar, Callable[..., list[int]]]] = {
    "document": (DocumentGrammar.paper(), plain_document),
    "n-gram": (NGram.paper(), plain_ngram),
    "cfg3": (cfg3(), plain_pcfg),
}


def generation() -> None:
    """One core: our generators against plain Python."""
    rng = np.random.default_rng(0)
    contenders: dict[str, Callable[[], object]] = {}
    work = {}
    for name, (grammar, plain) in LANGUAGES.items():
        contenders[f"{name}, plain Python"] = lambda g=grammar, plain=plain: plain(g, PLAIN_ROWS * CONTEXT)
        contenders[name] = lambda g=grammar: g.draw_rows(ROWS, CONTEXT, rng)
        contenders[f"{name}, with labels"] = lambda g=grammar: g.generate(ROWS, CONTEXT, rng)
    seconds = interleaved(contenders, rounds=5)
    for name in contenders:
        n_tokens = (PLAIN_ROWS if "plain" in name else ROWS) * CONTEXT
        seconds[name] = seconds[name] / n_tokens * 1e6
        work[name] = f"{1 / np.median(seconds[name]):.2f} M tokens/s"
    for name in LANGUAGES:
        of_language = {key: values for key, values in seconds.items() if key.startswith(name)}
        title = f"{name}: seconds per million tokens, one core"
        report(title, of_language, baseline=f"{name}, plain Python", work=work)


def two_cores() -> None:
    """A corpus stored with one thread and with two."""
    for name, (grammar, _) in LANGUAGES.items():
        corpus = grammar.corpus(SAVED_TOKENS, context=CONTEXT)
        with tempfile.TemporaryDirectory() as folder:
            seconds = interleaved(
                {
                    f"{workers} thread{'s' if workers > 1 else ''}": lambda workers=workers, corpus=corpus: corpus.save(
                        Path(tempfile.mkdtemp(dir=folder)), workers=workers
                    )
                    for workers in (1, 2)
                },
                rounds=3,
            )
        speeds = {key: f"{SAVED_TOKENS / np.median(values) / 1e6:.1f} M tokens/s" for key, values in seconds.items()}
        report(f"{name}: {SAVED_TOKENS:,} tokens stored, hashes included", seconds, baseline="1 thread", work=speeds)


def prediction() -> None:
    """The exact predictors, per row of 512 tokens."""
    rng = np.random.default_rng(0)
    samples = {name: (grammar, grammar.generate(4, CONTEXT, rng)) for name, (grammar, _) in LANGUAGES.items()}
    contenders: dict[str, Callable[[], object]] = {
        f"{name}, loss": lambda g=grammar, s=sample: g.ideal_loss(s) for name, (grammar, sample) in samples.items()
    }
    tree, sample = samples["cfg3"]
    assert isinstance(tree, PCFG)
    contenders["cfg3, states"] = lambda: tree.state_probabilities(sample.tokens)
    seconds = {name: values / 4 for name, values in interleaved(contenders, rounds=3).items()}
    report("Exact prediction, seconds per row of 512 tokens", seconds, baseline="n-gram, loss")


def main() -> None:
    """Print the tables."""
    generation()
    two_cores()
    prediction()


if __name__ == "__main__":
    main()

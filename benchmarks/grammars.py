"""Tokens per second of the generators on one core, beside a plain-Python generator of the document language."""

from __future__ import annotations

import random

import numpy as np

from benchmarks.timing import interleaved, report
from mechhier.grammars import DocumentGrammar, NGram

N_TOKENS = 512 * 200


def plain_python(grammar: DocumentGrammar, n_tokens: int) -> list[int]:
    """The document language one token at a time, as a first version would be written."""
    rng = random.Random(0)
    weights = [1 / (rank + 1) ** grammar.zipf for rank in range(grammar.sizes[0])]
    tokens: list[int] = []
    while len(tokens) < n_tokens:
        lexicon = [rng.sample(range(size), size) for size in grammar.sizes]
        for _ in range(grammar.sentences_per_document):
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


def main() -> None:
    """Print the table."""
    document, ngram = DocumentGrammar.paper(), NGram.paper()
    rng = np.random.default_rng(0)
    seconds = interleaved(
        {
            "plain Python, document": lambda: plain_python(document, N_TOKENS),
            "document": lambda: document.generate(N_TOKENS // 512, 512, rng),
            "n-gram": lambda: ngram.generate(N_TOKENS // 512, 512, rng),
        }
    )
    speeds = {name: f"{N_TOKENS / np.median(values) / 1e6:.2f} M tokens/s" for name, values in seconds.items()}
    report("Generators, the paper's sizes, one core", seconds, baseline="plain Python, document", work=speeds)


if __name__ == "__main__":
    main()

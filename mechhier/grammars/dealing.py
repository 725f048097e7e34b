"""Dealing documents to splits by a hash of their tokens, so that no document is in two splits; and finding any that is."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, UInt64

from mechhier.grammars.base import Grammar, MakeLabels, Sample, Split
from mechhier.grammars.sampling import compiled

SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
"""Which part of the hashes each split gets."""

_SPARE = 1.1  # of a stream that should just suffice


def dealt_rows(
    grammar: Grammar, n_rows: int, context: int, rng: np.random.Generator, *, packed: bool, split: Split
) -> tuple[Int[np.ndarray, "row position"], MakeLabels]:
    """Draw rows as :meth:`Grammar.generate` does, of documents that are dealt to one split.

    Args:
        grammar: The language; one that writes streams of documents.
        n_rows: Number of rows.
        context: Tokens per row.
        rng: Source of randomness.
        packed: Whether rows are cut from one stream; else each begins a document.
        split: Which split's documents.
    """
    low, high = SHARES[split]
    streams: list[tuple[np.ndarray, MakeLabels]] = []
    places = np.zeros((n_rows, context), dtype=np.int64)  # where in the streams the row's tokens stand
    row, filled, n_drawn = 0, 0, 0
    while row < n_rows:
        missing = (n_rows - row) * context - filled
        wanted = int(missing / (high - low) * _SPARE) + 4 * context
        (tokens,), make_labels = grammar._generate(1, wanted, rng)
        ends = document_ends(tokens, grammar.eos_token_id, grammar.eos_per_document)
        hashes = document_hashes(tokens, ends)
        share = hashes / 2.0**64
        ours = (share >= low) & (share < high)
        if not ours.any():
            raise ValueError(
                f"none of {len(ends)} documents is dealt to the {split} split: the language has too few different ones "
                "for disjoint splits; leave disjoint at False"
            )
        row, filled = _lay(places, row, filled, ends, ours, n_drawn, packed)
        streams.append((tokens, make_labels))
        n_drawn += len(tokens)

    def make_labels_of_rows(trees: bool) -> dict[str, np.ndarray]:
        parts = []
        used = {"document": 0, "nodes": 0}  # numbers that begin at 0 in every stream
        for tokens, make_labels in streams:
            labels = {
                name: label.reshape(len(tokens), 1, *label.shape[2:]) for name, label in make_labels(trees).items()
            }
            for name in used.keys() & labels.keys():
                labels[name] = np.where(labels[name] >= 0, labels[name] + used[name], -1)
                used[name] = int(labels[name].max()) + 1
            parts.append(Sample(tokens, labels))
        labels = {name: label[:, 0][places] for name, label in Sample.joined(parts).labels.items()}
        begins = np.diff(labels["document"], axis=1, prepend=labels["document"][:, :1]) != 0
        labels["document"] = np.cumsum(begins, axis=1)
        return labels

    return np.concatenate([tokens for tokens, _ in streams])[places], make_labels_of_rows


def document_ends(
    tokens: Int[np.ndarray, " position"], eos_token_id: int, eos_per_document: int
) -> Int[np.ndarray, " document"]:
    """Return where each complete document of a stream ends, its last ``<eos>`` included (exclusive ends)."""
    return np.flatnonzero(tokens == eos_token_id)[eos_per_document - 1 :: eos_per_document] + 1


@compiled
def document_hashes(tokens: Int[np.ndarray, " position"], ends: Int[np.ndarray, " document"]) -> np.ndarray:
    """Return a 64-bit hash of every complete document's tokens: a polynomial and splitmix64's finalizer."""
    hashes = np.empty(len(ends), dtype=np.uint64)
    start = 0
    for document in range(len(ends)):
        x = np.uint64(0)
        for t in range(start, ends[document]):
            x = x * np.uint64(6364136223846793005) + np.uint64(tokens[t] + 1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hashes[document] = x ^ (x >> np.uint64(31))
        start = ends[document]
    return hashes


@compiled
def _lay(
    places: np.ndarray, row: int, filled: int, ends: np.ndarray, ours: np.ndarray, offset: int, packed: bool
) -> tuple[int, int]:
    """Lay documents into rows from a given place on; return the place reached (row, position)."""
    n_rows, context = places.shape
    start = 0
    for document in range(len(ends)):
        if ours[document]:
            for t in range(start, ends[document]):
                if row == n_rows:
                    return row, filled
                places[row, filled] = offset + t
                filled += 1
                if filled == context:
                    row, filled = row + 1, 0
                    if not packed:
                        break  # the row cuts its last document; the next begins one
        start = ends[document]
    return row, filled


def rows_hashes(rows: Int[np.ndarray, "row position"], grammar: Grammar) -> UInt64[np.ndarray, " document"]:
    """Return the hashes of the documents that rows hold whole; every row begins a document."""
    parts = [np.empty(0, dtype=np.uint64)]
    for row in rows:
        ends = document_ends(row, grammar.eos_token_id, grammar.eos_per_document)
        parts.append(document_hashes(row, ends))
    return np.concatenate(parts)

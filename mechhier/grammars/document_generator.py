"""Generation of the document language and of its flat counterpart: first categories, then words, in compiled loops.

The words of one lexicon are drawn before those of the next, wherever its documents stand. So one lexicon is held at a
time, and a fresh one is drawn word by word as it is needed: its cost is that of the text, not of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mechhier.grammars.base import MakeLabels
from mechhier.grammars.clauses import CONNECTOR, EOS, OBJECT, SUBJECT, TOKENS_PER_CLAUSE, VERB
from mechhier.grammars.sampling import alias_table, compiled, draw
from mechhier.grammars.trees import node_numbers

if TYPE_CHECKING:
    from mechhier.grammars.document import DocumentGrammar


def generate(
    grammar: DocumentGrammar, n_rows: int, context: int, rng: np.random.Generator
) -> tuple[np.ndarray, MakeLabels]:
    """Draw rows that each begin a document; see :meth:`Grammar.generate`."""
    # A row has whole clauses; what exceeds the context is cut off in the end.
    width = -(-context // TOKENS_PER_CLAUSE) * TOKENS_PER_CLAUSE
    category = np.empty((n_rows, width), dtype=np.int8)
    start = np.empty(n_rows * (width // grammar.sentences_per_document + 1) + 1, dtype=np.int64)
    n_clauses = np.empty((n_rows, width // TOKENS_PER_CLAUSE), dtype=np.int32)  # of every sentence
    if grammar.hierarchical:
        n_documents = _write_clauses(
            rng, grammar.p_chain, grammar.max_clauses, grammar.sentences_per_document, category, n_clauses, start
        )
    else:
        transitions = alias_table(grammar.category_transitions)
        n_documents = _walk(rng, *transitions, grammar.sentences_per_document, category, start)
    start = start[: n_documents + 1]
    lexicon = _lexicons_of_documents(grammar, n_documents, rng)

    fixed = grammar.lexicon != "per_document"
    subjects, verbs, objects = (alias_table(law) for law in grammar.rank_probabilities)
    tokens = np.empty((n_rows, width), dtype=np.int32)
    rank = np.empty((n_rows, width), dtype=np.int32)
    _write_words(
        rng,
        category.ravel(),
        start,
        lexicon,
        np.argsort(lexicon, kind="stable"),
        grammar.lexicons if fixed else np.empty((0, 3, 0), dtype=np.int64),
        np.array(grammar.offsets),
        *subjects,
        *verbs,
        *objects,
        grammar.binding,
        grammar.hierarchical,
        tokens.ravel(),
        rank.ravel(),
    )

    def make_labels(trees: bool) -> dict[str, np.ndarray]:
        ends = category == EOS
        in_row = np.cumsum(ends, axis=1) - ends
        document, sentence = np.divmod(in_row, grammar.sentences_per_document)
        labels = {"category": category, "rank": rank, "document": document, "sentence": sentence}
        labels["lexicon"] = np.repeat(lexicon, np.diff(start)).reshape(n_rows, width)
        if grammar.hierarchical:
            labels["section"] = sentence // (grammar.n_paragraphs * grammar.n_sentences)
            labels["paragraph"] = sentence // grammar.n_sentences
            index = np.arange(width) // TOKENS_PER_CLAUSE
            begins = np.diff(in_row, axis=1, prepend=-1) != 0
            labels["clause"] = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
            labels["n_clauses"] = np.take_along_axis(n_clauses, in_row, axis=1)
        labels = {name: label[:, :context].astype(np.int64) for name, label in labels.items()}
        return labels | (_constituents(labels) if trees else {})

    return tokens[:, :context], make_labels


def _lexicons_of_documents(grammar: DocumentGrammar, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return, for each of ``n`` documents, the number of its lexicon."""
    if grammar.lexicon == "per_document":
        shares = np.arange(n) // grammar.repetitions
        return rng.permutation(shares) if grammar.repetitions > 1 else shares
    return rng.integers(0, len(grammar.lexicons), n)


def _constituents(labels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return symbols and numbers of every token's ancestors, see :attr:`DocumentGrammar.symbols`."""
    category = labels["category"]
    levels = [labels[name] for name in ("document", "section", "paragraph", "sentence", "clause") if name in labels]
    if "clause" not in labels:
        levels = levels[:1]  # a flat document consists of words alone
    n_levels = len(levels)
    ancestors = np.full((*category.shape, n_levels + 1), -1, dtype=np.int32)
    ancestors[:, :, :n_levels] = np.arange(n_levels)
    ancestors[:, :, n_levels] = n_levels + category
    if n_levels > 1:  # a connector or <eos> belongs to the sentence
        outside = category >= CONNECTOR
        ancestors[outside, n_levels - 1] = ancestors[outside, n_levels]
        ancestors[outside, n_levels] = -1
        levels[-1] = np.where(outside, -1, levels[-1])
    same = np.ones(category.shape, dtype=bool)
    same[:, 0] = False
    shared = np.zeros(category.shape, dtype=np.int64)
    for level in levels:
        same[:, 1:] &= (level[:, 1:] == level[:, :-1]) & (level[:, 1:] >= 0)
        shared += same
    return {"ancestors": ancestors, "nodes": node_numbers(ancestors, shared)}


@compiled
def _write_clauses(
    rng: np.random.Generator,
    p_chain: float,
    max_clauses: int,
    sentences_per_document: int,
    category: np.ndarray,
    n_clauses: np.ndarray,
    start: np.ndarray,
) -> int:
    """Draw sentences of clauses: every token's category, the sentences' lengths, the documents' starts in all rows."""
    n_rows, width = category.shape
    n_documents = 0
    for row in range(n_rows):
        t, sentence = 0, 0
        while t < width:
            if sentence % sentences_per_document == 0:
                start[n_documents] = row * width + t
                n_documents += 1
            chain = rng.random() < p_chain
            length = 1 + int(rng.random() * max_clauses) if chain else 1
            n_clauses[row, sentence] = length
            sentence += 1
            for i in range(min(length, (width - t) // TOKENS_PER_CLAUSE)):
                category[row, t] = SUBJECT if chain else VERB
                category[row, t + 1] = VERB if chain else SUBJECT
                category[row, t + 2] = OBJECT
                category[row, t + 3] = CONNECTOR if i + 1 < length else EOS
                t += TOKENS_PER_CLAUSE
    start[n_documents] = n_rows * width
    return n_documents


@compiled
def _walk(
    rng: np.random.Generator,
    threshold: np.ndarray,
    alias: np.ndarray,
    sentences_per_document: int,
    category: np.ndarray,
    start: np.ndarray,
) -> int:
    """Draw a Markov chain of categories that begins as after ``<eos>``, and the documents' starts in all rows."""
    n_rows, width = category.shape
    n_documents = 0
    for row in range(n_rows):
        now, sentence = EOS, 0
        for t in range(width):
            if now == EOS and sentence % sentences_per_document == 0:
                start[n_documents] = row * width + t
                n_documents += 1
            now = draw(rng, threshold[now], alias[now])
            category[row, t] = now
            if now == EOS:
                sentence += 1
    start[n_documents] = n_rows * width
    return n_documents


@compiled
def _write_words(
    rng: np.random.Generator,
    category: np.ndarray,
    start: np.ndarray,
    lexicon: np.ndarray,
    order: np.ndarray,
    lexicons: np.ndarray,
    offsets: np.ndarray,
    subject_threshold: np.ndarray,
    subject_alias: np.ndarray,
    verb_threshold: np.ndarray,
    verb_alias: np.ndarray,
    object_threshold: np.ndarray,
    object_alias: np.ndarray,
    binding: float,
    per_clause: bool,
    tokens: np.ndarray,
    rank: np.ndarray,
) -> None:
    """Draw the words of all documents, lexicon by lexicon; no ``lexicons``: each is drawn afresh as it is used."""
    fresh = len(lexicons) == 0
    size = max(offsets[1], offsets[2] - offsets[1], offsets[3] - offsets[2])
    word_of_rank = np.empty((3, size), dtype=np.int32)
    rank_known = np.full((3, size), -1, dtype=np.int64)  # the last lexicon in which the rank was given a word
    word_known = np.full((3, size), -1, dtype=np.int64)  # and the word a rank
    for document in order:
        which = lexicon[document]
        tied = False  # whether the next word of the clause takes the rank of the word before it
        for t in range(start[document], start[document + 1]):
            c = category[t]
            if c >= CONNECTOR:
                rank[t] = -1
                n_connectors = offsets[EOS] - offsets[CONNECTOR]
                tokens[t] = offsets[EOS] if c == EOS else offsets[CONNECTOR] + int(rng.random() * n_connectors)
                continue
            first = t == start[document] or category[t - 1] >= CONNECTOR
            if binding > 0.0 and (first or not per_clause):
                # Of a clause: verb and object both take the subject's rank. Of flat text: each word its neighbour's.
                tied = rng.random() < binding
            if tied and not first:
                r = rank[t - 1]
            elif c == SUBJECT:
                r = draw(rng, subject_threshold, subject_alias)
            elif c == VERB:
                r = draw(rng, verb_threshold, verb_alias)
            else:
                r = draw(rng, object_threshold, object_alias)
            rank[t] = r
            if not fresh:
                tokens[t] = lexicons[which, c, r]
                continue
            if rank_known[c, r] != which:
                n_words = offsets[c + 1] - offsets[c]
                word = int(rng.random() * n_words)
                while word_known[c, word] == which:
                    word = int(rng.random() * n_words)
                word_known[c, word] = which
                rank_known[c, r] = which
                word_of_rank[c, r] = word
            tokens[t] = offsets[c] + word_of_rank[c, r]

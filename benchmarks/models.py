"""Training speed against a bare PyTorch loop and against a loader that reads one token at a time.

A step's time is the difference between a longer and a shorter training, so that set-up and the checkpoints at both ends
cancel; `train` writes a line of its log every step here, which is more than it does in any longer training.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.timing import interleaved
from mechhier.grammars import Corpus, DocumentGrammar
from mechhier.models import ModelSpec, TrainSpec, train, training

SHORT, LONG, ROUNDS = 10, 50, 5
SIZES = {
    "tiny: 2 layers, d_model 64, 32 rows of 96": (ModelSpec(preset="tiny"), 96, 32),
    "4 layers, d_model 128, 16 rows of 256": (ModelSpec("llama", n_layers=4, d_model=128, n_heads=4), 256, 16),
}


def main() -> None:
    """Print a table for each size."""
    torch.set_num_threads(1)
    for name, (spec, context, batch) in SIZES.items():
        grammar = DocumentGrammar(context=context)
        measure(name, spec, grammar.corpus(LONG * batch * context), batch)


def measure(name: str, spec: ModelSpec, corpus: Corpus, batch: int) -> None:
    """Time the three contenders, each for few and for many steps, and print tokens per second and ratios."""
    rows = torch.as_tensor(corpus.rows(0, corpus.n_rows))
    flat = corpus.rows(0, corpus.n_rows).astype(np.uint16).ravel()

    def loop(batches: Iterator[Tensor], steps: int) -> None:
        model = spec.build(vocab_size=corpus.grammar.vocab_size, eos_token_id=0, n_ctx=corpus.context)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        for _, tokens in zip(range(steps), batches, strict=False):
            logits = model(tokens).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        fresh = count()

        def trained(steps: int) -> None:
            settings = TrainSpec(steps=steps, batch_size=batch, n_checkpoints=2, warmup_steps=1, eval_rows=2)
            train(spec, corpus, Path(folder) / str(next(fresh)), train=settings)

        contenders: dict[str, Callable[[int], None]] = {
            "bare loop, data in memory": lambda steps: loop(iter(rows.split(batch)), steps),
            "train": trained,
            "bare loop, one token per Python step": lambda steps: loop(one_token_at_a_time(flat, corpus, batch), steps),
        }
        both = {(who, n): (lambda run=run, n=n: run(n)) for who, run in contenders.items() for n in (SHORT, LONG)}
        seconds = interleaved({f"{who} {n}": run for (who, n), run in both.items()}, rounds=ROUNDS)
        with timed_parts() as parts:
            start = time.perf_counter()
            trained(LONG)
            whole = time.perf_counter() - start
    per_step = {who: (seconds[f"{who} {LONG}"] - seconds[f"{who} {SHORT}"]) / (LONG - SHORT) for who in contenders}
    baseline = per_step["bare loop, data in memory"]
    table = Table(title=f"{name}, one thread, {ROUNDS} interleaved rounds")
    for column in ("", "ms a step", "tokens/s", "tokens/s relative to the bare loop (lowest to highest round)"):
        table.add_column(column)
    for who, values in per_step.items():
        ratio = baseline / values
        speed = batch * corpus.context / np.median(values)
        table.add_row(
            who,
            f"{1000 * np.median(values):.1f}",
            f"{speed:,.0f}",
            f"{np.median(ratio):.3f} ({ratio.min():.3f} to {ratio.max():.3f})",
        )
    Console().print(table)
    shares = ", ".join(f"{part} {100 * spent / whole:.2f} %" for part, spent in parts.items())
    Console().print(f"of `train`'s wall time: {shares}\n")


def one_token_at_a_time(flat: np.ndarray, corpus: Corpus, batch: int) -> Iterator[Tensor]:
    """Batches from a loader that takes one token per Python step, as the paper's released one does."""
    rows: list[list[int]] = []
    row: list[int] = []
    for token in flat:
        row.append(int(token))
        if len(row) == corpus.context:
            rows.append(row)
            row = []
        if len(rows) == batch:
            yield torch.tensor(rows)
            rows = []


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Seconds that a training spends on reading data, and on log, evaluation and checkpoints."""
    spent = {"data": 0.0, "log, evaluation and checkpoints": 0.0}

    def timed(part: str, function: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **options: object) -> object:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent[part] += time.perf_counter() - start

        return wrapper

    places = [
        (training._Rows, "__getitems__", "data"),
        (training._Session, "on_step_end", "log, evaluation and checkpoints"),
    ]
    originals = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, part in places:
        setattr(owner, name, timed(part, getattr(owner, name)))
    try:
        yield spent
    finally:
        for (owner, name, _), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


if __name__ == "__main__":
    main()

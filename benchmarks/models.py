"""Training speed against a bare PyTorch loop and against a loader that reads one token at a time; memory of loading.

A step is timed from its beginning to the next one's, so that data, logging and callbacks between steps count, and set-up
does not; the median over the steps is compared between contenders that take turns. `train` is stopped after the first
steps of a longer training, so that it logs as often as it does in one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.loading import loading_table
from mechhier.grammars import Corpus, DocumentGrammar
from mechhier.models import ModelSpec, TrainSpec, train, training

STEPS, WARMING_UP, ROUNDS = 40, 5, 4
TRAINING_STEPS = 800
"""Of the training whose first `STEPS` are timed."""
SIZES = {
    "tiny: 2 layers, d_model 64, 32 rows of 96": (ModelSpec(preset="tiny"), 96, 32),
    "4 layers, d_model 128, 8 rows of 256": (ModelSpec("llama", n_layers=4, d_model=128, n_heads=4), 256, 8),
}


def main() -> None:
    """Print a table for each size, and that of loading."""
    torch.set_num_threads(1)
    for name, (spec, context, batch) in SIZES.items():
        measure(name, spec, DocumentGrammar(context=context).corpus(STEPS * batch * context), batch)
    compare_loaders()
    Console().print(loading_table())


def measure(name: str, spec: ModelSpec, corpus: Corpus, batch: int) -> None:
    """Time the three contenders and print tokens per second and ratios, and what data and logging take of `train`."""
    rows = torch.as_tensor(corpus.rows(0, corpus.n_rows))
    flat = corpus.rows(0, corpus.n_rows).astype(np.uint16).ravel()
    fresh = count()

    def loop(batches: Iterator[Tensor]) -> list[float]:
        model = spec.build(vocab_size=corpus.grammar.vocab_size, eos_token_id=0, n_ctx=corpus.context)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        beginnings = []
        for tokens in batches:
            beginnings.append(time.perf_counter())
            logits = model(tokens).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return beginnings

    with tempfile.TemporaryDirectory() as folder:

        def trained() -> list[float]:
            settings = TrainSpec(steps=TRAINING_STEPS, batch_size=batch, n_checkpoints=2, warmup_steps=1, eval_rows=2)
            with timed_parts(stop_after=STEPS) as parts, suppress(EnoughError):
                train(spec, corpus, Path(folder) / str(next(fresh)), train=settings)
            spent.append(parts)
            return parts.beginnings

        spent: list[Parts] = []
        contenders: dict[str, Callable[[], list[float]]] = {
            "bare loop, data in memory": lambda: loop(iter(rows.split(batch))),
            "train": trained,
            "bare loop, one token per Python step": lambda: loop(one_token_at_a_time(flat, corpus.context, batch)),
        }
        seconds: dict[str, list[float]] = {who: [] for who in contenders}
        for _ in range(ROUNDS):
            for who, run in contenders.items():
                seconds[who].append(float(np.median(np.diff(run()[WARMING_UP:]))))
    baseline = np.array(seconds["bare loop, data in memory"])
    table = Table(title=f"{name}, one thread, {ROUNDS} rounds of {STEPS} steps")
    for column in ("", "ms a step", "tokens/s", "of the bare loop's", "lowest to highest round"):
        table.add_column(column)
    for who, values in seconds.items():
        ratio = baseline / values
        speed = f"{batch * corpus.context / np.median(values):,.0f}"
        spread = f"{ratio.min():.3f} to {ratio.max():.3f}"
        table.add_row(who, f"{1000 * np.median(values):.1f}", speed, f"{np.median(ratio):.3f}", spread)
    Console().print(table)
    step = STEPS * np.median(seconds["train"])
    data, log = (np.median([getattr(parts, part) for parts in spent]) / step for part in ("data", "log"))
    Console().print(f"of a step of `train`: reading data {100 * data:.2f} %, writing the log {100 * log:.2f} %\n")


def compare_loaders(context: int = 512, batch: int = 32) -> None:
    """Print the speed of reading batches without a model: text made as it is read, and one stored token at a time."""
    text = DocumentGrammar.paper().corpus(2**22, context=context)
    flat = text.rows(0, text.n_rows).astype(np.uint16).ravel()

    def tokens_per_second(read: Callable[[], object]) -> float:
        start = time.perf_counter()
        read()
        return text.n_tokens / (time.perf_counter() - start)

    def stream() -> None:
        fresh = DocumentGrammar.paper().corpus(2**22, context=context)
        for first in range(0, fresh.n_rows, batch):
            fresh.rows(first, first + batch)

    ours = tokens_per_second(stream)
    theirs = tokens_per_second(lambda: list(one_token_at_a_time(flat, context, batch)))
    Console().print(
        f"tokens/s of a loader alone: {ours:,.0f} made by the grammar and read in batches, {theirs:,.0f} stored and read one "
        f"token per Python step ({ours / theirs:.1f} x)\n"
    )


def one_token_at_a_time(flat: np.ndarray, context: int, batch: int) -> Iterator[Tensor]:
    """Batches from a loader that takes one token per Python step, as the paper's released one does."""
    rows: list[list[int]] = []
    row: list[int] = []
    for token in flat:
        row.append(int(token))
        if len(row) == context:
            rows.append(row)
            row = []
        if len(rows) == batch:
            yield torch.tensor(rows)
            rows = []


class EnoughError(Exception):
    """Stops a training that has been watched for long enough."""


class Parts:
    """When the steps of a training began, and the seconds it spent on reading data and on writing its log."""

    def __init__(self) -> None:
        self.beginnings: list[float] = []
        self.data = 0.0
        self.log = 0.0


@contextmanager
def timed_parts(*, stop_after: int | None = None) -> Iterator[Parts]:
    """Watch the training that runs meanwhile; with `stop_after`, raise `EnoughError` in it when so many steps are done."""
    parts = Parts()

    def timed(part: str, function: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **options: object) -> object:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                setattr(parts, part, getattr(parts, part) + time.perf_counter() - start)

        return wrapper

    def noted(function: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **options: object) -> object:
            parts.beginnings.append(time.perf_counter())
            if len(parts.beginnings) == stop_after:
                raise EnoughError
            return function(*args, **options)

        return wrapper

    rows, trainer, session = training._Rows, training._Trainer, training._Session
    originals = rows.__getitems__, trainer.training_step, session._log_line
    rows.__getitems__ = timed("data", originals[0])  # pyright: ignore[reportAttributeAccessIssue]
    trainer.training_step = noted(originals[1])  # pyright: ignore[reportAttributeAccessIssue]
    session._log_line = timed("log", originals[2])  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield parts
    finally:
        rows.__getitems__, trainer.training_step, session._log_line = originals


if __name__ == "__main__":
    main()

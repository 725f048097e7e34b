"""Milliseconds per training step of `train` and of a bare PyTorch loop on the same model and rows."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from benchmarks.timing import interleaved, report
from mechhier.grammars import DocumentGrammar
from mechhier.models import ModelSpec, TrainSpec, train

STEPS, BATCH, CONTEXT = 60, 32, 96


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    grammar = DocumentGrammar(n_words=16, n_connectors=5, lexicon=8, binding=1.0, p_chain=1.0, context=CONTEXT)
    corpus = grammar.corpus(STEPS * BATCH * CONTEXT)
    spec = ModelSpec("llama", n_layers=2, d_model=64, n_heads=4)
    settings = TrainSpec(steps=STEPS, batch_size=BATCH, n_checkpoints=2, warmup_steps=10, eval_rows=1)
    rows = torch.as_tensor(corpus.rows(0, STEPS * BATCH))

    def bare() -> None:
        model = spec.build(vocab_size=grammar.vocab_size, eos_token_id=grammar.eos_token_id, n_ctx=CONTEXT)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
        for batch in rows.split(BATCH):
            logits = model(batch).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        runs = iter(range(1000))
        seconds = interleaved(
            {"bare loop": bare, "train": lambda: train(spec, corpus, Path(folder) / str(next(runs)), train=settings)},
            rounds=3,
        )
    per_step = {name: f"{1000 * min(values) / STEPS:.1f} ms a step, fastest round" for name, values in seconds.items()}
    report(
        f"{STEPS} steps of 32 x 96 tokens, set-up and checkpoints included",
        seconds,
        baseline="bare loop",
        work=per_step,
    )


if __name__ == "__main__":
    main()

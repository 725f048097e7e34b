"""The paper's training on one GPU: its model, corpus and batch. `python -m benchmarks.gpu`; minutes, no network."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.models import timed_parts
from mechhier.grammars import DocumentGrammar
from mechhier.models import ModelSpec, TrainSpec, train

PAPER_STEPS = 38_600
PAPER_ROWS = 496
"""Rows of 512 tokens: 253,952 tokens a step."""
SHORT, LONG = 20, 120

# Dense bfloat16 of the data sheets, FLOP/s, by a part of the device's name.
DATA_SHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def main(accumulation: int = 1) -> None:
    """Print the table.

    Args:
        accumulation: Parts of a step, for a GPU with less memory.
    """
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: nothing was measured")
    name = torch.cuda.get_device_name()
    peak = matrix_product_speed()
    torch.cuda.reset_peak_memory_stats()
    seconds, flops, data_share = measure(rows=PAPER_ROWS, short=SHORT, long=LONG, accumulation=accumulation)
    tokens = PAPER_ROWS * 512
    table = Table("", name, title=f"The paper's training, {tokens:,} tokens a step in {accumulation} parts")
    table.add_row("seconds a step", f"{seconds:.4f}")
    table.add_row("tokens/s", f"{tokens / seconds:,.0f}")
    table.add_row("reading data, share of the wall time", f"{100 * data_share:.2f} %")
    table.add_row("model TFLOP/s", f"{flops * tokens / seconds / 1e12:.1f}")
    table.add_row("share of a large bfloat16 matrix product's speed", f"{100 * flops * tokens / seconds / peak:.1f} %")
    for part, speed in DATA_SHEET.items():
        if part in name:
            table.add_row("model FLOPs utilisation (data sheet)", f"{100 * flops * tokens / seconds / speed:.1f} %")
    table.add_row("peak memory", f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    table.add_row(f"{PAPER_STEPS:,} steps", f"{PAPER_STEPS * seconds / 3600:.2f} h")
    Console().print(table)


def measure(*, rows: int, short: int, long: int, accumulation: int) -> tuple[float, float, float]:
    """Train the paper's model for few and for many steps on its document language.

    Returns:
        Seconds a step, from the difference of the two, so that compiling and set-up cancel; floating-point operations
        of a token, forward and backward; share of the longer training's wall time that reading data took.
    """
    spec, grammar = ModelSpec(preset="paper"), DocumentGrammar.paper()
    corpus = grammar.corpus(long * rows * 512, context=512)
    with tempfile.TemporaryDirectory() as folder:

        def trained(steps: int) -> float:
            settings = TrainSpec(
                steps=steps,
                batch_size=rows,
                gradient_accumulation=accumulation,
                warmup_steps=1,
                n_checkpoints=2,
                eval_rows=2,
            )
            start = time.perf_counter()
            train(spec, corpus, Path(folder) / str(time.monotonic_ns()), train=settings)
            return time.perf_counter() - start

        trained(short)  # compiles the kernels, which the next two find in the cache
        few = trained(short)
        with timed_parts() as parts:
            many = trained(long)
    return (many - few) / (long - short), flops_per_token(spec, grammar.vocab_size, context=512), parts.data / many


def flops_per_token(spec: ModelSpec, vocab_size: int, *, context: int) -> float:
    """Floating-point operations of one token, forward and backward, by Chowdhery et al. 2022 (PaLM), appendix B.

    Six for each weight that multiplies (all but the token embedding), and 12 x layers x d_model x context for scores
    and values; causal masking saves nothing in this count.
    """
    multiplying = spec.n_parameters(vocab_size) - vocab_size * spec.d_model
    return 6.0 * multiplying + 12.0 * spec.n_layers * spec.d_model * context


def matrix_product_speed(size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a large bfloat16 matrix product on the GPU: what the device gives at best in practice."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(left, right)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        torch.mm(left, right)
    torch.cuda.synchronize()
    return repeats * 2 * size**3 / (time.perf_counter() - start)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

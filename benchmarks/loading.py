"""Peak memory of `load_model` over the weights in the wanted dtype, each case in a process of its own. Linux only.

Two figures a case, both the growth from just before the load, after a small model was loaded the same way (so that
imports do not count):

- `own`: the peak of the memory that is the process's own (RssAnon), looked at every millisecond by the parent. This is
  what must fit into the machine.
- `resident`: the peak of all resident pages (VmHWM, kept by the kernel, so exact). It also counts pages of the weight
  files, which the kernel shares between processes and takes back when memory is short. Weights that are wanted in the
  files' own dtype stay in such pages.

The model's context is short for its width, so that the rotary tables of HookedTransformer (2 x layers x context x head
width numbers) weigh against the weights about as they do in OLMo-1B, 1 to 2 %.
"""

from __future__ import annotations

import gc
import json
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

SIZES = {
    "vocab_size": 16_384,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
TINY = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BYTES = {"bfloat16": 2, "float32": 4}
TARGET = 1.2


@dataclass(frozen=True)
class PeakMemory:
    """What one load needs at its peak beyond what was there before, in bytes."""

    own: int
    resident: int
    seconds: float


def save_models(folder: Path) -> int:
    """Write a Llama of random float32 weights in one file and in shards, and a tiny one; return its number of weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mechhier.models.quiet import quiet_transformers

    model = LlamaForCausalLM(LlamaConfig.from_dict(SIZES))
    with quiet_transformers():
        model.save_pretrained(folder / "single", max_shard_size="10GB")
        model.save_pretrained(folder / "sharded", max_shard_size="50MB")
        LlamaForCausalLM(LlamaConfig.from_dict(TINY)).save_pretrained(folder / "tiny")
    return model.num_parameters()


def peak_memory(folder: Path, files: str, dtype: str, model_class: str) -> PeakMemory:
    """Load one of the models that `save_models` wrote, in a fresh process, and watch that process's memory."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.loading", str(folder), files, dtype, model_class]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()  # it is ready
        before = _memory(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        own = 0
        while not select.select([child.stdout], [], [], 0.001)[0]:
            own = max(own, _memory(child.pid)["RssAnon"])
        after = _memory(child.pid)
        seconds = json.loads(child.stdout.readline())
    return PeakMemory(
        own=max(own, after["RssAnon"]) - before["RssAnon"],
        resident=after["VmHWM"] - before["VmRSS"],
        seconds=seconds,
    )


def loading_table(model_classes: tuple[str, ...] = ("hooked", "bridge")) -> Table:
    """Measure every case: weights in one file or in several, in half of the files' precision or in the same."""
    cases = list(product(("single", "sharded"), BYTES, model_classes))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_weights = save_models(folder)
        table = Table(
            title=f"load_model of {n_weights / 1e6:.0f} million float32 weights: peak memory over the weights in the "
            f"wanted dtype (own at most {TARGET})"
        )
        for column in ("files", "dtype", "class", "weights MB", "own MB", "own", "resident", "seconds"):
            table.add_column(column, justify="right")
        for files, dtype, model_class in track(cases, "one process a case", transient=True):
            peak = peak_memory(folder, files, dtype, model_class)
            weights = n_weights * BYTES[dtype]
            megabytes = f"{weights / 1e6:.0f}", f"{peak.own / 1e6:.0f}"
            ratios = f"{peak.own / weights:.2f}", f"{peak.resident / weights:.2f}"
            table.add_row(files, dtype, model_class, *megabytes, *ratios, f"{peak.seconds:.1f}")
    return table


def _memory(pid: int) -> dict[str, int]:
    """VmRSS, VmHWM, RssAnon of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM", "RssAnon")}


def _load_and_report(folder: Path, files: str, dtype: str, model_class: Any) -> None:
    """The child's part: say when ready, wait to be watched, load, say how long it took, wait to be released."""
    import torch

    from mechhier.models import load_model

    torch.set_num_threads(1)
    load_model(folder / "tiny", as_=model_class, dtype=dtype)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    _say("ready")
    sys.stdin.readline()
    start = time.perf_counter()
    model = load_model(folder / files, as_=model_class, dtype=dtype)
    _say(time.perf_counter() - start)
    sys.stdin.readline()
    del model


def _say(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Print the table."""
    Console().print(loading_table())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _load_and_report(Path(sys.argv[1]), *sys.argv[2:])
    else:
        main()

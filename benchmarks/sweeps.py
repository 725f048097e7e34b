"""A sweep with nothing to do, beside what xarray's own engine takes to read the same files: `python -m benchmarks.sweeps`."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import xarray as xr

import mechhier as mh
from benchmarks.timing import interleaved, report
from mechhier.progress import quiet

PHENOMENA = {
    "induction": {"n_sequences": 4},
    "hydra": {"n_sequences": 6, "n_patches": 3, "min_probability": 0.0},
    "published": {"n_sequences": 4},
}


def measured_run(folder: Path) -> mh.Run:
    """Train a tiny run of a few checkpoints and measure all of them."""
    grammar = mh.grammars.DocumentGrammar(n_words=9, n_connectors=2, lexicon=4, binding=1.0, context=40)
    spec = mh.TrainSpec(steps=12, warmup_steps=1, n_checkpoints=8, batch_size=4, eval_rows=4)
    run = mh.train(mh.ModelSpec("llama", n_layers=2, d_model=16, n_heads=2), grammar.corpus(3000), folder, train=spec)
    mh.sweep(run, PHENOMENA)
    return run


def main() -> None:
    """Print seconds of both, and of one file."""
    warnings.simplefilter("ignore")  # so few sequences leave intervals undefined
    with tempfile.TemporaryDirectory() as folder, quiet():
        run = measured_run(Path(folder) / "run")
        files = sorted((run.path / "results").rglob("*.nc"))

        def read() -> list[xr.Dataset]:
            return [xr.load_dataset(path, engine="h5netcdf") for path in files]

        seconds = interleaved({"xarray reads the files": read, "sweep": lambda: mh.sweep(run, PHENOMENA)}, rounds=5)
    work = {"sweep": f"{seconds['sweep'].min() / len(files):.3f} s a file"}
    report(f"Nothing to do: {len(files)} files", seconds, baseline="xarray reads the files", work=work)


if __name__ == "__main__":
    main()

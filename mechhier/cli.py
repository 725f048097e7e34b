"""The command line: `mechhier run SPEC`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_console = Console(stderr=True, soft_wrap=True)


@app.callback()
def main() -> None:
    """Grammars with known structure, transformers trained on them, and one probe suite for their circuits."""


@app.command()
def run(
    spec: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged experiment such as 'demo'.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; default: results/<name of the spec>.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core.")] = None,
) -> None:
    """Carry out an experiment: corpora, training, measurements, report. The same command goes on where it stopped."""
    from mechhier.experiments import Experiment, ExperimentError

    try:
        experiment = Experiment.read(spec)
    except ExperimentError as error:
        _console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
    # Threads that wait must not spin: on a machine that does something else too, spinning makes two slower than one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    out = out or Path("results") / Path(spec).stem
    _console.print(f"{experiment.title}: {len(experiment.arms)} arms, results in {out}", markup=False, highlight=False)
    try:
        report = experiment.run(out)
    except KeyboardInterrupt:
        _console.print("Stopped. The same command goes on from here.", style="yellow")
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        _console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    _console.print(f"Report: {report}", markup=False, highlight=False)


if __name__ == "__main__":
    app()

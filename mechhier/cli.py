"""The command line: `mechhier run SPEC`, `mechhier train SPEC`, `mechhier corpus SPEC`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mechhier.progress import announce
from mechhier.specs import Spec, SpecError, read_spec

if TYPE_CHECKING:
    from mechhier.experiments import Experiment

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_console = Console(stderr=True, soft_wrap=True)

SpecName = Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged experiment such as 'demo'.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the results; default: results/<name of the spec>.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core.")]


@app.callback()
def main() -> None:
    """Grammars with known structure, transformers trained on them, and one probe suite for their circuits."""


@app.command()
def run(spec: SpecName, out: Out = None, threads: Threads = None) -> None:
    """Carry out an experiment: corpora, training, measurements, report. The same command goes on where it stopped."""
    experiment, out = _experiment(spec, out, threads)
    with _reported_errors():
        report = experiment.run(out)
    announce(f"Report: {report}")


@app.command()
def train(
    spec: SpecName,
    out: Out = None,
    only: Annotated[
        str | None, typer.Option(help="The one training to do: an arm, or with several seeds <arm>_seed<seed>.")
    ] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(help="Where else to log: tensorboard (in the run's folder), wandb, ...")
    ] = None,
    threads: Threads = None,
) -> None:
    """Do an experiment's trainings, without measurements; `run` goes on from there. Works under `accelerate launch`."""
    experiment, out = _experiment(spec, out, threads)
    with _reported_errors():
        for run in experiment.train(out, only=only, report_to=report_to or ()).values():
            announce(f"Trained: {run.path}")


@app.command()
def corpus(
    spec: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged corpus such as 'cfg3'.")],
    out: Annotated[Path | None, typer.Option(help="Folder to store the corpus in; default: it is only shown.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that generate blocks.")] = 1,
) -> None:
    """Show a corpus (sentences, a tree, frequencies, floors), and store it. The same command goes on where it stopped."""
    from mechhier.grammars.corpus import CorpusSpec
    from mechhier.grammars.preview import preview

    described = _read(CorpusSpec, spec, package="mechhier.grammars.corpora")
    with _reported_errors():
        streamed = described.corpus()
        page = Console()
        for part in preview(streamed):
            page.print(part)
        if out is not None:
            streamed.save(out, workers=workers)
            announce(f"Corpus: {out}")


def _experiment(spec: str, out: Path | None, threads: int | None) -> tuple[Experiment, Path]:
    """The experiment that a spec describes, and the folder of its results."""
    from mechhier.experiments import Experiment

    experiment = _read(Experiment, spec, package="mechhier.experiments")
    # Threads that wait must not spin: on a machine that does something else too, spinning makes two slower than one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    out = out or Path("results") / Path(spec).stem
    n_trainings = len(experiment.trainings)
    announce(f"{experiment.title}: {n_trainings} trainings, results in {out}")
    return experiment, out


def _read(model: type[Spec], source: str, *, package: str) -> Spec:
    try:
        return read_spec(model, source, package=package)
    except SpecError as error:
        _console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error


@contextmanager
def _reported_errors() -> Iterator[None]:
    """Say what was wrong in one line, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        _console.print("Stopped. The same command goes on from here.", style="yellow")
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        _console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()

"""The command line: `mechhier run SPEC`, `mechhier train SPEC`, `mechhier corpus SPEC`."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from mechhier.files import absolute
from mechhier.progress import announce, quiet, write
from mechhier.specs import SpecError, read_spec

if TYPE_CHECKING:
    from mechhier.experiments import Experiment

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

SpecName = Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged experiment such as 'demo'.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the results; default: results/<name of the spec>.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Neither progress nor announcements; errors and warnings stay.")]


@app.callback()
def main() -> None:
    """Grammars with known structure, transformers trained on them, and one probe suite for their circuits.

    Exit codes: 0 all is done; 1 an error, which is said; 2 the command line or the spec is wrong; 3 some measurements failed,
    the others are there; 130 and 143 stopped by Ctrl-C and by SIGTERM: the same command goes on from there.
    """


@app.command()
def run(spec: SpecName, out: Out = None, threads: Threads = None, quiet: Quiet = False) -> None:
    """Carry out an experiment: corpora, training, measurements, report. The same command goes on where it stopped."""
    with _command(quiet):
        experiment, out = _experiment(spec, out, threads)
        from mechhier import results
        from mechhier.experiments.experiment import RESULTS
        from mechhier.sweeps import SweepWarning, failures

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SweepWarning)  # said below
            report = experiment.run(out)
        announce(f"Report: {report}")
        if failed := failures(results.load(out / RESULTS)):
            listed = "\n".join(f"  {failure}" for failure in failed)
            write(f"{len(failed)} measurements failed; the same command tries them again:\n{listed}", style="red")
            raise typer.Exit(3)


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
    quiet: Quiet = False,
) -> None:
    """Do an experiment's trainings, without measurements; `run` goes on from there. Works under `accelerate launch`."""
    with _command(quiet):
        experiment, out = _experiment(spec, out, threads)
        for run in experiment.train(out, only=only, report_to=report_to or ()).values():
            announce(f"Trained: {run.path}")


@app.command()
def corpus(
    spec: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged corpus such as 'cfg3'.")],
    out: Annotated[Path | None, typer.Option(help="Folder to store the corpus in; default: it is only shown.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that generate blocks.")] = 1,
    quiet: Quiet = False,
) -> None:
    """Show a corpus (sentences, a tree, frequencies, floors), and store it. The same command goes on where it stopped."""
    with _command(quiet):
        from mechhier.grammars.corpus import CorpusSpec
        from mechhier.grammars.preview import preview

        streamed = read_spec(CorpusSpec, spec, package="mechhier.grammars.corpora").corpus()
        page = Console()
        for part in preview(streamed):
            page.print(part)
        if out is not None:
            out = absolute(out)
            streamed.save(out, workers=workers)
            announce(f"Corpus: {out}")


def _experiment(spec: str, out: Path | None, threads: int | None) -> tuple[Experiment, Path]:
    """The experiment that a spec describes, and the folder of its results."""
    from mechhier.experiments import Experiment

    experiment = read_spec(Experiment, spec, package="mechhier.experiments")
    # Threads that wait must not spin: on a machine that does something else too, spinning makes two slower than one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    out = absolute(out or Path("results") / Path(spec).stem)
    n_trainings = len(experiment.trainings)
    announce(f"{experiment.title}: {n_trainings} trainings, results in {out}")
    return experiment, out


class _Terminated(SystemExit):
    """SIGTERM; like Ctrl-C it unwinds, so that what is open is closed."""


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    # A second one must not cut short what is being closed.
    signal.signal(number, signal.SIG_IGN)
    raise _Terminated


@contextmanager
def _command(is_quiet: bool) -> Iterator[None]:
    """A command's work: what goes wrong is said without a traceback, and what stops it has an exit code."""
    # Only the main thread may set handlers.
    handled = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if handled else None
    try:
        with quiet() if is_quiet else nullcontext(), warnings.catch_warnings():
            # In a line, like all else, without the place in the program.
            warnings.showwarning = lambda message, *_, **__: write(str(message), style="yellow")
            yield
    except (KeyboardInterrupt, _Terminated) as stop:
        write("Stopped. The same command goes on from here.", style="yellow")
        raise typer.Exit(143 if isinstance(stop, _Terminated) else 130) from None
    except (typer.Exit, typer.Abort):
        raise
    except SpecError as error:
        raise _failed(error, code=2) from error
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        raise _failed(error, code=1) from error
    finally:
        if handled:
            # None is a handler that was not set from Python, and cannot be set again.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _failed(error: Exception, *, code: int) -> typer.Exit:
    """Say what went wrong; returns the end of the command."""
    write(_said(error), style="red")
    return typer.Exit(code)


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if str(error).strip():
        return str(error)
    return "Out of memory" if isinstance(error, MemoryError) else f"Stopped by {type(error).__name__}"


if __name__ == "__main__":
    app()

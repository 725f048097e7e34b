"""What the faults are done to: a whole `mechhier run` and `Corpus.save`, each tiny, each in a process of its own.

The processes are forked from one that has imported everything (multiprocessing's fork server), so that one costs the
work and not ten seconds of imports. Each works in `./out` of a folder of its own; so all are told of the same paths, and
what they leave can be compared byte by byte.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import yaml

OUT = "out"
SPEC = "experiment.yaml"
EXPERIMENT = {
    "title": "Faults",
    "arms": {
        "pool": {
            "title": "A table",
            "about": "A table of n-grams.",
            "grammar": {"kind": "ngram", "n_tokens": 20, "context": 40},
            "train": {"steps": 8, "warmup_steps": 1, "n_checkpoints": 3, "batch_size": 2, "eval_rows": 2},
        }
    },
    "model": {"architecture": "llama", "n_layers": 1, "d_model": 8, "n_heads": 1},
    "phenomena": {"published": {"n_sequences": 8}},
}
_SECONDS = 120
_LINES = 8
_NOT_FOR_USERS = ("Traceback", "Exception ignored", "https://")
_ANNOUNCED = re.compile(r"^(Faults|out/pool/run: llama|Trained|Report|Corpus)\b.*\n", re.MULTILINE)


def whole_run() -> None:
    """`mechhier run` of the tiny experiment."""
    _command("run")


def trainings() -> None:
    """`mechhier train` of the tiny experiment."""
    _command("train")


def one_training() -> None:
    """The training of the tiny experiment by itself, which the command above does under a lock on all of the folder."""
    from mechhier.experiments import Experiment
    from mechhier.models import train

    experiment = Experiment.read(SPEC)
    training = experiment.trainings["pool"]
    train(experiment.model, training.corpus(), f"{OUT}/pool/run", train=training.arm.train, arm=training.arm_name)


def _command(name: str) -> None:
    from mechhier.cli import app

    app([name, SPEC, "--out", OUT])


def write_spec(folder: Path) -> None:
    """Write the tiny experiment's spec, which the works read, into a folder that has none."""
    if not (folder / SPEC).exists():
        (folder / SPEC).write_text(yaml.safe_dump(EXPERIMENT))


def saved_corpus() -> None:
    """`Corpus.save`, with its errors said as the command line says them."""
    from mechhier.grammars import CorpusError, NGram

    try:
        NGram(n_tokens=50).corpus(700_000, context=64).save(OUT, workers=2)
    except (CorpusError, OSError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


class Disturbance(Protocol):
    """What is done to a process while it works."""

    def install(self) -> None:
        """Begin, in the process, just before its work."""


@dataclass(frozen=True)
class Ending:
    """How a process ended."""

    code: int
    """Its exit code; of one that a signal ended, the signal's negative number."""
    said: str

    @property
    def was_orderly(self) -> bool:
        """Whether it ended by itself and, where it failed, said so in few lines that name a file and quote no library."""
        if self.code < 0 or any(words in self.said for words in _NOT_FOR_USERS):
            return False
        complaint = _ANNOUNCED.sub("", self.said)
        return self.code == 0 or (re.search(rf"\b{OUT}\b", complaint) is not None and complaint.count("\n") <= _LINES)


class Worker:
    """A process that does one work in a folder.

    Args:
        work: A function of this module.
        folder: Where; made if absent.
        disturbance: What is done to it meanwhile.
    """

    def __init__(self, work: Callable[[], None], folder: Path, disturbance: Disturbance | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_spec(folder)
        # A pipe, because a file could be full like any other.
        self.said, says = multiprocessing.Pipe(duplex=False)
        self.process = _server().Process(target=_work, args=(work, folder, says, disturbance))
        self.process.start()
        says.close()

    def ending(self) -> Ending:
        """Wait for its end."""
        said = b""
        while wait([self.said], _SECONDS) and (part := os.read(self.said.fileno(), 2**16)):
            said += part
        self.process.join(_SECONDS)
        assert self.process.exitcode is not None, f"it hangs: {said!r}"
        return Ending(self.process.exitcode, said.decode(errors="replace"))


def do(work: Callable[[], None], folder: Path, disturbance: Disturbance | None = None) -> Ending:
    """Do a work in a process of its own, and wait for its end."""
    return Worker(work, folder, disturbance).ending()


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file in a folder, but for locks, by its path there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def _work(work: Callable[[], None], folder: Path, says: Connection, disturbance: Disturbance | None) -> None:
    os.chdir(folder)
    for standard in (sys.stdout, sys.stderr):
        standard.flush()
        os.dup2(says.fileno(), standard.fileno())
    says.close()
    if disturbance is not None:
        disturbance.install()
    work()


@cache
def _server() -> Any:
    """The process from which all others are forked; started by the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults.imports"])
    paths = [*map(str, (Path(__file__).parents[1], Path(__file__).parents[2])), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ["OMP_NUM_THREADS"] = "1"
    return context

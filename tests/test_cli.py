"""How commands end: a code and words for whatever happens, and nothing left changed."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import xarray as xr
from typer.testing import CliRunner, Result

from mechhier import cli, results
from mechhier.grammars.corpus import Corpus
from mechhier.models.errors import CapabilityError
from mechhier.models.training import TrainingError

SPEC = "grammar: {kind: ngram, n_tokens: 50, context: 64}\ntokens: 1000\n"
STOPPED = "Stopped. The same command goes on from here."


def corpus(folder: Path, *options: str) -> Result:
    (folder / "text.yaml").write_text(SPEC)
    return CliRunner().invoke(cli.app, ["corpus", str(folder / "text.yaml"), "--out", str(folder / "out"), *options])


def ended_by(error: BaseException, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Result:
    def save(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Corpus, "save", save)
    return corpus(folder)


def test_help_lists_the_exit_codes_and_quiet() -> None:
    said = " ".join(CliRunner().invoke(cli.app, ["--help"]).output.split())
    codes = re.search(
        r"Exit codes: 0 .*; 1 .*error.*; 2 .*spec.*; 3 .*measurements.*; 130 and 143 .*Ctrl-C and by SIGTERM", said
    )
    assert codes, said
    for command in ("run", "train", "corpus"):
        assert "--quiet" in CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "120"}).output


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("not so"), "not so"),
        (TrainingError("diverged"), "diverged"),
        (CapabilityError("no such site"), "no such site"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/block"), f"out/block: {os.strerror(errno.ENOSPC)}"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), os.strerror(errno.EIO)),
        (OSError("of another kind"), "of another kind"),
        (RuntimeError("terms do not add up"), "terms do not add up"),
        (RuntimeError(), "Stopped by RuntimeError"),
        (MemoryError(), "Out of memory"),
        (ValueError("\x1b[2J\u202etxt [red]x[/red] :boom:"), r"\x1b[2J\u202etxt [red]x[/red] :boom:"),
    ],
)
def test_an_error_is_one_line_and_code_1(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ending = ended_by(error, monkeypatch, tmp_path)
    assert (ending.exit_code, ending.stderr) == (1, said + "\n")


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = AttributeError("a slip")
    assert ended_by(error, monkeypatch, tmp_path).exception is error


def test_a_wrong_spec_is_code_2(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("grammar: {kind: ngrm}\nn_tokens: 10\n")
    for command in ("run", "train", "corpus"):
        ending = CliRunner().invoke(cli.app, [command, str(tmp_path / "wrong.yaml")])
        assert ending.exit_code == 2
        assert "Traceback" not in ending.stderr
        assert "wrong.yaml" in ending.stderr


def test_ctrl_c_is_code_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ending = ended_by(KeyboardInterrupt(), monkeypatch, tmp_path)
    assert (ending.exit_code, ending.stderr) == (130, STOPPED + "\n")


@pytest.mark.parametrize("at", ["mechhier.grammars.preview.preview", "mechhier.grammars.corpus.Corpus.save"])
def test_sigterm_unwinds_and_is_code_143(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: str) -> None:
    closed = []

    def killed(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # a second one does not cut this short
            closed.append(at)

    monkeypatch.setattr(at, killed)
    before = signal.getsignal(signal.SIGTERM)
    ending = corpus(tmp_path)
    assert (ending.exit_code, ending.stderr, closed) == (143, STOPPED + "\n", [at])
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_handler_is_restored_and_another_thread_needs_none(tmp_path: Path) -> None:
    before, endings = signal.getsignal(signal.SIGTERM), []
    assert corpus(tmp_path).exit_code == 0
    assert signal.getsignal(signal.SIGTERM) is before
    thread = threading.Thread(target=lambda: endings.append(corpus(tmp_path)))
    thread.start()
    thread.join()
    assert endings[0].exit_code == 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without a signal")
def test_a_terminated_process_says_so(tmp_path: Path) -> None:
    (tmp_path / "text.yaml").write_text(SPEC.replace("1000", "1e9"))
    command = [
        sys.executable,
        "-m",
        "mechhier.cli",
        "corpus",
        str(tmp_path / "text.yaml"),
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out").exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    said = process.communicate()[1]
    assert (process.returncode, said) == (143, STOPPED + "\n")


def test_quiet_says_nothing_but_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loud, calm = corpus(tmp_path), corpus(tmp_path, "--quiet")
    assert loud.stderr == f"Corpus: {tmp_path / 'out'}\n"
    assert (calm.exit_code, calm.stderr, calm.stdout) == (0, "", loud.stdout)

    def save(*_: object, **__: object) -> None:
        raise ValueError("not so")

    monkeypatch.setattr(Corpus, "save", save)
    failed = corpus(tmp_path, "--quiet")
    assert (failed.exit_code, failed.stderr) == (1, "not so\n")


def test_a_warning_is_said_in_a_line_without_a_place_in_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(*_, **__):
        warnings.warn("2 of 3 measurements hold NaN\x1b[2J", results.MeasurementWarning, stacklevel=1)
        return {}

    monkeypatch.setattr("mechhier.experiments.Experiment.train", warned)
    said = CliRunner().invoke(cli.app, ["train", "demo", "--quiet"])
    assert said.exit_code == 0
    assert said.output == "2 of 3 measurements hold NaN\\x1b[2J\n"


def _nothing_measured(seen: list[Path], out: Path) -> None:
    seen.append(out)
    results.save(xr.DataTree(), out / "results.nc")


def test_out_may_be_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    seen = []
    monkeypatch.setattr("mechhier.experiments.Experiment.run", lambda _, out: _nothing_measured(seen, out))
    monkeypatch.setattr("mechhier.experiments.Experiment.train", lambda _, out, **__: seen.append(out) or {})
    monkeypatch.setattr(Corpus, "save", lambda _, out, **__: seen.append(out))
    for command, spec in (("run", "demo"), ("train", "demo"), ("corpus", "cfg3")):
        assert CliRunner().invoke(cli.app, [command, spec, "--out", "~/results"]).exit_code == 0
    assert seen == [tmp_path / "results"] * 3

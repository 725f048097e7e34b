"""Killed at any moment, or by a power cut, or together with two others: nothing is lost, and the same command goes on."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from faults.calls import Kill
from faults.jobs import Job
from faults.power import Cut, disk_after
from faults.work import OUT, Worker, contents, do, one_training

TIMES = int(os.environ.get("FAULTS", "1"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n"), [("run", 8), ("save", 4)])
def test_killed_at_a_random_moment(jobs: dict[str, Job], tmp_path: Path, name: str, n: int) -> None:
    job, rng, found = jobs[name], random.Random(TIMES), []
    for number in range(n * TIMES):
        where, kill = job.begun(tmp_path / str(number)), rng.choice(SIGNALS)
        worker = Worker(job.work, where)
        time.sleep(rng.random() * job.seconds)
        if worker.process.is_alive() and worker.process.pid:
            os.kill(worker.process.pid, kill)
        worker.ending()
        if trouble := job.wrong_after_going_on(where):
            found.append(f"{kill.name}: {trouble}")
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n"), [("train", 8), ("measure", 4), ("save", 8)])
def test_killed_at_a_call(jobs: dict[str, Job], tmp_path: Path, name: str, n: int) -> None:
    job, rng, found = jobs[name], random.Random(TIMES), []
    for number in range(n * TIMES):
        where, kill = tmp_path / str(number), rng.choice(SIGNALS)
        ending = job.after(where, Kill(rng.randrange(len(job.calls)), kill))
        if kill == signal.SIGINT and ending.code not in (0, 130):
            found.append(f"{kill.name} ended with {ending.code}: {ending.said}")
        if trouble := job.wrong_after_going_on(where):
            found.append(f"{kill.name}: {trouble}")
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n"), [("train", 20), ("measure", 8), ("save", 12)])
def test_a_power_cut(jobs: dict[str, Job], tmp_path: Path, name: str, n: int) -> None:
    """One half of the cuts at any call, the others just before the calls that make something count."""
    job, rng, found = jobs[name], random.Random(TIMES), []
    counting = [number for number, call in enumerate(job.calls) if call.name in ("rename", "unlink", "rmdir")]
    for number in range(n * TIMES):
        where, after = tmp_path / f"{number}", tmp_path / f"{number}-after"
        call = rng.choice(counting) if number % 2 else rng.randrange(len(job.calls))
        job.after(where, Cut(call))
        survival = (0.0, 0.5, 1.0)[number % 3]
        disk_after(where, after, seed=number, survival=survival)
        left = sorted(contents(after / OUT)) if (after / OUT).exists() else []
        if trouble := job.wrong_after_going_on(after):
            found.append(f"at {job.calls[call][:2]}, survival {survival}: {trouble}\n  from {left}")
    assert not found, f"{len(found)} of {n * TIMES}:\n" + "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "measure", "save"])
def test_what_is_finished_outlasts_a_power_cut(jobs: dict[str, Job], tmp_path: Path, name: str) -> None:
    job = jobs[name]
    assert job.after(tmp_path / "whole", Cut()).code == 0
    disk_after(tmp_path / "whole", tmp_path / "after", seed=0, survival=0.0)
    # What was removed may be there again: the same command removes it.
    assert job.contents.items() <= contents(tmp_path / "after" / OUT).items()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "train", "measure", "save"])
def test_three_processes_at_once(jobs: dict[str, Job], tmp_path: Path, name: str) -> None:
    job = jobs[name]
    for number in range(2 * TIMES):
        where = job.begun(tmp_path / str(number))
        endings = [worker.ending() for worker in [Worker(job.work, where) for _ in range(3)]]
        assert 0 in [ending.code for ending in endings]
        assert all(ending.was_orderly for ending in endings), endings
        assert {ending.code for ending in endings} <= {0, 1}, endings
        assert job.wrong_in(where) == ""
        assert job.wrong_after_going_on(where) == ""


class TrainingIsWrong:
    """Makes training a failure."""

    def install(self) -> None:
        """Break the Trainer."""
        from transformers import Trainer

        def train(*_, **__):
            raise AssertionError("it trains again")

        Trainer.train = train


class FinishedMeanwhile(TrainingIsWrong):
    """Another process does all the work before this one has the lock."""

    def install(self) -> None:
        """Wait for the other at the lock."""
        import filelock

        acquire = filelock.FileLock.acquire

        def acquire_later(lock, *args, **keywords):
            filelock.FileLock.acquire = acquire
            child = os.fork()
            if child == 0:
                try:
                    one_training()
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            super(FinishedMeanwhile, self).install()
            return acquire(lock, *args, **keywords)

        filelock.FileLock.acquire = acquire_later


@pytest.mark.slow
def test_a_finished_training_is_not_done_again_by_three_at_once(jobs: dict[str, Job], tmp_path: Path) -> None:
    job = jobs["train"]
    where = Job(job.work, job.done, start=job.done).begun(tmp_path / "run")
    endings = [worker.ending() for worker in [Worker(job.work, where, TrainingIsWrong()) for _ in range(3)]]
    assert [ending.code for ending in endings] == [0, 0, 0], endings
    assert job.wrong_in(where) == ""


@pytest.mark.slow
def test_a_training_that_another_process_finishes_meanwhile_is_not_done_again(
    jobs: dict[str, Job], tmp_path: Path
) -> None:
    job = jobs["train"]
    ending = do(one_training, tmp_path / "run", FinishedMeanwhile())
    assert ending.code == 0, ending.said
    assert job.wrong_in(tmp_path / "run") == ""


@pytest.mark.slow
def test_the_simulated_disk_loses_what_was_not_synced(tmp_path: Path) -> None:
    """What the other tests rest on: without syncs all is lost or empty, with them all is kept."""
    for synced in (False, True):
        where = tmp_path / str(synced)
        assert do(_Writer(synced), where, Cut()).code == 0
        for seed, survival in enumerate((0.0, 0.5, 1.0) * 5):
            disk_after(where, tmp_path / "after", seed=seed, survival=survival)
            left = {path: (tmp_path / "after" / OUT / path).read_text() for path in contents(tmp_path / "after" / OUT)}
            if synced:
                assert left == {"a/new": "new"}
            elif survival == 0:
                assert left == {}
            else:
                assert set(left) <= {"a/old", "a/new"}
                assert all("new".startswith(text) for text in left.values())


class _Writer:
    """Writes a file and renames it, with or without syncing file and folders."""

    def __init__(self, synced: bool) -> None:
        self.synced = synced

    def __call__(self) -> None:
        os.makedirs(f"{OUT}/a")
        Path(OUT, "a", "old").write_text("new")
        self._sync(f"{OUT}/a/old")
        os.rename(f"{OUT}/a/old", f"{OUT}/a/new")
        self._sync(f"{OUT}/a")
        self._sync(OUT)

    def _sync(self, path: str) -> None:
        if self.synced:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

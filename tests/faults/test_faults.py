"""A call fails, a disk is full: the process ends in order, and the same command ends in the bytes of an undisturbed one.

`FAULTS=10` before the command injects ten times as many, and others; `pytest -s` shows the table.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from faults import strace
from faults.calls import ERRORS, HIT, Fault, Journal, Limit
from faults.jobs import Job
from faults.strace import Strace
from faults.work import OUT, Disturbance, Ending, contents, do

TIMES = int(os.environ.get("FAULTS", "1"))


def wrong_about(job: Job, folder: Path, ending: Ending) -> str:
    """What was not in order about an ending; empty if all was."""
    # strace counts the calls of each thread: it can have failed a line to the terminal, or a file of a package, as well.
    ours = re.compile(rf'[/"]{OUT}[/">]')
    if not ending.was_orderly and all(ours.search(line) for line in Strace.hits(folder)):
        return f"ended with {ending.code}: {ending.said[-900:]}"
    if ending.code == 0:
        there = contents(folder / OUT)
        lost = [name for name, content in job.contents.items() if there.get(name) != content]
        # That a figure could not be copied as an image is said in the report.
        if any(not name.startswith(("figures", "report")) for name in lost):
            return f"ended with 0 without {', '.join(lost)}: {ending.said[-600:]}"
    return ""


def survey(job: Job, folder: Path, disturbances: list[Disturbance]) -> None:
    """Try disturbances one by one, show how each ended, and fail with all that was wrong."""
    table, found = Counter(), []
    for number, disturbance in enumerate(disturbances):
        where = folder / str(number)
        ending = job.after(where, disturbance)
        hit = Strace.hits(where) or Journal.read(where / HIT)
        troubles = [wrong_about(job, where, ending), job.wrong_after_going_on(where)]
        error = getattr(disturbance, "error", type(disturbance).__name__)
        call = getattr(disturbance, "call", "") or (Journal.read(where / HIT) or [["-"]])[0][0]
        said, left = "badly said" if troubles[0] else "in order", "LOST" if troubles[1] else "same bytes"
        table[error, call, ending.code, said, left] += 1
        if any(troubles):
            found.append("\n  ".join(map(str, [disturbance, hit, *troubles])))
    for row, count in sorted(table.items(), key=str):
        print("|", *(f"{cell} |" for cell in (job.done.name, *row, count)))  # noqa: T201
    assert not found, f"{len(found)} of {len(disturbances)}:\n" + "\n".join(found)


def faults(job: Job, n: int, seed: int) -> list[Disturbance]:
    """Faults at random calls; every kind of call is as likely as every other."""
    rng = random.Random(seed)
    numbers: dict[str, list[int]] = {}
    for number, call in enumerate(job.calls):
        numbers.setdefault(call.name, []).append(number)
    chosen: list[Disturbance] = []
    while len(chosen) < n:
        error = rng.choice(list(ERRORS))
        call = rng.choice([name for name in ERRORS[error] if name in numbers])
        chosen.append(Fault(rng.choice(numbers[call]), error, lasts=error != "EIO" and rng.random() < 0.5))
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n"), [("train", 22), ("measure", 8), ("run", 3), ("save", 37)])
def test_a_call_that_fails(jobs: dict[str, Job], tmp_path: Path, name: str, n: int) -> None:
    survey(jobs[name], tmp_path, faults(jobs[name], n * TIMES, seed=TIMES))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "measure", "save"])
def test_a_size_that_no_file_may_exceed(jobs: dict[str, Job], tmp_path: Path, name: str) -> None:
    job = jobs[name]
    sizes = sorted({path.stat().st_size for path in (job.done / OUT).rglob("*") if path.is_file()} - {0})
    rng = random.Random(TIMES)
    chosen = rng.sample(sizes, min(3 * TIMES, len(sizes)))
    survey(job, tmp_path, [Limit(size - 1) for size in chosen])


@pytest.mark.slow
@pytest.mark.skipif(not strace.available(), reason="no strace that can inject faults")
@pytest.mark.parametrize(("name", "n"), [("train", 10), ("measure", 6), ("save", 14)])
def test_a_system_call_that_fails(jobs: dict[str, Job], tmp_path: Path, name: str, n: int) -> None:
    job, rng = jobs[name], random.Random(TIMES)
    counted = job.begun(tmp_path / "counted")
    assert do(job.work, counted, Strace()).code == 0
    calls: dict[str, list[Strace]] = {}
    for call in Strace.read(counted):
        calls.setdefault(call.call, []).append(call)
    chosen: list[Disturbance] = []
    for _ in range(n * TIMES):
        call = rng.choice(calls[rng.choice(sorted(calls))])
        chosen.append(Strace(call.call, call.number, rng.choice(strace.CALLS[call.call])))
    survey(job, tmp_path, chosen)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system in memory, of a size that can be changed; mounted on a folder that is named."""
    mounted: list[Path] = []

    def mount(folder: Path, size: str) -> bool:
        options = f"size={size}" if folder not in mounted else f"remount,size={size}"
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False
        mounted.extend([folder] if done else [])
        return done

    yield mount
    for folder in set(mounted):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "save"])
def test_a_full_disk(jobs: dict[str, Job], tmp_path: Path, small_disk, name: str) -> None:
    job, found = jobs[name], []
    size = sum(path.stat().st_size for path in (job.done / OUT).rglob("*") if path.is_file()) // 1024
    rng = random.Random(TIMES)
    for number in range(4 * TIMES):
        where = tmp_path / str(number)
        # Half of them are full in training already, which takes little of it.
        room = rng.randrange(32, 400) if number % 2 and name == "run" else rng.randrange(32, 2 * size)
        if not small_disk(where / OUT, f"{room}k"):
            pytest.skip("no file system can be mounted here")
        ending = do(job.work, where)
        assert small_disk(where / OUT, "100m")
        if trouble := wrong_about(job, where, ending) + job.wrong_after_going_on(where):
            found.append(f"{room} kB: {trouble}")
    assert not found, "\n".join(found)

"""The works under test, done once without disturbance."""

from __future__ import annotations

import sys

import pytest
from faults.calls import Record
from faults.jobs import Job
from faults.work import saved_corpus, trainings, whole_run

# Not to be imported by what looks for examples in docstrings: it puts stand-ins into the process, for the fork server.
collect_ignore = ["imports.py"]
if sys.platform != "linux":  # elsewhere a process that has imported torch cannot be forked
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """A whole run, its two halves, and a corpus."""
    folder = tmp_path_factory.mktemp("undisturbed")
    jobs = {
        "run": Job(whole_run, folder / "run"),
        "train": Job(trainings, folder / "train"),
        "measure": Job(whole_run, folder / "measure", start=folder / "train"),
        "save": Job(saved_corpus, folder / "save"),
    }
    for job in jobs.values():
        ending = job.after(job.done, Record())
        assert ending.code == 0, ending.said
    return jobs

"""One damaged file of each kind, in an unfinished and in a finished folder: noticed before it is used, or made again.

`pytest -s` shows a table of what became of each; `FAULTS=5` damages five of each kind in all ways, at other places.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.calls import Kill
from faults.damage import DAMAGES, RAW, REFUSED, damage, kinds, seen_corpus, seen_run
from faults.jobs import Job
from faults.work import OUT, contents, do

TIMES = int(os.environ.get("FAULTS", "1"))
SIGKILL = 9


def unfinished(job: Job, folder: Path, before: Callable[[str, str], bool]) -> Path:
    """A folder in which a process was killed before the first call that `before` says of (its name and path)."""
    number = min(i for i, call in enumerate(job.calls) if before(call.name, call.path))
    assert job.after(folder, Kill(number, SIGKILL)).code == -SIGKILL
    return folder


def try_each(job: Job, whole: Path, folder: Path, judge: Callable[[Path, Path], tuple[str, bool]], shown: str) -> None:
    """Damage a file of each kind in a copy of a folder, show what `judge` says became of it, and fail where it was bad."""
    rng, bad = random.Random(TIMES), []
    for kind, files in kinds(whole).items():
        for how in rng.sample(DAMAGES, len(DAMAGES) if TIMES > 1 else 2):
            for file in rng.sample(files, min(TIMES, len(files))):
                if not file.stat().st_size and how != "deleted":
                    continue
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(whole, folder)
                damaged = folder / file.relative_to(whole)
                damage(damaged, how, rng)
                became, well = judge(folder, damaged)
                print("|", shown, "|", kind, "|", how, "|", became if well else f"**{became}**", "|")  # noqa: T201
                if not well:
                    bad.append(f"{shown}, {damaged.relative_to(folder)} {how}: {became}")
    assert not bad, f"{len(bad)}:\n" + "\n".join(bad)


def gone_on(job: Job, folder: Path, damaged: Path) -> tuple[str, bool]:
    """What the same command makes of a damaged file, and whether that is right."""
    ending = do(job.work, folder)
    last = ending.said.strip().splitlines()[-1:]
    if ending.code == 0:
        wrong = job.wrong_in(folder)
        return (f"unnoticed: {wrong}", False) if wrong else ("the same command ends in the same bytes", True)
    # By its own name; a file that is gone or is one of a checkpoint, by the folder.
    names = [damaged.name, damaged.parent.name] if re.search(r"-\d", damaged.parent.name) else [damaged.name]
    named = any(name in ending.said for name in names) or not damaged.exists()
    return f"the same command refuses: {last}", ending.was_orderly and named


@pytest.mark.slow
def test_an_unfinished_training(jobs: dict[str, Job], tmp_path: Path) -> None:
    job = jobs["train"]
    whole = unfinished(job, tmp_path / "whole", lambda name, path: name == "mkdir" and "step-000008" in path)
    try_each(job, whole, tmp_path / "damaged", lambda *where: gone_on(job, *where), "unfinished training")


@pytest.mark.slow
def test_an_unfinished_corpus(jobs: dict[str, Job], tmp_path: Path) -> None:
    job = jobs["save"]
    whole = unfinished(job, tmp_path / "whole", lambda name, path: name == "open" and "/.manifest" in path)
    try_each(job, whole, tmp_path / "damaged", lambda *where: gone_on(job, *where), "unfinished corpus")


def looked_at(see: Callable[[], None], folder: Path) -> dict[str, str]:
    """What a reader sees there."""
    ending = do(see, folder)
    assert ending.code == 0, ending.said
    return json.loads(ending.said.splitlines()[-1])


def judged(job: Job, see: Callable[[], None], whole: dict[str, str], folder: Path, damaged: Path) -> tuple[str, bool]:
    """What readers see of a finished folder with a damaged file, what the same command makes of it, and whether it is right.

    Right is what is refused in a line that names a file, and what is made again. What a reader sees otherwise than it was
    is right only for a side file (log, floor, evaluation) that `check` names.
    """
    seen = looked_at(see, folder)
    refused = [name for name, what in seen.items() if what.startswith(REFUSED)]
    raw = [f"{name}: {what}" for name, what in seen.items() if what.startswith(RAW)]
    other = [name for name, what in seen.items() if what != whole[name] and not what.startswith((REFUSED, RAW))]
    before = contents(folder / OUT)
    ending = do(job.work, folder)
    again = ending.code == 0 and not job.wrong_in(folder)
    said = [f"refused by {', '.join(refused)}"] if refused else []
    said += [f"RAW {'; '.join(raw)}"] if raw else []
    said += [f"other {', '.join(other)}"] if other else []
    if again:
        said.append("made again" if before != job.contents else "harmless")
    elif ending.code == 0:
        said.append(f"not made again ({job.wrong_in(folder)})")
    else:
        said.append(f"the same command refuses: {ending.said.strip().splitlines()[-1:]}")
    noticed = again or bool({"open", "check"} & set(refused))
    used = [name for name in other if name.startswith(("load", "open"))]
    orderly = ending.was_orderly or ending.code == 0
    return "; ".join(said), noticed and orderly and not raw and not used


@pytest.mark.slow
def test_a_finished_run(jobs: dict[str, Job], tmp_path: Path) -> None:
    job = jobs["run"]
    whole = looked_at(seen_run, job.done)
    assert not [what for what in whole.values() if what.startswith((REFUSED, RAW))], whole
    try_each(job, job.done, tmp_path / "damaged", lambda *where: judged(job, seen_run, whole, *where), "finished run")


@pytest.mark.slow
def test_a_finished_corpus(jobs: dict[str, Job], tmp_path: Path) -> None:
    job = jobs["save"]
    whole = looked_at(seen_corpus, job.done)
    try_each(
        job, job.done, tmp_path / "damaged", lambda *where: judged(job, seen_corpus, whole, *where), "finished corpus"
    )

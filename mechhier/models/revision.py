"""The training checkpoints that a repository publishes as revisions, or that a local mirror holds as subfolders.

Names as they are found on the hub: `step1000-tokens4B` (OLMo), `stage1-step1000-tokens5B` and
`stage2-ingredient1-step1000-tokens5B` (OLMo-2: two stages, the second trained on several mixtures of data in
parallel), `stage1-step1000` (OLMo-3), `step143000` (Pythia); and as training programs name their folders:
`checkpoint-500` (transformers), `global_step500` (DeepSpeed, GPT-NeoX), `iter_0000500` (Megatron), `step-000500` (ours).
"""

from __future__ import annotations

import difflib
import json
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from huggingface_hub import HfApi, constants

# The hub's client is built on httpx or on its successor, depending on the version; its errors module knows which.
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    RepositoryNotFoundError,
)

from mechhier.files import write_whole
from mechhier.models.errors import HubUnreachableError, MissingRevisionError, ModelNotFoundError
from mechhier.models.run import CHECKPOINTS, MANIFEST

LISTING_HOURS = 24
"""A cached listing younger than this is used without asking the hub."""

_NAME = re.compile(
    r"(?:(?!global[-_])(?P<stage>.+?)[-_])?(?:global[-_]?step|step|iteration|iter|checkpoint|ckpt)[-_]?(?P<step>\d{1,18})(?:[-_]tokens(?P<tokens>\d+(?:\.\d+)?)(?P<unit>[KMBT]))?"
)
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_FIRST_STAGE = "stage1"


@dataclass(frozen=True)
class Revision:
    """One published checkpoint of a training run."""

    name: str
    """What to give to `load_model(..., revision=)`."""
    step: int
    """Optimizer step within its stage."""
    tokens: int | None = None
    """Tokens seen within the stage, as rounded in the name (`tokens4B` is 4,000,000,000); None where the name has none."""
    stage: str | None = None
    """`stage1`, `stage2-ingredient1`, ...; None where the name has none."""


def parse_revision(name: str) -> Revision | None:
    """The training step that a revision's name stands for; None for a name that is no step, such as `main`.

    Example:
        >>> parse_revision("stage2-ingredient1-step11931-tokens50B")
        Revision(name='stage2-ingredient1-step11931-tokens50B', step=11931, tokens=50000000000, stage='stage2-ingredient1')
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    tokens = None if match["tokens"] is None else round(float(match["tokens"]) * _UNITS[match["unit"]])
    return Revision(name, step=int(match["step"]), tokens=tokens, stage=match["stage"])


def revisions(
    source: str | Path,
    *,
    n: int | None = None,
    spacing: Literal["even", "log"] = "even",
    stage: str | None = None,
    refresh: bool = False,
) -> list[Revision]:
    """List a model's published checkpoints in the order of training, or pick some of them.

    Branches of a hub repository whose name is a training step, or subfolders that are named so and hold a
    `config.json`, of a local mirror, of a training's output (`checkpoint-500`, `step_500`, `global_step500`,
    `iter_0000500`) or of one of our runs; other names (`main`, `step-000060.bak`) are left out. Where a repository has
    two names for one step of a stage, the longer one is kept. In a repository with stages, names without one belong to
    the first (so are some early checkpoints of OLMo-2 named).

    What the hub answers is kept in `HF_HOME/mechhier/revisions`, so that a node without network lists what a node
    with network has listed before. A listing younger than 24 hours is used without asking; an older one only when the
    hub cannot be reached; `refresh=True` always asks, and fails without network.

    Args:
        source: A hub name such as `"allenai/OLMo-1B-hf"`, a folder of revisions, or a run's folder.
        n: How many to pick, at least 2, the first and the last among them, all distinct; None or more than there are:
            all.
        spacing: Picks are the nearest to points spaced evenly in steps (`"even"`) or in their logarithm (`"log"`).
        stage: Only revisions of this stage, such as `"stage1"` or `"stage2-ingredient1"`. Needed to pick where there
            are several, as steps are counted anew in each.
        refresh: Ask the hub even if the listing in the cache is young.

    Raises:
        ValueError: `n` below 2, an unknown spacing or stage, or a pick out of several stages.
        ModelNotFoundError: No such folder, no such hub name, or none of its revisions is a training step.
        HubUnreachableError: No network, and no listing in the cache.

    Cost: one request to the hub, or reading one small file; no weights are read.
    """
    if spacing not in ("even", "log"):
        raise ValueError(f"spacing must be 'even' or 'log', not {spacing!r}")
    if n is not None and n < 2:
        raise ValueError(f"n must be at least 2 (the first and the last revision), not {n}")
    folder = Path(source).expanduser()
    names = revision_folders(folder) if folder.is_dir() else hub_revisions(str(source), refresh=refresh)
    listed = _in_order(names)
    if not listed:
        raise ModelNotFoundError(
            f"{source} has no revision that is named as a training step (as step1000-tokens4B is); "
            f"it has {', '.join(sorted(names)[:5]) or 'none at all'}"
        )
    stages = list(dict.fromkeys(revision.stage or _FIRST_STAGE for revision in listed))
    if stage is not None:
        if stage not in stages:
            raise ValueError(f"{source} has no stage {stage!r}; it has {', '.join(stages)}")
        listed = [revision for revision in listed if (revision.stage or _FIRST_STAGE) == stage]
    if n is None:
        return listed
    if stage is None and len(stages) > 1:
        raise ValueError(
            f"steps are counted anew in each stage of {source}: choose one with stage=, of {', '.join(stages)}"
        )
    return _pick(listed, n, spacing)


def nearest_revisions(wanted: str, names: Sequence[str]) -> list[str]:
    """The three names that someone who wrote `wanted` most likely meant: near in step, or near in spelling."""
    target = parse_revision(wanted)
    if target is None:
        return difflib.get_close_matches(wanted, names, n=3, cutoff=0.0)
    steps = [revision for revision in map(parse_revision, names) if revision is not None]
    same_stage = [revision for revision in steps if revision.stage == target.stage]
    near = sorted(same_stage or steps, key=lambda revision: abs(revision.step - target.step))
    return [revision.name for revision in near[:3]]


def missing_revision(wanted: str, names: Sequence[str], *, where: str) -> MissingRevisionError:
    """The error for a revision that is not among the known names."""
    near = ", ".join(nearest_revisions(wanted, names))
    return MissingRevisionError(
        f"{where} has no revision {wanted!r}; of its {len(names)} revisions the nearest are: {near}"
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is one of our runs: its checkpoints are then the revisions."""
    return (folder / MANIFEST).is_file() and (folder / CHECKPOINTS).is_dir()


def revision_folders(folder: Path) -> list[str]:
    """Names of the subfolders of a local mirror, or of a run's checkpoints, that hold a model."""
    within = folder / CHECKPOINTS if is_run(folder) else folder
    # One look at each: a folder can have a hundred thousand entries. A link that leads in a circle is none of them.
    return sorted(entry.name for entry in os.scandir(within) if os.path.isfile(os.path.join(entry.path, "config.json")))


def hub_revisions(name: str, *, refresh: bool = False) -> list[str]:
    """Names of all branches of a hub repository, from the cache or from the hub; see `revisions`.

    Raises:
        ModelNotFoundError: The hub has no such name.
        HubUnreachableError: No network, and no listing in the cache.
    """
    path = _listing(name)
    cached = _read_listing(path)
    if cached is not None and not refresh and time.time() - cached[1] < 3600 * LISTING_HOURS:
        return cached[0]
    try:
        branches = sorted(branch.name for branch in HfApi().list_repo_refs(name).branches)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise no_such_hub_model(name) from error
    except (HTTPError, OSError) as error:
        if cached is not None and not refresh:
            return cached[0]
        raise HubUnreachableError(
            f"cannot list the revisions of {name!r}: the hub cannot be reached ({type(error).__name__}), and no listing "
            "may be taken from the cache. What to do: on a machine with network and the same HF_HOME run\n"
            f"  python -c \"import mechhier as mh; mh.models.revisions('{name}', refresh=True)\""
        ) from error
    # A cache that others own may be read-only: the answer is good all the same.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"name": name, "listed": time.time(), "branches": branches}))
    return branches


def cached_hub_revisions(name: str) -> list[str]:
    """What `hub_revisions` was last told, however long ago; empty if never."""
    cached = _read_listing(_listing(name))
    return [] if cached is None else cached[0]


def no_such_hub_model(name: str) -> ModelNotFoundError:
    """The error for a name that is neither a folder nor on the hub."""
    return ModelNotFoundError(
        f"there is no folder {name!r}, and the hub has no model of that name that you may see. What to do: check the "
        "spelling; a private or gated model needs `hf auth login`"
    )


def _listing(name: str) -> Path:
    return Path(constants.HF_HOME) / "mechhier" / "revisions" / f"{name.replace('/', '--')}.json"


def _read_listing(path: Path) -> tuple[list[str], float] | None:
    """The cached branches and when they were listed, in seconds since 1970; None where there is no readable listing."""
    try:
        listing = json.loads(path.read_text(encoding="utf-8"))
        return [str(branch) for branch in listing["branches"]], float(listing["listed"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _in_order(names: Sequence[str]) -> list[Revision]:
    """The names that are training steps, stage by stage, each stage in the order of its steps."""
    found: dict[tuple[str, int], Revision] = {}
    for revision in map(parse_revision, sorted(names, key=len)):
        if revision is not None:
            found[revision.stage or _FIRST_STAGE, revision.step] = revision
    return [found[key] for key in sorted(found, key=lambda key: (_numbers_as_numbers(key[0]), key[1]))]


def _numbers_as_numbers(stage: str) -> list[str | int]:
    """A sort key that puts stage10 after stage2; texts and numbers alternate, so that like meets like."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", stage)]


def _pick(listed: list[Revision], n: int, spacing: Literal["even", "log"]) -> list[Revision]:
    """The n revisions nearest to evenly spaced points, each taken once."""
    if n >= len(listed):
        return listed
    steps = np.array([revision.step for revision in listed], dtype=float)
    # Step 0, the untrained model, has no logarithm.
    places = np.log1p(steps) if spacing == "log" else steps
    picked: list[int] = []
    for i, target in enumerate(np.linspace(places[0], places[-1], n)):
        first = picked[-1] + 1 if picked else 0
        last = len(listed) - (n - i)  # leaves one for each of the points to come
        picked.append(first + int(np.abs(places[first : last + 1] - target).argmin()))
    return [listed[i] for i in picked]

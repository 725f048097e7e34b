"""Damaged files: which kinds there are, what can happen to one, and what a reader then sees."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from faults.work import OUT

RUN = f"{OUT}/pool/run"
DAMAGES = ("flipped", "cut", "empty", "deleted")
REFUSED, RAW = "refused", "raw"


def kinds(folder: Path) -> dict[str, list[Path]]:
    """The files in `./out` by kind: their path there with N for every number. A new kind of file is found by itself."""
    found: dict[str, list[Path]] = {}
    for path in sorted((folder / OUT).rglob("*")):
        if path.is_file():
            found.setdefault(re.sub(r"\d+", "N", str(path.relative_to(folder / OUT))), []).append(path)
    return found


def damage(path: Path, how: str, rng: random.Random) -> None:
    """Flip one bit of a file, cut it in half, empty it or delete it."""
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "flipped":
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")


def seen_run() -> None:
    """Say, as a work does, what a reader of the run and of its measurements sees: a hash of each thing, or its error."""
    from mechhier import results
    from mechhier.models import Run

    seen = {"open": _seen(lambda: Run.open(RUN).manifest.steps)}
    if seen["open"].startswith((REFUSED, RAW)):
        print(json.dumps(seen))  # noqa: T201
        return
    run = Run.open(RUN)
    seen["check"] = _seen(run.check)
    seen["log"] = _seen(lambda: run.log.to_dict())
    seen["floor"] = _seen(lambda: run.floor.to_dict())
    seen["evaluation"] = _seen(lambda: run.evaluation.to_dict())
    for step in run.manifest.checkpoint_steps:
        seen[f"load {step}"] = _seen(lambda step=step: _answers(run.load(step)))
    seen["results.nc"] = _seen(lambda: results.load(f"{OUT}/results.nc").to_dict())
    print(json.dumps(seen))  # noqa: T201


def seen_corpus() -> None:
    """The same of a stored corpus."""
    from mechhier.grammars import Corpus

    print(json.dumps({"open": _seen(lambda: Corpus.open(OUT).rows(0, 10**4).tobytes())}))  # noqa: T201


def _answers(model: Any) -> tuple[bytes, Any]:
    """What a model makes of some tokens, and its tokenizer of their words."""
    import torch

    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        logits = model(tokens)
    tokenizer = model.tokenizer
    words = tokenizer.convert_ids_to_tokens(list(range(12)))
    return logits.numpy().tobytes(), (words, tokenizer(" ".join(words[2:6])).input_ids)


def _seen(look: Callable[[], Any]) -> str:
    try:
        found = look()
    except (ValueError, OSError, LookupError) as error:
        said = str(error)
        orderly = OUT in said and "http" not in said and len(said.splitlines()) < 8
        return f"{REFUSED if orderly else RAW}: {type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001  whatever it is, it is not what a reader should see
        return f"{RAW}: {type(error).__name__}: {error}"
    return hashlib.sha256(pickle.dumps(_plain(found))).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return repr(value.tolist() if isinstance(value, np.ndarray) else value)

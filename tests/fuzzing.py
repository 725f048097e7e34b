"""Mutated specs, grammars, settings, manifests and word lists: what reads them must accept them or say what is wrong.

By hand, 8,000 cases of every kind with five seconds for each: `python tests/fuzzing.py 8000 5`.
"""

from __future__ import annotations

import copy
import json
import random
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import mechhier
from mechhier.experiments import Experiment
from mechhier.grammars import PCFG, Corpus, CorpusSpec, DocumentGrammar
from mechhier.models import ModelSpec, TrainSpec
from mechhier.models.run import Manifest
from mechhier.phenomena import PHENOMENA, check_options
from mechhier.phenomena.tasks.pairs import read_pairs
from mechhier.specs import read_spec

PACKAGE = str(Path(mechhier.__file__).parent)
LONGEST_MESSAGE = 700

WORDS = [
    *("x", "yes", "010", "1", "null", "ß", "日本", "<eos>", "fixed", "per_document", "document"),
    *("ngram", "fitted_ngram", "cfg3", "dyck", "train", "tiny", "huge"),
]
NUMBERS = [0, -1, 1, 2, 3, 17, 10**4, 10**5, 10**6, 10**9, 10**12, 2**63, 10**30, 10**400]
DECIMALS = [0.0, -0.5, 0.5, 1.0, 2.5, 1e6, 1e-300, 1e308, float("nan"), float("inf"), -float("inf")]
TEXTS = ["", " ", "a b", "\n", "\ud800", "\x1b[31m", "\x00", "\u202e", "x" * 10**5]
COLLECTIONS = [
    [],
    {},
    [1, 2],
    [[]],
    [1] * 1000,
    {"kind": "pcfg"},
    {"a": {"b": {}}},
    (1, 2),
    {1: 2},
    {"": ""},
    [[[[[[1]]]]]],
]
OBJECTS = [np.int64(3), np.float32(2.0), np.bool_(True), np.array([1, 2]), b"x", {1, 2}, object(), 1 + 2j, int]
HOSTILE: list[Any] = [None, True, False, *WORDS, *NUMBERS, *DECIMALS, *TEXTS, *COLLECTIONS, *OBJECTS]
TOKENS = [
    *b"010 yes no 1:30 1_000 0x1F 1e-3 1e400 -1 0 1e9 .nan null ~ [] {} [ ] { } : - ' # | > &a *a !!str --- ... ,,".split(),
    *(
        b"9" * 30,
        b"9" * 5000,
        b"[" * 200,
        b"{a: " * 200,
        b"a" * 10**4,
        b" " * 10**4,
        b"NaN",
        b"Infinity",
        b"2020-01-01",
    ),
    *(
        b"\n",
        b"\t",
        b"  ",
        b"- ",
        b"? ",
        b'"',
        b"<<: *a",
        b"!!python/object:os.system",
        b"%YAML 1.1\n",
        b"\xef\xbb\xbf",
    ),
    *(b"\xff\xfe", b"\xe9", b"\x00", b"\x1b[31m", b"\\ud800", b'"\\ud800"', "日本".encode(), b"\xf0\x9f\x98\x80"),
]


@dataclass(frozen=True)
class Kind:
    """What is mutated, and what reads it; it must accept every seed.

    Seeds that are text are mutated as bytes; where `write` writes them, in half of the cases, and their parts in the others.
    """

    seeds: list[Any]
    read: Callable[[Any, Path], Any]
    write: Callable[[Any], bytes] | None = None

    def case(self, rng: random.Random) -> Any:
        seed = copy.deepcopy(rng.choice(self.seeds))
        if self.write is not None:
            seed = self.write(_mutated(seed, rng)) if rng.random() < 0.5 else _mutated(self.write(seed), rng)
            return seed
        return _mutated(seed, rng)


def _write(data: bytes, folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _use(corpus: Corpus) -> None:
    """Look at what an accepted corpus is: the least of what is done with every one."""
    json.dumps(corpus.description).encode()
    assert Corpus.from_description(json.loads(json.dumps(corpus.description))) == corpus
    corpus.grammar.generate(1, 8, np.random.default_rng(0))


def _experiment(data: bytes, folder: Path) -> None:
    experiment = Experiment.read(_write(data, folder, "spec.yaml"))
    for training in list(experiment.trainings.values())[:3]:
        json.dumps(training.corpus().description).encode()


def _corpus(data: bytes, folder: Path) -> None:
    _use(read_spec(CorpusSpec, _write(data, folder, "spec.yaml"), package="mechhier.grammars.corpora").corpus())


def _grammar(described: Any, folder: Path) -> None:
    _use(Corpus.from_description({"grammar": described, "tokens": 5000, "context": 50}))


def _run_manifest(data: bytes, folder: Path) -> None:
    _write(data, folder, "manifest.json")
    manifest = Manifest.read(folder)
    json.dumps(Corpus.from_description(manifest.corpus).description).encode()


def _corpus_manifest(data: bytes, folder: Path) -> None:
    if not (folder / "block-00000.bin").exists():
        _SAVED.save(folder)
    _write(data, folder, "manifest.json")
    Corpus.open(folder)


def _options(case: Any, folder: Path) -> None:
    if isinstance(case, dict):
        for name, options in case.items():
            check_options(name, options)


_SAVED = DocumentGrammar(n_words=4, lexicon="fixed", context=20).corpus(1000)
ARM = {
    "title": "a title",
    "about": "what it is",
    "grammar": {"kind": "document", "n_words": 9, "lexicon": 4, "context": 40},
}
EXPERIMENT = {
    "title": "An experiment",
    "seeds": [0, 1],
    "vary_language": True,
    "arms": {
        "one": {
            **ARM,
            "train": {"steps": 6, "warmup_steps": 1, "n_checkpoints": 3, "batch_size": 4, "betas": [0.9, 0.95]},
        },
        "two": {**ARM, "grammar": {"kind": "cfg3", "n_levels": 3, "seed": 4, "context": 40}, "train": {"steps": 10}},
    },
    "model": {"architecture": "llama", "n_layers": 2, "d_model": 16, "n_heads": 2, "n_ctx": 64},
    "phenomena": {"induction": {"n_sequences": 4}, "hydra": {"level": "head", "min_probability": 0.0}},
}
GRAMMARS: list[dict[str, Any]] = [
    {
        "kind": "document",
        "n_words": [3, 4, 5],
        "zipf": 1.5,
        "lexicon": "per_document",
        "repetitions": 2,
        "n_sections": 1,
    },
    {
        "kind": "document",
        "n_words": 5,
        "lexicon": 8,
        "binding": 1.0,
        "p_chain": 0.5,
        "hierarchical": False,
        "context": 96,
    },
    {
        "kind": "ngram",
        "n_tokens": 9,
        "n_rows": 20,
        "orders": [1, 2, 4],
        "order_exponent": 1.0,
        "min_length": 5,
        "max_extra": 9,
    },
    {
        "kind": "fitted_ngram",
        "order": 3,
        "source": {"grammar": {"kind": "ngram", "n_tokens": 5}, "tokens": 500, "context": 20},
    },
    {
        "kind": "pcfg",
        "start": "S",
        "terminals": ["a", "b"],
        "rules": [["S", ["a", "S", "b"], 0.4], ["S", ["A"], 0.6], ["A", ["a", "b"], 0.5], ["A", [], 0.5]],
        "lengths": [1, 20],
        "language_seed": 3,
    },
    {
        "kind": "cfg3",
        "n_levels": 3,
        "n_symbols": 3,
        "n_rules": [2, 2],
        "rule_lengths": [2, 3],
        "distinct_children": True,
    },
    {
        "kind": "random_hierarchy",
        "n_symbols": 4,
        "n_tuples": 2,
        "tuple_length": 2,
        "n_levels": 3,
        "n_classes": 2,
        "seed": 1,
    },
    {"kind": "dyck", "n_brackets": 2, "max_depth": 3, "p_nest": 0.5, "p_next": 0.5, "context": 20},
]
MANIFEST = {
    "format": 2,
    "model": {"architecture": "llama", "n_layers": 2, "d_model": 16, "n_heads": 2},
    "train": {"steps": 6, "batch_size": 4},
    "corpus": _SAVED.description,
    "text_sha256": "0" * 64,
    "steps": 6,
    "device": "1 x cpu, float32",
    "versions": {"mechhier": "0.5.0"},
    "arm": "one",
    "finished": True,
    "weights_sha256": {"0": "ab", "6": "cd"},
}
CORPUS_MANIFEST = {
    "format": 1,
    "corpus": _SAVED.description,
    "dtype": "uint16",
    "blocks": [{"file": "block-00000.bin", "bytes": 2000, "sha256": "0" * 64}],
    "versions": {"numpy": "2"},
}
PAIRS = [{"input": x, "output": x.upper()} for x in "abcdefgh"]


def _yaml(described: Any) -> bytes:
    """As people write it: JSON's values are YAML, but numbers and words without quotes are not."""
    try:
        text = yaml.safe_dump(described, sort_keys=False, allow_unicode=True)
    except (yaml.YAMLError, ValueError):
        return _json(described)
    return text.encode("utf-8", errors="surrogatepass")


def _json(described: Any) -> bytes:
    try:
        return json.dumps(described, default=lambda _: 7).encode()
    except (TypeError, ValueError):
        return repr(described).encode("utf-8", errors="surrogatepass")


KINDS: dict[str, Kind] = {
    "experiment specs": Kind([EXPERIMENT], _experiment, _yaml),
    "experiment specs with anchors": Kind([(Path(PACKAGE) / "experiments" / "demo.yaml").read_bytes()], _experiment),
    "corpus specs": Kind(
        [{"grammar": each, "tokens": 5000, "context": 50, "seed": 1} for each in GRAMMARS], _corpus, _yaml
    ),
    "grammars": Kind(GRAMMARS, _grammar),
    "rules in NLTK's notation": Kind(
        [PCFG.from_string("S -> 'a' S 'b' [0.4] | A [0.6]\nA -> 'a' [0.5] | [0.5]").to_string().encode()],
        lambda data, folder: PCFG.from_string(data.decode("utf-8", errors="surrogateescape")),
    ),
    "published rule tables": Kind(
        [{"all": [[{"id": 1, "children": [[0, 1], [1]]}], [{"id": 2}, {"id": 3}]]}],
        lambda data, folder: PCFG.from_cfg3(_write(data, folder, "table.json")),
        _json,
    ),
    "experiments in Python": Kind([EXPERIMENT], lambda case, folder: Experiment.model_validate(case)),
    "model settings": Kind(
        [
            {"architecture": "llama", "n_layers": 2, "d_model": 32, "n_heads": 4, "d_mlp": 64, "n_key_value_heads": 2},
            {"preset": "tiny", "n_ctx": 64, "architecture": "gpt2"},
        ],
        lambda case, folder: (
            ModelSpec(**case) if isinstance(case, dict) and all(isinstance(k, str) for k in case) else None
        ),
    ),
    "training settings": Kind(
        [TrainSpec(steps=1000, warmup_steps=10, checkpoints_at=(5, 10)).model_dump()],
        lambda case, folder: TrainSpec.model_validate(case),
    ),
    "options of phenomena": Kind(
        [{"hydra": {"level": "head", "ablation": "mean", "n_patches": 3, "min_probability": 0.1, "n_null": 2}}]
        + [{name: {"max_bytes": 10**6}} for name in PHENOMENA],
        _options,
    ),
    "word lists": Kind([PAIRS], lambda data, folder: read_pairs(_write(data, folder, "pairs.json")), _json),
    "manifests of runs": Kind([MANIFEST], _run_manifest, _json),
    "manifests of corpora": Kind([CORPUS_MANIFEST], _corpus_manifest, _json),
}


def _mutated(seed: Any, rng: random.Random) -> Any:
    """The seed after one to three mutations: of its bytes, or of its parts."""
    case = seed
    for _ in range(rng.choice((1, 1, 2, 3))):
        case = _mutated_bytes(case, rng) if isinstance(case, bytes) else _mutated_parts(case, rng)
    return case


def _mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    at, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    end = min(end, at + rng.choice((1, 5, 30, 10**6)))
    words = data.split(b" ")
    return rng.choice(
        (
            lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
            lambda: data[:at] + data[end:],
            lambda: data[:end] + data[at:],
            lambda: data[:at] + rng.choice(TOKENS) + data[at:],
            lambda: data[:at] + rng.choice(TOKENS) + data[end:],
            lambda: b" ".join(rng.choice(TOKENS) if i == at % len(words) else word for i, word in enumerate(words)),
            lambda: b" ".join(rng.choice(words) if i == at % len(words) else word for i, word in enumerate(words)),
            lambda: data[:at],
            lambda: data.decode("latin-1").encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig"))),
            lambda: data + b"\n" + data,
        )
    )()


def _mutated_parts(case: Any, rng: random.Random) -> Any:
    holders = list(_holders(case))
    if not holders:
        return copy.deepcopy(rng.choice(HOSTILE))
    holder = rng.choice(holders)
    hostile = copy.deepcopy(rng.choice(HOSTILE))
    if isinstance(holder, list):
        at = rng.randrange(len(holder) + 1)
        holder[at : at + rng.choice((0, 1))] = [hostile] if rng.random() < 0.8 else []
        return case
    key = rng.choice(list(holder)) if holder else "new"
    action = rng.randrange(5)
    if action <= 1:
        holder[key] = hostile
    elif action == 2:
        holder.pop(key, None)
    elif action == 3 and holder:
        holder[f"{key}"[:-1] + rng.choice("xs_1")] = holder.pop(key)
    else:
        holder[hostile if isinstance(hostile, str | int | float | None) else "extra"] = copy.deepcopy(
            rng.choice(HOSTILE)
        )
    return case


def _holders(case: Any) -> Iterator[Any]:
    if isinstance(case, dict | list):
        yield case
        for part in list(case.values() if isinstance(case, dict) else case):
            yield from _holders(part)


class TooSlow(BaseException):
    """A case took longer than it may."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise `TooSlow` after some seconds, where the system has alarms."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fault(error: BaseException) -> str | None:
    """What is wrong with how a case ended; None if it is the package's own error with a clean message."""
    if isinstance(error, TooSlow):
        return "too slow"
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if not isinstance(error, ValueError | FileNotFoundError):
        return f"{type(error).__name__}: {str(error)[:200]}"
    if not raised_in.startswith(PACKAGE):
        return f"{type(error).__name__} of {Path(raised_in).name}: {str(error)[:200]}"
    message = str(error)
    unclean = [word for word in ("://", "pydantic", "\x1b", "\x00", "object at 0x", "Traceback") if word in message]
    if unclean or not message.replace("\n", "").isprintable() or len(message) > LONGEST_MESSAGE:
        return f"message ({len(message)} characters): {message[:300]!r}"
    return None


def fuzz(name: str, n: int, *, seconds: float, seed: int = 0) -> tuple[Counter[str], list[tuple[Any, str]]]:
    """How cases of a kind ended, and those that ended in a fault."""
    kind, ends, faults = KINDS[name], Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for each in kind.seeds:
            try:
                kind.read(
                    copy.deepcopy(each) if kind.write is None else kind.write(each), Path(folder)
                )  # compiles loops
            except ValueError:
                assert name == "manifests of corpora"  # whose hash is not that of the block
        for number in range(n):
            rng = random.Random(f"{name} {seed} {number}")
            case = kind.case(rng)
            try:
                with limit(seconds):
                    kind.read(case, Path(folder))
                ends["accepted"] += 1
            except (Exception, TooSlow) as error:  # noqa: BLE001
                ends[type(error).__name__] += 1
                if what := fault(error):
                    faults.append((case, what))
    return ends, faults


if __name__ == "__main__":
    for _name in sys.argv[3:] or KINDS:
        _ends, _faults = fuzz(_name, int(sys.argv[1]), seconds=float(sys.argv[2]))
        sys.stdout.write(f"{_name}: {dict(_ends)}; {len(_faults)} faults\n")
        for _case, _what in _faults[:6]:
            sys.stdout.write(f"    {_what}\n        {str(_case)[:300]!r}\n")
        sys.stdout.flush()

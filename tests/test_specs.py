"""What goes in: YAML that means what it says, settings checked wherever they come from, and what is said of wrong ones."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints

import numpy as np
import pytest
import yaml
from fuzzing import ARM, CORPUS_MANIFEST, EXPERIMENT, GRAMMARS, MANIFEST, fault

from mechhier.experiments import Experiment
from mechhier.experiments.experiment import Arm
from mechhier.grammars import (
    PCFG,
    Corpus,
    CorpusError,
    CorpusSpec,
    DocumentGrammar,
    FittedNGram,
    Grammar,
    NGram,
    cfg3,
    dyck,
    random_hierarchy,
    storage,
)
from mechhier.models import ModelSpec, RunError, TrainSpec
from mechhier.models import run as runs
from mechhier.models.spec import checkpoint_steps
from mechhier.phenomena import PHENOMENA, check_options
from mechhier.phenomena.tasks.pairs import read_pairs
from mechhier.reading import MOST_LEVELS, MOST_SPEC_BYTES, MOST_VALUES, ReadError, read_json, read_text, read_yaml
from mechhier.specs import Described, SpecError, argument_types, check_arguments, whole


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


# -- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(
            (word, word)
            for word in ("yes", "no", "on", "off", "Yes", "y", "1:30", "1_000", "0x1F", "0o17", "2020-01-01", "=")
        ),
        *(("1e-3", 0.001), ("1E3", 1000.0), ("-1.5e+2", -150.0), (".5", 0.5), ("5.", 5.0), ("-0.0", 0.0), ("+7", 7)),
        *(("0", 0), ("-12", -12), ("true", True), ("FALSE", False), ("null", None), ("~", None), ("", None)),
        *(
            (".inf", float("inf")),
            ("'010'", "010"),
            ('"true"', "true"),
            ("0.10", 0.1),
            ("01a", "01a"),
            ("1.2.3", "1.2.3"),
        ),
    ],
)
def test_words_mean_what_they_mean_in_yaml_1_2_and_numbers_what_people_mean(text, value):
    read = read_yaml(f"a: {text}", "a file")["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is given twice"),
        ("a: {b: 1, b: 2}", "line 1: the key 'b' is given twice"),
        ("<<: {a: 1}\n<<: {b: 1}", "line 2: the key '<<' is given twice"),
        ("a: 010", "line 1: 010 may be meant as octal: leave out the leading zero"),
        ("a: -007", "line 1: -007 may be meant as octal"),
        ("1: a", "line 1: the key '1' is not text; put it in quotes"),
        ("? [a]\n: 1", "line 1: a list or a mapping as a key"),
        (
            "a: !!python/object/apply:os.system [x]",
            "line 1: the tag !!python/object/apply:os.system: tags are not read",
        ),
        ("a: !!str 3", "line 1: the tag !!str: tags are not read"),
        ("a: *b", "line 1: *b stands for nothing"),
        ("a: &b [*b]", "line 1: *b stands for nothing"),
        ("<<: 3", "line 1: << takes a mapping"),
        ("--- 1\n--- 2", "line 2: a second document begins"),
        ("", "a file is empty"),
        ("# only a comment", "a file is empty"),
        ("a: [1", "is not YAML: line 2"),
        ("a: b: c", "is not YAML: line 1: "),
        ("a: \x01", "is not YAML: it holds the character '\\x01'"),
        ("a: " + "9" * 5000, "line 1: a number of 5,000 digits"),
        ("a: " + "[" * 40 + "]" * 40, f"line 1: nested more than {MOST_LEVELS} levels deep"),
    ],
)
def test_what_is_ambiguous_or_no_plain_yaml_is_refused_with_its_line(text, message):
    with pytest.raises(ReadError) as refused:
        read_yaml(text, "a file")
    assert message in str(refused.value)
    assert fault(refused.value) is None


def test_anchors_aliases_and_merged_mappings_are_what_pyyaml_makes_of_them():
    text = "a: &x {k: 1, l: [1, 2]}\nb: *x\nc: {<<: *x, k: 3, m: 4}\nd: {<<: [{k: 5, n: 6}, *x], n: 7}\n&e e: *e\n"
    ours, theirs = read_yaml(text, "a file"), yaml.safe_load(text)
    assert ours == theirs
    assert [list(each) for each in (ours, ours["c"], ours["d"])] == [
        list(each) for each in (theirs, theirs["c"], theirs["d"])
    ]


def test_without_libyaml_the_same_is_read(monkeypatch):
    monkeypatch.setattr("mechhier.reading._Parser", yaml.SafeLoader)
    assert read_yaml(yaml.safe_dump(EXPERIMENT), "a file") == EXPERIMENT
    for text, message in (("a: 1\na: 1", "line 2"), ("a: [1", "line 1: while parsing"), ("a: '\x01'", "'\\x01'")):
        with pytest.raises(ReadError, match=message.replace("\\", r"\\")):
            read_yaml(text, "a file")


def bomb(item: str, levels: int = 9) -> str:
    return "a0: &a0 {k0: x}\n" + "".join(
        f"a{i}: &a{i} {item.format(aliases=', '.join([f'*a{i - 1}'] * 10), i=i)}\n" for i in range(1, levels)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb("[{aliases}]"), f"more than {MOST_VALUES:,} values"),
        (bomb("{{<<: [{aliases}], k{i}: 1}}"), f"more than {MOST_VALUES:,} values"),
        ("a: &a " + "x" * 50_000 + "\nb: [" + "*a, " * 1000 + "]", f"more than {MOST_VALUES:,} values"),
        ("a: [" + "1, " * MOST_VALUES + "]", f"more than {MOST_VALUES:,} values"),
        ("[" * 10**5, "levels deep"),
        ("{a: " * 10**5, "levels deep"),
        ("\n".join(" " * i + "a:" for i in range(1000)), "levels deep"),
        ("- " * 10**5 + "a", "levels deep"),
        ("a: " + "7" * 10**6, "a number of 1,000,000 digits"),
        (" " * 10**8, f"at most {MOST_SPEC_BYTES:,} are read"),
        ("a: " + "'" * 999_999, "is not YAML"),
        ("a" * 10**6, "must hold the fields"),
        ("&a " * 3 * 10**5, "is not YAML"),
    ],
    ids=lambda text: text[:12],
)
def test_what_would_take_long_or_much_memory_is_refused_in_two_seconds(text, message, tmp_path):
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as refused, within(2):
        Experiment.read(path)
    assert message in str(refused.value)
    assert fault(refused.value) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("title: ä".encode("utf-16"), "is written in UTF-16: save it as UTF-8"),
        ("title: ä".encode("utf-16-le"), "is UTF-16 without a mark"),
        ("title: ä".encode("utf-32"), "is written in UTF-32: save it as UTF-8"),
        ("a: 1\ntitle: ä".encode("latin-1"), "is not UTF-8: byte 0xe4 in line 2; if it is written in Latin-1"),
        (b"PK\x03\x04\x00\x00", "is not YAML"),
        (b"\x89PNG\r\n", "is not UTF-8: byte 0x89 in line 1"),
    ],
)
def test_other_encodings_are_named(content, message, tmp_path):
    for name, read in (("spec.yaml", Experiment.read), ("pairs.json", read_pairs)):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"UTF|YAML|JSON") as refused:
            read(path)
        assert message.replace("YAML", "YAML" if name == "spec.yaml" else "JSON") in str(refused.value)
        assert fault(refused.value) is None


def test_a_byte_order_mark_of_utf_8_is_left_out(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(EXPERIMENT).encode())
    assert Experiment.read(path) == Experiment.model_validate(EXPERIMENT)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.yaml", r"no file absent\.yaml, and no packaged experiment of that name \(demo\)"),
        (".", "is a folder"),
        ("a\0b", "'a.x00b' is no file's name"),
        ("x" * 5000, "'xxx.* is no file's name"),
        (EXPERIMENT, r"a spec is read from a file, not from a mapping of 6; Experiment\(\.\.\.\) takes fields"),
        (None, "a spec is read from a file, not from nothing"),
    ],
)
def test_what_is_no_file_is_said(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=message) as refused:
        Experiment.read(source)
    assert fault(refused.value) is None


def test_json_is_read_with_the_same_care():
    assert read_json('{"a": [1, 2.5, null, "x"]}', "a file") == {"a": [1, 2.5, None, "x"]}
    for text, message in (
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ("[NaN]", "NaN is not a number"),
        ("[" + "9" * 5000 + "]", "a number of 5,000 digits"),
        ("[" * 10**5, "nested too deeply"),
        ("[1, 2", "is not JSON: line 1, column 6"),
    ):
        with pytest.raises(ReadError, match=message) as refused:
            read_json(text, "a file")
        assert fault(refused.value) is None


def test_a_file_that_may_not_be_read_or_is_too_large_is_named(tmp_path):
    path = tmp_path / "large.txt"
    path.write_text("x" * 11)
    with pytest.raises(ReadError, match=r"large\.txt has 11 bytes; at most 10 are read"):
        read_text(path, most_bytes=10)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "absent.txt", most_bytes=10)


# -- settings --------------------------------------------------------------------------------------------------------

COMPLETE: dict[type[Described], list[dict[str, Any]]] = {
    ModelSpec: [{"architecture": "llama", "n_layers": 2, "d_model": 32, "n_heads": 4}],
    TrainSpec: [{"steps": 10, "learning_rate": 0.01}],
    Arm: [EXPERIMENT["arms"]["one"]],
    Experiment: [EXPERIMENT],
    CorpusSpec: [{"grammar": GRAMMARS[0], "tokens": 5000}],
    DocumentGrammar: GRAMMARS[:2],
    NGram: [GRAMMARS[2]],
    FittedNGram: [GRAMMARS[3]],
    PCFG: [GRAMMARS[4]],
    runs.Manifest: [MANIFEST],
    storage.Manifest: [CORPUS_MANIFEST],
    storage.BlockEntry: CORPUS_MANIFEST["blocks"],
}


def every(cls: type) -> set[type]:
    return {cls} | {each for sub in cls.__subclasses__() for each in every(sub)}


def test_every_model_of_settings_is_in_the_table():
    ours = {cls for cls in every(Described) if cls.__module__.startswith("mechhier.")}
    assert ours - {Described, Grammar} == set(COMPLETE)


CASES = [pytest.param(cls, fields, id=cls.__name__) for cls, each in COMPLETE.items() for fields in each]


def refusals(cls: type[Described], fields: dict[str, Any]) -> Iterator[SpecError]:
    """What is said of these settings by every way in."""
    for make in (
        lambda: cls(**fields),
        lambda: cls.model_validate(fields),
        lambda: cls(**COMPLETE[cls][0]).model_copy(update=fields),
    ):
        with pytest.raises(SpecError) as refused:
            make()
        assert fault(refused.value) is None
        assert len(str(refused.value)) < 600
        yield refused.value


@pytest.mark.parametrize(("cls", "fields"), CASES)
def test_settings_are_the_same_by_every_way_in_and_can_be_copied_and_pickled(cls, fields):
    made = cls(**fields)
    others = [cls.model_validate(fields), cls.model_validate_json(json.dumps(fields)), made.model_copy()]
    assert all(other == made for other in [*others, copy.deepcopy(made), pickle.loads(pickle.dumps(made))])
    if cls not in (Arm, Experiment):  # whose trainings' seeds may not be written
        assert cls.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize(("cls", "fields"), CASES)
def test_a_misspelt_field_gets_the_nearest_name(cls, fields):
    for name in cls.model_fields:
        if len(name) > 3:
            for refused in refusals(cls, {**fields, name[:-1] + "_": 1}):
                assert f"{name[:-1]}_: no such field; did you mean" in str(refused)


@pytest.mark.parametrize(("cls", "fields"), CASES)
@pytest.mark.parametrize(
    "value", [object(), {1, 2}, b"x", float("nan"), "\ud800", "\x1b[2J", [[[]]], {"a": {1: object()}}]
)
def test_a_wrong_value_of_any_field_is_refused_and_the_field_named(cls, fields, value):
    free = {"corpus"} if cls is storage.Manifest else set()  # which is checked when the corpus is opened
    for name in set(cls.model_fields) - (free if isinstance(value, dict) else set()):
        for refused in refusals(cls, {**fields, name: value}):
            assert name in str(refused)


@pytest.mark.parametrize(("cls", "fields"), CASES)
def test_missing_fields_are_listed(cls, fields):
    required = [name for name, field in cls.model_fields.items() if field.is_required()]
    if not required:
        return
    with pytest.raises(SpecError) as refused:
        cls(**{name: value for name, value in fields.items() if name == "kind"})
    assert all(f"{name}: is missing" in str(refused.value) for name in required)


@pytest.mark.parametrize("value", [3, None, "x", [1], {1: 2}])
@pytest.mark.parametrize(("cls", "fields"), CASES)
def test_what_is_no_mapping_of_fields_is_refused(cls, fields, value):
    with pytest.raises(SpecError) as refused:
        cls.model_validate(value)
    assert fault(refused.value) is None
    with pytest.raises(SpecError, match="is not JSON"):
        cls.model_validate_json("{")


def test_problems_inside_settings_are_named_by_their_path():
    spec = copy.deepcopy(EXPERIMENT)
    spec["arms"]["one"]["grammar"]["n_wrds"] = 3
    spec["arms"]["two"]["grammar"]["n_levels"] = "3"
    spec["arms"]["two"]["train"]["betas"] = [0.9, 1.0]
    spec["phenomena"]["hydra"]["level"] = "heads"
    with pytest.raises(SpecError) as refused:
        Experiment.model_validate(spec)
    assert str(refused.value).splitlines() == [
        "Experiment:",
        "  arms.one.grammar.n_wrds: no such field; did you mean n_words?",
        "  arms.two.grammar.n_levels: must be a whole number, got '3'",
        "  arms.two.train.betas.1: must be below 1, got 1",
        "  phenomena.hydra.level: must be 'layer' or 'head', got 'heads'",
    ]


def test_many_problems_are_counted_not_listed():
    with pytest.raises(SpecError, match=r"and \d+ more$") as refused:
        PCFG(start="S", terminals=("a",), rules=[("S", ("a",), "x")] * 1000)
    assert len(str(refused.value)) < 600


def test_an_arm_that_a_family_draws_stays_one_when_it_is_changed():
    arm = Arm(**{**ARM, "grammar": {"kind": "cfg3", "n_levels": 3, "seed": 4}, "train": {"steps": 10}})
    changed = arm.model_copy(update={"title": "another"})
    assert changed.language_seed == 4
    assert changed.language(5) == arm.language(5) != arm.grammar
    assert arm.model_copy(update={"grammar": DocumentGrammar()}).language_seed is None


# -- numbers ---------------------------------------------------------------------------------------------------------


def made_with(count: Any) -> list[Any]:
    """A count by every way in."""
    return [
        TrainSpec(steps=count).steps,
        ModelSpec("llama", n_layers=1, d_model=64, n_heads=1, d_mlp=count).d_mlp,
        DocumentGrammar(n_words=count).n_words,
        NGram(n_rows=count).n_rows,
        cfg3(n_levels=2, seed=count) == cfg3(n_levels=2, seed=int(count)) and int(count),
        DocumentGrammar(context=50).corpus(count, seed=count).seed,
        Corpus.from_description({"grammar": {"kind": "dyck"}, "tokens": count, "context": 50}).n_tokens // 50 * 50,
        check_options("hydra", {"n_sequences": count})["n_sequences"],
        check_arguments(checkpoint_steps, {"steps": count})["steps"],
        whole("count", count, least=1),
    ]


@pytest.mark.parametrize("count", [1000, 1e3, np.int64(1000), np.uint16(1000), np.float64(1000.0), np.float32(1000.0)])
def test_whole_numbers_of_every_type_are_counts_and_seeds(count):
    made = made_with(count)
    assert made == [1000] * len(made)
    assert {type(each) for each in made} == {int}
    json.dumps(DocumentGrammar(context=50).corpus(count, seed=count).description)


@pytest.mark.parametrize("value", [True, np.bool_(True), "1000", 1000.5, None, [1000], float("inf")])
def test_what_only_looks_like_a_number_is_none(value):
    ways = [
        lambda: ModelSpec("llama", n_layers=value, d_model=64, n_heads=1),
        lambda: TrainSpec(batch_size=value),
        lambda: TrainSpec(learning_rate=value) if not isinstance(value, float) else TrainSpec(batch_size=value),
        lambda: DocumentGrammar(n_words=value),
        lambda: DocumentGrammar(context=50).corpus(value),
        lambda: DocumentGrammar(context=50).corpus(1000, seed=value),
        lambda: cfg3(n_levels=value),
        lambda: check_options("hydra", {"n_sequences": value}),
        lambda: DocumentGrammar().generate(value, 50, np.random.default_rng(0)),
    ]
    for way in ways:
        with pytest.raises(SpecError, match=r"must be a (whole )?number|must be finite|is missing"):
            way()


@pytest.mark.parametrize("word", ["yes", "no", "on", 1, 0, None, "true"])
def test_what_only_stands_for_true_or_false_is_neither(word):
    for make in (
        lambda: DocumentGrammar(hierarchical=word),
        lambda: cfg3(distinct_children=word),
        lambda: DocumentGrammar(context=50).corpus(1000, packed=word),
    ):
        with pytest.raises(SpecError, match="must be true or false"):
            make()


SHAPE = {"architecture": "llama", "n_layers": 1, "d_model": 64, "n_heads": 1}
LARGE = ("S", ("a",), 1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ModelSpec(**SHAPE | {"n_layers": 10**9}),
        lambda: ModelSpec(**SHAPE | {"d_model": 10**9}),
        lambda: ModelSpec(**SHAPE | {"d_mlp": 10**12}),
        lambda: ModelSpec(**SHAPE | {"n_ctx": 10**12}),
        lambda: ModelSpec(**SHAPE | {"n_heads": 10**400}),
        lambda: TrainSpec(steps=10**15),
        lambda: TrainSpec(batch_size=10**9),
        lambda: TrainSpec(n_checkpoints=10**9),
        lambda: TrainSpec(eval_rows=10**9),
        lambda: TrainSpec(checkpoints_at=range(10**6)),
        lambda: TrainSpec(checkpoints_at=tuple(range(10**6))),
        lambda: checkpoint_steps(10**15, 12),
        lambda: checkpoint_steps(100, 10**9),
        lambda: DocumentGrammar(n_words=10**9),
        lambda: DocumentGrammar(n_words=400_000),
        lambda: DocumentGrammar(n_words=1000, lexicon=10**6),
        lambda: DocumentGrammar(n_connectors=10**9),
        lambda: DocumentGrammar(n_sections=10**9),
        lambda: DocumentGrammar(n_sections=10**6, n_sentences=10**6).corpus(10**9),
        lambda: DocumentGrammar(context=10**12),
        lambda: DocumentGrammar(language_seed=10**400),
        lambda: DocumentGrammar().corpus(10**20),
        lambda: DocumentGrammar().corpus(10**14, context=10**12),
        lambda: DocumentGrammar().generate(1, 10**12, np.random.default_rng(0)),
        lambda: NGram(n_tokens=10**9),
        lambda: NGram(n_rows=10**9),
        lambda: NGram(n_rows=10**5, n_tokens=10**6),
        lambda: NGram(orders=tuple(range(1, 10**5))),
        lambda: NGram.fit(NGram().corpus(10**4, context=50), 10**9),
        lambda: PCFG(start="S", terminals=("a",), rules=[LARGE], lengths=(1, 10**6)),
        lambda: PCFG(start="S", terminals=("a",), rules=[("S", ("a",) * 2 * 10**6, 1.0)]),
        lambda: PCFG(start="S", terminals=("a",), rules=[LARGE] * 200_000),
        lambda: PCFG(start="S", terminals=tuple(f"t{i}" for i in range(10**5)), rules=[LARGE]),
        lambda: cfg3(n_levels=10**5),
        lambda: cfg3(n_symbols=10**9),
        lambda: cfg3(n_symbols=10**4, n_levels=100),
        lambda: cfg3(n_symbols=1000, n_rules=(4, 4)),
        lambda: random_hierarchy(n_levels=10**5),
        lambda: random_hierarchy(n_symbols=10**4, tuple_length=100, n_tuples=10**4),
        lambda: dyck(max_depth=10**5),
        lambda: dyck(n_brackets=10**9),
        lambda: check_options("induction", {"n_sequences": 10**9}),
    ],
)
def test_absurd_sizes_are_refused_at_once_with_a_number(make):
    with pytest.raises(ValueError, match=r"\d") as refused, within(2):
        make()
    assert fault(refused.value) is None
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (lambda: dyck(max_depth=1000), lambda grammar: grammar.max_document_length is None or grammar.vocab_size),
        (lambda: cfg3(n_levels=100), lambda grammar: grammar.max_document_length),
        (lambda: DocumentGrammar(n_sections=10**6), lambda grammar: grammar.corpus(1000, context=50).rows(0, 2)),
    ],
)
def test_large_sizes_that_are_accepted_are_worked_on_in_a_moment(make, read):
    with within(5):
        read(make())


def test_what_an_arm_cannot_be_trained_with_is_refused_before_the_first_is_trained():
    for change, message in (
        (
            {"model": {**EXPERIMENT["model"], "n_ctx": 32}},
            "the rows of arm one, 40 tokens, do not fit the model's n_ctx=32",
        ),
        (
            {
                "model": {**SHAPE, "d_model": 200_000, "d_mlp": 1},
                "arms": {
                    "a": {**EXPERIMENT["arms"]["one"], "grammar": {"kind": "ngram", "n_tokens": 10**6, "n_rows": 1}}
                },
            },
            "GiB",
        ),
    ):
        with pytest.raises(SpecError, match=message) as refused:
            Experiment.model_validate({**EXPERIMENT, **change})
        assert fault(refused.value) is None
    arm = {**ARM, "grammar": {"kind": "document", "n_sections": 10**6}, "train": {"steps": 10}}
    with pytest.raises(SpecError, match=r"context must be at most .* give context"):
        Arm(**arm)


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a \ud800 title", "\x1b]0;title\x07", "a\x00b", "\x9b31m"])
def test_half_characters_and_control_characters_are_refused_by_every_way_in(text, tmp_path):
    ways = [
        lambda: Experiment(**{**EXPERIMENT, "title": text}),
        lambda: Experiment(**EXPERIMENT).model_copy(update={"title": text}),
        lambda: Arm(**{**EXPERIMENT["arms"]["one"], "about": text}),
        lambda: PCFG(start="S", terminals=(text,), rules=[("S", (text,), 1.0)]),
        lambda: Corpus.from_description({"grammar": {"kind": "document", text: 1}, "tokens": 1000}),
        lambda: check_options("hydra", {"level": text}),
        lambda: runs.Manifest(**{**MANIFEST, "device": text}),
    ]
    spec, pairs = tmp_path / "spec.yaml", tmp_path / "pairs.json"
    spec.write_text(json.dumps({**EXPERIMENT, "title": text}))
    pairs.write_text(json.dumps([{"input": "a", "output": text}]))
    for way in [*ways, lambda: Experiment.read(spec), lambda: read_pairs(pairs)]:
        with pytest.raises(ValueError, match=r"surrogate|control character|Unicode|is not YAML") as refused:
            way()
        assert fault(refused.value) is None


def test_text_in_any_script_is_accepted_and_shown_as_it_is():
    assert Experiment(**{**EXPERIMENT, "title": "Größe 日本語 😀"}).title == "Größe 日本語 😀"
    with pytest.raises(SpecError, match="größe: no such field"):
        TrainSpec(größe=1)


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PHENOMENA)
def test_the_default_of_every_option_is_accepted_and_other_types_are_not(name):
    signature = inspect.signature(PHENOMENA[name])
    checked = {option for option, adapter in argument_types(PHENOMENA[name]).items() if adapter is not None} - {"seed"}
    defaults = {option: signature.parameters[option].default for option in checked}
    assert defaults
    assert check_options(name, defaults, written=True) == defaults
    for option in checked:
        for value in ([1], {"a": 1}, "none of them", b"x", object(), float("nan"), -1, 10**12):
            if option == "max_bytes" and value == 10**12:
                continue
            with pytest.raises(SpecError, match=f"^{name}.{option}: must be ") as refused:
                check_options(name, {option: value})
            assert fault(refused.value) is None
        with pytest.raises(SpecError, match="no such option; did you mean"):
            check_options(name, {option + "s_": 1})


@pytest.mark.parametrize("name", PHENOMENA)
def test_arrays_and_tasks_are_options_in_python_and_not_in_a_spec(name):
    hints = get_type_hints(inspect.unwrap(PHENOMENA[name]))
    others = [
        option for option, adapter in argument_types(PHENOMENA[name]).items() if adapter is None and option != "model"
    ]
    assert set(others) <= {"tokens", "targets", "tasks"} & set(hints)
    for option in others:
        value = np.zeros((2, 3))
        assert check_options(name, {option: value})[option] is value
        with pytest.raises(SpecError, match="no such option"):
            check_options(name, {option: value}, written=True)
    for given in ("model", "seed"):
        with pytest.raises(SpecError, match="no such option"):
            check_options(name, {given: 1})


def test_options_that_are_no_mapping_and_phenomena_that_are_none_are_refused():
    with pytest.raises(SpecError, match="hidra: no such phenomenon; did you mean hydra"):
        check_options("hidra", {})
    with pytest.raises(SpecError, match="hydra: takes options by name, not 3"):
        check_options("hydra", 3)  # type: ignore[arg-type]


# -- files that are not written by hand ------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"corpus": {"tokens": 3}}, {"train": {"stps": 1}}, {"steps": "6"}, {"format": 4}])
def test_a_manifest_of_a_run_says_what_is_wrong_with_it(change, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({**MANIFEST, **change}))
    with pytest.raises(RunError, match=f"cannot read .*manifest.json: .*{next(iter(change))}") as refused:
        runs.Manifest.read(tmp_path)
    assert fault(refused.value) is None


@pytest.mark.parametrize("content", ["", "[", "[" * 10**5, "\xff", '{"format": 1}', '{"a": 1, "a": 2}', "[1]", "null"])
def test_damaged_manifests_are_named(content, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
    for read, error in ((runs.Manifest.read, RunError), (Corpus.open, CorpusError)):
        with pytest.raises(error, match=r"manifest\.json") as refused:
            read(tmp_path)
        assert fault(refused.value) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds 0 pairs"),
        ([{"input": "a", "output": "b"}] * 100_001, "holds 100,001 pairs; 1 to 100,000 are read"),
        ([{"input": "x" * 201, "output": "b"}], "row 1: 'input' has 201 characters; at most 200"),
        ([{"input": "a", "output": "b\nc"}], "row 1: 'output' has a line break or a tab"),
        ([{"input": "a", "output": "\x1b[1m"}], "row 1: 'output' holds a control character"),
        ([{"input": "a", "output": "\ud800"}], "row 1: 'output' holds half a surrogate pair"),
        ([{"input": "a", "output": None}], "row 1: expected .* got nothing .null. as 'output'"),
        ([{"inputs": "a", "output": "b"}], "row 1: expected .* without 'input'"),
        ({"a": "b"}, "must hold a list"),
    ],
)
def test_a_word_list_says_which_row_is_wrong(rows, message, tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=message) as refused:
        read_pairs(path)
    assert fault(refused.value) is None


def test_word_lists_that_are_no_files_are_refused(tmp_path):
    (tmp_path / "folder.json").mkdir()
    for task, message in (
        (tmp_path / "folder.json", "is a folder"),
        (3, "the name of a built-in list"),
        ("a\x1b", "x1b"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            read_pairs(task)
        assert fault(refused.value) is None

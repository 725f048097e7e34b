from __future__ import annotations

import json
import re
from collections import Counter
from functools import lru_cache
from itertools import permutations, product

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from random_models import CLASSES, random_hooked
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import mechhier as mh
from mechhier.models import load_model
from mechhier.phenomena.tasks import KINDS, built_in_tasks, concatenate, other_tasks, pairs, word_tasks
from mechhier.phenomena.tasks.text import _deranged

N_SPLITS = 3
LONG = "pneumonoultramicroscopic"
LETTERS = {letter: letter.upper() for letter in "abcdefghijkl"}
DEMONSTRATION = re.compile(r"Q: (.*)\nA: (.*)\n\n")


def lists() -> dict[str, dict[str, str]]:
    """The built-in lists, read by nothing but the JSON module."""
    return {
        path.stem: {row["input"]: row["output"] for row in json.loads(path.read_text(encoding="utf-8"))}
        for path in sorted((pairs._BUILT_IN).iterdir())
    }


def write(path, outputs):
    path.write_text(json.dumps([{"input": x, "output": y} for x, y in outputs.items()]))
    return path


def train(*, vocab_size, bos="<s>", prepends=True):
    """A byte-level BPE tokenizer trained on the word lists in the template: the commoner words become one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"Q: {x}\nA: {y}\n\n" for outputs in [*lists().values(), LETTERS] for x, y in outputs.items()]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return fast(tokenizer, bos=bos, prepends=prepends)


def fast(tokenizer, *, bos="<s>", prepends=True):
    """With a beginning-of-sequence token that it names, and puts in front of text or not."""
    if bos and prepends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>")


def bare(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@lru_cache
def bpe():
    """Some outputs of every list are one token, some are not. Not the model's, which TransformerLens changes."""
    return train(vocab_size=4000)


def save(tokenizer, folder, *, architecture="gpt2", n_ctx=400):
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 1}
    if architecture == "gpt2":
        config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=n_ctx, **sizes)
    else:
        config = transformers.GPTNeoXConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=n_ctx,
            **sizes,
        )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(bpe(), tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


FAMILY = ["english-french", "english-german", "country-capital", "english-spanish"]


@pytest.fixture(scope="module")
def made(model):
    return dict(zip(FAMILY, word_tasks(model, FAMILY, n_demonstrations=4, n_prompts=8), strict=True))


def splits(task):
    return task.selection, task.estimation, task.test


def texts(model, prompts, kind):
    """Every prompt as text, behind the beginning-of-sequence token."""
    rows = [row[row >= 0] for row in getattr(prompts, kind)]
    assert all(row[0] == model.tokenizer.bos_token_id for row in rows)
    return [model.tokenizer.decode(row[1:].tolist()) for row in rows]


def parsed(text):
    """The demonstrations and the query of a prompt."""
    shown = DEMONSTRATION.findall(text)
    query = re.fullmatch(r"Q: (.*)\nA:", DEMONSTRATION.sub("", text))
    assert query, text
    return shown, query[1]


def every_row(model, made):
    """Per task, split and prompt: name, kind -> (demonstrations, query), and the row's numbers."""
    for name, task in made.items():
        for prompts in splits(task):
            read = {kind: [parsed(text) for text in texts(model, prompts, kind)] for kind in KINDS}
            for row in range(len(prompts.answers)):
                yield (
                    name,
                    {kind: each[row] for kind, each in read.items()},
                    prompts.answers[row],
                    (prompts.other_answers[row], prompts.wrong_answers[row], prompts.queries[row]),
                )


# -- what a prompt is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("bos", "prepends"), [("<s>", True), (None, False), ("<s>", False)])
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_prompts_are_the_published_template_behind_bos_where_the_tokenizer_puts_one(
    kind, architecture, bos, prepends, tmp_path
):
    """Two demonstrations of eight pairs: all texts that there can be, written out."""
    tokenizer = train(vocab_size=400, bos=bos, prepends=prepends)
    outputs = dict(list(LETTERS.items())[:8])
    listed = write(tmp_path / "upper.json", outputs)
    model = load_model(save(tokenizer, tmp_path / "model", architecture=architecture), as_=kind)
    (task,) = word_tasks(model, [listed], n_demonstrations=2, n_prompts=4)
    prefix = [tokenizer.bos_token_id] if prepends else []
    possible = {}
    for a, b, c in permutations(outputs, 3):
        A, B = outputs[a], outputs[b]
        for name, text in {
            "clean": f"Q: {a}\nA: {A}\n\nQ: {b}\nA: {B}\n\nQ: {c}\nA:",
            "shuffled": f"Q: {a}\nA: {B}\n\nQ: {b}\nA: {A}\n\nQ: {c}\nA:",
            "zero_shot": f"Q: {c}\nA:",
        }.items():
            possible[name, outputs[c], tuple(prefix + bare(tokenizer, text))] = (a, b)
    for prompts in splits(task):
        for row, answer in enumerate(prompts.answers):
            word = tokenizer.decode([answer]).removeprefix(" ")
            shown = {
                possible[name, word, tuple(tokens[tokens >= 0].tolist())]
                for name in ("clean", "shuffled")
                for tokens in [getattr(prompts, name)[row]]
            }
            assert len(shown) == 1
            zero_shot = prompts.zero_shot[row]
            assert ("zero_shot", word, tuple(zero_shot[zero_shot >= 0].tolist())) in possible


def test_answers_are_what_the_tokenizer_adds_to_the_prompt(model, made):
    n_read = 0
    for name, task in made.items():
        for prompts in splits(task):
            for kind, row in product(("clean", "shuffled", "zero_shot"), range(len(prompts.answers))):
                tokens = getattr(prompts, kind)[row]
                tokens = tokens[tokens >= 0].tolist()
                text = model.tokenizer.decode(tokens[1:])
                output = lists()[name][parsed(text)[1]]
                assert [0, *bare(bpe(), f"{text} {output}")] == [*tokens, prompts.answers[row]]
                n_read += 1
    assert n_read == len(FAMILY) * N_SPLITS * 3 * 8


def test_demonstrations_show_the_list_and_neither_the_query_nor_the_dummy_query(model, made):
    for name, read, _, _ in every_row(model, made):
        outputs = lists()[name]
        (clean, x), (shuffled, _), (none, _), (dummy, other) = (read[kind] for kind in KINDS)
        assert {query for _, query in (read["clean"], read["shuffled"], read["zero_shot"])} == {x}
        assert len({each for each, _ in clean}) == 4
        assert all(outputs[each] == y for each, y in clean)
        assert dummy == clean
        assert none == []
        assert len({x, other, *(each for each, _ in clean)}) == 6
        assert [each for each, _ in shuffled] == [each for each, _ in clean]


def test_no_shuffled_output_stands_where_it_or_an_equal_one_was(model):
    """Continents repeat: ten countries lie on six at most."""
    (task,) = word_tasks(model, ["country-continent"], n_demonstrations=10, n_prompts=12)
    repeats = 0
    for _, read, _, _ in every_row(model, {task.name: task}):
        right, wrong = ([y for _, y in read[kind][0]] for kind in ("clean", "shuffled"))
        assert Counter(right) == Counter(wrong)
        assert all(a != b for a, b in zip(right, wrong, strict=True))
        repeats += max(Counter(right).values()) > 2
    assert repeats > 10


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=12), st.integers(0, 2**32 - 1))
def test_outputs_are_deranged_whenever_none_is_the_majority(outputs, seed):
    most, count = Counter(outputs).most_common(1)[0]
    outputs += [most.upper()] * max(0, 2 * count - len(outputs))
    deranged = _deranged(outputs, np.random.default_rng(seed))
    assert Counter(deranged) == Counter(outputs)
    assert all(a != b for a, b in zip(deranged, outputs, strict=True))


def test_derangements_differ():
    rng = np.random.default_rng(0)
    seen = Counter(tuple(_deranged(list("aabc"), rng)) for _ in range(300))
    assert set(seen) == {("b", "c", "a", "a"), ("c", "b", "a", "a")}
    assert min(seen.values()) > 100


# -- splits, other tasks, wrong answers -------------------------------------------------------------------------------


def test_splits_ask_disjoint_queries_that_cover_all_one_token_answers(model):
    (task,) = word_tasks(model, ["verb-past"], n_prompts=60)
    asked = [set(prompts.queries.tolist()) for prompts in splits(task)]
    assert sum(map(len, asked)) == len(set.union(*asked))
    inputs = list(lists()["verb-past"])
    one_token = {inputs.index(x) for x, y in lists()["verb-past"].items() if len(bare(bpe(), f" {y}")) == 1}
    assert set.union(*asked) == one_token
    assert max(map(len, asked)) - min(map(len, asked)) <= 1


def test_prompts_of_one_query_ask_the_same_word_in_other_demonstrations(model):
    (task,) = word_tasks(model, ["verb-past"], n_prompts=90)
    inputs = list(lists()["verb-past"])
    read = [parsed(text) for text in texts(model, task.test, "clean")]
    assert [inputs[query] for query in task.test.queries] == [x for _, x in read]
    assert len({str(shown) for shown, _ in read}) == 90 > len(set(task.test.queries.tolist()))


def contradictions(a, b):
    """Queries that both tasks can be asked, with different answers."""
    first, second = ({x: y for x, y in lists()[name].items() if len(bare(bpe(), f" {y}")) == 1} for name in (a, b))
    return sum(second.get(x, y) != y for x, y in first.items())


def test_the_other_task_is_the_one_that_contradicts_most(made):
    others = [FAMILY[index] for index in other_tasks(list(made.values()))]
    for name, other in zip(FAMILY, others, strict=True):
        counts = {each: contradictions(name, each) for each in FAMILY if each != name}
        assert counts[other] == max(counts.values()) > 0


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (["number-digits", "verb-past", "verb-gerund"], ["verb-past", "verb-gerund", "verb-past"]),
        (["verb-past", "number-digits", "verb-gerund"], ["verb-gerund", "verb-gerund", "verb-past"]),
        (["verb-past", "verb-gerund", "number-digits"], ["verb-gerund", "verb-past", "verb-past"]),
    ],
)
def test_a_task_that_none_contradicts_has_the_next_one_and_no_other_answers(names, others, model):
    made = word_tasks(model, names, n_prompts=2)
    assert [task.other for task in made] == others
    alone = made[names.index("number-digits")]
    assert all((prompts.other_answers == -1).all() for prompts in splits(alone))


def test_other_answers_are_the_other_tasks_for_the_same_word_or_unknown(model, made):
    known, unknown = 0, 0
    for name, read, answer, (other, _, _) in every_row(model, made):
        word = lists()[made[name].other].get(read["clean"][1])
        tokens = [] if word is None else bare(bpe(), f" {word}")
        if len(tokens) == 1 and tokens[0] != answer:
            assert other == tokens[0]
            known += 1
        else:
            assert other == -1
            unknown += 1
    assert min(known, unknown) > 20


def test_a_single_task_has_no_other(model):
    (task,) = word_tasks(model, ["verb-past"], n_prompts=2)
    assert task.other is None
    assert (task.test.other_answers == -1).all()


def test_wrong_answers_are_right_for_another_query_and_not_shown(model, made):
    for name, read, answer, (_, wrong, _) in every_row(model, made):
        word = model.tokenizer.decode([wrong]).removeprefix(" ")
        assert word in lists()[name].values()
        assert wrong != answer
        assert word not in {y for _, y in read["clean"][0]}


def test_wrong_answers_are_among_the_few_that_are_not_shown(model, tmp_path):
    (task,) = word_tasks(model, [write(tmp_path / "upper.json", LETTERS)], n_demonstrations=9, n_prompts=8)
    for _, read, answer, (_, wrong, _) in every_row(model, {"upper": task}):
        unseen = {bare(bpe(), f" {y}")[0] for y in {*LETTERS.values()} - {y for _, y in read["clean"][0]}}
        assert wrong in unseen - {answer}


def test_wrong_answers_may_be_shown_where_all_are(model, tmp_path):
    binary = {x: "yes" if i % 2 else "no" for i, x in enumerate(LETTERS)}
    (task,) = word_tasks(model, [write(tmp_path / "parity.json", binary)], n_demonstrations=4, n_prompts=6)
    for prompts in splits(task):
        assert set(prompts.answers.tolist()) | set(prompts.wrong_answers.tolist()) == {
            bare(bpe(), f" {y}")[0] for y in ("yes", "no")
        }


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_pairs_with_an_answer_of_several_tokens_are_shown_but_never_asked_and_named(model, tmp_path, capsys):
    outputs = LETTERS | {"m": f"{LONG}m", "n": f"{LONG}n"}
    (task,) = word_tasks(model, [write(tmp_path / "mixed.json", outputs)], n_demonstrations=10, n_prompts=12)
    n_tokens = {x: len(bare(bpe(), f" {outputs[x]}")) for x in "mn"}
    assert min(n_tokens.values()) > 1
    assert task.excluded == tuple(f"{x} -> {outputs[x]}: {n_tokens[x]} tokens" for x in "mn")
    assert "mixed 2 of 14" in capsys.readouterr().err
    read = [each["clean"] for _, each, _, _ in every_row(model, {"mixed": task})]
    assert not {x for _, x in read} & set("mn")
    assert {"m", "n"} <= {x for shown, _ in read for x, _ in shown}


def test_prompts_of_different_lengths_come_in_groups_of_one_length_without_padding(model, made):
    prompts = concatenate([made[name].test for name in FAMILY])
    assert all(len(set(prompts.lengths(kind))) > 1 for kind in ("clean", "shuffled", "dummy"))
    for kind in KINDS:
        groups = list(prompts.same_length(kind))
        assert len(groups) == len(set(prompts.lengths(kind)))
        assert sorted(np.concatenate([rows for rows, _ in groups]).tolist()) == list(range(len(prompts.answers)))
        for rows, tokens in groups:
            assert (tokens >= 0).all()
            assert (tokens[:, 0] == model.tokenizer.bos_token_id).all()
            for row, expected in zip(rows, tokens, strict=True):
                padded = getattr(prompts, kind)[row]
                np.testing.assert_array_equal(padded[padded >= 0], expected)


def merging_tokenizer():
    """Characters, a blank with a capital letter, and merges of an answer with what is before it."""
    letters = [*LETTERS.values()]
    merges = [(" ", letter) for letter in letters]
    merges += [("A", ":"), (":", f" {letters[0]}"), ("A:", f" {letters[0]}")]
    merges += [("b", "\n"), ("b\n", "A:"), ("b\nA:", f" {letters[2]}")]
    words = ["<s>", "</s>", *"Q:\n ", *letters, *LETTERS, *(first + second for first, second in merges)]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return fast(Tokenizer(models.BPE(vocab, merges)))


def test_tokenizers_that_merge_across_words_never_break_the_definition_of_the_answer(tmp_path):
    """The answer A merges with the colon before it, whatever the query; C behind b alone, with all of the line before.

    Prompts that show b with C, which only shuffled ones do, would be shorter than clean ones: they are not made.
    """
    tokenizer = merging_tokenizer()
    model = load_model(save(tokenizer, tmp_path / "model"))

    def ids(text):
        return tokenizer(text)["input_ids"]

    assert len(ids("Q: b\nA: C\n\nQ: d\nA:")) < len(ids("Q: b\nA: D\n\nQ: d\nA:"))
    (task,) = word_tasks(model, [write(tmp_path / "upper.json", LETTERS)], n_demonstrations=4, n_prompts=60)
    assert task.excluded == ("a -> A: the prompt's tokens change with it",)
    inputs = list(LETTERS)
    for prompts in splits(task):
        np.testing.assert_array_equal(prompts.lengths("clean"), prompts.lengths("shuffled"))
        for kind, row in product(("clean", "shuffled", "zero_shot"), range(60)):
            tokens = getattr(prompts, kind)[row]
            tokens = tokens[tokens >= 0].tolist()
            text = "".join(tokenizer.convert_ids_to_tokens(tokens[1:]))
            assert ids(text) == tokens
            assert ids(f"{text} {LETTERS[inputs[prompts.queries[row]]]}") == [*tokens, prompts.answers[row]]


def test_a_tokenizer_that_always_merges_the_answer_is_refused(tmp_path):
    """After a demonstration, though not in a prompt of the query alone, " B" merges with the colon."""
    merges = [(" ", letter) for letter in LETTERS.values()] + [("\n", "\n"), ("\n\n", "Q"), ("\n\nQ", ":")]
    merges += [("\n\nQ:", " "), ("\n\nQ: ", "b"), ("\n\nQ: b", "\n"), ("\n\nQ: b\n", "A")]
    merges += [("\n\nQ: b\nA", ":"), ("\n\nQ: b\nA:", " B")]
    words = ["<s>", "</s>", *"Q:\n ", *LETTERS.values(), *LETTERS, *(first + second for first, second in merges)]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    model = load_model(save(fast(Tokenizer(models.BPE(vocab, merges))), tmp_path / "model"))
    with pytest.raises(ValueError, match="query 'b': in 100 draws of demonstrations the tokenizer always merged"):
        word_tasks(model, [write(tmp_path / "upper.json", LETTERS)], n_demonstrations=4, n_prompts=12)


@pytest.mark.parametrize("kind", CLASSES)
def test_prompts_do_not_depend_on_the_class(kind, folder, made):
    again = word_tasks(load_model(folder, as_=kind), FAMILY, n_demonstrations=4, n_prompts=8)
    for first, second in zip(made.values(), again, strict=True):
        for one, other in zip(splits(first), splits(second), strict=True):
            for name, values in vars(one).items():
                np.testing.assert_array_equal(values, getattr(other, name))


def test_prompts_depend_on_the_list_and_the_seed_alone(model, made):
    (alone,) = word_tasks(model, ["english-german"], n_demonstrations=4, n_prompts=8)
    (seeded,) = word_tasks(model, ["english-german"], n_demonstrations=4, n_prompts=8, seed=1)
    for name in (*KINDS, "answers", "wrong_answers", "queries"):
        together = getattr(made["english-german"].test, name)
        np.testing.assert_array_equal(together, getattr(alone.test, name))
        assert not np.array_equal(together, getattr(seeded.test, name))


def test_tasks_of_one_list_under_two_names_draw_different_prompts(model, tmp_path):
    one, other = word_tasks(model, [write(tmp_path / f"{name}.json", LETTERS) for name in ("one", "other")])
    assert not np.array_equal(one.test.queries, other.test.queries)


# -- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", built_in_tasks())
def test_built_in_lists_are_functions_of_at_least_sixty_different_words(name):
    rows = json.loads((pairs._BUILT_IN / f"{name}.json").read_text(encoding="utf-8"))
    assert all(set(row) == {"input", "output"} for row in rows)
    assert len({row["input"] for row in rows}) == len(rows) >= 60
    assert all(word and word == word.strip() and "\n" not in word for row in rows for word in row.values())
    assert all(row["input"] != row["output"] for row in rows)
    assert len({row["output"] for row in rows}) >= 6


def test_families_of_built_in_lists_contradict_each_other():
    """At least forty inputs in common with another answer, so that the control has something to be judged on."""
    every = lists()
    assert len(every) >= 12
    shared = {(a, b): sum(every[b].get(x, y) != y for x, y in every[a].items()) for a, b in permutations(every, 2)}
    for a in every:
        assert max(shared[a, b] for b in every if b != a) >= 40, a


@pytest.mark.parametrize(
    ("name", "x", "y"),
    [
        ("country-capital", "France", "Paris"),
        ("country-language", "Brazil", "Portuguese"),
        ("country-continent", "Kenya", "Africa"),
        ("country-currency", "Japan", "yen"),
        ("english-german", "dog", "Hund"),
        ("singular-plural", "mouse", "mice"),
        ("verb-past", "go", "went"),
        ("adjective-superlative", "good", "best"),
        ("element-symbol", "tungsten", "W"),
        ("number-next", "nineteen", "twenty"),
        ("antonym", "hot", "cold"),
        ("capitalize", "dog", "Dog"),
    ],
)
def test_built_in_lists_hold_what_they_are_named_for(name, x, y):
    assert lists()[name][x] == y


def test_by_default_all_built_in_lists_are_asked_that_the_tokenizer_allows(tmp_path, capsys):
    """Few merges: of most lists hardly an answer is one token."""
    tokenizer = train(vocab_size=700)
    made = word_tasks(load_model(save(tokenizer, tmp_path, n_ctx=500)), n_demonstrations=3, n_prompts=2)
    left_out = re.findall(r"left out: task '([\w-]+)': (\d+) of", capsys.readouterr().err)
    assert sorted([*(task.name for task in made), *(name for name, _ in left_out)]) == built_in_tasks()
    assert len(made) >= 2
    assert left_out
    for name, count in left_out:
        ones = [y for y in lists()[name].values() if len(bare(tokenizer, f" {y}")) == 1]
        assert len(ones) == int(count) < 6


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"input": "a", "output": "b"}', r"bad\.json is not JSON: line 1"),
        ('{"input": "a", "output": "b"}', r"bad\.json must hold a list .* not a mapping"),
        (
            '[{"input": "a", "output": "b"}, {"input": "c"}]',
            r"row 2: expected .* got a mapping of 1 without 'output'",
        ),
        ('[{"input": "a", "output": 7}]', r"bad\.json, row 1: .* got .*7"),
        ('[{"input": "a", "output": ["b", "c"]}]', r"bad\.json, row 1: "),
        ('[{"input": " ", "output": "b"}]', r"bad\.json, row 1: .* not empty"),
        ('[{"input": "a", "output": "b"}, "c"]', r"bad\.json, row 2: .* got 'c'"),
    ],
)
def test_a_malformed_list_is_refused_by_file_and_row(text, message, model, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        word_tasks(model, [path])


def test_a_path_may_be_a_string_and_a_repeated_input_keeps_its_first_output(model, tmp_path):
    rows = [*LETTERS.items(), ("a", "B"), (" b ", " B ")]
    path = tmp_path / "twice.json"
    path.write_text(json.dumps([{"input": x, "output": y} for x, y in rows]))
    (task,) = word_tasks(model, [str(path)], n_demonstrations=3, n_prompts=4)
    assert task.name == "twice"
    assert task.excluded == ("a -> B: its input is given before", "b -> B: its input is given before")


@pytest.mark.parametrize("repeat", [1, 2])
def test_too_few_one_token_answers_are_refused_with_examples(repeat, model, tmp_path):
    outputs = dict(list(LETTERS.items())[: 3 + repeat]) | {f"{x}{x}": LONG + x for x in LETTERS}
    path = write(tmp_path / "long.json", outputs)
    message = (
        rf"'long': {3 + repeat} of its {15 + repeat} pairs .* at least 6; excluded .* aa -> {LONG}a: \d+ tokens; bb"
    )
    for others in ([], ["verb-past", "antonym"]):
        with pytest.raises(ValueError, match=message):
            word_tasks(model, [*others, path], n_prompts=1)


def test_words_that_the_tokenizer_does_not_know_are_not_asked(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "Q:": 1, "A:": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="A:")
    model = load_model(save(fast, tmp_path / "model"))
    with pytest.raises(ValueError, match=r"0 of its 12 pairs .* a -> A: not in the vocabulary"):
        word_tasks(model, [write(tmp_path / "letters.json", LETTERS)])


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        (["antonyms"], {}, r"no built-in task 'antonyms': there are .*antonym, .* ends with \.json"),
        (["antonym", "antonym"], {}, "'antonym' is given more than once"),
        (["antonym"], {"n_demonstrations": 1}, "n_demonstrations must be at least 2, got 1: outputs are shuffled"),
        (["antonym"], {"n_prompts": 0}, "n_prompts must be at least 1, got 0"),
        (["antonym"], {"n_demonstrations": 162}, "'antonym' has 163 pairs; .* need 164: pass a smaller"),
        (["antonym"], {"n_demonstrations": 100}, r"prompts of \d+ tokens are longer than the model's context of 400"),
    ],
)
def test_what_cannot_be_asked_is_refused(tasks, options, message, model):
    with pytest.raises(ValueError, match=message):
        word_tasks(model, tasks, **options)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (dict.fromkeys(LETTERS, "yes"), "the same answer to every query"),
        ({x: "yes" if i % 2 else "no" for i, x in enumerate(LETTERS)}, "too few different outputs: among 5 demonstr"),
    ],
)
def test_outputs_that_cannot_be_wrong_or_shuffled_are_refused(outputs, message, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        word_tasks(model, [write(tmp_path / "few.json", outputs)], n_demonstrations=5)


def test_a_model_without_tokenizer_or_hooks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="this model has no tokenizer; pass tasks with token ids"):
        word_tasks(random_hooked("gpt2", None))
    with pytest.raises(TypeError, match="expected a TransformerLens"):
        word_tasks(object())


def test_a_missing_file_is_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no list of pairs at .*absent\.json"):
        word_tasks(model, [tmp_path / "absent.json"])


# -- function vectors on them -----------------------------------------------------------------------------------------


def test_indirect_effects_on_prompts_of_different_lengths_equal_a_plain_loop_over_prompts(folder, tmp_path):
    """One prompt at a time on the Hugging Face model, the head's input to the output projection replaced at the end."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.5, generator=generator)
    hf.save_pretrained(tmp_path)
    bpe().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    tasks = word_tasks(model, FAMILY, n_demonstrations=3, n_prompts=4)
    assert len(list(concatenate([task.selection for task in tasks[:2]]).same_length("shuffled"))) > 1
    result = mh.phenomena.function_vectors(model, tasks)
    projection = hf.transformer.h[0].attn.c_proj

    def last(tokens, replaced=None):
        """P over the vocabulary at the last token, and what enters the projection there."""
        seen = []

        def hook(module, inputs):
            z = inputs[0].clone()
            seen.append(z[0, -1].clone())
            if replaced is not None:
                z[0, -1] = replaced
            return (z,)

        handle = projection.register_forward_pre_hook(hook)
        with torch.no_grad():
            probabilities = hf(torch.as_tensor(tokens[tokens >= 0])[None]).logits[0, -1].softmax(-1)
        handle.remove()
        return probabilities, seen[0]

    effects = {}
    for number, task in enumerate(tasks[:2]):
        mean = torch.stack([last(tokens)[1] for tokens in task.estimation.clean]).mean(0)
        prompts = task.selection
        for query, tokens, answer in zip(prompts.queries, prompts.shuffled, prompts.answers, strict=True):
            change = last(tokens, mean)[0][answer] - last(tokens)[0][answer]
            effects.setdefault((number, int(query)), []).append(float(change))
    expected = np.mean([change for changes in effects.values() for change in changes])
    assert abs(expected) > 1e-5
    assert float(result.AIE[0, 0]) == pytest.approx(expected, rel=1e-3)
    assert result.attrs["n_excluded"] > 0
    assert result.accuracy.sel(vector="task_vector").notnull().all()


def test_a_model_with_a_tokenizer_and_no_grammar_is_asked_the_built_in_tasks(model):
    result = mh.phenomena.function_vectors(model, n_prompts=2, effects="attribution")
    assert result.attrs["text"] == "built-in word tasks"
    assert result.attrs["n_tasks"] > 10
    assert "country-capital" in result.attrs["tasks"]

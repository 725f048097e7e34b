"""What goes in: token ids in every natural form, and everything else refused by name in one line."""

from __future__ import annotations

import inspect
from functools import cache

import numpy as np
import pytest
import torch
from random_models import CONTEXT, VOCAB, random_hooked, random_tokens

import mechhier as mh
from mechhier.arguments import one_of, seed_number, whole_number
from mechhier.probes import Edge, Head, loss

TOKENS = random_tokens(4, 6)
_OTHERS = {
    "components": [Head(0, 0)],
    "senders": [Head(0, 0)],
    "edges": [Edge(keys=0)],
    "heads": [Head(0, 0)],
    "pattern": "self",
    "metric": loss(TOKENS),
    "reduce": lambda pattern: pattern.mean(),
    "ablation": "mean",
}
_TAKES_IDS = ("tokens", "clean", "corrupted", "source", "reference", "targets")


def _takers():
    """Every public function of probes and phenomena with an argument of token ids, found by its signature."""
    public = {**{name: getattr(mh.probes, name) for name in mh.probes.__all__}, **mh.phenomena.PHENOMENA}
    for name, function in sorted(public.items()):
        if inspect.isfunction(function):
            parameters = inspect.signature(function).parameters
            yield from ((name, taken) for taken in _TAKES_IDS if taken in parameters and "model" in parameters)


TAKERS = list(_takers())


@cache
def one_model():
    return random_hooked("llama", "bridge")


def call(name, argument, value):
    function = getattr(mh.probes, name, None) or mh.phenomena.PHENOMENA[name]
    parameters = inspect.signature(function).parameters
    given = {key: other for key, other in _OTHERS.items() if key in parameters}
    given |= {key: TOKENS for key in ("tokens", "clean", "corrupted", "source") if key in parameters}
    given["model"] = one_model()
    result = function(**{**given, argument: value})
    if hasattr(result, "__enter__"):
        with result:
            return None
    return result


WRONG = {
    "text": ("the cat", TypeError, "model.to_tokens"),
    "texts": (["the cat", "the dog"], TypeError, "model.to_tokens"),
    "floats": (TOKENS.float(), TypeError, "floats are no ids"),
    "float array": (TOKENS.double().numpy(), TypeError, "floats are no ids"),
    "a mask": (TOKENS > 3, TypeError, "a mask holds no ids"),
    "ragged": ([[1, 2, 3], [1, 2]], ValueError, "rows of 2 to 3 tokens"),
    "one sequence": (TOKENS[0], ValueError, r"\[None\]"),
    "three dims": (TOKENS[None], ValueError, "they have 3 dims"),
    "empty": (TOKENS[:0], ValueError, "no token in it"),
    "an empty list": ([], ValueError, "no token in it"),
    "too long": (TOKENS.repeat(1, 10), ValueError, "longer than the model's context"),
    "an id too large": (torch.full((4, 6), VOCAB), ValueError, f"must lie in 0..{VOCAB - 1}"),
    "a negative id": (torch.full((4, 6), -1), ValueError, "must lie in 0.."),
    "objects": (np.full((4, 6), None), TypeError, "no whole numbers"),
    "a dictionary": ({"a": 1}, TypeError, "got {'a': 1}"),
    "meta": (TOKENS.to("meta"), ValueError, "'meta'"),
}


@pytest.mark.parametrize(("name", "argument"), TAKERS)
def test_every_function_refuses_what_holds_no_token_ids_and_names_the_argument(name, argument):
    for what, (value, kind, words) in WRONG.items():
        with pytest.raises(kind, match=words) as refused:
            call(name, argument, value)
        assert argument in str(refused.value) or "sequences of" in str(refused.value), what
        assert len(str(refused.value)) < 400, what
        assert "\n" not in str(refused.value), what


def test_the_registry_of_functions_that_take_tokens_is_found():
    assert len(TAKERS) >= 15
    assert {("ablate", "tokens"), ("patch", "corrupted"), ("hydra", "targets"), ("induction", "tokens")} <= set(TAKERS)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", ">i4", "int64"])
def test_ids_of_every_integer_dtype_are_the_same_tokens(dtype, tmp_path):
    hooked = mh.probes.Hooked(random_hooked("llama", "bridge"))
    array = TOKENS.numpy().astype(dtype)
    np.save(tmp_path / "ids.npy", array)
    stored = np.load(tmp_path / "ids.npy", mmap_mode="r")
    for given in (array, stored, array.tolist(), list(array), list(torch.as_tensor(array.astype(int)))):
        assert torch.equal(hooked.check_tokens(given), TOKENS)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int32])
def test_tensors_of_every_integer_dtype_are_the_same_tokens(dtype):
    hooked = mh.probes.Hooked(random_hooked("llama", "bridge"))
    assert torch.equal(hooked.check_tokens(TOKENS.to(dtype)), TOKENS)
    assert TOKENS.shape[1] < CONTEXT


@pytest.mark.parametrize("name", ["loss", "logit_difference", "probability", "log_probability", "kl_divergence"])
def test_a_metric_by_name_is_told_how_it_is_made(name):
    model = random_hooked("llama", "bridge")
    for metric in (name, getattr(mh.probes, name)):
        with pytest.raises(TypeError, match=rf"metric={name}\("):
            mh.probes.ablate(model, [Head(0, 0)], TOKENS, metric=metric)
    with pytest.raises(TypeError, match="one of logit_difference"):
        mh.probes.patch(model, TOKENS, TOKENS, metric="accuracy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite real numbers"):
        mh.probes.ablate(model, [Head(0, 0)], TOKENS, metric=lambda logits, rows: logits[:, 0, 0] * torch.nan)


def test_what_is_no_hooked_model_is_told_how_it_becomes_one():
    planted = mh.models.planted.planted_induction()
    for wrong, words in (
        (planted, r"load_model\(planted\.model\)"),
        (planted.model, r"Hugging Face model GPT2LMHeadModel.*load_model\(model\)"),
        ("gpt2", r"load_model\('gpt2'\)"),
        (type(planted.model), "the class GPT2LMHeadModel"),
        (None, "NoneType"),
        (torch.nn.Linear(2, 2), "Linear"),
    ):
        for measure in mh.phenomena.PHENOMENA.values():
            with pytest.raises(TypeError, match=words):
                measure(wrong)


@pytest.mark.parametrize("name", sorted(mh.phenomena.PHENOMENA))
def test_numbers_of_a_phenomenon_are_whole_and_seeds_not_negative(name):
    measure, model = mh.phenomena.PHENOMENA[name], random_hooked("llama", "bridge")
    parameters = inspect.signature(measure).parameters
    for argument in sorted({"seed", "n_sequences", "n_prompts", "n_controls", "n_null", "max_bytes"} & set(parameters)):
        with pytest.raises(TypeError, match=f"{argument} must be a whole number"):
            measure(model, **{argument: 1.5})
        with pytest.raises(TypeError, match=f"{argument} must be a whole number"):
            measure(model, **{argument: True})
        with pytest.raises(ValueError, match=f"{argument} must be a whole number"):
            measure(model, **{argument: -1})


def test_whole_numbers_seeds_and_names():
    assert whole_number("n", np.int16(3)) == 3
    assert seed_number(np.uint32(7)) == 7
    assert whole_number("n", 2.0) == 2
    with pytest.raises(TypeError, match=r"n must be a whole number, got 2\.5"):
        whole_number("n", 2.5)
    with pytest.raises(ValueError, match="2\\^63"):
        seed_number(2**64)
    with pytest.raises(ValueError, match="did you mean 'resample'"):
        one_of("ablation", "resampel", ["resample", "mean"])

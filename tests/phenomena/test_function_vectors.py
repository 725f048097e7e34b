from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from random_models import CLASSES, random_hf, random_hooked
from scipy import stats

import mechhier as mh
from mechhier.grammars import DocumentGrammar
from mechhier.models import load_model
from mechhier.models.loading import model_info
from mechhier.models.planted import planted_function_vector
from mechhier.phenomena.function_vectors import VECTORS
from mechhier.phenomena.function_vectors.indirect import attributed_effects, by_query, indirect_effects
from mechhier.phenomena.function_vectors.injection import PROMPTS, Judged, _recovery, _task_vectors, function_vectors_of
from mechhier.phenomena.tasks import Task, concatenate, grammar_tasks
from mechhier.probes import Head, Hooked, ablated
from mechhier.results import MeasurementWarning

N_WORDS = 12
GRAMMAR = DocumentGrammar(n_words=N_WORDS, n_connectors=1, lexicon=6, binding=1.0, p_chain=1.0)
FIRST_VERB = N_WORDS
N_CHOSEN_ON = 4
"""Of the six tasks, those on which heads are chosen; the other two are held out."""
CONTEXT = 40
SPLITS = ("selection", "estimation", "test")


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return grammar_tasks(GRAMMAR, n_tasks=6, n_prompts=6)


@pytest.fixture(scope="module")
def short_tasks() -> list[Task]:
    return grammar_tasks(GRAMMAR, n_tasks=6, n_demonstrations=4, n_prompts=5)


@pytest.fixture(scope="module")
def planted():
    return planted_function_vector(GRAMMAR, n_ctx=CONTEXT)


@pytest.fixture(scope="module", params=CLASSES)
def measured(request, planted, tasks):
    return mh.phenomena.function_vectors(load_model(planted.model, as_=request.param), tasks)


def held_out(tasks):
    return concatenate([task.test for task in tasks[N_CHOSEN_ON:]])


def perturbed(model):
    """The planted model with noise on every weight: no score of it is all or nothing."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.005 * torch.randn(parameter.shape, generator=generator)
    return model


# -- planted model ----------------------------------------------------------------------------------------------------


def test_indirect_effect_singles_out_the_planted_head(measured, planted):
    layer, head = planted.heads["function_vector"]
    assert float(measured.AIE[layer, head]) == pytest.approx(planted.expected["AIE"], abs=0.03)
    assert float(measured.AIE_low[layer, head]) > 0.8
    others = measured.AIE.values.copy()
    others[layer, head] = 0.0
    np.testing.assert_allclose(others, 0.0, atol=1e-3)
    np.testing.assert_allclose(measured.AIE_null, 0.0, atol=0.01)
    assert np.argwhere(measured.selected.values).tolist() == [[layer, head]]


def test_accuracies_without_injection_are_the_planted_ones(measured, planted, tasks):
    guess = (held_out(tasks).answers == FIRST_VERB).mean()
    assert measured.accuracy_clean == planted.expected["accuracy_clean"]
    assert measured.accuracy_shuffled == guess
    assert measured.accuracy_zero_shot == guess


@pytest.mark.parametrize("prompt", ["zero_shot", "shuffled"])
def test_planted_vector_makes_the_model_do_the_task_it_stands_for(measured, planted, tasks, prompt):
    test = held_out(tasks)
    same = (test.answers == test.other_answers).mean()
    own, other = (measured.sel(prompt=prompt, vector=vector) for vector in ("function_vector", "other_task"))
    early, late = {"layer": slice(0, 1)}, {"layer": 2}
    np.testing.assert_array_equal(own.accuracy.sel(early), planted.expected["accuracy_injected"])
    np.testing.assert_array_equal(own.accuracy_other.sel(early), same)
    np.testing.assert_array_equal(other.accuracy_other.sel(early), planted.expected["accuracy_injected"])
    np.testing.assert_array_equal(other.accuracy.sel(early), same)
    np.testing.assert_allclose(own.recovery.sel(early), 1.0, atol=0.03)
    np.testing.assert_allclose(other.recovery.sel(early), -1.0, atol=0.05)
    # Layer 2 reads the vector: behind it there is nothing that does.
    for vector in (own, other):
        assert vector.accuracy.sel(late) == (test.answers == FIRST_VERB).mean()
        assert abs(vector.recovery.sel(late)) < 1e-3


@pytest.mark.parametrize("n_chosen", [2, 5])
def test_controls_are_of_other_heads_of_the_same_norm_and_drawn_with_the_seed(n_chosen):
    """Every head writes along a dimension of its own, so that a vector tells of which heads it is."""
    hooked = Hooked(random_hooked("gpt2", None))
    n_tasks, n_heads = 3, 12
    sizes = torch.arange(1.0, n_tasks + 1)
    means = torch.eye(n_heads, 64).expand(n_tasks, -1, -1) * sizes[:, None, None]
    selected = np.arange(n_heads).reshape(3, 4) % 5 == 0 if n_chosen == 2 else np.arange(n_heads).reshape(3, 4) < 5
    n_chosen = int(selected.sum())
    make = partial(function_vectors_of, hooked, means.unflatten(1, (3, 4)), selected, np.array([1, 2, 0]))
    vectors, again, other_seed = (make(seed=seed) for seed in (0, 0, 1))
    own = vectors["function_vector"]
    torch.testing.assert_close(
        own, torch.nn.functional.pad(torch.as_tensor(selected).flatten().float(), (0, 52)) * sizes[:, None]
    )
    torch.testing.assert_close(vectors["other_task"], own[[1, 2, 0]])
    torch.testing.assert_close(vectors["grand_mean"], own.mean(0).expand(3, -1))
    of_heads = vectors["random_heads"]
    assert ((of_heads != 0).sum(-1) == n_chosen).all()
    assert not ((of_heads != 0) & (own != 0)).any()
    torch.testing.assert_close(of_heads.norm(dim=-1), own.norm(dim=-1))
    torch.testing.assert_close(vectors["random_norm"].norm(dim=-1), own.norm(dim=-1))
    assert (torch.nn.functional.cosine_similarity(vectors["random_norm"], own).abs() < 0.5).all()
    for name in ("random_heads", "random_norm"):
        assert torch.equal(vectors[name], again[name])
        assert not torch.equal(vectors[name], other_seed[name])


@pytest.mark.parametrize("vector", ["random_heads", "random_norm", "grand_mean"])
def test_control_vectors_do_not(measured, vector):
    control = measured.sel(vector=vector)
    assert control.accuracy.max() <= 0.35
    np.testing.assert_allclose(control.recovery, 0.0, atol=0.1)


# -- nulls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_untrained_model_carries_nothing(kind, tasks):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "vocab_size": GRAMMAR.vocab_size}
        hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    result = mh.phenomena.function_vectors(load_model(hf.eval(), as_=kind), tasks)
    np.testing.assert_allclose(result.AIE, 0.0, atol=1e-3)
    assert result.accuracy_clean <= 0.25
    assert result.accuracy.mean() <= 0.15


def test_lexicons_that_the_planted_model_does_not_know_are_not_carried(planted):
    """The same words, paired in another way."""
    unknown = grammar_tasks(DocumentGrammar(**GRAMMAR.model_dump() | {"language_seed": 1}), n_tasks=6, n_prompts=6)
    result = mh.phenomena.function_vectors(load_model(planted.model), unknown)
    np.testing.assert_allclose(result.AIE, 0.0, atol=0.01)
    assert result.accuracy_clean <= 0.25
    assert result.accuracy.sel(vector="function_vector").max() <= 0.25


# -- brute force on the Hugging Face model ----------------------------------------------------------------------------


def hf_probability(hf, tokens, answers):
    with torch.no_grad():
        probability = hf(torch.as_tensor(tokens)).logits[:, -1].softmax(-1)
    return probability[torch.arange(len(answers)), torch.as_tensor(answers)]


def hf_mean_input(hf, layer, tokens):
    """Mean over prompts of what enters a layer's attention output projection at the last token: all heads' z."""
    seen = []
    projection = hf.transformer.h[layer].attn.c_proj
    handle = projection.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, -1]))
    with torch.no_grad():
        hf(torch.as_tensor(tokens))
    handle.remove()
    return seen[0].mean(0)


def answered_by(hf, task):
    """The task with the test answers that demonstrations move this model towards: there is something to recover."""
    with torch.no_grad():
        clean, *corrupt = (
            hf(torch.as_tensor(getattr(task.test, kind))).logits[:, -1] for kind in ("clean", "zero_shot", "shuffled")
        )
    moved = torch.stack([clean - each for each in corrupt])
    answers, others = moved.amin(0).argmax(-1).numpy(), moved.amax(0).argmin(-1).numpy()
    unknown = np.full(len(answers), -1)
    return replace(task, test=replace(task.test, answers=answers, other_answers=others, wrong_answers=unknown))


@pytest.fixture(scope="module", params=["planted", "random"])
def case(request, planted, short_tasks):
    """A model, its tasks and its result: the planted one, perturbed (one head is chosen), or a random one (three are)."""
    hf = perturbed(planted.model) if request.param == "planted" else random_hf("gpt2")
    tasks = short_tasks if request.param == "planted" else [answered_by(hf, task) for task in short_tasks]
    return hf, tasks, mh.phenomena.function_vectors(load_model(hf, as_="bridge"), tasks)


def head_dims(hf, head):
    d_head = hf.config.n_embd // hf.config.n_head
    return slice(head * d_head, (head + 1) * d_head)


@pytest.mark.parametrize(("kind", "score"), [("clean", "AIE"), ("shuffled", "AIE_null")])
def test_indirect_effect_of_every_head_equals_raw_pytorch_hooks(kind, score, case):
    hf, tasks, result = case
    for layer, head in np.ndindex(*result.AIE.shape):
        dims = head_dims(hf, head)
        projection = hf.transformer.h[layer].attn.c_proj
        effects = []
        for task in tasks[:N_CHOSEN_ON]:
            mean = hf_mean_input(hf, layer, getattr(task.estimation, kind))

            def patch(module, inputs, mean=mean, dims=dims):
                patched = inputs[0].clone()
                patched[:, -1, dims] = mean[dims]
                return (patched,)

            prompts, answers = task.selection.shuffled, task.selection.answers
            before = hf_probability(hf, prompts, answers)
            handle = projection.register_forward_pre_hook(patch)
            effects.append(hf_probability(hf, prompts, answers) - before)
            handle.remove()
        expected = torch.cat(effects).mean().item()
        assert float(result[score][layer, head]) == pytest.approx(expected, abs=1e-5)
    assert abs(result[score]).max() > 1e-4


@pytest.mark.parametrize("prompt", ["zero_shot", "shuffled"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_injection_equals_raw_pytorch_hooks(layer, prompt, case):
    """The vector from the weights of the output projections, added to the block's output by a forward hook."""
    hf, tasks, result = case
    vectors = []
    for task in tasks:
        vector = torch.zeros(hf.config.n_embd)
        for chosen, head in np.argwhere(result.selected.values).tolist():
            dims = head_dims(hf, head)
            W_O = hf.transformer.h[chosen].attn.c_proj.weight.detach()[dims]
            vector += hf_mean_input(hf, chosen, task.estimation.clean)[dims] @ W_O
        vectors.append(vector)
    injected = {
        "function_vector": vectors,
        "other_task": [*vectors[1:], vectors[0]],
        "grand_mean": [torch.stack(vectors).mean(0)] * len(tasks),
        0.25: [0.25 * vector for vector in vectors],
        4.0: [4.0 * vector for vector in vectors],
    }

    def difference(tokens, test):
        with torch.no_grad():
            last = hf(torch.as_tensor(tokens)).logits[:, -1]
        row = torch.arange(len(last))
        answers, others = torch.as_tensor(test.answers), torch.as_tensor(test.other_answers)
        return last[row, answers] - last[row, others], (last.argmax(-1) == answers).double()

    for name, by_task in injected.items():
        gain, possible, correct = [], [], []
        for task, vector in list(zip(tasks, by_task, strict=True))[N_CHOSEN_ON:]:

            def add(module, inputs, output, vector=vector):
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                hidden[:, -1] += vector
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            tokens = getattr(task.test, prompt)
            clean, _ = difference(task.test.clean, task.test)
            corrupt, _ = difference(tokens, task.test)
            handle = hf.transformer.h[layer].register_forward_hook(add)
            patched, hit = difference(tokens, task.test)
            handle.remove()
            gain.append(patched - corrupt)
            possible.append(clean - corrupt)
            correct.append(hit)
        at = result.sel(prompt=prompt, layer=layer)
        measured = (
            (at.recovery.sel(vector=name), at.accuracy.sel(vector=name))
            if isinstance(name, str)
            else (at.dose_recovery.sel(dose=name), at.dose_accuracy.sel(dose=name))
        )
        expected = (torch.cat(gain).sum() / torch.cat(possible).sum()).item()
        assert float(measured[0]) == pytest.approx(expected, abs=1e-4)
        assert float(measured[1]) == pytest.approx(torch.cat(correct).mean().item())


def hf_post_norm_write(hf, layer, head, tokens):
    """What a head of an OLMo-2 model adds to the stream at the last token, mean over prompts.

    It is the output projection with and without the head, times the factor by which the norm behind it scales each number.
    """
    block, kept = hf.model.layers[layer], {}
    hooks = {"o_proj": block.self_attn.o_proj, "norm": block.post_attention_layernorm}
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: kept.update({name: (inputs[0], output)}))
        for name, module in hooks.items()
    ]
    with torch.no_grad():
        hf(torch.as_tensor(tokens))
        for handle in handles:
            handle.remove()
        z, d_head = kept["o_proj"][0][:, -1].clone(), hf.config.hidden_size // hf.config.num_attention_heads
        z[:, head * d_head : (head + 1) * d_head] = 0.0
        before_norm, after_norm = (each[:, -1] for each in kept["norm"])
        return ((before_norm - hooks["o_proj"](z)) * after_norm / before_norm).mean(0)


@pytest.mark.parametrize("kind", CLASSES)
def test_vector_of_a_post_norm_model_is_what_the_heads_added_to_the_stream(kind, short_tasks):
    hf = random_hf("olmo2")
    tasks = [answered_by(hf, task) for task in short_tasks]
    result = mh.phenomena.function_vectors(load_model(hf, as_=kind), tasks)
    heads = np.argwhere(result.selected.values).tolist()
    gain, possible = [], []
    for task in tasks[N_CHOSEN_ON:]:
        vector = sum(hf_post_norm_write(hf, layer, head, task.estimation.clean) for layer, head in heads)

        def add(module, inputs, output, vector=vector):
            output = output.clone()
            output[:, -1] += vector
            return output

        def difference(tokens, test=task.test):
            with torch.no_grad():
                last = hf(torch.as_tensor(tokens)).logits[:, -1]
            row = torch.arange(len(last))
            return last[row, torch.as_tensor(test.answers)] - last[row, torch.as_tensor(test.other_answers)]

        clean, corrupt = difference(task.test.clean), difference(task.test.zero_shot)
        handle = hf.model.layers[1].register_forward_hook(add)
        gain.append(difference(task.test.zero_shot) - corrupt)
        handle.remove()
        possible.append(clean - corrupt)
    measured = result.recovery.sel(prompt="zero_shot", vector="function_vector", layer=1)
    expected = (torch.cat(gain).sum() / torch.cat(possible).sum()).item()
    assert abs(expected) > 0.01
    assert float(measured) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("max_bytes", [1, 2**17])
@pytest.mark.parametrize("kind", CLASSES)
def test_results_do_not_depend_on_batch_size_or_class(kind, max_bytes, case):
    hf, tasks, whole = case
    other = mh.phenomena.function_vectors(load_model(hf, as_=kind), tasks, max_bytes=max_bytes)
    assert set(other) == set(whole)
    for name in whole:
        np.testing.assert_allclose(whole[name], other[name], atol=1e-4, err_msg=name)


# -- grammar and tasks ------------------------------------------------------------------------------------------------


def with_grammar(monkeypatch, grammar):
    """As if every model were a checkpoint of a run on this grammar."""
    module = sys.modules["mechhier.phenomena.function_vectors"]
    monkeypatch.setattr(module, "model_info", lambda model: replace(model_info(model), grammar=grammar))


def test_tasks_come_from_the_grammar_of_the_model(monkeypatch, planted):
    with_grammar(monkeypatch, GRAMMAR)
    result = mh.phenomena.function_vectors(load_model(planted.model), n_prompts=6)
    assert result.attrs["n_tasks"] == 6
    assert result.attrs["has_function"] == 1
    assert result.accuracy_bayes == result.accuracy_clean == 1.0
    assert result.chance == pytest.approx(1 / N_WORDS)
    assert float(result.AIE[planted.heads["function_vector"]]) == pytest.approx(planted.expected["AIE"], abs=0.03)


def test_a_language_with_fresh_lexicons_has_no_function_to_carry(monkeypatch, planted):
    with_grammar(monkeypatch, DocumentGrammar(n_words=N_WORDS, n_connectors=1, binding=1.0, p_chain=1.0))
    result = mh.phenomena.function_vectors(load_model(planted.model), n_prompts=6)
    assert result.attrs["has_function"] == 0
    assert result.accuracy_bayes.isnull()
    np.testing.assert_allclose(result.AIE, 0.0, atol=0.01)


def test_every_control_is_in_the_result(measured):
    assert tuple(measured.vector.values) == VECTORS
    assert len(VECTORS) == 7
    assert measured.accuracy.dims == measured.recovery.dims == ("prompt", "vector", "layer")
    assert (measured.attrs["n_tasks"], measured.attrs["n_tasks_held_out"]) == (6, 2)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_model_without_a_grammar_needs_tasks():
    with pytest.raises(ValueError, match="neither a grammar nor a tokenizer to make them from; pass tasks="):
        mh.phenomena.function_vectors(random_hooked("gpt2", None))


def test_one_task_is_refused(tasks):
    with pytest.raises(ValueError, match=r"at least two tasks .* got 1"):
        mh.phenomena.function_vectors(random_hooked("gpt2", None), tasks[:1])


def test_prompts_longer_than_the_context_are_refused(tasks):
    short = planted_function_vector(GRAMMAR, n_ctx=32)
    with pytest.raises(ValueError, match="33 tokens are longer than the model's context of 32"):
        mh.phenomena.function_vectors(load_model(short.model), tasks)


def test_a_model_without_hooks_is_refused(planted, tasks):
    with pytest.raises(TypeError, match="expected a TransformerLens"):
        mh.phenomena.function_vectors(planted.model, tasks)


def test_prompts_of_one_query_are_one_sample():
    prompts = grammar_tasks(GRAMMAR, n_tasks=2, n_prompts=12)[0].test
    values = np.ones((12, 3))
    values[:, 2] = np.nan
    sums, counts = by_query(values, prompts)
    assert len(sums) == len(set(prompts.answers.tolist())) < 12
    np.testing.assert_array_equal(sums, counts)
    np.testing.assert_array_equal(counts.sum(0), [12, 12, 0])


# -- task vectors, doses, first order ---------------------------------------------------------------------------------


def with_separator(task, token=3):
    """The task's prompts with one more token behind the query, the same for all: there a task vector is defined."""

    def behind(prompts):
        kinds = ("clean", "shuffled", "zero_shot", "dummy")
        return replace(
            prompts,
            **{kind: np.pad(getattr(prompts, kind), ((0, 0), (0, 1)), constant_values=token) for kind in kinds},
        )

    return Task(task.name, *(behind(getattr(task, split)) for split in SPLITS))


@pytest.mark.parametrize("kind", CLASSES)
def test_task_vectors_equal_raw_pytorch_hooks(kind, short_tasks):
    hf = random_hf("gpt2")
    tasks = [answered_by(hf, with_separator(task)) for task in short_tasks]
    result = mh.phenomena.function_vectors(load_model(hf, as_=kind), tasks)

    def last_logits(task, block, source):
        """On the bare query, with the block's output at the last token from the demonstrations and a dummy query."""
        kept = []

        def keep(module, inputs, output):
            kept.append((output[0] if isinstance(output, tuple) else output)[:, -1])

        def put(module, inputs, output):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[:, -1] = kept[0]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        found = []
        for hook, tokens in ((keep, source.test.dummy), (put, task.test.zero_shot)):
            handle = block.register_forward_hook(hook)
            with torch.no_grad():
                found.append(hf(torch.as_tensor(tokens)).logits[:, -1])
            handle.remove()
        return found[1]

    for layer, block in enumerate(hf.transformer.h):
        for name, shift in (("task_vector", 0), ("other_task_vector", 1)):
            hits, differences = [], []
            for index in (4, 5):
                task, source = tasks[index], tasks[(index + shift) % 6]
                logits = last_logits(task, block, source)
                hits.append(logits.argmax(-1) == torch.as_tensor(task.test.answers))
                row = torch.arange(len(logits))
                right, other = (torch.as_tensor(x) for x in (task.test.answers, task.test.other_answers))
                with torch.no_grad():
                    clean, corrupt = (
                        hf(torch.as_tensor(x)).logits[:, -1] for x in (task.test.clean, task.test.zero_shot)
                    )
                differences.append([x[row, right] - x[row, other] for x in (logits, clean, corrupt)])
            measured = result.sel(prompt="zero_shot", vector=name, layer=layer)
            assert float(measured.accuracy) == pytest.approx(torch.cat(hits).double().mean().item())
            patched, clean, corrupt = (torch.cat(x) for x in zip(*differences, strict=True))
            expected = float((patched - corrupt).sum() / (clean - corrupt).sum())
            assert float(measured.recovery) == pytest.approx(expected, abs=1e-4)


def test_task_vectors_are_not_a_number_where_the_last_token_is_the_query(measured):
    put = measured.sel(vector=["task_vector", "other_task_vector"])
    assert put.accuracy.isnull().all()
    assert put.recovery.isnull().all()
    assert measured.accuracy.sel(vector="function_vector").notnull().all()


def test_a_dose_of_one_is_the_injection_and_of_none_is_no_injection(case):
    result = case[2]
    whole = result.sel(vector="function_vector")
    np.testing.assert_allclose(result.dose_accuracy.sel(dose=1.0), whole.accuracy)
    np.testing.assert_allclose(result.dose_recovery.sel(dose=1.0), whole.recovery, atol=1e-5)
    np.testing.assert_allclose(result.dose_recovery.sel(dose=0.0), 0.0, atol=1e-4)
    for prompt in ("zero_shot", "shuffled"):
        np.testing.assert_allclose(result.dose_accuracy.sel(dose=0.0, prompt=prompt), result[f"accuracy_{prompt}"])


def test_attributed_effects_equal_the_slope_of_the_exact_ones_by_raw_pytorch_hooks(case):
    """A small part of the patch on the Hugging Face model, in double precision, divided by its size."""
    hf, tasks, result = case
    hf = copy.deepcopy(hf).double()
    step = 1e-5
    for layer, head in np.ndindex(*result.AIE.shape):
        dims, effects = head_dims(hf, head), []
        projection = hf.transformer.h[layer].attn.c_proj
        for task in tasks[:N_CHOSEN_ON]:
            mean = hf_mean_input(hf, layer, task.estimation.clean)

            def nudge(module, inputs, mean=mean, dims=dims):
                patched = inputs[0].clone()
                patched[:, -1, dims] += step * (mean[dims] - patched[:, -1, dims])
                return (patched,)

            prompts, answers = task.selection.shuffled, task.selection.answers
            before = hf_probability(hf, prompts, answers)
            handle = projection.register_forward_pre_hook(nudge)
            effects.append((hf_probability(hf, prompts, answers) - before) / step)
            handle.remove()
        expected = torch.cat(effects).mean().item()
        assert float(result.AIE_attribution[layer, head]) == pytest.approx(expected, abs=1e-4)


def test_correlation_with_the_first_order_is_numpys(case):
    result = case[2]
    expected = np.corrcoef(result.AIE.values.reshape(-1), result.AIE_attribution.values.reshape(-1))[0, 1]
    assert float(result.attribution_correlation) == pytest.approx(expected, abs=1e-6)
    assert result.attribution_correlation_low <= expected + 1e-6


@pytest.mark.parametrize("kind", CLASSES)
def test_attribution_alone_chooses_heads_without_patching_any(kind, case):
    hf, tasks, whole = case
    result = mh.phenomena.function_vectors(load_model(hf, as_=kind), tasks, effects="attribution")
    assert "AIE" not in result
    np.testing.assert_allclose(result.AIE_attribution, whole.AIE_attribution, atol=1e-4)
    lowest_chosen = result.AIE_attribution.values[result.selected.values].min()
    assert lowest_chosen >= result.AIE_attribution.values[~result.selected.values].max()
    with pytest.raises(ValueError, match="exact, attribution"):
        mh.phenomena.function_vectors(load_model(hf, as_=kind), tasks, effects="fast")


def test_a_model_with_frozen_parameters_and_bfloat16_is_measured(planted, tasks):
    model = load_model(planted.model, as_="bridge", dtype="bfloat16")
    model.requires_grad_(False)
    result = mh.phenomena.function_vectors(model, tasks)
    layer, head = planted.heads["function_vector"]
    assert result.attrs["dtype"] == "bfloat16"
    assert float(result.AIE[layer, head]) == pytest.approx(planted.expected["AIE"], abs=0.1)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_prompts_of_different_lengths_score_as_they_do_alone(short_tasks):
    """Every second prompt is one token longer: a token more at the beginning, which only its own run sees."""
    model = load_model(random_hf("llama"), as_="bridge")

    def longer(prompts, rows):
        changed = {}
        for kind in ("clean", "shuffled", "dummy"):
            tokens = getattr(prompts, kind)
            extra = np.where(np.isin(np.arange(len(tokens)), rows), 3, -1)
            changed[kind] = np.concatenate([extra[:, None], tokens], axis=1)
        return replace(prompts, **changed)

    def with_longer(rows):
        return [Task(task.name, *(longer(getattr(task, split), rows) for split in SPLITS)) for task in short_tasks]

    mixed, all_longer, none = (
        mh.phenomena.function_vectors(model, with_longer(rows)) for rows in ([0, 2, 4], range(5), [])
    )
    assert abs(mixed.AIE - none.AIE).max() > 1e-4
    assert abs(mixed.AIE - all_longer.AIE).max() > 1e-4
    plain = mh.phenomena.function_vectors(model, short_tasks)
    for name in none:
        np.testing.assert_allclose(none[name], plain[name], atol=1e-5)


def test_forward_passes_are_as_few_as_the_issue_asks(short_tasks):
    """Tokens that pass through a block, in units of a forward pass over the prompts of the selection."""
    model = random_hooked("llama", "bridge")
    passed = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda mlp, inputs, output: passed.append(output.shape[:2].numel()))
    prompts = concatenate([task.selection for task in short_tasks])
    means = [torch.zeros(len(prompts.answers), 3, 4, 16)] * 2
    indirect_effects(Hooked(model), prompts, means, lambda n: None)
    one_pass = 3 * prompts.shuffled.size
    of_one_position = len(means) * 4 * (3 + 1) / 2 / prompts.shuffled.shape[1]
    assert sum(passed) / one_pass <= 1 + of_one_position + 0.1
    passed.clear()
    attributed_effects(Hooked(model), prompts, means[0])
    assert sum(passed) == one_pass


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("layer", [0, 1])
def test_an_edit_of_the_callers_acts_once_in_every_patched_run(kind, layer, short_tasks):
    """Against full runs of the steered model, a head patched by a hook of our adapter's."""
    model = random_hooked("llama", kind)
    steering = torch.linspace(-2.0, 2.0, 64)
    model.hook_dict[f"blocks.{layer}.hook_resid_pre"].add_hook(lambda resid, hook: resid + steering)
    hooked, prompts = Hooked(model), short_tasks[0].selection
    tokens, answers = torch.as_tensor(prompts.shuffled), torch.as_tensor(prompts.answers)
    means = torch.randn(len(tokens), 3, 4, 16, generator=torch.Generator().manual_seed(0))
    (effects,) = indirect_effects(hooked, prompts, [means], lambda n: None)

    def probability(hooks):
        return hooked.run(tokens, hooks)[:, -1].softmax(-1).gather(-1, answers[:, None])[:, 0]

    for patched in range(3):

        def patch(z, patched=patched):
            z = z.clone()
            z[:, -1, 1] = means[:, patched, 1]
            return z

        expected = probability([("z", patched, patch)]) - probability([])
        np.testing.assert_allclose(effects[:, patched, 1], expected, atol=1e-6)


@pytest.mark.parametrize("kind", CLASSES)
def test_inside_a_block_that_edits_rows_apart_nothing_depends_on_the_batches(kind, short_tasks):
    model = random_hooked("llama", kind)
    reference = torch.randint(0, 38, (4, 24), generator=torch.Generator().manual_seed(0))
    with ablated(model, [Head(1, 2)], ablation="resample", reference=reference):
        whole, parts = (mh.phenomena.function_vectors(model, short_tasks[:3], max_bytes=size) for size in (2**30, 1))
    for name in whole:
        np.testing.assert_allclose(whole[name], parts[name], atol=1e-4, err_msg=name)


def test_the_exact_predictors_accuracy_is_not_that_of_given_tasks(monkeypatch, planted, tasks):
    with_grammar(monkeypatch, GRAMMAR)
    assert np.isnan(mh.phenomena.function_vectors(load_model(planted.model), tasks).accuracy_bayes)


def test_a_prompt_without_a_dummy_query_is_left_out_of_the_task_vectors_alone(short_tasks):
    hf = random_hf("gpt2")
    tasks, model = [answered_by(hf, with_separator(task)) for task in short_tasks], load_model(hf)

    def changed(change):
        return [replace(task, test=change(task.test)) for task in tasks]

    def without_dummy(prompts):
        dummy = prompts.dummy.copy()
        dummy[0] = -1
        return replace(prompts, dummy=dummy)

    def without_row(prompts):
        return replace(prompts, **{field.name: getattr(prompts, field.name)[1:] for field in fields(prompts)})

    whole, lacking, fewer = (
        mh.phenomena.function_vectors(model, changed(change))
        for change in (lambda prompts: prompts, without_dummy, without_row)
    )
    own, added = {"vector": "task_vector"}, {"vector": "function_vector"}
    np.testing.assert_allclose(lacking.recovery.sel(own), fewer.recovery.sel(own), atol=1e-5)
    np.testing.assert_allclose(lacking.recovery.sel(added), whole.recovery.sel(added), atol=1e-5)
    assert abs(whole.recovery.sel(own) - fewer.recovery.sel(own)).max() > 1e-4


def test_where_the_other_task_does_not_know_the_query_the_difference_is_to_a_wrong_answer(short_tasks):
    hf = random_hf("gpt2")
    tasks = [answered_by(hf, task) for task in short_tasks]
    unknown = [
        replace(
            task,
            test=replace(
                task.test,
                other_answers=np.full_like(task.test.answers, -1),
                wrong_answers=task.test.other_answers,
            ),
        )
        for task in tasks
    ]
    known, fallen_back = (mh.phenomena.function_vectors(load_model(hf), each) for each in (tasks, unknown))
    assert known.dose_recovery.notnull().all()
    np.testing.assert_allclose(fallen_back.dose_recovery, known.dose_recovery, atol=1e-6)
    assert known.accuracy_other.notnull().any()
    assert fallen_back.accuracy_other.isnull().all()


def test_the_other_tasks_vector_is_one_that_the_other_task_has(short_tasks):
    """Where it had none, zeros were put in place of the stream and counted."""
    hf = random_hf("gpt2")
    tasks = [answered_by(hf, with_separator(task)) for task in short_tasks]
    hooked = Hooked(load_model(hf))

    def with_dummy(task, rows):
        dummy = np.where(np.asarray(rows)[:, None] < 0, -1, task.test.dummy[rows])
        return replace(task, test=replace(task.test, dummy=dummy))

    n = len(tasks[5].test.answers)
    lacking = [*tasks[:5], with_dummy(tasks[5], [-1, *range(1, n)])]
    filled = [*tasks[:5], with_dummy(tasks[5], 1 + np.arange(n) % (n - 1))]
    (own, found), known = _task_vectors(hooked, lacking, [4])
    (_, expected), _ = _task_vectors(hooked, filled, [4])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert known.all()
    assert (found - own).abs().max() > 1e-3

    without = [with_dummy(tasks[0], [-1] * n), *tasks[1:4], *(replace(task, other=tasks[0].name) for task in tasks[4:])]
    result = mh.phenomena.function_vectors(hooked.model, without)
    for name in ("accuracy", "accuracy_low", "recovery"):
        assert result[name].sel(vector="other_task_vector").isnull().all()
    assert result.accuracy.sel(vector="task_vector").notnull().all()
    assert result.attrs["n_task_vectors"] == result.attrs["n_test_prompts"]


def test_accuracies_have_wilsons_interval_of_prompts_over_their_design_effect(case):
    tasks, result = case[1:]
    test = concatenate(
        [tasks[index].test for index in range(len(tasks) - result.attrs["n_tasks_held_out"], len(tasks))]
    )
    n, n_queries = len(test.answers), len(np.unique(test.queries))
    share = float(result.accuracy_clean)
    low, high = float(result.accuracy_clean_low), float(result.accuracy_clean_high)
    # No narrower than of independent prompts, no wider than of independent queries.
    widest, narrowest = (
        stats.binomtest(round(share * each), each).proportion_ci(method="wilson") for each in (n_queries, n)
    )
    assert 0 <= low <= narrowest.low + 1e-9
    assert narrowest.high - 1e-9 <= high <= 1
    assert high - low <= widest.high - widest.low + 0.1
    assert "Wilson" in result.attrs["interval"]


def test_an_untrained_model_recovers_nothing_and_says_so_once(tasks):
    sizes = {"vocab_size": GRAMMAR.vocab_size, "eos_token_id": GRAMMAR.eos_token_id, "n_ctx": 40}
    model = load_model(mh.ModelSpec("llama", n_layers=2, d_model=32, n_heads=2).build(**sizes, seed=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MeasurementWarning)
        result = mh.phenomena.function_vectors(model, tasks)
    said = [str(each.message) for each in caught if each.category is MeasurementWarning]
    assert len(said) == 1
    for kind in ("zero_shot", "shuffled"):
        undefined = result.recovery.sel(prompt=kind, vector="function_vector").isnull()
        assert bool(undefined.any()) == (kind in said[0])
    assert result.recovery.isnull().any()
    assert result.accuracy.sel(vector="function_vector").notnull().all()


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4, 16])
def test_recovery_is_no_number_in_95_of_100_where_clean_and_corrupt_prompts_do_not_differ(tasks, n):
    prompts = tasks[0].test
    rows = np.resize(np.arange(len(prompts.answers)), n)
    prompts = replace(prompts, **{field.name: getattr(prompts, field.name)[rows] for field in fields(prompts)})
    prompts = replace(prompts, queries=np.arange(n))
    rng, numbers = np.random.default_rng(0), 0
    for seed in range(500):
        base = {kind: Judged(*np.zeros((2, n)), rng.normal(size=n)) for kind in ("clean", *PROMPTS)}
        found = _recovery(
            "recovery", ("prompt", "vector", "layer"), base, rng.normal(size=(n, 2, 1, 1)), prompts, "", seed=seed
        )
        numbers += int(np.isfinite(found["recovery"][1][0]).sum())
    # A number where clean is above corrupt by the interval's lower bound: 1 in 40; more than 23 once in 300 such tests.
    assert numbers <= 23

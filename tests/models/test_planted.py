import numpy as np
import pytest
import torch
from random_models import CLASSES

from mechhier.grammars import DocumentGrammar
from mechhier.models.loading import load_model
from mechhier.models.planted import (
    planted_backup,
    planted_duplicate,
    planted_function_vector,
    planted_induction,
    planted_inert,
)
from mechhier.phenomena.tasks import concatenate, grammar_tasks

LENGTH = 12


def repeated_tokens(vocab_size: int) -> torch.Tensor:
    """Rows r r with distinct tokens in r, so that every token has one earlier copy."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(vocab_size, generator=generator)[:LENGTH] for _ in range(5)])
    return torch.cat([rows, rows], dim=1)


def hf_attentions(planted, tokens):
    """Hugging Face's own attention, [layer][batch, head, query, key]."""
    planted.model.set_attn_implementation("eager")
    with torch.no_grad():
        return planted.model(tokens, output_attentions=True).attentions


def scores(pattern: torch.Tensor) -> dict[str, float]:
    query = torch.arange(LENGTH, 2 * LENGTH)
    later = torch.arange(1, 2 * LENGTH)
    return {
        "IND": pattern[:, query, query - LENGTH + 1].mean().item(),
        "DUP": pattern[:, query, query - LENGTH].mean().item(),
        "PREV": pattern[:, later, later - 1].mean().item(),
    }


@pytest.fixture(params=[(16, 24), (320, 128)], ids=["small", "default"])
def sizes(request):
    return request.param


def test_induction_head_attends_to_the_token_after_the_earlier_copy(sizes):
    planted = planted_induction(*sizes)
    attentions = hf_attentions(planted, repeated_tokens(sizes[0]))
    layer, head = planted.heads["induction"]
    measured = scores(attentions[layer][:, head])
    assert measured["IND"] == pytest.approx(planted.expected["IND"], abs=1e-6)
    assert measured["DUP"] == pytest.approx(planted.expected["DUP"], abs=1e-6)
    layer, head = planted.heads["previous_token"]
    assert scores(attentions[layer][:, head])["PREV"] == pytest.approx(planted.expected["PREV"], abs=1e-6)


def test_induction_model_predicts_the_repeat(sizes):
    tokens = repeated_tokens(sizes[0])
    with torch.no_grad():
        prediction = planted_induction(*sizes).model(tokens).logits.argmax(-1)
    assert torch.equal(prediction[:, LENGTH:-1], tokens[:, LENGTH + 1 :])


def test_induction_head_shares_its_attention_among_several_copies():
    planted = planted_induction(8, 16)
    pattern = hf_attentions(planted, torch.tensor([[3, 1, 3, 2, 5, 3]]))[1][0, 0]
    assert pattern[-1, [1, 3]].tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


def test_induction_head_ignores_the_first_position_which_has_no_previous_token():
    planted = planted_induction(8, 16)
    pattern = hf_attentions(planted, torch.tensor([[0, 1, 2, 3, 4]]))[1][0, 0]
    assert pattern[4].tolist() == pytest.approx([0, 0.25, 0.25, 0.25, 0.25], abs=1e-6)


def test_duplicate_head_attends_to_earlier_copies_and_never_to_itself(sizes):
    planted = planted_duplicate(*sizes)
    layer, head = planted.heads["duplicate_token"]
    pattern = hf_attentions(planted, repeated_tokens(sizes[0]))[layer][:, head]
    measured = scores(pattern)
    assert measured["DUP"] == pytest.approx(planted.expected["DUP"], abs=1e-6)
    assert measured["IND"] == pytest.approx(planted.expected["IND"], abs=1e-6)
    assert pattern.diagonal(dim1=1, dim2=2)[:, 1:].max() < 1e-6


def test_inert_model_attends_uniformly_and_writes_nothing(sizes):
    planted = planted_inert(*sizes)
    tokens = repeated_tokens(sizes[0])
    uniform = torch.ones(2 * LENGTH, 2 * LENGTH).tril() / torch.arange(1, 2 * LENGTH + 1)[:, None]
    for attention in hf_attentions(planted, tokens):
        torch.testing.assert_close(attention, uniform.expand_as(attention), atol=1e-6, rtol=0)
    with torch.no_grad():
        prediction = planted.model(tokens).logits.argmax(-1)
    assert torch.equal(prediction, tokens)


@pytest.mark.parametrize("make", [planted_induction, planted_duplicate, planted_inert])
def test_planted_models_load_as_hooked_models_with_the_same_attention(make):
    planted = make(16, 24)
    tokens = repeated_tokens(16)
    expected = hf_attentions(planted, tokens)
    _, cache = load_model(planted.model).run_with_cache(tokens)
    for layer, attention in enumerate(expected):
        torch.testing.assert_close(cache[f"blocks.{layer}.attn.hook_pattern"], attention, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("vocab_size", "n_ctx"), [(1, 8), (8, 1), (0, 0)])
def test_sizes_without_a_past_or_a_choice_are_refused(vocab_size, n_ctx):
    with pytest.raises(ValueError, match="at least 2"):
        planted_induction(vocab_size, n_ctx)


def sink_and_names(vocab_size: int) -> torch.Tensor:
    tokens = torch.randint(1, vocab_size, (5, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    return tokens


def zero_output(module, inputs, output):
    return (torch.zeros_like(output[0]), *output[1:])


@pytest.mark.parametrize("is_ablated", [False, True])
def test_backup_attends_to_the_name_only_without_the_name_mover(sizes, is_ablated):
    planted, tokens = planted_backup(*sizes), sink_and_names(sizes[0])
    layer, head = planted.heads["name_mover"]
    handle = planted.model.transformer.h[layer].attn.register_forward_hook(zero_output) if is_ablated else None
    attentions = hf_attentions(planted, tokens)
    if handle is not None:
        handle.remove()
    assert attentions[layer][:, head, 1:, 1].min() > 1 - 1e-6
    layer, head = planted.heads["backup"]
    assert attentions[layer][:, head, 1:, int(is_ablated)].min() > 1 - 1e-6


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0, 1.5])
def test_backup_writes_its_share_of_what_the_name_mover_wrote(sizes, share):
    """From the two attention layers' outputs in Hugging Face's own forward pass."""
    planted, tokens = planted_backup(*sizes, share=share), sink_and_names(sizes[0])
    writes = {}

    def keep(role):
        return lambda module, inputs, output: writes.update({role: output[0][:, 1:]})

    modules = {role: planted.model.transformer.h[layer].attn for role, (layer, _) in planted.heads.items()}
    for is_ablated in (False, True):
        handles = [module.register_forward_hook(keep((role, is_ablated))) for role, module in modules.items()]
        if is_ablated:
            handles.append(modules["name_mover"].register_forward_hook(zero_output))
        with torch.no_grad():
            top = planted.model(tokens).logits.argmax(-1)
        for handle in handles:
            handle.remove()
        if not is_ablated:
            assert (top == tokens[:, 1:2])[:, 1:].all()
    unembedding = planted.model.lm_head.weight[tokens[:, 1]].detach()[:, :, None]
    names = {key: (write @ unembedding)[..., 0] for key, write in writes.items()}
    torch.testing.assert_close(names["backup", True], share * names["name_mover", False], atol=1e-4, rtol=0)
    torch.testing.assert_close(names["backup", False], torch.zeros_like(names["backup", False]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("share", [-0.1])
def test_backup_with_a_negative_share_is_refused(share):
    with pytest.raises(ValueError, match="share must not be negative"):
        planted_backup(8, 8, share=share)


def test_backup_without_room_for_a_sink_a_name_and_a_guess_is_refused():
    with pytest.raises(ValueError, match="at least 3"):
        planted_backup(2, 8)


POOL = DocumentGrammar(n_words=12, n_connectors=3, lexicon=5, binding=1.0, p_chain=1.0)


def last_logits(planted, prompts):
    with torch.no_grad():
        return planted.model(torch.as_tensor(prompts)).logits[:, -1]


@pytest.mark.parametrize("n_demonstrations", [3, 8, 11])
def test_function_vector_model_answers_clean_prompts_and_guesses_on_shuffled_ones(n_demonstrations):
    planted = planted_function_vector(POOL)
    tasks = grammar_tasks(POOL, n_tasks=5, n_demonstrations=n_demonstrations, n_prompts=12)
    prompts = concatenate([getattr(task, split) for task in tasks for split in ("selection", "estimation", "test")])
    answers = torch.as_tensor(prompts.answers)
    clean = last_logits(planted, prompts.clean)
    assert (clean.argmax(-1) == answers).double().mean() == planted.expected["accuracy_clean"]
    for kind in ("shuffled", "zero_shot"):
        probabilities = last_logits(planted, getattr(prompts, kind)).softmax(-1)
        mean = probabilities[torch.arange(len(answers)), answers].mean().item()
        assert mean == pytest.approx(planted.expected["P_shuffled"], abs=0.03)
        assert probabilities[:, 12:24].sum(-1).min() > 0.9  # the verbs


def test_function_vector_head_moves_the_task_in_proportion_to_its_demonstrations():
    """What head 0 of layer 1 writes at the query: 4k/(4k + 1) in the task's own direction, whatever the query."""
    planted = planted_function_vector(POOL)
    layer, _ = planted.heads["function_vector"]
    directions = {}
    for k in (3, 11):
        for task in grammar_tasks(POOL, n_tasks=5, n_demonstrations=k, n_prompts=4):
            writes = []
            handle = planted.model.transformer.h[layer].attn.register_forward_hook(
                lambda module, inputs, output, writes=writes: writes.append(output[0][:, -1])
            )
            last_logits(planted, task.test.clean)
            last_logits(planted, task.test.shuffled)
            handle.remove()
            clean, shuffled = writes
            largest = clean.abs().argmax(-1)
            assert len(set(largest.tolist())) == 1
            directions.setdefault(task.name, set()).add(int(largest[0]))
            np.testing.assert_allclose(clean.amax(-1), 4 * k / (4 * k + 1), rtol=0.1)
            np.testing.assert_allclose(shuffled[:, largest[0]], 0.0, atol=1e-4)
    assert all(len(dimensions) == 1 for dimensions in directions.values())
    assert len(set.union(*directions.values())) == 5


def test_function_vector_model_predicts_the_verbs_of_the_grammars_own_text():
    """From the third clause on, in documents with connectors between clauses."""
    sample = POOL.generate(8, 48, np.random.default_rng(0), packed=False)
    with torch.no_grad():
        predicted = planted_function_vector(POOL).model(torch.as_tensor(sample.tokens)).logits.argmax(-1).numpy()
    is_verb = sample.labels["category"][:, 9:] == 1
    hits = predicted[:, 8:-1] == sample.tokens[:, 9:]
    assert hits[is_verb].mean() > 0.95


@pytest.mark.parametrize("change", [{"lexicon": "fixed"}, {"lexicon": "per_document"}, {"binding": 0.5}])
def test_a_language_without_a_function_to_carry_is_refused(change):
    with pytest.raises(ValueError, match="needs a pool of lexicons and binding=1"):
        planted_function_vector(DocumentGrammar(**POOL.model_dump() | change))


@pytest.mark.parametrize(
    ("planted", "tokens"),
    [
        (planted_backup(16, 24), sink_and_names(16)),
        (planted_function_vector(POOL), torch.as_tensor(grammar_tasks(POOL, n_tasks=2, n_prompts=3)[0].test.clean)),
    ],
    ids=["backup", "function_vector"],
)
@pytest.mark.parametrize("kind", CLASSES)
def test_planted_circuits_load_as_hooked_models_with_the_same_logits(planted, tokens, kind):
    with torch.no_grad():
        expected = planted.model(tokens).logits
        measured = load_model(planted.model, as_=kind)(tokens)
    torch.testing.assert_close(measured, expected, atol=1e-4, rtol=0)

from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_models import CLASSES, random_hf, random_hooked

import mechhier as mh
from mechhier.models import load_model
from mechhier.models.loading import model_info
from mechhier.models.planted import planted_duplicate, planted_induction, planted_inert
from mechhier.phenomena._tokens import natural_tokens
from mechhier.probes import Hooked
from mechhier.results import MeasurementWarning


@pytest.mark.parametrize("kind", CLASSES)
def test_k_order_score_is_zero_for_induction_and_one_for_duplicate_tokens(kind):
    induction = mh.phenomena.published(load_model(planted_induction().model, as_=kind))
    assert induction.attrs["segment"] == 64
    np.testing.assert_allclose(induction.k_order_induction.sel(layer=1, head=0), 0.0, atol=0.02)
    planted = planted_duplicate()
    layer, head = planted.heads["duplicate_token"]
    duplicate = mh.phenomena.published(load_model(planted.model, as_=kind))
    # Tokens are drawn with replacement: a token that occurs twice in r shares its attention among its copies.
    assert (duplicate.k_order_induction.sel(layer=layer, head=head) > 0.7).all()
    spread = duplicate.k_order_induction.sel(layer=layer, head=head)
    assert float(spread.max() - spread.min()) < 0.05


def test_uniform_attention_scores_the_stated_chance_of_about_a_hundredth():
    result = mh.phenomena.published(load_model(planted_inert().model))
    expected = np.mean([1 / (q + 1) for q in range(65, 128)])
    assert float(result.k_order_induction_uniform.sel(k=1)) == pytest.approx(expected)
    np.testing.assert_allclose(result.k_order_induction.sel(k=1), expected, atol=1e-6)


def test_hydra_drop_of_a_bias_free_model_is_the_clean_unnormed_logit():
    """The paper's Hydra score holds no ablation: by Hugging Face's own hidden states."""
    hf = random_hf("llama")
    model = load_model(hf)
    result = mh.phenomena.published(model, n_sequences=6, seed=2)
    _, tokens = natural_tokens(Hooked(model), 6, seed=2)
    with torch.no_grad():
        hidden = hf(tokens, output_hidden_states=True).hidden_states
    unembed = hf.lm_head.weight.detach()[tokens[:, -1]]
    for layer in (1,):  # the last hidden state of Hugging Face is normed already
        expected = float((hidden[layer + 1][:, -1] * unembed).sum(-1).mean())
        assert float(result.hydra_drop.sel(distance=1, layer=layer)) == pytest.approx(expected, abs=1e-4)
    assert result.hydra_drop.sel(layer=0).isnull().all()
    assert result.hydra_drop.sel(distance=2, layer=1).isnull()


@pytest.mark.parametrize("architecture", ["llama", "olmo2", "gpt2", "gpt_neox"])
def test_hydra_drop_equals_a_plain_loop_as_released(architecture):
    """Two full passes a layer and distance on the Hugging Face model, the stream zeroed by a plain PyTorch hook."""
    hf = random_hf(architecture)
    model = load_model(hf)
    result = mh.phenomena.published(model, n_sequences=4, seed=2)
    _, tokens = natural_tokens(Hooked(model), 4, seed=2)
    body = hf.base_model
    blocks = getattr(body, "layers", None) or body.h
    unembed = hf.get_output_embeddings().weight.detach()[tokens[:, -1]]

    def logit(layer, zeroed):
        seen = []
        handles = [blocks[layer].register_forward_hook(lambda block, inputs, output: seen.append(output))]
        if zeroed is not None:
            handles.append(blocks[zeroed].register_forward_hook(lambda block, inputs, output: torch.zeros_like(output)))
        with torch.no_grad():
            hf(tokens)
        for handle in handles:
            handle.remove()
        return float((seen[0][:, -1] * unembed).sum(-1).mean())

    for distance in (1, 2):
        for layer in range(distance, len(blocks)):
            expected = logit(layer, None) - logit(layer, layer - distance)
            assert float(result.hydra_drop.sel(distance=distance, layer=layer)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", CLASSES)
def test_hydra_drop_of_all_layers_costs_less_than_three_passes(kind):
    spec = mh.ModelSpec("llama", n_layers=6, d_model=16, n_heads=2)
    model = load_model(spec.build(vocab_size=30, eos_token_id=0, n_ctx=40), as_=kind)
    ran = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda mlp, inputs, output: ran.append(len(output)))
    mh.phenomena.published(model, n_sequences=4)
    # One pass more is the k-order score's.
    assert sum(ran) / 6 / 4 <= 1 + 3


def test_hydra_drop_of_a_model_with_biases_subtracts_what_the_zeroed_run_gives():
    model = random_hooked("gpt2", None)
    drop = mh.phenomena.published(model, n_sequences=4).hydra_drop
    assert (drop.sel(distance=1, layer=2) - drop.sel(distance=2, layer=2)).item() != pytest.approx(0.0, abs=1e-3)


def test_syntax_and_function_scores_are_near_uniform_for_an_untrained_model(tmp_path):
    grammar = mh.grammars.DocumentGrammar(n_words=6, n_connectors=3, context=40)
    spec = mh.TrainSpec(steps=2, warmup_steps=1, n_checkpoints=2, batch_size=2, eval_rows=2)
    run = mh.train(mh.ModelSpec("llama", n_layers=1, d_model=16, n_heads=2), grammar.corpus(400), tmp_path, train=spec)
    result = mh.phenomena.published(run.load(0))
    assert result.syntax_mass.sel(transition="S->V").item() == pytest.approx(6 / 22, abs=0.1)
    np.testing.assert_allclose(result.syntax_mass_uniform, 6 / 22)
    assert float(result.function_vector_probability) == pytest.approx(1 / 22, abs=0.03)


def test_syntax_and_function_scores_are_hugging_faces_probabilities_of_the_tokens_that_were_run(monkeypatch):
    hf, grammar = random_hf("llama"), mh.grammars.DocumentGrammar(n_words=15, n_connectors=4, context=48)
    model, ran = load_model(hf), []
    known = replace(model_info(model), grammar=grammar)
    monkeypatch.setattr(sys.modules["mechhier.phenomena.published"], "model_info", lambda _: known)
    model.hook_dict["blocks.0.hook_resid_pre"].add_hook(lambda resid, hook: resid)
    run = Hooked.run
    monkeypatch.setattr(
        Hooked, "run", lambda self, tokens, *args, **kw: ran.append(tokens) or run(self, tokens, *args, **kw)
    )
    result = mh.phenomena.published(model, n_sequences=5)
    repeats, clauses, prompts = ran[0], *ran[-2:]
    # Ids at least a tenth of the vocabulary from either end.
    assert 5 <= int(repeats.min()) < 10
    assert 40 <= int(repeats.max()) < 45
    with torch.no_grad():
        probabilities, last = hf(clauses).logits.softmax(-1), hf(prompts).logits[:, -1].softmax(-1)
    categories = torch.as_tensor(np.array(grammar.token_categories))
    assert categories[clauses].tolist() == [[0, 1, 2, 3]] * 5
    for transition, position, category in (("S->V", 0, 1), ("V->O", 1, 2), ("C->S", 3, 0)):
        expected = probabilities[:, position, categories == category].sum(-1).mean()
        assert float(result.syntax_mass.sel(transition=transition)) == pytest.approx(float(expected), abs=1e-5)
    assert len(np.unique(result.syntax_mass.round(4))) == 3
    assert torch.equal(prompts[:, :2], prompts[:, 4:])
    expected = last[torch.arange(len(prompts)), prompts[:, 2]].mean()
    assert float(result.function_vector_probability) == pytest.approx(float(expected), abs=1e-6)


def test_a_small_memory_budget_changes_nothing():
    model = random_hooked("gpt2", None)
    whole, parts = (mh.phenomena.published(model, n_sequences=4, max_bytes=budget) for budget in (2**30, 1))
    for name in whole:
        np.testing.assert_allclose(whole[name], parts[name], atol=1e-5, err_msg=name)
    best = whole.k_order_induction.max(("layer", "head"))
    np.testing.assert_allclose(whole.k_order_induction_max, best)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_few_sequences_have_no_interval_and_say_so(n):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MeasurementWarning)
        result = mh.phenomena.published(random_hooked("gpt2", None), n_sequences=n)
    assert len([each for each in caught if each.category is MeasurementWarning]) == (n < 4)
    assert result.k_order_induction.notnull().all()
    assert bool(result.k_order_induction_low.notnull().all()) == (n >= 4)
    assert float(result.k_order_induction_low.min()) >= 0 or n < 4


def test_a_context_without_room_for_ten_orders_is_refused():
    spec = mh.ModelSpec("llama", n_layers=1, d_model=16, n_heads=2)
    model = load_model(spec.build(vocab_size=30, eos_token_id=0, n_ctx=16))
    with pytest.raises(ValueError, match="at least 32 tokens"):
        mh.phenomena.published(model)

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_models import CLASSES, random_hf, random_hooked, random_tokens

import mechhier as mh
from mechhier.models import load_model
from mechhier.models.planted import planted_duplicate, planted_induction, planted_inert
from mechhier.phenomena._tokens import random_repeats
from mechhier.phenomena.induction import text_keys
from mechhier.probes import Hooked


@pytest.mark.parametrize("kind", CLASSES)
def test_planted_induction_head_scores_one_and_its_helper_attends_to_the_previous_token(kind):
    result = mh.phenomena.induction(load_model(planted_induction().model, as_=kind), n_sequences=16)
    assert result.IND.sel(layer=1, head=0) > 0.99
    assert result.DUP.sel(layer=1, head=0) < 0.01
    assert result.PREV.sel(layer=0, head=0) > 0.99
    assert (int(result.IND_best_layer), int(result.IND_best_head)) == (1, 0)
    assert result.IND_best > 0.99


@pytest.mark.parametrize("kind", CLASSES)
def test_planted_duplicate_head_scores_the_reverse(kind):
    planted = planted_duplicate()
    layer, head = planted.heads["duplicate_token"]
    result = mh.phenomena.induction(load_model(planted.model, as_=kind), n_sequences=16)
    assert result.DUP.sel(layer=layer, head=head) > 0.99
    assert result.IND.sel(layer=layer, head=head) < 0.01


@pytest.mark.parametrize("kind", CLASSES)
def test_inert_model_scores_exactly_the_uniform_baseline(kind):
    model = load_model(planted_inert().model, as_=kind)
    result = mh.phenomena.induction(model, torch.randint(0, 20, (6, 40)), n_sequences=8)
    for score in ("IND", "DUP", "PREV", "IND_text", "DUP_text", "NEXT_text"):
        np.testing.assert_allclose(result[score], float(result[f"{score}_uniform"]), atol=1e-6)


def test_random_models_do_not_induce():
    """The null: over weights drawn ten times, the best head on the other half stays near uniform attention."""
    excess = []
    for seed in range(10):
        hf = mh.ModelSpec("llama", n_layers=2, d_model=32, n_heads=4).build(
            vocab_size=60, eos_token_id=0, n_ctx=64, seed=seed
        )
        result = mh.phenomena.induction(load_model(hf), n_sequences=16, seed=seed)
        excess.append(float(result.IND_best - result.IND_uniform))
    assert max(excess) < 0.01


def test_repeat_scores_equal_a_plain_loop_over_hugging_faces_attentions():
    hf = random_hf("gpt2")
    model = load_model(hf)
    result = mh.phenomena.induction(model, n_sequences=12, seed=3)
    totals = {name: np.zeros((3, 4)) for name in ("IND", "DUP", "PREV")}
    counts = dict.fromkeys(totals, 0)
    for n, rows in random_repeats(Hooked(model), 12, seed=3):
        with torch.no_grad():
            attentions = [a.numpy() for a in hf(rows, output_attentions=True).attentions]
        for b in range(len(rows)):
            assert sorted(rows[b, :n].tolist()) == sorted(set(rows[b, n:].tolist()))
            for q in range(1, 2 * n):
                for name, k in (("IND", q - n + 1), ("DUP", q - n), ("PREV", q - 1)):
                    if name == "PREV" or q >= n:
                        totals[name] += [[a[b, h, q, k] for h in range(4)] for a in attentions]
                        counts[name] += 1
    for name, total in totals.items():
        np.testing.assert_allclose(result[name], total / counts[name], atol=1e-5)


def test_text_scores_equal_a_plain_loop_over_hugging_faces_attentions():
    hf, tokens = random_hf("llama"), torch.randint(0, 6, (3, 14), generator=torch.Generator().manual_seed(1))
    result = mh.phenomena.induction(load_model(hf), tokens, n_sequences=4)
    with torch.no_grad():
        attentions = [a.numpy() for a in hf(tokens, output_attentions=True).attentions]
    x, length = tokens.tolist(), tokens.shape[1]
    wanted = {
        "IND_text": lambda row, q, k: k >= 1 and row[k - 1] == row[q] and k - 1 < q,
        "DUP_text": lambda row, q, k: k < q and row[k] == row[q],
        "NEXT_text": lambda row, q, k: row[k] == row[q + 1],
    }
    for name, counts_as in wanted.items():
        values, uniform = [], []
        for b, row in enumerate(x):
            for q in range((length - 1) // 2, length - 1):
                keys = [k for k in range(q + 1) if counts_as(row, q, k)]
                if keys:
                    values.append([[a[b, h, q, keys].sum() for h in range(4)] for a in attentions])
                    uniform.append(len(keys) / (q + 1))
        np.testing.assert_allclose(result[name], np.mean(values, axis=0), atol=1e-5)
        assert float(result[f"{name}_uniform"]) == pytest.approx(np.mean(uniform))


def test_text_keys_of_a_short_sentence_by_hand():
    #              0  1  2  3  4
    row = torch.tensor([[7, 8, 7, 8, 9]])
    keys = {name: mask[0].nonzero().tolist() for name, mask in text_keys(row).items()}
    assert keys["DUP_text"] == [[2, 0], [3, 1]]
    assert keys["IND_text"] == [[2, 1], [3, 2]]
    assert keys["NEXT_text"] == [[1, 0], [2, 1]]


def test_results_do_not_depend_on_batch_size_or_class(monkeypatch):
    results = [mh.phenomena.induction(random_hooked("olmo", "bridge"), random_tokens(8, 30), n_sequences=8)]
    monkeypatch.setattr(Hooked, "batch_size", lambda self, length: 3)
    results += [
        mh.phenomena.induction(random_hooked("olmo", kind), random_tokens(8, 30), n_sequences=8)
        for kind in ("bridge", None)
    ]
    for other in results[1:]:
        for name in results[0].data_vars:
            np.testing.assert_allclose(results[0][name], other[name], atol=1e-5)


def test_interval_covers_the_mean_of_many_sequences():
    model = load_model(random_hf("llama"))
    many = mh.phenomena.induction(model, n_sequences=400, seed=1)
    few = mh.phenomena.induction(model, n_sequences=24, seed=0)
    covered = (few.PREV_low <= many.PREV) & (few.PREV_high >= many.PREV)
    assert covered.mean() >= 0.75
    assert (few.PREV_low < few.PREV).all()
    assert (few.PREV_high > few.PREV).all()


def test_bad_input_is_refused_with_what_is_accepted():
    model = random_hooked("llama", None)
    with pytest.raises(ValueError, match="at least 4"):
        mh.phenomena.induction(model, n_sequences=2)
    with pytest.raises(ValueError, match="longer than the model's context"):
        mh.phenomena.induction(model, torch.zeros(2, 500, dtype=torch.long))
    with pytest.raises(TypeError, match="HookedTransformer or TransformerBridge"):
        mh.phenomena.induction("gpt2")


def test_a_model_without_grammar_says_that_text_is_missing():
    result = mh.phenomena.induction(random_hooked("gpt2", None), n_sequences=4)
    assert "NEXT_text" not in result
    assert "no grammar" in result.attrs["text"]
    assert {"definition", "source", "model", "dtype", "seed", "torch_version"} <= set(result.attrs)


def test_a_head_that_only_knows_syntax_scores_its_category_null(tmp_path):
    """Attention uniform within every category scores exactly the null, whatever its mass on the categories."""
    from mechhier.phenomena.induction import _on_text

    grammar = mh.grammars.DocumentGrammar(n_words=4, n_connectors=2, context=48)
    hooked = Hooked(random_hooked("llama", "bridge"))
    tokens = torch.as_tensor(grammar.corpus(48 * 6).rows(0, 6))
    categories = torch.as_tensor(np.array(grammar.token_categories))
    mass = torch.rand(6, 48, 5, generator=torch.Generator().manual_seed(0))

    def syntactic(pattern):
        of_key = torch.nn.functional.one_hot(categories[tokens], 5).float()
        seen = of_key.cumsum(1).clamp(min=1)
        within = torch.einsum("bqc,bkc->bqk", mass / seen, of_key).tril()
        return (within / within.sum(-1, keepdim=True))[:, None].expand_as(pattern)

    model = hooked.model
    model.hook_dict["blocks.1.attn.hook_pattern"].add_hook(lambda pattern, hook: syntactic(pattern))
    scores = _on_text(hooked, tokens, grammar.token_categories)
    for sums in scores.values():
        np.testing.assert_allclose(sums.attention[:, 1], sums.category_null[:, 1], atol=1e-4)
        assert abs(sums.attention[:, 0] - sums.category_null[:, 0]).max() > 1e-3
        assert abs(sums.attention[:, 1] - sums.uniform[:, None]).max() > 1e-2

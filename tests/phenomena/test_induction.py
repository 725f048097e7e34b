from __future__ import annotations

import importlib
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_models import ARCHITECTURES, CLASSES, CONTEXT, VOCAB, random_hf, random_hooked, random_tokens

import mechhier as mh
from mechhier.models import load_model
from mechhier.models.loading import model_info
from mechhier.models.planted import planted_duplicate, planted_induction, planted_inert
from mechhier.phenomena import _tokens
from mechhier.phenomena._tokens import random_repeats
from mechhier.phenomena.induction import text_keys
from mechhier.phenomena.induction.attention import Sums, on_text
from mechhier.phenomena.induction.measure import _describe
from mechhier.probes import Hooked
from mechhier.results import MeasurementWarning


def with_grammar(monkeypatch, model, grammar):
    """The model as if it had been trained on the grammar; its vocabulary is larger."""
    known = replace(model_info(model), grammar=grammar)
    for module in ("measure", "attention"):
        target = importlib.import_module(f"mechhier.phenomena.induction.{module}")
        if hasattr(target, "model_info"):
            monkeypatch.setattr(target, "model_info", lambda _: known)
    monkeypatch.setattr(_tokens, "model_info", lambda _: known)
    frequencies = np.pad(grammar.unigram, (0, VOCAB - grammar.vocab_size), constant_values=1e-6)
    monkeypatch.setattr(_tokens, "token_frequencies", lambda _: frequencies / frequencies.sum())
    return model


@pytest.mark.parametrize("kind", CLASSES)
def test_planted_induction_head_scores_one_and_its_helper_attends_to_the_previous_token(kind):
    result = mh.phenomena.induction(load_model(planted_induction(24, 48).model, as_=kind), n_sequences=16)
    assert result.IND.sel(layer=1, head=0) > 0.99
    assert result.DUP.sel(layer=1, head=0) < 0.01
    assert result.PREV.sel(layer=0, head=0) > 0.99
    assert (int(result.IND_best_layer), int(result.IND_best_head)) == (1, 0)
    assert result.IND_best > 0.99


@pytest.mark.parametrize("kind", CLASSES)
def test_planted_duplicate_head_scores_the_reverse(kind):
    planted = planted_duplicate(24, 48)
    layer, head = planted.heads["duplicate_token"]
    result = mh.phenomena.induction(load_model(planted.model, as_=kind), n_sequences=16)
    assert result.DUP.sel(layer=layer, head=head) > 0.99
    assert result.IND.sel(layer=layer, head=head) < 0.01


@pytest.mark.parametrize("kind", CLASSES)
def test_inert_model_scores_exactly_the_uniform_baseline(kind):
    model = load_model(planted_inert(24, 48).model, as_=kind)
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


def test_repeats_behind_a_beginning_of_sequence_token_are_scored_where_they_stand(monkeypatch):
    bos, module = 7, importlib.import_module("mechhier.phenomena.induction.attention")
    for place in (_tokens, module):
        monkeypatch.setattr(place, "bos_token", lambda hooked: bos)
    hf = random_hf("gpt2")
    model = load_model(random_hf("gpt2"))
    result = mh.phenomena.induction(model, n_sequences=6, n_controls=0)
    found = {"IND": [], "DUP": []}
    for n, rows in random_repeats(Hooked(model), 6, seed=0):
        assert (rows[:, 0] == bos).all()
        with torch.no_grad():
            attentions = torch.stack(hf(rows, output_attentions=True).attentions)
        for q in range(n + 1, 2 * n + 1):
            assert torch.equal(rows[:, q], rows[:, q - n])
            found["IND"].append(attentions[:, :, :, q, q - n + 1])
            found["DUP"].append(attentions[:, :, :, q, q - n])
    for name, values in found.items():
        np.testing.assert_allclose(result[name], torch.cat(values, dim=1).mean(1), atol=1e-5)


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


def test_role_scores_equal_a_plain_loop_over_hugging_faces_attentions(monkeypatch):
    hf, grammar = random_hf("llama"), mh.grammars.DocumentGrammar(n_words=4, n_connectors=2, context=24)
    rows = grammar.corpus(24 * 3).rows(0, 3)
    model = with_grammar(monkeypatch, load_model(hf), grammar)
    result = mh.phenomena.induction(model, rows, n_sequences=4, n_controls=0)
    with torch.no_grad():
        attentions = [a.numpy() for a in hf(torch.as_tensor(rows), output_attentions=True).attentions]
    values, uniform = [], []
    for b, row in enumerate(grammar.token_categories[rows].tolist()):
        for q in range(11, 23):
            keys = [k for k in range(1, q + 1) if row[k - 1] == row[q]]
            if keys:
                values.append([[a[b, h, q, keys].sum() for h in range(4)] for a in attentions])
                uniform.append(len(keys) / (q + 1))
    np.testing.assert_allclose(result.ROLE_text, np.mean(values, axis=0), atol=1e-5)
    assert float(result.ROLE_text_uniform) == pytest.approx(np.mean(uniform))
    assert "ROLE_text_null" not in result


def test_roles_are_the_corpus_labels_where_a_token_has_several_categories(monkeypatch):
    """Terminal a is written by S at first, by B later: by the token alone every position would be of one category."""
    grammar = mh.grammars.PCFG.from_string("S -> 'a' B [0.5] | 'b' B [0.5]\nB -> 'a' [0.5] | 'b' [0.5]", context=24)
    model = with_grammar(monkeypatch, random_hooked("llama", None), grammar)
    result = mh.phenomena.induction(model, n_sequences=6, n_controls=0)
    sample = grammar.corpus(6 * CONTEXT, context=CONTEXT, split="test").sample(0, 6)
    hooked = Hooked(model)
    by_label, _ = on_text(hooked, hooked.check_tokens(sample.tokens), sample.labels["category"], lambda n: None)
    by_token, _ = on_text(
        hooked, hooked.check_tokens(sample.tokens), grammar.token_categories[sample.tokens], lambda n: None
    )
    label, token = (s["ROLE_text"].attention.sum(0) / s["ROLE_text"].n_queries.sum() for s in (by_label, by_token))
    np.testing.assert_allclose(result.ROLE_text, label, atol=1e-6)
    assert abs(label - token).max() > 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_equal_hugging_faces(architecture):
    hf, tokens = random_hf(architecture), random_tokens(6, 31)
    model = load_model(hf)
    result = mh.phenomena.induction(model, tokens, n_sequences=8, n_controls=0)

    def losses(rows):
        with torch.no_grad():
            return -hf(rows).logits.log_softmax(-1)[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]

    first, second = [], []
    for n, rows in random_repeats(Hooked(model), 8, seed=0):
        for row in losses(rows):
            first.append(row[: n - 1].mean())
            second.append(row[n:].mean())
            assert len(row[n:]) == n - 1
    assert float(result.first_copy_loss) == pytest.approx(float(np.mean(first)), abs=1e-4)
    assert float(result.copy_loss) == pytest.approx(float(np.mean(second)), abs=1e-4)
    of_text = losses(tokens)  # 30 predicted tokens: positions 2..4 and 28..30
    assert float(result.ICL_score) == pytest.approx(float(of_text[:, 27:].mean() - of_text[:, 1:4].mean()), abs=1e-4)
    assert result.attrs["ICL_positions"] == "loss on the tokens at positions 2..4 and 28..30"


def test_the_grammars_exact_floor_is_subtracted_from_the_icl_score(monkeypatch):
    grammar = mh.grammars.DocumentGrammar(n_words=4, n_connectors=2, lexicon=3, context=CONTEXT)
    model = with_grammar(monkeypatch, random_hooked("llama", None), grammar)
    result = mh.phenomena.induction(model, n_sequences=6, n_controls=0)
    sample = grammar.corpus(6 * CONTEXT, context=CONTEXT, split="test").sample(0, 6)
    unexplained = mh.phenomena.induction(model, sample.tokens, n_sequences=6, n_controls=0)
    floor = grammar.ideal_loss(sample).estimate[:, 1:]
    by_hand = floor[:, 42:].mean() - floor[:, 2:7].mean()
    assert float(unexplained.ICL_score - result.ICL_score) == pytest.approx(by_hand, abs=1e-6)
    assert "exact" in result.attrs["ICL_floor"]
    assert unexplained.attrs["ICL_floor"].startswith("nothing")


def test_a_floor_that_is_not_exact_is_not_subtracted_and_asked_of_one_row_only(monkeypatch):
    grammar = mh.grammars.DocumentGrammar(n_words=4, n_connectors=2, binding=0.5, context=CONTEXT)
    asked = []
    whole = mh.grammars.DocumentGrammar.ideal_loss
    monkeypatch.setattr(
        mh.grammars.DocumentGrammar, "ideal_loss", lambda self, s: asked.append(len(s.tokens)) or whole(self, s)
    )
    model = with_grammar(monkeypatch, random_hooked("llama", None), grammar)
    result = mh.phenomena.induction(model, n_sequences=6, n_controls=0)
    assert asked == [1]
    assert "not exact" in result.attrs["ICL_floor"]
    assert "particle" in result.attrs["ICL_floor"]


def test_a_model_that_copies_has_no_loss_on_the_second_copy_and_improves_with_context():
    result = mh.phenomena.induction(load_model(planted_induction(24, 48).model), n_sequences=8, n_controls=0)
    assert result.copy_loss_high < 0.01
    assert result.first_copy_loss_low > 5


def test_memory_for_a_batch_changes_no_number():
    tokens = random_tokens(8, 30)
    wide, narrow = (
        mh.phenomena.induction(random_hooked("gpt2", None), tokens, n_sequences=8, max_bytes=size)
        for size in (2**30, 2**16)
    )
    assert Hooked(random_hooked("gpt2", None), max_bytes=2**16).batch_size(30) < 8
    for name in wide.data_vars:
        if name != "kind":
            np.testing.assert_allclose(wide[name], narrow[name], atol=1e-5)


def test_text_keys_of_late_queries_are_the_last_rows_of_all():
    tokens, categories = torch.randint(0, 5, (3, 17)), torch.randint(0, 3, (3, 17))
    whole, late = text_keys(tokens, categories), text_keys(tokens, categories, first_query=9)
    assert set(whole) == {"IND_text", "DUP_text", "NEXT_text", "ROLE_text"}
    for name, mask in whole.items():
        assert torch.equal(mask[:, 9:], late[name])


def test_text_keys_of_a_short_sentence_by_hand():
    #              0  1  2  3  4
    row = torch.tensor([[7, 8, 7, 8, 9]])
    keys = {name: mask[0].nonzero().tolist() for name, mask in text_keys(row).items()}
    assert keys["DUP_text"] == [[2, 0], [3, 1]]
    assert keys["IND_text"] == [[2, 1], [3, 2]]
    assert keys["NEXT_text"] == [[1, 0], [2, 1]]


def test_results_do_not_depend_on_batch_size_or_class(monkeypatch):
    results = [mh.phenomena.induction(random_hooked("olmo", "bridge"), random_tokens(16, 30), n_sequences=16)]
    monkeypatch.setattr(Hooked, "batch_size", lambda self, length: 3)
    results += [
        mh.phenomena.induction(random_hooked("olmo", kind), random_tokens(16, 30), n_sequences=16)
        for kind in ("bridge", None)
    ]
    for other in results[1:]:
        for name in results[0].data_vars:
            if name == "kind":
                np.testing.assert_array_equal(results[0][name], other[name])
            else:
                np.testing.assert_allclose(results[0][name], other[name], atol=1e-5)


def test_interval_covers_the_mean_of_many_sequences():
    model = load_model(random_hf("llama"))
    many = mh.phenomena.induction(model, n_sequences=400, seed=1)
    few = mh.phenomena.induction(model, n_sequences=24, seed=0)
    covered = (few.PREV_low <= many.PREV) & (few.PREV_high >= many.PREV)
    assert covered.mean() >= 0.75
    assert (few.PREV_low < few.PREV).all()
    assert (few.PREV_high > few.PREV).all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8])
def test_few_sequences_have_estimates_and_what_is_undefined_is_said_once(n):
    model = random_hooked("llama", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MeasurementWarning)
        result = mh.phenomena.induction(model, random_tokens(n, 30), n_sequences=n)
    said = [str(each.message) for each in caught if each.category is MeasurementWarning]
    assert len(said) == (n < 8)
    assert result.IND.notnull().all()
    assert result.IND_text.notnull().all()
    assert bool(result.IND_low.notnull().all()) == (n >= 4)
    assert bool(result.IND_best_low.notnull()) == (n >= 8)
    assert ("copy_loss_change" in result) == (n >= 2)
    by_design = {name for name in result.data_vars if "K_composition" in name or name.endswith("_control")}
    for name in set(result.data_vars) - by_design:
        if result[name].dtype.kind == "f" and result[name].isnull().any():
            assert re.search(rf"\b{name.removesuffix('_low').removesuffix('_high')}\b", said[0]), name
    assert set(np.unique(result.kind)) == {"none"}
    assert ("no head's kind" in "".join(said)) == (n < 4)


def test_text_without_a_repeated_token_has_no_score_and_says_so():
    tokens = torch.arange(48).reshape(2, 24).repeat(4, 1)
    with pytest.warns(MeasurementWarning, match="nothing counts for IND_text, IND_text_best, DUP_text"):
        result = mh.phenomena.induction(random_hooked("llama", None), tokens, n_sequences=8, n_controls=0)
    assert result.IND_text.isnull().all()


@pytest.mark.parametrize("n", [8, 20])
def test_a_uniform_head_has_an_interval_without_width(n):
    """The lengths of the repeats are laid out: that chance depends on them is no uncertainty."""
    result = mh.phenomena.induction(load_model(planted_inert(24, 48).model), n_sequences=n, n_controls=0)
    for name in ("IND", "DUP"):
        np.testing.assert_allclose(result[name].isel(layer=0, head=0), result[f"{name}_uniform"], rtol=1e-5)
        width = result[f"{name}_high"] - result[f"{name}_low"]
        assert float(width.isel(layer=0, head=0)) < 1e-6


def test_lengths_have_several_sequences_each_so_that_halves_have_too():
    for n, expected in ((1, [1]), (3, [2, 1]), (8, [4, 4]), (20, [4] * 5), (64, [8] * 8)):
        groups = random_repeats(Hooked(random_hooked("llama", None)), n, seed=0)
        assert [len(rows) for _, rows in groups] == expected
        assert len({length for length, _ in groups}) == len(groups)


def test_bad_input_is_refused_with_what_is_accepted():
    model = random_hooked("llama", None)
    with pytest.raises(ValueError, match="at least 1"):
        mh.phenomena.induction(model, n_sequences=0)
    with pytest.raises(ValueError, match="longer than the model's context"):
        mh.phenomena.induction(model, torch.zeros(2, 500, dtype=torch.long))
    with pytest.raises(TypeError, match="HookedTransformer or TransformerBridge"):
        mh.phenomena.induction("gpt2")


def test_a_model_without_grammar_says_that_text_is_missing():
    result = mh.phenomena.induction(random_hooked("gpt2", None), n_sequences=4)
    assert "NEXT_text" not in result
    assert "no grammar" in result.attrs["text"]
    assert {"definition", "source", "model", "dtype", "seed", "torch_version"} <= set(result.attrs)


def test_the_best_head_is_the_one_furthest_above_what_syntax_alone_would_score():
    attention, null = np.full((4, 1, 3), 0.2), np.zeros((4, 1, 3))
    attention[:, 0, 0], null[:, 0, 0] = 0.9, 0.8
    attention[::2, 0, 1], attention[1::2, 0, 1] = 0.6, 0.4
    described = _describe("NEXT_text", Sums(attention, np.full(4, 0.1), np.ones(4), null), seed=0)
    assert (int(described["NEXT_text_best_layer"][1]), int(described["NEXT_text_best_head"][1])) == (0, 1)
    # Scored on the sequences that did not choose it.
    assert float(described["NEXT_text_best"][1]) == pytest.approx(0.4)
    assert float(described["NEXT_text_best_null"][1]) == 0.0


def test_a_head_that_only_knows_syntax_scores_its_category_null():
    """Attention uniform within every category scores exactly the null, whatever its mass on the categories."""
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
    scores, _ = on_text(hooked, tokens, categories[tokens].numpy(), lambda n: None)
    assert scores.pop("ROLE_text").category_null is None
    for sums in scores.values():
        np.testing.assert_allclose(sums.attention[:, 1], sums.category_null[:, 1], atol=1e-4)
        assert abs(sums.attention[:, 0] - sums.category_null[:, 0]).max() > 1e-3
        assert abs(sums.attention[:, 1] - sums.uniform[:, None]).max() > 1e-2


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_scores_agree_with_transformer_lens_head_detector_where_definitions_agree(architecture):
    """With masks of our own over one sequence: its score is a mean over all queries, ours over those that count."""
    from transformer_lens.head_detector import compute_head_attention_similarity_score

    model = random_hooked(architecture, None)
    result = mh.phenomena.induction(model, n_sequences=8, n_controls=0)
    sums = {name: np.zeros((3, 4)) for name in ("IND", "DUP", "PREV")}
    counts = dict.fromkeys(sums, 0)
    for n, rows in random_repeats(Hooked(model), 8, seed=0):
        length = 2 * n
        q = torch.arange(length)
        masks = {name: torch.zeros(length, length) for name in sums}
        masks["IND"][q[n:], q[n:] - n + 1] = 1
        masks["DUP"][q[n:], q[n:] - n] = 1
        masks["PREV"][q[1:], q[1:] - 1] = 1
        for row in rows:
            _, cache = model.run_with_cache(row[None])
            for name, mask in masks.items():
                counts[name] += mask.sum()
                for layer in range(3):
                    for head in range(4):
                        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, head]
                        share = compute_head_attention_similarity_score(
                            pattern, mask, exclude_bos=False, exclude_current_token=False, error_measure="mul"
                        )
                        sums[name][layer, head] += share * length
    for name, total in sums.items():
        np.testing.assert_allclose(result[name], total / counts[name].item(), atol=1e-5)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    ("make", "name", "expected"), [(planted_induction, "induction", 1.0), (planted_duplicate, "duplicate_token", 0.0)]
)
def test_role_induction_of_planted_heads_where_every_token_is_a_role_of_its_own(make, name, expected, kind):
    planted = make(24, 48)
    hooked, tokens = Hooked(load_model(planted.model, as_=kind)), planted.tokens(8)
    layer, head = planted.heads[name]
    role = on_text(hooked, tokens, tokens.numpy(), lambda n: None)[0]["ROLE_text"]
    assert role.attention.sum(0)[layer, head] / role.n_queries.sum() == pytest.approx(expected, abs=1e-3)

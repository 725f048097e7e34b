"""Knock-out against masks before the softmax of Hugging Face's models; forced patterns against products by hand."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from random_models import CLASSES, EVERY_MODEL, random_hf, random_hooked, random_tokens
from raw_hooks import BODIES, attention_of, blocks_of, head_slice, input_place, logits_of, put, site_edit

import mechhier as mh
from mechhier.models.planted import planted_induction
from mechhier.probes import Edge, Head, force_pattern, forced_pattern, knock_out, knocked_out, logit_difference, loss

TOKENS = random_tokens(4, 6)
METRIC = logit_difference(torch.arange(4), torch.arange(4) + 10)
EDGES = [
    Edge(layer=1, head=2, queries=-1, keys=3),
    Edge(layer=2, queries=(4, 5), keys=(0, 2)),
    Edge(queries=5, keys=1),
    (Edge(layer=0, head=1, keys=0), Edge(layer=2, head=3, queries=3, keys=2)),
]


def differences(logits):
    return (logits[range(4), -1, range(4)] - logits[range(4), -1, range(10, 14)]).double().numpy().mean()


def positions(named, length):
    if named is None:
        return list(range(length))
    return [p % length for p in ((named,) if isinstance(named, int) else named)]


@contextmanager
def masked(hf, edges):
    """Geva et al.'s knock-out: minus infinity on the scores, in Hugging Face's own mask."""
    handles = []
    for layer, block in enumerate(blocks_of(hf)):
        chosen = [edge for edge in edges if edge.layer in (None, layer)]

        def before(module, args, kwargs, chosen=chosen):
            mask = kwargs["attention_mask"].float().expand(-1, 4, -1, -1).clone()
            for edge in chosen:
                for head in range(4) if edge.head is None else [edge.head]:
                    for q in positions(edge.queries, mask.shape[2]):
                        for k in positions(edge.keys, mask.shape[3]):
                            mask[:, head, q, k] = torch.finfo(torch.float32).min
            return args, {**kwargs, "attention_mask": mask}

        handles.append(attention_of(block).register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("architecture", [*BODIES, "olmo", "gpt_neox-sequential"])
@pytest.mark.parametrize("kind", CLASSES)
def test_knocking_out_equals_masking_before_the_softmax(architecture, kind):
    hf, model = random_hf(architecture), random_hooked(architecture, kind)
    edges = [*EDGES[:3], (EDGES[0], EDGES[3][1])]  # no row without anything left
    result = knock_out(model, edges, TOKENS, metric=METRIC)
    for number, entry in enumerate(edges):
        together = entry if isinstance(entry, tuple) else (entry,)
        with masked(hf, together):
            expected = logits_of(hf, TOKENS)
        assert float(result.edited[number]) == pytest.approx(differences(expected), abs=3e-4)
        with knocked_out(model, [entry]):
            torch.testing.assert_close(model(TOKENS, return_type="logits").detach(), expected, atol=1e-3, rtol=1e-4)
    assert float(result.clean) == pytest.approx(differences(logits_of(hf, TOKENS)), abs=1e-4)
    assert result.edge.values.tolist()[:3] == ["L1H2 -1→3", "L2 4,5→0,2", "all 5→1"]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_row_with_nothing_left_attends_to_nothing_and_other_rows_stay_as_they_were(kind):
    model = random_hooked("llama", kind)
    _, before = model.run_with_cache(TOKENS)
    with knocked_out(model, [Edge(layer=1, head=2, keys=0)]):
        _, after = model.run_with_cache(TOKENS)
    name = "blocks.1.attn.hook_pattern"
    assert (after[name][:, 2, 0] == 0).all()
    torch.testing.assert_close(after[name][:, 2, 1:].sum(-1), torch.ones(4, 5))
    assert (after[name][:, 2, :, 0] == 0).all()
    assert torch.equal(after[name][:, [0, 1, 3]], before[name][:, [0, 1, 3]])


@pytest.mark.parametrize(("architecture", "kind"), EVERY_MODEL)
def test_every_model_is_edited_alike_in_any_batches(architecture, kind):
    model, other = random_hooked(architecture, kind), random_hooked(architecture, "bridge")
    for measure, entries, extra in (
        (knock_out, EDGES, ()),
        (force_pattern, [Head(1, 2), (Head(0, 0), Head(2, 1))], ("previous",)),
    ):
        whole = measure(model, entries, TOKENS, *extra)
        np.testing.assert_allclose(whole.effect, measure(model, entries, TOKENS, *extra, max_bytes=1).effect, atol=1e-5)
        np.testing.assert_allclose(whole.effect, measure(other, entries, TOKENS, *extra).effect, atol=1e-4)
        assert (abs(whole.effect) > 1e-3).any()


def by_hand(name, length=6):
    pattern = np.zeros((length, length))
    for q in range(length):
        if name == "uniform":
            pattern[q, : q + 1] = 1 / (q + 1)
        else:
            pattern[q, q if name == "self" else max(0, q - 1)] = 1.0
    return torch.tensor(pattern, dtype=torch.float32)


@pytest.mark.parametrize("architecture", BODIES)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", ["previous", "self", "uniform", "one", "each"])
def test_forcing_a_pattern_equals_its_product_with_the_values(architecture, kind, name):
    hf, model = random_hf(architecture), random_hooked(architecture, kind)
    drawn = torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(0)).tril()
    pattern = {"one": drawn[0], "each": drawn}.get(name)
    values = []
    module, where = input_place(hf, 1, 2, "v")
    logits_of(hf, TOKENS, [(module, "out", lambda x: values.append(x[..., where].clone()))])
    z = (by_hand(name) if pattern is None else pattern) @ values[0]
    expected = logits_of(hf, TOKENS, [site_edit(hf, "z", 1, put(z, slice(None), head_slice(2)))])
    forced = name if pattern is None else pattern
    result = force_pattern(model, [Head(1, 2)], TOKENS, forced, metric=METRIC)
    assert float(result.edited[0]) == pytest.approx(differences(expected), abs=3e-4)
    with forced_pattern(model, [Head(1, 2)], forced):
        torch.testing.assert_close(model(TOKENS, return_type="logits").detach(), expected, atol=1e-3, rtol=1e-4)
        inside = knock_out(model, [Edge(layer=2, head=0, keys=0)], TOKENS, metric=METRIC, max_bytes=1)
    assert float(inside.clean) == pytest.approx(differences(expected), abs=3e-4)


@pytest.mark.parametrize("kind", CLASSES)
def test_planted_induction_needs_the_edge_to_the_copied_token_and_its_previous_token_head(kind):
    planted = planted_induction()
    tokens = torch.tensor([[5, 6, 7, 8, 9, 5, 6], [15, 16, 17, 18, 19, 15, 16]])
    model = mh.load_model(planted.model, as_=kind)
    metric = logit_difference(tokens[:, 2], tokens[:, 3])
    edges = [Edge(layer=1, head=0, queries=6, keys=2), Edge(layer=1, head=0, queries=6, keys=3), Edge(0, 0, 2, 1)]
    effect = knock_out(model, edges, tokens, metric=metric).effect
    assert float(effect[0]) < -1
    assert float(effect[2]) < -1
    assert abs(float(effect[1])) < 1e-3
    forced = force_pattern(model, [Head(0, 0), Head(1, 0)], tokens, "self", metric=metric).effect
    assert (forced < -1).all()
    same = force_pattern(model, [Head(0, 0)], tokens, "previous", metric=metric).effect
    assert abs(float(same[0])) < 1e-3


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([Edge(layer=3)], "the model has layers"),
        ([Edge(head=4)], "the model has heads"),
        ([Edge(queries=6)], "positions must lie in"),
        ([Edge(keys=(1, -7))], "positions must lie in"),
    ],
)
def test_edges_that_do_not_exist_are_refused(edges, message):
    with pytest.raises(ValueError, match=message):
        knock_out(random_hooked("llama", "bridge"), edges, TOKENS)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("next", "pattern must be one of previous, self, uniform"),
        (torch.ones(6, 6), "zero where the key comes after"),
        (torch.eye(6) * torch.nan, "finite"),
        (torch.eye(5), "does not fit"),
        (torch.eye(6).expand(3, 6, 6), "does not fit"),
        (torch.zeros(6), "a pattern must be"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        force_pattern(random_hooked("llama", "bridge"), [Head(0, 0)], TOKENS, pattern, metric=loss(TOKENS))


def test_a_context_refuses_calls_that_its_pattern_does_not_fit():
    model = random_hooked("llama", "bridge")
    with (
        forced_pattern(model, [Head(0, 0)], torch.eye(5)),
        pytest.raises(ValueError, match="pattern is of 5 positions"),
    ):
        model(TOKENS)
    with (
        forced_pattern(model, [Head(0, 0)], torch.eye(6).expand(3, 6, 6)),
        pytest.raises(ValueError, match="patterns of 3 sequences"),
    ):
        model(TOKENS)

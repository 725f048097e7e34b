"""Names of components: labels, and what a model does not have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_models import CLASSES, random_hooked, random_tokens

from mechhier.probes import MLP, Attention, Edge, Head, HeadInput, Hooked, Neurons, Resid, ablate, knock_out
from mechhier.probes.components import check, grouped, label, locate, read


def test_labels_are_those_of_the_field():
    parts = (Head(3, 5), Attention(3), MLP(3), Neurons(3, 0, 64), Resid(2), HeadInput(1, 2, "q"))
    assert [str(part) for part in parts] == ["L3H5", "attn3", "mlp3", "mlp3[0:64]", "resid2", "L1H2.q"]
    assert label((Head(3, 5), MLP(4))) == "L3H5+mlp4"


@pytest.mark.parametrize("kind", CLASSES)
def test_a_component_is_located_in_an_activation_of_its_width(kind):
    hooked = Hooked(random_hooked("llama-gqa", kind))
    widths = {
        Head(1, 3): 16,
        Attention(1): 64,
        MLP(1): 64,
        Neurons(1, 90, 96): 6,
        Resid(1): 64,
        HeadInput(1, 3, "k"): 16,
    }
    for part, width in widths.items():
        site, layer, index = locate(hooked, part)
        seen = []
        hooked.run(random_tokens(2, 5), [(site, layer, seen.append)])
        assert read(seen[0], index).shape == (2, 5, width)
    # Heads 2 and 3 read the second of two groups' keys.
    assert locate(hooked, HeadInput(1, 3, "k"))[2] == locate(hooked, HeadInput(1, 2, "v"))[2] == (1,)
    assert locate(hooked, HeadInput(1, 3, "q"))[2] == (3,)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Head(3, 0), "no L3H0: the model has layers 0..2"),
        (Head(-1, 0), "no L-1H0"),
        (Head(0, 4), "no L0H4: the model has heads 0..3"),
        (MLP(3), "no mlp3"),
        (Attention(3), "no attn3"),
        (Neurons(0, 90, 97), r"no mlp0\[90:97\]: a range of neurons must lie in 0..96"),
        (Neurons(0, 5, 5), "not be empty"),
    ],
)
def test_what_the_model_does_not_have_is_named(part, message):
    with pytest.raises(ValueError, match=message):
        check(Hooked(random_hooked("llama", "bridge")), [part])


def test_other_things_than_components_are_refused():
    for wrong in ("L0H1", 3, [0, 1], [(0, 1.0)], [(0, 1, 2)], [torch.zeros(1)], torch.zeros(2, 2, dtype=torch.long)):
        with pytest.raises(TypeError, match="Head"):
            grouped(wrong, accepted=(Head, MLP))
    with pytest.raises(ValueError, match="no component"):
        grouped([], accepted=(Head,))
    with pytest.raises(ValueError, match="no component"):
        grouped([()], accepted=(Head,))
    assert grouped(Head(0, 1), accepted=(Head,)) == [(Head(0, 1),)]
    with pytest.raises(ValueError, match="input must be one of q, k, v"):
        HeadInput(0, 0, "w")  # type: ignore[arg-type]
    for wrong in (1.5, "1", True, None):
        with pytest.raises(TypeError, match=r"Head\.layer must be a whole number"):
            Head(wrong, 0)  # type: ignore[arg-type]


def test_a_pair_of_whole_numbers_is_a_head_where_heads_are_accepted():
    two, together = [(Head(0, 1),), (Head(1, 2),)], [(Head(0, 1), Head(1, 2))]
    assert grouped([(0, 1), (np.int64(1), 2)], accepted=(Head, MLP)) == two
    assert grouped(np.array([[0, 1], [1, 2]]), accepted=(Head,)) == two
    assert grouped([((0, 1), Head(1, 2))], accepted=(Head,)) == together
    assert grouped((0, 1), accepted=(Head,)) == [(Head(0, 1),)]
    with pytest.raises(TypeError, match="Edge"):
        grouped([(0, 1)], accepted=(Edge,), name="edges")


def test_exchanged_arguments_are_told_the_order():
    model, tokens = random_hooked("llama", "bridge"), random_tokens()
    with pytest.raises(TypeError, match=r"the order is \(model, edges, tokens"):
        knock_out(model, tokens, [Edge(keys=0)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"the order is \(model, components, tokens"):
        ablate(model, tokens, [Head(0, 0)])  # type: ignore[arg-type]


def test_exchanged_entries_are_named_as_such():
    with pytest.raises(ValueError, match="named twice: L0H1"):
        ablate(random_hooked("llama", "bridge"), [Head(0, 1), Head(0, 1)], random_tokens(), ablation="zero")
    with pytest.raises(TypeError, match="HeadInput"):
        ablate(random_hooked("llama", "bridge"), [HeadInput(0, 1, "q")], random_tokens(), ablation="zero")  # type: ignore[list-item]

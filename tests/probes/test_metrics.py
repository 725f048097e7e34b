"""Metrics against NumPy, one sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_models import random_hooked, random_tokens

from mechhier.probes import Head, ablate, kl_divergence, log_probability, logit_difference, loss, probability

LOGITS = torch.randn(5, 7, 11, generator=torch.Generator().manual_seed(0)) * 3
ROWS = torch.tensor([3, 0, 0, 4, 1])
RIGHT, WRONG = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([6, 7, 8, 9, 10])
POSITIONS = torch.tensor([0, -1, 3, 2, 6])


def softmax(x):
    exponentials = np.exp(x - x.max())
    return exponentials / exponentials.sum()


@pytest.mark.parametrize("position", [-1, 2, POSITIONS])
def test_each_row_is_measured_with_its_own_answer_and_position(position):
    found = {
        "difference": logit_difference(RIGHT, WRONG, position=position)(LOGITS, ROWS),
        "probability": probability(RIGHT, position=position)(LOGITS, ROWS),
        "log": log_probability(RIGHT, position=position)(LOGITS, ROWS),
    }
    for i, row in enumerate(ROWS.tolist()):
        at = LOGITS[i, int(torch.as_tensor(position).expand(5)[row])].double().numpy()
        assert found["difference"][i].item() == pytest.approx(at[RIGHT[row]] - at[WRONG[row]], abs=1e-5)
        assert found["probability"][i].item() == pytest.approx(softmax(at)[RIGHT[row]], abs=1e-6)
        assert found["log"][i].item() == pytest.approx(np.log(softmax(at)[RIGHT[row]]), abs=1e-5)


@pytest.mark.parametrize("all_positions", [True, False])
def test_kl_divergence_is_from_the_reference_to_the_run(all_positions):
    reference = torch.randn(5, 7, 11, generator=torch.Generator().manual_seed(1))
    metric = kl_divergence(reference if all_positions else reference[:, 4], position=4)
    for i, (row, value) in enumerate(zip(ROWS.tolist(), metric(LOGITS, ROWS), strict=True)):
        p, q = softmax(reference[row, 4].double().numpy()), softmax(LOGITS[i, 4].double().numpy())
        assert value.item() == pytest.approx((p * np.log(p / q)).sum(), rel=1e-4)
    own = kl_divergence(LOGITS)(LOGITS, torch.arange(5))
    torch.testing.assert_close(own, torch.zeros(5), atol=1e-6, rtol=0)


def test_loss_is_the_mean_over_next_tokens():
    tokens = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(2))
    for i, (row, value) in enumerate(zip(ROWS.tolist(), loss(tokens)(LOGITS, ROWS), strict=True)):
        nats = [-np.log(softmax(LOGITS[i, t].double().numpy())[tokens[row, t + 1]]) for t in range(6)]
        assert value.item() == pytest.approx(np.mean(nats), rel=1e-5)


def test_half_precision_logits_are_measured_in_float32():
    assert logit_difference(1, 2)(LOGITS.bfloat16(), ROWS).dtype == torch.float32
    assert logit_difference(1, 2)(LOGITS.double(), ROWS).dtype == torch.float64


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda: logit_difference(torch.ones(5), 1), "answers must be a whole number"),
        (lambda: logit_difference(RIGHT[:4], 1)(LOGITS, ROWS), "answers are of 4 sequences"),
        (lambda: logit_difference(11, 1)(LOGITS, ROWS), "must lie in 0..10"),
        (lambda: probability(1, position=7)(LOGITS, ROWS), "position must lie in -7..6"),
        (lambda: probability(1, position=-8)(LOGITS, ROWS), "position must lie in -7..6"),
        (lambda: kl_divergence(LOGITS[0, 0]), "reference_logits must be"),
        (lambda: kl_divergence(LOGITS[:2])(LOGITS, ROWS), "reference_logits are of 2"),
        (lambda: loss(torch.zeros(5, 1, dtype=torch.long)), "at least 2 positions"),
        (lambda: loss(torch.zeros(5, 6, dtype=torch.long))(LOGITS, ROWS), "the loss is of 6 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(metric, message):
    with pytest.raises(ValueError, match=message):
        metric()


def test_a_plain_function_is_a_metric_and_names_the_result():
    def surprise(logits, rows):
        return logits[:, -1].logsumexp(-1)

    tokens = random_tokens(3, 6)
    result = ablate(random_hooked("llama", "bridge"), [Head(0, 0)], tokens, ablation="zero", metric=surprise)
    assert result.attrs["metric"] == "surprise"
    assert "surprise" in result.effect.long_name
    with pytest.raises(ValueError, match="one number per sequence"):
        ablate(random_hooked("llama", "bridge"), [Head(0, 0)], tokens, ablation="zero", metric=lambda x, rows: x.mean())

"""Early exits: by hand, and the divergence against torch's and scipy's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import rel_entr

from loopscope.probes.early_exits import exit_losses, exit_times, quantile_thresholds, readings


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn(5, 9, generator=generator) for _ in range(4)]


TOKENS = torch.tensor([3, 1, 4, 1, 5])


def test_losses_are_cross_entropies_of_the_next_token(logits):
    read = readings(logits, TOKENS)
    for t, at_t in enumerate(logits):
        expected = F.cross_entropy(at_t[:-1], TOKENS[1:], reduction="none")
        torch.testing.assert_close(read.loss[t], expected)


def test_divergence_is_that_of_this_state_from_the_one_before(logits):
    kl = readings(logits, TOKENS).kl
    for t in range(1, 4):
        now, before = (logits[s][:-1].double().softmax(-1) for s in (t, t - 1))
        np.testing.assert_allclose(
            kl[t - 1], rel_entr(now.numpy(), before.numpy()).sum(-1), rtol=1e-5
        )
        torch.testing.assert_close(
            kl[t - 1].sum(), F.kl_div(before.log(), now, reduction="sum").float()
        )


def test_tokens_stop_at_the_first_value_below_a_threshold():
    nan = float("nan")
    signal = torch.tensor([[nan, 0.5, 3.0], [0.2, 0.9, 2.0], [0.1, 0.1, 0.1]])
    times = exit_times(signal, torch.tensor([-1.0, 0.1, 0.5, 9.0]))
    assert times.tolist() == [[3, 3, 3], [3, 3, 3], [2, 1, 3], [2, 1, 1]]


def test_a_tokens_loss_is_that_of_the_state_where_it_stops():
    losses = torch.arange(12.0).view(4, 3)
    assert exit_losses(losses, torch.tensor([[3, 1, 2]])).tolist() == [[9.0, 4.0, 8.0]]


def test_thresholds_span_from_no_early_exit_to_the_first_chance():
    signal = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    signal[0, 3] = torch.nan
    thresholds = quantile_thresholds(signal, 7)
    assert len(thresholds) == 7 and (thresholds.diff() > 0).all()
    times = exit_times(signal, thresholds)
    assert (times[0] == 3).all() and times[-1, :3].eq(1).all()
    assert (times.double().mean(1).diff() <= 0).all()
    assert len(quantile_thresholds(torch.tensor([torch.nan]), 5)) == 0

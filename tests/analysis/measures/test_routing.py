"""Routing statistics in closed form, and α as an identity on a simulated memory buffer."""

import math

import numpy as np
import pytest
import torch

from loopscope.analysis.flags import Flag
from loopscope.analysis.measures.router_weights import (
    alpha,
    alpha_exists,
    alpha_sources,
    alpha_statistics,
    router_statistics,
)

BATCH, POS, K, SLOTS, WIDTH = 2, 5, 3, 6, 4


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def routers(seed: int) -> torch.Tensor:
    return (2 * random(BATCH, POS, K + 1, SLOTS, seed=seed)).softmax(-1)


def test_alpha_rebuilds_every_state_of_the_write_and_read_cycle() -> None:
    w_write, w_read = routers(1), routers(2)
    h_emb = random(BATCH, POS, WIDTH, seed=3)
    outputs = random(K + 1, BATCH, POS, WIDTH, seed=4)  # f_pre's, then h_m(0) … h_m(K-1)
    buffer = torch.zeros(BATCH, SLOTS, POS, WIDTH, dtype=torch.float64)
    buffer[:, 0] = h_emb
    weights = alpha(w_write, w_read)
    sources = torch.stack([h_emb, *outputs])
    for step in range(K + 1):
        for b in range(SLOTS):
            buffer[:, b] += outputs[step] * w_write[:, :, step, b, None]
        read = sum(buffer[:, b] * w_read[:, :, step, b, None] for b in range(SLOTS))
        rebuilt = torch.einsum("nps,snpd->npd", weights[:, :, step], sources)
        torch.testing.assert_close(rebuilt, read, rtol=1e-12, atol=1e-12)


def test_alpha_is_zero_exactly_for_what_does_not_exist_yet() -> None:
    weights = alpha(routers(1), routers(2))
    exists = torch.from_numpy(alpha_exists(K))
    assert (weights[..., ~exists] == 0).all()
    assert (weights[..., exists] > 0).all()
    assert alpha_exists(K).sum() == 2 + 3 + 4 + 5
    assert alpha_sources(K) == ("h_emb", "prelude", "core1", "core2", "core3")


def test_alpha_of_one_hot_routers_follows_the_slots() -> None:
    def pick(*slots: int) -> torch.Tensor:
        rows = torch.nn.functional.one_hot(torch.tensor(slots), SLOTS).double()
        return rows.expand(1, 1, -1, -1)

    weights = alpha(pick(1, 2, 0, 1), pick(0, 1, 0, 1))[0, 0]
    expected = [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 1, 0], [0, 1, 0, 0, 1]]
    assert weights.tolist() == expected


def test_alpha_does_not_depend_on_the_order_of_the_slots_but_the_first() -> None:
    w_write, w_read = routers(1), routers(2)
    order = torch.tensor([0, 3, 5, 1, 2, 4])
    other = alpha(w_write[..., order], w_read[..., order])
    torch.testing.assert_close(other, alpha(w_write, w_read))


def test_alpha_statistics_are_means_over_the_tokens_of_each_sample() -> None:
    w_write, w_read = routers(1).float(), routers(2).float()
    value, flag = alpha_statistics(w_write, w_read)
    np.testing.assert_allclose(value, alpha(w_write, w_read).mean(1).numpy())
    assert value.shape == (BATCH, K + 1, K + 2)
    assert (flag == Flag.NONE).all()


def test_entropy_is_that_of_the_uniform_and_of_the_decided_router() -> None:
    uniform = torch.full((1, 3, 5), 0.2)
    decided = torch.eye(5)[[4, 4, 1]][None]
    half = torch.tensor([[[0.5, 0.5, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0.25, 0.75, 0]]])
    mean, entropy = router_statistics(torch.cat([uniform, decided, half]))
    third = (math.log(2) - 0.25 * math.log(0.25) - 0.75 * math.log(0.75)) / 3
    np.testing.assert_allclose(entropy.value, [math.log(5), 0, third], atol=1e-7)
    np.testing.assert_allclose(mean.value[1], [0, 1 / 3, 0, 0, 2 / 3], atol=1e-12)
    np.testing.assert_allclose(mean.value[2], np.array([1.5, 0.5, 0.25, 0.75, 0]) / 3)
    assert (entropy.flag == Flag.NONE).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_router_weights_that_are_not_finite_are_flagged(bad: float) -> None:
    w = routers(1)[:, :, 0].clone()
    w[1, 2, 3] = bad
    mean, entropy = router_statistics(w)
    assert entropy.flag.tolist() == [Flag.NONE, Flag.NONFINITE]
    assert np.isnan(mean.value[1, 3])
    assert mean.flag[1, 3] == Flag.NONFINITE

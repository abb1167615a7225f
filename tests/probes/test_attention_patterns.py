"""Attention patterns: the divergence against scipy."""

import math

import numpy as np
import torch
from scipy.spatial.distance import jensenshannon

from loopscope.probes.attention_patterns import jensen_shannon


def patterns(seed):
    scores = 3 * torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1)
    return scores.masked_fill(mask, -torch.inf).softmax(-1)


def test_divergence_is_that_of_scipy():
    p, q = patterns(0), patterns(1)
    expected = jensenshannon(p.double().numpy(), q.double().numpy(), axis=-1) ** 2
    np.testing.assert_allclose(jensen_shannon(p, q).numpy(), np.nan_to_num(expected), atol=1e-6)


def test_divergence_is_symmetric_zero_of_equals_and_ln_2_of_strangers():
    p, q = patterns(0), patterns(1)
    assert torch.equal(jensen_shannon(p, q), jensen_shannon(q, p))
    assert (jensen_shannon(p, p) == 0).all()
    one, other = torch.eye(4)[:2], torch.eye(4)[2:]
    apart = jensen_shannon(one[None, None], other[None, None])
    torch.testing.assert_close(apart, torch.full_like(apart, math.log(2)))


def test_half_precision_is_measured_in_float32():
    p, q = patterns(0), patterns(1)
    assert jensen_shannon(p.bfloat16(), q.bfloat16()).dtype == torch.float32

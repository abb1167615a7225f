"""Ridge maps h(t) → h(K), against scikit-learn; lengths that are matched; folds of documents."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from loopscope.probes.readout import matched
from loopscope.probes.ridge_maps import RidgeSums, fold_of_samples


def states(seed=0, batch=3, pos=11, width=5):
    """h(t) and h(K) of tokens of very unequal lengths, one an attention sink."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(batch, pos, width, generator=generator, dtype=torch.float64) + 2.0
    lengths = torch.rand(batch, pos, 1, generator=generator, dtype=torch.float64) * 9 + 0.1
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    h_K = lengths * torch.tanh(h @ mix) + 0.5
    h_K[0, 0] *= 1e5
    return h, h_K


def fitted(*pairs, ridge=1e-3):
    sums = RidgeSums()
    for h, h_K in pairs:
        sums.add(h, h_K)
    return sums.solve(ridge)


@pytest.mark.parametrize("ridge", [1e-3, 0.7])
def test_the_map_is_weighted_ridge_regression_with_a_free_intercept(ridge):
    h, h_K = states()
    x, y = (part.flatten(0, 1).numpy() for part in (h, h_K))
    w = 1 / (y**2).sum(1)
    centred = x - np.average(x, axis=0, weights=w)
    level = np.average(centred**2, axis=0, weights=w).mean()
    oracle = Ridge(alpha=ridge * level * w.sum()).fit(x, y, sample_weight=w)
    new = states(seed=9)[0]
    expected = oracle.predict(new.flatten(0, 1).numpy())
    np.testing.assert_allclose(fitted((h, h_K), ridge=ridge)(new).flatten(0, 1), expected, 1e-8)


def test_batches_add_up_and_tokens_without_a_sound_state_are_left_out():
    h, h_K = states(batch=4)
    whole = fitted((h[:3], h_K[:3]))
    h, h_K = h.clone(), h_K.clone()
    h[3], h_K[3] = torch.nan, 0.0
    parts = fitted((h[:1], h_K[:1]), (h[1:], h_K[1:]))
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-9, atol=1e-12)
    assert fitted((h[3:], h_K[3:])) is None


def test_an_affine_change_is_undone_whatever_the_scale():
    h, _ = states()
    for scale in (1e-8, 1.0, 1e8):
        h_K = scale * (h @ torch.randn(5, 5, dtype=torch.float64) + 3.0)
        torch.testing.assert_close(fitted((h, h_K), ridge=1e-12)(h), h_K, rtol=1e-6, atol=0)


def test_a_constant_state_is_mapped_to_the_mean_of_the_last():
    h, h_K = states()
    brought = fitted((torch.full_like(h, 0.3), h_K))(h)
    w = 1 / h_K.square().sum(-1, keepdim=True)
    mean = (w * h_K).sum((0, 1)) / w.sum()
    torch.testing.assert_close(brought, mean.expand_as(brought))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18])
def test_matching_takes_the_length_and_keeps_the_direction(scale):
    h, h_K = (part.float() for part in states())
    h_K[0, 0] = 1.0
    h[1, 2] = 0.0
    brought = matched(scale * h, h_K)
    lengths = brought.double().norm(dim=-1)
    expected = h_K.double().norm(dim=-1)
    expected[1, 2] = 0.0
    torch.testing.assert_close(lengths, expected, rtol=1e-5, atol=0)
    cosines = torch.cosine_similarity(brought.double(), h.double(), dim=-1)
    sound = h.norm(dim=-1) > 0
    torch.testing.assert_close(cosines[sound], torch.ones_like(cosines[sound]))


def test_folds_keep_documents_whole_and_equal_windows_together():
    assert fold_of_samples(list("abacb"), range(5)) == [0, 1, 0, 0, 1]
    assert fold_of_samples(["a", None, "a", None], "wxyz") == [0, 1, 0, 0]
    assert fold_of_samples([None] * 4, "xyxz") == [0, 1, 0, 0]
    assert fold_of_samples(["a"] * 4, "xyxz") == [0, 1, 0, 0]  # one document makes no two folds
    assert fold_of_samples([None] * 3, "xxx") == [0, 0, 0]

"""Spectra and ranks against numpy's SVD in float64, closed forms and reference values."""

import numpy as np
import pytest
import torch

from loopscope.analysis.flags import Flag
from loopscope.analysis.measures.effective_ranks import RANK_MEASURES, ranks
from loopscope.analysis.measures.gram_matrices import (
    gram,
    singular_values,
    singular_values_of_grams,
)
from loopscope.analysis.measures.spectrum_decay import spectrum


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_sigma(sigma: list[float], pos: int, d_model: int, seed: int = 0) -> torch.Tensor:
    """A float64 matrix with these singular values."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((pos, len(sigma))))[0]
    right = np.linalg.qr(rng.standard_normal((d_model, len(sigma))))[0]
    return torch.from_numpy(left * sigma @ right.T)


def rank(sigma: list[float] | np.ndarray) -> dict[str, float]:
    return dict(zip(RANK_MEASURES, ranks(np.asarray(sigma, dtype=float)).value, strict=True))


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (70, 70)])
def test_singular_values_equal_numpys_in_float64(shape: tuple[int, int]) -> None:
    x = random(*shape) * torch.logspace(0, -4, shape[1]) + 3
    expected = np.linalg.svd(x.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(x), expected, atol=1e-8 * expected[0])
    np.testing.assert_allclose(singular_values(x)[:50], expected[:50], rtol=1e-7)


@pytest.mark.parametrize("shapes", [[(20, 30), (30, 20), (20, 20)], [(9, 30), (30, 20)]])
def test_several_gram_matrices_give_what_each_state_gives(shapes: list[tuple[int, int]]) -> None:
    for center in (False, True):
        states = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
        states[1][2, 3] = float("nan")
        products = [gram(state, center=center) for state in states]
        assert [len(product) for product in products] == [min(shape) for shape in shapes]
        together = singular_values_of_grams(products)
        for i, state in enumerate(states):
            alone = singular_values(state, center=center)
            np.testing.assert_allclose(together[i], alone, rtol=1e-12)
            assert np.isnan(alone).all() == (i == 1)


def test_the_gram_matrix_is_that_of_the_smaller_side() -> None:
    wide, tall, square = random(8, 12), random(12, 8), random(8, 8)
    torch.testing.assert_close(gram(wide), wide.double() @ wide.double().mT)
    torch.testing.assert_close(gram(tall), tall.double().mT @ tall.double())
    torch.testing.assert_close(gram(square), square.double() @ square.double().mT)


def test_large_matrices_are_solved_as_small_ones_are() -> None:
    x = random(400, 390)
    expected = np.linalg.svd(x.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(x), expected, rtol=1e-9)


def test_centring_is_an_option() -> None:
    x = random(40, 30) + 5
    a = x.double().numpy()
    expected = np.linalg.svd(a - a.mean(0), compute_uv=False)
    np.testing.assert_allclose(singular_values(x, center=True), expected, rtol=1e-7)
    assert singular_values(x)[0] > 2 * expected[0]


def test_orthogonal_maps_leave_the_spectrum_and_scale_leaves_the_ranks() -> None:
    x = random(40, 24).double()
    turn = torch.linalg.qr(random(24, 24, seed=1).double()).Q
    swap = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    sigma = singular_values(x)
    np.testing.assert_allclose(singular_values(x[swap] @ turn), sigma, rtol=1e-10)
    np.testing.assert_allclose(ranks(singular_values(-30 * x)).value, ranks(sigma).value, rtol=1e-9)


@pytest.mark.parametrize("r", [1, 3, 20])
def test_r_equal_singular_values_have_rank_r(r: int) -> None:
    for value in rank([7.0] * r).values():
        assert value == pytest.approx(r, rel=1e-12)
    sigma = singular_values(with_sigma([7.0] * r, 50, 40))
    np.testing.assert_allclose(ranks(sigma).value, r, rtol=1e-9)


def test_reference_values_of_the_ranks() -> None:
    assert rank(2.0 ** -np.arange(60))["effective"] == pytest.approx(4, rel=1e-12)
    assert rank(0.9 ** np.arange(600))["effective"] == pytest.approx(25.811748, abs=5e-7)
    three_one = rank([3, 1])
    assert three_one["effective"] == pytest.approx(1.754765, abs=5e-7)
    assert three_one["stable"] == pytest.approx(10 / 9, rel=1e-12)
    assert three_one["participation"] == pytest.approx(100 / 82, rel=1e-12)


def test_ranks_of_a_random_state_equal_those_of_numpys_svd() -> None:
    x = random(120, 64) * torch.logspace(0, -2, 64)
    s = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = s / s.sum()
    expected = [
        np.exp(-(p * np.log(p)).sum()),
        (s**2).sum() / s[0] ** 2,
        (s**2).sum() ** 2 / (s**4).sum(),
    ]
    np.testing.assert_allclose(ranks(singular_values(x)).value, expected, rtol=1e-9)


def test_a_spectrum_is_relative_and_carries_its_logarithm() -> None:
    ratio, log10, flag = spectrum(np.array([8.0, 2.0, 0.8]), count=3)
    np.testing.assert_allclose(ratio, [1, 0.25, 0.1])
    np.testing.assert_allclose(log10, np.log10([1, 0.25, 0.1]))
    assert (flag == Flag.NONE).all()


def test_a_short_spectrum_is_padded_and_flagged() -> None:
    ratio, log10, flag = spectrum(singular_values(random(30, 20)))
    assert len(ratio) == 50
    assert np.isfinite(ratio[:20]).all()
    assert np.isnan(ratio[20:]).all()
    assert np.isnan(log10[20:]).all()
    assert (flag[:20] == Flag.NONE).all()
    assert (flag[20:] == Flag.SHORT).all()


def test_singular_values_below_float32_resolution_are_zero_and_have_no_logarithm() -> None:
    words = random(12, 90)
    repeated = words[torch.arange(80) % 12]  # rank 12, as in a sample of 12 distinct tokens
    sigma = singular_values(repeated)
    assert (sigma[:12] > 0).all()
    assert (sigma[12:] == 0).all()
    ratio, log10, flag = spectrum(sigma)
    assert (ratio[12:] == 0).all()
    assert np.isnan(log10[12:]).all()
    assert (flag[:12] == Flag.NONE).all()
    assert (flag[12:] == Flag.ZERO).all()
    assert ranks(sigma).value[0] < 12


def test_a_zero_state_is_flagged_not_measured() -> None:
    sigma = singular_values(torch.zeros(9, 60))
    ratio, log10, flag = spectrum(sigma)
    assert np.isnan(ratio).all()
    assert np.isnan(log10).all()
    assert (flag[:9] == Flag.ZERO).all()
    assert (flag[9:] == Flag.SHORT).all()
    assert np.isnan(ranks(sigma).value).all()
    assert (ranks(sigma).flag == Flag.ZERO).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_flagged_not_measured(bad: float) -> None:
    x = random(60, 60)
    x[3, 4] = bad
    sigma = singular_values(x)
    assert np.isnan(spectrum(sigma).sigma_rel).all()
    assert (spectrum(sigma).flag == Flag.NONFINITE).all()
    assert (ranks(sigma).flag == Flag.NONFINITE).all()

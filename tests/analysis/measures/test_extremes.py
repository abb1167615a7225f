"""Measures of states of extreme norm, against the textbook formulas in whole numbers."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from loopscope.analysis.flags import Flag
from loopscope.analysis.measures.cka_estimators import KERNELS, cka
from loopscope.analysis.measures.effective_ranks import ranks
from loopscope.analysis.measures.filling import SampleStates
from loopscope.analysis.measures.gram_matrices import singular_values
from loopscope.analysis.measures.spectrum_decay import spectrum
from loopscope.analysis.measures.update_norm import relative_update, sample_norm
from loopscope.analysis.options import Options

SINGLE, DOUBLE = torch.float32, torch.float64
SCALES = [
    *((SINGLE, scale) for scale in (1e18, 1e30, 1e-30, 1e-38, 1e-41)),
    *((DOUBLE, scale) for scale in (1e150, 1e-150, 1e200, 1e-200, 1e300, 1e-300)),
]
GRAMS = ("none", "uncentred", "centred")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = SINGLE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def walk(d_model: int, dtype: torch.dtype, pos: int = 12) -> torch.Tensor:
    return random(2, pos, d_model, dtype=dtype).cumsum(0)


def far_token(d_model: int, norm: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
    x = random(d_model, seed=seed, dtype=dtype)
    return x / x.norm() * norm


def kernel_matrix(x: torch.Tensor, kernel: str) -> np.ndarray:
    """The linear kernel of c·x in whole numbers, exact, or the RBF kernel from them in float64."""
    ratios = [[value.as_integer_ratio() for value in row] for row in x.tolist()]
    common = max(below for row in ratios for _, below in row)  # all are powers of two
    rows = np.array([[above * (common // below) for above, below in row] for row in ratios], object)
    products = rows @ rows.T
    if kernel == "linear":
        return products
    squares = np.diag(products)[:, None] + np.diag(products) - 2 * products
    ordered = sorted(squares.ravel())
    twice_median = ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]
    far = 1000 * twice_median
    return np.array([[math.exp(-min(d2, far) / twice_median) for d2 in row] for row in squares])


def hsic_biased(k: np.ndarray, m: np.ndarray) -> Any:
    """n⁴·tr(K H L H), Gretton et al. 2005."""
    n = len(k)
    k, m = (n * n * a - n * a.sum(0) - n * a.sum(1)[:, None] + a.sum() for a in (k, m))
    return (k * m).sum()


def hsic_unbiased(k: np.ndarray, m: np.ndarray) -> Any:
    """Song et al. 2007, Eq. 5, times (n − 1)(n − 2), with zero diagonals."""
    k, m = (a - np.diag(np.diag(a)) for a in (k, m))
    n = len(k)
    traces = (n - 1) * (n - 2) * (k * m).sum()
    return traces + k.sum() * m.sum() - 2 * (n - 1) * (k.sum(0) @ m.sum(0))


def textbook(states: torch.Tensor, kernel: str) -> list[float]:
    """Biased and debiased CKA of two states."""
    k, m = (kernel_matrix(x, kernel) for x in states)
    values = []
    for hsic in (hsic_biased, hsic_unbiased):
        cross = hsic(k, m)
        square = cross**2 / (hsic(k, k) * hsic(m, m))
        values.append(math.copysign(math.sqrt(square), 1 if cross > 0 else -1))
    return values


def gram_matrices(states: torch.Tensor, kind: str) -> list[torch.Tensor] | None:
    exact = states.double()
    if kind == "centred":
        exact = exact - exact.mean(1, keepdim=True)
    return None if kind == "none" else [x @ x.mT for x in exact]


def check_against_the_textbook(
    states: torch.Tensor, kinds: tuple[str, ...] = GRAMS, tolerance: float = 1e-6
) -> None:
    for kernel in KERNELS:
        expected = textbook(states, kernel)
        for kind in kinds:
            pairs = cka(states, kernels=[kernel], grams=gram_matrices(states, kind))[kernel]
            for (value, flag), reference in zip(pairs, expected, strict=True):
                assert (flag == Flag.NONE).all(), (kernel, kind)
                np.testing.assert_allclose(value[0, 1], reference, rtol=0, atol=tolerance)
                np.testing.assert_array_equal(np.diag(value), 1)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize(("d_model", "norm"), [(8, 1e6), (20, 1e8), (8, 1e20)])
def test_a_token_of_any_norm_costs_cka_no_digits(
    norm: float, d_model: int, dtype: torch.dtype
) -> None:
    in_both, in_one = walk(d_model, dtype), walk(d_model, dtype)
    for state, seed in ((0, 7), (1, 8)):
        in_both[state, 0] = far_token(d_model, norm, seed, dtype)
    in_one[1, 3] = far_token(d_model, norm, 9, dtype)
    check_against_the_textbook(in_both)
    check_against_the_textbook(in_one)


@pytest.mark.parametrize("pos", [4, 5])
def test_a_far_token_among_the_fewest_costs_cka_no_digits(pos: int) -> None:
    states = walk(8, SINGLE, pos)
    states[:, 1] *= 1e10
    check_against_the_textbook(states, tolerance=1e-5)  # little is left of four float32 kernels


@pytest.mark.parametrize("norm", [1e3, 1e9])
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_distances_between_far_tokens_count(norm: float, dtype: torch.dtype) -> None:
    states = walk(8, dtype)
    states[:, :2] += far_token(8, norm, 5, dtype)
    check_against_the_textbook(states)


def test_far_tokens_of_several_norms_and_directions_cost_cka_no_digits() -> None:
    ladder, orthogonal, twins = walk(8, SINGLE), walk(8, SINGLE), walk(8, SINGLE)
    ladder[:, 1:4] *= torch.tensor([1e30, 1e15, 1e8])[:, None]
    orthogonal[..., 0], orthogonal[:, 0] = 0, 0
    orthogonal[:, 0, 0] = 1e6
    twins[:, :5] = twins[:, :1] * 1e8
    for states in (ladder, orthogonal, twins):
        check_against_the_textbook(states)


def test_a_large_offset_costs_cka_no_digits() -> None:
    for offset in (1e4, 1e6):
        states = walk(8, SINGLE)
        states[..., 1] += offset
        check_against_the_textbook(states)
    states[:, 0] *= 1e4
    check_against_the_textbook(states)
    states[..., 1] = 1e8  # a constant dimension does not make the others rounding
    check_against_the_textbook(states)


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_finite_states_of_any_scale_have_a_cka(scale: float, dtype: torch.dtype) -> None:
    kinds = ("none", "uncentred") if dtype == SINGLE else ("none",)
    check_against_the_textbook(walk(20, dtype) * scale, kinds)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-41])
def test_flags_of_constant_and_nonfinite_states_do_not_depend_on_scale(
    kernel: str, scale: float
) -> None:
    states = random(5, 12, 8) * scale
    states[1], states[2], states[3, 5, 2] = scale, 0, math.inf
    for kind in GRAMS[:2]:
        pairs = cka(states, kernels=[kernel], grams=gram_matrices(states, kind))[kernel]
        for value, flag in pairs:
            assert np.diag(flag).tolist() == [-1, Flag.ZERO, Flag.ZERO, Flag.NONFINITE, -1]
            assert np.isnan(value[1:4]).all()
            assert np.isfinite(value[0, 4])


@pytest.mark.parametrize("norm", [1e200, 1e300])
def test_tokens_too_far_apart_for_float64_are_flagged_not_measured(norm: float) -> None:
    states = random(2, 12, 8, dtype=DOUBLE) / norm
    states[:, 3] *= norm
    pairs = cka(states, kernels=KERNELS)
    for value, flag in (pairs["linear"].debiased, *pairs["rbf"]):
        assert np.isnan(value).all()
        assert (flag != Flag.NONE).all()


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pos", [12, 50])
def test_tokens_equally_distant_up_to_rounding_have_no_debiased_cka(
    kernel: str, dtype: torch.dtype, pos: int
) -> None:
    turn = torch.linalg.qr(random(pos, pos, dtype=DOUBLE)).Q
    simplex = (3 * turn + random(pos, seed=1)).to(dtype)
    value, flag = cka([simplex, random(pos, pos, dtype=dtype)], kernels=[kernel])[kernel].debiased
    assert np.isnan(value[0]).all()
    assert flag.tolist() == [[Flag.NONPOSITIVE_HSIC] * 2, [Flag.NONPOSITIVE_HSIC, Flag.NONE]]


@pytest.mark.parametrize(("dtype", "scale"), SCALES[:4] + SCALES[5:])
@pytest.mark.parametrize("d_model", [8, 20])
def test_singular_values_are_those_of_the_state_at_any_scale(
    scale: float, dtype: torch.dtype, d_model: int
) -> None:
    x = random(12, d_model, dtype=dtype) * scale
    power = 2.0 ** math.floor(math.log2(scale))
    expected = np.linalg.svd(x.double().numpy() / power, compute_uv=False)
    sigma = singular_values(x)
    np.testing.assert_allclose(sigma / power, expected, rtol=1e-9)
    np.testing.assert_allclose(ranks(sigma).value, ranks(expected).value, rtol=1e-9)
    np.testing.assert_allclose(spectrum(sigma, 8).sigma_rel, expected[:8] / expected[0], rtol=1e-9)


@pytest.mark.parametrize(("dtype", "scale"), SCALES[:4] + SCALES[5:])
@pytest.mark.parametrize("unit", [False, True])
def test_shared_gram_matrices_fit_at_any_scale(
    scale: float, dtype: torch.dtype, unit: bool
) -> None:
    x = random(2, 12, 20, dtype=dtype)
    options = Options(normalize_rows=unit)
    sample = SampleStates({0: x[0] * scale, 1: x[1]}, {"loop": [0, 1]}, options, spectral=True)
    states = sample.of_loop("loop")
    reference = x[0].double()
    if unit:
        reference = reference / reference.norm(dim=1, keepdim=True)
        torch.testing.assert_close(states.states[0].double(), reference, rtol=1e-5, atol=1e-6)
    expected = np.linalg.svd(reference.numpy(), compute_uv=False)
    sigma = states.sigmas[0]
    np.testing.assert_allclose(sigma / sigma[0], expected / expected[0], rtol=1e-5)
    pairs = cka(states.states, kernels=KERNELS, grams=states.grams)
    for kernel in KERNELS:
        expected_cka = textbook(torch.stack([reference.to(dtype), states.states[1]]), kernel)
        for (value, _), wanted in zip(pairs[kernel], expected_cka, strict=True):
            assert value[0, 1] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(("dtype", "scale"), SCALES[:4] + SCALES[5:])
def test_updates_and_norms_are_sound_at_any_scale(scale: float, dtype: torch.dtype) -> None:
    h, f_h = (random(2, 5, 6, seed=seed, dtype=dtype) for seed in (0, 1))
    a, b = h.double().numpy(), f_h.double().numpy()
    norms = [[np.linalg.norm(z) for z in (y - x, y, x)] for x, y in zip(a, b, strict=True)]
    value, flag = relative_update(h * scale, f_h * scale)
    np.testing.assert_allclose(value, [2 * d / (y + x) for d, y, x in norms], rtol=1e-6)
    assert (flag == Flag.NONE).all()
    np.testing.assert_allclose(sample_norm(h * scale) / scale, [x for *_, x in norms], rtol=1e-6)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_an_update_whose_difference_overflows_is_measured(dtype: torch.dtype) -> None:
    h = torch.full((2, 3, 4), torch.finfo(dtype).max, dtype=dtype)
    h[1, 0, 0] = math.inf
    value, flag = relative_update(h, -h)
    assert value[0] == pytest.approx(2, rel=1e-12)
    assert flag.tolist() == [Flag.NONE, Flag.NONFINITE]

"""CKA against the textbook formulas in float64, scikit-learn's kernel and reference values."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel

from loopscope.analysis.flags import Flag
from loopscope.analysis.measures.cka_estimators import ESTIMATORS, KERNELS, PairwiseCKA, cka
from loopscope.errors import InputError, UnknownNameError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def walk(pos: int = 48, d_model: int = 20, states: int = 4, seed: int = 0) -> torch.Tensor:
    """States that drift apart, with columns of unequal size."""
    steps = random(states, pos, d_model, seed=seed) * torch.logspace(0, -1, d_model)
    return steps.cumsum(0) + torch.arange(d_model)


def kernel_matrix(x: np.ndarray, kernel: str, bandwidth: float = 1.0) -> np.ndarray:
    x = x - x.mean(0)  # the oracle itself loses digits at large offsets
    if kernel == "linear":
        return x @ x.T
    median = np.median(euclidean_distances(x, squared=True))
    return rbf_kernel(x, gamma=1 / (2 * bandwidth**2 * median))


def hsic_biased(k: np.ndarray, m: np.ndarray) -> float:
    """tr(K H L H), Gretton et al. 2005."""
    h = np.eye(len(k)) - 1 / len(k)
    return np.trace(k @ h @ m @ h)


def hsic_unbiased(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al. 2007, Eq. 5, with zero diagonals."""
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    n, one = len(k), np.ones(len(k))
    total = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + total - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def textbook(states: torch.Tensor, kernel: str, estimator: str, bandwidth: float = 1.0):
    hsic = hsic_biased if estimator == "biased" else hsic_unbiased
    kernels = [kernel_matrix(x.double().numpy(), kernel, bandwidth) for x in states]
    all_pairs = np.array([[hsic(k, m) for m in kernels] for k in kernels])
    own = np.sqrt(np.diag(all_pairs))
    return all_pairs / np.outer(own, own)


def both(x: torch.Tensor, y: torch.Tensor, kernel: str, bandwidth: float = 1.0) -> list[float]:
    found = cka([x, y], kernels=[kernel], bandwidth=bandwidth)[kernel]
    return [getattr(found, estimator).value[0, 1] for estimator in ESTIMATORS]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("pos", [4, 31, 48])
def test_all_pairs_equal_the_textbook_in_float64(kernel: str, estimator: str, pos: int) -> None:
    states = walk(pos).double()
    found = getattr(cka(states, kernels=KERNELS)[kernel], estimator)
    with np.errstate(invalid="ignore"):
        expected = textbook(states, kernel, estimator)
    sound = found.flag == Flag.NONE
    assert sound.sum() >= 2
    np.testing.assert_allclose(found.value[sound], expected[sound], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_float32_is_within_1e_6_of_float64(kernel: str, estimator: str) -> None:
    offset = walk(200, 64)
    offset[..., 3] += 1000
    for states in (random(4, 200, 64), walk(200, 64), offset):
        single = getattr(cka(states, kernels=KERNELS)[kernel], estimator).value
        expected = textbook(states, kernel, estimator)
        np.testing.assert_allclose(single, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_token_of_huge_norm_costs_no_digits(kernel: str, estimator: str) -> None:
    sink = walk(200, 64)
    sink[:, 0] = 300 * random(4, 64, seed=5)
    single = getattr(cka(sink, kernels=KERNELS)[kernel], estimator).value
    np.testing.assert_allclose(single, textbook(sink, kernel, estimator), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    states = walk().to(dtype)
    half, single = cka(states)["rbf"], cka(states.float())["rbf"]
    np.testing.assert_array_equal(half.biased.value, single.biased.value)


def test_reference_values_of_a_noisy_copy() -> None:
    np.random.seed(1337)
    a = np.random.randn(100, 10)
    x, y = torch.from_numpy(a), torch.from_numpy(np.random.randn(100, 10) + a)
    assert both(x, y, "linear") == pytest.approx([0.55761326, 0.51345649], abs=5e-9)
    assert both(x, y, "rbf", 0.5) == pytest.approx([0.65483118, 0.419277], abs=5e-7)
    assert both(x, y, "rbf", 0.5)[0] == pytest.approx(0.65483118, abs=5e-9)
    assert both(x, y, "rbf", 1.0) == pytest.approx([0.575832, 0.501610], abs=5e-7)


def test_reference_values_of_four_points() -> None:
    a = torch.tensor([[1.0], [1], [-1], [-1]], dtype=torch.float64)
    b = torch.tensor([[1.0], [-1], [1], [-1]], dtype=torch.float64)
    ab = torch.cat([a, b], dim=1)
    assert both(a, b, "linear")[0] == pytest.approx(0, abs=1e-12)
    assert both(a, ab, "linear")[0] == pytest.approx(1 / math.sqrt(2), rel=1e-12)
    assert both(a, ab, "rbf")[0] == pytest.approx(0.6967355254, abs=5e-11)


def test_reference_values_of_independent_states() -> None:
    x, y = random(1024, 1024), random(1024, 1024, seed=1)
    assert both(x, y, "rbf") == pytest.approx([0.627, 0], abs=2e-3)
    assert both(x, y, "rbf", 0.5) == pytest.approx([0.910, 0], abs=3e-3)
    n, d1, d2 = 400, 300, 50
    x, y = random(n, d1), random(n, d2, seed=1)
    expected = math.sqrt(d1 * d2 / ((n + d1) * (n + d2)))
    assert both(x, y, "linear") == pytest.approx([expected, 0], abs=1e-2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_scale_and_shift_change_nothing(kernel: str, dtype: torch.dtype) -> None:
    x, y = walk(states=2).to(dtype)
    turn = torch.linalg.qr(random(20, 20, seed=5).double()).Q.to(dtype)
    moved = -3 * x @ turn + 10 * random(20, seed=6).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert both(x, moved, kernel) == pytest.approx([1, 1], abs=tolerance)
    assert both(moved, y, kernel) == pytest.approx(both(x, y, kernel), abs=tolerance)


def test_the_matrix_is_symmetric_with_ones_and_tokens_may_be_permuted() -> None:
    states = walk()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    found, permuted = cka(states, kernels=KERNELS), cka(states[:, order], kernels=KERNELS)
    for kernel in KERNELS:
        for estimator in ESTIMATORS:
            value = getattr(found[kernel], estimator).value
            np.testing.assert_array_equal(np.diag(value), 1)
            np.testing.assert_allclose(value, value.T, atol=1e-12)
            assert value[0, 1] != value[0, 2]
            np.testing.assert_allclose(getattr(permuted[kernel], estimator).value, value, atol=1e-6)


def test_asking_for_both_kernels_gives_what_each_gives_alone() -> None:
    states = walk()
    together = cka(states, kernels=("rbf", "linear"))
    assert list(together) == ["rbf", "linear"]
    for kernel in KERNELS:
        alone = cka(states, kernels=(kernel,))[kernel]
        np.testing.assert_array_equal(together[kernel].debiased.value, alone.debiased.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_matrices_at_hand_give_the_same(dtype: torch.dtype) -> None:
    offset = walk(40, 64)
    offset[..., 3] += 1000
    sink, twins = walk(40, 64), walk(40, 64)
    sink[:, 0] = 300 * random(4, 64, seed=5)
    twins[1] = twins[1, :1]  # constant
    twins[2] = twins[2, [0] * 35 + [1, 2, 3, 4, 5]]  # median 0
    for states in (walk(40, 64).to(dtype), offset.to(dtype), sink.to(dtype), twins.to(dtype)):
        grams = [x.double() @ x.double().mT for x in states]
        found = cka(states, kernels=KERNELS, grams=grams)
        expected = cka(states.double(), kernels=KERNELS)
        for kernel in KERNELS:
            for got, wanted in zip(found[kernel], expected[kernel], strict=True):
                tolerance = 1e-6 if dtype == torch.float32 else 1e-9
                np.testing.assert_allclose(got.value, wanted.value, atol=tolerance)
                np.testing.assert_array_equal(got.flag, wanted.flag)
    for given, copy in zip(grams, states, strict=True):
        torch.testing.assert_close(given, copy.double() @ copy.double().mT)  # left as they were


def test_states_of_different_width_can_be_compared() -> None:
    x, y = random(40, 7), random(40, 19, seed=1)
    expected = hsic_biased(
        kernel_matrix(x.double().numpy(), "rbf"), kernel_matrix(y.double().numpy(), "rbf")
    )
    own = [hsic_biased(k, k) for k in (kernel_matrix(z.double().numpy(), "rbf") for z in (x, y))]
    assert both(x, y, "rbf")[0] == pytest.approx(expected / math.sqrt(own[0] * own[1]), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distinct", [2, 3])
def test_mostly_repeated_tokens_take_the_median_of_the_others_and_are_flagged(
    dtype: torch.dtype, distinct: int
) -> None:
    words = random(distinct, 16).to(dtype) + 5
    numbers = np.array([0] * 30 + [i % distinct for i in range(10)])
    repeated = words[torch.from_numpy(numbers)]
    other = random(40, 16, seed=1).to(dtype)
    distances = euclidean_distances(words.double().numpy(), squared=True)
    squares = distances[numbers][:, numbers]
    assert np.median(squares) == 0
    k = np.exp(-squares / (2 * np.median(squares[squares > 0])))
    m = kernel_matrix(other.double().numpy(), "rbf")
    found = cka([repeated, other])["rbf"]
    for estimator, hsic in (("biased", hsic_biased), ("debiased", hsic_unbiased)):
        value, flag = getattr(found, estimator)
        expected = hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))
        assert value[0, 1] == pytest.approx(expected, abs=1e-6)
        assert flag.tolist() == [[Flag.ZERO_MEDIAN, Flag.ZERO_MEDIAN], [Flag.ZERO_MEDIAN, -1]]


def test_rounding_in_a_gram_matrix_is_not_taken_for_distance() -> None:
    states = random(2, 40, 64).double()
    states[0] = states[0, [0] * 35 + [1, 2, 3, 4, 5]]
    grams = [x @ x.mT for x in states]
    expected = cka(states, grams=grams)["rbf"].debiased
    noise = 1e-14 * random(40, 40, seed=1).double()
    rounded = cka(states, grams=[gram + noise + noise.T for gram in grams])["rbf"].debiased
    np.testing.assert_allclose(rounded.value, expected.value, atol=1e-10)
    np.testing.assert_array_equal(rounded.flag, expected.flag)
    assert rounded.flag[0, 1] == Flag.ZERO_MEDIAN


def test_tight_clusters_far_apart_keep_their_digits() -> None:
    groups = torch.arange(60) % 2
    states = 100 * random(3, 2, 16)[:, groups] + 0.01 * random(3, 60, 16, seed=1)
    states[0, :35] = states[0, :1] + 0.01 * random(35, 16, seed=2)  # median within a cluster
    for estimator in ESTIMATORS:
        found = getattr(cka(states)["rbf"], estimator).value
        np.testing.assert_allclose(found, textbook(states, "rbf", estimator), atol=1e-5)


def check_only_state_1_is(found: PairwiseCKA, flag: Flag) -> None:
    for value, flags in found:
        assert np.isnan(value[1]).all()
        assert np.isnan(value[:, 1]).all()
        assert (flags[1] == flag).all()
        assert (flags[:, 1] == flag).all()
        assert np.isfinite(value[0, 2])
        assert flags[0, 2] == Flag.NONE


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fill", [0.0, 1 / 3, 1e4 / 3])
def test_a_constant_state_is_flagged_not_measured(kernel: str, fill: float) -> None:
    states = walk(states=3)
    states[1] = fill
    check_only_state_1_is(cka(states, kernels=[kernel])[kernel], Flag.ZERO)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_state_that_is_not_finite_is_flagged_not_measured(kernel: str, bad: float) -> None:
    states = walk(states=3)
    states[1, 5, 2] = bad
    check_only_state_1_is(cka(states, kernels=[kernel])[kernel], Flag.NONFINITE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_equally_distant_tokens_have_no_debiased_cka(kernel: str, dtype: torch.dtype) -> None:
    simplex, other = torch.eye(12, dtype=dtype), random(12, 12).to(dtype)
    biased, debiased = cka([simplex, other], kernels=[kernel])[kernel]
    assert np.isfinite(biased.value).all()
    assert (biased.flag == Flag.NONE).all()
    assert np.isnan(debiased.value).tolist() == [[True, True], [True, False]]
    assert debiased.flag[0, 1] == debiased.flag[0, 0] == Flag.NONPOSITIVE_HSIC


def test_four_tokens_are_the_fewest() -> None:
    assert np.isfinite(cka(random(2, 4, 3).double())["rbf"].biased.value).all()
    with pytest.raises(InputError, match="at least 4 tokens per sample, got 3"):
        cka(random(2, 3, 5))


def test_bad_options_are_named() -> None:
    with pytest.raises(UnknownNameError, match="unknown kernel 'rfb'; did you mean rbf"):
        cka(random(2, 8, 5), kernels=["rfb"])
    for bandwidth in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="must be a positive number"):
            cka(random(2, 8, 5), bandwidth=bandwidth)


def test_autocast_does_not_round_the_kernels() -> None:
    states = list(torch.randn(3, 40, 12, generator=torch.Generator().manual_seed(4)))
    plain = cka(states, kernels=("rbf", "linear"))
    with torch.autocast("cpu", torch.bfloat16):
        cast = cka(states, kernels=("rbf", "linear"))
    for kernel, pairs in plain.items():
        for ours, theirs in zip(pairs, cast[kernel], strict=True):
            np.testing.assert_array_equal(ours.value, theirs.value)

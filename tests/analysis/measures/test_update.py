"""Relative update against its closed forms, numpy in float64, and what it must refuse."""

import math

import numpy as np
import pytest
import torch

from loopscope.analysis.flags import Flag
from loopscope.analysis.measures.update_norm import relative_update


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.0, 0.0), (2.0, 2 / 3), (-1.0, 2.0), (0.0, 2.0), (0.25, 1.2)]
)
def test_scaling_a_state_has_a_closed_form(factor: float, expected: float) -> None:
    h = random(3, 5, 7)
    value, flag = relative_update(h, factor * h)
    np.testing.assert_allclose(value, expected, atol=1e-7)
    assert (flag == Flag.NONE).all()


def test_orthogonal_states_of_equal_norm_give_sqrt_2() -> None:
    h = torch.zeros(1, 4, 6)
    h[..., 0] = 3
    f_h = torch.zeros(1, 4, 6)
    f_h[..., 5] = -3
    assert relative_update(h, f_h).value[0] == pytest.approx(math.sqrt(2), abs=1e-12)


def test_each_sample_equals_the_formula_in_float64() -> None:
    h, f_h = random(4, 9, 8), random(4, 9, 8, seed=1) * torch.tensor([1, 2, 30, 0.1])[:, None, None]
    a, b = h.double().numpy(), f_h.double().numpy()
    expected = [
        2 * np.linalg.norm(y - x) / (np.linalg.norm(y) + np.linalg.norm(x))
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(relative_update(h, f_h).value, expected, rtol=1e-6)


def test_swap_and_common_scale_and_rotation_change_nothing() -> None:
    h, f_h = random(2, 6, 5, dtype=torch.float64), random(2, 6, 5, seed=1, dtype=torch.float64)
    value = relative_update(h, f_h).value
    turn = torch.linalg.qr(random(5, 5, seed=2, dtype=torch.float64)).Q
    for other in (
        relative_update(f_h, h),
        relative_update(-7 * h, -7 * f_h),
        relative_update(h @ turn, f_h @ turn),
    ):
        np.testing.assert_allclose(other.value, value, rtol=1e-12)


def test_nothing_from_nothing_is_zero_and_sound() -> None:
    value, flag = relative_update(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    assert value.tolist() == [0, 0]
    assert (flag == Flag.NONE).all()


def test_half_precision_is_subtracted_in_float32() -> None:
    h = torch.ones(1, 8, 8, dtype=torch.bfloat16)
    f_h = torch.full((1, 8, 8), 300.0, dtype=torch.bfloat16)  # bfloat16 holds 300 but not 299
    assert relative_update(h, f_h).value[0] == pytest.approx(2 * 299 / 301, rel=1e-6)


def test_norms_are_accumulated_in_float64() -> None:
    h = torch.full((1, 2048, 512), 1e18)  # squares sum to more than float32 holds
    assert relative_update(h, 2 * h).value[0] == pytest.approx(2 / 3, rel=1e-6)


def test_different_shapes_are_flagged() -> None:
    value, flag = relative_update(random(3, 5, 7), random(3, 5, 8))
    assert np.isnan(value).all()
    assert (flag == Flag.SHAPE).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_sample_that_is_not_finite_is_flagged_and_no_other(bad: float) -> None:
    h, f_h = random(3, 5, 7), random(3, 5, 7, seed=1)
    f_h[1, 2, 3] = bad
    value, flag = relative_update(h, f_h)
    assert flag.tolist() == [Flag.NONE, Flag.NONFINITE, Flag.NONE]
    assert np.isnan(value).tolist() == [False, True, False]

"""Paths: closed forms of linear maps, rotations and constant steps, seen as states of a loop."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial import distance

from loopscope.probes.paths import directions, limits, path_kinds, token_paths


def iterate(A, b, start, T):
    """h(t+1) = A h(t) + b from start, as states (1, pos, d)."""
    h = [start]
    for _ in range(T):
        h.append(h[-1] @ A.T + b)
    return [x.unsqueeze(0) for x in h]


def rotation(angle, d=2):
    A = torch.eye(d, dtype=torch.float64)
    c, s = math.cos(angle), math.sin(angle)
    A[:2, :2] = torch.tensor([[c, -s], [s, c]])
    return A


@pytest.fixture
def start():
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_steps_angles_and_accelerations_are_those_of_scipy(start):
    generator = torch.Generator().manual_seed(0)
    h = [start[None] * (t + 1) + torch.randn(1, 5, 4, generator=generator) for t in range(5)]
    measured = token_paths(h)
    x = np.stack([state[0].numpy() for state in h])
    moves = np.diff(x, axis=0)
    for i in range(5):
        for t in range(4):
            length = np.linalg.norm(x[t, i])
            assert measured.size[0, i, t].item() == pytest.approx(
                distance.euclidean(x[t + 1, i], x[t, i]) / length
            )
            if t:
                assert measured.cosine[0, i, t].item() == pytest.approx(
                    1 - distance.cosine(moves[t, i], moves[t - 1, i])
                )
                assert measured.acceleration[0, i, t].item() == pytest.approx(
                    distance.euclidean(moves[t, i], moves[t - 1, i]) / length
                )
            assert measured.to_last[0, i, t].item() == pytest.approx(
                distance.euclidean(x[t, i], x[-1, i]) / np.linalg.norm(x[-1, i])
            )
    whole = np.linalg.norm(moves, axis=(1, 2))
    np.testing.assert_allclose(measured.rate[0], whole[1:] / whole[:-1])
    assert measured.cosine[..., 0].isnan().all() and measured.acceleration[..., 0].isnan().all()


@pytest.mark.parametrize("rate", [0.5, -0.7])
def test_a_contraction_by_one_factor_gives_its_limit_exactly(start, rate):
    b = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    h = iterate(rate * torch.eye(4, dtype=torch.float64), b, start, 3)
    limit, exists = limits(h)
    torch.testing.assert_close(limit, (b / (1 - rate)).expand(1, 5, 4))
    assert exists.all()
    assert (token_paths(h).to_limit[..., -1] < token_paths(h).to_limit[..., 0]).all()


def test_a_contraction_of_several_rates_gives_a_nearer_limit_than_its_last_state(start):
    A = torch.diag(torch.tensor([0.8, 0.4, -0.3, 0.1], dtype=torch.float64))
    b = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    true = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - A, b)
    h = iterate(A, b, start, 14)
    limit, _ = limits(h)
    assert (limit - true).norm() < 0.02 * (h[-1] - true).norm()
    assert (limit - true).norm() < 1e-3 * true.norm()


def test_steps_that_do_not_shrink_have_no_limit(start):
    h = [start[None] + t for t in range(5)]
    assert not limits(h)[1].any()
    assert token_paths(h).to_limit.isnan().all()


def test_a_path_that_has_stopped_is_at_its_limit(start):
    h = [start[None], start[None] * 2, start[None] * 3, start[None] * 3]
    limit, exists = limits(h)
    assert exists.all() and torch.equal(limit, h[-1])


@pytest.mark.parametrize("T", [2, 3, 6, 12])
def test_a_linear_contraction_settles(start, T):
    A = torch.diag(torch.tensor([0.8, 0.5, -0.6, 0.3], dtype=torch.float64))
    assert path_kinds(iterate(A, torch.ones(4, dtype=torch.float64), start, T)).settles.all()


def test_a_shrinking_spiral_settles(start):
    h = iterate(0.8 * rotation(1.0), torch.ones(2, dtype=torch.float64), start[:, :2], 6)
    assert path_kinds(h).settles.all()


@pytest.mark.parametrize("angle, T", [(90, 3), (60, 3), (45, 6), (120, 4), (30, 8), (180, 2)])
def test_a_rotation_orbits(start, angle, T):
    A = rotation(math.radians(angle))
    h = iterate(A, torch.tensor([0.3, -1.0], dtype=torch.float64), start[:, :2], T)
    assert path_kinds(h).orbits.all()
    cosines = token_paths(h).cosine[..., 1:]
    torch.testing.assert_close(cosines, torch.full_like(cosines, math.cos(math.radians(angle))))


@pytest.mark.parametrize("T", [2, 3, 6])
def test_a_constant_step_drifts(start, T):
    step = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    assert path_kinds([start[None] + t * step for t in range(T + 1)]).drifts.all()


def test_kinds_exclude_each_other_and_leave_out_what_is_not_finite():
    generator = torch.Generator().manual_seed(1)
    h = [torch.randn(2, 300, 3, generator=generator) for _ in range(5)]
    h[2][0, 7, 1] = torch.nan
    shares = torch.stack(list(path_kinds(h))).sum(0)
    assert shares[0, 7] == 0
    shares[0, 7] = 1
    assert (shares == 1).all()


def test_directions_do_not_see_growth(start):
    factors = torch.tensor([1.0, 3.0, 2.0, 7.0], dtype=torch.float64)
    h = [start[None] * factor for factor in factors]
    assert token_paths(h).size.min() > 0.3
    turned = directions(h)
    assert token_paths(turned).size.max() < 1e-12
    torch.testing.assert_close(turned[2].norm(dim=-1), torch.ones(1, 5, dtype=torch.float64))


def test_zero_states_are_no_error_and_have_no_relative_step():
    h = [torch.zeros(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 2, 3)]
    measured = token_paths(h)
    assert measured.size[..., 0].isnan().all() and (measured.size[..., 1] == 0).all()
    assert measured.cosine.isnan().all()
    assert (directions(h)[0] == 0).all()


def test_measures_do_not_change_with_scale(start):
    h = iterate(rotation(0.4, 4) * 0.9, torch.ones(4, dtype=torch.float64), start, 5)
    for ours, scaled in zip(token_paths(h), token_paths([1000 * x for x in h]), strict=True):
        torch.testing.assert_close(ours, scaled, equal_nan=True)

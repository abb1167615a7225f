"""LEACE: its theorem, that nothing more is changed, and scikit-learn's probes after it."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from loopscope.errors import InputError
from loopscope.probes import fit_eraser


def labelled_states(n=600, width=6, classes=3, seed=0):
    """States of unequal scales with a class along two directions, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator) ** 2  # 0, 1, 4: no range
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    h = torch.randn(n, width, generator=generator, dtype=torch.float64) @ mix * 3 + 7
    h[:, 0] += 4 * (labels == 1)
    h[:, 2] -= 5 * (labels == 4)
    return h, labels


def one_hot(labels):
    return torch.stack([labels == c for c in labels.unique()], 1).double()


def cross_covariance(h, z):
    return (h - h.mean(0)).mT @ (z - z.mean(0)) / len(h)


def test_after_erasure_states_and_labels_do_not_covary():
    h, labels = labelled_states()
    eraser = fit_eraser(h, labels)
    assert eraser.rank == 2
    assert cross_covariance(h, one_hot(labels)).abs().max() > 0.1
    assert cross_covariance(eraser(h), one_hot(labels)).abs().max() < 1e-12


def test_logistic_regression_falls_to_the_majority_rate():
    h, labels = labelled_states()
    majority = labels.bincount().max().item() / len(labels)
    erased = fit_eraser(h, labels)(h)

    def accuracy(states):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        return model.fit(states.numpy(), labels.numpy()).score(states.numpy(), labels.numpy())

    assert accuracy(h) > majority + 0.3
    assert accuracy(erased) == majority


def test_it_is_the_formula_of_the_paper():
    h, labels = labelled_states(seed=3)
    z = one_hot(labels)
    covariance = (h - h.mean(0)).mT @ (h - h.mean(0)) / len(h)
    W = np.linalg.pinv(sqrtm(covariance.numpy()).real)
    columns = W @ cross_covariance(h, z).numpy()
    P = columns @ np.linalg.pinv(columns, rcond=1e-9)
    expected = h.numpy() - (h - h.mean(0)).numpy() @ (np.linalg.pinv(W) @ P @ W).T
    np.testing.assert_allclose(fit_eraser(h, labels)(h), expected, atol=1e-9)


def test_no_other_projection_that_erases_changes_states_less():
    h, labels = labelled_states(seed=5)
    eraser = fit_eraser(h, labels)
    change = (eraser(h) - h).square().sum(1).mean()
    cross = torch.linalg.svd(cross_covariance(h, one_hot(labels)))[0][:, :2]
    orthogonal = h - (h - h.mean(0)) @ cross @ cross.mT
    assert cross_covariance(orthogonal, one_hot(labels)).abs().max() < 1e-12
    assert change < (orthogonal - h).square().sum(1).mean()


def test_numbers_and_one_hot_columns_are_labels_too():
    h, labels = labelled_states()
    torch.testing.assert_close(fit_eraser(h, one_hot(labels))(h), fit_eraser(h, labels)(h))
    depth = h[:, 1] * 0.5 + h[:, 3] ** 2
    eraser = fit_eraser(h, depth)
    assert eraser.rank == 1
    assert cross_covariance(eraser(h), depth[:, None]).abs().max() < 1e-11


def test_where_nothing_is_to_erase_no_bit_changes():
    h, labels = labelled_states()
    for without in (torch.zeros_like(labels), torch.full((len(h), 2), 3.5)):
        eraser = fit_eraser(h, without)
        assert eraser.rank == 0 and torch.equal(eraser(h), h)
    twice = torch.cat([h, h])  # each state once with either label
    assert fit_eraser(twice, torch.arange(2).repeat_interleave(len(h))).rank == 0
    assert fit_eraser(torch.ones(9, 4), torch.arange(9)).rank == 0


def test_a_second_erasure_changes_nothing_more():
    h, labels = labelled_states()
    eraser = fit_eraser(h, labels)
    torch.testing.assert_close(eraser(eraser(h)), eraser(h))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_shape_of_the_states_stay(dtype):
    h, labels = labelled_states(n=60)
    eraser = fit_eraser(h.to(dtype), labels)
    states = h.to(dtype).reshape(3, 4, 5, 6)
    erased = eraser(states)
    assert erased.dtype == dtype and erased.shape == states.shape
    torch.testing.assert_close(erased.reshape(60, 6), eraser(h.to(dtype)))


def test_states_that_are_not_finite_are_left_out_and_stay():
    h, labels = labelled_states()
    broken = torch.cat([h, torch.full((1, 6), torch.nan, dtype=h.dtype)])
    eraser = fit_eraser(broken, torch.cat([labels, torch.tensor([1])]))
    torch.testing.assert_close(eraser.mean, h.mean(0))
    assert eraser(broken)[-1].isnan().all()
    with pytest.raises(InputError, match="finite"):
        fit_eraser(broken[-1:], torch.zeros(1))


def test_more_widths_than_tokens_is_no_obstacle():
    h, labels = labelled_states(n=5, width=6)
    erased = fit_eraser(h, labels)(h)
    assert cross_covariance(erased, one_hot(labels)).abs().max() < 1e-10


def test_labels_of_another_length_are_refused():
    h, labels = labelled_states(n=10)
    with pytest.raises(InputError, match=r"labels of 10 states must have .* given \(9,\)"):
        fit_eraser(h, labels[1:])

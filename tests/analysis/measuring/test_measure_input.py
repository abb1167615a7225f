"""measure: what it refuses, before anything is run."""

from typing import Any

import numpy as np
import pytest
import torch

from loopscope.analysis.measuring.streaming import measure
from loopscope.errors import InputError, UnknownNameError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(0, 8, dtype=torch.int64), "zero samples; give at least one"),
        (torch.zeros(8, dtype=torch.int64), r"two axes .*got shape \(8,\)"),
        (torch.zeros(1, 8), "integer token ids, got torch.float32"),
        (np.zeros((1, 8)), "got an array of float64"),
        ("text", "must be integer token ids .* got <class 'str'>"),
        (torch.zeros(2, 3, dtype=torch.int64), "samples have 3 tokens; at least 4"),
        (torch.tensor([[1, 2, 3, 4], [1, 2, 61, 4]]), r"61 \(sample 1, position 2\).*0 … 60"),
        (torch.tensor([[1, 2, -3, 4]]), "token id -3"),
    ],
)
def test_samples_that_cannot_be_measured_are_named(mesh, given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(mesh, given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": []}, "no measures asked for; choose from update"),
        ({"kernels": ()}, "no kernels asked for"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"drop_first": -1}, "drop_first is -1"),
        ({"drop_first": 9}, "samples have 12 tokens, 9 of which are dropped; at least 4"),
        ({"bandwidth": 0.0}, "bandwidth is 0.0; it must be a positive number"),
    ],
)
def test_options_that_make_no_sense_are_named(mesh, samples, options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(mesh, samples, **options)


def test_unknown_measures_and_kernels_get_near_matches(mesh, samples) -> None:
    with pytest.raises(UnknownNameError, match="unknown measure 'spectra'; did you mean spectrum"):
        measure(mesh, samples, ["spectra"])
    with pytest.raises(UnknownNameError, match="unknown kernel 'linaer'; did you mean linear"):
        measure(mesh, samples, kernels=["linaer"])


def test_the_model_is_not_run_before_all_input_is_checked(mesh, samples, monkeypatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(mesh, "capture", never)
    with pytest.raises(InputError):
        measure(mesh, samples, bandwidth=-1.0)

"""A model and samples that tests of measuring share."""

from typing import Any

import pytest
import torch


@pytest.fixture
def samples() -> torch.Tensor:
    return torch.randint(61, (5, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def mesh(make_model) -> Any:
    return make_model("mesh")

"""Shared fixtures: small models made on the spot."""

import os
import shutil
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: cores may be shared
os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses the network
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules_")  # remote code goes there

import pytest
import torch

from loopscope.models.native.configuration import LoopConfig
from loopscope.models.native.loop_model import LoopModel

VARIANTS = [
    "base",
    "residual",
    "anchor",
    "anchor_emb",
    "residual+anchor",
    "residual+anchor+anchor_emb",
    "static",
    "dynamic",
    "mesh",
]


def make_model(
    variant: str = "mesh", layout: str = "1+2R3+1", *, seed: int = 0, noise: float = 0.05, **changes
) -> LoopModel:
    """A small model whose every parameter (biases, norms, routers too) is away from its default."""
    settings = {"d_model": 32, "n_heads": 4, "d_vocab": 61, "n_ctx": 64, **changes}
    model = LoopModel(LoopConfig(variant=variant, layout=layout, **settings), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(name="make_model")
def _make_model():
    return make_model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session", autouse=True)
def _remote_code_is_removed():
    yield
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)

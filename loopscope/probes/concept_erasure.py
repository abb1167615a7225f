"""Concept erasure: the least change of a state after which no linear probe finds a label (LEACE).

A probe finds what is there, not what is used. Whether a model uses what a probe finds is told by
taking it away and watching the loss.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.errors import InputError

UNCORRELATED = 1e-8
"""Correlations up to this are rounding: what they point along is not erased."""


@dataclass(frozen=True)
class Eraser:
    """The affine map h ↦ h − L R (h − μ), which takes away some directions.

    Attributes:
        mean: μ, the mean of the states that it was fitted on, (d_model,).
        left: L = W⁺U, (d_model, rank): along what it takes away.
        right: R = UᵀW, (rank, d_model): what it reads there.
    """

    mean: Float[Tensor, " d_model"]
    left: Float[Tensor, "d_model rank"]
    right: Float[Tensor, "rank d_model"]

    @property
    def rank(self) -> int:
        """Number of directions that are taken away; 0 for the identity."""
        return self.left.shape[1]

    def __call__(self, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Erase the concept from states.

        Args:
            h: States, (…, d_model), any float dtype, on any device.

        Returns:
            The states without it, in the dtype and on the device of `h`; computed in float64.
        """
        if not self.rank:
            return h
        device = torch.device("cpu") if h.device.type == "mps" else h.device  # no float64 there
        mean, left, right = (part.to(device) for part in (self.mean, self.left, self.right))
        states = h.to(device).to(torch.float64)
        erased = states - ((states - mean) @ right.mT) @ left.mT
        return erased.to(h.dtype).to(h.device)


def fit_eraser(states: Float[Tensor, "n d_model"], labels: Any) -> Eraser:
    """Fit the affine map that leaves no linear trace of labels and changes states least.

    r(h) = h − W⁺ P W (h − μ) with W = (Σ_hh^½)⁺ and P the orthogonal projection onto the columns
    of W Σ_hz (LEACE, Belrose et al. 2306.03819, Theorem 4.3): of all affine maps after which
    Cov(r(h), z) = 0, so that no linear classifier beats the best constant, the one with the least
    mean squared change, in every norm.

    Args:
        states: States of tokens, (n, d_model), any float dtype; those that are not finite are left
            out.
        labels: An integer class each, (n,), or numbers: (n,) or (n, k), such as one-hot columns.

    Returns:
        The eraser; the identity where states and labels are uncorrelated on these tokens. With
        classes its rank is at most their number less one.

    Raises:
        InputError: for labels of another length, or where no token is sound.
    """
    z = torch.as_tensor(labels).to(states.device)
    if z.ndim not in (1, 2) or len(z) != len(states):
        raise InputError(
            f"labels of {len(states)} states must have the shape ({len(states)},) or "
            f"({len(states)}, k), given {tuple(z.shape)}."
        )
    if not z.is_floating_point() and z.ndim == 1:
        z = torch.nn.functional.one_hot(torch.unique(z, return_inverse=True)[1])
    device = torch.device("cpu") if states.device.type == "mps" else states.device
    h, z = states.to(device).to(torch.float64), z.to(device).to(torch.float64)
    z = z.reshape(len(z), -1)
    sound = torch.isfinite(h).all(1) & torch.isfinite(z).all(1)
    if not sound.any():
        raise InputError("an eraser needs states and labels that are finite; none of these are.")
    h, z = h[sound], z[sound]
    mean = h.mean(0)
    h, z = h - mean, z - z.mean(0)
    spread = z.square().mean(0).sqrt()
    z = z / torch.where(spread > 0, spread, 1)  # leaves the columns' span as it is
    values, vectors = torch.linalg.eigh(h.mT @ h / len(h))
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    values, vectors = values[kept].sqrt(), vectors[:, kept]
    u, s, _ = torch.linalg.svd((vectors / values).mT @ (h.mT @ z / len(h)), full_matrices=False)
    u = u[:, s > UNCORRELATED]
    return Eraser(mean, vectors @ (values[:, None] * u), (u.mT / values) @ vectors.mT)


__all__ = ["UNCORRELATED", "Eraser", "fit_eraser"]

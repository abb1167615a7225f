"""Gram matrices of states, and singular values from them."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from loopscope.analysis.flags import Flag

# Singular values below 2⁻²⁴·σ_0, the resolution of float32 states, count as zero; the rounding of
# a float64 Gram matrix lies below that (about 2e-8).
_RESOLUTION = 2.0**-24
_SMALL = 384
# Float64 states whose largest |x| lies outside 2**±_RANGE are scaled before they are squared.
_RANGE = 200


def to_unit_scale(
    x: Float64[Tensor, "*shape"],
) -> tuple[Float64[Tensor, "*shape"], int]:
    """Scale by the power of two that brings the largest absolute value into [0.5, 1).

    Args:
        x: Any float64 tensor.

    Returns:
        x·2⁻ᵉ, without rounding but for values below 2⁻¹⁰²² of the largest, and e. Zeros, and what
        is not finite, come back as they are, with e = 0.
    """
    exponent = math.frexp(float(x.abs().max()))[1]  # 0 for 0, infinity and NaN
    half = exponent // 2  # 2⁻ᵉ itself may not be representable
    return (x * 2.0**-half).mul_(2.0 ** (half - exponent)), exponent


def within_range(state: Float[Tensor, "pos d_model"]) -> tuple[Float[Tensor, "pos d_model"], int]:
    """Scale a state whose squares do not fit into float64; every other one is given back as it is.

    Args:
        state: One sample's state, (pos, d_model), any float dtype.

    Returns:
        The state times 2⁻ᵉ, and e; e is 0 where the squares fit, as those of all but float64 do.
    """
    if state.dtype == torch.float64:
        scaled, exponent = to_unit_scale(state)
        if abs(exponent) > _RANGE:
            return scaled, exponent
    return state, 0


def gram(
    state: Float[Tensor, "pos d_model"], *, center: bool = False
) -> Float64[Tensor, "side side"]:
    """Give the smaller of X Xᵀ (tokens) and Xᵀ X (width) in float64; X Xᵀ where they are alike.

    Args:
        state: One sample's state, (pos, d_model), any float dtype.
        center: Subtract the mean over the tokens first.

    Returns:
        A symmetric matrix of side min(pos, d_model). It is not finite, or 0, where the squares of
        a float64 state do not fit into float64 (`within_range` scales such a state).
    """
    x = state.to(torch.float64)
    if center:
        x = x - x.mean(0)
    x = x if x.shape[0] <= x.shape[1] else x.mT
    if x.is_cuda:
        return x @ x.mT
    a = x.numpy()  # numpy multiplies a matrix with its own transpose at half the cost (syrk)
    return torch.from_numpy(a @ a.T)


def singular_values(
    state: Float[Tensor, "pos d_model"], *, center: bool = False
) -> Float64[np.ndarray, " rank"]:
    """All singular values of one state matrix, in descending order.

    σ = sqrt(max(λ, 0)) with λ the eigenvalues of the smaller of X Xᵀ and Xᵀ X in float64
    (a float32 Gram matrix loses the small ones). Values below 2⁻²⁴·σ_0 are returned as 0.

    Args:
        state: One sample's state, (pos, d_model), any float dtype.
        center: Subtract the mean over the tokens first (our default is the uncentred state; the
            paper does not say).

    Returns:
        min(pos, d_model) values in float64; all NaN where the state is not finite, infinite where
        a singular value is beyond float64.
    """
    state, exponent = within_range(state)
    sigma = singular_values_of_grams([gram(state, center=center)])[0]
    with np.errstate(over="ignore"):
        return np.ldexp(sigma, exponent)


def singular_values_of_grams(
    grams: Sequence[Float64[Tensor, "_ _"]],
) -> list[Float64[np.ndarray, " _"]]:
    """Give the `singular_values` of several states from their Gram matrices.

    Args:
        grams: What `gram` returned for each state.

    Returns:
        The singular values of each, in descending order, float64.
    """
    finite = [bool(torch.isfinite(product.diagonal().sum())) for product in grams]
    usable = [p if ok else torch.zeros_like(p) for p, ok in zip(grams, finite, strict=True)]
    sigmas = []
    for eigenvalues, ok in zip(_eigenvalues(usable), finite, strict=True):
        sigma = np.sqrt(np.maximum(eigenvalues[::-1], 0.0))
        sigma[sigma < _RESOLUTION * sigma[0]] = 0.0
        sigmas.append(sigma if ok else np.full_like(sigma, np.nan))
    return sigmas


def _eigenvalues(grams: Sequence[Tensor]) -> Sequence[np.ndarray]:
    """Eigenvalues of each symmetric matrix, in ascending order."""
    same = len({product.shape for product in grams}) == 1
    if grams[0].is_cuda:
        stacks = [torch.stack(list(grams))] if same else [product[None] for product in grams]
        return [row for stack in stacks for row in torch.linalg.eigvalsh(stack).cpu().numpy()]
    if same and len(grams[0]) <= _SMALL:
        # In one call: numpy computes single small matrices one at a time, whatever the threads.
        return list(np.linalg.eigvalsh(torch.stack(list(grams)).numpy()))
    # Transposed, a symmetric matrix lies as LAPACK wants it.
    return [np.linalg.eigvalsh(product.numpy().T) for product in grams]


def degenerate(sigma: np.ndarray) -> Flag:
    """Tell whether singular values are those of a state that has no spectrum.

    Args:
        sigma: Singular values in descending order.

    Returns:
        `NONFINITE`, `ZERO`, or `NONE` where all is well.
    """
    if not np.isfinite(sigma).all():
        return Flag.NONFINITE
    return Flag.ZERO if sigma[0] == 0 else Flag.NONE

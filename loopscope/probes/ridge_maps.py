"""Ridge maps h(t) → h(K): what a linear translator makes of a state before the coda reads it.

The coda expects h(K). A state that holds the same in another place, length or basis is read badly
as it is; an affine map fitted on other text brings it to where h(K) would be. What it cannot
bring there is what the iterations after t compute.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-3
"""Penalty on the map, in units of the mean variance of a direction of h(t)."""


@dataclass(frozen=True)
class RidgeMap:
    """An affine map h ↦ (h − mean_h) W + mean_K.

    Attributes:
        mean_h: Weighted mean of the states that it was fitted on, (d_in,).
        mean_K: That of h(K), (d_out,).
        weight: W, (d_in, d_out).
    """

    mean_h: Float[Tensor, " d_in"]
    mean_K: Float[Tensor, " d_out"]
    weight: Float[Tensor, "d_in d_out"]

    def __call__(self, h: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_out"]:
        """Bring states to where h(K) would be.

        Args:
            h: h(t), (batch, pos, d_model), any float dtype.

        Returns:
            The predicted h(K), in the dtype and on the device of `h`.
        """
        dtype = torch.promote_types(h.dtype, torch.float32)
        mean_h, mean_K, weight = (
            part.to(dtype).to(h.device) for part in (self.mean_h, self.mean_K, self.weight)
        )
        return ((h.to(dtype) - mean_h) @ weight + mean_K).to(h.dtype)

    def kept(self) -> "RidgeMap":
        """The map in float32, on the CPU: those of wide models and many states are large."""
        parts = (self.mean_h, self.mean_K, self.weight)
        return RidgeMap(*(part.cpu().to(torch.float32) for part in parts))


class RidgeSums:
    """What a ridge map is solved from, streamed: sums in float64, of fixed size.

    Token i weighs 1/‖h(K)_i‖², so that relative errors are what is least: the coda's norm divides
    by that length, and a few tokens of huge norm (attention sinks) do not decide the map.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] | None = None

    def add(
        self, h: Float[Tensor, "batch pos d_in"], h_K: Float[Tensor, "batch pos d_out"]
    ) -> None:
        """Take in the states of a batch; tokens that are not finite or have h(K) = 0 are left out.

        Args:
            h: h(t), (batch, pos, d_model).
            h_K: h(K) of the same tokens.
        """
        home = h_K.device if h_K.device.type != "mps" else torch.device("cpu")  # no float64 there
        x, y = (part.flatten(0, 1).to(home).to(torch.float64) for part in (h, h_K))
        square = y.square().sum(1)
        sound = torch.isfinite(x.sum(1)) & torch.isfinite(square) & (square > 0)
        x, y, w = x[sound], y[sound], 1 / square[sound, None]
        wx = w * x
        parts = [w.sum(), wx.sum(0), (w * y).sum(0), wx.mT @ x, wx.mT @ y]
        if self._sums is None:
            self._sums = parts
        else:
            for total, part in zip(self._sums, parts, strict=True):
                total += part

    def solve(self, ridge: float = RIDGE) -> RidgeMap | None:
        """Minimise Σ_i ‖W h_i + b − h(K)_i‖²/‖h(K)_i‖² + λ‖W‖², in closed form.

        Args:
            ridge: λ over the mean weighted variance of a direction of h(t).

        Returns:
            The map; where h(t) is constant it gives the mean of h(K). None where no token was
            sound.
        """
        if self._sums is None or not float(self._sums[0]) > 0:
            return None
        total, sum_h, sum_K, products, cross = self._sums
        mean_h, mean_K = sum_h / total, sum_K / total
        covariance = products / total - torch.outer(mean_h, mean_h)
        cross = cross / total - torch.outer(mean_h, mean_K)
        level = float(covariance.diagonal().clamp(min=0).mean())
        size = float(products.diagonal().mean() / total)
        if level <= 1e-14 * size:  # constant up to rounding
            return RidgeMap(mean_h, mean_K, torch.zeros_like(cross))
        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        return RidgeMap(
            mean_h, mean_K, torch.linalg.solve(covariance + ridge * level * identity, cross)
        )


def fold_of_samples(documents: Sequence[str | None], rows: Sequence[object]) -> list[int]:
    """Share samples between two folds, so that what is fitted on one is read on the other.

    Args:
        documents: The document of each sample, None where unknown. All samples of one document
            are in one fold.
        rows: Something of each sample that is equal for equal ones; takes the place of the document
            where there are none, or only one.

    Returns:
        0 or 1 for each sample; all 0 where there are no two groups.
    """
    groups: list[object] = list(rows)
    if len(set(documents)) > 1:
        pairs = zip(documents, rows, strict=True)
        groups = [row if document is None else document for document, row in pairs]
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    return [number[group] % 2 for group in groups]


__all__ = ["RIDGE", "RidgeMap", "RidgeSums", "fold_of_samples"]

"""Relative update: how much a block changes the state it is given (MeSH Figures 1a and 3)."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from loopscope.analysis.flags import Flag, Flagged, flagged
from loopscope.analysis.measures.filling import Batch, LoopRows, Setup
from loopscope.analysis.measures.gram_matrices import to_unit_scale
from loopscope.analysis.tables import Rows
from loopscope.models import Trajectory
from loopscope.names import block_name

# Norms outside 2**±_RANGE may be those of squares that do not fit into float64.
_RANGE = 400


def relative_update(
    h: Float[Tensor, "batch pos d_model"], f_h: Float[Tensor, "batch pos_out d_out"]
) -> Flagged:
    """Measure the relative update of a block, one value per sample.

    `2·||f(h) − h||_F / (||f(h)||_F + ||h||_F)` (MeSH Section 2, Figure 3), with 0/0 = 0: 0 where
    the block copies its input, 2/3 where it doubles it, 2 (the largest value) where it negates it.

    Args:
        h: The block's input, (batch, pos, d_model), any float dtype.
        f_h: The block's raw output, before anything is added or mixed in.

    Returns:
        Values and flags, (batch,) each: NaN with `SHAPE` where the two shapes differ, NaN with
        `NONFINITE` where the activations are not finite.
    """
    if h.shape != f_h.shape:
        nothing = np.full(h.shape[0], np.nan)
        return Flagged(nothing, np.full(h.shape[0], int(Flag.SHAPE), dtype=np.int8))
    exact = torch.float64 in (h.dtype, f_h.dtype)
    # a block of a model spread over devices may end on another one than it began on
    before, after = (t.to(h.device, torch.float64 if exact else torch.float32) for t in (h, f_h))
    moved = sample_norm(after - before)
    scale = sample_norm(after) + sample_norm(before)
    for s in _beyond(moved, scale):  # of scale 1, which the result does not depend on
        pair = torch.stack([before[s : s + 1], after[s : s + 1]]).to(torch.float64)
        x, y = to_unit_scale(pair)[0]
        moved[s] = sample_norm(y - x)[0]
        scale[s] = (sample_norm(y) + sample_norm(x))[0]
    value = torch.where(scale == 0, torch.zeros_like(scale), 2 * moved / scale)
    return flagged(value.cpu().numpy())


def sample_norm(x: Float[Tensor, "batch pos d_model"]) -> Float64[Tensor, " batch"]:
    """Frobenius norm of every sample, accumulated in float64.

    Args:
        x: A state, (batch, pos, d_model), any float dtype.

    Returns:
        One norm per sample, (batch,).
    """
    norm = torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float64)
    if x.dtype == torch.float64:  # the squares of all others fit
        for s in _beyond(norm, norm):
            unit, exponent = to_unit_scale(x[s])
            # in two steps: 2ᵉ itself may not be representable
            norm[s] = torch.linalg.vector_norm(unit) * 2.0 ** (exponent // 2)
            norm[s] *= 2.0 ** (exponent - exponent // 2)
    return norm


def _beyond(moved: Tensor, scale: Tensor) -> list[int]:
    """Samples whose norms are not sound, or so large or small that their squares do not fit."""
    sound = torch.isfinite(moved) & (scale < 2.0**_RANGE) & (scale > 2.0**-_RANGE)
    return torch.nonzero(~sound).flatten().tolist()


class UpdateRows(LoopRows):
    """The table `update`: the relative update of prelude, every core iteration and coda."""

    table = "update"

    def keys(self, loop: Trajectory, setup: Setup) -> list[tuple[Any, ...]]:
        step = {"prelude": -1, "coda": loop.K} | {block_name(t): t for t in range(loop.K)}
        return [(name, step[name]) for name in loop.blocks]

    def fill(self, rows: Rows, batch: Batch, loop: Trajectory) -> None:
        for column, (h, f_h) in enumerate(loop.blocks.values()):
            value, flag = relative_update(batch.kept(h), batch.kept(f_h))
            rows.values["value"][batch.samples, column] = value
            rows.flag[batch.samples, column] = flag

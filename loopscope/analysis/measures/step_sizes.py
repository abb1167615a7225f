"""Step sizes: how far each iteration moves the state, with and without its growth in length."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopscope.analysis.flags import Flag, flagged
from loopscope.analysis.measures.filling import Batch, MeasureRows, Setup, kept_positions
from loopscope.analysis.measures.update_norm import sample_norm
from loopscope.analysis.tables import Rows, columns


class Steps(NamedTuple):
    """The steps of a batch, each (batch, step) in float64; NaN where undefined.

    Undefined are those between states that differ in shape.

    Attributes:
        value: `‖h(t+1) − h(t)‖_F / ‖h(t)‖_F`; infinite where only h(t) is zero.
        ratio: `‖h(t+1) − h(t)‖ / ‖h(t) − h(t−1)‖`; NaN at t = 0.
        mixed: The update of the mixed state, `2·‖h(t+1) − h(t)‖ / (‖h(t+1)‖ + ‖h(t)‖)`.
        turn: The step without growth in length, 0 … 2: `turn` of h(t) and h(t+1).
    """

    value: Tensor
    ratio: Tensor
    mixed: Tensor
    turn: Tensor


def steps(h: Sequence[Tensor], *, first: int = 0) -> Steps:
    """Measure how far the state moves from iteration to iteration.

    Args:
        h: h(0) … h(T), each (batch, pos, d_model).
        first: The first t to give.

    Returns:
        T − first steps, accumulated in float64; 0/0 is 0.
    """
    exact = h[0].dtype == torch.float64
    home = h[0].device
    states = [x.to(home, torch.float64 if exact else torch.float32) for x in h]
    asked = range(first, len(h) - 1)
    sizes = {t: sample_norm(states[t]) for t in range(first, len(h))}
    nothing = torch.full_like(sizes[first], torch.nan)
    moved = {
        t: sample_norm(states[t + 1] - states[t]) if _alike(states, t) else nothing
        for t in range(max(first - 1, 0), len(h) - 1)
    }
    return Steps(
        torch.stack([_over(moved[t], sizes[t]) for t in asked], 1),
        torch.stack([_over(moved[t], moved[t - 1]) if t else nothing for t in asked], 1),
        torch.stack([_over(2 * moved[t], sizes[t] + sizes[t + 1]) for t in asked], 1),
        torch.stack(
            [turn(states[t], states[t + 1]) if _alike(states, t) else nothing for t in asked], 1
        ),
    )


def _alike(states: Sequence[Tensor], t: int) -> bool:
    return states[t].shape == states[t + 1].shape


def _over(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a == 0) & (b == 0), 0.0, a / b)


ROUNDING = 4
"""A token as near to the midst as so many roundings of its length lies there."""


def turn(before: Tensor, after: Tensor) -> Tensor:
    """Measure how far the tokens turn, seen from the midst of them.

    `‖ĥ′ − ĥ‖`, root mean square over the tokens, ĥ each token of h less the median of all
    (coordinate by coordinate), at length 1. So neither growth of the whole state counts nor a
    vector added to every token, nor does a token of huge norm decide for all.

    Args:
        before: h, (batch, pos, d_model).
        after: h′ of the same tokens.

    Returns:
        0 … 2 for each sample, in float64; tokens at the median itself are left out. NaN without
        others, 0 where neither state has any.
    """
    centred = [x - x.median(dim=1, keepdim=True).values for x in (before, after)]
    lengths = [
        torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64) for x in centred
    ]
    for length, state in zip(lengths, (before, after), strict=True):  # rounding has no direction
        whole = torch.linalg.vector_norm(state, dim=-1, keepdim=True, dtype=torch.float64)
        length[length <= ROUNDING * torch.finfo(state.dtype).eps * whole] = 0
    counts = ((lengths[0] > 0) & (lengths[1] > 0)) | ~torch.isfinite(lengths[0] + lengths[1])
    a, b = (
        x / torch.where(length == 0, 1, length) for x, length in zip(centred, lengths, strict=True)
    )
    square = torch.where(counts, (b - a).square().sum(-1, keepdim=True), 0.0).sum((1, 2))
    root = (square / counts.sum((1, 2))).sqrt()
    neither = (lengths[0] == 0).all(1)[:, 0] & (lengths[1] == 0).all(1)[:, 0]
    return torch.where(neither, 0.0, root)


class DeltaRows(MeasureRows):
    """The table `delta`: the steps of each loop, of the main one on to as many as are run."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.main, self.K = setup.first.loop, setup.first.K
        depth = {name: loop.K for name, loop in setup.first.courses.items()}
        if setup.longer is not None:
            depth[self.main] = setup.longer.K
        self.rows = {
            name: Rows("delta", setup.samples, columns(("t",), [(t,) for t in range(K)]))
            for name, K in depth.items()
            if K
        }

    def add(self, batch: Batch) -> None:
        for name, rows in self.rows.items():
            loop = batch.trajectory.courses[name]
            h = [batch.kept(state) for state in loop.h]
            parts, differ = [steps(h)], [not _alike(h, t) for t in range(loop.K)]
            if batch.longer is not None and name == self.main:
                more = [kept_positions(h_t, batch.drop, batch.longer) for h_t in batch.longer.h]
                parts.append(Steps(*(x[:, 1:] for x in steps(more, first=self.K - 1))))
                differ += [not _alike(more, t) for t in range(loop.K, len(more) - 1)]
            measured = {
                column: torch.cat([getattr(part, column) for part in parts], 1).cpu().numpy()
                for column in Steps._fields
            }
            for column, values in measured.items():
                rows.values[column][batch.samples] = flagged(values).value
            for t, (state, h_m) in enumerate(zip(h, loop.h_m, strict=False)):
                if state.shape == (given := batch.kept(h_m)).shape:
                    work = turn(state, given.to(state.device))
                    rows.values["work"][batch.samples, t] = flagged(work.cpu().numpy()).value
            flag = flagged(measured["value"]).flag
            flag[np.isinf(measured["value"]) & np.isfinite(measured["mixed"])] = Flag.ZERO
            flag[:, differ] = Flag.SHAPE
            rows.flag[batch.samples] = flag

    def frames(self, model: str) -> dict[str, list[pd.DataFrame]]:
        return {"delta": [rows.frame(model, loop) for loop, rows in self.rows.items()]}

"""Effective rank, stable rank and participation ratio of a state matrix (MeSH Section 2)."""

from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float64

from loopscope.analysis.flags import Flag, Flagged, flagged
from loopscope.analysis.measures.filling import LoopRows, LoopStates, Setup
from loopscope.analysis.measures.gram_matrices import degenerate
from loopscope.analysis.tables import Rows
from loopscope.models import Trajectory

RANK_MEASURES = ("effective", "stable", "participation")
"""What `ranks` gives, in its order."""


def ranks(sigma: Float64[np.ndarray, " rank"]) -> Flagged:
    """Give effective rank, stable rank and participation ratio, in the order of `RANK_MEASURES`.

    * effective: exp(−Σ p ln p), p = σ/Σσ (Roy & Vetterli 2007), with 0 ln 0 = 0;
    * stable: Σσ² / σ_0²;
    * participation: (Σσ²)² / Σσ⁴.

    Args:
        sigma: Singular values in descending order.

    Returns:
        Three values and flags: NaN with `ZERO` for a zero state, NaN with `NONFINITE` for one
        that is not finite.
    """
    flag = degenerate(sigma)
    if flag != Flag.NONE:
        return Flagged(np.full(3, np.nan), np.full(3, int(flag), dtype=np.int8))
    relative = sigma / sigma[0]
    positive = relative[relative > 0]
    p = positive / positive.sum()
    squares = (relative**2).sum()
    return flagged(
        np.array([np.exp(-(p * np.log(p)).sum()), squares, squares**2 / (relative**4).sum()])
    )


class RankRows(LoopRows):
    """The table `rank`: the ranks of each state."""

    table = "rank"
    by_sample = spectral = True

    def keys(self, loop: Trajectory, setup: Setup) -> list[tuple[Any, ...]]:
        return list(product(loop.states, RANK_MEASURES))

    def fill_sample(self, rows: Rows, sample: int, loop: LoopStates) -> None:
        by_state = [ranks(sigma) for sigma in loop.sigmas]
        rows.values["value"][sample] = np.concatenate([rank.value for rank in by_state])
        rows.flag[sample] = np.concatenate([rank.flag for rank in by_state])

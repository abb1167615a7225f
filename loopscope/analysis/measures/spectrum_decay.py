"""Spectrum of a state matrix: how fast its singular values fall (MeSH Figures 1c and 5)."""

from itertools import product
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from loopscope.analysis.flags import Flag
from loopscope.analysis.measures.filling import LoopRows, LoopStates, Setup
from loopscope.analysis.measures.gram_matrices import degenerate
from loopscope.analysis.tables import Rows
from loopscope.models import Trajectory

SPECTRUM_LENGTH = 50
"""Singular values that are kept of each state."""


class Spectrum(NamedTuple):
    """The first singular values over the largest, their decimal logarithms and flags.

    Attributes:
        sigma_rel: σ_i/σ_0.
        log10_sigma_rel: Its decimal logarithm.
        flag: Codes of `Flag`.
    """

    sigma_rel: np.ndarray
    log10_sigma_rel: np.ndarray
    flag: np.ndarray


def spectrum(sigma: Float64[np.ndarray, " rank"], count: int = SPECTRUM_LENGTH) -> Spectrum:
    """Give the first `count` ratios σ_i/σ_0 (MeSH Figure 5) and log10 of them.

    Args:
        sigma: Singular values in descending order.
        count: How many ratios.

    Returns:
        Three arrays of length `count`. Beyond the last singular value the ratios are NaN with
        `SHORT`; a zero state is NaN with `ZERO`; a single σ_i = 0 has ratio 0, no logarithm and
        the flag `ZERO`; an activation that is not finite makes all NaN with `NONFINITE`.
    """
    n = min(count, len(sigma))
    ratio = np.full(count, np.nan)
    log10 = np.full(count, np.nan)
    flag = np.full(count, int(Flag.SHORT), dtype=np.int8)
    flag_of_all = degenerate(sigma)
    flag[:n] = flag_of_all
    if flag_of_all == Flag.NONE:
        ratio[:n] = sigma[:n] / sigma[0]
        positive = ratio[:n] > 0
        log10[:n][positive] = np.log10(ratio[:n][positive])
        flag[:n][~positive] = Flag.ZERO
    return Spectrum(ratio, log10, flag)


class SpectrumRows(LoopRows):
    """The table `spectrum`: the first singular values of each state over the largest."""

    table = "spectrum"
    by_sample = spectral = True

    def keys(self, loop: Trajectory, setup: Setup) -> list[tuple[Any, ...]]:
        return list(product(loop.states, range(SPECTRUM_LENGTH)))

    def fill_sample(self, rows: Rows, sample: int, loop: LoopStates) -> None:
        spectra = [spectrum(sigma) for sigma in loop.sigmas]
        for column in ("sigma_rel", "log10_sigma_rel"):
            ratios = [getattr(of_state, column) for of_state in spectra]
            rows.values[column][sample] = np.concatenate(ratios)
        rows.flag[sample] = np.concatenate([of_state.flag for of_state in spectra])

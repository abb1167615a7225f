"""Flags: why a value is missing or should not be averaged in."""

from enum import IntEnum
from typing import NamedTuple

import numpy as np


class Flag(IntEnum):
    """What is wrong with a value; the code is its category's code in the tables' column `flag`.

    * `ZERO`: nothing to measure (a zero or constant state, a step relative to a zero state, or
      a singular value that is numerically zero and has no logarithm).
    * `ZERO_MEDIAN`: more than half of a state's squared distances are zero (repeated tokens);
      the median of the others set the RBF bandwidth.
    * `NONPOSITIVE_HSIC`: the unbiased estimate of a state's own HSIC is not positive.
    * `NONFINITE`: NaN or infinity among the activations.
    * `SHAPE`: what would be compared differs in shape: a block's input and output, two states of
      different positions, h(t) and the h(K) whose place it would take; a state has too few
      positions for a CKA; or a path ends before h(K), which is another kind of state.
    * `SHORT`: the state has fewer singular values than the table has rows.
    """

    NONE = -1
    ZERO = 0
    ZERO_MEDIAN = 1
    NONPOSITIVE_HSIC = 2
    NONFINITE = 3
    SHAPE = 4
    SHORT = 5


FLAG_NAMES: tuple[str, ...] = tuple(flag.name.lower() for flag in Flag if flag >= 0)


class Flagged(NamedTuple):
    """Values with one flag each.

    Attributes:
        value: Float64, NaN where there is no sound value.
        flag: Codes of `Flag`, of the same shape.
    """

    value: np.ndarray
    flag: np.ndarray


def flagged(value: np.ndarray) -> Flagged:
    """Give values in float64 without flags, except that what is not finite is flagged as such.

    Args:
        value: Any array.

    Returns:
        The array in float64, NaN where it was not finite, and its flags.
    """
    value = np.array(value, dtype=np.float64)
    flag = np.full(value.shape, int(Flag.NONE), dtype=np.int8)
    bad = ~np.isfinite(value)
    value[bad] = np.nan
    flag[bad] = Flag.NONFINITE
    return Flagged(value, flag)


__all__ = ["FLAG_NAMES", "Flag", "Flagged", "flagged"]

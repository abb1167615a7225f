"""How numbers are written for a reader: no more digits than their interval supports."""

import math

MINUS = "−"
DASH = "–"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LARGE, _SMALL = 1e5, 1e-4
_MOST = 4  # decimals


def estimate(mean: float | None, low: float | None = None, high: float | None = None) -> str:
    """Write a mean with the digits that its interval supports: 2.48 with an interval of ±0.03.

    The half width of the interval has one digit, or two where they are 10 … 29.

    Args:
        mean: The number; None where there is none.
        low: Lower end of its interval.
        high: Upper end.

    Returns:
        The mean alone; – for None.
    """
    return DASH if mean is None else _fixed(mean, _decimals(mean, low, high))


def interval(mean: float | None, low: float | None, high: float | None) -> str:
    """Write an interval with the digits of its mean: [2.45, 2.51].

    Args:
        mean: The number in the middle.
        low: Lower end; None where there is no interval.
        high: Upper end.

    Returns:
        Both ends in brackets; empty where there is none.
    """
    if mean is None or low is None or high is None:
        return ""
    decimals = _decimals(mean, low, high)
    return f"[{_fixed(low, decimals)}, {_fixed(high, decimals)}]"


def signed(mean: float | None, low: float | None = None, high: float | None = None) -> str:
    """Write a difference with its sign: +0.04, −1.2, 0.

    Args:
        mean: The difference; None where there is none.
        low: Lower end of its interval.
        high: Upper end.

    Returns:
        As `estimate`, with + before positive numbers.
    """
    text = estimate(mean, low, high)
    return f"+{text}" if mean is not None and mean > 0 and any(c in "123456789" for c in text) \
        else text  # fmt: skip


def effect(size: float | None) -> str:
    """Write an effect size with its sign: +0.43, −1.2, +118.

    Args:
        size: Cohen's d; None where there is none.

    Returns:
        Two decimals below 1, none from 100 on; – for None.
    """
    if size is None:
        return DASH
    text = _fixed(size, 2 if abs(size) < 1 else 1 if abs(size) < 100 else 0)
    return f"+{text}" if size > 0 else text


def probability(p: float | None) -> str:
    """Write a p-value: 0.034, < 0.001.

    Args:
        p: The value; None where there is none.

    Returns:
        Three decimals at most.
    """
    if p is None:
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def count(value: int | None) -> str:
    """Write a whole number with thousands apart: 20,000.

    Args:
        value: The number; None where there is none.

    Returns:
        The digits; – for None.
    """
    return DASH if value is None else f"{value:,}"


def _decimals(mean: float, low: float | None, high: float | None) -> int | None:
    """Decimals that suit an interval, or a number without one; None for powers of ten."""
    half = 0.0 if low is None or high is None else (high - low) / 2
    size = max(abs(x) for x in (mean, low, high) if x is not None)
    if size >= _LARGE or 0 < size < _SMALL:
        return None
    if half > 0:
        power = math.floor(math.log10(half))
        decimals = min(max((half < 3 * 10.0**power) - power, 0), _MOST)
        ends = [abs(x) for x in (low, high) if x]
        while decimals < _MOST and any(x < 0.5 * 10.0**-decimals for x in ends):
            decimals += 1  # an end that is not 0 is not written as 0
        return decimals
    return 0 if size == 0 else min(max(2 - math.floor(math.log10(size)), 0), _MOST)


def _fixed(value: float, decimals: int | None) -> str:
    if not math.isfinite(value):
        return "∞" if value > 0 else f"{MINUS}∞" if value < 0 else DASH
    if decimals is None:
        digits, _, power = f"{value:.1e}".partition("e")
        text = f"{digits}×10{str(int(power)).translate(_RAISED)}" if value else "0"
    else:
        text = f"{value:,.{decimals}f}"
        if not any(c in "123456789" for c in text):
            text = text.lstrip("-")
    return text.replace("-", MINUS)

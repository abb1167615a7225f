"""Parameters: which of them iterations share, and which belong to one alone."""

from bisect import bisect_right
from collections.abc import Sequence

from loopscope.probes.loops.trace import Call
from loopscope.probes.loops.units import Units


def _used(units: Units, iterations: Sequence[Sequence[Call]]) -> list[set[str]]:
    """Parameters used in each iteration: until the next call begins, what is used counts to it."""
    starts = sorted(call.start for call in units.trace.calls)
    used = []
    for calls in iterations:
        end = calls[-1].end
        later = bisect_right(starts, end)
        end = starts[later] if later < len(starts) else end
        used.append({name for tick, name in units.trace.uses if calls[0].start <= tick < end})
    return used


def owned(units: Units, iterations: Sequence[Sequence[Call]], t: int) -> tuple[str, ...]:
    """Names of the parameters that iteration t alone uses, of all iterations and of all else.

    Args:
        units: The traced forward pass.
        iterations: The calls of each iteration.
        t: Which one.

    Returns:
        The names, in order of use; empty for a loop of one iteration.
    """
    used = _used(units, iterations)
    others = set().union(*used[:t], *used[t + 1 :])
    if len(used) == 1:
        return ()
    order = dict.fromkeys(name for _, name in units.trace.uses)
    return tuple(name for name in order if name in used[t] - others)


def shared(units: Units, iterations: Sequence[Sequence[Call]]) -> tuple[str, ...]:
    """Names of the parameters that more than one iteration uses, in order of use."""
    used = _used(units, iterations)
    order = dict.fromkeys(name for _, name in units.trace.uses)
    return tuple(name for name in order if sum(name in one for one in used) > 1)

"""Parameters: which of them iterations share, and which belong to one alone."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence

from loopscope.probes.loops.trace import Call, Trace


def by_iteration(
    trace: Trace, iterations: Sequence[Sequence[Call]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Parameters that more than one iteration uses, and those that one alone uses.

    A use counts to an iteration from the beginning of its first call until the first call after it
    begins, so that parameters used outside of modules count too.

    Args:
        trace: The traced forward pass.
        iterations: The calls of each iteration.

    Returns:
        Names of the shared parameters, and of each iteration's own (none for a single iteration),
        in order of use.
    """
    starts = sorted(call.start for call in trace.calls)
    ticks = [tick for tick, _ in trace.uses]
    used: list[dict[str, None]] = []
    for calls in iterations:
        end = calls[-1].end
        later = bisect_right(starts, end)
        end = starts[later] if later < len(starts) else end
        a, b = bisect_left(ticks, calls[0].start), bisect_left(ticks, end)
        used.append(dict.fromkeys(name for _, name in trace.uses[a:b]))
    count = Counter(name for one in used for name in one)
    shared = tuple(name for name, n in count.items() if n > 1)
    if len(used) == 1:
        return shared, [()]
    return shared, [tuple(name for name in one if count[name] == 1) for one in used]

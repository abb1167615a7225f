"""Side branches: calls in a loop that lead to no later iteration, such as a coda run in each."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from loopscope.models.loops.dataflow import Flow
from loopscope.models.loops.tracing import Call, Trace


def side_branches(
    trace: Trace,
    calls: Sequence[Call],
    symbol: Callable[[Call], str],
    is_core: Callable[[Call], bool],
    group: Callable[[Call], Any],
) -> set[int]:
    """Find the calls between the first and the last of a core that no later one depends on.

    A state that is carried from one iteration to the next is no side branch, though nothing else
    reads it; nor is what stands in one place only, as a loop before the loop.

    Args:
        trace: The traced forward pass.
        calls: The calls with matrices, in order.
        symbol: What makes two calls calls of the same thing.
        is_core: Whether a call may be (a part of) an iteration.
        group: What calls of one list of modules have in common.

    Returns:
        Indices of the calls; none where no loop would be left without them.
    """
    core = [n for n, call in enumerate(calls) if is_core(call)]
    if len(core) < 2:
        return set()
    flow = Flow.of(trace, calls)
    barred: set[Any] = set()
    while True:
        side = _unread(flow, core, {n for n, call in enumerate(calls) if group(call) in barred})
        left = [n for n in core if n not in side]
        more = _carried(flow, side, left, group) | _elsewhere(calls, side, left, group)
        if more <= barred:
            break
        barred |= more
    count = Counter(symbol(calls[n]) for n in left)
    if not any(times > 1 for times in count.values()):
        return set()
    return {calls[n].index for n in side}


def _unread(flow: Flow, core: Sequence[int], kept: set[int]) -> set[int]:
    """Calls that lead to no later call of the core, those apart that only such calls read."""
    side: set[int] = set()
    for n in reversed(range(core[0] + 1, core[-1])):
        if n in kept:
            continue
        later = [m for m in core if m > n and m not in side]
        if later and not flow.feeds(n, later):
            side.add(n)
    return side


def _segment(n: int, left: Sequence[int]) -> int:
    """Between which of the core's calls a call stands."""
    return sum(m < n for m in left)


def _carried(
    flow: Flow, side: set[int], left: Sequence[int], group: Callable[[Call], Any]
) -> set[Any]:
    """Groups of calls that lead from one stretch to a later one: a state of its own."""
    carried: set[Any] = set()
    for m in side:
        for n in side:
            if n < m and flow.through[m] >> n & 1 and _segment(n, left) != _segment(m, left):
                carried |= {group(flow.calls[n]), group(flow.calls[m])}
    return carried


def _elsewhere(
    calls: Sequence[Call], side: set[int], left: Sequence[int], group: Callable[[Call], Any]
) -> set[Any]:
    """Groups some of which lead on, and those that stand in one place and not after the loop."""
    places: dict[Any, list[int]] = defaultdict(list)
    for n in side:
        places[group(calls[n])].append(n)
    barred: set[Any] = set()
    for key, numbers in places.items():
        others = [n for n in range(len(calls)) if n not in side and group(calls[n]) == key]
        leads = any(n < max(numbers) for n in others)
        if leads or (len({_segment(n, left) for n in numbers}) == 1 and not others):
            barred.add(key)
    return barred

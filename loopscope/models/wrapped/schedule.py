"""Schedule: at which of its calls a module is in which iteration, told while the model runs."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from loopscope.probes.loops.loopmap import Loop, LoopMap, Port
from loopscope.probes.loops.trace import Call, Trace

Key = tuple[int, int]
"""Stretch between two beginnings of iterations, and which call of the module within it."""


@dataclass(frozen=True)
class Schedule:
    """Where the calls of a forward pass stand.

    A module that is called on some inputs only must not shift the iterations of its other calls.
    So calls are counted anew in each stretch between two beginnings of iterations; what begins an
    iteration is a call that every iteration makes.

    Attributes:
        begins: Modules whose calls begin iterations, and which of their calls do.
        calls: How often those are called on the example.
        keys: (module, side, call) to where it stands, for modules that iterations call.
        ends: (module, call) to its place among the module's ends, where that is another.
    """

    begins: dict[str, frozenset[int]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    keys: dict[tuple[str, str, int], Key] = field(default_factory=dict)
    ends: dict[tuple[str, int], int] = field(default_factory=dict)

    def inside(self, port: Port) -> bool:
        """Whether iterations call a port's module."""
        return (port.module, port.side, port.call) in self.keys

    def key(self, port: Port) -> Key:
        """Where a port's call stands; modules outside all iterations are counted through."""
        if port.side == "out":
            number = self.ends.get((port.module, port.call), port.call)
        else:
            number = port.call
        return self.keys.get((port.module, port.side, port.call), (0, number))


def schedule(trace: Trace, found: LoopMap) -> Schedule:
    """Learn from a traced forward pass what begins its iterations.

    Args:
        trace: The traced forward pass.
        found: Its map.

    Returns:
        The schedule.
    """
    spans = [it.span for loop in found.loops for it in loop.iterations]
    looped = {call.module for a, b in spans for call in trace.calls[a:b]}
    anchors = {call.index: call for loop in found.loops for call in _anchors(trace, loop)}
    for loop in found.loops:
        if (last := _after(trace, loop, looped)) is not None:
            anchors[last.index] = last
    begins: dict[str, set[int]] = defaultdict(set)
    for call in anchors.values():
        begins[call.module].add(call.number)
    starts = sorted(call.start for call in anchors.values())
    keys: dict[tuple[str, str, int], Key] = {}
    ends: dict[tuple[str, int], int] = {}
    by_end = sorted(trace.calls, key=lambda call: call.end)
    for side, calls in (("in", trace.calls), ("out", by_end)):
        seen: Counter[tuple[str, int]] = Counter()
        through: Counter[str] = Counter()
        stretch = 0
        for call in calls:
            tick = call.start if side == "in" else call.end
            while stretch < len(starts) and starts[stretch] <= tick:
                stretch += 1
            if call.module in looped:
                keys[call.module, side, call.number] = (stretch, seen[call.module, stretch])
                seen[call.module, stretch] += 1
            elif side == "out":
                if through[call.module] != call.number:
                    ends[call.module, call.number] = through[call.module]
                through[call.module] += 1
    return Schedule(
        begins={name: frozenset(numbers) for name, numbers in begins.items()},
        calls={name: trace.counts[name] for name in begins},
        keys=keys,
        ends=ends,
    )


def _anchors(trace: Trace, loop: Loop) -> list[Call]:
    """The call that begins each iteration: of a module that all of them call equally often."""
    inside = [trace.calls[it.span[0] : it.span[1]] for it in loop.iterations]
    counts = [Counter(call.module for call in calls) for calls in inside]
    first = loop.iterations[0]
    wanted = [*(unit.module for unit in first.units), first.h.module, *counts[0]]
    for steady in (True, False):
        for name in wanted:
            own = {count[name] for count in counts}
            if 0 not in own and (len(own) == 1 or not steady):
                return [next(call for call in calls if call.module == name) for calls in inside]
    firsts = [it.units[0] if it.units else it.h for it in loop.iterations]
    return [trace.numbered[one.module, one.call] for one in firsts]


def _after(trace: Trace, loop: Loop, looped: set[str]) -> Call | None:
    """The call that reads a loop's last state, where no iteration calls its module."""
    if loop.after.side == "out" or loop.after.module in looped:
        return None
    call = trace.numbered[loop.after.module, loop.after.call]
    return call if call.index >= loop.iterations[-1].span[1] else None

"""Dataflow: which calls of a traced forward pass lead to which later ones, and by what functions.

Followed are the torch functions themselves, so that it is known without gradients too.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from loopscope.models.loops.functions import Function
from loopscope.models.loops.tracing import Call, Trace


@dataclass
class Flow:
    """What flows into some calls of a traced forward pass from the others.

    Attributes:
        trace: The traced forward pass.
        calls: The calls, in order.
        direct: For each call, by which of its inputs, the earlier calls (as bits) whose outputs
            come there without passing through another of the calls.
        through: For each call the earlier calls (as bits) that it depends on in any way.
        unknown: The calls that are given something of which nobody knows where it is from.
    """

    trace: Trace
    calls: Sequence[Call]
    direct: list[dict[int, int]] = field(default_factory=list)
    through: list[int] = field(default_factory=list)
    unknown: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, trace: Trace, calls: Sequence[Call]) -> "Flow":
        """Follow what some calls give.

        Args:
            trace: The traced forward pass.
            calls: The calls, in order, none of them inside another.

        Returns:
            The flow.
        """
        flow = cls(trace, calls, [{} for _ in calls], [0 for _ in calls])
        flow._follow()
        return flow

    def _follow(self) -> None:
        number = {call.index: n for n, call in enumerate(self.calls)}
        stranger, known = 1 << len(self.calls), self.trace.known
        direct: dict[int, int] = {}
        through: dict[int, int] = {}

        def of(key: int, masks: dict[int, int]) -> int:
            return masks.get(key, 0 if key in known else stranger)

        for event in _events(self.trace, self.calls):
            if isinstance(event, Function):
                for masks in (direct, through):
                    mask = 0
                    for key in event.arguments:
                        mask |= of(key, masks)
                    for key in event.results:
                        masks[key] = mask | masks.get(key, 0)
                continue
            call, begins = event
            n = number[call.index]
            if begins:
                for i, item in enumerate(call.inputs):
                    self.direct[n][i] = of(item.key, direct) & ~stranger
                    reached = of(item.key, through)
                    self.through[n] |= reached & ~stranger
                    if reached & stranger:
                        self.unknown.add(n)
                continue
            for item in call.outputs:
                direct[item.key] = 1 << n
                through[item.key] = through.get(item.key, 0) | self.through[n] | 1 << n

    def reads(self, n: int) -> int:
        """The earlier calls (as bits) whose outputs come to a call directly.

        Args:
            n: The call's number.

        Returns:
            The bits.
        """
        mask = 0
        for part in self.direct[n].values():
            mask |= part
        return mask

    def feeds(self, n: int, later: Sequence[int]) -> bool:
        """Whether a call leads to some of the later ones, or may do so.

        Args:
            n: The call's number.
            later: Numbers of calls after it.

        Returns:
            True where it does, or where that is not known.
        """
        return any(self.through[m] >> n & 1 or m in self.unknown for m in later)


def _events(trace: Trace, calls: Sequence[Call]) -> Iterator[Function | tuple[Call, bool]]:
    """Functions, and beginnings and ends of calls, in the order in which they came."""
    borders: list[tuple[int, tuple[Call, bool]]] = []
    for call in calls:
        borders += [(call.start, (call, True)), (call.end, (call, False))]
    borders.sort(key=lambda border: border[0])
    if not borders:
        return
    first, last = (bisect_left(trace.functions, borders[i][0], key=_tick) for i in (0, -1))
    place = 0
    for function in trace.functions[first:last]:
        while place < len(borders) and borders[place][0] <= function.tick:
            yield borders[place][1]
            place += 1
        yield function
    yield from (event for _, event in borders[place:])


def _tick(function: Function) -> int:
    return function.tick

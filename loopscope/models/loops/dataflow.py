"""Dataflow: which calls of a traced forward pass lead to which later ones, and by what functions.

Followed are the torch functions themselves, so that it is known without gradients too.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from loopscope.models.loops.tracing import Call, Function, Trace

DEEPEST, MOST_WAYS = 8, 64
"""How many functions an argument is followed back through, and how many ways at once."""

Operand = tuple[tuple[str, int], ...]
"""The way from a tensor to one it was made of: a function's name and which of its arguments, …"""


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


class Making:
    """How tensors were made: each by the last function that gave or changed it.

    Args:
        functions: Torch functions, in order.
    """

    def __init__(self, functions: Sequence[Function]) -> None:
        self.functions = functions
        self.makers: dict[int, list[int]] = defaultdict(list)
        for number, function in enumerate(functions):
            for key in function.results:
                self.makers[key].append(number)

    def maker(self, key: int, before: int) -> int | None:
        """The function that made a tensor as it was at some time.

        Args:
            key: The tensor's identity.
            before: Number of the first function that came too late.

        Returns:
            The function's number; None where the tensor was there before.
        """
        return next((n for n in reversed(self.makers.get(key, ())) if n < before), None)

    def way(self, key: int, before: int, target: Any, ends: Any = ()) -> Operand | None:
        """How a tensor was made of another: the shortest way.

        Args:
            key: The tensor's identity.
            before: Number of the first function that came after it was used.
            target: Identities of what is sought.
            ends: Identities of tensors that are not looked behind.

        Returns:
            The way; empty where the tensor is what is sought, None where no way leads there.
        """
        reached: list[tuple[Operand, int, int]] = [((), key, before)]
        for _ in range(DEEPEST):
            further: list[tuple[Operand, int, int]] = []
            for way, place, latest in reached:
                if place in target:
                    return way
                number = None if place in ends else self.maker(place, latest)
                if number is None:
                    continue
                function = self.functions[number]
                further += [
                    ((*way, (function.name, i)), argument, number)
                    for i, argument in enumerate(function.arguments)
                ]
            reached = further[:MOST_WAYS]
        return None

    def follow(self, key: int, before: int, way: Operand) -> int | None:
        """What a tensor was made of, by a way that another was made.

        Args:
            key: The tensor's identity.
            before: Number of the first function that came after it was used.
            way: The way.

        Returns:
            Identity of what stands at its end; None where it was made otherwise.
        """
        for name, place in way:
            number = self.maker(key, before)
            if number is None or self.functions[number].name != name:
                return None
            if place >= len(self.functions[number].arguments):
                return None
            key, before = self.functions[number].arguments[place], number
        return key

    def count_before(self, tick: int) -> int:
        """How many functions came before a tick of the trace.

        Args:
            tick: The tick.

        Returns:
            The number of the first function that came later.
        """
        return bisect_left(self.functions, tick, key=_tick)


def _tick(function: Function) -> int:
    return function.tick

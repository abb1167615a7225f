"""Carried states: which of several states each call of a core updates, and where they are read.

A call updates a state when it is the last to read its value and gives the next one
(`z = net(z + y)`: the old z is not read again). So the states of a model are chains of values, each
read for the last time where the next one is made, found without names and without gradients.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import torch

from loopscope.errors import InputError
from loopscope.models.loops.dataflow import Flow
from loopscope.models.loops.functions import Operand
from loopscope.models.loops.loop_map import Port
from loopscope.models.loops.ports import port
from loopscope.models.loops.tracing import Call, CallTensor, Trace
from loopscope.models.loops.units import Units

MOST_READERS = 64
"""How many calls are looked at for where a state begins."""

LONGEST = 12
"""How long a name may be that the model's code has for a state, to stand in tables and figures."""

Place = tuple[tuple[str | int, ...], Operand]
"""Where in its arguments a call reads a value, and by which functions it was made from it."""


@dataclass(eq=False)
class CarriedState:
    """One of several states.

    Attributes:
        calls: The calls that update it, in order.
        name: What the model's own code, or a specification, calls it; empty where unknown.
    """

    calls: list[Call] = field(default_factory=list)
    name: str = ""


class Chains:
    """The chains of values of a sequence of calls.

    Args:
        units: The traced forward pass and its streams.
        calls: The calls of the core, in order.
    """

    def __init__(self, units: Units, calls: Sequence[Call]) -> None:
        self.units, self.calls = units, calls
        self.trace: Trace = units.trace
        self.flow = Flow.of(units.trace, calls)
        self.reads = [self.flow.reads(n) for n in range(len(calls))]
        self.outputs = {item.key: n for n, call in enumerate(calls) for item in call.outputs}
        self.before: list[int | None] = []

    def find(self) -> list[int] | None:
        """Find the chain of each call.

        Returns:
            A number for each call; None where the calls do not update several states by turns.
        """
        last = {i: j for j, mask in enumerate(self.reads) for i in _bits(mask)}
        chain: list[int] = []
        for j, mask in enumerate(self.reads):
            ends = [i for i in _bits(mask) if last[i] == j]
            before = self._predecessor(j, ends)
            self.before.append(before)
            chain.append(j if before is None else chain[before])
        return self._states(chain, last)

    def _predecessor(self, j: int, ends: Sequence[int]) -> int | None:
        """The value that a call updates, of those that it is the last to read."""
        if len(ends) < 2:
            return ends[0] if ends else None
        likes = [n for n in range(j - 1, -1, -1) if self._symbol(n) == self._symbol(j)]
        left = list(ends)
        for i in ends:
            for where, way in self.places(i, j):
                for n in likes:
                    key = self.follow(n, where, way)
                    if key is None or self._is_mixed(key, n):
                        continue
                    if self._value(key, n) == self.before[n]:  # both None: an initial value
                        return i
                    if i in left:
                        left.remove(i)
                    break
        return max(left or ends)

    def _value(self, key: int, n: int) -> int | None:
        """The call that gave what another reads; None for an initial value."""
        before = self.trace.making.count_before(self.calls[n].start)
        source = self.trace.making.source(key, before, self.outputs, self._is_constant)
        return None if source is None else self.outputs[source]

    @cached_property
    def _held(self) -> set[int]:
        root = self.trace.modules[""]
        return {id(tensor) for tensor in (*root.parameters(), *root.buffers())}

    def _is_constant(self, key: int, depth: int = 3) -> bool:
        """Whether a tensor is a parameter or made of some alone, or a mask."""
        if key in self._held or self.trace.objects[key].dtype == torch.bool:
            return True
        makers = self.trace.making.makers.get(key, ())
        if depth == 0 or not makers:
            return False
        arguments = self.trace.making.functions[makers[-1]].arguments
        return bool(arguments) and all(self._is_constant(x, depth - 1) for x in arguments)

    def is_made_of(self, key: int, reader: Call, call: Call) -> bool:
        """Whether a tensor, when a call began, was what an earlier one gave, or made of it alone.

        Args:
            key: The tensor's identity.
            reader: The call that began.
            call: The earlier one.

        Returns:
            True where it was.
        """
        before, ends = self.trace.making.count_before(reader.start), {x.key for x in call.outputs}
        return self.trace.making.source(key, before, ends, self._is_constant) is not None

    def _is_mixed(self, key: int, n: int) -> bool:
        """Whether what a call reads is made of what several gave, so that it is no state itself."""
        making = self.trace.making
        before = making.count_before(self.calls[n].start)
        way = making.way(key, before, self.outputs)
        return way is not None and self._value(key, n) is None

    def _symbol(self, n: int) -> str:
        return self.units.symbol(self.calls[n])

    def places(self, i: int, j: int) -> Iterator[Place]:
        """Where a call reads what an earlier one gave, or what the code made of that alone.

        Args:
            i: Number of the earlier call.
            j: Number of the call.

        Yields:
            The places.
        """
        for number, mask in self.flow.direct[j].items():
            if mask >> i & 1:
                way = self.way(self.calls[j], self.calls[j].inputs[number], i)
                if way is not None:
                    yield self.calls[j].inputs[number].where, way

    def way(self, reader: Call, item: CallTensor, i: int) -> Operand | None:
        """How an argument of a call was made of what an earlier call gave.

        Args:
            reader: The call.
            item: The argument.
            i: Number of the earlier call.

        Returns:
            The way to what was made of that alone (a norm, a factor); None where there is none.
        """
        making, targets = self.trace.making, {item.key for item in self.calls[i].outputs}
        before = making.count_before(reader.start)
        way = making.way(item.key, before, targets, self.outputs.keys() - targets)
        if way is None:
            return None
        for length in range(len(way)):
            key = making.follow(item.key, before, way[:length], self.outputs)
            if key is not None and making.source(key, before, targets, self._is_constant):
                return way[:length]
        return way

    def follow(self, n: int, where: tuple[str | int, ...], way: Operand) -> int | None:
        """What a call reads at a place.

        Args:
            n: The call's number.
            where: Which of its arguments.
            way: By which functions it was made.

        Returns:
            The tensor's identity; None where the call reads nothing there.
        """
        call, making = self.calls[n], self.trace.making
        item = next((item for item in call.inputs if item.where == where), None)
        if item is None:
            return None
        return making.follow(item.key, making.count_before(call.start), way, self.outputs)

    def _states(self, chain: list[int], last: dict[int, int]) -> list[int] | None:
        """The chains, where there are several; what stands between counts to what reads it."""
        times = Counter((number, self._symbol(n)) for n, number in enumerate(chain))
        carried = {number for (number, _), count in times.items() if count > 1}
        if len(carried) < 2:
            return None
        for n in reversed(range(len(chain))):
            if chain[n] in carried:
                continue
            again = (m for m in range(n + 1, len(chain)) if self._symbol(m) == self._symbol(n))
            if n not in last or last[n] >= next(again, len(chain)):
                return None
            chain[n] = chain[last[n]]
        return None if self._begin_anew(chain) or self._lag(chain) else chain

    def _begin_anew(self, chain: Sequence[int]) -> bool:
        """Whether a module's calls make chains one after the other: a state that begins anew."""
        spans: dict[int, tuple[int, int]] = {}
        symbols: dict[int, set[str]] = {}
        for n, number in enumerate(chain):
            spans[number] = (spans.get(number, (n, n))[0], n)
            symbols.setdefault(number, set()).add(self._symbol(n))
        return any(
            symbols[a] & symbols[b] and (spans[a][1] < spans[b][0] or spans[b][1] < spans[a][0])
            for a, b in combinations(spans, 2)
        )

    def _lag(self, chain: Sequence[int]) -> bool:
        """Whether calls of one module read the same lags at the same places in several chains.

        Then they are one state that also reads values of earlier iterations.
        """
        reads: dict[str, dict[int, frozenset[Any]]] = {}
        for n in range(len(chain)):
            lags: set[Any] = {
                (place, n - i) for i in _bits(self.reads[n]) for place in self.places(i, n)
            }
            lags |= {item.where for item in self.calls[n].inputs}
            reads.setdefault(self._symbol(n), {})[n] = frozenset(lags)
        for of_module in reads.values():
            most = max(map(len, of_module.values()))
            full = {n: lags for n, lags in of_module.items() if len(lags) == most}
            if len({chain[n] for n in full}) > 1 and len(set(full.values())) == 1:
                return True
        return False

    def initial(
        self, state: "CarriedState", states: Sequence["CarriedState"]
    ) -> tuple[int, Place] | None:
        """Where the value that a state begins with is read.

        Args:
            state: The state.
            states: All states.

        Returns:
            The number of a call and the place in it; None where that cannot be told.
        """
        number = {call.index: n for n, call in enumerate(self.calls)}
        first = number[state.calls[0].index]
        values = [number[call.index] for call in state.calls]
        # where a later call reads a value of the state, the first one read the initial value
        for updated in (state, *(other for other in states if other is not state)):
            numbers = [number[call.index] for call in updated.calls]
            early = [n for n in numbers if n <= first]
            for j in [n for n in numbers if n > first][:MOST_READERS]:
                for value in (i for i in values if i < j and self.reads[j] >> i & 1):
                    for where, way in self.places(value, j):
                        for n in early:
                            if self._symbol(n) == self._symbol(j) and self._begins(n, where, way):
                                return n, (where, way)
        return None

    def _begins(self, n: int, where: tuple[str | int, ...], way: Operand) -> bool:
        """Whether what a call reads at a place is an initial value."""
        key = self.follow(n, where, way)
        if key is None or self._is_mixed(key, n):
            return False
        return self._value(key, n) is None


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def carried_states(
    units: Units, calls: Sequence[Call], names: Sequence[str] = ()
) -> list[CarriedState]:
    """Find the states that the calls of a core update.

    Args:
        units: The traced forward pass.
        calls: The calls of the core, in order.
        names: The state that each call updates, in the order of one iteration, as a specification
            says; empty where finding decides.

    Returns:
        The states in the order in which they are first updated; empty where there is only one.

    Raises:
        InputError: if the calls are not so many iterations of the names given.
    """
    if len(set(names)) == 1 or len(calls) < 2:
        return []
    labels: Sequence[Any] | None
    chains = Chains(units, calls)
    if names:
        if len(calls) % len(names):
            raise InputError(
                f"states of the specification names {len(names)} calls ({', '.join(names)}), and "
                f"the core is called {len(calls)} times, which is no multiple of it; name the "
                "state that each call of the core gives in one iteration of the outermost loop."
            )
        labels = list(names) * (len(calls) // len(names))
    else:
        labels = chains.find()
    if labels is None:
        return []
    by_label: dict[Any, CarriedState] = {}
    for call, label in zip(calls, labels, strict=True):
        by_label.setdefault(label, CarriedState()).calls.append(call)
    for label, state in by_label.items():
        state.name = label if isinstance(label, str) else _variable(chains, state)
    drop_repeated_names(by_label.values())
    return list(by_label.values())


def _variable(chains: Chains, state: CarriedState) -> str:
    """The name under which the model's code knows what the state's calls give."""
    count: Counter[str] = Counter()
    for call in state.calls:
        for later in [other for other in chains.calls if other.start > call.end][:1]:
            for key, names in later.variables.items():
                if chains.is_made_of(key, later, call):
                    count.update(names)
    short = [name for name in count if len(name) <= LONGEST]
    return min(short, key=lambda name: (-count[name], len(name)), default="")


def drop_repeated_names(states: Collection[CarriedState]) -> None:
    """Leave states that would have the same name without one.

    Args:
        states: All states of a model; those without a name are left as they are.
    """
    count = Counter(state.name for state in states)
    for state in states:
        if count[state.name] > 1:
            state.name = ""


def initial_port(
    chains: Chains, state: CarriedState, states: Sequence[CarriedState]
) -> Port | None:
    """Where the value that a state begins with can be had.

    Args:
        chains: The chains of the core's calls.
        state: The state.
        states: All states.

    Returns:
        The port; None where that cannot be told.
    """
    initial = chains.initial(state, states)
    return None if initial is None else read_port(chains, chains.calls[initial[0]], *initial[1])


def read_port(
    chains: Chains, call: Call, where: tuple[str | int, ...], way: Operand, *, own: bool = False
) -> Port:
    """Where what a call reads can be had.

    Args:
        chains: The chains of the core's calls.
        call: The call.
        where: Which of its arguments.
        way: How that was made of what is meant.
        own: Whether it must be what this call reads, and not where a module gave it.

    Returns:
        The argument itself, what a module gave, or an operand of the argument.
    """
    making = chains.trace.making
    item = next(item for item in call.inputs if item.where == where)
    key = making.follow(item.key, making.count_before(call.start), way, chains.outputs)
    assert key is not None
    if not way:
        return port(call, "in", item)
    calls = [] if own else sorted(chains.trace.calls, key=lambda c: c.end)
    for earlier in calls:
        for given in earlier.outputs:
            if given.key == key and earlier.end < call.start:
                return port(earlier, "out", given)
    shape = tuple(chains.trace.objects[key].shape)
    return replace(port(call, "in", item), shape=shape, operand=way)

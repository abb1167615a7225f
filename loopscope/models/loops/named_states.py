"""Named states: where each of several states of a loop enters and leaves its iterations."""

from collections.abc import Sequence
from dataclasses import dataclass

from loopscope.models.loops.carried_states import CarriedState, initial_port, output_of
from loopscope.models.loops.loop_map import NamedState, Port
from loopscope.models.loops.ports import equal, port
from loopscope.models.loops.tracing import Call
from loopscope.models.loops.units import Units


@dataclass(frozen=True)
class _Bounds:
    """The first and last call of an iteration, by their indices."""

    first: int
    last: int

    def __contains__(self, call: Call) -> bool:
        return self.first <= call.index <= self.last


class StatePorts:
    """Finds the ports of the states that a loop's calls update.

    Args:
        units: The traced forward pass.
        iterations: The calls of each iteration of the loop.
        carried: All states that are carried there.
    """

    def __init__(
        self, units: Units, iterations: Sequence[Sequence[Call]], carried: Sequence[CarriedState]
    ) -> None:
        self.units = units
        self.carried = carried
        self.calls = sorted((c for state in carried for c in state.calls), key=lambda c: c.index)
        self.bounds = [
            _Bounds(calls[0].index, max(c.index for c in (calls[-1], *calls[-1].descendants())))
            for calls in iterations
        ]
        self.doubts: list[str] = []

    def find(self, loop: str) -> list[NamedState]:
        """Find the ports.

        Args:
            loop: Name of the loop, for a state that has none of its own.

        Returns:
            The states that it updates, the main one first.
        """
        inside = [s for s in self.carried if any(c in b for c in s.calls for b in self.bounds)]
        if not inside:
            return []
        main = self._main(inside)
        ordered = [main, *(state for state in inside if state is not main)]
        return [self._ports(state, _name(state, self.carried), loop) for state in ordered]

    def _main(self, states: Sequence[CarriedState]) -> CarriedState:
        """The state that what follows the loop reads; the one updated last where that is open."""
        last = {id(state): self._last(state) for state in states}
        latest = max(states, key=lambda state: last[id(state)].index)
        end, trace = last[id(latest)].end, self.units.trace
        following = next((c for c in trace.calls if c.start > end and self.units.streamy(c)), None)
        items = trace.root.outputs if following is None else following.inputs
        tick = trace.root.end if following is None else following.start
        before = trace.making.count_before(tick)
        every = {item.key for call in self.calls for item in call.outputs}
        read = [
            state
            for state in states
            for targets in [{item.key for item in last[id(state)].outputs}]
            if any(
                trace.making.way(x.key, before, targets, every - targets) is not None for x in items
            )
        ]
        return read[0] if len(read) == 1 else latest

    def _last(self, state: CarriedState) -> Call:
        return max((c for c in state.calls if c in self.bounds[-1]), default=state.calls[-1],
                   key=lambda c: c.index)  # fmt: skip

    def _ports(self, state: CarriedState, name: str, loop: str) -> NamedState:
        h: list[Port] = []
        h_m: list[Port] = []
        for bounds in self.bounds:
            earlier = [call for call in state.calls if call.index < bounds.first]
            inside = [call for call in state.calls if call in bounds]
            h.append(self._entering(earlier[-1]) if earlier else self._initial(state, name))
            h_m.append(self._given(inside[-1]) if inside else h[-1])
        return NamedState(name=name, h=tuple(h), h_m=tuple(h_m), after=self._after(h_m[-1], state))

    def _given(self, call: Call) -> Port:
        return port(call, "out", output_of(self.units, call))

    def _entering(self, call: Call) -> Port:
        """Where a value is read: by the only call that is given it as it is, or where it arose."""
        item = output_of(self.units, call)
        readers = [
            (later, given)
            for later in self.calls
            if later.start > call.end
            for given in later.inputs
            if given.key == item.key
        ]
        making, end = self.units.trace.making, {x.key for c in self.calls for x in c.outputs}
        indirect = [
            later
            for later in self.calls
            if later.start > call.end
            and any(
                x.key != item.key
                and making.way(
                    x.key, making.count_before(later.start), {item.key}, end - {item.key}
                )
                for x in later.inputs
            )
        ]
        if len(readers) == 1 and not indirect and self.units.streams.is_stream(readers[0][1]):
            return port(readers[0][0], "in", readers[0][1])
        return self._given(call)

    def _initial(self, state: CarriedState, name: str) -> Port:
        found = initial_port(self.units, self.calls, state, self.carried)
        if found is not None:
            return found
        first = state.calls[0]
        item = self.units.streams.entering(first)[0]
        self.doubts.append(
            f"where the state {name} begins is not seen, so its h(0) is what {first.module} is "
            "given at its first call, with all that is added to it"
        )
        return port(first, "in", item)

    def _after(self, output: Port, state: CarriedState) -> Port:
        """What enters whatever follows, where that is the state itself; else its last value."""
        last = self._last(state)
        item = output_of(self.units, last)
        if (output.module, output.call) != (last.module, last.number):
            return output
        for call in self.units.trace.calls:
            if call.start > last.end and call not in self.calls:
                for given in self.units.streams.entering(call):
                    if equal(given.tensor, item.tensor):
                        return port(call, "in", given)
                if self.units.streams.entering(call):
                    break
        return output


def _name(state: CarriedState, carried: Sequence[CarriedState]) -> str:
    """The name that the model's code gives it, or a letter: the last one to be begun is z_A."""
    if state.name:
        return state.name
    number = len(carried) - 1 - list(carried).index(state)
    return f"z_{chr(ord('A') + number)}"

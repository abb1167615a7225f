"""Named states: where each of several states of a loop enters and leaves its iterations."""

from collections.abc import Sequence
from dataclasses import dataclass

from loopscope.models.loops.carried_states import (
    CarriedState,
    Chains,
    initial_port,
    read_port,
)
from loopscope.models.loops.loop_map import NamedState, Port
from loopscope.models.loops.ports import leaving, port
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
        self.chains = Chains(units, self.calls)
        self.doubts: list[str] = []
        self.read_before: set[tuple[str, int]] = set()

    def find(self) -> list[NamedState]:
        """Find the ports.

        Returns:
            The states that it updates, the main one first.
        """
        inside = [s for s in self.carried if any(c in b for c in s.calls for b in self.bounds)]
        if not inside:
            return []
        main = self._main(inside)
        ordered = [main, *(state for state in inside if state is not main)]
        return [self._ports(state, _name(state, self.carried)) for state in ordered]

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

    def _ports(self, state: CarriedState, name: str) -> NamedState:
        h: list[Port] = []
        h_m: list[Port] = []
        for t, bounds in enumerate(self.bounds):
            earlier = [call for call in state.calls if call.index < bounds.first]
            inside = [call for call in state.calls if call in bounds]
            if earlier:
                port_h, early = self._entering(earlier[-1], bounds)
                self.read_before |= {(name, t)} if early else set()
            else:
                port_h = self._initial(state, name)
            h.append(port_h)
            h_m.append(leaving(self.units, inside[-1]) if inside else h[-1])
        return NamedState(name=name, h=tuple(h), h_m=tuple(h_m), after=self._after(h_m[-1], state))

    def _entering(self, call: Call, bounds: _Bounds) -> tuple[Port, bool]:
        """Where an iteration reads a value: what arose where nobody read it before, else as read.

        Also whether a call before the iteration has read it.
        """
        number = self.calls.index(call)
        readers = [n for n, mask in enumerate(self.chains.reads) if mask >> number & 1]
        early = any(self.calls[n].index < bounds.first for n in readers)
        later = [n for n in readers if self.calls[n].index >= bounds.first]
        places = [place for n in later[:1] for place in self.chains.places(number, n)]
        if not places:
            return leaving(self.units, call), early
        where, way = places[0]
        given = self.units.streams.leaving(call)
        as_given = given is not None and given.key == self.chains.follow(later[0], where, way)
        alone = not way and len(later) == len(places) == 1
        if as_given and not early and not alone:
            return leaving(self.units, call), early
        return read_port(self.chains, self.calls[later[0]], where, way, own=early), early

    def _initial(self, state: CarriedState, name: str) -> Port:
        initial = initial_port(self.chains, state, self.carried)
        if initial is not None:
            return initial
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
        if (output.module, output.call) != (last.module, last.number):
            return output
        number = self.calls.index(last)
        for call in self.units.trace.calls:
            if call.start > last.end and call not in self.calls:
                for given in self.units.streams.entering(call):
                    way = self.chains.way(call, given, number)
                    if way is not None:
                        return read_port(self.chains, call, given.where, way)
                if self.units.streams.entering(call):
                    break
        return output


def _name(state: CarriedState, carried: Sequence[CarriedState]) -> str:
    """The name that the model's code gives it, or a letter: the last one to be begun is z_A."""
    if state.name:
        return state.name
    number = len(carried) - 1 - list(carried).index(state)
    return f"z_{chr(ord('A') + number)}"

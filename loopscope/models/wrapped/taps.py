"""Taps: functions at chosen calls of chosen modules, in one iteration of one forward pass."""

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from torch import Tensor, nn

from loopscope.errors import InputError, LoopCountError
from loopscope.models.loops import Call, Loop, LoopMap, Port, RecentFunctions, Step, Trace

Key = tuple[int, int]
"""Stretch between two beginnings of iterations, and which call of the module within it."""


class Signal:
    """In place of a tap's function: called when the call begins or ends, and given no tensor.

    Args:
        function: What to call.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function


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
        settable: Those of `begins` whose loop's number of iterations can be set.
    """

    begins: dict[str, frozenset[int]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    keys: dict[tuple[str, str, int], Key] = field(default_factory=dict)
    ends: dict[tuple[str, int], int] = field(default_factory=dict)
    settable: frozenset[str] = frozenset()

    def inside(self, port: Port) -> bool:
        """Whether iterations call a port's module.

        Args:
            port: A tensor of one call.

        Returns:
            Whether they do.
        """
        return (port.module, port.side, port.call) in self.keys

    def key(self, port: Port) -> Key:
        """Where a port's call stands; modules outside all iterations are counted through.

        Args:
            port: A tensor of one call.

        Returns:
            Its stretch, and which of the module's calls in it.
        """
        if port.side == "out":
            number = self.ends.get((port.module, port.call), port.call)
        else:
            number = port.call
        return self.keys.get((port.module, port.side, port.call), (0, number))


def schedule(trace: Trace, loop_map: LoopMap) -> Schedule:
    """Learn from a traced forward pass what begins its iterations.

    Args:
        trace: The traced forward pass.
        loop_map: Its map.

    Returns:
        The schedule.
    """
    spans = [it.span for loop in loop_map.loops for it in loop.iterations]
    looped = {call.module for a, b in spans for call in trace.calls[a:b]}
    by_loop = {loop.name: _anchors(trace, loop) for loop in loop_map.loops}
    anchors = {call.index: call for calls in by_loop.values() for call in calls}
    for loop in loop_map.loops:
        if (last := _after(trace, loop, looped)) is not None:
            anchors[last.index] = last
    begins: dict[str, set[int]] = defaultdict(set)
    for call in anchors.values():
        begins[call.module].add(call.number)
    starts = sorted(call.start for call in anchors.values())
    return Schedule(
        begins={name: frozenset(numbers) for name, numbers in begins.items()},
        calls={name: trace.counts[name] for name in begins},
        keys={
            **_keys("in", trace.calls, starts, looped),
            **_keys("out", _by_end(trace), starts, looped),
        },
        ends=_ends(_by_end(trace), looped),
        settable=frozenset(
            call.module for count in loop_map.counts for call in by_loop.get(count.loop, ())
        ),
    )


def _by_end(trace: Trace) -> list[Call]:
    return sorted(trace.calls, key=lambda call: call.end)


def _keys(
    side: str, calls: Iterable[Call], starts: Sequence[int], looped: Container[str]
) -> dict[tuple[str, str, int], Key]:
    """(module, side, call) to where it stands, for the modules that iterations call.

    Args:
        side: `in` or `out`.
        calls: All calls, in the order in which they begin (`in`) or end (`out`).
        starts: When each stretch begins.
        looped: Modules that iterations call.

    Returns:
        The places.
    """
    keys: dict[tuple[str, str, int], Key] = {}
    seen: Counter[tuple[str, int]] = Counter()
    stretch = 0
    for call in calls:
        tick = call.start if side == "in" else call.end
        while stretch < len(starts) and starts[stretch] <= tick:
            stretch += 1
        if call.module in looped:
            keys[call.module, side, call.number] = (stretch, seen[call.module, stretch])
            seen[call.module, stretch] += 1
    return keys


def _ends(calls: Iterable[Call], looped: Container[str]) -> dict[tuple[str, int], int]:
    """(module, call) to its place among the ends of a module outside, where that is another."""
    ends: dict[tuple[str, int], int] = {}
    through: Counter[str] = Counter()
    for call in calls:
        if call.module not in looped:
            if through[call.module] != call.number:
                ends[call.module, call.number] = through[call.module]
            through[call.module] += 1
    return ends


def _anchors(trace: Trace, loop: Loop) -> list[Call]:
    """The call that begins each iteration: of a module that all of them call equally often."""
    inside = [trace.calls[it.span[0] : it.span[1]] for it in loop.iterations]
    counts = [Counter(call.module for call in calls) for calls in inside]
    initial = loop.iterations[0]
    candidates = [*(unit.module for unit in initial.units), initial.h.module, *counts[0]]
    for steady in (True, False):
        for name in candidates:
            numbers = {count[name] for count in counts}
            if 0 not in numbers and (len(numbers) == 1 or not steady):
                return [next(call for call in calls if call.module == name) for calls in inside]
    firsts = [it.units[0] if it.units else it.h for it in loop.iterations]
    return [trace.numbered[first.module, first.call] for first in firsts]


def _after(trace: Trace, loop: Loop, looped: set[str]) -> Call | None:
    """The call that reads a loop's last state, where no iteration calls its module."""
    if loop.after.side == "out" or loop.after.module in looped:
        return None
    call = trace.numbered[loop.after.module, loop.after.call]
    return call if call.index >= loop.iterations[-1].span[1] else None


Tap = tuple[Port, Callable[[Tensor], Any] | Signal]
"""A tensor and what to do with it: None, or the same tensor, leaves it as it is."""


class _Run:
    """What one forward pass has called so far."""

    def __init__(self) -> None:
        self.stretch = 0  # iterations that have begun
        self.calls: dict[str, int] = {}
        self.missed: list[int] = []


@contextmanager
def tapped(
    modules: Mapping[str, nn.Module], taps: Sequence[Tap], plan: Schedule
) -> Iterator[list[int]]:
    """Within this context, each tap's function sees its tensor and may replace it.

    Only the modules that are tapped get hooks, and those that tell when an iteration begins; all
    are removed at the end whatever happens.

    Args:
        modules: Canonical name to module.
        taps: Tensors and functions.
        plan: Where the calls of a forward pass stand.

    Yields:
        A list that holds, after the forward pass, the numbers of the taps that it did not reach.

    Raises:
        LoopCountError: after a forward pass with more or fewer iterations than the example's.
    """
    sides: dict[tuple[str, str], dict[Key, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, (port, _) in enumerate(taps):
        sides[port.module, port.side][plan.key(port)].append(number)
    run, reached = _Run(), set[int]()
    reads = sum(bool(port.operand) for port, _ in taps)
    recent = RecentFunctions(reads) if reads else None
    anchors = plan.begins if any(plan.inside(port) for port, _ in taps) else {}
    looped = {port.module for port, _ in taps if plan.inside(port)}
    handles = []
    try:
        for name, numbers in anchors.items():  # first: they say in which iteration the others are
            run.calls[name] = 0
            handles.append(modules[name].register_forward_pre_hook(_anchor(run, name, numbers)))
        for (name, side), by_key in sides.items():
            count = _counter(run if name in looped else None)
            if side == "in":
                before = _before(by_key, taps, count, reached, recent)
                handles.append(modules[name].register_forward_pre_hook(before, with_kwargs=True))
            else:
                behind = _behind(by_key, taps, count, reached)
                handles.append(modules[name].register_forward_hook(behind))
        with nullcontext() if recent is None else recent:
            yield run.missed
    finally:
        for handle in handles:
            handle.remove()
    for name, times in run.calls.items():
        _check(name, times, plan)
    run.missed += [n for n in range(len(taps)) if n not in reached]


@contextmanager
def counted(modules: Mapping[str, nn.Module], plan: Schedule) -> Iterator[dict[str, int]]:
    """Within this context, the calls of what begins iterations are counted.

    Args:
        modules: Canonical name to module.
        plan: Where the calls of a forward pass stand.

    Yields:
        Calls of each module of `plan.begins`, complete after the forward pass.
    """
    run = _Run()
    handles = []
    try:
        for name, numbers in plan.begins.items():
            run.calls[name] = 0
            handles.append(modules[name].register_forward_pre_hook(_anchor(run, name, numbers)))
        yield run.calls
    finally:
        for handle in handles:
            handle.remove()


def _check(name: str, count: int, plan: Schedule) -> None:
    """Raise if what begins the iterations was called more or less often than on the example."""
    expected = plan.calls[name]
    if count == expected:
        return
    if count == 0:
        raise InputError(
            f"{name} was not called, {expected} times on the example, so no iteration was seen: "
            "compiled or scripted code calls no hooks, or the model skips its loop on this input. "
            "Use the uncompiled model, or wrap it again with this input as example=."
        )
    ways = "wrap it again with this input as example=, or measure it: ls.measure takes such texts"
    if name in plan.settable:
        ways = f"fix the number (loops=n), {ways}"
    raise LoopCountError(
        f"{name} was called {count} times, {expected} on the example: this model loops as often as "
        f"its input asks for. {ways[0].upper()}{ways[1:]}."
    )


def _anchor(run: _Run, name: str, numbers: Container[int]) -> Callable:
    def hook(module: nn.Module, args: Any) -> None:
        if run.calls[name] in numbers:
            run.stretch += 1
        run.calls[name] += 1

    return hook


def _counter(run: _Run | None) -> Callable[[], Key]:
    """Which call this is: of its stretch, or of all where there is no run."""
    last = [0, -1]

    def count() -> Key:
        now = 0 if run is None else run.stretch
        last[:] = [now, last[1] + 1 if now == last[0] else 0]
        return last[0], last[1]

    return count


def _before(
    by_key: Mapping[Key, list[int]],
    taps: Sequence[Tap],
    count: Callable[[], Key],
    reached: set[int],
    recent: RecentFunctions | None,
) -> Callable:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        replaced = None
        for number in by_key.get(count(), ()):
            reached.add(number)
            if recent is not None and taps[number][0].operand:
                _read_operand({"args": args, "kwargs": kwargs}, *taps[number], recent)
                recent.done()
                continue
            changed = _apply(replaced or {"args": args, "kwargs": kwargs}, *taps[number])
            replaced = changed if changed is not None else replaced
        return None if replaced is None else (replaced["args"], replaced["kwargs"])

    return hook


def _behind(
    by_key: Mapping[Key, list[int]],
    taps: Sequence[Tap],
    count: Callable[[], Key],
    reached: set[int],
) -> Callable:
    def hook(module: nn.Module, args: Any, result: Any) -> Any:
        replaced = None
        for number in by_key.get(count(), ()):
            reached.add(number)
            changed = _apply(result if replaced is None else replaced, *taps[number])
            replaced = changed if changed is not None else replaced
        return replaced

    return hook


def _read_operand(
    holder: Any, port: Port, function: Callable[[Tensor], Any] | Signal, recent: RecentFunctions
) -> None:
    """Show a function what one of a call's arguments was made of."""
    if isinstance(function, Signal):
        function.function()
        return
    whole = get(holder, port.where)
    part = recent.operand(whole, port.operand) if isinstance(whole, Tensor) else None
    if part is None:
        raise InputError(
            f"what call {port.call} of {port.module} is given was made otherwise on the example, "
            "so a state is missing; wrap the model again with this input as example=."
        )
    answer = function(part)
    if answer is not None and answer is not part and not answer.equal(part):
        raise InputError(
            f"the state that enters call {port.call} of {port.module} can be read there, not "
            "changed: the model's own code has used it already. Patch a module's output (hook_out) "
            "instead."
        )


def _apply(holder: Any, port: Port, function: Callable[[Tensor], Any] | Signal) -> Any:
    """The holder with a function's answer for one of its tensors; None for no change."""
    if isinstance(function, Signal):
        function.function()
        return None
    whole = get(holder, port.where)
    if not isinstance(whole, Tensor):
        raise InputError(
            f"call {port.call} of {port.module} has no tensor where the example had one; wrap the "
            "model again with an input of this kind as example=."
        )
    shown = whole if port.columns is None else whole[..., slice(*port.columns)]
    answer = function(shown)
    if answer is None or answer is shown:
        return None
    if port.columns is not None:
        part, answer = answer, whole.clone()
        answer[..., slice(*port.columns)] = part
    return put(holder, port.where, answer)


def get(holder: Any, where: tuple[Step, ...]) -> Any:
    """What stands at a place in nested arguments or results; None where there is none.

    Args:
        holder: A tensor, tuple, list, mapping or dataclass.
        where: The steps to it.

    Returns:
        What stands there.
    """
    for step in where:
        if isinstance(holder, Mapping):
            holder = holder.get(step)
        elif isinstance(step, int):
            if not isinstance(holder, tuple | list) or step >= len(holder):
                return None
            holder = holder[step]
        else:
            holder = getattr(holder, step, None)
    return holder


def put(holder: Any, where: tuple[Step, ...], value: Any) -> Any:
    """A copy of nested arguments or results with something else at one place; the form is kept.

    Args:
        holder: A tensor, tuple, named tuple, list, mapping or dataclass.
        where: The steps to the place.
        value: What shall stand there.

    Returns:
        The copy; what does not lie on the way is the same object.
    """
    if not where:
        return value
    step, rest = where[0], where[1:]
    inner = put(get(holder, (step,)), rest, value)
    if isinstance(holder, tuple) and isinstance(step, int):
        if hasattr(holder, "_fields"):  # a named tuple
            named: Any = type(holder)
            return named(*holder[:step], inner, *holder[step + 1 :])
        return (*holder[:step], inner, *holder[step + 1 :])
    twin = copy.copy(holder)
    if isinstance(holder, Mapping | list):
        twin[step] = inner
    else:
        assert is_dataclass(holder)
        object.__setattr__(twin, str(step), inner)  # frozen dataclasses too
    return twin

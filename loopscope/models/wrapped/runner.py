"""Runner: functions at chosen calls of chosen modules, for the duration of one forward pass."""

import copy
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor, nn

from loopscope.errors import InputError
from loopscope.models.wrapped.schedule import Key, Schedule
from loopscope.probes.loops.loopmap import Port, Step

Tap = tuple[Port, Callable[[Tensor], Any]]
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
        InputError: after a forward pass with more or fewer iterations than the example's.
    """
    sides: dict[tuple[str, str], dict[Key, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, (port, _) in enumerate(taps):
        sides[port.module, port.side][plan.key(port)].append(number)
    run, reached = _Run(), set[int]()
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
                before = _before(by_key, taps, count, reached)
                handles.append(modules[name].register_forward_pre_hook(before, with_kwargs=True))
            else:
                behind = _behind(by_key, taps, count, reached)
                handles.append(modules[name].register_forward_hook(behind))
        yield run.missed
    finally:
        for handle in handles:
            handle.remove()
    for name, times in run.calls.items():
        _check(name, times, plan.calls[name])
    run.missed += [n for n in range(len(taps)) if n not in reached]


def _check(name: str, count: int, wanted: int) -> None:
    """Raise if what begins the iterations was called more or less often than on the example."""
    if count == wanted:
        return
    if count == 0:
        raise InputError(
            f"{name} was not called, {wanted} times on the example, so no iteration was seen: "
            "compiled or scripted code calls no hooks, or the model skips its loop on this input. "
            "Use the uncompiled model, or wrap it again with this input as example=."
        )
    raise InputError(
        f"{name} was called {count} times, {wanted} on the example: this model loops as often as "
        "its input asks for. Fix the number (loops=n), or wrap it again with this input as "
        "example=."
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
) -> Callable:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = None
        for number in by_key.get(count(), ()):
            reached.add(number)
            changed = _apply(given or {"args": args, "kwargs": kwargs}, *taps[number])
            given = changed if changed is not None else given
        return None if given is None else (given["args"], given["kwargs"])

    return hook


def _behind(
    by_key: Mapping[Key, list[int]],
    taps: Sequence[Tap],
    count: Callable[[], Key],
    reached: set[int],
) -> Callable:
    def hook(module: nn.Module, args: Any, result: Any) -> Any:
        given = None
        for number in by_key.get(count(), ()):
            reached.add(number)
            changed = _apply(result if given is None else given, *taps[number])
            given = changed if changed is not None else given
        return given

    return hook


def _apply(holder: Any, port: Port, function: Callable[[Tensor], Any]) -> Any:
    """The holder with a function's answer for one of its tensors; None for no change."""
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

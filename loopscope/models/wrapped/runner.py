"""Runner: functions at chosen calls of chosen modules, for the duration of one forward pass."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor, nn

from loopscope.errors import InputError
from loopscope.probes.loops.loopmap import Port, Step

Tap = tuple[Port, Callable[[Tensor], Any]]
"""A tensor and what to do with it: None, or the same tensor, leaves it as it is."""


@contextmanager
def tapped(
    modules: Mapping[str, nn.Module], taps: Iterable[Tap], calls: Mapping[str, int]
) -> Iterator[None]:
    """Within this context, each tap's function sees its tensor and may replace it.

    Only the modules that are tapped get hooks, which are removed at the end whatever happens.

    Args:
        modules: Canonical name to module.
        taps: Tensors and functions.
        calls: How often each module is called in one forward pass.

    Raises:
        InputError: after a forward pass that called a tapped module more or less often.
    """
    sides: dict[tuple[str, str], dict[int, list[Tap]]] = defaultdict(lambda: defaultdict(list))
    for tap in taps:
        sides[tap[0].module, tap[0].side][tap[0].call].append(tap)
    handles, counters = [], {}
    try:
        for (name, side), by_call in sides.items():
            counters[name, side] = count = [0]
            if side == "in":
                hook = _before(by_call, count)
                handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(modules[name].register_forward_hook(_behind(by_call, count)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    for (name, _), count in counters.items():
        if count[0] != calls[name]:
            raise InputError(
                f"{name} was called {count[0]} times, {calls[name]} on the example: this model "
                "loops as often as its input asks for. Fix the number (loops=n), or wrap it again "
                "with this input as example=."
            )


def _before(by_call: Mapping[int, list[Tap]], count: list[int]) -> Callable:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        number = count[0]
        count[0] += 1
        given = None
        for port, function in by_call.get(number, ()):
            holder = given or {"args": args, "kwargs": kwargs}
            changed = _apply(holder, port, function)
            given = changed if changed is not None else given
        return None if given is None else (given["args"], given["kwargs"])

    return hook


def _behind(by_call: Mapping[int, list[Tap]], count: list[int]) -> Callable:
    def hook(module: nn.Module, args: Any, result: Any) -> Any:
        number = count[0]
        count[0] += 1
        given = None
        for port, function in by_call.get(number, ()):
            changed = _apply(result if given is None else given, port, function)
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

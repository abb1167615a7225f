"""Loop count: how a model is told how often to loop, and a context in which it is."""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from operator import index
from typing import Any

from torch import nn

from loopscope.errors import InputError, unknown_name
from loopscope.models.loops import Loop, LoopCount, LoopMap, Spec
from loopscope.models.wrapped.count_search import (
    candidates,
    entries,
    per_run,
)
from loopscope.models.wrapped.inputs import Arguments
from loopscope.names import MAIN_LOOP


@dataclass(frozen=True)
class Setting:
    """A number of iterations and how the model is told."""

    count: LoopCount
    value: int


def counts_of(
    module: nn.Module, loop_map: LoopMap, spec: Spec, example: Arguments
) -> tuple[LoopCount, ...]:
    """How the number of iterations of a model's loops is set, where it is said or plain to see.

    What a specification says comes first; else an argument of forward, an attribute of a module or
    an entry of a configuration with a usual name, whose value is the number of iterations seen.
    What a family says and this model does not have is passed over.

    Args:
        module: The model.
        loop_map: Its map.
        spec: Its specification.
        example: The arguments of the example.

    Returns:
        At most one for each loop.

    Raises:
        InputError: if the user's specification names what does not exist.
    """
    if loop_map.main is None:
        return ()
    if spec.counts and spec.source != "family":
        return tuple(_named(module, loop_map, *count) for count in spec.counts)
    by_loop = {loop: counts[0] for loop, counts in searched(module, loop_map, example).items()}
    for count in family_counts(module, loop_map, spec):
        by_loop[count.loop] = count
    return tuple(by_loop[loop.name] for loop in loop_map.loops if loop.name in by_loop)


def searched(
    module: nn.Module, loop_map: LoopMap, example: Arguments
) -> dict[str, list[LoopCount]]:
    """What may set the number of iterations of each loop, the likeliest first.

    Args:
        module: The model.
        loop_map: Its map.
        example: The arguments of the example.

    Returns:
        Candidates by the name of the loop; loops without any are missing.
    """
    return {
        loop: counts for loop, counts in candidates(module, example, loop_map).items() if counts
    }


def family_counts(module: nn.Module, loop_map: LoopMap, spec: Spec) -> list[LoopCount]:
    """What a family says that sets the number of iterations, as far as this model has it.

    Args:
        module: The model.
        loop_map: Its map.
        spec: The family's specification.

    Returns:
        The counts of loops that there are, by names that there are.
    """
    names = {None, *(loop.name for loop in loop_map.loops)}
    counts = []
    for kind, loop, name in spec.counts:
        if loop in names:
            with suppress(InputError):
                counts.append(_named(module, loop_map, kind, loop, name))
    return counts


def _named(
    module: nn.Module, loop_map: LoopMap | None, kind: Any, loop: str | None, name: str
) -> LoopCount:
    """What a specification names, checked; without a map, of a core that runs once."""
    names = [MAIN_LOOP] if loop_map is None else [found.name for found in loop_map.loops]
    if loop is not None and loop not in names:
        raise unknown_name("loop in [loops] of the specification", loop, names)
    count = LoopCount(kind=kind, name=name, loop=loop or names[0])
    if kind == "argument":
        parameters = inspect.signature(module.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if name not in parameters and not takes_any:
            raise unknown_name("argument of forward in [loops]", name, parameters)
        return count
    holder, entry = _holder(module, count)
    held = holder if isinstance(holder, Mapping) else getattr(holder, "__dict__", {})
    if entry not in held and not hasattr(holder, entry):
        numbers = [n for n, v in held.items() if type(v) is int]
        raise unknown_name(f"{kind} in [loops]", name, numbers)
    return count


def _holder(module: nn.Module, count: LoopCount) -> tuple[Any, str]:
    """The object that holds an attribute or entry, and its last name."""
    holder: Any = module
    if count.kind == "config":
        holder = getattr(module, "config", None)
        if holder is None:
            raise InputError(
                "[loops] names an entry of the configuration; the model has no config."
            )
    *path, entry = count.name.split(".")
    for step in path:
        inner = _value(holder, step)
        if inner is None:
            raise InputError(f"[loops] names {count.name!r}; there is no {step!r}.")
        holder = inner
    return holder, entry


def _value(holder: Any, name: str) -> Any:
    """What an object, a dict or a list has under a name; None where it has nothing."""
    if isinstance(holder, Mapping):
        return holder.get(name)
    if name.isdigit() and isinstance(holder, Sequence):
        return holder[int(name)]
    return getattr(holder, name, None)


def _put(holder: Any, name: str, value: Any) -> None:
    """Set an entry of an object or dict, of frozen dataclasses and the like too."""
    if isinstance(holder, MutableMapping):
        holder[name] = value
        return
    try:
        setattr(holder, name, value)
    except (AttributeError, TypeError, ValueError):  # frozen
        try:
            object.__setattr__(holder, name, value)
        except (AttributeError, TypeError) as error:
            raise InputError(
                f"{name} of {type(holder).__name__} cannot be set ({error}), so the number of "
                "iterations cannot be."
            ) from error


def settings_for(loop_map: LoopMap, loops: Any) -> tuple[Setting, ...]:
    """What to set so that loops run as often as wanted.

    Args:
        loop_map: The model's map.
        loops: Iterations of the main loop, or of each loop by name (of an inner loop: per run): any
            whole numbers, those of numpy too.

    Returns:
        The settings.

    Raises:
        InputError: for numbers below 1, loops that do not exist, and models that allow none.
    """
    if loop_map.main is None:
        raise InputError(
            "the model has no loop, so its number of iterations cannot be set. If it runs its core "
            "once by default, a spec can say what the core is: core = [...]"
        )
    by_loop = {count.loop: count for count in loop_map.counts}
    chosen = []
    for name, value in _numbers(loop_map.main.name, loops).items():
        if name not in {loop.name for loop in loop_map.loops}:
            raise unknown_name("loop", name, [loop.name for loop in loop_map.loops])
        if name not in by_loop:
            why = (
                "nothing that sets it was found; a spec can name it: [loops] argument = ..., "
                "attribute = ... or config = ..."
            )
            if loop_map.loop(name).mechanic != "module" and loop_map.loop(name).K > 1:
                why = "its iterations are distinct modules"
            raise InputError(f"the number of iterations of {name} cannot be set: {why}.")
        chosen.append(Setting(by_loop[name], value))
    return tuple(chosen)


def attempts_for(
    module: nn.Module, loop_map: LoopMap, spec: Spec, example: Arguments, loops: Any
) -> list[tuple[Setting, ...]]:
    """Settings to try, one after the other, so that loops run as often as wanted.

    Args:
        module: The model.
        loop_map: Its map.
        spec: Its specification.
        example: The arguments of the example.
        loops: As in `settings_for`.

    Returns:
        What the map says, then each other candidate for one loop in its place; no other where the
        user's specification names what sets it.

    Raises:
        InputError: as `settings_for`.
    """
    first = settings_for(loop_map, loops)
    if spec.counts and spec.source != "family":
        return [first]
    others = searched(module, loop_map, example)
    return [
        first,
        *(
            tuple(Setting(count, s.value) if s is setting else s for s in first)
            for setting in first
            for count in others.get(setting.count.loop, ())
            if count != setting.count
        ),
    ]


def settings_of_one_run(
    module: nn.Module, spec: Spec, example: Arguments, loops: Any
) -> list[tuple[Setting, ...]]:
    """What may set the number of iterations of a core that runs once, so that no loop shows.

    Args:
        module: The model.
        spec: Its specification.
        example: The arguments of the example.
        loops: Iterations of the main loop.

    Returns:
        Settings to try, one after the other: what the specification names, then arguments,
        attributes and entries with a usual name that are 1 or left to the model.
    """
    numbers = _numbers(MAIN_LOOP, loops)
    if list(numbers) != [MAIN_LOOP]:
        return []
    counts = []
    for kind, loop, name in spec.counts:
        with suppress(InputError):
            counts.append(_named(module, None, kind, loop, name))
    found = [entry for entry in entries(module, example) if entry.value in (1, None)]
    counts += [LoopCount(kind=e.kind, name=e.path, loop=MAIN_LOOP) for e in found]
    return [(Setting(count, numbers[MAIN_LOOP]),) for count in dict.fromkeys(counts)]


def _numbers(main: str, loops: Any) -> dict[str, int]:
    """Numbers of iterations by loop."""
    numbers = dict(loops) if isinstance(loops, Mapping) else {main: loops}
    if not numbers:
        raise InputError("loops names no loop; give a number, or numbers by the loops' names.")
    return {name: _whole(value) for name, value in numbers.items()}


def without_effect(
    first: LoopMap, second: LoopMap, settings: tuple[Setting, ...]
) -> list[tuple[Setting, float]]:
    """Numbers of iterations that were set and are not what came out.

    Args:
        first: The map before.
        second: The map of the model with the settings.
        settings: The settings.

    Returns:
        Those without effect, and how often the loop ran, in each run of the one around it.
    """
    wanted = {setting.count.loop: setting.value for setting in settings}
    wrong = []
    for setting in settings:
        name = setting.count.loop
        loop = next((loop for loop in second.loops if loop.name == name), None)
        ran = float(1 if loop is None else loop.K)
        if loop is not None and loop.parent is not None:
            ran /= second.loop(loop.parent).K
        fits = ran == setting.value
        if first.main is not None and not (loop and fits):  # what runs once is no loop any more
            fits = _called_as_often(first, second, name, wanted)
        if not fits:
            wrong.append((setting, ran))
    return wrong


def with_effective(loop_map: LoopMap, settings: tuple[Setting, ...]) -> LoopMap:
    """A map whose counts are those that were seen to set the numbers of iterations.

    Args:
        loop_map: The map of the model with the settings.
        settings: The settings, which have an effect.

    Returns:
        The map; loops that nothing was set for keep their counts.
    """
    by_loop = {count.loop: count for count in loop_map.counts}
    by_loop |= {setting.count.loop: setting.count for setting in settings}
    counts = tuple(by_loop[loop.name] for loop in loop_map.loops if loop.name in by_loop)
    return replace(loop_map, counts=counts)


def _called_as_often(first: LoopMap, second: LoopMap, name: str, wanted: Mapping[str, int]) -> bool:
    """Whether a loop's modules are called as often as the numbers wanted make it."""
    expected: dict[str, float] = dict(first.calls)
    for loop in first.loops:  # one module may update the states of several
        for module, calls in _own_calls(first, loop).items():
            expected[module] += calls * (_iterations(first, loop, wanted) - loop.K) / loop.K
    modules = _own_calls(first, first.loop(name))
    return bool(modules) and all(second.calls.get(m, 0) == expected[m] for m in modules)


def _own_calls(loop_map: LoopMap, loop: Loop) -> dict[str, int]:
    """How often a loop calls each module in all its iterations, its inner loops' calls aside."""
    count: Counter[str] = Counter(
        unit.module for iteration in loop.iterations for unit in iteration.units
    )
    for child in loop_map.loops:
        if child.parent == loop.name:
            count.subtract(unit.module for it in child.iterations for unit in it.units)
    return {module: calls for module, calls in count.items() if calls > 0}


def _iterations(loop_map: LoopMap, loop: Loop, wanted: Mapping[str, int]) -> float:
    """How often a loop runs in all, with the numbers wanted."""
    total, around = 1.0, loop
    while True:
        total *= wanted.get(around.name) or per_run(loop_map, around) or 0
        if around.parent is None:
            return total
        around = loop_map.loop(around.parent)


def refusal(
    module: nn.Module, look: LoopMap, wrong: list[tuple[Setting, float]], example: Arguments
) -> InputError:
    """The error for a number of iterations that was set and has no effect.

    Args:
        module: The model.
        look: Its map, without the setting.
        wrong: What `without_effect` gave.
        example: The arguments of the example.

    Returns:
        The error, with what else may set it.
    """
    (setting, ran), *_ = wrong
    count = setting.count
    others = [
        entry.path
        for entry in entries(module, example, [loop.name for loop in look.loops])
        if entry.path != count.name
    ]
    more = f" Whole numbers with usual names are {', '.join(others[:8])}." if others else ""
    return InputError(
        f"{count.kind} {count.name} was set to {setting.value}, and {count.loop} ran {ran:g} "
        "times; it does not set the number of iterations. Name what does in a spec: [loops] "
        f"argument = ..., attribute = ... or config = ...{'.' if more else ''}{more}"
    )


def _whole(value: Any) -> int:
    try:
        number = 0 if isinstance(value, bool) else index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise InputError(f"loops must be whole numbers of at least 1, given {value!r}.")
    return number


def as_arguments(settings: tuple[Setting, ...]) -> dict[str, int]:
    """The settings that are arguments of forward.

    Args:
        settings: Numbers of iterations that are set.

    Returns:
        Number by argument.
    """
    return {
        setting.count.name: setting.value
        for setting in settings
        if setting.count.kind == "argument"
    }


@contextmanager
def looping(module: nn.Module, settings: tuple[Setting, ...]) -> Iterator[None]:
    """Within this context attributes and configuration are as set.

    Args:
        module: The model.
        settings: Numbers of iterations that are set.

    Returns:
        The context.
    """
    before = []
    try:
        for setting in settings:
            if setting.count.kind == "argument":
                continue
            holder, entry = _holder(module, setting.count)
            before.append((holder, entry, _value(holder, entry)))
            _put(holder, entry, setting.value)
        yield
    finally:
        for holder, entry, value in reversed(before):
            _put(holder, entry, value)

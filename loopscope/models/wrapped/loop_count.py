"""Loop count: how a model is told how often to loop, and a context in which it is."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
from typing import Any

from torch import Tensor, nn

from loopscope.errors import InputError, unknown_name
from loopscope.models.loops import Loop, LoopCount, LoopMap, Spec

ARGUMENTS = ("num_steps", "num_loops", "n_loops", "n_loop", "loops", "num_recur", "num_iterations",
             "n_iterations", "num_recurrences", "loop_count", "steps")  # fmt: skip
"""Names under which models take their number of iterations."""

ATTRIBUTES = (
    *ARGUMENTS, "total_ut_steps", "num_rec", "recurrence", "n_recurrence", "n_iter", "num_iters",
    "K", "n_steps", "max_loops", "loop_num", "n_cycles", "num_cycles",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A number of iterations and how the model is told."""

    count: LoopCount
    value: int


def counts_of(module: nn.Module, loop_map: LoopMap, spec: Spec) -> tuple[LoopCount, ...]:
    """How the number of iterations of a model's loops is set, where it is said or plain to see.

    What a specification says comes first; else an argument of forward, an attribute of a module or
    an entry of the configuration with a usual name, whose value is the number of iterations found.

    Args:
        module: The model.
        loop_map: Its map.
        spec: Its specification.

    Returns:
        At most one for each loop.

    Raises:
        InputError: if the specification names what does not exist.
    """
    main = loop_map.main
    if main is None:
        return ()
    if spec.counts:
        names = {None, *(loop.name for loop in loop_map.loops)}
        counts = [c for c in spec.counts if spec.source != "family" or c[1] in names]
        return tuple(_named(module, loop_map, *count) for count in counts)
    distinct = main.mechanic != "module" and main.K > 1
    if distinct or any(loop.parent is None for loop in loop_map.loops[1:]):
        return ()
    count = _usual(module, main)
    return () if count is None else (count,)


def _usual(module: nn.Module, main: Loop) -> LoopCount | None:
    """An argument, attribute or entry with a usual name that counts the main loop."""
    parameters = inspect.signature(module.forward).parameters
    for name in ARGUMENTS:
        if name in parameters and isinstance(parameters[name].default, int | type(None)):
            return LoopCount(kind="argument", name=name, loop=main.name)
    for prefix, holder in _holders(module):
        for name in ATTRIBUTES:
            if type(holder.get(name)) is int and holder[name] == main.K:
                where = f"{prefix}.{name}" if prefix else name
                return LoopCount(kind="attribute", name=where, loop=main.name)
    config = getattr(module, "config", None)
    for name in ATTRIBUTES:
        if type(getattr(config, name, None)) is int and getattr(config, name) == main.K:
            return LoopCount(kind="config", name=name, loop=main.name)
    return None


def _holders(module: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Attributes of every module, then of the plain objects that modules hold."""
    parts = list(module.named_modules())
    for prefix, part in parts:
        yield prefix, vars(part)
    config = getattr(module, "config", None)
    for prefix, part in parts:
        for name, value in vars(part).items():
            plain = hasattr(value, "__dict__") and not isinstance(value, type | Tensor | nn.Module)
            if plain and value is not config and not callable(value):
                yield f"{prefix}.{name}".lstrip("."), vars(value)


def _named(
    module: nn.Module, loop_map: LoopMap, kind: Any, loop: str | None, name: str
) -> LoopCount:
    names = [candidate.name for candidate in loop_map.loops]
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
    if not hasattr(holder, entry):
        numbers = [n for n, v in vars(holder).items() if type(v) is int]
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
        inner = holder[int(step)] if step.isdigit() else getattr(holder, step, None)
        if inner is None:
            raise InputError(f"[loops] names {count.name!r}; there is no {step!r}.")
        holder = inner
    return holder, entry


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
    numbers = dict(loops) if isinstance(loops, Mapping) else {loop_map.main.name: loops}
    if not numbers:
        names = ", ".join(loop.name for loop in loop_map.loops)
        raise InputError(f"loops names no loop; give a number, or one for some of {names}.")
    by_loop = {count.loop: count for count in loop_map.counts}
    chosen = []
    for name, value in numbers.items():
        if name not in {loop.name for loop in loop_map.loops}:
            raise unknown_name("loop", name, [loop.name for loop in loop_map.loops])
        value = _whole(value)
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
            before.append((holder, entry, getattr(holder, entry)))
            setattr(holder, entry, setting.value)
        yield
    finally:
        for holder, entry, value in reversed(before):
            setattr(holder, entry, value)

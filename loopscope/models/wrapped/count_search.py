"""Count search: which argument, attribute or entry says how often a loop runs, by its name."""

import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from operator import index
from types import ModuleType
from typing import Any, Literal

from torch import Tensor, nn

from loopscope.errors import InputError
from loopscope.models.loops import Loop, LoopCount, LoopMap
from loopscope.models.wrapped.inputs import Arguments
from loopscope.models.wrapped.token_places import TARGETS

KNOWN = (
    "num_steps", "num_loops", "n_loops", "n_loop", "loops", "num_recur", "num_iterations",
    "n_iterations", "num_recurrences", "loop_count", "steps", "total_ut_steps", "num_rec",
    "recurrence", "n_recurrence", "n_iter", "num_iters", "K", "n_steps", "max_loops", "loop_num",
    "n_cycles", "num_cycles",
)  # fmt: skip
"""Names under which models take or keep their number of iterations; the likelier first."""

_COUNTED = frozenset({
    "loop", "loops", "recur", "recurs", "recurrence", "recurrences", "recursion", "recursions",
    "rec", "cycle", "cycles", "iter", "iters", "iteration", "iterations", "repeat", "repeats",
    "repetition", "repetitions", "step", "steps", "round", "rounds", "pass", "passes", "segment",
    "segments", "unroll", "unrolls", "refinement", "refinements", "tick", "ticks", "hop", "hops",
    "times",
})  # fmt: skip
_QUALIFIERS = frozenset({
    "n", "num", "nb", "number", "no", "of", "to", "do", "max", "total", "mean", "default", "eval",
    "test", "infer", "inference", "count", "depth", "core", "block", "recurrent", "recursive",
    "recurrence", "ut", "latent", "thinking", "think", "reasoning", "refine", "refinement",
    "inner", "outer", "slow", "fast", "high", "low", "halt", "act", "ponder", "supervision",
    "iter", "loop", "h", "l",
})  # fmt: skip
_LEVELS = {"h": {"high", "slow"}, "l": {"low", "fast"}}
"""What else a loop of this name is called in the names of counts."""
_OUTER = frozenset({"outer", "halt", "act", "ponder", "supervision", "segment", "segments"})
_LETTERS = ("K", "T")
_DEEPEST, _LARGEST = 3, 1000
"""How many objects within objects are looked through, and how many of them and of their entries."""
_TORCH = frozenset(vars(nn.Module()))

Kind = Literal["argument", "attribute", "config"]


@dataclass(frozen=True)
class Entry:
    """A number that may say how often a loop runs.

    Attributes:
        kind: `argument` of forward, `attribute` of a module or of an object that one holds, or
            entry of the model's `config`.
        path: The argument, or where the number stands: `inner.config.H_cycles`.
        value: Its value; None for an argument that the example leaves to the model.
    """

    kind: Kind
    path: str
    value: int | None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    def count(self, loop: Loop) -> LoopCount:
        """The entry as what sets a loop's number of iterations.

        Args:
            loop: The loop.

        Returns:
            How its number is set.
        """
        return LoopCount(kind=self.kind, name=self.path, loop=loop.name)


def words(name: str) -> list[str]:
    """The words of an identifier: `H_cycles` and `numLoops` are two each.

    Args:
        name: The identifier.

    Returns:
        Its words in lower case.
    """
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def counts_iterations(name: str, loops: Collection[str] = ()) -> bool:
    """Whether a name is a usual one for a number of iterations.

    Args:
        name: An argument, attribute or entry.
        loops: Names of the model's loops, which may be part of it.

    Returns:
        True for `n_loops`, `H_cycles`, `halt_max_steps`; not for `warmup_steps` or `n_layers`.
    """
    if name in KNOWN or name in _LETTERS:
        return True
    parts = words(name)
    usual = _COUNTED | _QUALIFIERS | {loop.lower() for loop in loops}
    fits = all(part in usual or len(part) == 1 for part in parts)
    return fits and any(part in _COUNTED for part in parts)


def per_run(loop_map: LoopMap, loop: Loop) -> int | None:
    """How often a loop runs in each run of the loop around it.

    Args:
        loop_map: The map.
        loop: One of its loops.

    Returns:
        The number; None where the runs differ.
    """
    runs = 1 if loop.parent is None else loop_map.loop(loop.parent).K
    return None if loop.K % runs else loop.K // runs


def entries(module: nn.Module, example: Arguments, loops: Collection[str] = ()) -> list[Entry]:
    """All whole numbers with a usual name that a model is given or holds.

    Args:
        module: The model.
        example: The arguments of the example.
        loops: Names of the model's loops.

    Returns:
        Arguments of forward, attributes of modules, then those of plain objects and dicts that
        modules hold, then entries of the configuration.
    """
    every = (*_arguments(module, example), *_held(module))
    return [entry for entry in every if counts_iterations(entry.name, loops)]


def _arguments(module: nn.Module, example: Arguments) -> Iterator[Entry]:
    """Arguments of forward that are whole numbers, or may be."""
    args, kwargs = example
    parameters = inspect.signature(module.forward).parameters
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    for name, value in (defaults | given).items():
        if _is_count(value):
            yield Entry("argument", name, int(value))
        elif value is None:
            yield Entry("argument", name, None)


def _held(module: nn.Module) -> Iterator[Entry]:
    """Attributes of every module, of the plain objects that modules hold, and of `config`."""
    parts = list(module.named_modules())
    for prefix, part in parts:
        for name, value in vars(part).items():
            if _is_count(value):
                yield Entry("attribute", f"{prefix}.{name}".lstrip("."), int(value))
    config = getattr(module, "config", None)
    seen = {id(config)}
    for prefix, part in parts:
        for name, value in vars(part).items():
            if name not in _TORCH:
                yield from _inside("attribute", value, f"{prefix}.{name}".lstrip("."), seen)
    if config is not None:
        seen.discard(id(config))
        yield from _inside("config", config, "", seen)


def _inside(
    kind: Kind, holder: Any, path: str, seen: set[int], depth: int = _DEEPEST
) -> Iterator[Entry]:
    """The numbers in a plain object or dict, its own first."""
    items = _items(holder)
    if not items or not depth or id(holder) in seen or len(items) + len(seen) > _LARGEST:
        return
    seen.add(id(holder))
    named = {f"{path}.{name}".lstrip("."): value for name, value in items.items()}
    for where, value in named.items():
        if _is_count(value):
            yield Entry(kind, where, int(value))
    for where, value in named.items():
        yield from _inside(kind, value, where, seen, depth - 1)


def _items(holder: Any) -> dict[str, Any]:
    """What a plain object or a dict with names holds; nothing for all else."""
    if isinstance(holder, type | Tensor | nn.Module | ModuleType):
        return {}
    if isinstance(holder, Mapping):
        items = {n: v for n, v in holder.items() if isinstance(n, str) and n.isidentifier()}
        return items if len(items) == len(holder) else {}
    return {} if callable(holder) else dict(getattr(holder, "__dict__", {}))


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def with_needed_counts(module: nn.Module, example: Arguments, loops: Any) -> Arguments:
    """An example with the number of iterations that forward needs and the example lacks.

    Args:
        module: The model.
        example: Arguments of its forward.
        loops: What was asked for: a number, or numbers by loop; None for nothing.

    Returns:
        The arguments, with the number where `loops` gives it. It is at least 2, since what runs
        once shows no loop.

    Raises:
        InputError: for arguments that forward needs and nobody gives.
    """
    args, kwargs = example
    try:
        inspect.signature(module.forward, follow_wrapped=False).bind(*args, **kwargs)
    except TypeError:
        pass
    else:
        return example
    parameters = [
        parameter
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    missing = [p.name for p in parameters[len(args) :] if p.default is p.empty]
    # targets are given by `Inputs.targeted`, as are the tokens
    missing = [name for name in missing if name not in kwargs and name not in TARGETS]
    named = loops if isinstance(loops, Mapping) else ()
    counts = [name for name in missing if counts_iterations(name, named)]
    numbers = {name: _asked_for(name, counts, loops) for name in counts}
    given = {name: max(2, number) for name, number in numbers.items() if number is not None}
    if lacking := [name for name in missing if name not in given]:
        raise _lacking(lacking, example, parameters)
    return args, {**kwargs, **given}


def _asked_for(name: str, counts: Collection[str], loops: Any) -> int | None:
    """What a user's `loops` says of one of the arguments that count iterations."""
    if not isinstance(loops, Mapping):
        return _integer(loops) if len(counts) == 1 else None
    parts = set(words(name))
    for loop, number in loops.items():
        means = {loop.lower(), *_LEVELS.get(loop.lower(), ())}
        if parts & means or len(counts) == len(loops) == 1:
            return _integer(number)
    return None


def _integer(value: Any) -> int | None:
    try:
        return index(value)
    except TypeError:
        return None


def _lacking(
    lacking: list[str], example: Arguments, parameters: list[inspect.Parameter]
) -> InputError:
    """The error for arguments that forward needs and the example lacks."""
    args, kwargs = example
    names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    counts = [name for name in lacking if counts_iterations(name)]
    shown = {name: "tokens" if i == 0 else "..." for i, name in enumerate(names[: len(args)])}
    shown |= dict.fromkeys(kwargs, "...") | {n: "4" if n in counts else "..." for n in lacking}
    if not kwargs and names[: len(shown)] == list(shown):
        form = f"({', '.join(shown.values())})"
    else:
        form = "{" + ", ".join(f'"{name}": {value}' for name, value in shown.items()) + "}"
    means = f"forward needs {', '.join(lacking)} too"
    if counts and len(counts) == len(lacking):
        numbers = "the number" if len(counts) == 1 else "the numbers"
        means += f", {numbers} of iterations"
    short = ", or loops=4 (--loops 4)" if len(counts) == len(lacking) == 1 else ""
    return InputError(
        f"{means}: give example={form}{short}. On the command line an example is --example FILE, "
        "or a factory that returns (model, example)."
    )


def candidates(
    module: nn.Module, example: Arguments, loop_map: LoopMap
) -> dict[str, list[LoopCount]]:
    """What may set the number of iterations of each loop, the likeliest first.

    An attribute must have the number that was seen as its value, per run of the enclosing loop. A
    name that says which loop it means (`H_cycles`, `low_cycles`, `outer_steps`) comes before one
    that does not; where two loops run equally often, such a one is taken for the main loop.

    Args:
        module: The model.
        example: The arguments of the example.
        loop_map: Its map.

    Returns:
        Candidates by the name of the loop; loops whose iterations are distinct modules have none.
    """
    fits: dict[str, list[LoopCount]] = {}
    every = entries(module, example, [loop.name for loop in loop_map.loops])
    settable = [loop for loop in loop_map.loops if loop.mechanic == "module" or loop.K == 1]
    counts = {loop.name: per_run(loop_map, loop) for loop in settable}
    named = {
        entry: [loop.name for loop in loop_map.loops if _names(entry, loop, loop_map)]
        for entry in every
    }
    for loop in settable:
        K = counts[loop.name]
        own = [e for e in every if loop.name in named[e] and e.value in (K, None)]
        fits[loop.name] = [entry.count(loop) for entry in sorted(own, key=partial(_rank, K=K))]
    open_loops = {name: K for name, K in counts.items() if not fits[name]}
    for loop in settable:
        K = counts[loop.name]
        others = [name for name in open_loops if name != loop.name and open_loops[name] == K]
        alone = sum(other.parent is None for other in loop_map.loops) == 1
        main = alone and loop is loop_map.main
        own = [
            entry
            for entry in every
            if not named[entry]
            and ((entry.value == K and (main or not others)) or (main and entry.kind == "argument"))
        ]
        fits[loop.name] += [entry.count(loop) for entry in sorted(own, key=partial(_rank, K=K))]
    return fits


def _names(entry: Entry, loop: Loop, loop_map: LoopMap) -> bool:
    """Whether the name of a number says that it counts this loop."""
    parts = set(words(entry.name))
    name = loop.name.lower()
    if parts & {name, *_LEVELS.get(name, ())}:
        return True
    inner = any(other.parent == loop.name for other in loop_map.loops)
    if loop.parent is None:
        return inner and bool(parts & _OUTER)
    return not inner and "inner" in parts


def _rank(entry: Entry, K: int | None) -> tuple[int, int, int]:
    """The likelier, the smaller: arguments, then attributes, then entries; known names first."""
    if entry.kind == "argument":
        sure = 0 if entry.value == K else 1 if not entry.value or entry.value < 1 else 4
    else:
        sure = 2 if entry.kind == "attribute" else 3
    known = KNOWN.index(entry.name) if entry.name in KNOWN else len(KNOWN)
    return sure, known + (entry.name in _LETTERS), entry.path.count(".")

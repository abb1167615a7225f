"""Spec: what a user says about a model's loop where finding it by itself is not enough."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from loopscope.errors import InputError, unknown_name
from loopscope.models.loops.loop_map import Loop, LoopMap, Unit

KEYS = (
    "prelude", "core", "coda", "embed", "head", "gates", "states", "state", "routers", "loops",
)  # fmt: skip
CARRIED = "previous output"
"""As `state.input`: h(t) is the output of the iteration before."""

STATE, ROUTERS, COUNTS = (
    ("input", "columns", "output"),
    ("write", "read"),
    ("argument", "attribute", "config"),
)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Names of a model's parts, each the canonical name of a module.

    Attributes:
        prelude, core, coda: Modules of the roles; None or empty where finding decides.
        iterations: The modules of each iteration, where they are listed one by one.
        embed: The module that gives h_emb.
        head: The module or the parameter that gives the logits.
        states: Name of the state that each call of the core updates, in the order of one iteration
            of the outermost loop.
        input, columns, output: Which module reads the state, which part of its last axis, and
            which module gives h_m.
        carried: Whether the state is the output of the iteration before, whatever is added to it
            before a module sees it.
        write, read, gates: Routers and gates.
        counts: (kind, loop or None, name) of what sets the number of iterations.
        source: Who says so.
    """

    prelude: tuple[str, ...] | None = None
    core: tuple[str, ...] = ()
    iterations: tuple[tuple[str, ...], ...] = ()
    coda: tuple[str, ...] | None = None
    embed: str | None = None
    head: str | None = None
    states: tuple[str, ...] = ()
    input: str | None = None
    carried: bool = False
    columns: tuple[int, int] | None = None
    output: str | None = None
    write: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    counts: tuple[tuple[str, str | None, str], ...] = ()
    source: str = "found"
    given: Mapping[str, Any] = field(default_factory=dict)

    def pick(
        self, role: str, units: tuple[Unit, ...], counts: Mapping[str, int]
    ) -> tuple[Unit, ...]:
        """The units of a role: those named, or those found where nothing is said.

        Args:
            role: `prelude` or `coda`.
            units: The units found before or after the loops.
            counts: How often each module is called.

        Returns:
            The units, in order of execution.

        Raises:
            InputError: if a module named is not run there.
        """
        names = self.prelude if role == "prelude" else self.coda
        if names is None:
            return units
        modules = {unit.module for unit in units}
        for name in names:
            if name not in modules:
                never = "" if counts.get(name) else ", and is never called"
                raise InputError(
                    f"{role} of the specification names {name!r}, which does not run "
                    f"{'before' if role == 'prelude' else 'after'} the loop{never}. There run: "
                    f"{', '.join(sorted(modules)) or 'none'}."
                )
        return tuple(unit for unit in units if unit.module in names)


def read_spec(
    spec: str | Path | Mapping[str, Any] | None, module: nn.Module, *, source: str = "spec"
) -> Spec:
    """Read a specification and check every name in it against a model.

    Args:
        spec: A TOML file, or its content as a dict; None says nothing.
        module: The model.
        source: Who gives it.

    Returns:
        The specification, globs expanded.

    Raises:
        InputError: for a file that cannot be read, keys that do not exist, values of another type,
            and modules that the model does not have.
    """
    if spec is None:
        return Spec()
    what = "the specification" if isinstance(spec, Mapping) else str(spec)
    values = _read(spec)
    state, routers, loops = _tables(values, what)
    names = _Names(module, what)
    core = values.get("core", [])
    listed = bool(core) and isinstance(core, list) and all(isinstance(c, list) for c in core)
    iterations = tuple(names.calls("core", modules) for modules in core) if listed else ()
    carried = state.get("input") == CARRIED
    return Spec(
        prelude=names.modules("prelude", values["prelude"]) if "prelude" in values else None,
        core=() if listed else names.modules("core", core),
        iterations=iterations,
        coda=names.modules("coda", values["coda"]) if "coda" in values else None,
        embed=names.module("embed", values.get("embed")),
        head=_head(values.get("head"), module, names),
        states=_states(values.get("states", []), what),
        input=None if carried else names.module("state.input", state.get("input")),
        carried=carried,
        columns=_columns(state.get("columns"), what),
        output=names.module("state.output", state.get("output")),
        write=names.modules("routers.write", routers.get("write", [])),
        read=names.modules("routers.read", routers.get("read", [])),
        gates=names.modules("gates", values.get("gates", [])),
        counts=_counts(loops, what),
        source=source,
        given=dict(values),
    )


def _head(value: Any, module: nn.Module, names: "_Names") -> str | None:
    """The module that a name stands for, or the parameter or buffer of that name."""
    tensors = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if isinstance(value, str) and value in tensors:
        return value
    return names.module("head", value)


def _read(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    try:
        return tomllib.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"the specification {source} cannot be read: {error.strerror}. `loopscope inspect "
            "MODEL --write-spec FILE` writes one to start from."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"the specification {source} is no TOML: {error}.") from error


def _tables(values: Mapping[str, Any], what: str) -> list[Mapping[str, Any]]:
    """The tables `state`, `routers` and `loops`; empty where missing, all keys checked."""
    _only(values, KEYS, what)
    keys = {"state": STATE, "routers": ROUTERS, "loops": COUNTS}
    tables = {name: values.get(name, {}) for name in keys}
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise InputError(f"{what}: {name} must be a table with {', '.join(keys[name])}.")
        _only(table, keys[name], f"[{name}] of {what}")
    return list(tables.values())


def _only(values: Mapping[str, Any], keys: Sequence[str], what: str) -> None:
    for key in values:
        if key not in keys:
            raise unknown_name(f"key in {what}", key, keys)


def _columns(value: Any, what: str) -> tuple[int, int] | None:
    if value is None:
        return None
    numbers = list(value) if isinstance(value, list | tuple) else []
    if (
        len(numbers) != 2
        or not all(type(n) is int for n in numbers)
        or not 0 <= numbers[0] < numbers[1]
    ):
        raise InputError(
            f"state.columns of {what} must be two numbers, first and last + 1 of the last axis "
            f"(such as [0, 64]), given {value!r}."
        )
    return numbers[0], numbers[1]


def _states(value: Any, what: str) -> tuple[str, ...]:
    names = tuple(value) if isinstance(value, list | tuple) else ("",)
    if not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise InputError(
            f"states of {what} must list a name for each call of the core in one iteration, such "
            f'as ["z_L", "z_L", "z_H"], given {value!r}.'
        )
    return names


def _counts(values: Mapping[str, Any], what: str) -> tuple[tuple[str, str | None, str], ...]:
    counts: list[tuple[str, str | None, str]] = []
    for kind, value in values.items():
        table = value if isinstance(value, Mapping) else {None: value}
        for loop, name in table.items():
            if not isinstance(name, str):
                raise InputError(
                    f"loops.{kind} of {what} must be a name, or a table of loop = name, given "
                    f"{value!r}."
                )
            counts.append((kind, loop, name))
    return tuple(counts)


class _Names:
    """Expands globs of module names and knows aliases."""

    def __init__(self, module: nn.Module, what: str) -> None:
        first = {id(m): name for name, m in module.named_modules()}
        every = module.named_modules(remove_duplicate=False)
        self.canonical = {name: first[id(m)] for name, m in every if name}
        self.what = what

    def calls(self, key: str, values: Any) -> tuple[str, ...]:
        """The modules that are called one after the other, some of them several times."""
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list | tuple):
            return self.modules(key, values)
        return tuple(name for value in values for name in self.modules(key, [value]))

    def modules(self, key: str, values: Any) -> tuple[str, ...]:
        """The modules that a list of names and globs stands for, each once."""
        if isinstance(values, str):
            values = [values]
        if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
            raise InputError(
                f"{key} of {self.what} must be a list of module names, given {values!r}."
            )
        modules: dict[str, None] = {}
        for value in values:
            fits = [n for n in self.canonical if n == value]
            if not fits and re.search(r"[*?[]", value):
                depth = value.count(".")
                fits = [
                    n for n in self.canonical if n.count(".") == depth and fnmatchcase(n, value)
                ]
            if not fits:
                raise unknown_name(
                    f"module in {key} of {self.what}", value, self.canonical,
                    hint="Is it the specification of another model?",
                )  # fmt: skip
            modules |= dict.fromkeys(self.canonical[n] for n in fits)
        return tuple(modules)

    def module(self, key: str, value: Any) -> str | None:
        """The module that a name stands for; None where there is no name."""
        if value is None:
            return None
        modules = self.modules(key, value)
        if not isinstance(value, str) or len(modules) != 1:
            raise InputError(f"{key} of {self.what} must be one module's name, given {value!r}.")
        return modules[0]


def to_toml(loop_map: LoopMap) -> str:
    """A map as a specification to start from.

    Args:
        loop_map: The map.

    Returns:
        TOML that `read_spec` reads; with it the same model gives the same map.
    """
    main = loop_map.main
    lines = [
        "# How this model loops. Change what is wrong and pass the file with --spec (or spec=...).",
        "# Names are modules (named_modules); * and ? stand for parts of a name.",
        f"# Found: {loop_map}",
        f"prelude = {_list(unit.module for unit in loop_map.prelude)}",
    ]
    alone = len([loop for loop in loop_map.loops if loop.parent is None]) == 1
    if main is not None:
        lines.append(_core_line(main, alone))
    if main is not None and len(main.named) > 1:
        lines.append(_states_line(main, loop_map))
    lines.append(f"coda = {_list(unit.module for unit in loop_map.coda)}")
    if loop_map.source == "spec" and (head := loop_map.head or loop_map.head_weight):
        lines.append(f"head = {_text(head)}")
    gates = [p.module for r in loop_map.routers if r.kind == "gate" for p in r.outputs if p]
    lines.append(f"gates = {_list(gates)}")
    if main is not None:
        lines += _state_lines(main, alone)
    lines += [*_router_lines(loop_map), *_count_lines(loop_map)]
    return "\n".join(lines) + "\n"


def _core_line(main: Loop, alone: bool) -> str:
    names = [list(dict.fromkeys(unit.module for unit in it.units)) for it in main.iterations]
    if not alone:
        return f"# core = {_list(names[0])}  # only this loop; there are several"
    if main.mechanic == "module":
        return f"core = {_list(name for modules in names for name in modules)}  # repeated"
    return f"core = [{', '.join(_list(modules) for modules in names)}]  # one list per iteration"


def _states_line(main: Loop, loop_map: LoopMap) -> str:
    """The state that each call updates in the first iteration, by the outputs of all loops."""
    updates = {
        (port.module, port.call): state.name
        for loop in reversed(loop_map.loops)  # what an inner loop updates is its own state
        for state in loop.named
        for port in state.h_m
    }
    first = main.iterations[0]
    names = [updates.get((unit.module, unit.call), "") for unit in first.units]
    line = f"states = [{', '.join(_text(name) for name in names)}]  # that each call updates"
    return line if all(names) else f"# {line}"


def _state_lines(main: Loop, alone: bool) -> list[str]:
    """The table `state`, as a comment where the core is not said by its modules."""
    first = main.iterations[0]
    mark = "" if main.mechanic == "module" and alone and not main.named else "# "
    carried = main.K > 1 and main.iterations[1].h == first.h_m
    lines = ["", "[state]  # h(t) is what `input` is given, h_m(t) what `output` gives"]
    lines.append(f"{mark}input = {_text(CARRIED if carried else first.h.module)}")
    if first.h.columns is not None:
        lines.append(f"{mark}columns = {list(first.h.columns)}  # of the last axis")
    lines.append(f"{mark}output = {_text(first.h_m.module)}")
    return lines


def _router_lines(loop_map: LoopMap) -> list[str]:
    """The table `routers`; nothing where there are none."""
    kinds = {kind: [r for r in loop_map.routers if r.kind == kind] for kind in ("write", "read")}
    if not any(kinds.values()):
        return []
    lines = ["", "[routers]"]
    for kind, routers in kinds.items():
        every = [p.module for r in routers for p in (r.transition, *r.outputs) if p]
        lines.append(f"{kind} = {_list(every)}")
    return lines


def _count_lines(loop_map: LoopMap) -> list[str]:
    """The table `loops`: what sets the number of iterations."""
    lines = ["", "[loops]  # how the number of iterations is set: argument, attribute or config"]
    for kind in COUNTS:
        counts = [count for count in loop_map.counts if count.kind == kind]
        if not counts:
            continue
        table = ", ".join(f"{count.loop} = {_text(count.name)}" for count in counts)
        alone = len(loop_map.loops) == 1
        lines.append(f"{kind} = {_text(counts[0].name)}" if alone else f"{kind} = {{ {table} }}")
    if not loop_map.counts:
        lines.append('# argument = "num_steps"')
    return lines


def _list(names: Any) -> str:
    return "[" + ", ".join(_text(name) for name in dict.fromkeys(names)) + "]"


def _text(name: str) -> str:
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'

"""States: which tensors of a traced loop enter and leave its iterations."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loopscope.errors import InputError
from loopscope.models.loops.loop_map import Port
from loopscope.models.loops.ports import equal, port
from loopscope.models.loops.spec import Spec
from loopscope.models.loops.tracing import Call, Found
from loopscope.models.loops.units import Units

CHECKED = 8
"""Iterations between which the flow of gradients is followed."""


@dataclass(frozen=True)
class States:
    """Where a loop's states are: entering and leaving each iteration, and entering what follows.

    `cut` lists the iterations whose state does not pass gradients on to the one before.
    """

    h: list[Port]
    h_m: list[Port]
    after: Port
    cut: list[int]


@dataclass(frozen=True)
class _Option:
    """A way to read the state from a call's arguments."""

    found: Found
    columns: tuple[int, int] | None

    @property
    def value(self) -> Tensor:
        x = self.found.tensor
        return x if self.columns is None else x[..., slice(*self.columns)]


def states(units: Units, spans: Sequence[Any], spec: Spec) -> States:
    """Find the states of a loop.

    A core may be given more than its state (the embedding beside it, or both in one tensor of
    twice the width) and may return more. The state is what changes from iteration to iteration
    and, among that, what equals the output of the iteration before. What runs after the core in
    an iteration (a norm) gives the output where the next iteration depends on it, not where it
    leads elsewhere (a head in each iteration).

    Args:
        units: The traced forward pass.
        spans: The iterations.
        spec: Names of the modules that read and give the state, if the user said so.

    Returns:
        One port per iteration and side, and the state after the last.
    """
    readers = [_reader(units, _calls(units, s), spec.input) for s in spans]
    given = [f for call in readers[1:] for f in units.streams.entering(call)]
    outs = _outputs(units, [_calls(units, s) for s in spans], given, spec)
    width = Counter(f.tensor.shape[-1] for _, f in outs).most_common(1)[0][0]
    options = [_options(units, call, width, spec.columns) for call in readers]
    best = _agreed(options, outs)
    read = [_like(several, best) for several in options]
    h = [port(c, "in", o.found, o.columns) for c, o in zip(readers, read, strict=True)]
    h_m = [port(call, "out", found) for call, found in outs]
    nodes = [o.found.node for o in read]
    cut = [
        t
        for t in range(1, len(h))
        if readers[t].grad and not _flows(outs[t - 1][1].node, [nodes[t]], t)
    ]
    if spec.carried:
        return States([h[0], *h_m[:-1]], h_m, h_m[-1], cut)
    return States(h, h_m, _after(units, spans[-1], outs[-1], width), cut)


def width_of(units: Units, spans: Sequence[Any]) -> int:
    """Width of a loop's state: that of most iterations' core outputs."""
    widths = Counter(
        f.tensor.shape[-1]
        for span in spans
        for call in _core(units, _calls(units, span))[-1:]
        if (f := units.streams.leaving(call)) is not None
    )
    return widths.most_common(1)[0][0]


def _core(units: Units, calls: Sequence[Call]) -> list[Call]:
    return [c for c in calls if units.is_core(c)] or [c for c in calls if units.streamy(c)]


def _outputs(
    units: Units, iterations: Sequence[Sequence[Call]], given: Sequence[Found], spec: Spec
) -> list[tuple[Call, Found]]:
    """The call that gives each iteration's output, and the output."""
    if spec.output is not None:
        return [_named_output(units, calls, spec.output) for calls in iterations]
    last = [_core(units, calls)[-1] for calls in iterations]
    where = _changing([[f for f in c.outputs if units.streams.is_stream(f)] for c in last])
    outs = [(c, next((f for f in c.outputs if f.where == where), c.outputs[0])) for c in last]
    if spec.core:
        return outs
    later = []  # a norm after the core, where the next iteration goes on from it
    for calls, (core, found) in zip(iterations, outs, strict=True):
        width = found.tensor.shape[-1]
        after = [c for c in calls if c.start > core.end and units.streamy(c)]
        streams = [(c, units.streams.leaving(c)) for c in after]
        later.append([(c, f) for c, f in streams if f and f.tensor.shape[-1] == width])
    nodes = [f.node for f in given]
    pattern = units.identity.pattern
    likes = dict.fromkeys(pattern(c.module) for several in later for c, _ in several[::-1])
    for like in likes:
        there = [
            next((x for x in several[::-1] if pattern(x[0].module) == like), None)
            for several in later
        ]
        used = [x for x in there[:-1] if x is not None]
        leads = [
            any(_holds(g.tensor, f.tensor) for g in given) or _flows(f.node, nodes, t)
            for t, (_, f) in enumerate(used)
        ]
        if (all(leads) and leads) or len(iterations) == 1:
            return [x or out for x, out in zip(there, outs, strict=True)]
    return outs


def _named_output(units: Units, calls: Sequence[Call], name: str) -> tuple[Call, Found]:
    call = _within(units, calls, name, "state.output")
    found = units.streams.leaving(call)
    if found is None:
        raise InputError(
            f"state.output = {name!r} of the specification gives no (batch, pos, width)."
        )
    return call, found


def _holds(whole: Tensor, part: Tensor) -> bool:
    """Whether a tensor is another, or has it among its columns."""
    width = part.shape[-1]
    starts = range(0, whole.shape[-1] - width + 1, width)
    return any(equal(whole[..., start : start + width], part) for start in starts)


def _changing(iterations: Sequence[Sequence[Found]]) -> tuple[Any, ...]:
    """Where the tensor stands that changes between iterations; the first if none does."""
    for found in iterations[0]:
        values = [f.tensor for one in iterations for f in one if f.where == found.where]
        if any(not equal(value, values[0]) for value in values[1:]):
            return found.where
    return iterations[0][0].where


def _calls(units: Units, span: Any) -> list[Call]:
    return units.calls[span.first : span.last + 1]


def _within(units: Units, calls: Sequence[Call], name: str, where: str) -> Call:
    for call in calls:
        for one in (call, *call.descendants()):
            if one.module == name:
                return one
    raise InputError(
        f"{where} = {name!r} of the specification is not called in every iteration; those consist "
        f"of {', '.join(c.module for c in calls)}."
    )


def _reader(units: Units, calls: Sequence[Call], name: str | None) -> Call:
    if name is not None:
        return _within(units, calls, name, "state.input")
    return next(c for c in calls if units.streams.entering(c))


def _options(
    units: Units, call: Call, width: int, columns: tuple[int, int] | None
) -> list[_Option]:
    given = units.streams.entering(call)
    if columns is not None:
        fits = [f for f in given if f.tensor.shape[-1] >= columns[1]]
        if not fits or columns[1] - columns[0] != width:
            raise InputError(
                f"state.columns = {list(columns)} of the specification does not fit: the state has "
                f"{width} columns, and {call.module} is given tensors of "
                f"{', '.join(str(f.tensor.shape[-1]) for f in given)}."
            )
        return [_Option(found, columns) for found in fits]
    whole = [_Option(f, None) for f in given if f.tensor.shape[-1] == width]
    parts = [
        _Option(f, (start, start + width))
        for f in given
        if f.tensor.shape[-1] > width and f.tensor.shape[-1] % width == 0
        for start in range(0, f.tensor.shape[-1], width)
    ]
    return whole + parts or [_Option(f, None) for f in given]


def _agreed(options: Sequence[list[_Option]], outs: Sequence[tuple[Call, Found]]) -> _Option:
    """The option that changes between iterations and most often equals the output before it."""
    known = {(o.found.where, o.columns): o for several in reversed(options) for o in several}
    order = dict.fromkeys((o.found.where, o.columns) for several in options for o in several)

    def merit(key: tuple[Any, ...]) -> tuple[bool, int]:
        there = [next((o for o in s if (o.found.where, o.columns) == key), None) for s in options]
        values = [o.value for o in there if o is not None]
        hits = sum(
            o is not None and equal(o.value, found.tensor)
            for o, (_, found) in zip(there[1:], outs, strict=False)
        )
        return any(not equal(v, values[0]) for v in values[1:]), hits

    return known[max(order, key=merit)]


def _like(options: Sequence[_Option], wanted: _Option) -> _Option:
    for one in options:
        if one.found.where == wanted.found.where and one.columns == wanted.columns:
            return one
    return options[0]


def _flows(earlier: Any, later: Sequence[Any], t: int) -> bool:
    """Whether a gradient flows from some of the later tensors back to an earlier one.

    Tensors without gradients tell nothing, nor do iterations after the first few: then it is true.
    """
    if earlier is None or t > CHECKED:
        return True
    seen, left = set(), list(later)
    while left:
        node = left.pop()
        if node is earlier:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            left += [above for above, _ in node.next_functions]
    return False


def _after(units: Units, span: Any, last: tuple[Call, Found], width: int) -> Port:
    """What enters whatever follows the last iteration; its output where nothing does."""
    for call in units.calls[span.last + 1 :]:
        if not units.streams.entering(call):
            continue
        shape = last[1].tensor.shape
        options = [o for o in _options(units, call, width, None) if o.value.shape == shape]
        same = [o for o in options if equal(o.value, last[1].tensor)]
        if found := (same or options):
            return port(call, "in", found[0].found, found[0].columns)
        break
    return port(last[0], "out", last[1])

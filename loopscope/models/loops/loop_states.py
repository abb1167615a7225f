"""States: which tensors of a traced loop enter and leave its iterations."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loopscope.errors import InputError
from loopscope.models.loops.dataflow import Flow
from loopscope.models.loops.loop_map import Port
from loopscope.models.loops.ports import equal, port
from loopscope.models.loops.spec import Spec
from loopscope.models.loops.tracing import Call, CallTensor
from loopscope.models.loops.units import Units

CHECKED = 8
"""Iterations between which the flow of gradients is followed."""

_Output = tuple[Call, CallTensor]
"""A call, and the tensor among its results that is an iteration's output."""


@dataclass(frozen=True)
class States:
    """Where a loop's states are: entering and leaving each iteration, and entering what follows.

    `cut` lists the iterations whose state does not pass gradients on to the one before; `doubt`
    says what is shown for h(0) where the first iteration is given no state.
    """

    h: list[Port]
    h_m: list[Port]
    after: Port
    cut: list[int]
    doubt: str = ""


@dataclass(frozen=True)
class _Option:
    """A way to read the state from a call's arguments."""

    item: CallTensor
    columns: tuple[int, int] | None

    @property
    def place(self) -> tuple[Any, ...]:
        """Where it stands in the arguments, and its part of the last axis."""
        return self.item.where, self.columns

    @property
    def value(self) -> Tensor:
        """The state, (batch, pos, width)."""
        x = self.item.tensor
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

    Raises:
        InputError: if a module named is not called in every iteration or gives no stream, or the
            columns named do not fit.
    """
    iterations = [_calls(units, span) for span in spans]
    readers = [_reader(units, calls, spec.input) for calls in iterations]
    outs = _outputs(units, iterations, readers, spec)
    width = Counter(_width(out) for _, out in outs).most_common(1)[0][0]
    options = [_options(units, call, width, spec.columns) for call in readers]
    best = _agreed(options, outs)
    read = [_like(candidates, best) for candidates in options]
    doubt = ""
    if len(read) > 1 and read[0].place != best.place:
        initial = _initial(readers[0], best, read[1].value)
        read[0] = initial or read[0]
        if initial is None:
            doubt = (
                f"{readers[0].module} is given no state at its first call, so h(0) is something "
                f"else that it is given there ({_spelled(read[0].item.where)} of its forward)"
            )
    h = [port(c, "in", o.item, o.columns) for c, o in zip(readers, read, strict=True)]
    h_m = [port(call, "out", out) for call, out in outs]
    cut = [
        t
        for t in range(1, len(h))
        if readers[t].grad and not _flows(outs[t - 1][1].node, [read[t].item.node], t)
    ]
    if spec.carried:
        return States([h[0], *h_m[:-1]], h_m, h_m[-1], cut, doubt)
    return States(h, h_m, _after(units, spans[-1], outs[-1], width), cut, doubt)


def _initial(call: Call, best: _Option, state: Tensor) -> _Option | None:
    """A first state that is the same at every position: a vector, or a constant."""
    item = next((item for item in call.inputs if item.where == best.item.where), None)
    if item is None or best.columns is not None:
        return None
    shape = item.tensor.shape
    if len(shape) > state.ndim or any(
        n not in (1, m) for n, m in zip(shape[::-1], state.shape[::-1], strict=False)
    ):
        return None
    return _Option(item, None)


def _spelled(where: tuple[Any, ...]) -> str:
    """A place in the arguments in words."""
    return f"argument {where[1]}" if where[0] == "args" else str(where[1])


def width_of(units: Units, spans: Sequence[Any]) -> int:
    """Width of a loop's state: that of most iterations' core outputs.

    Args:
        units: The traced forward pass.
        spans: The iterations.

    Returns:
        The size of the last axis.
    """
    widths = Counter(
        _width(out)
        for span in spans
        for call in _core(units, _calls(units, span))[-1:]
        if (out := units.streams.leaving(call)) is not None
    )
    return widths.most_common(1)[0][0]


def _core(units: Units, calls: Sequence[Call]) -> list[Call]:
    return [c for c in calls if units.is_core(c)] or [c for c in calls if units.streamy(c)]


def _outputs(
    units: Units, iterations: Sequence[Sequence[Call]], readers: Sequence[Call], spec: Spec
) -> list[_Output]:
    """The call that gives each iteration's output, and the output."""
    if spec.output is not None:
        return [_named_output(units, calls, spec.output) for calls in iterations]
    outs = _core_outputs(units, iterations)
    if spec.core:
        return outs
    later = [_later_outputs(units, calls, out) for calls, out in zip(iterations, outs, strict=True)]
    pattern = units.identity.pattern
    likes = dict.fromkeys(
        pattern(call.module) for outputs in later for call, _ in reversed(outputs)
    )
    for like in likes:
        last = [
            next((x for x in reversed(outputs) if pattern(x[0].module) == like), None)
            for outputs in later
        ]
        if len(iterations) == 1 or _lead_on(units, last[:-1], readers[1:]):
            return [x or out for x, out in zip(last, outs, strict=True)]
    return outs


def _core_outputs(units: Units, iterations: Sequence[Sequence[Call]]) -> list[_Output]:
    """What the last call of the core gives in each iteration, where that changes."""
    last = [_core(units, calls)[-1] for calls in iterations]
    streams = [[item for item in call.outputs if units.streams.is_stream(item)] for call in last]
    where = _changing(streams)
    return [
        (call, next((item for item in call.outputs if item.where == where), call.outputs[0]))
        for call in last
    ]


def _later_outputs(units: Units, calls: Sequence[Call], out: _Output) -> list[_Output]:
    """The streams of the same width that calls after the core (a norm) give in one iteration."""
    core, width = out[0], _width(out[1])
    after = [call for call in calls if call.start > core.end and units.streamy(call)]
    streams = [(call, units.streams.leaving(call)) for call in after]
    return [(call, item) for call, item in streams if item and _width(item) == width]


def _lead_on(units: Units, outputs: Sequence[_Output | None], readers: Sequence[Call]) -> bool:
    """Whether the next iterations depend on all of some outputs, of which there is at least one."""
    arguments = [item for call in readers for item in units.streams.entering(call)]
    nodes = [argument.node for argument in arguments]
    known = [output for output in outputs if output is not None]
    leads = [
        any(_holds(argument.tensor, item.tensor) for argument in arguments)
        or (_feeds(units, call, readers) if item.node is None else _flows(item.node, nodes, t))
        for t, (call, item) in enumerate(known)
    ]
    return bool(leads) and all(leads)


def _feeds(units: Units, call: Call, readers: Sequence[Call]) -> bool:
    """Whether a call leads to the next of some others, where no gradient tells."""
    later = next((reader for reader in readers if reader.start > call.end), None)
    return later is None or Flow.of(units.trace, [call, later]).feeds(0, [1])


def _named_output(units: Units, calls: Sequence[Call], name: str) -> _Output:
    call = _within(units, calls, name, "state.output")
    out = units.streams.leaving(call)
    if out is None:
        raise InputError(
            f"state.output = {name!r} of the specification gives no (batch, pos, width)."
        )
    return call, out


def _holds(whole: Tensor, part: Tensor) -> bool:
    """Whether a tensor is another, or has it among its columns."""
    width = part.shape[-1]
    starts = range(0, whole.shape[-1] - width + 1, width)
    return any(equal(whole[..., start : start + width], part) for start in starts)


def _changing(iterations: Sequence[Sequence[CallTensor]]) -> tuple[Any, ...]:
    """Where the tensor stands that changes between iterations; the first if none does."""
    for first in iterations[0]:
        values = [x.tensor for items in iterations for x in items if x.where == first.where]
        if any(not equal(value, values[0]) for value in values[1:]):
            return first.where
    return iterations[0][0].where


def _calls(units: Units, span: Any) -> list[Call]:
    return units.calls[span.first : span.last + 1]


def _within(units: Units, calls: Sequence[Call], name: str, where: str) -> Call:
    for call in calls:
        for part in (call, *call.descendants()):
            if part.module == name:
                return part
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
    streams = units.streams.entering(call)
    if columns is not None:
        fits = [stream for stream in streams if _width(stream) >= columns[1]]
        if not fits or columns[1] - columns[0] != width:
            raise InputError(
                f"state.columns = {list(columns)} of the specification does not fit: the state has "
                f"{width} columns, and {call.module} is given tensors of "
                f"{', '.join(str(_width(stream)) for stream in streams)}."
            )
        return [_Option(stream, columns) for stream in fits]
    whole = [_Option(stream, None) for stream in streams if _width(stream) == width]
    parts = [
        _Option(stream, (start, start + width))
        for stream in streams
        if _width(stream) > width and _width(stream) % width == 0
        for start in range(0, _width(stream), width)
    ]
    return whole + parts or [_Option(stream, None) for stream in streams]


def _width(item: CallTensor) -> int:
    return item.tensor.shape[-1]


def _agreed(options: Sequence[list[_Option]], outs: Sequence[_Output]) -> _Option:
    """The option that changes between iterations and most often equals the output before it."""
    by_place = {o.place: o for candidates in reversed(options) for o in candidates}
    order = dict.fromkeys(o.place for candidates in options for o in candidates)

    def merit(place: tuple[Any, ...]) -> tuple[bool, int]:
        same = [next((o for o in candidates if o.place == place), None) for candidates in options]
        values = [o.value for o in same if o is not None]
        hits = sum(
            o is not None and equal(o.value, out.tensor)
            for o, (_, out) in zip(same[1:], outs, strict=False)
        )
        return any(not equal(value, values[0]) for value in values[1:]), hits

    return by_place[max(order, key=merit)]


def _like(options: Sequence[_Option], best: _Option) -> _Option:
    return next((option for option in options if option.place == best.place), options[0])


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


def _after(units: Units, span: Any, last: _Output, width: int) -> Port:
    """What enters whatever follows the last iteration; its output where nothing does."""
    output = last[1].tensor
    for call in units.calls[span.last + 1 :]:
        if not units.streams.entering(call):
            continue
        options = _options(units, call, width, None)
        options = [option for option in options if option.value.shape == output.shape]
        same = [option for option in options if equal(option.value, output)]
        if candidates := (same or options):
            return port(call, "in", candidates[0].item, candidates[0].columns)
        break
    return port(last[0], "out", last[1])

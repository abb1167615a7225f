"""Ports: where the states of a traced loop enter and leave its modules."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loopscope.errors import InputError
from loopscope.probes.loops.loopmap import Loop, Port, Unit
from loopscope.probes.loops.spec import Spec
from loopscope.probes.loops.trace import Call, Found, Trace
from loopscope.probes.loops.units import Units

CHECKED = 8
"""Iterations between which the flow of gradients is followed."""

LOGITS = ("logits", "prediction_logits", "prediction_scores")


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


class UnitMaker:
    """Turns calls into the units of a role.

    Args:
        units: The traced forward pass.
        width: Width of the state; bare matrices that give another (routers) have no role.
    """

    def __init__(self, units: Units, width: int | None) -> None:
        self.units, self.width = units, width
        self.known = {id(call) for call in units.calls}
        self.inner: dict[int, set[int]] = {}

    def role(self, calls: Sequence[Call]) -> tuple[Unit, ...]:
        """The calls with matrices among some, wrappers that hold nothing else instead of parts."""
        region, found = {id(call) for call in calls}, {}
        for call in calls:
            while (up := call.parent) is not None and up.parent is not None:
                if not self._inside(up) <= region or not self.units.streamy(up):
                    break
                call = up
            if self.units.is_layered(call) and not self._narrow(call):
                found[call.index] = call
        return tuple(self.unit(call) for _, call in sorted(found.items()))

    def _inside(self, call: Call) -> set[int]:
        """The units in a call."""
        if call.index not in self.inner:
            self.inner[call.index] = {id(c) for c in call.descendants()} & self.known
        return self.inner[call.index]

    def _narrow(self, call: Call) -> bool:
        out = self.units.streams.leaving(call)
        leaf = self.units.identity.is_leaf(call.module)
        return leaf and out is not None and self.width not in (None, out.tensor.shape[-1])

    def unit(self, call: Call) -> Unit:
        """One call as a unit."""
        layers = self.units.layers(call)
        return Unit(
            module=call.module,
            call=call.number,
            shared=self.units.symbol(call),
            layers=tuple(layer.module for layer in layers),
            orders=tuple(layer.index for layer in layers),
            order=call.index,
            h=entering(self.units, call),
            h_m=leaving(self.units, call),
        )


def port(call: Call, side: Any, found: Found, columns: tuple[int, int] | None = None) -> Port:
    """The port of a tensor that was found in a call."""
    return Port(
        module=call.module,
        call=call.number,
        side=side,
        where=found.where,
        columns=columns,
        shape=tuple(found.tensor.shape),
    )


def entering(units: Units, call: Call) -> Port:
    """The stream that enters a call."""
    return port(call, "in", units.streams.entering(call)[0])


def leaving(units: Units, call: Call) -> Port:
    """The stream that leaves a call."""
    found = units.streams.leaving(call)
    assert found is not None
    return port(call, "out", found)


def logits_of(trace: Trace) -> Found | None:
    """The logits in what the model returned.

    Args:
        trace: The traced forward pass.

    Returns:
        The floating tensor (batch, ·, ·) that is called logits, has the width of an embedding
        table, or is what the last matrix gave; else the first. None where there is none.
    """
    three = [f for f in trace.root.outputs if f.tensor.ndim == 3]
    tables = {
        module.num_embeddings
        for call in trace.calls
        if isinstance(module := trace.modules[call.module], nn.Embedding)
    }
    last = [c.outputs[0].tensor for c in trace.calls if c.outputs and _is_matrix(trace, c)][-1:]
    preferred = (
        [f for f in three if f.where and f.where[-1] in LOGITS],
        [f for f in three if f.tensor.shape[-1] in tables],
        [f for f in three if any(_equal(f.tensor, x) for x in last)],
        three,
    )
    return next((found[0] for found in preferred if found), None)


def _is_matrix(trace: Trace, call: Call) -> bool:
    return isinstance(trace.modules[call.module], nn.Linear)


def head_of(units: Units, last: Call) -> Call | None:
    """The unembedding: the last unit after the layers that gives the logits' width from another."""
    logits = logits_of(units.trace)
    if logits is None:
        return None
    width = logits.tensor.shape[-1]
    for call in reversed(units.calls):
        out = [f for f in call.outputs if f.tensor.ndim == 3 and f.tensor.shape[-1] == width]
        given = [f for f in call.inputs if f.tensor.ndim == 3 and f.tensor.shape[-1] != width]
        if out and given and call.start > last.end:
            return call
    return None


def split_norm(
    units: Units, calls: Sequence[Call], head: Call | None
) -> tuple[list[Call], Call | None]:
    """What follows the last loop, up to the head: the coda, and the final norm if there is one."""
    rest = [c for c in calls if head is None or c.index < head.index]
    streamy = [c for c in rest if units.streamy(c)]
    if streamy and units.identity.weight[streamy[-1].module] == 0:
        norm = streamy[-1]
        return [c for c in rest if c is not norm], norm
    return rest, None


def embed_port(units: Units, prelude: Sequence[Unit], loops: Sequence[Loop], spec: Spec) -> Port:
    """h_emb: what enters the first layer, or what the embedding gives where that is not it."""
    if spec.embed is not None:
        call = next((c for c in units.trace.calls if c.module == spec.embed), None)
        if call is None or units.streams.leaving(call) is None:
            raise InputError(
                f"embed = {spec.embed!r} of the specification gives no (batch, pos, width); name "
                "the module whose output the first layer reads."
            )
        return leaving(units, call)
    if prelude:
        return prelude[0].h
    first = loops[0].iterations[0].h
    reader = next(
        c for c in units.trace.calls if (c.module, c.number) == (first.module, first.call)
    )
    given = next(f.tensor for f in reader.inputs if f.where == first.where)
    state = given if first.columns is None else given[..., slice(*first.columns)]
    earlier = [c for c in units.trace.calls if -1 < c.end < reader.start]
    streams = [(c, f) for c in earlier if (f := units.streams.leaving(c)) is not None]
    tables = [f.tensor for c in earlier for f in c.outputs[:1] if c.integers]
    made = any(_equal(f.tensor, state) for _, f in streams) or _is_sum(state, tables)
    return first if made or not streams else leaving(units, streams[-1][0])


def _is_sum(state: Tensor, tables: Sequence[Tensor]) -> bool:
    """Whether a state is a weighted sum of embeddings: scaled, with positions added."""
    ends = [t.shape[: -4:-1] for t in tables]
    fits = [
        t
        for t, end in zip(tables, ends, strict=True)
        if t.ndim <= 3 and all(n in (1, m) for n, m in zip(end, state.shape[::-1], strict=False))
        and t.shape[-1] == state.shape[-1]
    ]
    if not fits:
        return False
    columns = [t.expand_as(state).double().cpu().flatten() for t in fits]
    wanted = state.double().cpu().flatten()
    basis = torch.stack(columns, dim=1)
    rest = wanted - basis @ torch.linalg.lstsq(basis, wanted[:, None]).solution[:, 0]
    return bool(rest.norm() <= 1e-3 * wanted.norm())


def out_port(units: Units, coda: Sequence[Unit], loops: Sequence[Loop], norm: Call | None) -> Port:
    """h_out: what enters the final norm, or what the last layer gives."""
    if norm is not None:
        return entering(units, norm)
    if coda:
        return coda[-1].h_m
    top = [loop for loop in loops if loop.parent is None]
    return top[-1].after


def states(units: Units, spans: Sequence[Any], spec: Spec) -> States:
    """Find the states of a loop.

    A core may be given more than its state (the embedding beside it, or both in one tensor of
    twice the width); what equals the output of the iteration before is the state.

    Args:
        units: The traced forward pass.
        spans: The iterations.
        spec: Names of the modules that read and give the state, if the user said so.

    Returns:
        One port per iteration and side, and the state after the last.
    """
    outs = [_output(units, _calls(units, s), spec) for s in spans]
    width = width_of(units, spans, spec)
    readers = [_reader(units, _calls(units, s), spec.input) for s in spans]
    options = [_options(units, call, width, spec.columns) for call in readers]
    best = _agreed(options, outs)
    h = [
        port(call, "in", o.found, o.columns)
        for call, several in zip(readers, options, strict=True)
        for o in [_like(several, best)]
    ]
    h_m = [port(call, "out", found) for call, found in outs]
    read = [_like(several, best).found for several in options]
    cut = [t for t in range(1, len(read)) if _is_cut(read[t].node, outs[t - 1][1].node, t)]
    return States(h, h_m, _after(units, spans[-1], outs[-1], width), cut)


def width_of(units: Units, spans: Sequence[Any], spec: Spec) -> int:
    """Width of a loop's state: that of most iterations' outputs."""
    outs = [_output(units, _calls(units, s), spec) for s in spans]
    return Counter(f.tensor.shape[-1] for _, f in outs).most_common(1)[0][0]


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


def _output(units: Units, calls: Sequence[Call], spec: Spec) -> tuple[Call, Found]:
    name = spec.output
    if name is not None:
        call = _within(units, calls, name, "state.output")
        found = units.streams.leaving(call)
        if found is None:
            raise InputError(
                f"state.output = {name!r} of the specification gives no (batch, pos, width)."
            )
        return call, found
    core = [c for c in calls if units.is_core(c)] or [c for c in calls if units.streamy(c)]
    last = units.streams.leaving(core[-1])
    assert last is not None
    if spec.core:
        return core[-1], last
    for call in reversed(calls):  # a norm after the core belongs to it, a router's output does not
        found = units.streams.leaving(call) if units.streamy(call) else None
        if found is not None and found.tensor.shape[-1] == last.tensor.shape[-1]:
            return call, found
    return core[-1], last


def _options(
    units: Units, call: Call, width: int, columns: tuple[int, int] | None
) -> list[_Option]:
    given = units.streams.entering(call)
    if columns is not None:
        return [_Option(found, columns) for found in given]
    whole = [_Option(f, None) for f in given if f.tensor.shape[-1] == width]
    parts = [
        _Option(f, (start, start + width))
        for f in given
        if f.tensor.shape[-1] > width and f.tensor.shape[-1] % width == 0
        for start in range(0, f.tensor.shape[-1], width)
    ]
    return whole + parts or [_Option(f, None) for f in given]


def _agreed(options: Sequence[list[_Option]], outs: Sequence[tuple[Call, Found]]) -> _Option:
    """The option that most often equals the output of the iteration before; the first if none."""
    previous = [found.tensor for _, found in outs]
    scores = []
    for option in options[0]:
        later = [_like(several, option) for several in options[1:]]
        hits = sum(_equal(o.value, p) for o, p in zip(later, previous, strict=False))
        scores.append(hits)
    return options[0][scores.index(max(scores))]


def _like(options: Sequence[_Option], wanted: _Option) -> _Option:
    for one in options:
        if one.found.where == wanted.found.where and one.columns == wanted.columns:
            return one
    return options[0]


def _is_cut(later: Any, earlier: Any, t: int) -> bool:
    """Whether no gradient flows from an iteration's input back to the output before it."""
    if earlier is None or t > CHECKED:
        return False
    seen, left = set(), [later]
    while left:
        node = left.pop()
        if node is earlier:
            return False
        if node is not None and node not in seen:
            seen.add(node)
            left += [above for above, _ in node.next_functions]
    return True


def _after(units: Units, span: Any, last: tuple[Call, Found], width: int) -> Port:
    """What enters whatever follows the last iteration; its output where nothing does."""
    for call in units.calls[span.last + 1 :]:
        if not units.streams.entering(call):
            continue
        options = [o for o in _options(units, call, width, None) if o.value.shape[-1] == width]
        equal = [o for o in options if _equal(o.value, last[1].tensor)]
        if found := (equal or options):
            return port(call, "in", found[0].found, found[0].columns)
        break
    return port(last[0], "out", last[1])


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and bool(torch.equal(a, b))

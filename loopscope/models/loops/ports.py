"""Ports: where the states of a traced loop enter and leave its modules."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loopscope.errors import InputError
from loopscope.models.loops.loop_map import Loop, LoopMap, Port, Producer, Unit
from loopscope.models.loops.spec import Spec
from loopscope.models.loops.tracing import Call, CallTensor, Trace
from loopscope.models.loops.units import Units


class UnitMaker:
    """Turns calls into the units of a role.

    Args:
        units: The traced forward pass.
        width: Width of the state; bare matrices that give another (routers) have no role.
    """

    def __init__(self, units: Units, width: int | None) -> None:
        self.units, self.width = units, width
        self.unit_ids = {id(call) for call in units.calls}
        self.inner: dict[int, set[int]] = {}

    def role(self, calls: Sequence[Call]) -> tuple[Unit, ...]:
        """The calls with matrices among some, wrappers that hold nothing else instead of parts.

        Args:
            calls: The calls, units of the traced forward pass.

        Returns:
            The units, in order of execution.
        """
        region: set[int] = {id(call) for call in calls}
        layered: dict[int, Call] = {}
        for call in calls:
            while (parent := call.parent) is not None and parent.parent is not None:
                if not self._inside(parent) <= region or not self.units.streamy(parent):
                    break
                if self._is_around_more(parent, call):
                    break
                call = parent
            if self.units.is_layered(call) and not self._narrow(call):
                layered[call.index] = call
        return tuple(self.unit(call) for _, call in sorted(layered.items()))

    def _inside(self, call: Call) -> set[int]:
        """The units in a call."""
        if call.index not in self.inner:
            self.inner[call.index] = {id(c) for c in call.descendants()} & self.unit_ids
        return self.inner[call.index]

    def _is_around_more(self, parent: Call, call: Call) -> bool:
        """Whether what a call is given is no state of those in it: it makes that state itself."""
        streams = [self.units.streams.entering(c)[:1] for c in (parent, call)]
        positions = {item.tensor.shape[1] for items in streams for item in items}
        batch = self.units.streams.batch
        return (
            len(positions) > 1
            or any(  # looks tokens up, beside another stack's states
                parent.start <= lookup.tick < call.start and lookup.ids[:1] == (batch,)
                for lookup in self.units.trace.lookups
                if len(lookup.ids) == 2
            )
        )

    def _narrow(self, call: Call) -> bool:
        out = self.units.streams.leaving(call)
        leaf = self.units.identity.is_leaf(call.module)
        return leaf and out is not None and self.width not in (None, out.tensor.shape[-1])

    def unit(self, call: Call) -> Unit:
        """One call as a unit.

        Args:
            call: The call; a stream enters it and one leaves it.

        Returns:
            The unit.
        """
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


def port(call: Call, side: Any, item: CallTensor, columns: tuple[int, int] | None = None) -> Port:
    """The port of a tensor in a call.

    Args:
        call: The call.
        side: `in` for a tensor of its arguments, `out` for one of its result.
        item: The tensor.
        columns: The part of its last axis that is meant, first and last + 1; None means all.

    Returns:
        The port.
    """
    return Port(
        module=call.module,
        call=call.number,
        side=side,
        where=item.where,
        columns=columns,
        shape=tuple(item.tensor.shape),
    )


def entering(units: Units, call: Call) -> Port:
    """The stream that enters a call.

    Args:
        units: The traced forward pass.
        call: The call; it is given at least one stream.

    Returns:
        The port of the first.
    """
    return port(call, "in", units.streams.entering(call)[0])


def leaving(units: Units, call: Call) -> Port:
    """The stream that leaves a call.

    Args:
        units: The traced forward pass.
        call: The call; it returns a stream.

    Returns:
        The port of the stream.
    """
    stream = units.streams.leaving(call)
    assert stream is not None
    return port(call, "out", stream)


def head_of(units: Units, last: Call) -> Call | None:
    """The unembedding: the last unit after the layers that gives the logits.

    Args:
        units: The traced forward pass.
        last: The last layer's call.

    Returns:
        The call; None where no unit after the last layer does so.
    """
    after = [*([units.head] if units.head is not None else []), *units.calls]
    return next(
        (call for call in reversed(after) if call.start > last.end and units.is_head(call)), None
    )


def split_norm(
    units: Units, calls: Sequence[Call], head: Call | None
) -> tuple[list[Call], Call | None]:
    """What follows the last loop, up to the head: the coda, and the final norm if there is one.

    Args:
        units: The traced forward pass.
        calls: The calls after the last loop, in order.
        head: The unembedding, if there is one.

    Returns:
        The calls of the coda, and the norm: the last that hands on a stream, if it has no matrices.
    """
    rest = [c for c in calls if head is None or c.index < head.index]
    streamy = [c for c in rest if units.streamy(c)]
    if streamy and units.identity.weight[streamy[-1].module] == 0:
        norm = streamy[-1]
        return [c for c in rest if c is not norm], norm
    return rest, None


def embed_port(units: Units, prelude: Sequence[Unit], loops: Sequence[Loop], spec: Spec) -> Port:
    """h_emb: what enters the first layer, or what the embedding gives where that is not it.

    Args:
        units: The traced forward pass.
        prelude: Units before the first loop.
        loops: The loops, the outermost that runs first at the front.
        spec: What the user says; `embed` decides.

    Returns:
        The port.

    Raises:
        InputError: if the module that the specification names gives no stream, or not before the
            first layer.
    """
    if spec.embed is not None:
        call = next((c for c in units.trace.calls if c.module == spec.embed), None)
        if call is None or units.streams.leaving(call) is None:
            raise InputError(
                f"embed = {spec.embed!r} of the specification gives no (batch, pos, width); name "
                "the module whose output the first layer reads."
            )
        before = [*(unit.order for unit in prelude), *(it.span[0] for it in loops[0].iterations)]
        if call.index > before[0]:
            raise InputError(
                f"embed = {spec.embed!r} of the specification does not run before the first layer."
            )
        return leaving(units, call)
    return prelude[0].h if prelude else _before_the_loop(units, loops[0])


def _before_the_loop(units: Units, loop: Loop) -> Port:
    """The loop's first state where a module gave it, or else the last stream before the loop."""
    first, trace = loop.iterations[0].h, units.trace
    reader = trace.numbered[first.module, first.call]
    if loop.named:  # a state may be read for the first time late in the iteration
        reader = min(reader, trace.calls[loop.iterations[0].span[0]], key=lambda c: c.start)
    state = value_at(trace, first)
    earlier = [c for c in trace.calls if -1 < c.end < reader.start or c is reader]
    if first.side == "in" or reader is not trace.numbered[first.module, first.call]:
        earlier = [c for c in earlier if c is not reader]
    streams = [(c, item) for c in earlier if (item := units.streams.leaving(c)) is not None]
    wide = [(c, item) for c, item in streams if item.tensor.shape[-1] == state.shape[-1]]
    streams = wide or streams  # rather than what routers give
    tables = [item.tensor for c in earlier for item in c.outputs[:1] if c.integers]
    explained = any(equal(item.tensor, state) for _, item in streams)
    explained = explained or (state.ndim == 3 and _is_sum(state, tables))
    if state.ndim != 3 and streams:
        return leaving(units, streams[-1][0])
    return first if explained or not streams else leaving(units, streams[-1][0])


def _is_sum(state: Tensor, tables: Sequence[Tensor]) -> bool:
    """Whether a state is a weighted sum of embeddings: scaled, with positions added."""
    ends = [t.shape[:-4:-1] for t in tables]
    fits = [
        t
        for t, end in zip(tables, ends, strict=True)
        if t.ndim <= 3
        and all(n in (1, m) for n, m in zip(end, state.shape[::-1], strict=False))
        and t.shape[-1] == state.shape[-1]
    ]
    if not fits:
        return False
    columns = [t.expand_as(state).double().cpu().flatten() for t in fits]
    target = state.double().cpu().flatten()
    basis = torch.stack(columns, dim=1)
    rest = target - basis @ torch.linalg.lstsq(basis, target[:, None]).solution[:, 0]
    return bool(rest.norm() <= 1e-3 * target.norm())


def out_port(units: Units, coda: Sequence[Unit], loops: Sequence[Loop], norm: Call | None) -> Port:
    """h_out: what enters the final norm, or what the last layer gives.

    Args:
        units: The traced forward pass.
        coda: Units after the last loop.
        loops: The loops.
        norm: The final norm, if there is one.

    Returns:
        The port.
    """
    if norm is not None:
        return entering(units, norm)
    if coda:
        return coda[-1].h_m
    top = [loop for loop in loops if loop.parent is None]
    return top[-1].after


def value_at(trace: Trace, where: Port) -> Tensor:
    """The tensor that a port had in a traced forward pass.

    Args:
        trace: The traced forward pass.
        where: The port.

    Returns:
        The tensor, of the port's columns alone.
    """
    call = trace.numbered[where.module, where.call]
    items = call.inputs if where.side == "in" else call.outputs
    item = next(item for item in items if item.where == where.where)
    if where.operand:
        return trace.objects[operand_key(trace, where)].detach()
    tensor = item.tensor
    return tensor if where.columns is None else tensor[..., slice(*where.columns)]


def operand_key(trace: Trace, where: Port) -> int:
    """Identity of what an argument of a call was made of.

    Args:
        trace: The traced forward pass.
        where: The port, with an operand.

    Returns:
        The identity.
    """
    call = trace.numbered[where.module, where.call]
    item = next(item for item in call.inputs if item.where == where.where)
    before = trace.making.count_before(call.start)
    key = trace.making.follow(item.key, before, where.operand)
    assert key is not None
    return key


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, bit for bit.

    Args:
        a: A tensor of any shape.
        b: Another.

    Returns:
        True where shapes, devices and values agree.
    """
    return a.shape == b.shape and a.device == b.device and bool(torch.equal(a, b))


def with_producers(trace: Trace, loop_map: LoopMap) -> LoopMap:
    """A map that knows what makes the state of each iteration.

    Args:
        trace: The traced forward pass.
        loop_map: Its map.

    Returns:
        The map; iterations whose state nobody saw being made are as they were.
    """

    def known(loop: Loop) -> Loop:
        made = (
            it if it.read_before else replace(it, producer=_producer(trace, it.h))
            for it in loop.iterations
        )
        return replace(loop, iterations=tuple(made))

    return replace(loop_map, loops=tuple(map(known, loop_map.loops)))


def _producer(trace: Trace, h: Port) -> Producer | None:
    """What makes a state; None where it is a part of another tensor, or nobody saw."""
    if h.side == "out":
        return Producer(port=h) if h.columns is None else None
    call = trace.numbered[h.module, h.call]
    if h.operand:
        key = operand_key(trace, h)
        return trace.made[key].producer if key in trace.made else None
    made = trace.makers.get((call.index, h.where))
    if made is not None and h.columns is not None:
        made = next((part for columns, part in made.parts if columns == h.columns), None)
    return None if made is None else made.producer

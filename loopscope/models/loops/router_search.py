"""Routers and gates: modules whose output says what is written, read, or whether to go on."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from loopscope.errors import InputError
from loopscope.models.loops.identity import Streams
from loopscope.models.loops.loop_map import Loop, LoopMap, Port, Router
from loopscope.models.loops.mesh_cycle import (
    TOLERANCE,
    MeshCycle,
    routers_of_memory,
    writable_sources,
)
from loopscope.models.loops.ports import port, value_at
from loopscope.models.loops.spec import Spec
from loopscope.models.loops.tracing import Call, CallTensor, Trace

MOST_SLOTS = 64
_KINDS: dict[Literal["write", "read"], re.Pattern[str]] = {
    "write": re.compile("write", re.I),
    "read": re.compile(r"(?<![a-z])read", re.I),
}
_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.|$)")


def with_routers(trace: Trace, streams: Streams, loop_map: LoopMap, spec: Spec) -> LoopMap:
    """A map with its routers and gates.

    Found are bare matrices from the stream to a few slots whose name says `write` or `read`, one in
    each iteration, and matrices from the stream to one number per token in each iteration; what a
    specification names comes first.

    Args:
        trace: The traced forward pass.
        streams: What a stream looks like.
        loop_map: The map.
        spec: What the user says.

    Returns:
        The map, with `mesh_cycle` where the states of the example follow from the routers, and a
        note where they do not.

    Raises:
        InputError: if a router or gate that is named is not called in the loop.
    """
    routers: list[Router] = []
    for loop in loop_map.loops:
        routers += _memory_routers(trace, loop, spec)
        routers += _gates(trace, streams, loop, loop_map, spec)
    for key, names in (
        ("routers.write", spec.write),
        ("routers.read", spec.read),
        ("gates", spec.gates),
    ):
        used = {p.module for r in routers for p in (r.transition, *r.outputs) if p}
        if names and not used & set(names):
            raise InputError(
                f"{key} of the specification names {', '.join(names)}, which no iteration calls "
                "with one output per token."
            )
    return _with_cycle(trace, replace(loop_map, routers=tuple(routers)))


def _memory_routers(trace: Trace, loop: Loop, spec: Spec) -> list[Router]:
    routers: list[Router] = []
    for kind, looks in _KINDS.items():
        named = getattr(spec, kind)
        fits = [
            (call, out)
            for call in trace.calls
            for out in call.outputs[:1]
            if (call.module in named if named else _is_router(trace, call, out, looks))
        ]
        outputs = [output for output in _by_iteration(fits, loop) if output is not None]
        if len(outputs) < loop.K:
            continue
        before = [output for output in fits if output[0].index < loop.iterations[0].span[0]]
        router = Router(
            kind=kind,
            name=kind,
            loop=loop.name,
            outputs=tuple(port(call, "out", out) for call, out in outputs),
            activation=_activation(trace, outputs, "softmax"),
            transition=port(before[-1][0], "out", before[-1][1]) if before else None,
            query=_query(before[-1][0], before[-1][1]) if before else None,
        )
        routers.append(router)
    return routers if len(routers) == 2 else []  # one without the other is no memory


def _query(call: Call, out: CallTensor) -> Port | None:
    """The tensor that a router looks at: the first argument with its positions."""
    fits = (x for x in call.inputs if x.tensor.shape[:-1] == out.tensor.shape[:-1])
    return next((port(call, "in", item) for item in fits), None)


def _is_router(trace: Trace, call: Call, out: CallTensor, looks: re.Pattern[str]) -> bool:
    module = trace.modules[call.module]
    return (
        isinstance(module, nn.Linear)
        and looks.search(call.module) is not None
        and out.tensor.ndim == 3
        and 2 <= module.out_features <= min(MOST_SLOTS, module.in_features - 1)
    )


def _gates(
    trace: Trace, streams: Streams, loop: Loop, loop_map: LoopMap, spec: Spec
) -> Iterator[Router]:
    for name, fits in _gate_outputs(trace, streams, loop, loop_map, spec).items():
        outputs = _by_iteration(fits, loop)
        called = [output for output in outputs if output is not None]
        if len(called) < max(1, len(outputs) - 1):  # the last may go without
            continue
        last = next(p for p in reversed(name.split(".")) if p != "*")
        yield Router(
            kind="gate",
            name=last,
            loop=loop.name,
            outputs=tuple(None if x is None else port(x[0], "out", x[1]) for x in outputs),
            activation=_activation(trace, called, "sigmoid"),
        )


def _gate_outputs(
    trace: Trace, streams: Streams, loop: Loop, loop_map: LoopMap, spec: Spec
) -> dict[str, list[tuple[Call, CallTensor]]]:
    """Calls outside of inner loops that give one number per token, by name without numbers."""
    groups: dict[str, list[tuple[Call, CallTensor]]] = defaultdict(list)
    inner = [child for child in loop_map.loops if child.parent == loop.name]
    spans = [iteration.span for child in inner for iteration in child.iterations]
    shapes = ((streams.batch, streams.pos, 1), (streams.batch, streams.pos))
    for call in trace.calls:
        if spec.gates and call.module not in spec.gates:
            continue
        if any(a <= call.index < b for a, b in spans):
            continue
        alone = not call.children and streams.entering(call)
        for out in call.outputs[:1]:
            if tuple(out.tensor.shape) in shapes and (alone or spec.gates):
                groups[_NUMBERS.sub("*", call.module)].append((call, out))
    return groups


def _by_iteration(
    fits: list[tuple[Call, CallTensor]], loop: Loop
) -> list[tuple[Call, CallTensor] | None]:
    """The first that fits in each iteration."""
    outputs = []
    for iteration in loop.iterations:
        a, b = iteration.span
        outputs.append(next((output for output in fits if a <= output[0].index < b), None))
    return outputs


def _activation(
    trace: Trace, calls: list[tuple[Call, CallTensor]], usual: Literal["softmax", "sigmoid"]
) -> Literal["softmax", "sigmoid", "none"]:
    """What turns outputs into weights: nothing where a module that is no bare matrix did it."""
    if all(isinstance(trace.modules[c.module], nn.Linear) for c, _ in calls):
        return usual
    values = [out.tensor.float() for _, out in calls]
    inside = all(bool((v >= 0).all() and (v <= 1).all()) for v in values)
    if usual == "softmax":
        inside = inside and all(bool((v.sum(-1) - 1).abs().max() < 1e-2) for v in values)
    return "none" if inside else usual


def weights(router: Router, output: Tensor) -> Tensor:
    """A router's output as weights: over slots (batch, pos, slot), or a probability (batch, pos).

    Args:
        router: The router.
        output: What its module gave.

    Returns:
        The weights, in float32 where the output is narrower.
    """
    x = output if output.dtype == torch.float64 else output.float()
    if router.kind == "gate":
        x = x.squeeze(-1) if x.ndim == 3 else x
    if router.activation == "softmax":
        return x.softmax(-1)
    return x.sigmoid() if router.activation == "sigmoid" else x


def _with_cycle(trace: Trace, loop_map: LoopMap) -> LoopMap:
    """The map with what the memory slots follow from, or with a note why they are withheld."""
    pair, main = routers_of_memory(loop_map), loop_map.main
    if pair is None or main is None:
        return loop_map
    if any(router.transition is None for router in pair):
        why = "no call of them before the loop is one of MeSH's transitional cycle"
        return _without_slots(loop_map, why)
    best: tuple[float, int] | None = None
    for written in writable_sources(loop_map):
        cycle = _cycle(trace, main, pair, loop_map.embed, written)
        if not cycle.fits():
            continue
        off, tolerance = cycle.departure(), cycle.tolerance()
        if off[0] <= tolerance:
            notes = loop_map.notes
            if tolerance > TOLERANCE:
                notes = (
                    *notes,
                    f"in this precision MeSH's cycle was held against the states to {tolerance:.1g}"
                    " of their largest element only; one that differs by less would not be told "
                    "from it",
                )
            return replace(loop_map, mesh_cycle=True, written=written, notes=notes)
        best = off if best is None else min(best, off)
    if best is None:
        return _without_slots(loop_map, "their outputs do not have the states' positions")
    off_by = f"h({best[1]}) is off by {best[0]:.2g} of its largest element"
    return _without_slots(
        loop_map, f"the states do not follow from them by MeSH Eqs. 2-5 ({off_by})"
    )


def _without_slots(loop_map: LoopMap, why: str) -> LoopMap:
    note = f"write and read routers were found, but {why}; memory slots and α are withheld"
    return replace(loop_map, notes=(*loop_map.notes, note))


def _cycle(
    trace: Trace, main: Loop, pair: tuple[Router, Router], embed: Port, written: Port
) -> MeshCycle:
    """The tensors of the example that the cycle is made of."""
    write, read = (
        [weights(r, value_at(trace, p)) for p in (r.transition, *r.outputs) if p] for r in pair
    )
    return MeshCycle(
        h_emb=value_at(trace, embed),
        values=[value_at(trace, p) for p in (written, *(it.h_m for it in main.iterations))],
        w_write=write,
        w_read=read,
        states=[value_at(trace, p) for p in (*(it.h for it in main.iterations), main.after)],
    )

"""Routers: modules whose output says what is written to a memory and read from it."""

import re
from dataclasses import replace
from typing import Literal

from torch import nn

from loopscope.errors import InputError
from loopscope.models.loops.gate_search import NUMBERS, GateSearch
from loopscope.models.loops.identity import Streams
from loopscope.models.loops.loop_map import Loop, LoopMap, Port, Router, Unit
from loopscope.models.loops.mesh_cycle import (
    TOLERANCE,
    MeshCycle,
    routers_of_memory,
    writable_sources,
)
from loopscope.models.loops.ports import port, value_at
from loopscope.models.loops.router_outputs import activation, by_iteration, weights
from loopscope.models.loops.spec import Spec
from loopscope.models.loops.tracing import Call, CallTensor, Trace

MOST_SLOTS = 64
_KINDS: dict[Literal["write", "read"], re.Pattern[str]] = {
    "write": re.compile("write", re.I),
    "read": re.compile(r"(?<![a-z])read", re.I),
}


def with_routers(trace: Trace, streams: Streams, loop_map: LoopMap, spec: Spec) -> LoopMap:
    """A map with its routers and gates.

    Found are bare matrices from the stream to a few slots whose name says `write` or `read`, one in
    each iteration, and gates (`GateSearch`); what a specification names comes first.

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
    notes, doubts = list(loop_map.notes), list(loop_map.doubts)
    for loop in loop_map.loops:
        routers += _memory_routers(trace, loop, spec)
        gates = GateSearch(trace, streams, loop, loop_map, spec)
        routers += gates.routers()
        notes += gates.notes
        doubts += gates.doubts
    for key, names in (
        ("routers.write", spec.write),
        ("routers.read", spec.read),
        ("gates", spec.gates),
    ):
        used = {p.module for r in routers for p in (r.transition, *r.outputs) if p}
        if names and not used & set(names):
            raise InputError(
                f"{key} of the specification names {', '.join(names)}, which no iteration calls "
                f"with {NUMBERS if key == 'gates' else 'one output per token'}."
            )
    loop_map = replace(
        loop_map, routers=tuple(routers), notes=tuple(notes), doubts=tuple(dict.fromkeys(doubts))
    )
    return _with_cycle(trace, _without_layers(loop_map))


def _without_layers(loop_map: LoopMap) -> LoopMap:
    """The map with routers of several parts no longer among the layers."""
    memory = [r for r in loop_map.routers if r.kind != "gate"]
    names = {p.module for r in memory for p in (r.transition, *r.outputs) if p}

    def layers(units: tuple[Unit, ...]) -> tuple[Unit, ...]:
        return tuple(unit for unit in units if unit.module not in names)

    loops = [
        replace(loop, iterations=tuple(replace(i, units=layers(i.units)) for i in loop.iterations))
        for loop in loop_map.loops
    ]
    return replace(
        loop_map,
        prelude=layers(loop_map.prelude),
        loops=tuple(loops),
        between=layers(loop_map.between),
        coda=layers(loop_map.coda),
    )


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
        outputs = [output for output in by_iteration(fits, loop) if output is not None]
        if len(outputs) < loop.K:
            continue
        before = [output for output in fits if output[0].index < loop.iterations[0].span[0]]
        router = Router(
            kind=kind,
            name=kind,
            loop=loop.name,
            outputs=tuple(port(call, "out", out) for call, out in outputs),
            activation=activation(trace, outputs, "softmax"),
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

"""Routers and gates: modules whose output says what is written, read, or whether to go on."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loopscope.errors import InputError
from loopscope.models.loops.identity import Streams
from loopscope.models.loops.loop_map import Loop, LoopMap, Router
from loopscope.models.loops.ports import port, value_at
from loopscope.models.loops.spec import Spec
from loopscope.models.loops.tracing import Call, Found, Trace

MOST_SLOTS = 64
_KINDS: dict[Literal["write", "read"], re.Pattern[str]] = {
    "write": re.compile("write", re.I),
    "read": re.compile(r"(?<![a-z])read", re.I),
}
_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.|$)")


def with_routers(trace: Trace, streams: Streams, found: LoopMap, spec: Spec) -> LoopMap:
    """A map with its routers and gates.

    Found are bare matrices from the stream to a few slots whose name says `write` or `read`, one in
    each iteration, and matrices from the stream to one number per token in each iteration; what a
    specification names comes first.

    Args:
        trace: The traced forward pass.
        streams: What a stream looks like.
        found: The map.
        spec: What the user says.

    Returns:
        The map, with `mesh_cycle` where the states of the example follow from the routers.

    Raises:
        InputError: if a router or gate that is named is not called in the loop.
    """
    routers: list[Router] = []
    for loop in found.loops:
        routers += _memory_routers(trace, loop, spec)
        routers += _gates(trace, streams, loop, found, spec)
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
    with_them = replace(found, routers=tuple(routers))
    return replace(with_them, mesh_cycle=_is_mesh(trace, with_them))


def _memory_routers(trace: Trace, loop: Loop, spec: Spec) -> list[Router]:
    chosen: list[Router] = []
    for kind, looks in _KINDS.items():
        named = getattr(spec, kind)
        fits = [
            (call, out)
            for call in trace.calls
            for out in call.outputs[:1]
            if (call.module in named if named else _is_router(trace, call, out, looks))
        ]
        there = [one for one in _by_iteration(fits, loop) if one is not None]
        if len(there) < loop.K:
            continue
        before = [item for item in fits if item[0].index < loop.iterations[0].span[0]]
        router = Router(
            kind=kind,
            name=kind,
            loop=loop.name,
            outputs=tuple(port(call, "out", out) for call, out in there),
            activation=_activation(trace, there, "softmax"),
            transition=port(before[-1][0], "out", before[-1][1]) if before else None,
        )
        chosen.append(router)
    return chosen if len(chosen) == 2 else []  # one without the other is no memory


def _is_router(trace: Trace, call: Call, out: Found, looks: re.Pattern[str]) -> bool:
    module = trace.modules[call.module]
    return (
        isinstance(module, nn.Linear)
        and looks.search(call.module) is not None
        and out.tensor.ndim == 3
        and 2 <= module.out_features <= min(MOST_SLOTS, module.in_features - 1)
    )


def _gates(
    trace: Trace, streams: Streams, loop: Loop, found: LoopMap, spec: Spec
) -> Iterator[Router]:
    groups: dict[str, list[tuple[Call, Found]]] = defaultdict(list)
    inner = [other for other in found.loops if other.parent == loop.name]
    for call in trace.calls:
        if spec.gates and call.module not in spec.gates:
            continue
        if any(a <= call.index < b for one in inner for a, b in (i.span for i in one.iterations)):
            continue
        for out in call.outputs[:1]:
            shape = out.tensor.shape
            per_token = tuple(shape) in (
                (streams.batch, streams.pos, 1),
                (streams.batch, streams.pos),
            )
            alone = not call.children and streams.entering(call)
            if per_token and (alone or spec.gates):
                groups[_NUMBERS.sub("*", call.module)].append((call, out))
    for name, fits in groups.items():
        per = _by_iteration(fits, loop)
        there = [one for one in per if one is not None]
        if len(there) < max(1, len(per) - 1):  # the last may go without
            continue
        last = next(p for p in reversed(name.split(".")) if p != "*")
        yield Router(
            kind="gate",
            name=last,
            loop=loop.name,
            outputs=tuple(None if one is None else port(one[0], "out", one[1]) for one in per),
            activation=_activation(trace, there, "sigmoid"),
        )


def _by_iteration(fits: list[tuple[Call, Found]], loop: Loop) -> list[tuple[Call, Found] | None]:
    """The first that fits in each iteration."""
    found = []
    for iteration in loop.iterations:
        a, b = iteration.span
        found.append(next((item for item in fits if a <= item[0].index < b), None))
    return found


def _activation(
    trace: Trace, calls: list[tuple[Call, Found]], usual: Literal["softmax", "sigmoid"]
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


def _is_mesh(trace: Trace, found: LoopMap) -> bool:
    """Whether the example's states follow from its routers by MeSH Eqs. 2-5."""
    main = found.main
    pair: dict[Any, Router] = {r.kind: r for r in found.routers if main and r.loop == main.name}
    if main is None or not {"write", "read"} <= pair.keys() or not found.prelude:
        return False
    if pair["write"].transition is None or pair["read"].transition is None:
        return False

    def weight(kind: str, t: int) -> Tensor:
        where = pair[kind].transition if t < 0 else pair[kind].outputs[t]
        assert where is not None
        return weights(pair[kind], value_at(trace, where)).double()

    h_emb = value_at(trace, found.embed).double()
    outputs = [value_at(trace, found.prelude[-1].h_m)]
    outputs += [value_at(trace, it.h_m) for it in main.iterations]
    states = [*(value_at(trace, it.h) for it in main.iterations), value_at(trace, main.after)]
    slots = weight("write", -1).shape[-1]
    if any(x.shape != h_emb.shape for x in (*outputs, *states)):
        return False
    memory = h_emb.new_zeros(*h_emb.shape, slots)
    memory[..., 0] = h_emb
    for t, (output, state) in enumerate(zip(outputs, states, strict=True), start=-1):
        memory = memory + output.double()[..., None] * weight("write", t)[..., None, :]
        wanted = (memory * weight("read", t)[..., None, :]).sum(-1)
        if (wanted - state).abs().max() > 1e-2 * wanted.abs().max():
            return False
    return True

"""Trajectories of a wrapped model: which tensors they consist of, put together."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from warnings import warn

from torch import Tensor

from loopscope.models.loops import Loop, LoopMap, Port, Router, probabilities, weights
from loopscope.models.trajectory import Trajectory, Transition
from loopscope.models.wrapped.memory_slots import Key, mesh_slots
from loopscope.names import block_name


def state_ports(loop_map: LoopMap) -> dict[Key, Port]:
    """List every tensor that the trajectories of a model are made of.

    Args:
        loop_map: The model's map.

    Returns:
        What each tensor is → where it is.
    """
    ports: dict[Key, Port] = {("embed",): loop_map.embed, ("out",): loop_map.h_out}
    for loop in loop_map.loops:
        ports["after", loop.name] = loop.after
        for t, iteration in enumerate(loop.iterations):
            ports["h", loop.name, t] = iteration.h
            ports["h_m", loop.name, t] = iteration.h_m
        for state in loop.named[1:]:
            ports["after", loop.name, state.name] = state.after
            for t in range(loop.K):
                ports["h", loop.name, t, state.name] = state.h[t]
                ports["h_m", loop.name, t, state.name] = state.h_m[t]
        before, _ = _around(loop_map, loop)
        if before is not None:
            ports["before", loop.name] = before
    for router in loop_map.routers:
        for t, where in enumerate((router.transition, *router.outputs), start=-1):
            if where is not None:
                ports[router.kind, router.loop, router.name, t] = where
        if router.kind == "write" and router.query is not None:
            ports["query", router.loop] = router.query
    if loop_map.written is not None:
        ports["written",] = loop_map.written
    return ports


def trajectory_of(
    loop_map: LoopMap,
    tensors: Mapping[Key, Tensor],
    *,
    tokens: Any,
    logits: Any,
    memory: bool = True,
) -> Trajectory:
    """Put the tensors of one forward pass together.

    Args:
        loop_map: The model's map.
        tensors: What there is of `state_ports`; a gate may be missing.
        tokens: The tokens, (batch, token), or None.
        logits: The logits, or None.
        memory: Keep MeSH's slots after each write.

    Returns:
        The trajectory of the main loop, those of further loops in `others`. Where its states do not
        follow from the routers of a MeSH port on this input, it has no slots and no α.
    """
    common: dict[str, Any] = {
        "h_emb": tensors["embed",],
        "h_out": tensors["out",],
        "tokens": tokens,
        "logits": logits,
    }
    if not loop_map.loops:
        blocks = {"prelude": (common["h_emb"], common["h_out"])}
        return Trajectory(
            h=(common["h_out"],), h_m=(), memory=None, w_write=None, w_read=None, transition=None,
            blocks=blocks, mesh_cycle=False, **common,
        )  # fmt: skip
    by_loop = {loop.name: _trajectory(loop_map, loop, tensors, common) for loop in loop_map.loops}
    main, *further = by_loop
    others = {name: by_loop[name] for name in further}
    slots = mesh_slots(loop_map, tensors, keep=memory) if loop_map.mesh_cycle else None
    return replace(_with_slots(by_loop[main], slots), others=others)


def _with_slots(trajectory: Trajectory, slots: tuple[Tensor, ...] | None) -> Trajectory:
    """A trajectory with MeSH's slots, or without its cycle where there are none."""
    if slots is None:
        return replace(trajectory, mesh_cycle=False)
    if not slots or trajectory.transition is None:
        return trajectory
    transition = replace(trajectory.transition, memory=slots[0])
    return replace(trajectory, memory=slots[1:], transition=transition)


def _around(loop_map: LoopMap, loop: Loop) -> tuple[Port | None, bool]:
    """The output of the last layer before a loop, and whether layers follow it."""
    first, last = loop.iterations[0].span[0], loop.iterations[-1].span[1]
    units = loop_map.units()
    before = [unit.h_m for unit in units if unit.order < first]
    return before[-1] if before else None, any(unit.order >= last for unit in units)


def _trajectory(
    loop_map: LoopMap, loop: Loop, tensors: Mapping[Key, Tensor], common: dict[str, Any]
) -> Trajectory:
    """One loop's trajectory."""
    steps = range(loop.K)
    h, h_m = _course(loop, tensors)
    blocks: dict[str, tuple[Tensor, Tensor]] = {}
    before, followed = _around(loop_map, loop)
    if before is not None:
        blocks["prelude"] = (common["h_emb"], tensors["before", loop.name])
    blocks |= {block_name(t): (h[t], h_m[t]) for t in steps}
    if followed and not (loop.named and loop.parent):  # what follows reads another state
        blocks["coda"] = (h[-1], common["h_out"])
    routers: dict[str, Router] = {
        router.kind: router for router in loop_map.routers if router.loop == loop.name
    }
    return Trajectory(
        h=h,
        h_m=h_m,
        memory=None,
        w_write=_weights(routers.get("write"), loop, tensors),
        w_read=_weights(routers.get("read"), loop, tensors),
        transition=_transition(routers, loop, tensors, common["h_emb"]),
        blocks=blocks,
        loop=loop.name,
        path=tuple(iteration.path for iteration in loop.iterations),
        gates={
            router.name: _probabilities(router, loop, tensors)
            for router in loop_map.routers
            if router.loop == loop.name and router.kind == "gate"
        },
        mesh_cycle=loop_map.mesh_cycle and loop is loop_map.main,
        named=_named(loop, tensors, common),
        **common,
    )


def _course(loop: Loop, tensors: Mapping[Key, Tensor], *state: str) -> tuple[Any, Any]:
    """h(0) … h(K) and h_m(0) … h_m(K-1) of a loop's state, the main one where none is named."""
    steps = range(loop.K)
    h = [tensors["h", loop.name, t, *state] for t in steps]
    h_m = tuple(tensors["h_m", loop.name, t, *state] for t in steps)
    if h[0].shape != h_m[0].shape:  # an initial vector, the same at every position
        h[0] = _expanded(h[0], h_m[0])
    return (*h, tensors["after", loop.name, *state]), h_m


def _expanded(initial: Tensor, like: Tensor) -> Tensor:
    try:
        return initial.to(like).expand_as(like)
    except RuntimeError:
        return initial


def _named(
    loop: Loop, tensors: Mapping[Key, Tensor], common: dict[str, Any]
) -> dict[str, Trajectory]:
    """The trajectory of each of a loop's states; empty where it has a single one."""
    named: dict[str, Trajectory] = {}
    for number, state in enumerate(loop.named):
        h, h_m = _course(loop, tensors, *([state.name] if number else []))
        named[state.name] = Trajectory(
            h=h, h_m=h_m, memory=None, w_write=None, w_read=None, transition=None,
            blocks={block_name(t): (h[t], h_m[t]) for t in range(loop.K)},
            loop=f"{loop.name}.{state.name}",
            path=tuple(iteration.path for iteration in loop.iterations), mesh_cycle=False,
            **{**common, "logits": None},
        )  # fmt: skip
    return named


def _weights(router: Router | None, loop: Loop, tensors: Mapping[Key, Tensor]) -> Any:
    """A router's weights at each iteration, None where it was not called; None without one."""
    if router is None:
        return None
    keys = [(router.kind, loop.name, router.name, t) for t in range(loop.K)]
    return tuple(weights(router, tensors[key]) if key in tensors else None for key in keys)


def _probabilities(router: Router, loop: Loop, tensors: Mapping[Key, Tensor]) -> Any:
    """A gate's probabilities at each iteration, None where there are none for each sample."""
    batch = tensors["embed",].shape[0]
    keys = [("gate", loop.name, router.name, t) for t in range(loop.K)]
    values = [probabilities(router, tensors[k], batch) if k in tensors else None for k in keys]
    if any(p is None and k in tensors for p, k in zip(values, keys, strict=True)):
        warn(
            f"gate {router.name} does not give equally many numbers for each sample on this input; "
            "they are left out.",
            stacklevel=6,
        )
    return tuple(values)


def _transition(
    routers: Mapping[str, Router], loop: Loop, tensors: Mapping[Key, Tensor], h_emb: Tensor
) -> Transition | None:
    """What the routers do before the first iteration; None without such a transition."""
    if "write" not in routers:
        return None
    if not (routers["write"].transition and routers["read"].transition):
        return None
    w_write, w_read = (
        weights(routers[kind], tensors[kind, loop.name, kind, -1]) for kind in ("write", "read")
    )
    query = tensors.get(("query", loop.name), tensors.get(("before", loop.name), h_emb))
    return Transition(query=query, memory=None, w_write=w_write, w_read=w_read)

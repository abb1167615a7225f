"""Trajectories of a wrapped model: which tensors they consist of, put together."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from loopscope.models.loops.loop_map import Loop, LoopMap, Port, Router
from loopscope.models.loops.routers import weights
from loopscope.models.trajectory import Trajectory, Transition
from loopscope.names import block_name

Key = tuple[Any, ...]
"""What a tensor is: `("h", loop, t)`, `("after", loop)`, `("write", loop, router, t)` …"""


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
        before, _ = _around(loop_map, loop)
        if before is not None:
            ports["before", loop.name] = before
    for router in loop_map.routers:
        for t, where in enumerate((router.transition, *router.outputs), start=-1):
            if where is not None:
                ports[router.kind, router.loop, router.name, t] = where
    return ports


def trajectory_of(
    loop_map: LoopMap, tensors: Mapping[Key, Tensor], *, tokens: Any, logits: Any
) -> Trajectory:
    """Put the tensors of one forward pass together.

    Args:
        loop_map: The model's map.
        tensors: What there is of `state_ports`; a gate may be missing.
        tokens: The tokens, (batch, token), or None.
        logits: The logits, or None.

    Returns:
        The trajectory of the main loop, those of the others in `others`.
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
    main, *others = by_loop
    return replace(by_loop[main], others={name: by_loop[name] for name in others})


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
    h = (*(tensors["h", loop.name, t] for t in steps), tensors["after", loop.name])
    h_m = tuple(tensors["h_m", loop.name, t] for t in steps)
    blocks: dict[str, tuple[Tensor, Tensor]] = {}
    before, followed = _around(loop_map, loop)
    if before is not None:
        blocks["prelude"] = (common["h_emb"], tensors["before", loop.name])
    blocks |= {block_name(t): (h[t], h_m[t]) for t in steps}
    if followed:
        blocks["coda"] = (h[-1], common["h_out"])
    routers = {router.kind: router for router in loop_map.routers if router.loop == loop.name}

    def read(router: Router) -> tuple[Tensor | None, ...]:
        keys = [(router.kind, loop.name, router.name, t) for t in steps]
        return tuple(weights(router, tensors[k]) if k in tensors else None for k in keys)

    transition = None
    if "write" in routers and routers["write"].transition and routers["read"].transition:
        w = {k: weights(routers[k], tensors[k, loop.name, k, -1]) for k in ("write", "read")}
        query = tensors.get(("before", loop.name), common["h_emb"])
        transition = Transition(query=query, memory=None, w_write=w["write"], w_read=w["read"])
    routed: dict[str, Any] = {
        k: read(routers[k]) if k in routers else None for k in ("write", "read")
    }
    gates = {
        router.name: read(router)
        for router in loop_map.routers
        if router.loop == loop.name and router.kind == "gate"
    }
    return Trajectory(
        h=h,
        h_m=h_m,
        memory=None,
        w_write=routed["write"],
        w_read=routed["read"],
        transition=transition,
        blocks=blocks,
        loop=loop.name,
        path=tuple(iteration.path for iteration in loop.iterations),
        gates=gates,
        mesh_cycle=loop_map.mesh_cycle and loop is loop_map.main,
        **common,
    )

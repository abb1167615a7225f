"""Capture of wrapped models: one forward pass, every loop's states."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loopscope.errors import InputError
from loopscope.models.loops.loop_map import Loop, LoopMap, Port, Router
from loopscope.models.loops.routers import weights
from loopscope.probes.state_capture import Trajectory, Transition

if TYPE_CHECKING:
    from loopscope.models.wrapped.wrapped_model import WrappedModel

Key = tuple[Any, ...]


@torch.no_grad()
def capture_wrapped(model: "WrappedModel", tokens: Any, *, logits: bool) -> Trajectory:
    """Run a wrapped model once and keep the states of every iteration of every loop.

    Args:
        model: The wrapped model.
        tokens: Token ids (batch, pos), text, or what its forward takes.
        logits: Keep the logits too.

    Returns:
        The trajectory of the main loop, those of the others in `others`.

    Raises:
        InputError: for input it cannot take, or that makes it loop otherwise than the example did.
    """
    found = model.map
    given = model.prepare((tokens,), {})
    ports = _ports(found)
    output, kept = model.read(given, ports)
    _check_reached(model, ports, kept)
    ids = model.inputs.tokens_in(*given) if model.inputs.tokens is not None else None
    scores = model.logits_in(output) if logits else None
    if logits and (not isinstance(scores, Tensor) or ids is None or scores.shape[:2] != ids.shape):
        raise InputError(
            f"{model.name!r} returns no logits for each token on this input; leave logits=True "
            "out, or wrap it with an example= whose arguments ask for them."
        )
    common: dict[str, Any] = {
        "h_emb": kept["embed",],
        "h_out": kept["out",],
        "tokens": ids,
        "logits": scores,
    }
    if not found.loops:
        blocks = {"prelude": (kept["embed",], kept["out",])}
        return Trajectory(
            h=(kept["out",],), h_m=(), memory=None, w_write=None, w_read=None, transition=None,
            blocks=blocks, mesh_cycle=False, **common,
        )  # fmt: skip
    views = {loop.name: _view(found, loop, kept, common) for loop in found.loops}
    main, *others = views
    return replace(views[main], others={name: views[name] for name in others})


def _check_reached(
    model: "WrappedModel", ports: Mapping[Key, Port], kept: Mapping[Key, Tensor]
) -> None:
    """Raise if this input does not reach a state; a gate may be skipped."""
    for key, where in ports.items():
        if key not in kept and key[0] != "gate":
            raise InputError(
                f"{model.name!r} did not call {where.module} in every iteration in which it did on "
                "the example, so a state is missing; wrap it again with this input as example=."
            )


def _ports(found: LoopMap) -> dict[Key, Port]:
    """Everything that the trajectories are made of."""
    ports: dict[Key, Port] = {("embed",): found.embed, ("out",): found.h_out}
    for loop in found.loops:
        ports["after", loop.name] = loop.after
        for t, iteration in enumerate(loop.iterations):
            ports["h", loop.name, t] = iteration.h
            ports["h_m", loop.name, t] = iteration.h_m
        before, _ = _around(found, loop)
        if before is not None:
            ports["before", loop.name] = before
    for router in found.routers:
        for t, where in enumerate((router.transition, *router.outputs), start=-1):
            if where is not None:
                ports[router.kind, router.loop, router.name, t] = where
    return ports


def _around(found: LoopMap, loop: Loop) -> tuple[Port | None, bool]:
    """The output of the last layer before a loop, and whether layers follow it."""
    first, last = loop.iterations[0].span[0], loop.iterations[-1].span[1]
    units = found.units()
    before = [unit.h_m for unit in units if unit.order < first]
    return before[-1] if before else None, any(unit.order >= last for unit in units)


def _view(
    found: LoopMap, loop: Loop, kept: Mapping[Key, Tensor], common: dict[str, Any]
) -> Trajectory:
    """One loop's trajectory."""
    steps = range(loop.K)
    h = (*(kept["h", loop.name, t] for t in steps), kept["after", loop.name])
    h_m = tuple(kept["h_m", loop.name, t] for t in steps)
    blocks: dict[str, tuple[Tensor, Tensor]] = {}
    before, followed = _around(found, loop)
    if before is not None:
        blocks["prelude"] = (common["h_emb"], kept["before", loop.name])
    blocks |= {f"core{t + 1}": (h[t], h_m[t]) for t in steps}
    if followed:
        blocks["coda"] = (h[-1], common["h_out"])
    own = {router.kind: router for router in found.routers if router.loop == loop.name}

    def read(router: Router) -> tuple[Tensor | None, ...]:
        keys = [(router.kind, loop.name, router.name, t) for t in steps]
        return tuple(weights(router, kept[k]) if k in kept else None for k in keys)

    transition = None
    if "write" in own and own["write"].transition and own["read"].transition:
        w = {k: weights(own[k], kept[k, loop.name, k, -1]) for k in ("write", "read")}
        query = kept.get(("before", loop.name), common["h_emb"])
        transition = Transition(query=query, memory=None, w_write=w["write"], w_read=w["read"])
    routed: dict[str, Any] = {k: read(own[k]) if k in own else None for k in ("write", "read")}
    gates = {
        router.name: read(router)
        for router in found.routers
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
        mesh_cycle=found.mesh_cycle and loop is found.main,
        **common,
    )

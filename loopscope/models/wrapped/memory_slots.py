"""MeSH ports: their memory slots and router weights, under the names of native models."""

from collections.abc import Callable, Mapping
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from loopscope.errors import InputError
from loopscope.models.hooks import Point
from loopscope.models.loops import (
    LoopMap,
    MeshCycle,
    Port,
    Router,
    routers_of_memory,
    weights,
)

Key = tuple[Any, ...]
"""What a tensor is: `("h", loop, t)`, `("after", loop)`, `("write", loop, router, t)` …"""

SEEN = "as the model made it"
"""Last part of the key of a state before hooks of this run changed it."""


def slot_ports(loop_map: LoopMap) -> dict[Key, Port]:
    """What the memory slots are put together from.

    Args:
        loop_map: The map of a model whose states follow from its routers.

    Returns:
        What each tensor is → where it is, keys as in a trajectory.
    """
    pair, loop, written = routers_of_memory(loop_map), loop_map.main, loop_map.written
    assert pair is not None and loop is not None and written is not None
    ports: dict[Key, Port] = {("embed",): loop_map.embed, ("written",): written}
    for t, iteration in enumerate(loop.iterations):
        ports["h_m", loop.name, t] = iteration.h_m
    for router in pair:
        for t, where in enumerate((router.transition, *router.outputs), start=-1):
            assert where is not None
            ports[router.kind, loop.name, router.name, t] = where
    return ports


def check_ports(loop_map: LoopMap) -> dict[Key, Port]:
    """The states that are held against the slots, as the model made them.

    Args:
        loop_map: The map of a model whose states follow from its routers.

    Returns:
        What each tensor is → where it is; to be read before any hook of the run.
    """
    loop = loop_map.main
    assert loop is not None
    ports: dict[Key, Port] = {("after", loop.name, SEEN): loop.after}
    for t, iteration in enumerate(loop.iterations):
        ports["h", loop.name, t, SEEN] = iteration.h
    return ports


def made_states(loop_map: LoopMap, before: Mapping[str, Tensor]) -> dict[Key, Tensor]:
    """States as the model made them, where hooks replaced them there.

    Args:
        loop_map: The map.
        before: Name of a state, `loop.{t}.hook_state`, → what the model made.

    Returns:
        Those of the main loop, keys as in `check_ports`.
    """
    loop = loop_map.main
    assert loop is not None
    return {
        ("h", loop.name, t, SEEN): before[name]
        for t, iteration in enumerate(loop.iterations)
        if (name := f"loop.{iteration.path}.hook_state") in before
    }


def mesh_slots(
    loop_map: LoopMap, tensors: Mapping[Key, Tensor], *, keep: bool = True
) -> tuple[Tensor, ...] | None:
    """The slots after each write, held against the states of the same forward pass.

    Args:
        loop_map: The map of a model whose states follow from its routers on the example.
        tensors: What there is of `slot_ports`, and states: as the model made them, or as they are.
        keep: Keep the slots; otherwise only the first sample is looked at.

    Returns:
        (batch, slot, pos, d_model) of the transitional cycle and each iteration, in the dtype of
        the state; none if they are not kept. None, and a warning, where the states of this input
        do not follow from them.
    """
    pair, loop = routers_of_memory(loop_map), loop_map.main
    assert pair is not None and loop is not None
    steps = range(-1, loop.K)
    states = [("h", loop.name, t) for t in range(loop.K)] + [("after", loop.name)]
    write, read = ([weights(r, tensors[r.kind, loop.name, r.name, t]) for t in steps] for r in pair)
    cycle = MeshCycle(
        h_emb=tensors["embed",],
        values=[tensors["written",], *(tensors["h_m", loop.name, t] for t in range(loop.K))],
        w_write=write,
        w_read=read,
        states=[tensors[seen if (seen := (*key, SEEN)) in tensors else key] for key in states],
    )
    if not cycle.fits():
        _warn_withheld("tensors of other shapes take part in it")
        return None
    if not keep:
        cycle = cycle.first_sample()
    slots = list(cycle.memories()) if keep else None
    off, t = cycle.departure(slots)
    if off > cycle.tolerance():
        _warn_withheld(f"h({t}) is off by {off:.2g} of its largest element")
        return None
    dtype = tensors["h_m", loop.name, 0].dtype
    return tuple(memory.to(dtype) for memory in slots or ())


def _warn_withheld(why: str) -> None:
    warn(
        f"on this input the states do not follow from the routers by MeSH Eqs. 2-5 ({why}), though "
        "they did on the example; memory slots and α are withheld.",
        stacklevel=6,
    )


def changed(shown: Tensor, answer: Tensor) -> bool:
    """Whether a hook's answer is something else than what it was shown.

    Args:
        shown: The tensor.
        answer: What the hooks made of it.

    Returns:
        True where shape or values differ; NaN is equal to NaN.
    """
    if answer is shown:
        return False
    return answer.shape != shown.shape or not torch.allclose(
        answer.to(shown), shown, rtol=0, atol=0, equal_nan=True
    )


def look_at_slots(point: Point, memory: Tensor) -> None:
    """Show memory slots to hooks; they may not change them.

    Args:
        point: Has the hooks.
        memory: (batch, slot, pos, d_model).

    Raises:
        InputError: when a hook changes it.
    """
    if changed(memory, point(memory)):
        raise InputError(
            f"{point.name} can be read, not changed: the slots are rebuilt from what the model "
            "writes and reads. Patch the weights (write.hook_weights, read.hook_weights), what is "
            "written (hook_out) or what is read (hook_state) instead."
        )


def look_at_weights(
    point: Point, router: Router, *, verified: bool
) -> Callable[[Tensor], Tensor | None]:
    """Show a router's output as weights, and turn patched weights into such an output.

    A module that computes the weights itself is given the new ones; before a softmax that follows,
    their logarithm has the same effect, since they sum to one.

    Args:
        point: Has the hooks.
        router: The router.
        verified: Whether the states were seen to follow from the weights, so that these are known
            to be what the model uses.

    Returns:
        What to do with the router's output.

    Raises:
        InputError: when a hook gives weights that cannot be the model's.
    """

    def look(output: Tensor) -> Tensor | None:
        w = weights(router, output)
        answer = point(w)
        if not changed(w, answer):
            return None
        if not verified:
            raise InputError(
                f"{point.name} can be read, not changed: the model's states do not follow from "
                f"these weights alone. Patch the output of {router.kind} routers (hook_out of the "
                "module) instead."
            )
        if answer.shape != w.shape:
            raise InputError(
                f"a hook of {point.name} gave {tuple(answer.shape)}; weights are {tuple(w.shape)}."
            )
        answer = answer.to(w)
        if router.activation == "none":
            return answer.to(output.dtype)
        _check_simplex(str(point.name), answer.detach(), output.dtype)
        patched = answer.clamp_min(torch.finfo(answer.dtype).tiny).log().to(output.dtype)
        same = (answer == w).all(-1, keepdim=True)  # tokens that no hook touched stay bit-equal
        return torch.where(same, output, patched)

    return look


def _check_simplex(name: str, w: Tensor, dtype: torch.dtype) -> None:
    slack = max(1e-4, 4 * torch.finfo(dtype).eps)
    if bool((w >= 0).all()) and bool(((w.sum(-1) - 1).abs() <= slack).all()):
        return
    raise InputError(
        f"a hook of {name} gave weights that are negative or do not sum to 1 over the slots; this "
        "model's own softmax follows, which gives no others. Divide them by their sum, or patch "
        "what is read (hook_state)."
    )

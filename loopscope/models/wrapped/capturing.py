"""Capturing: the states of one forward pass, also of one that loops otherwise than the example."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loopscope.errors import InputError
from loopscope.models.trajectory import Trajectory
from loopscope.models.wrapped.inputs import Arguments
from loopscope.models.wrapped.run_context import uncompiled, without_checkpointing
from loopscope.models.wrapped.taps import counted
from loopscope.models.wrapped.trajectories import state_ports, trajectory_of


def captured(
    model: Any, arguments: Arguments, *, memory: bool, logits: bool, output: bool
) -> Trajectory:
    """Run a model once and keep the states of every iteration of every loop.

    Args:
        model: The model.
        arguments: Its arguments, from `prepare`.
        memory: Keep the memory slots of a MeSH port.
        logits: Keep the logits too.
        output: Keep what the original returns.

    Returns:
        The trajectory.

    Raises:
        InputError: as `WrappedModel.capture`.
    """
    ports = state_ports(model.map)
    returned, tensors = model.read(arguments, ports)
    for key, port in ports.items():
        if key not in tensors and key[0] != "gate":  # a gate may be skipped
            raise InputError(
                f"{model.name!r} did not call {port.module} in every iteration in which it did "
                "on the example, so a state is missing; wrap it again with this input as "
                "example=."
            )
    ids = model.inputs.tokens_in(*arguments) if model.inputs.tokens is not None else None
    scores = model.logits_in(returned) if logits else None
    fits = isinstance(scores, Tensor) and ids is not None and scores.shape[:2] == ids.shape
    if logits and not fits:
        raise InputError(
            f"{model.name!r} returns no logits for each token on this input; leave logits=True "
            "out, or wrap it with an example= whose arguments ask for them."
        )
    trajectory = trajectory_of(model.map, tensors, tokens=ids, logits=scores, memory=memory)
    return replace(trajectory, output=returned) if output else trajectory


@torch.no_grad()
def calls_on(self: Any, inputs: Any) -> tuple[int, ...]:
    """Tell how often iterations begin on an input: equal where a model loops as often.

    Args:
        self: The model.
        inputs: What its forward takes.

    Returns:
        Calls of each module that begins iterations, in the order of `plan.begins`.
    """
    model, arguments = self, self.prepare((inputs,), {})
    with (
        uncompiled(),
        without_checkpointing(model.module),
        counted(model._originals, model.plan) as calls,
    ):
        model.run(arguments, [])
    return tuple(calls.values())


def wrapped_on(self: Any, inputs: Any) -> Any:
    """Give the same module with the iterations that it runs on an input; hooks are not shared.

    Args:
        self: The model.
        inputs: What its forward takes, in place of the example.

    Returns:
        A model of its own around the same module.
    """
    model, (args, kwargs) = self, self.prepare((inputs,), {})
    changes: dict[str, Any] = {"args": args, "kwargs": kwargs}
    recipe: Any = model.recipe
    try:
        again = recipe.build(model.module, **changes)
    except InputError:
        if recipe.loops is None:
            raise
        again = recipe.build(model.module, **changes, loops=None)
    if again.K == 0 and len(model.map.loops) == 1:  # what runs once shows no loop
        units = model.map.loops[0].iterations[0].units
        core = tuple(dict.fromkeys(unit.module for unit in units))
        spec = replace(recipe.spec, core=core)
        again = recipe.build(model.module, **changes, loops=None, spec=spec)
    again.seed = model.seed
    return again


__all__ = ["calls_on", "captured", "wrapped_on"]

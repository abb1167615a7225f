"""Outputs of routers and gates: in which iteration each is given, and as which weights."""

from typing import Literal

import torch
from torch import Tensor, nn

from loopscope.models.loops.loop_map import Loop, Router
from loopscope.models.loops.tracing import Call, CallTensor, Trace


def by_iteration(
    fits: list[tuple[Call, CallTensor]], loop: Loop
) -> list[tuple[Call, CallTensor] | None]:
    """The first output that fits in each iteration.

    Args:
        fits: Calls and their outputs, in order.
        loop: The loop.

    Returns:
        One per iteration, None where there is none.
    """
    outputs = []
    for iteration in loop.iterations:
        a, b = iteration.span
        outputs.append(next((output for output in fits if a <= output[0].index < b), None))
    return outputs


def activation(
    trace: Trace, calls: list[tuple[Call, CallTensor]], usual: Literal["softmax", "sigmoid"]
) -> Literal["softmax", "sigmoid", "none"]:
    """What turns outputs into weights: nothing where a module that is no bare matrix did it.

    Args:
        trace: The traced forward pass.
        calls: Calls and their outputs.
        usual: What follows a bare matrix.

    Returns:
        The activation.
    """
    if all(isinstance(trace.modules[c.module], nn.Linear) for c, _ in calls):
        return usual
    values = [out.tensor.float() for _, out in calls]
    inside = all(bool((v >= 0).all() and (v <= 1).all()) for v in values)
    if usual == "softmax":
        inside = inside and all(bool((v.sum(-1) - 1).abs().max() < 1e-2) for v in values)
    return "none" if inside else usual


def weights(router: Router, output: Tensor) -> Tensor:
    """A router's output as weights over slots (batch, pos, slot), or as probabilities.

    Args:
        router: The router.
        output: What its module gave.

    Returns:
        The weights, in float32 where the output is narrower; a gate's in the output's shape.
    """
    x = output if output.dtype == torch.float64 else output.float()
    if router.activation == "softmax":
        return x.softmax(-1)
    return x.sigmoid() if router.activation == "sigmoid" else x


def probabilities(router: Router, output: Tensor, batch: int) -> Tensor | None:
    """A gate's output as probabilities.

    Args:
        router: The gate.
        output: What its module gave: (batch, positions, 1), (batch, positions), or all samples in
            one axis, (batch · positions, 1), one sample after the other.
        batch: Number of samples.

    Returns:
        (batch, positions); None where the samples do not have equally many.
    """
    if output.numel() % batch or output.shape[0] % batch:
        return None
    return weights(router, output).reshape(batch, -1)

"""Capture: one forward pass of any model, every state of its loops kept."""

from collections.abc import Mapping
from typing import Any

from loopscope.errors import LoopCountError
from loopscope.models import Hooked, Trajectory


def capture(
    model: Hooked,
    tokens: Any,
    *,
    memory: bool = True,
    logits: bool = False,
    loops: int | Mapping[str, int] | None = None,
) -> Trajectory:
    """Run a model once and keep the states of every iteration.

    Args:
        model: A native or wrapped model.
        tokens: Token ids (batch, pos), or text for a model with a tokenizer.
        memory: Keep MeSH's buffer after each write: K + 1 tensors of (batch, slot, pos, d_model),
            by far the largest part.
        logits: Keep the logits too; otherwise a native model does not compute them.
        loops: Number of iterations, where the model allows another than its own; a dict by loop.

    Returns:
        The trajectory; its tensors carry no gradients. A single text that a model loops over
        otherwise than over its example has the iterations that it runs.

    Raises:
        InputError: for tokens the model cannot take, or a number of iterations it cannot run.
    """
    if loops is not None:
        model = model.with_loops(loops)
    try:
        return model.capture(tokens, memory=memory, logits=logits)
    except LoopCountError:
        if any(point.fwd_hooks for point in model.hook_points()):
            raise  # they would not be those of the model that is wrapped anew
        return _own_trajectory(model, tokens, memory=memory, logits=logits)


def _own_trajectory(model: Hooked, tokens: Any, **options: bool) -> Trajectory:
    """That of a single text, which runs other iterations than the example.

    Raises:
        LoopCountError: for several: each may run its own.
    """
    again = model.wrapped_on(tokens)
    trajectory = again.capture(tokens, **options)
    if len(trajectory.h_emb) > 1:
        model.capture(tokens, **options)
    return trajectory

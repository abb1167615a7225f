"""Capture: one forward pass of any model, every state of its loops kept."""

from collections.abc import Mapping
from typing import Any

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
        The trajectory; its tensors carry no gradients.

    Raises:
        InputError: for tokens the model cannot take, or a number of iterations it cannot run.
    """
    if loops is not None:
        model = model.with_loops(loops)
    return model.capture(tokens, memory=memory, logits=logits)

"""Readout: the coda and the head on another state than h(K) (a coda lens)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.errors import InputError
from loopscope.models.native.loop_model import LoopModel
from loopscope.models.wrapped.wrapped_model import WrappedModel


@torch.no_grad()
def read_out(
    model: LoopModel | WrappedModel, tokens: Int[Tensor, "batch pos"], h: Float[Tensor, "..."]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits when the coda reads the state `h` in place of h(K).

    A native model runs its coda alone; a wrapped one runs whole, with `h` put where h(K) is read.

    Args:
        model: A native or wrapped model with a loop.
        tokens: The tokens, (batch, pos).
        h: A state of its main loop, (batch, pos, d_model).

    Returns:
        The logits; those of the model where h is h(K).

    Raises:
        InputError: if the model has no loop.
    """
    if isinstance(model, LoopModel):
        return model.unembed(model.ln_final(model.read_out(h)))
    if model.map.main is None:
        raise InputError(f"{model.name!r} has no loop, so there is no state to read out.")
    after = f"loop.{model.map.main.name}.after.hook_in"
    return model.run_with_hooks(tokens, fwd_hooks=[(after, lambda old, hook: h.to(old))])


def read_out_losses(
    model: LoopModel | WrappedModel, tokens: Int[Tensor, "batch pos"], h: Float[Tensor, "..."]
) -> list[Tensor]:
    """Mean next-token cross-entropy of each sample when the coda reads `h`, nats per token.

    Args:
        model: A native or wrapped model with a loop.
        tokens: The tokens, (batch, pos), on any device.
        h: A state of its main loop, (batch, pos, d_model).

    Returns:
        One number per sample, still on the model's device.
    """
    if isinstance(model, LoopModel):
        with torch.no_grad():
            # the logits of one sample at a time: of a batch they would be the largest tensor of all
            outs = model.ln_final(model.read_out(h))
            return losses((model.unembed(out) for out in outs), tokens)
    return losses(read_out(model, tokens, h), tokens)


def losses(logits: Any, tokens: Int[Tensor, "batch pos"]) -> list[Tensor]:
    """Mean next-token cross-entropy of each sample, nats per token.

    Args:
        logits: (pos, d_vocab) of each sample, as a tensor or one after the other.
        tokens: The tokens, (batch, pos).

    Returns:
        One number per sample, on the logits' device.
    """
    pairs = zip(logits, tokens, strict=True)
    return [F.cross_entropy(x[:-1].float(), y[1:].to(x.device)) for x, y in pairs]


def beyond(K: int, T: int, *, cheap: bool) -> Sequence[int]:
    """At which t > K the readout is taken: at each where that is cheap, else at up to four."""
    there = range(K + 1, T + 1)
    if cheap or len(there) <= 4:
        return there
    return [K + round((T - K) * quarter / 4) for quarter in range(1, 5)]

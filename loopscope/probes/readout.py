"""Readout: the coda and the head on another state than h(K) (a coda lens)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.models import Hooked


@torch.no_grad()
def read_out(
    model: Hooked, tokens: Int[Tensor, "batch pos"], h: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Give the logits when the coda reads the state `h` in place of h(K).

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
    return torch.stack(list(model.read_out_logits(h, tokens)))


@torch.no_grad()
def read_out_losses(
    model: Hooked, tokens: Int[Tensor, "batch pos"], h: Float[Tensor, "batch pos d_model"]
) -> list[Tensor]:
    """Give the mean next-token cross-entropy of each sample when the coda reads `h`.

    Args:
        model: A native or wrapped model with a loop.
        tokens: The tokens, (batch, pos), on any device.
        h: A state of its main loop, (batch, pos, d_model).

    Returns:
        Nats per token, one number per sample, still on the model's device.
    """
    return losses(model.read_out_logits(h, tokens), tokens)


def losses(
    logits: Iterable[Float[Tensor, "pos d_vocab"]], tokens: Int[Tensor, "batch pos"]
) -> list[Tensor]:
    """Give the mean next-token cross-entropy of each sample.

    Args:
        logits: (pos, d_vocab) of each sample, as a tensor or one after the other.
        tokens: The tokens, (batch, pos).

    Returns:
        Nats per token, one number per sample, on the logits' device.
    """
    pairs = zip(logits, tokens, strict=True)
    return [F.cross_entropy(x[:-1].float(), ids[1:].to(x.device)) for x, ids in pairs]

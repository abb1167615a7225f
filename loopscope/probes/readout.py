"""Readout: the coda and the head on another state than h(K) (a coda lens)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.models import Hooked


@torch.no_grad()
def read_out(
    model: Hooked, tokens: Int[Tensor, "batch token"], h: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch token d_vocab"]:
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
    model: Hooked, tokens: Int[Tensor, "batch token"], h: Float[Tensor, "batch pos d_model"]
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


def matched(
    h: Float[Tensor, "batch pos d_model"], h_K: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """Bring each token of a state to the length that it has in h(K), its direction kept.

    The coda expects the length of h(K). Where a loop only makes states longer, as a residual or
    anchor does around a core that computes nothing, what is matched is the same at every t.

    Args:
        h: h(t), (batch, pos, d_model).
        h_K: h(K) of the same tokens.

    Returns:
        h·‖h(K)‖/‖h‖ per token, in the dtype of `h`; a token of length 0 stays 0.
    """
    length, length_K = (
        torch.linalg.vector_norm(state.to(h.device), dim=-1, keepdim=True, dtype=_wide(h))
        for state in (h, h_K)
    )
    factor = torch.where(length == 0, torch.ones_like(length), length_K / length)
    return (h * factor).to(h.dtype)


def _wide(state: Tensor) -> torch.dtype:
    return torch.float32 if state.device.type == "mps" else torch.float64


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

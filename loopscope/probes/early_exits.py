"""Early exits: when each token would stop looping by a rule, and what that costs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class Readings(NamedTuple):
    """What is predicted from each state of one sample.

    Attributes:
        loss: Cross-entropy of the true next token when the coda reads h(t), in nats, (T + 1, pos).
        kl: KL(p(t) ‖ p(t−1)) between what is read from consecutive states, t = 1 … T, in nats,
            (T, pos).
    """

    loss: Float[Tensor, "_ pos"]
    kl: Float[Tensor, "iter pos"]


def readings(
    logits: Sequence[Float[Tensor, "token d_vocab"]], tokens: Int[Tensor, " token"]
) -> Readings:
    """Compare what is read from each state of a sample with the true token and the state before.

    Args:
        logits: Those read from h(0) … h(T).
        tokens: The tokens.

    Returns:
        Losses and divergences of all positions but the last, which has no next token.
    """
    losses, divergences = [], []
    before: Tensor | None = None
    for at_t in logits:
        wide = torch.promote_types(at_t.dtype, torch.float32)
        log_p = F.log_softmax(at_t[:-1].to(wide), dim=-1)
        losses.append(F.nll_loss(log_p, tokens[1:].to(log_p.device), reduction="none"))
        if before is not None:
            divergences.append((log_p.exp() * (log_p - before)).sum(-1).clamp(min=0))
        before = log_p
    empty = losses[0].new_empty(0, len(losses[0]))
    return Readings(torch.stack(losses), torch.stack(divergences) if divergences else empty)


def exit_times(
    signal: Float[Tensor, "iter pos"], thresholds: Float[Tensor, " threshold"]
) -> Int[Tensor, "threshold pos"]:
    """Tell after how many iterations each token stops, by a threshold on a signal.

    Args:
        signal: What is known after iteration t = 1 … T; NaN where the rule has no value yet.
        thresholds: A token stops at the first t whose signal is at most this.

    Returns:
        t = 1 … T; T for tokens that never stop before.
    """
    T = len(signal)
    stops = signal.unsqueeze(0) <= thresholds.to(signal)[:, None, None]
    first = stops.int().argmax(1) + 1
    return torch.where(stops.any(1), first, T)


def exit_losses(
    losses: Float[Tensor, "_ pos"], times: Int[Tensor, "threshold pos"]
) -> Float[Tensor, "threshold pos"]:
    """Give each token's loss where it stops.

    The tokens that go on see the states of all others, those that stopped among them, go on too:
    what a rule would have lost in attention is not counted.

    Args:
        losses: Of every t = 0 … T, (T + 1, pos).
        times: When each token stops.

    Returns:
        Its loss, in the unit of the losses.
    """
    return losses.gather(0, times)


def quantile_thresholds(signal: Tensor, count: int) -> Float[Tensor, " threshold"]:
    """Choose thresholds that let ever more tokens stop.

    Args:
        signal: Values of a signal, of any shape; those that are not finite are left out.
        count: How many thresholds.

    Returns:
        Evenly spaced quantiles, each midway to the next greater value, ascending, the least below
        all values (no token stops early) and the last above them (every token stops at once); in
        float64 on the CPU. Empty where there is no value.
    """
    values = signal[torch.isfinite(signal)].double().cpu().sort().values
    if not len(values):
        return values
    values = values.unique()
    # between neighbours: at a value itself its last bit, which depends on the batch, would decide
    between = torch.cat([(values[:-1] + values[1:]) / 2, values[-1:] * 1.001 + 1e-30])
    places = torch.linspace(0, len(between) - 1, count).round().long()
    chosen = between[places].clone()
    chosen[0] = -1.0  # signals are never negative
    return chosen.unique()

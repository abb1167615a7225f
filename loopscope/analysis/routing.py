"""Routing: what the routers of a model with memory slots do, and the α they imply (MeSH Eq. 7)."""

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from loopscope.analysis.flags import Flagged, flagged


def router_statistics(w: Float[Tensor, "batch pos slot"]) -> tuple[Flagged, Flagged]:
    """Mean weight per slot and mean entropy of one router (MeSH Eq. 3), per sample.

    Args:
        w: Router weights, a softmax over the slots, (batch, pos, slot).

    Returns:
        The mean over the tokens of each slot's weight, (batch, slot), and the mean over the
        tokens of −Σ_b w_b ln w_b in nats, (batch,), 0 for a router that always picks one slot.
    """
    w = w.to(torch.float64)
    entropy = -torch.special.xlogy(w, w).sum(-1).mean(-1)
    return flagged(w.mean(1).cpu().numpy()), flagged(entropy.cpu().numpy())


def gate_statistics(p: Float[Tensor, "batch pos"]) -> tuple[Flagged, Flagged]:
    """Mean probability and mean entropy of one gate (an exit gate, a token router), per sample.

    Args:
        p: The gate's probability for each token, (batch, pos).

    Returns:
        The mean over the tokens of p and of −p ln p − (1−p) ln(1−p) in nats, (batch,) each; the
        entropy is 0 for a gate that is always sure.
    """
    p = p.to(torch.float64)
    entropy = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)).mean(-1)
    return flagged(p.mean(-1).cpu().numpy()), flagged(entropy.cpu().numpy())


def alpha_sources(iterations: int, *, transition: bool = True) -> tuple[str, ...]:
    """Names of the sources of `alpha`, in its order: `h_emb`, `prelude`, `core1` … `coreK`.

    Without a transitional cycle the prelude's output is in no slot, hence no source.
    """
    cores = (f"core{t + 1}" for t in range(iterations))
    return ("h_emb", *(("prelude",) if transition else ()), *cores)


def alpha(
    w_write: Float[Tensor, "batch pos iter slot"], w_read: Float[Tensor, "batch pos iter slot"]
) -> Float64[Tensor, "batch pos iter source"]:
    """How much each earlier output contributes to every state, exactly and per token.

    h(t+1) = Σ_i α_i ⊙ h_m(i) + α_pre ⊙ f_pre(h_emb) + α_emb ⊙ h_emb (MeSH Eq. 7 with our extension
    to the transitional cycle), where α_i(t+1) = Σ_b w_read_b(t)·w_write_b(i) for i ≤ t and
    α_emb(t+1) = w_read_0(t), because only slot 0 starts with h_emb (MeSH Eq. 2). Without a
    transitional cycle the same holds of the K iterations alone, for h(1) … h(K).

    Args:
        w_write: Write weights of the transitional cycle and of the K iterations, in that order,
            (batch, pos, K + 1, slot).
        w_read: Read weights, likewise.

    Returns:
        (batch, pos, K + 1, K + 2) in float64: the states h(0) … h(K) by the sources of
        `alpha_sources(K)`; 0 where a source does not exist yet.
    """
    write, read = w_write.to(torch.float64), w_read.to(torch.float64)
    outputs = torch.einsum("npjb,npib->npji", read, write).tril()
    return torch.cat([read[..., :1], outputs], dim=-1)


def alpha_statistics(
    w_write: Float[Tensor, "batch pos iter slot"], w_read: Float[Tensor, "batch pos iter slot"]
) -> Flagged:
    """Mean of `alpha` over the tokens: (batch, K + 1 states, K + 2 sources)."""
    return flagged(alpha(w_write, w_read).mean(1).cpu().numpy())


def alpha_exists(iterations: int) -> np.ndarray:
    """Which (state, source) pairs of `alpha` exist: a core output only feeds later states."""
    states, sources = np.ogrid[: iterations + 1, : iterations + 2]
    return sources <= states + 1

"""Attention patterns: how far those of a head move from one iteration to the next."""

import torch
from jaxtyping import Float
from torch import Tensor

Pattern = Float[Tensor, "batch head query key"]


def jensen_shannon(p: Pattern, q: Pattern) -> Float[Tensor, "batch head query"]:
    """Compute the Jensen-Shannon divergence of the patterns of each query, in nats.

    JS(p, q) = H((p + q)/2) − (H(p) + H(q))/2, from 0 (alike) to ln 2 (nothing in common); the
    square of `scipy.spatial.distance.jensenshannon`.

    Args:
        p: Weights that sum to 1 over the keys, (batch, head, query, key).
        q: Likewise.

    Returns:
        (batch, head, query), at least in float32.
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    p, q = p.to(wide), q.to(p.device, wide)
    between = _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2
    return between.clamp(min=0)  # rounding may fall below


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)

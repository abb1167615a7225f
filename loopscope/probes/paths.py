"""Paths: how far, and which way, the states of each token move from iteration to iteration."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Stream = Float[Tensor, "batch pos d_model"]

LEAST_STATES = 3
"""Two steps: fewer make no angle and no rate, so no kind of path and no limit."""

SETTLING = 0.9
"""A path settles where each of its later steps is at most so long as the one before."""

STILL = 1e-3
"""A path whose last step is at most so long, relative to its state, has settled."""

OPPOSED = -0.25
"""Cosine of the last step with an earlier one from which on it goes back: about 105 degrees."""

NEARING = 0.9
"""Steps that shrink more slowly have no limit that could be told from those at hand."""


class Paths(NamedTuple):
    """What the steps Δ(t) = h(t+1) − h(t) of each token are like; NaN where undefined.

    Attributes:
        size: ‖Δ(t)‖ / ‖h(t)‖, (batch, pos, T).
        cosine: cos∠(Δ(t), Δ(t−1)), likewise; NaN at t = 0, and where a step is zero.
        acceleration: ‖Δ(t) − Δ(t−1)‖ / ‖h(t)‖, likewise; NaN at t = 0.
        to_last: ‖h(t) − h(T)‖ / ‖h(T)‖, (batch, pos, T + 1).
        to_limit: ‖h(t) − h*‖ / ‖h*‖, likewise, h* of `limits`; NaN for tokens that have none.
        rate: ‖Δ(t+1)‖_F / ‖Δ(t)‖_F of all tokens together, (batch, T − 1).
    """

    size: Float[Tensor, "batch pos iter"]
    cosine: Float[Tensor, "batch pos iter"]
    acceleration: Float[Tensor, "batch pos iter"]
    to_last: Float[Tensor, "batch pos _"]
    to_limit: Float[Tensor, "batch pos _"]
    rate: Float[Tensor, "batch _"]


class Kinds(NamedTuple):
    """The kind of each token's path: exactly one holds (none where a state is not finite).

    Attributes:
        settles: Its steps shrink, or have come to rest.
        orbits: They do not shrink, and the last goes back against an earlier one.
        drifts: They do not shrink and do not go back: it moves on.
    """

    settles: Bool[Tensor, "batch pos"]
    orbits: Bool[Tensor, "batch pos"]
    drifts: Bool[Tensor, "batch pos"]


def directions(h: Sequence[Stream]) -> list[Stream]:
    """Bring each token's state to length 1, so that its growth counts for nothing.

    Args:
        h: States, each (batch, pos, d_model).

    Returns:
        h/‖h‖ per token; a token of length 0 stays 0.
    """
    lengths = [torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in h]
    return [x / torch.where(n == 0, 1, n) for x, n in zip(h, lengths, strict=True)]


def token_paths(h: Sequence[Stream]) -> Paths:
    """Measure the path of each token through h(0) … h(T).

    Step, cosine and acceleration follow Pappone et al. (2509.23314), whose acceleration
    a(t) = ‖Δ(t) − Δ(t−1)‖ is not relative; here it is divided by ‖h(t)‖ as the step is, so that
    states of different lengths compare.

    Args:
        h: h(0) … h(T), T ≥ 1, each (batch, pos, d_model), in float32 or float64.

    Returns:
        Each of them per token, the rate per sample.
    """
    moves = [b - a for a, b in pairwise(h)]
    sizes = [_norm(x) for x in h]
    lengths = [_norm(move) for move in moves]
    undefined = torch.full_like(lengths[0], torch.nan)
    pairs = list(pairwise(moves))
    cosines = [undefined, *(_cosine(before, move) for before, move in pairs)]
    turns = [undefined, *(_norm(move - before) for before, move in pairs)]
    whole = [torch.linalg.vector_norm(length, dim=-1) for length in lengths]
    rates = [_over(after, before) for before, after in pairwise(whole)]
    limit, exists = limits(h)
    to_limit = _distances(h, limit)
    to_limit[~exists] = torch.nan
    return Paths(
        size=_stacked([_over(a, b) for a, b in zip(lengths, sizes, strict=False)]),
        cosine=_stacked(cosines),
        acceleration=_stacked([_over(a, b) for a, b in zip(turns, sizes, strict=False)]),
        to_last=_distances(h, h[-1]),
        to_limit=to_limit,
        rate=torch.stack(rates, -1) if rates else whole[0].new_empty(len(whole[0]), 0),
    )


def limits(h: Sequence[Stream]) -> tuple[Stream, Bool[Tensor, "batch pos"]]:
    """Extrapolate where each token's path leads, as if its last two steps went on.

    Aitken's Δ² for vectors: with r = ⟨Δ(T−1), Δ(T−2)⟩ / ‖Δ(T−2)‖², h* = h(T) + Δ(T−1)·r/(1−r).
    Exact where all steps are multiples of each other; in a contraction of several rates it is as
    good as the slowest of them has come to rule the steps.

    Args:
        h: h(0) … h(T), each (batch, pos, d_model).

    Returns:
        h*, and which tokens have one: those with |r| ≤ 0.9, and those that have stopped. Of the
        others h* is h(T).
    """
    last = h[-1]
    if len(h) < LEAST_STATES:
        return last, torch.zeros(last.shape[:2], dtype=torch.bool, device=last.device)
    before, move = h[-2] - h[-3], last - h[-2]
    square = before.square().sum(-1)
    ratio = torch.where(square == 0, 0, (move * before).sum(-1) / square)
    stopped = _norm(move) == 0
    exists = stopped | ((ratio.abs() <= NEARING) & (square > 0))
    factor = torch.where(exists & ~stopped, ratio / (1 - ratio), 0)
    return last + factor.unsqueeze(-1) * move, exists


def path_kinds(h: Sequence[Stream]) -> Kinds:
    """Tell settling, orbiting and drifting paths apart, by their step norms and angles.

    * settles: the geometric mean of ‖Δ(t+1)‖/‖Δ(t)‖ over the later half of the steps (of two at
      least) is at most 0.9; or the last step is at most 0.001 of its state;
    * orbits: it does not settle, and the last step goes back against an earlier one, the cosine
      of some pair Δ(s), Δ(T−1) being at most −0.25;
    * drifts: neither.

    A turn of less than about 105°/(T−1) per iteration cannot be told from a drift by T steps.

    Args:
        h: h(0) … h(T), T ≥ 2, each (batch, pos, d_model).

    Returns:
        Which tokens' paths are of each kind.
    """
    moves = [b - a for a, b in pairwise(h)]
    lengths = [_norm(move) for move in moves]
    T = len(moves)
    middle = max(min(T // 2, T - 2), 0)
    rate = _over(lengths[-1], lengths[middle]) ** (1 / (T - 1 - middle))
    still = lengths[-1] <= STILL * _norm(h[-2])
    settles = still | (rate <= SETTLING)
    back = torch.stack([_cosine(move, moves[-1]) for move in moves[:-1]]).nan_to_num(0).amin(0)
    finite = torch.stack([torch.isfinite(x).all(-1) for x in h]).all(0)
    orbits = ~settles & (back <= OPPOSED)
    return Kinds(settles & finite, orbits & finite, ~settles & ~orbits & finite)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


def _over(a: Tensor, b: Tensor) -> Tensor:
    """The quotient; 0/0 is 0, for what rests does not move, and anything else over 0 is NaN."""
    return torch.where(b == 0, torch.where(a == 0, 0.0, torch.nan), a / b)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    lengths = _norm(a) * _norm(b)
    return torch.where(lengths == 0, torch.nan, ((a * b).sum(-1) / lengths).clamp(-1, 1))


def _distances(h: Sequence[Tensor], end: Tensor) -> Tensor:
    length = _norm(end)
    return _stacked([_over(_norm(x - end), length) for x in h])


def _stacked(by_iteration: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(by_iteration), -1)

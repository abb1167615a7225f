"""Masses: how much of a model passes through a place, before anybody asks whether it is needed.

| kind | mass, a mean over tokens | mass_norm, likewise |
|---|---|---|
| iteration | ‖h(t+1) − h(t)‖ / ‖h(t)‖ | ‖h(t+1) − h(t)‖ |
| attention, mlp, head | ‖output‖ / ‖h(t)‖ (of several layers: of the sum) | ‖output‖ |
| write | w_write_b(t) | w_write_b(t) · ‖h_m(t)‖ (transition: the prelude's output) |
| read | w_read_b(t) | w_read_b(t) · ‖m_b(t)‖ |
| slot | w_read_b(s), mean over the reads s = t … K−1 | that · ‖m_b(t)‖ |
| edge | abs α = ‖contribution‖ / ‖source‖ | ‖contribution‖ = abs α · ‖source‖ |
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.models import Trajectory
from loopscope.names import state_number
from loopscope.probes import CleanRun, Place


class Mass(NamedTuple):
    """The masses of a place, one number per sample.

    Attributes:
        mass: See the module's table; a weight or a ratio.
        norm: In the unit of states.
    """

    mass: Float[Tensor, " batch"]
    norm: Float[Tensor, " batch"]


def place_mass(clean: CleanRun, place: Place) -> Mass:
    """Tell how much passes through a place.

    Args:
        clean: A pass of the model.
        place: One of its places.

    Returns:
        Mass and its norm, float32 or float64; NaN where shapes allow none.
    """
    loop = clean.trajectory.loops[place.loop]
    if place.kind == "iteration":
        return _step(loop, place.t)
    value = clean.value(place)
    if place.kind in ("write", "read"):
        of = _written(loop, place.t) if place.kind == "write" else _memory(loop, place)
        return Mass(_mean(value), _mean(_wide(value) * _length(of).to(value.device)))
    if place.kind == "slot":
        reads = [_read(loop, s, place).to(value.device) for s in range(place.t, loop.K)]
        weight = torch.stack(reads).mean(0)
        return Mass(_mean(weight), _mean(weight * _length(value)))
    if place.kind == "edge":
        length = _length(value)
        source = _length(_source(loop, place.source)).to(length.device)
        alpha = torch.where(source == 0, torch.zeros_like(source), length / source)
        return Mass(_mean(alpha), _mean(length))
    output = _length(value.sum(2) if value.ndim == 4 else value)
    stream = _length(loop.h[place.t]).to(output.device)
    if stream.shape != output.shape:
        return Mass(torch.full_like(_mean(output), torch.nan), _mean(output))
    return Mass(_mean(output / stream), _mean(output))


def _step(loop: Trajectory, t: int) -> Mass:
    before, after = loop.h[t], loop.h[t + 1]
    if before.shape != after.shape:
        nothing = before.new_full((len(before),), torch.nan)
        return Mass(nothing, nothing)
    step = _length(_wide(after) - _wide(before).to(after.device))
    return Mass(_mean(step / _length(before).to(step.device)), _mean(step))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _length(x: Tensor) -> Tensor:
    """‖x‖ of each token, (batch, pos)."""
    return torch.linalg.vector_norm(_wide(x), dim=-1)


def _mean(x: Tensor) -> Tensor:
    """Over the tokens of each sample."""
    return _wide(x).mean(1)


def _written(loop: Trajectory, t: int) -> Tensor:
    return loop.h_m[t] if t >= 0 else _source(loop, "prelude")


def _memory(loop: Trajectory, place: Place) -> Tensor:
    memory = loop.memory[place.t] if place.t >= 0 and loop.memory else None
    if place.t < 0 and loop.transition is not None:
        memory = loop.transition.memory
    assert memory is not None and place.slot is not None
    return memory[:, place.slot]


def _read(loop: Trajectory, s: int, place: Place) -> Tensor:
    """w_read of the slot at step s."""
    weights = loop.transition.w_read if s < 0 and loop.transition else None
    weights = loop.w_read[s] if s >= 0 and loop.w_read else weights
    assert weights is not None
    return _wide(weights[..., place.slot])


def _source(loop: Trajectory, source: str) -> Tensor:
    """What an edge begins at: h_emb, the prelude's output, h(t) or h_m(t)."""
    if source == "h_emb":
        return loop.h_emb
    if source == "prelude":
        return loop.blocks.get("prelude", (None, loop.h_emb))[1]
    if (t := state_number(source)) is not None:
        return loop.h[t]
    return loop.h_m[int(source.removeprefix("h_m"))]


__all__ = ["Mass", "place_mass"]

"""MeSH's cycle: memory slots from what is written, and whether states are what is read of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.models.loops.loop_map import LoopMap, Port, Router

TOLERANCE = 1e-5
"""How far a state may be from what is read of the slots, relative to its largest element."""

HALF_STEPS = 4
"""The same in half precision, in units of its step (2⁻⁷ of bfloat16, 2⁻¹⁰ of float16)."""


@dataclass(frozen=True, kw_only=True)
class MeshCycle:
    """What MeSH's memory follows from in one forward pass, the transitional cycle first.

    Attributes:
        h_emb: The embeddings, (batch, pos, d_model).
        values: What is written: the prelude's output, h_m(0) … h_m(K-1); K + 1 tensors.
        w_write, w_read: Router weights, (batch, pos, slot); K + 1 tensors each.
        states: What is read: h(0) … h(K).
    """

    h_emb: Tensor  # shapes are what `fits` is there to check
    values: Sequence[Tensor]
    w_write: Sequence[Tensor]
    w_read: Sequence[Tensor]
    states: Sequence[Tensor]

    def fits(self) -> bool:
        """Whether all tensors have the shapes of one cycle."""
        streams = {tuple(x.shape) for x in (self.h_emb, *self.values, *self.states)}
        slots = {tuple(w.shape) for w in (*self.w_write, *self.w_read)}
        if len(streams) != 1 or len(slots) != 1 or self.h_emb.ndim != 3:
            return False
        [shape] = slots
        return len(shape) == 3 and shape[:2] == tuple(self.h_emb.shape[:2])

    def first_sample(self) -> "MeshCycle":
        """The same of the first sample alone."""
        return MeshCycle(
            h_emb=self.h_emb[:1],
            values=[x[:1] for x in self.values],
            w_write=[w[:1] for w in self.w_write],
            w_read=[w[:1] for w in self.w_read],
            states=[x[:1] for x in self.states],
        )

    def memories(self) -> Iterator[Float[Tensor, "batch slot pos d_model"]]:
        """The buffer after each write: m_0 = h_emb, m_b += value · w_b (MeSH Eqs. 2 and 5).

        Returns:
            K + 1 buffers, the transitional cycle's first, in float32 at least.
        """
        wide = torch.promote_types(self.h_emb.dtype, torch.float32)
        batch, pos, width = self.h_emb.shape
        memory = self.h_emb.new_zeros(batch, self.w_write[0].shape[-1], pos, width, dtype=wide)
        memory[:, 0] = self.h_emb
        for value, weights in zip(self.values, self.w_write, strict=True):
            memory = memory.to(value.device)  # iterations may lie on several devices
            amount = weights.to(memory).transpose(1, 2).unsqueeze(-1)
            memory = torch.addcmul(memory, value.to(wide).unsqueeze(1), amount)
            yield memory

    @torch.no_grad()
    def departure(
        self, memories: Iterator[Tensor] | Sequence[Tensor] | None = None
    ) -> tuple[float, int]:
        """How far the states are from Σ_b m_b · w_read_b.

        Args:
            memories: The buffers, where they are at hand.

        Returns:
            The largest distance relative to the largest element of the state, and of which state.
        """
        worst = (0.0, 0)
        cycles = zip(memories or self.memories(), self.w_read, self.states, strict=True)
        for t, (memory, weights, state) in enumerate(cycles):
            reading = torch.zeros_like(memory[:, 0])
            for slot, w in enumerate(weights.to(memory).unbind(-1)):
                reading = torch.addcmul(reading, memory[:, slot], w.unsqueeze(-1))
            state = state.to(reading)
            scale = state.abs().max().clamp_min(torch.finfo(state.dtype).tiny)
            off = float(((reading - state).abs().max() / scale).nan_to_num(nan=torch.inf))
            worst = max(worst, (off, t))
        return worst

    def tolerance(self) -> float:
        """How far they may be: 1e-5, or four steps of the narrowest type that took part."""
        kinds = {x.dtype for x in (self.h_emb, *self.values, *self.states)}
        device = self.h_emb.device.type
        if torch.is_autocast_enabled(device):
            kinds.add(torch.get_autocast_dtype(device))
        step = max(torch.finfo(kind).eps for kind in kinds)
        if device == "cuda" and torch.get_float32_matmul_precision() != "highest":
            step = max(step, 2.0**-10)  # TensorFloat-32
        return TOLERANCE if step < 1e-4 else HALF_STEPS * step


def routers_of_memory(loop_map: LoopMap) -> tuple[Router, Router] | None:
    """The write and read routers of the main loop.

    Args:
        loop_map: The map.

    Returns:
        Both; None where there are none.
    """
    main = loop_map.main
    pair = {r.kind: r for r in loop_map.routers if main is not None and r.loop == main.name}
    return (pair["write"], pair["read"]) if {"write", "read"} <= pair.keys() else None


def writable_sources(loop_map: LoopMap) -> list[Port]:
    """Which tensors MeSH's transitional cycle may write, the likeliest first.

    Args:
        loop_map: The map, with write and read routers.

    Returns:
        The output of the prelude's last layer, what the transitional router looks at, h_emb.
    """
    pair = routers_of_memory(loop_map)
    query = None if pair is None else pair[0].query
    last = [unit.h_m for unit in loop_map.prelude[-1:]]
    return list(dict.fromkeys([*last, *([query] if query else []), loop_map.embed]))

"""Trajectory: every state of one forward pass, by the paper's names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from loopscope.names import MAIN_LOOP, state_name

# positions may be others than the tokens: latents, routed subsets, pooled ones; "_" is any number
Stream = Float[Tensor, "batch _ d_model"]
Slots = Float[Tensor, "batch slot _ d_model"]
Weights = Float[Tensor, "batch _ slot"]


@dataclass(frozen=True, kw_only=True)
class Transition:
    """MeSH's transitional cycle, which turns the prelude's output into h(0).

    Attributes:
        query: What its routers look at, (batch, pos, d_model).
        memory: The buffer after its write, (batch, slot, pos, d_model); None when not asked for.
        w_write, w_read: Router weights, (batch, pos, slot).
    """

    query: Stream
    memory: Slots | None
    w_write: Weights
    w_read: Weights


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """All states of one forward pass, under the paper's symbols.

    Attributes:
        h_emb: Embeddings after scaling, (batch, pos, d_model).
        h: h(0) … h(K), the state entering each iteration and, last, the coda; K + 1 tensors.
        h_m: h_m(0) … h_m(K-1), the core's raw output before any mixing; K tensors.
        memory: The buffer after each iteration's write, (batch, slot, pos, d_model); K tensors, or
            None where there are no slots (or they were not asked for).
        w_write, w_read: Router weights of each iteration, (batch, pos, slot); K tensors or None.
        transition: The transitional cycle of MeSH, or None.
        h_out: The coda's output, before the final layer norm.
        blocks: `prelude`, `core1` … `coreK`, `coda` to (input, raw output); parts without layers
            are left out.
        logits: (batch, token, d_vocab) if asked for.
        tokens: The tokens, (batch, token); a position each, but in loops over something else.
        output: What the model returned, in its own form, if asked for.
        loop: Name of the loop.
        path: Where each iteration stands, such as `H0.L2`; `0` … `K-1` for the only loop.
        gates: Each gate's probability (an exit gate, a token router) at each iteration, (batch,
            positions), which may be others than the state's; None where it was not evaluated.
        mesh_cycle: Whether the states follow from memory and routers by MeSH Eqs. 2-5, so that α
            (Eq. 7) is exact.
        others: The model's further loops, each as a trajectory of the same forward pass.
        named: The loop's states by name, each as a trajectory, where it carries several (z_H and
            z_L of HRM); the first is the main one, whose states are this trajectory's own.
    """

    h_emb: Float[Tensor, "batch _ d_emb"]
    h: tuple[Stream, ...]
    h_m: tuple[Stream, ...]
    memory: tuple[Slots, ...] | None
    w_write: tuple[Weights, ...] | None
    w_read: tuple[Weights, ...] | None
    transition: Transition | None
    h_out: Float[Tensor, "batch _ d_out"]
    blocks: dict[str, tuple[Tensor, Tensor]]
    logits: Float[Tensor, "batch token d_vocab"] | None = None
    tokens: Int[Tensor, "batch token"] | None = None
    output: Any = None
    loop: str = MAIN_LOOP
    path: tuple[str, ...] = ()
    gates: Mapping[str, tuple[Float[Tensor, "batch _"] | None, ...]] = field(default_factory=dict)
    mesh_cycle: bool = True
    others: Mapping[str, "Trajectory"] = field(default_factory=dict)
    named: Mapping[str, "Trajectory"] = field(default_factory=dict)

    @property
    def courses(self) -> dict[str, "Trajectory"]:
        """All that is measured: each loop by name, then its further states, such as `H.z_L`."""
        courses: dict[str, Trajectory] = {}
        for name, loop in self.loops.items():
            courses[name] = loop
            courses |= {state.loop: state for state in [*loop.named.values()][1:]}
        return courses

    @property
    def loops(self) -> dict[str, "Trajectory"]:
        """All loops of the model by name, this one first."""
        return {self.loop: self, **self.others}

    @property
    def K(self) -> int:
        """Number of core iterations."""
        return len(self.h_m)

    @property
    def positions(self) -> int:
        """Positions of a sample: as many as its tokens, or as h_emb has where there are none."""
        return (self.h_emb if self.tokens is None else self.tokens).shape[1]

    @property
    def states(self) -> dict[str, Tensor]:
        """`h_emb`, `h0` … `hK`, `h_out` in the order in which they arise."""
        loop = {state_name(t): state for t, state in enumerate(self.h)}
        return {"h_emb": self.h_emb, **loop, "h_out": self.h_out}

    def __repr__(self) -> str:
        batch, pos, width = self.h[0].shape
        slots = f", {self.w_write[0].shape[-1]} slots" if self.w_write else ""
        loop = "" if self.loop == MAIN_LOOP else f"{self.loop}: "
        return f"Trajectory: {batch} × {pos} tokens, d_model {width}, {loop}K={self.K}{slots}"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{c}</th>" for c in ("state", "shape", "‖·‖ per token"))
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{tuple(state.shape)}</td>"
            f"<td>{state.float().norm(dim=-1).mean().item():.3g}</td></tr>"
            for name, state in self.states.items()
        )
        return f"<p>{escape(repr(self))}</p><table><tr>{head}</tr>{rows}</table>"

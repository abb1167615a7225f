"""Recurrences: how the state that enters the next iteration is made.

Each offers `start` (h_emb and the prelude's output give h(0)) and `step` (h(t) and the core's raw
output h_m(t) give h(t+1)). They keep no activations: what must be remembered is passed as `carry`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loopscope.models.hooks import Point
from loopscope.models.native.configuration import LoopConfig

State = Float[Tensor, "batch pos d_model"]


class WeightPoints(nn.Module):
    """The HookPoint of a set of mixing weights."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_weights = Point()


class LoopPoints(nn.Module):
    """HookPoints of one iteration of the loop."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__()
        self.hook_in = Point()
        self.hook_out = Point()
        if config.variant == "mesh":
            self.write, self.read = WeightPoints(), WeightPoints()
            self.hook_memory = Point()
        if config.variant == "dynamic":
            self.mix = WeightPoints()


class TransitionPoints(nn.Module):
    """HookPoints of MeSH's transitional cycle, which turns the prelude's output into h(0)."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_in = Point()
        self.write, self.read = WeightPoints(), WeightPoints()
        self.hook_memory = Point()


class SumRecurrence(nn.Module):
    """h(t+1) = h_m(t) + fixed supplements: `base`, `residual`, `anchor`, `anchor_emb`, sums."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__()
        self.supplements = config.supplements

    def start(self, h_emb: State, pre: State, at: None) -> tuple[State, Any]:
        """Give h(0), the prelude's output.

        Args:
            h_emb: The scaled embeddings, (batch, pos, d_model).
            pre: The prelude's output, likewise.
            at: Not needed.

        Returns:
            h(0), and what the first step needs.
        """
        return pre, {"anchor_emb": h_emb}

    def step(self, t: int, h: State, h_m: State, carry: Any, at: LoopPoints) -> tuple[State, Any]:
        """Compute h(t+1) = h_m(t) [+ h(t)] [+ h(0)] [+ h_emb] (MeSH Section 2).

        Args:
            t: The iteration, 0 … K − 1.
            h: h(t), (batch, pos, d_model).
            h_m: The core's raw output h_m(t).
            carry: What `start` or the step before passed on.
            at: The HookPoints of the iteration.

        Returns:
            h(t+1), and what the next step needs.
        """
        if t == 0:
            carry = {**carry, "anchor": h}
        states = {**carry, "residual": h}
        for name in self.supplements:
            h_m = h_m + states[name]
        return h_m, carry

    def resumed(self, t: int, kept: Mapping[str, Tensor]) -> Any:
        """Give what step t is given as `carry`, from the hooks of an earlier pass.

        Args:
            t: The iteration.
            kept: Hook names → tensors.

        Returns:
            The carry.
        """
        return {"anchor_emb": kept["hook_embed"], "anchor": kept["loop.0.hook_in"]}


class WeightedRecurrence(nn.Module):
    """h(t+1) = a1 h_m(t) + a2 h(0) + a3 h_emb: `static` and `dynamic` (MeSH Table 4).

    Unspecified in the paper, fixed here: `static` has three scalars shared by all iterations,
    initialised 1, 0, 0; `dynamic` has one Linear(D -> 3) with bias per token on h(t), shared by all
    iterations, zero weight, bias 1, 0, 0.
    """

    def __init__(self, config: LoopConfig) -> None:
        super().__init__()
        self.coefficients: nn.Parameter | nn.Linear
        if config.variant == "static":
            self.coefficients = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))
        else:
            self.coefficients = nn.Linear(config.d_model, 3)

    def reset(self) -> None:
        """Start as `base`: coefficients 1, 0, 0."""
        with torch.no_grad():
            if isinstance(self.coefficients, nn.Linear):
                nn.init.zeros_(self.coefficients.weight)
                self.coefficients.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
            else:
                self.coefficients.copy_(torch.tensor([1.0, 0.0, 0.0]))

    def start(self, h_emb: State, pre: State, at: None) -> tuple[State, Any]:
        """Give h(0), the prelude's output.

        Args:
            h_emb: The scaled embeddings, (batch, pos, d_model).
            pre: The prelude's output, likewise.
            at: Not needed.

        Returns:
            h(0), and what the first step needs.
        """
        return pre, {"h_emb": h_emb}

    def step(self, t: int, h: State, h_m: State, carry: Any, at: LoopPoints) -> tuple[State, Any]:
        """Compute h(t+1) = a1 h_m(t) + a2 h(0) + a3 h_emb (MeSH Table 4).

        Args:
            t: The iteration, 0 … K − 1.
            h: h(t), (batch, pos, d_model).
            h_m: The core's raw output h_m(t).
            carry: What `start` or the step before passed on.
            at: The HookPoints of the iteration.

        Returns:
            h(t+1), and what the next step needs.
        """
        if t == 0:
            carry = {**carry, "h0": h}
        if isinstance(self.coefficients, nn.Linear):
            a1, a2, a3 = at.mix.hook_weights(self.coefficients(h)).split(1, dim=-1)
        else:
            a1, a2, a3 = self.coefficients.unbind()
        return a1 * h_m + a2 * carry["h0"] + a3 * carry["h_emb"], carry

    def resumed(self, t: int, kept: Mapping[str, Tensor]) -> Any:
        """Give what step t is given as `carry`, from the hooks of an earlier pass.

        Args:
            t: The iteration.
            kept: Hook names → tensors.

        Returns:
            The carry.
        """
        return {"h_emb": kept["hook_embed"], "h0": kept["loop.0.hook_in"]}


class Router(nn.Module):
    """Write and read weights of one step, softmax over slots (MeSH Eq. 3)."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__()
        assert config.slots is not None
        self.write = nn.Linear(config.d_model, config.slots)
        self.read = nn.Linear(config.d_model, config.slots)

    def forward(
        self, query: State, at: LoopPoints | TransitionPoints
    ) -> tuple[Float[Tensor, "batch pos slot"], Float[Tensor, "batch pos slot"]]:
        """Compute the weights in float32 at least, and give them in the state's dtype.

        Args:
            query: What the router looks at, (batch, pos, d_model).
            at: The HookPoints of the step.

        Returns:
            Write and read weights, (batch, pos, slot) each.
        """
        wide = torch.promote_types(query.dtype, torch.float32)
        write = self.write(query).softmax(dim=-1, dtype=wide).to(query.dtype)
        read = self.read(query).softmax(dim=-1, dtype=wide).to(query.dtype)
        return at.write.hook_weights(write), at.read.hook_weights(read)


class MeshRecurrence(nn.Module):
    """MeSH's memory: a buffer of B slots, written and read by each step's own routers.

    The transitional cycle writes f_pre(h_emb) and reads h(0). Which tensor its routers look at is
    open in the paper; `config.transition_query` says it, by default the prelude's output.
    """

    def __init__(self, config: LoopConfig) -> None:
        super().__init__()
        assert config.slots is not None
        self.slots = config.slots
        self.query_embedding = config.transition_query == "embedding"
        self.transition = Router(config)
        self.iterations = nn.ModuleList([Router(config) for _ in range(config.K)])

    def start(self, h_emb: State, pre: State, at: TransitionPoints) -> tuple[State, Any]:
        """Set m_0 = h_emb, m_{b>0} = 0 (MeSH Eq. 2); then the transitional cycle gives h(0).

        Args:
            h_emb: The scaled embeddings, (batch, pos, d_model).
            pre: The prelude's output, likewise.
            at: The HookPoints of the transitional cycle.

        Returns:
            h(0), and what the first step needs.
        """
        batch, pos, width = h_emb.shape
        empty = h_emb.new_zeros(batch, self.slots - 1, pos, width)
        memory = torch.cat((h_emb.unsqueeze(1), empty), dim=1)
        query = at.hook_in(h_emb if self.query_embedding else pre)
        write, read = self.transition(query, at)
        return self._cycle(memory, pre, write, read, at)

    def step(self, t: int, h: State, h_m: State, carry: Any, at: LoopPoints) -> tuple[State, Any]:
        """Write m_b += h_m(t) w_write_b(t) (MeSH Eq. 5), then read h(t+1) = sum_b m_b w_read_b(t).

        Args:
            t: The iteration, 0 … K − 1.
            h: h(t), (batch, pos, d_model).
            h_m: The core's raw output h_m(t).
            carry: What `start` or the step before passed on.
            at: The HookPoints of the iteration.

        Returns:
            h(t+1), and what the next step needs.
        """
        write, read = self.iterations[t](h, at)
        return self._cycle(carry, h_m, write, read, at)

    def resumed(self, t: int, kept: Mapping[str, Tensor]) -> Any:
        """Give what step t is given as `carry`, from the hooks of an earlier pass.

        Args:
            t: The iteration.
            kept: Hook names → tensors.

        Returns:
            The carry.
        """
        return kept[f"loop.{t - 1}.hook_memory" if t else "transition.hook_memory"]

    def _cycle(
        self,
        memory: Float[Tensor, "batch slot pos d_model"],
        value: State,
        write: Float[Tensor, "batch pos slot"],
        read: Float[Tensor, "batch pos slot"],
        at: LoopPoints | TransitionPoints,
    ) -> tuple[State, Float[Tensor, "batch slot pos d_model"]]:
        amount = write.transpose(1, 2).unsqueeze(-1)
        memory = at.hook_memory(torch.addcmul(memory, value.unsqueeze(1), amount))
        return torch.einsum("bspd,bps->bpd", memory, read), memory


def make_recurrence(config: LoopConfig) -> SumRecurrence | WeightedRecurrence | MeshRecurrence:
    """Make the recurrence of a variant.

    Args:
        config: Gives the variant, its widths and slots.

    Returns:
        A module with `start` and `step`, its weights not yet drawn.
    """
    if config.variant == "mesh":
        return MeshRecurrence(config)
    if config.variant in ("static", "dynamic"):
        return WeightedRecurrence(config)
    return SumRecurrence(config)

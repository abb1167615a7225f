"""Routing: what routers and gates do, and the α that follows (MeSH Eq. 7); their rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from loopscope.analysis.flags import Flag, Flagged, flagged
from loopscope.analysis.measures.filling import Batch, LoopRows, Setup, kept_positions
from loopscope.analysis.tables import Rows, columns
from loopscope.models import Trajectory
from loopscope.names import block_name


def router_statistics(w: Float[Tensor, "batch pos slot"]) -> tuple[Flagged, Flagged]:
    """Give the mean weight per slot and mean entropy of one router (MeSH Eq. 3), per sample.

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
    """Give mean probability and mean entropy of one gate (exit gate, token router), per sample.

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
    """Name the sources of `alpha`, in its order: `h_emb`, `prelude`, `core1` … `coreK`.

    Args:
        iterations: K.
        transition: Whether there is a transitional cycle; without it the prelude's output is in no
            slot, hence no source.

    Returns:
        K + 2 names, or K + 1 without a transitional cycle.
    """
    cores = map(block_name, range(iterations))
    return ("h_emb", *(("prelude",) if transition else ()), *cores)


def alpha(
    w_write: Float[Tensor, "batch pos iter slot"], w_read: Float[Tensor, "batch pos iter slot"]
) -> Float64[Tensor, "batch pos iter source"]:
    """Tell how much each earlier output contributes to every state, exactly and per token.

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
    """Average `alpha` over the tokens.

    Args:
        w_write: As of `alpha`, (batch, pos, K + 1, slot).
        w_read: Likewise.

    Returns:
        Values and flags, (batch, K + 1 states, K + 2 sources).
    """
    return flagged(alpha(w_write, w_read).mean(1).cpu().numpy())


def alpha_exists(iterations: int) -> np.ndarray:
    """Tell which (state, source) pairs of `alpha` exist: a core output only feeds later states.

    Args:
        iterations: K.

    Returns:
        Booleans, (K + 1 states, K + 2 sources).
    """
    states, sources = np.ogrid[: iterations + 1, : iterations + 2]
    return sources <= states + 1


Cycles = dict[str, dict[int, Tensor]]
"""`write` and `read` → t (−1: the transition) → weights (batch, pos, slot)."""


@dataclass(frozen=True, kw_only=True)
class RoutingKeys:
    """The rows of one sample, decided by a model's first batch.

    Attributes:
        cycles: (kind, t, slot) of the write and read weights.
        alpha: (`alpha`, t, source), of the state h(t+1); empty where α is not exact.
        gates: (`gate`, t, name), of the iterations at which the gate is evaluated.
    """

    cycles: tuple[tuple[str, int, str], ...]
    alpha: tuple[tuple[str, int, str], ...]
    gates: tuple[tuple[str, int, str], ...]

    @classmethod
    def of(cls, first: Trajectory) -> "RoutingKeys":
        """Read them off a trajectory.

        Args:
            first: One loop of the model.

        Returns:
            What the loop has of routers and gates.
        """
        weights = _cycles(first)
        slots = [
            (kind, t, f"m{b}")
            for kind, steps in weights.items()
            for t, w in steps.items()
            for b in range(w.shape[-1])
        ]
        alpha: list[tuple[str, int, str]] = []
        if first.mesh_cycle and len(weights) == 2:
            steps = list(weights["write"])
            sources = alpha_sources(first.K, transition=-1 in steps)
            exists = np.argwhere(alpha_exists(len(steps) - 1))
            alpha = [("alpha", steps[row], sources[source]) for row, source in exists]
        gates = [
            ("gate", t, name)
            for name, steps in first.gates.items()
            for t, p in enumerate(steps)
            if p is not None
        ]
        return cls(cycles=tuple(slots), alpha=tuple(alpha), gates=tuple(gates))

    @property
    def all(self) -> list[tuple[str, int, str]]:
        """(kind, t, target) of each row, in the table's order."""
        return [*self.cycles, *self.alpha, *self.gates]

    def fill(self, rows: Rows, samples: slice, trajectory: Trajectory, drop: int) -> None:
        """Write one batch: means and entropies of all routers, then α, then gates.

        Args:
            rows: The table, with the keys `all`.
            samples: Which samples.
            trajectory: The batch.
            drop: Tokens left out at the start of each sample.
        """
        self._fill_routers(rows, samples, trajectory, drop)
        if self.alpha and not trajectory.mesh_cycle:  # of a port that is MeSH on other input only
            start = len(self.cycles)
            rows.flag[samples, start : start + len(self.alpha)] = Flag.NONFINITE
        elif self.alpha:
            self._fill_alpha(rows, samples, trajectory, drop)
        self._fill_gates(rows, samples, trajectory, drop)

    def _fill_routers(self, rows: Rows, samples: slice, trajectory: Trajectory, drop: int) -> None:
        column = 0
        for w in _all(_cycles(trajectory)):
            mean, entropy = router_statistics(kept_positions(w, drop, trajectory))
            slots = slice(column, column := column + w.shape[-1])
            rows.values["mean"][samples, slots] = mean.value
            rows.values["entropy"][samples, slots] = entropy.value[:, None]
            rows.flag[samples, slots] = np.maximum(mean.flag, entropy.flag[:, None])

    def _fill_alpha(self, rows: Rows, samples: slice, trajectory: Trajectory, drop: int) -> None:
        cycles = _cycles(trajectory)
        stacks = [
            kept_positions(_stack(list(cycles[kind].values())), drop, trajectory)
            for kind in ("write", "read")
        ]
        alpha = alpha_statistics(*stacks)
        exists = alpha_exists(stacks[0].shape[2] - 1)
        start = len(self.cycles)
        pairs = slice(start, start + len(self.alpha))
        rows.values["mean"][samples, pairs] = alpha.value[:, exists]
        rows.flag[samples, pairs] = alpha.flag[:, exists]

    def _fill_gates(self, rows: Rows, samples: slice, trajectory: Trajectory, drop: int) -> None:
        start = len(self.cycles) + len(self.alpha)
        for column, (_, t, name) in enumerate(self.gates, start=start):
            p = trajectory.gates[name][t]
            if p is None:
                rows.flag[samples, column] = Flag.NONFINITE
                continue
            mean, entropy = gate_statistics(kept_positions(p, drop, trajectory))
            rows.values["mean"][samples, column] = mean.value
            rows.values["entropy"][samples, column] = entropy.value
            rows.flag[samples, column] = np.maximum(mean.flag, entropy.flag)

    def elsewhere(self, loop: Trajectory, pos: int) -> list[str]:
        """Name the routers and gates whose positions are not those of the tokens.

        Args:
            loop: One loop of the first batch.
            pos: Number of tokens of a sample.

        Returns:
            What they are, with their positions.
        """
        sizes = {kind: next(iter(w.values())).shape[1] for kind, w in _cycles(loop).items() if w}
        for _, t, name in self.gates:
            if (p := loop.gates[name][t]) is not None:
                sizes[name] = p.shape[1]
        return [f"{name} ({size})" for name, size in sizes.items() if size != pos]

    def token_rows(self, loop: Trajectory, words: Sequence[str]) -> Rows | None:
        """List the weights of routers and gates in the first sample, token by token.

        Args:
            loop: One loop of the first batch.
            words: The first sample's tokens as strings.

        Returns:
            The rows of the table `tokens`, without what has other positions; None where nothing
            is left.
        """
        weights = [w[0, :, b] for w in _all(_cycles(loop)) for b in range(w.shape[-1])]
        gates = [loop.gates[name][t] for _, t, name in self.gates]
        weights += [p[0] for p in gates if p is not None]
        pairs = zip([*self.cycles, *self.gates], weights, strict=True)
        by_token = [(target, w) for target, w in pairs if len(w) == len(words)]
        if not by_token:
            return None
        values = [w.float().cpu().numpy() for _, w in by_token]
        keys = columns(
            ("kind", "t", "target", "pos"),
            [(*target, pos) for target, _ in by_token for pos in range(len(words))],
        )
        keys["token"] = np.array(words, dtype=object)[keys["pos"]]
        rows = Rows("tokens", 1, keys)
        rows.values["value"][0] = np.concatenate(values)
        rows.flag[0, ~np.isfinite(rows.values["value"][0])] = Flag.NONFINITE
        return rows


class RoutingRows(LoopRows):
    """The tables `routing`, and `tokens` where the first sample is measured."""

    table = "routing"

    def __init__(self, setup: Setup) -> None:
        loops = setup.first.courses
        self.routes = {name: RoutingKeys.of(loop) for name, loop in loops.items()}
        super().__init__(setup)
        if not self.rows:
            self.note = f"routing: {setup.model.why_no_routing}, so its table has no rows"
        else:
            self.note = "; ".join(self._remarks(setup))
        self.tokens: dict[str, Rows] = {}
        for name, loop in loops.items() if setup.words is not None else ():
            if (rows := self.routes[name].token_rows(loop, setup.words or ())) is not None:
                self.tokens[name] = rows

    def _remarks(self, setup: Setup) -> list[str]:
        """What is missing beside the rows that there are."""
        loops = setup.first.loops
        remarks = [
            f"routing: the states of {name} do not follow from its routers by MeSH Eqs. 2-5, so "
            "there is no α"
            for name, loop in loops.items()
            if self.routes[name].cycles and not self.routes[name].alpha and name in self.rows
        ]
        words = len(setup.words or ())
        elsewhere = [
            x for name, loop in loops.items() for x in self.routes[name].elsewhere(loop, words)
        ]
        if words and elsewhere:
            remarks.append(
                f"routing: {', '.join(elsewhere)} have positions of their own, not the {words} of "
                "the tokens, so they are not listed token by token"
            )
        return remarks

    def keys(self, loop: Trajectory, setup: Setup) -> list[tuple[Any, ...]]:
        return list(self.routes[loop.loop].all)

    def fill(self, rows: Rows, batch: Batch, loop: Trajectory) -> None:
        self.routes[loop.loop].fill(rows, batch.samples, loop, batch.drop)

    def frames(self, model: str) -> dict[str, list[pd.DataFrame]]:
        tokens = [rows.frame(model, loop) for loop, rows in self.tokens.items()]
        return {**super().frames(model), "tokens": tokens}


def _cycles(trajectory: Trajectory) -> Cycles:
    """Write and read weights of all cycles, the transitional one first."""
    transition = trajectory.transition
    cycles: Cycles = {}
    for kind, steps in (("write", trajectory.w_write), ("read", trajectory.w_read)):
        if steps is not None:
            first = {} if transition is None else {-1: getattr(transition, f"w_{kind}")}
            # a router may be left out of some iterations
            cycles[kind] = first | {t: w for t, w in enumerate(steps) if w is not None}
    return cycles


def _all(cycles: Cycles) -> list[Tensor]:
    return [w for steps in cycles.values() for w in steps.values()]


def _stack(weights: Sequence[Tensor]) -> Tensor:
    """(batch, pos, cycle, slot), on one device where the iterations lie on several."""
    return torch.stack([w.to(weights[0].device) for w in weights], dim=2)

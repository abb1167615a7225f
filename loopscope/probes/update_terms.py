"""Terms: what a loop's next state is a sum of, and with which weights.

MeSH: h(t+1) = α_emb·h_emb + α_pre·f_pre(h_emb) + Σ_i α_i·h_m(i), α from the routers (Eq. 7 with our
extension to the transitional cycle). Other loops: h(t+1) = h_m(t) [+ h(t)] [+ h(0)] [+ h_emb], told
from the states themselves; or a1·h_m(t) + a2·h(0) + a3·h_emb.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from loopscope.models import Hooked, Trajectory

Read = Callable[[str], Tensor]
"""What stands at a hook in the pass that is under way."""

TOLERANCE = 1e-5
"""How far a state may be from the sum of its terms, relative to its largest element."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of each state of a loop.

    Attributes:
        trajectory: The pass that they were told from.
        kind: `memory` (weights from the routers), `sum` (weights 1), `mix` (weights at the hook
            `mix.hook_weights`) or `scalars` (one weight for each source).
        names: Sources besides h_m(t), of `sum`, `mix` and `scalars`: `h(t)`, `h(0)`, `h_emb`.
        scalars: Of `scalars`, the weights of h_m(t) and of `names`.
    """

    trajectory: Trajectory
    kind: str
    names: tuple[str, ...] = ()
    scalars: tuple[float, ...] = ()

    def sources(self, t: int) -> list[str]:
        """Name the sources of h(t + 1).

        Args:
            t: The iteration, -1 for the transitional cycle.

        Returns:
            `h_emb`, `prelude`, `h0`, `h_m0` …; none before the first iteration without a memory.
        """
        if self.kind == "memory":
            return ["h_emb", "prelude", *(f"h_m{i}" for i in range(t + 1))]
        if t < 0:
            return []
        named = {"h(t)": f"h{t}", "h(0)": "h0", "h_emb": "h_emb"}
        return [f"h_m{t}", *dict.fromkeys(named[name] for name in self.names)]

    def part(self, source: str, t: int, read: Read) -> Tensor:
        """Compute what a source contributes to h(t + 1).

        Args:
            source: One of `sources(t)`.
            t: The iteration, -1 for the transitional cycle.
            read: Gives what stands at a hook in the pass that is meant.

        Returns:
            Weight times source, (batch, pos, d_model), in float32 at least.
        """
        value = self._value(source, read)
        wide = torch.promote_types(value.dtype, torch.float32)
        weight = self._weight(source, t, read)
        return value.to(wide) * (
            weight.to(value.device, wide) if isinstance(weight, Tensor) else weight
        )

    def hooks(self, source: str, t: int) -> list[str]:
        """Name the hooks that `part` may read.

        Args:
            source: One of `sources(t)`.
            t: The iteration, -1 for the transitional cycle.

        Returns:
            Hook names.
        """
        names: list[str] = []

        def read(name: str) -> Tensor:
            names.append(name)
            return self.trajectory.h[0].new_zeros(1)  # only the names are wanted

        self._value(source, read)
        if self.kind == "memory":
            names.append(self._cycle(t) + ".read.hook_weights")
            if source != "h_emb":
                names.append(self._cycle(self._written(source)) + ".write.hook_weights")
        if self.kind == "mix":
            names.append(self._cycle(t) + ".mix.hook_weights")
        return names

    def _cycle(self, t: int) -> str:
        return "transition" if t < 0 else f"loop.{self.trajectory.path[t]}"

    def _written(self, source: str) -> int:
        return -1 if source == "prelude" else int(source.removeprefix("h_m"))

    def _value(self, source: str, read: Read) -> Tensor:
        if source == "h_emb":
            return self.trajectory.h_emb
        if source == "prelude":
            return prelude_output(self.trajectory)
        if source.startswith("h_m"):
            return read(f"loop.{self.trajectory.path[int(source[3:])]}.hook_out")
        return read(f"loop.{self.trajectory.path[int(source[1:])]}.hook_in")

    def _weight(self, source: str, t: int, read: Read) -> Any:
        """The weight of a source, (batch, pos, 1), or a number."""
        if self.kind == "memory":
            w_read = read(self._cycle(t) + ".read.hook_weights")
            wide = torch.promote_types(w_read.dtype, torch.float32)
            if source == "h_emb":
                return w_read[..., :1].to(wide)
            w_write = read(self._cycle(self._written(source)) + ".write.hook_weights")
            return (w_read.to(wide) * w_write.to(w_read.device, wide)).sum(-1, keepdim=True)
        if self.kind == "sum":
            named = {"h(t)": f"h{t}", "h(0)": "h0", "h_emb": "h_emb"}
            added = sum(named[name] == source for name in self.names)  # h(0) may be h(t) too
            return 1 if source.startswith("h_m") else added
        weights: Any = self.scalars
        if self.kind == "mix":
            weights = read(self._cycle(t) + ".mix.hook_weights").split(1, dim=-1)
        number = {f"h_m{t}": 0, "h0": 1, "h_emb": 2}[source]
        return weights[number]


def prelude_output(trajectory: Trajectory) -> Tensor:
    """What MeSH's transitional cycle writes: the prelude's output, h_emb where it has no layers.

    Args:
        trajectory: A pass.

    Returns:
        (batch, pos, d_model).
    """
    _, out = trajectory.blocks.get("prelude", (None, trajectory.h_emb))
    return out


def update_terms(model: Hooked, trajectory: Trajectory) -> tuple[Terms | None, str]:
    """Tell what the next state of the main loop is a sum of.

    Args:
        model: A native or wrapped model.
        trajectory: One of its passes, with memory where it has slots.

    Returns:
        The terms; None, and why, where the states are no such sum.
    """
    if not trajectory.K:
        return None, "the model has no loop"
    if trajectory.w_write is not None:
        if trajectory.transition is None or not trajectory.mesh_cycle:
            return None, "the states do not follow from the routers by MeSH Eqs. 2-5"
        if not prelude_is_written(trajectory):
            return None, "what the transition writes is not the output of the last layer before it"
        return Terms(trajectory=trajectory, kind="memory"), ""
    if f"loop.{trajectory.path[0]}.mix.hook_weights" in model.hook_dict:
        return Terms(trajectory=trajectory, kind="mix", names=("h(0)", "h_emb")), ""
    if any(x.shape != trajectory.h[-1].shape for x in (*trajectory.h, *trajectory.h_m)):
        return None, "h(t), h_m(t) and h(t+1) differ in shape"
    names = _sum(trajectory)
    if names is not None:
        return Terms(trajectory=trajectory, kind="sum", names=names), ""
    scalars = _scalars(trajectory)
    if scalars is not None:
        terms = Terms(
            trajectory=trajectory, kind="scalars", names=("h(0)", "h_emb"), scalars=scalars
        )
        return terms, ""
    if _alike(trajectory):
        return None, "h(0) is h_emb, so the weights of the two cannot be told apart"
    return None, "h(t+1) is no sum of h_m(t), h(t), h(0) and h_emb"


def prelude_is_written(trajectory: Trajectory) -> bool:
    """Tell whether what MeSH's transitional cycle writes is `prelude_output`.

    Args:
        trajectory: A pass of a model with memory.

    Returns:
        Whether the slots after it are that by its weights, as far as they were kept.
    """
    transition, pre = trajectory.transition, prelude_output(trajectory)
    assert transition is not None
    if transition.memory is None:
        return pre.shape == trajectory.h[0].shape
    weights = transition.w_write
    memory, h_emb = transition.memory[:1, 1:].float(), trajectory.h_emb
    if pre.shape != h_emb.shape:
        return False
    written = pre[:1].float().unsqueeze(1) * weights[:1, :, 1:].float().mT.unsqueeze(-1)
    return _off(memory, written.to(memory.device)) <= _tolerance(trajectory)


def _tolerance(trajectory: Trajectory) -> float:
    kinds = {x.dtype for x in (*trajectory.h, *trajectory.h_m)}
    step = max(torch.finfo(kind).eps for kind in kinds)
    return TOLERANCE if step < 1e-4 else 4 * step


def _off(state: Tensor, reading: Tensor) -> float:
    """The largest distance relative to the largest element; NaN in both is left out."""
    sound = state.isfinite() | reading.isfinite()
    state, reading = state[sound], reading[sound]
    if not state.numel():
        return 0.0
    scale = state.abs().max().clamp_min(torch.finfo(state.dtype).tiny)
    return float(((state - reading).abs().max() / scale).nan_to_num(nan=torch.inf))


def _first(x: Tensor) -> Tensor:
    """The first sample, in float32 at least."""
    return x[:1].to(torch.promote_types(x.dtype, torch.float32))


def _sources(trajectory: Trajectory, t: int) -> Mapping[str, Tensor]:
    """States that may be added to h_m(t), of the first sample."""
    home = trajectory.h_m[t].device
    states = {"h(t)": trajectory.h[t], "h(0)": trajectory.h[0]}
    if trajectory.h_emb.shape == trajectory.h[0].shape:
        states["h_emb"] = trajectory.h_emb
    return {name: _first(state).to(home) for name, state in states.items()}


def _sum(trajectory: Trajectory) -> tuple[str, ...] | None:
    """Which states are added to each h_m(t), fewest first; None where no sum fits."""
    choices = [c for n in range(4) for c in combinations(("h(t)", "h(0)", "h_emb"), n)]
    limit = _tolerance(trajectory)
    for t in reversed(range(trajectory.K)):  # at t = 0 h(t) and h(0) are the same
        sources = _sources(trajectory, t)
        h_m, state = (
            _first(trajectory.h_m[t]),
            _first(trajectory.h[t + 1]).to(trajectory.h_m[t].device),
        )
        choices = [
            names
            for names in choices
            if set(names) <= sources.keys()
            and _off(state, h_m + sum(sources[name] for name in names)) <= limit
        ]
    return choices[0] if choices else None


def _alike(trajectory: Trajectory) -> bool:
    """Whether h(0) is h_emb: nothing tells then which of the two is added."""
    first, h_emb = trajectory.h[0], trajectory.h_emb
    return first.shape == h_emb.shape and torch.equal(first, h_emb.to(first.device))


def _scalars(trajectory: Trajectory) -> tuple[float, ...] | None:
    """Weights of h_m(t), h(0) and h_emb that are the same at every t; None if there are none."""
    columns: list[list[Tensor]] = [[], [], []]
    states: list[Tensor] = []
    for t in range(trajectory.K):
        sources = _sources(trajectory, t)
        if "h_emb" not in sources:
            return None
        home = _first(trajectory.h_m[t]).flatten().cpu()
        for column, x in zip(columns, (home, sources["h(0)"], sources["h_emb"]), strict=True):
            column.append(x.flatten().cpu().double())
        states.append(_first(trajectory.h[t + 1]).flatten().cpu().double())
    matrix = torch.stack([torch.cat(column) for column in columns], 1)
    state = torch.cat(states)
    sound = matrix.isfinite().all(1) & state.isfinite()
    matrix, state = matrix[sound], state[sound]
    if not len(state):
        return None
    if _alike(trajectory):
        return None
    weights = torch.linalg.lstsq(matrix, state[:, None], driver="gelsd").solution[:, 0]
    if _off(state, matrix @ weights) > _tolerance(trajectory):
        return None
    return tuple(float(w) for w in weights)

"""What probes are fitted to: states, core outputs, slots and router weights of chosen tokens."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from loopscope.models import Trajectory
from loopscope.probes.target_names import answers

Name = TypeVar("Name")


def targets(loop: Trajectory, of: Sequence[str]) -> dict[str, Tensor]:
    """Give what probes are fitted to in one loop, in the order in which it arises.

    Args:
        loop: The loop's trajectory, with memory where slots are asked for.
        of: Kinds (`TARGETS`) or single ones: `h2`, `h_m0` (the core's output in iteration 0),
            `m1` (slot 1 after each write), `m1@0` (after that of iteration 0), `w_read@0`. That of
            the transitional cycle is `@-1`.

    Returns:
        Name → (batch, pos, width); `h_emb` always first.
    """
    every: dict[str, Tensor] = dict(loop.states)
    every |= {f"h_m{t}": h for t, h in enumerate(loop.h_m)}
    cycles: list[tuple[int, Tensor | None, Tensor | None, Tensor | None]] = []
    if (first := loop.transition) is not None:
        cycles.append((-1, first.memory, first.w_write, first.w_read))
    parts = [part or (None,) * loop.K for part in (loop.memory, loop.w_write, loop.w_read)]
    cycles += zip(range(loop.K), *parts, strict=True)
    slots = {
        f"m{b}@{t}": memory[:, b]
        for t, memory, _, _ in cycles
        if memory is not None
        for b in range(memory.shape[1])
    }
    every |= dict(sorted(slots.items(), key=lambda slot: int(slot[0][1:].partition("@")[0])))
    every |= {f"w_write@{t}": w for t, _, w, _ in cycles if w is not None}
    every |= {f"w_read@{t}": w for t, _, _, w in cycles if w is not None}
    return {
        name: state
        for name, state in every.items()
        if name == "h_emb" or any(answers(asked, name) for asked in of)
    }


@dataclass(frozen=True)
class Places:
    """Chosen tokens of all samples.

    Attributes:
        sample: The sample of each, ascending.
        pos: Its position.
    """

    sample: np.ndarray
    pos: np.ndarray

    def within(self, start: int, stop: int) -> slice:
        """Find those of some samples.

        Args:
            start: The first sample.
            stop: The one after the last.

        Returns:
            Their places in the arrays.
        """
        first, last = np.searchsorted(self.sample, (start, stop))
        return slice(int(first), int(last))


def collect_states(
    trajectories: Iterable[tuple[int, Trajectory]],
    wanted: Callable[[Trajectory], Mapping[Name, Tensor]],
    places: Mapping[int, Places],
) -> dict[Name, np.ndarray]:
    """Take the states of chosen tokens from batch after batch.

    Args:
        trajectories: The number of each batch's first sample, and its trajectory.
        wanted: What to take of a trajectory, (batch, pos, width) each.
        places: Positions of a sample → the chosen tokens of samples with as many.

    Returns:
        Name → (token, width), in the order of the places; float64 of states in float64, otherwise
        float32.
    """
    parts: dict[Name, list[np.ndarray]] = {}
    for start, trajectory in trajectories:
        for name, state in wanted(trajectory).items():
            chosen = places[state.shape[1]]
            rows = chosen.within(start, start + len(state))
            sample, pos = (torch.from_numpy(part[rows]) for part in (chosen.sample, chosen.pos))
            states = state[(sample - start).to(state.device), pos.to(state.device)]
            wide = states.dtype == torch.float64
            states = states.to("cpu", torch.float64 if wide else torch.float32)
            parts.setdefault(name, []).append(states.numpy())
    return {name: np.concatenate(part) for name, part in parts.items()}


__all__ = [
    "Places", "collect_states", "targets",
]  # fmt: skip

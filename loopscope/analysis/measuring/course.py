"""Course: how far the state moves in each iteration, and what the coda makes of it there."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopscope.analysis.flags import Flagged, flagged
from loopscope.analysis.measures.update_norm import sample_norm
from loopscope.analysis.tables.rows import Rows
from loopscope.errors import InputError
from loopscope.models.native.loop_model import LoopModel
from loopscope.models.trajectory import Trajectory
from loopscope.probes.readout import beyond, losses, read_out, read_out_losses
from loopscope.probes.state_capture import capture

COURSE = ("delta", "readout")


class Course:
    """The tables `delta` and `readout` of one model while it runs."""

    def __init__(
        self, model: Any, first: Trajectory, samples: int, measures: tuple[str, ...],
        *, longer: Any, unread: str,
    ) -> None:  # fmt: skip
        """Set aside all rows.

        Args:
            model: A native or wrapped model.
            first: A trajectory of it.
            samples: Number of samples.
            measures: What is asked for; `delta` and `readout` are filled here.
            longer: The model with more iterations of its main loop (see `longer_model`), or None.
            unread: Why h(t) cannot be read out in place of h(K); empty where it can.
        """
        self.model, self.main, self.K = model, first.loop, first.K
        self.notes: list[str] = []
        self.longer = longer
        T = self.K if longer is None else iterations(longer)
        self.delta: dict[str, Rows] | None = None
        if "delta" in measures:
            depth = {n: T if n == self.main else one.K for n, one in first.loops.items()}
            self.delta = {n: Rows("delta", samples, _at(range(K))) for n, K in depth.items() if K}
        self.readout: Rows | None = None
        self.more: list[int] = []
        if "readout" in measures:
            if unread:
                self.notes.append(f"readout: {unread}, so its table has no rows")
            else:
                self.more = list(beyond(self.K, T, cheap=isinstance(model, LoopModel)))
                self.readout = Rows("readout", samples, _at([*range(self.K + 1), *self.more]))

    def add(
        self, here: slice, trajectory: Trajectory, drop: int, longer: Trajectory | None = None
    ) -> None:
        """One batch: the rows of its samples.

        Args:
            here: Which samples.
            trajectory: Their trajectory, with logits where the readout is asked for.
            drop: Tokens left out at the start of each sample, of `delta` only.
            longer: That of the model with more iterations, where it is known already.
        """
        if self.longer is not None and longer is None:
            longer = capture(self.longer, trajectory.tokens, memory=False)
        for name, rows in (self.delta or {}).items():
            h = [state[:, drop:] for state in trajectory.loops[name].h]
            value, ratio = steps(h)
            if longer is not None and name == self.main:
                further = steps([state[:, drop:] for state in longer.h], first=self.K - 1)
                value = torch.cat([value, further[0][:, 1:]], dim=1)
                ratio = torch.cat([ratio, further[1][:, 1:]], dim=1)
            found = flagged(value.cpu().numpy())
            rows.values["value"][here], rows.flag[here] = found
            rows.values["ratio"][here] = ratio.cpu().numpy()
        if self.readout is not None:
            found = self._losses(trajectory, longer)
            self.readout.values["value"][here], self.readout.flag[here] = found

    def frames(self, model: str) -> dict[str, list[pd.DataFrame]]:
        """The tables, one part per loop."""
        delta = [rows.frame(model, loop) for loop, rows in (self.delta or {}).items()]
        readout = [] if self.readout is None else [self.readout.frame(model, self.main)]
        return {"delta": delta, "readout": readout}

    def _losses(self, trajectory: Trajectory, longer: Trajectory | None) -> Flagged:
        tokens = trajectory.tokens
        assert tokens is not None and trajectory.logits is not None
        columns = [read_out_losses(self.model, tokens, h) for h in trajectory.h[:-1]]
        columns.append(losses(trajectory.logits, tokens))
        if longer is not None:
            more = [longer.h[t] for t in self.more]
            columns += [read_out_losses(self.longer, tokens, h) for h in more]
        return flagged(torch.stack([torch.stack(column).cpu() for column in columns], 1).numpy())


def why_unread(model: Any, first: Trajectory) -> str:
    """Why h(t) cannot be read out in place of h(K); empty where it can.

    Args:
        model: A native or wrapped model that predicts next tokens.
        first: A trajectory of it, with logits.
    """
    if first.K == 0:
        return "the model has no loop"
    if isinstance(model, LoopModel):
        return ""
    h, logits = first.h, first.logits
    assert logits is not None and first.tokens is not None
    if h[0].shape != h[-1].shape:
        return "h(0) and h(K) differ in shape"
    # a state that no loop leaves: the tokens' states in another order, turned round
    other = read_out(model, first.tokens, -h[-1].roll(1, dims=1))
    if torch.equal(other, logits):
        return "what follows the loop does not read h(K) where it could be replaced"
    return ""


def longer_model(model: Any, K: int, T: int | None) -> tuple[Any, str]:
    """The model with T iterations of its main loop in place of K.

    Args:
        model: A native or wrapped model.
        K: Iterations that it runs.
        T: Iterations to run; None for no more.

    Returns:
        The model, or None and why there is none (empty where none was asked for).

    Raises:
        InputError: if T is not more than K.
    """
    if T is None or K == 0:
        return None, ""
    if T <= K:
        raise InputError(
            f"more_loops is {T}, but the model runs {K} iterations; give more than that."
        )
    if any(point.fwd_hooks for point in model.hook_points()):
        return None, "more loops: the model has hooks, which it would lose; they were not tried"
    found = getattr(model, "map", None)
    try:
        return model.with_loops(T if found is None else {found.main.name: T}), ""
    except InputError as error:
        return None, f"more loops: {str(error).rstrip('.').removesuffix('; leave loops out')}"
    except Exception as error:  # somebody else's forward pass
        return None, f"more loops: with {T} the model fails ({type(error).__name__}: {error})"


def iterations(model: Any) -> int:
    """Iterations of a model's main loop, 0 without one."""
    found = getattr(model, "map", None)
    if found is None:
        return model.config.K
    return 0 if found.main is None else found.main.K


def steps(h: list[Tensor], *, first: int = 0) -> tuple[Tensor, Tensor]:
    """How far the state moves: `‖h(t+1) − h(t)‖_F / ‖h(t)‖_F`, and from step to step.

    Args:
        h: h(0) … h(T), each (batch, pos, d_model).
        first: The first t to give.

    Returns:
        The relative steps and the ratios `‖h(t+1) − h(t)‖ / ‖h(t) − h(t−1)‖`, each (batch, T −
        first) in float64, accumulated so; 0/0 is 0, and there is no ratio at t = 0 (NaN).
    """
    exact = h[0].dtype == torch.float64
    home = h[0].device
    states = [x.to(home, torch.float64 if exact else torch.float32) for x in h]
    moved = {
        t: sample_norm(states[t + 1] - states[t]) for t in range(max(first - 1, 0), len(h) - 1)
    }
    sizes = {t: sample_norm(states[t]) for t in range(first, len(h) - 1)}
    value = [_over(moved[t], sizes[t]) for t in sizes]
    ratio = [
        _over(moved[t], moved[t - 1]) if t else torch.full_like(moved[t], torch.nan) for t in sizes
    ]
    return torch.stack(value, 1), torch.stack(ratio, 1)


def _over(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a == 0) & (b == 0), 0.0, a / b)


def _at(ts: Any) -> dict[str, np.ndarray]:
    return {"t": np.array(list(ts), dtype=np.int16)}

"""Step sizes: how far each iteration moves the state."""

import pandas as pd
import torch
from torch import Tensor

from loopscope.analysis.flags import flagged
from loopscope.analysis.measures.filling import Batch, MeasureRows, Setup
from loopscope.analysis.measures.update_norm import sample_norm
from loopscope.analysis.tables import Rows, columns


def steps(h: list[Tensor], *, first: int = 0) -> tuple[Tensor, Tensor]:
    """Measure how far the state moves, `‖h(t+1) − h(t)‖_F / ‖h(t)‖_F`, and from step to step.

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


class DeltaRows(MeasureRows):
    """The table `delta`: the steps of each loop, of the main one on to as many as are run."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.main, self.K = setup.first.loop, setup.first.K
        depth = {name: loop.K for name, loop in setup.first.loops.items()}
        if setup.longer is not None:
            depth[self.main] = setup.longer.K
        self.rows = {
            name: Rows("delta", setup.samples, columns(("t",), [(t,) for t in range(K)]))
            for name, K in depth.items()
            if K
        }

    def add(self, batch: Batch) -> None:
        for name, rows in self.rows.items():
            value, ratio = steps([h[:, batch.drop :] for h in batch.trajectory.loops[name].h])
            if batch.longer is not None and name == self.main:
                more = [h[:, batch.drop :] for h in batch.longer.h]
                further = steps(more, first=self.K - 1)
                value = torch.cat([value, further[0][:, 1:]], dim=1)
                ratio = torch.cat([ratio, further[1][:, 1:]], dim=1)
            sizes, flag = flagged(value.cpu().numpy())
            rows.values["value"][batch.samples], rows.flag[batch.samples] = sizes, flag
            rows.values["ratio"][batch.samples] = ratio.cpu().numpy()

    def frames(self, model: str) -> dict[str, list[pd.DataFrame]]:
        return {"delta": [rows.frame(model, loop) for loop, rows in self.rows.items()]}

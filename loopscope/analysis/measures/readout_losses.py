"""Losses: of the model as it is, and when the coda reads h(t) in place of h(K)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopscope.analysis.flags import Flag, flagged
from loopscope.analysis.measures.filling import Batch, MeasureRows, Setup
from loopscope.analysis.tables import Rows, columns
from loopscope.models import Hooked, Trajectory
from loopscope.names import READINGS
from loopscope.probes import matched


def beyond(K: int, T: int, *, cheap: bool) -> Sequence[int]:
    """Choose the t > K at which a readout is taken: each where that is cheap, else up to four.

    Args:
        K: Iterations of the model.
        T: Iterations that are run.
        cheap: Whether reading out runs no more than the coda.

    Returns:
        Numbers of states, in order.
    """
    every = range(K + 1, T + 1)
    if cheap or len(every) <= 4:
        return every
    return [K + round((T - K) * quarter / 4) for quarter in range(1, 5)]


def fits(h: Tensor, h_K: Tensor) -> bool:
    """Tell whether a state can stand in another's place.

    Args:
        h: The state, (batch, pos, d_model).
        h_K: What the coda reads.

    Returns:
        Whether they have the same shape.
    """
    return h.shape == h_K.shape


def _nothing(h: Tensor) -> list[Tensor]:
    """NaN for each sample."""
    return list(torch.full((len(h),), torch.nan, device=h.device))


class ReadoutRows(MeasureRows):
    """The table `readout`: the loss at every h(t) of the main loop, by each reading.

    Raw goes on to as many iterations as are run; matched and fitted end at K, whose state they
    leave as it is.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.model, self.longer, self.maps = setup.model, setup.longer, setup.maps
        self.scoring = setup.scoring
        self.start = setup.start
        self.loop, K = setup.first.loop, setup.first.K
        self.rows: Rows | None = None
        if setup.unread:
            self.note = f"readout: {setup.unread}, so its table has no rows"
            return
        if self.maps is None:
            self.note = "readout: a fitted reading needs two windows that differ; it has no rows"
        T = K if self.longer is None else self.longer.K
        self.more = list(beyond(K, T, cheap=self.model.reads_out_cheaply))
        self.readings = [name for name in READINGS if name != "fitted" or self.maps is not None]
        places = [(t, name) for name in self.readings for t in range(K + 1)]
        places += [(t, "raw") for t in self.more]
        self.rows = Rows("readout", setup.samples, columns(("t", "reading"), places))

    def add(self, batch: Batch) -> None:
        if self.rows is None:
            return
        trajectory = batch.trajectory
        last = self.scoring.of_model(trajectory, batch.inputs)
        by_state: list[Sequence[Tensor]] = []
        for reading in self.readings:
            for t, h in enumerate(trajectory.h[:-1]):
                by_state.append(self._read(reading, batch, t, h))
            if reading == "fitted" and self.maps is not None and self.maps.refits:
                by_state.append(self._read(reading, batch, trajectory.K, trajectory.h[-1]))
            else:
                by_state.append(last)
        if self.longer is not None and batch.longer is not None:
            for h in (batch.longer.h[t] for t in self.more):
                if fits(h, batch.longer.h[-1]):
                    by_state.append(self._score(self.longer, batch, h))
                else:
                    by_state.append(_nothing(h))
        values = torch.stack([torch.stack(list(column)).cpu() for column in by_state], 1).numpy()
        value, flag = flagged(values)
        flag[:, self._misfits(trajectory, batch.longer)] = Flag.SHAPE
        self.rows.values["value"][batch.samples], self.rows.flag[batch.samples] = value, flag

    def _misfits(self, trajectory: Trajectory, longer: Trajectory | None) -> np.ndarray:
        """Which columns are of a state that does not fit where h(K), or h(T), stands."""
        columns = [not fits(h, trajectory.h[-1]) for h in trajectory.h] * len(self.readings)
        if longer is not None and self.longer is not None:
            columns += [not fits(longer.h[t], longer.h[-1]) for t in self.more]
        return np.array(columns)

    def _read(self, reading: str, batch: Batch, t: int, h: Tensor) -> Sequence[Tensor]:
        """The loss of each sample of a batch when the coda reads h(t)."""
        if not fits(h, batch.trajectory.h[-1]):
            return _nothing(h)
        if reading == "fitted":
            assert self.maps is not None
            first, stop = batch.samples.start + self.start, batch.samples.stop + self.start
            samples = slice(first, stop)
            return self.scoring.of_fitted(
                self.model, self.maps, batch.trajectory, batch.inputs, t, samples
            )
        if reading == "matched":
            h = matched(h, batch.trajectory.h[-1])
        return self._score(self.model, batch, h)

    def _score(self, model: Hooked, batch: Batch, h: Tensor) -> Sequence[Tensor]:
        return self.scoring.of_state(model, batch.trajectory, batch.inputs, h)

    def frames(self, model: str) -> dict[str, list[pd.DataFrame]]:
        return {"readout": [] if self.rows is None else [self.rows.frame(model, self.loop)]}


class LossRows(MeasureRows):
    """The table `loss`: one per sample, whatever the number of loops: it is the model's."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.loop, self.scoring = setup.first.loop, setup.scoring
        self.rows = None if setup.no_loss else Rows("loss", setup.samples, {})
        if setup.no_loss:
            self.note = f"loss: {setup.no_loss}; the table has no rows"

    def add(self, batch: Batch) -> None:
        if self.rows is None:
            return
        by_sample = self.scoring.of_model(batch.trajectory, batch.inputs)
        value, flag = flagged(torch.stack(list(by_sample)).cpu().numpy())
        self.rows.values["value"][batch.samples, 0] = value
        self.rows.flag[batch.samples, 0] = flag

    def frames(self, model: str) -> dict[str, list[pd.DataFrame]]:
        return {"loss": [] if self.rows is None else [self.rows.frame(model, self.loop)]}

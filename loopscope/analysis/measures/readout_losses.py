"""Losses: of the model as it is, and when the coda reads h(t) in place of h(K)."""

from collections.abc import Sequence

import pandas as pd
import torch

from loopscope.analysis.flags import flagged
from loopscope.analysis.measures.filling import Batch, MeasureRows, Setup
from loopscope.analysis.tables import Rows, columns
from loopscope.probes import losses, read_out_losses


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


class ReadoutRows(MeasureRows):
    """The table `readout`: the loss at every h(t) of the main loop, on to as many as are run."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.model, self.longer = setup.model, setup.longer
        self.loop, K = setup.first.loop, setup.first.K
        self.rows: Rows | None = None
        if setup.unread:
            self.note = f"readout: {setup.unread}, so its table has no rows"
            return
        T = K if self.longer is None else self.longer.K
        self.more = list(beyond(K, T, cheap=self.model.reads_out_cheaply))
        keys = columns(("t",), [(t,) for t in (*range(K + 1), *self.more)])
        self.rows = Rows("readout", setup.samples, keys)

    def add(self, batch: Batch) -> None:
        if self.rows is None:
            return
        trajectory, tokens = batch.trajectory, batch.trajectory.tokens
        assert tokens is not None and trajectory.logits is not None
        by_state = [read_out_losses(self.model, tokens, h) for h in trajectory.h[:-1]]
        by_state.append(losses(trajectory.logits, tokens))
        if self.longer is not None and batch.longer is not None:
            more = [batch.longer.h[t] for t in self.more]
            by_state += [read_out_losses(self.longer, tokens, h) for h in more]
        values = torch.stack([torch.stack(column).cpu() for column in by_state], 1).numpy()
        self.rows.values["value"][batch.samples], self.rows.flag[batch.samples] = flagged(values)

    def frames(self, model: str) -> dict[str, list[pd.DataFrame]]:
        return {"readout": [] if self.rows is None else [self.rows.frame(model, self.loop)]}


class LossRows(MeasureRows):
    """The table `loss`: one per sample, whatever the number of loops: it is the model's."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.loop = setup.first.loop
        self.rows = None if setup.no_loss else Rows("loss", setup.samples, {})
        if setup.no_loss:
            self.note = f"loss: {setup.no_loss}; the table has no rows"

    def add(self, batch: Batch) -> None:
        if self.rows is None:
            return
        logits, tokens = batch.trajectory.logits, batch.trajectory.tokens
        assert logits is not None and tokens is not None
        by_sample = losses(logits, tokens)
        value, flag = flagged(torch.stack(by_sample).cpu().numpy())
        self.rows.values["value"][batch.samples, 0] = value
        self.rows.flag[batch.samples, 0] = flag

    def frames(self, model: str) -> dict[str, list[pd.DataFrame]]:
        return {"loss": [] if self.rows is None else [self.rows.frame(model, self.loop)]}

"""Exit curves: the loss against the number of iterations, when tokens stop by a rule."""

from collections.abc import Sequence

import pandas as pd
import torch

from loopscope.analysis.flags import flagged
from loopscope.analysis.measures.filling import Batch, Setup
from loopscope.analysis.measures.orbit_plan import OrbitPlan, exit_signals
from loopscope.analysis.tables import Rows, columns, renumbered
from loopscope.probes import exit_losses, exit_times

FIXED = "loops"
"""The rule of a fixed number of loops: its threshold is the number."""


class ExitCurves:
    """The table `early_exit`, of samples that are looked at closely.

    Attributes:
        why_not: Why it has no rows; empty where it has.
    """

    def __init__(self, setup: Setup, plan: OrbitPlan, samples: Sequence[int]) -> None:
        """Set aside all rows.

        Args:
            setup: What there is to know before the first batch.
            plan: Has the thresholds.
            samples: The numbers of the samples.
        """
        self.samples, self.loop, self.K = samples, setup.first.loop, setup.first.K
        self.model, self.why_not = setup.model, setup.no_logits or setup.no_loss
        self.beyond = setup.longer is not None and setup.model.reads_out_cheaply
        if self.beyond and setup.longer is not None:
            self.model = setup.longer
        self.thresholds = plan.thresholds
        self.rows: Rows | None = None
        if not self.why_not and not self.thresholds:
            self.why_not = "states cannot be read out in place of h(K)" if plan.close else ""
        if self.why_not or not samples:
            return
        T = self.model.K if self.beyond else self.K
        keys = [(FIXED, float(t)) for t in range(T + 1)]
        keys += [(rule, float(x)) for rule, values in self.thresholds.items() for x in values]
        self.rows = Rows("early_exit", len(samples), columns(("rule", "threshold"), keys))

    def add(self, batch: Batch) -> None:
        """Fill the rows of the chosen samples of a batch.

        Args:
            batch: The batch.
        """
        if self.rows is None:
            return
        trajectory = batch.longer if self.beyond and batch.longer else batch.trajectory
        for place, sample in enumerate(self.samples):
            if batch.samples.start <= sample < batch.samples.stop:
                row = sample - batch.samples.start
                losses, signals = exit_signals(self.model, trajectory, row, self.K)
                if not signals:
                    continue
                T = len(losses) - 1
                loss = [losses.double().mean(1)]
                iterations = [torch.arange(T + 1, dtype=torch.float64)]
                for rule, values in self.thresholds.items():
                    times = exit_times(signals[rule], torch.from_numpy(values)).to(losses.device)
                    loss.append(exit_losses(losses, times).double().mean(1))
                    iterations.append(times.double().mean(1).cpu())
                value, flag = flagged(torch.cat([x.cpu() for x in loss]).numpy())
                self.rows.values["loss"][place], self.rows.flag[place] = value, flag
                self.rows.values["iterations"][place] = torch.cat(iterations).numpy()

    def frames(self, model: str) -> list[pd.DataFrame]:
        """Give the table.

        Args:
            model: The model's name.

        Returns:
            Its only part, or none.
        """
        if self.rows is None:
            return []
        return [renumbered(self.rows.frame(model, self.loop), self.samples)]

"""Head drift: how far the attention patterns of each head move between iterations."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from torch import Tensor

from loopscope.analysis.flags import flagged
from loopscope.analysis.tables import Rows, columns, renumbered
from loopscope.probes import LayerNames, jensen_shannon


class HeadDrift:
    """The table `attention_drift`, of samples that are looked at closely.

    Attributes:
        names: Layer → the hooks of its patterns in each iteration.
    """

    def __init__(self, names: LayerNames, samples: Sequence[int], loop: str) -> None:
        """Know what to look at; the number of heads shows on the first sample.

        Args:
            names: Layer → the hooks of its patterns in each iteration.
            samples: The numbers of the samples.
            loop: The loop's name.
        """
        self.names = {layer: list(hooks) for layer, hooks in names.items() if len(hooks) > 1}
        self.samples, self.loop = samples, loop
        self.rows: Rows | None = None

    def add(
        self,
        place: int,
        kept: Mapping[str, Tensor],
        row: int,
        trim: Callable[[Tensor], Tensor],
    ) -> None:
        """Fill the rows of one sample.

        Args:
            place: Its place among the samples that are looked at.
            kept: The patterns by name, (batch, head, query, key).
            row: Which sample of them.
            trim: Leaves out the first tokens, of (batch, pos, …).
        """
        values: dict[tuple[int, int, int], float] = {}
        for layer, hooks in self.names.items():
            patterns = [kept[name][row : row + 1] for name in hooks if name in kept]
            if len(patterns) < len(hooks) or any(p.shape != patterns[0].shape for p in patterns):
                continue
            for t, (p, q) in enumerate(pairwise(patterns)):
                by_query = trim(jensen_shannon(p, q).transpose(1, 2))
                for head, value in enumerate(by_query[0].mean(0).tolist()):
                    values[layer, head, t] = value
        if self.rows is None:
            if not values:
                return
            keys = columns(("layer", "head", "t"), sorted(values))
            self.rows = Rows("attention_drift", len(self.samples), keys)
            self._places = sorted(values)
        numbers = np.array([values.get(key, np.nan) for key in self._places])
        self.rows.values["value"][place], self.rows.flag[place] = flagged(numbers)

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

"""Path components: the paths of the first sample's tokens in the plane of all states."""

import numpy as np
import pandas as pd

from loopscope.analysis.flags import flagged
from loopscope.analysis.measures.filling import Batch, Setup
from loopscope.analysis.measures.orbit_plan import COMPONENTS, OrbitPlan, alike, spaced
from loopscope.analysis.tables import Rows, columns

PATHS = 48
"""Tokens whose paths are kept, evenly spaced."""


class PathComponents:
    """The table `orbit_path`; rows where the first of all samples is measured."""

    def __init__(self, setup: Setup, plan: OrbitPlan) -> None:
        """Know what to look at.

        Args:
            setup: What there is to know before the first batch.
            plan: Has the components.
        """
        components = plan.components if setup.start == 0 else ()
        pairs = zip(setup.first.courses, components, strict=False)
        self.components = {name: parts for name, parts in pairs if parts is not None}
        self.main = setup.first.loop
        self.rows: dict[str, Rows] = {}

    def add(self, batch: Batch) -> None:
        """Fill the rows, if the batch has the first sample.

        Args:
            batch: The batch.
        """
        if batch.samples.start != 0:
            return
        for name, components in self.components.items():
            loop = batch.trajectory.courses.get(name)
            if name == self.main and batch.longer is not None:
                loop = batch.longer
            if loop is None or not alike(loop.h):
                continue
            first = batch.trajectory.positions
            drop = batch.drop if loop.h[0].shape[1] >= first else 0
            tokens = [drop + i for i in spaced(PATHS, loop.h[0].shape[1] - drop)]
            states = [x[0, tokens].double().cpu().numpy() for x in loop.h]
            places = np.stack([components.of(x) for x in states], 1)  # (token, t, component)
            keys = columns(("pos", "t"), [(pos, t) for pos in tokens for t in range(len(loop.h))])
            rows = self.rows[name] = Rows("orbit_path", 1, keys)
            for number in range(COMPONENTS):
                if number < len(components.explained):
                    value, flag = flagged(places[..., number].reshape(-1))
                    rows.values[f"pc{number + 1}"][0] = value
                    rows.values[f"explained{number + 1}"][0] = components.explained[number]
                    rows.flag[0] = np.maximum(rows.flag[0], flag)

    def frames(self, model: str) -> list[pd.DataFrame]:
        """Give the table.

        Args:
            model: The model's name.

        Returns:
            A part for each loop.
        """
        return [rows.frame(model, loop) for loop, rows in self.rows.items()]

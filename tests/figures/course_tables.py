"""The tables delta and readout of synthetic models, with more loops than trained."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from loopscope.analysis.tables.frames import Tables
from tests.figures.conftest import finish, tidy


def with_courses(
    tables: Tables,
    *,
    more: int = 0,
    start: float = 9.0,
    end: float = 2.5,
    readings: Sequence[str] = ("raw",),
    turn: bool = False,
) -> Tables:
    """Add delta and readout of one model to its tables.

    Args:
        tables: Of one model and step.
        more: Loops beyond the trained ones.
        start: Raw loss when the coda reads h(0); of what it exceeds that of h(K) by, the square
            root remains when matched, the cube root when fitted.
        end: About the loss at h(K).
        readings: Of the readout.
        turn: Whether the steps have turns, a half of the step.
    """
    [model] = tables.models
    blocks = tables.update["block"].astype(str)
    K = blocks[blocks.str.startswith("core")].nunique()
    samples = tables.update["sample"].nunique()
    step = tables.update["step"].iloc[0]
    rng = np.random.default_rng([len(model), K, more])
    t = np.arange(K + more + 1)
    raw = end + (start - end) * 0.15**t + 0.03 * np.maximum(t - K, 0)
    size = 0.5 * 0.8 ** t[:-1]
    each = rng.normal(1.0, 0.08, (samples, 1)) * rng.normal(1.0, 0.02, (samples, len(t)))
    parts = []
    for reading, root in READ.items():
        if reading in readings:
            loss = raw[K] + np.maximum(raw - raw[K], 0) ** root if root < 1 else raw
            part = tidy(loss * each, {"t": list(t)})
            part = part if reading == "raw" else part[part["t"] <= K]
            parts.append(part.assign(reading=reading))
    frames = {"readout": pd.concat(parts, ignore_index=True).astype({"reading": "category"})}
    if len(size):
        delta = tidy(size * each[:, :-1], {"t": list(t[:-1])})
        delta["ratio"] = delta.groupby("sample")["value"].transform(lambda v: v / v.shift())
        delta["mixed"] = 2 * delta["value"] / (2 + delta["value"])
        delta["turn"] = delta["value"] / 2 if turn else np.nan
        delta["work"] = delta["turn"] * 1.5
        frames["delta"] = delta
    for frame in frames.values():
        frame["t"] = frame["t"].astype(np.int16)
    here = None if pd.isna(step) else int(step)
    return replace(tables, **{n: finish(f, model, here) for n, f in frames.items()})


READ = {"raw": 1.0, "matched": 1 / 2, "fitted": 1 / 3}
"""The power of the excess loss by each reading."""

"""Which steps of a training series a figure of states shows."""

from collections.abc import Mapping, Set
from dataclasses import replace

from loopscope.analysis.tables.frames import Tables
from loopscope.analysis.tables.registry import SCHEMAS


def steps_of(tables: Tables, model: str) -> list[int]:
    """List the steps at which a model was measured.

    Args:
        tables: What was measured.
        model: The model's name.

    Returns:
        The steps in order, empty where the model is no series.
    """
    found: set[int] = set()
    for name in SCHEMAS:
        frame = getattr(tables, name)
        if frame is not None:
            own = frame.loc[frame["model"].eq(model), "step"]
            found |= {int(step) for step in own.dropna().unique()}
    return sorted(found)


def of_steps(tables: Tables, steps: Mapping[str, Set[int]]) -> Tables:
    """Keep some steps of some models.

    Args:
        tables: What was measured.
        steps: Model → the steps of it that stay; other models keep all their rows.

    Returns:
        The tables with fewer rows.
    """
    if not steps:
        return tables
    kept = {}
    for name in SCHEMAS:
        frame = getattr(tables, name)
        if frame is None:
            continue
        keep = ~frame["model"].isin(list(steps))
        for model, own in steps.items():
            keep |= frame["model"].eq(model) & frame["step"].isin(own).fillna(False).astype(bool)
        kept[name] = frame[keep]
    return replace(tables, **kept)  # type: ignore[type-var]

"""Which steps of a training series a figure of states shows."""

from collections.abc import Mapping, Set

from loopscope.analysis.tables import SCHEMAS, Tables


def steps_of(tables: Tables, model: str) -> list[int]:
    """List the steps at which a model was measured.

    Args:
        tables: What was measured.
        model: The model's name.

    Returns:
        The steps in order, empty where the model is no series.
    """
    steps: set[int] = set()
    for name, frame in tables.frames().items():
        if name in SCHEMAS:
            column = frame.loc[frame["model"].eq(model), "step"]
            steps |= {int(step) for step in column.dropna().unique()}
    return sorted(steps)


def of_steps(tables: Tables, steps: Mapping[str, Set[int]]) -> Tables:
    """Keep some steps of some models.

    Args:
        tables: What was measured; anything that has `frames()` and `provenance`.
        steps: Model → the steps of it that stay; other models keep all their rows.

    Returns:
        The tables with fewer rows; those of training runs have all.
    """
    if not steps:
        return tables
    narrowed = tables.frames()
    for name in narrowed.keys() & SCHEMAS.keys():
        frame = narrowed[name]
        keep = ~frame["model"].isin(list(steps))
        for model, kept in steps.items():
            keep |= frame["model"].eq(model) & frame["step"].isin(kept).fillna(False).astype(bool)
        narrowed[name] = frame[keep]
    return Tables(**narrowed, provenance=tables.provenance)

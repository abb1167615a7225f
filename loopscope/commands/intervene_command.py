"""`loopscope intervene`: what the prediction depends on."""

from pathlib import Path
from typing import Any

from loopscope.analysis import InterveneOptions
from loopscope.commands.results import look_inside
from loopscope.commands.signatures import (
    LOOKED_INTO,
    FromTables,
    Models,
    Out,
    with_settings,
)


@with_settings((*LOOKED_INTO, "text"))
@with_settings(kind=InterveneOptions, defaults={"what": None, "how": None})
def intervene(
    models: Models = None,
    out: Out = Path("out/intervene"),
    from_tables: FromTables = None,
    **settings: Any,
) -> None:
    """Change one thing inside a model at a time and measure what the prediction loses by it.

    Iterations, attention, MLPs, heads, slots, write and read edges, edges of Eq. 7; mass against
    effect, direct against total effect.
    """
    look_inside("intervene", models, out, from_tables, settings)

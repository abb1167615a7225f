"""`loopscope orbit`: where the states go."""

from pathlib import Path
from typing import Any

from loopscope.analysis import OrbitOptions
from loopscope.commands.results import look_inside
from loopscope.commands.signatures import (
    LOOKED_INTO,
    FromTables,
    Models,
    Out,
    with_settings,
)


@with_settings((*LOOKED_INTO, "text", "more_loops"))
@with_settings(kind=OrbitOptions)
def orbit(
    models: Models = None,
    out: Out = Path("out/orbit"),
    from_tables: FromTables = None,
    **settings: Any,
) -> None:
    """Follow the states through the loops: do they converge, orbit or drift?

    Steps, angles, contraction, attention drift, paths, and the loss of early-exit rules.
    """
    look_inside("orbit", models, out, from_tables, settings)

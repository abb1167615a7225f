"""`loopscope lens`: what can be read of every state."""

from pathlib import Path
from typing import Any

from loopscope.analysis import LensOptions
from loopscope.commands.results import look_inside
from loopscope.commands.signatures import (
    LOOKED_INTO,
    FromTables,
    Models,
    Out,
    with_settings,
)


@with_settings((*LOOKED_INTO, "text", "more_loops"))
@with_settings(kind=LensOptions)
def lens(
    models: Models = None,
    out: Out = Path("out/lens"),
    from_tables: FromTables = None,
    **settings: Any,
) -> None:
    """Read every state as if it were the last: loss, KL, top tokens of logit and coda lens.

    With --text a grid of the tokens read at every state and position too. A lens shows what can be
    read of a state, not what the model goes on to use.
    """
    look_inside("lens", models, out, from_tables, settings)

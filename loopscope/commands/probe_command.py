"""`loopscope probe`: what the states hold."""

from pathlib import Path
from typing import Any

from loopscope.analysis import ProbeOptions
from loopscope.commands.results import look_inside
from loopscope.commands.signatures import (
    LOOKED_INTO,
    FromTables,
    Models,
    Out,
    with_settings,
)


@with_settings(LOOKED_INTO)
@with_settings(kind=ProbeOptions)
def probe(
    models: Models = None,
    out: Out = Path("out/probe"),
    from_tables: FromTables = None,
    **settings: Any,
) -> None:
    """Fit linear probes to the states: what is decodable after which loop, with controls.

    Beside every score: a random label per token type, shuffled labels, the untrained twin, h_emb. A
    probe shows what is there, not what is used.
    """
    look_inside("probe", models, out, from_tables, settings)

"""Tables: rows, frames, aggregation; needs no torch."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.analysis.tables import aggregate as aggregate
    from loopscope.analysis.tables import training_curves as training_curves
    from loopscope.analysis.tables.aggregate import sound as sound
    from loopscope.analysis.tables.frames import Tables as Tables
    from loopscope.analysis.tables.frames import empty as empty
    from loopscope.analysis.tables.frames import stack as stack
    from loopscope.analysis.tables.provenance_records import model_record as model_record
    from loopscope.analysis.tables.provenance_records import model_records as model_records
    from loopscope.analysis.tables.registry import BY_NAME as BY_NAME
    from loopscope.analysis.tables.registry import COMPARED as COMPARED
    from loopscope.analysis.tables.registry import DEFAULT as DEFAULT
    from loopscope.analysis.tables.registry import INSIDE_MEASURES as INSIDE_MEASURES
    from loopscope.analysis.tables.registry import MEASURED as MEASURED
    from loopscope.analysis.tables.registry import MEASURES as MEASURES
    from loopscope.analysis.tables.registry import RUNS as RUNS
    from loopscope.analysis.tables.registry import SCHEMAS as SCHEMAS
    from loopscope.analysis.tables.registry import TABLES as TABLES
    from loopscope.analysis.tables.rows import Rows as Rows
    from loopscope.analysis.tables.rows import columns as columns
    from loopscope.analysis.tables.rows import renumbered as renumbered
    from loopscope.analysis.tables.training_curves import recipe as recipe

__getattr__, __dir__, __all__ = lazy(__name__)

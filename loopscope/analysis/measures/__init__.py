"""Measures: states to numbers."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.analysis.measures.cka_estimators import check as check
    from loopscope.analysis.measures.filling import Batch as Batch
    from loopscope.analysis.measures.filling import MeasureRows as MeasureRows
    from loopscope.analysis.measures.filling import SampleStates as SampleStates
    from loopscope.analysis.measures.filling import Setup as Setup
    from loopscope.analysis.measures.filling import kept_positions as kept_positions

__getattr__, __dir__, __all__ = lazy(__name__)

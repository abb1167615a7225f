"""Measures: states to numbers."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.analysis.measures.cka_estimators import check as check
    from loopscope.analysis.measures.filling import Batch as Batch
    from loopscope.analysis.measures.filling import MeasureRows as MeasureRows
    from loopscope.analysis.measures.filling import SampleSet as SampleSet
    from loopscope.analysis.measures.filling import SampleStates as SampleStates
    from loopscope.analysis.measures.filling import Setup as Setup
    from loopscope.analysis.measures.filling import kept_positions as kept_positions
    from loopscope.analysis.measures.scoring import NextTokens as NextTokens
    from loopscope.analysis.measures.scoring import OwnLoss as OwnLoss
    from loopscope.analysis.measures.scoring import loss_values as loss_values
    from loopscope.analysis.measures.scoring import output_of_state as output_of_state

__getattr__, __dir__, __all__ = lazy(__name__)

"""Comparisons: many checkpoints, measured in resumable shards, and what follows."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.analysis.comparisons.plan import Checkpoint as Checkpoint
    from loopscope.analysis.comparisons.result import save_comparison as save_comparison
    from loopscope.analysis.comparisons.work import Comparison as Comparison
    from loopscope.analysis.comparisons.work import Watch as Watch
    from loopscope.analysis.comparisons.work import compare as compare

__getattr__, __dir__, __all__ = lazy(__name__)

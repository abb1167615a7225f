"""Measuring: one model over samples, batch by batch, into tables."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.analysis.measuring.looking_inside import intervene as intervene
    from loopscope.analysis.measuring.looking_inside import lens as lens
    from loopscope.analysis.measuring.looking_inside import orbit as orbit
    from loopscope.analysis.measuring.looking_inside import probe as probe
    from loopscope.analysis.measuring.sample_items import Items as Items
    from loopscope.analysis.measuring.sample_items import are_items as are_items
    from loopscope.analysis.measuring.sample_items import read_items as read_items
    from loopscope.analysis.measuring.streaming import Measuring as Measuring
    from loopscope.analysis.measuring.streaming import measure as measure
    from loopscope.analysis.measuring.token_windows import checked_tokens as checked_tokens

__getattr__, __dir__, __all__ = lazy(__name__)

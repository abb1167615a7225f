"""Models: what they all offer, loopscope's own, and anybody else's, wrapped."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.models.hooked import Branch as Branch
    from loopscope.models.hooked import Hooked as Hooked
    from loopscope.models.hooked import LayerParts as LayerParts
    from loopscope.models.hooks import NamedHooks as NamedHooks
    from loopscope.models.hooks import reading as reading
    from loopscope.models.trajectory import Trajectory as Trajectory

__getattr__, __dir__, __all__ = lazy(__name__)

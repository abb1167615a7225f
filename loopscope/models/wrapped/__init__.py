"""Somebody else's model with every iteration addressable."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.models.wrapped.run_context import buffers_kept as buffers_kept
    from loopscope.models.wrapped.wrapped_model import WrappedModel as WrappedModel
    from loopscope.models.wrapped.wrapping import wrap as wrap

__getattr__, __dir__, __all__ = lazy(__name__)

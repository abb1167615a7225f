"""Opening: from a target (zoo name, folder, hub id, factory) to a model."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.models.opening.loading import load as load
    from loopscope.models.opening.loading import peek as peek
    from loopscope.models.opening.targets import Target as Target
    from loopscope.models.opening.targets import locate as locate
    from loopscope.models.opening.targets import zoo as zoo
    from loopscope.models.opening.targets import zoo_folder as zoo_folder

__getattr__, __dir__, __all__ = lazy(__name__)

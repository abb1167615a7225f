"""Commands: one module each, parsing and printing only."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.commands.compare_command import compare as compare
    from loopscope.commands.figures_command import figures as figures
    from loopscope.commands.inspect_command import inspect as inspect
    from loopscope.commands.intervene_command import intervene as intervene
    from loopscope.commands.lens_command import lens as lens
    from loopscope.commands.orbit_command import orbit as orbit
    from loopscope.commands.params_command import params as params
    from loopscope.commands.probe_command import probe as probe
    from loopscope.commands.train_command import train as train

__getattr__, __dir__, __all__ = lazy(__name__)

"""Measures: states to tables (never imports matplotlib)."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.analysis.declaring import option as option
    from loopscope.analysis.inside_options import INSIDE as INSIDE
    from loopscope.analysis.inside_options import InterveneOptions as InterveneOptions
    from loopscope.analysis.inside_options import LensOptions as LensOptions
    from loopscope.analysis.inside_options import OrbitOptions as OrbitOptions
    from loopscope.analysis.inside_options import ProbeOptions as ProbeOptions
    from loopscope.analysis.options import Options as Options
    from loopscope.analysis.options import Settings as Settings
    from loopscope.analysis.options import build_options as build_options
    from loopscope.analysis.options import takes as takes

__getattr__, __dir__, __all__ = lazy(__name__)

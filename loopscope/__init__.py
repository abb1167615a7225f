"""loopscope: see what happens inside recursive (looped, depth-recurrent) transformers.

Names are loaded when first used, so `import loopscope` is instant and does not import torch.
"""

from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, filterwarnings

from loopscope._version import __version__ as __version__
from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope import figures as plot
    from loopscope.analysis.comparisons import compare as compare
    from loopscope.analysis.measuring import intervene as intervene
    from loopscope.analysis.measuring import lens as lens
    from loopscope.analysis.measuring import measure as measure
    from loopscope.analysis.measuring import orbit as orbit
    from loopscope.analysis.measuring import probe as probe
    from loopscope.analysis.tables import Tables as Tables
    from loopscope.models import Trajectory as Trajectory
    from loopscope.models.native import Layout as Layout
    from loopscope.models.native import LoopConfig as LoopConfig
    from loopscope.models.native import LoopModel as LoopModel
    from loopscope.models.opening import load as load
    from loopscope.models.opening import zoo as zoo
    from loopscope.models.wrapped import WrappedModel as WrappedModel
    from loopscope.models.wrapped import wrap as wrap
    from loopscope.probes import capture as capture
    from loopscope.text import load_samples as load_samples
    from loopscope.training import LoopCallback as LoopCallback
    from loopscope.training import Monitor as Monitor

__all__ = [  # noqa: RUF022  (the order in which they are used)
    "load", "wrap", "zoo", "capture", "measure", "compare", "load_samples", "plot",
    "lens", "probe", "intervene", "orbit", "Monitor", "LoopCallback",
    "Layout", "LoopConfig", "LoopModel", "Tables", "Trajectory", "WrappedModel",
]  # fmt: skip

_import, _names, _offered = lazy(__name__)


def __getattr__(name: str) -> Any:
    with catch_warnings():
        # tqdm, on its way in with transformer-lens, warns in notebooks without ipywidgets
        filterwarnings("ignore", message="IProgress not found")
        return _import(name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

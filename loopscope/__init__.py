"""loopscope: see what happens inside recursive (looped, depth-recurrent) transformers.

Names are loaded when first used, so `import loopscope` is instant and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, filterwarnings

from loopscope._version import __version__ as __version__

if TYPE_CHECKING:
    from loopscope import figures as plot
    from loopscope.analysis.comparisons.work import compare
    from loopscope.analysis.measuring.streaming import measure
    from loopscope.analysis.tables.frames import Tables
    from loopscope.models.native.configuration import Layout, LoopConfig
    from loopscope.models.native.loop_model import LoopModel
    from loopscope.models.opening.loading import load
    from loopscope.models.opening.targets import zoo
    from loopscope.models.trajectory import Trajectory
    from loopscope.models.wrapped.wrapped_model import WrappedModel
    from loopscope.models.wrapped.wrapping import wrap
    from loopscope.probes.state_capture import capture
    from loopscope.text.windows import load_samples
    from loopscope.training.callback import LoopCallback
    from loopscope.training.monitor import Monitor

_HOMES = {
    "load": "loopscope.models.opening.loading",
    "wrap": "loopscope.models.wrapped.wrapping",
    "zoo": "loopscope.models.opening.targets",
    "capture": "loopscope.probes.state_capture",
    "measure": "loopscope.analysis.measuring.streaming",
    "compare": "loopscope.analysis.comparisons.work",
    "load_samples": "loopscope.text.windows",
    "Monitor": "loopscope.training.monitor",
    "LoopCallback": "loopscope.training.callback",
    "plot": "loopscope.figures",
    "Layout": "loopscope.models.native.configuration",
    "LoopConfig": "loopscope.models.native.configuration",
    "LoopModel": "loopscope.models.native.loop_model",
    "WrappedModel": "loopscope.models.wrapped.wrapped_model",
    "Tables": "loopscope.analysis.tables.frames",
    "Trajectory": "loopscope.models.trajectory",
}

__all__ = [  # noqa: RUF022  (the order in which they are used)
    "load", "wrap", "zoo", "capture", "measure", "compare", "load_samples", "plot",
    "Monitor", "LoopCallback",
    "Layout", "LoopConfig", "LoopModel", "Tables", "Trajectory", "WrappedModel",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loopscope' has no attribute {name!r}")
    with catch_warnings():
        # tqdm, on its way in with transformer-lens, warns in notebooks without ipywidgets
        filterwarnings("ignore", message="IProgress not found")
        home = import_module(_HOMES[name])
    value = home if name == "plot" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

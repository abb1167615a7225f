"""loopscope: see what happens inside recursive (looped, depth-recurrent) transformers.

Names are loaded when first used, so `import loopscope` is instant and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, filterwarnings

if TYPE_CHECKING:
    from loopscope import figures as plot
    from loopscope.analysis.compare import compare
    from loopscope.analysis.measure import measure
    from loopscope.analysis.tables import Tables
    from loopscope.data import load_samples
    from loopscope.models.config import LoopConfig
    from loopscope.models.layout import Layout
    from loopscope.models.load import load, zoo
    from loopscope.models.model import LoopModel
    from loopscope.models.wrapped.model import WrappedModel
    from loopscope.models.wrapped.wrap import wrap
    from loopscope.probes.capture import Trajectory, capture
    from loopscope.training.callback import LoopCallback
    from loopscope.training.monitor import Monitor

__version__ = "0.1.0"

_HOMES = {
    "load": "loopscope.models.load",
    "wrap": "loopscope.models.wrapped.wrap",
    "zoo": "loopscope.models.load",
    "capture": "loopscope.probes.capture",
    "measure": "loopscope.analysis.measure",
    "compare": "loopscope.analysis.compare",
    "load_samples": "loopscope.data",
    "Monitor": "loopscope.training.monitor",
    "LoopCallback": "loopscope.training.callback",
    "plot": "loopscope.figures",
    "Layout": "loopscope.models.layout",
    "LoopConfig": "loopscope.models.config",
    "LoopModel": "loopscope.models.model",
    "WrappedModel": "loopscope.models.wrapped.model",
    "Tables": "loopscope.analysis.tables",
    "Trajectory": "loopscope.probes.capture",
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

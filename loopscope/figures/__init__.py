"""Tables to figures: every function takes measured tables and returns a matplotlib Figure.

Nothing here imports torch; every figure can be redrawn from its saved table alone.
"""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.figures.cka_maps import cka
    from loopscope.figures.drawing import DrawReport, draw_all, save
    from loopscope.figures.figure1 import fig1
    from loopscope.figures.jobs import plan
    from loopscope.figures.layer_distribution import layers
    from loopscope.figures.loss_lines import loss_per_loop
    from loopscope.figures.rank_lines import rank
    from loopscope.figures.router_maps import routers
    from loopscope.figures.series_panels import series
    from loopscope.figures.spectra import spectrum
    from loopscope.figures.step_lines import steps
    from loopscope.figures.training_lines import training
    from loopscope.figures.update_bars import update

_HOMES = {
    "DrawReport": "drawing",
    "cka": "cka_maps",
    "draw_all": "drawing",
    "fig1": "figure1",
    "layers": "layer_distribution",
    "loss_per_loop": "loss_lines",
    "plan": "jobs",
    "rank": "rank_lines",
    "routers": "router_maps",
    "save": "drawing",
    "series": "series_panels",
    "spectrum": "spectra",
    "steps": "step_lines",
    "training": "training_lines",
    "update": "update_bars",
}

__all__ = [
    "DrawReport",
    "cka",
    "draw_all",
    "fig1",
    "layers",
    "loss_per_loop",
    "plan",
    "rank",
    "routers",
    "save",
    "series",
    "spectrum",
    "steps",
    "training",
    "update",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)

"""Tables to figures: every function takes measured tables and returns a matplotlib Figure.

Nothing here imports torch; every figure can be redrawn from its saved table alone.
"""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.figures.cka_maps import cka as cka
    from loopscope.figures.courses import trained_loops as trained_loops
    from loopscope.figures.drawing import DrawReport as DrawReport
    from loopscope.figures.drawing import draw_all as draw_all
    from loopscope.figures.drawing import save as save
    from loopscope.figures.effect_bars import effect as effect
    from loopscope.figures.exit_lines import early_exit as early_exit
    from loopscope.figures.figure1 import fig1 as fig1
    from loopscope.figures.head_drifts import attention_drift as attention_drift
    from loopscope.figures.jobs import Job as Job
    from loopscope.figures.jobs import plan as plan
    from loopscope.figures.layer_distribution import layers as layers
    from loopscope.figures.lens_lines import lens as lens
    from loopscope.figures.loss_lines import loss_per_loop as loss_per_loop
    from loopscope.figures.mass_effect_points import mass_effect as mass_effect
    from loopscope.figures.orbit_lines import orbit as orbit
    from loopscope.figures.orbit_paths import orbit_path as orbit_path
    from loopscope.figures.panels import Panel as Panel
    from loopscope.figures.panels import choose as choose
    from loopscope.figures.panels import loops_of as loops_of
    from loopscope.figures.panels import shortened as shortened
    from loopscope.figures.probe_lines import probe as probe
    from loopscope.figures.rank_lines import rank as rank
    from loopscope.figures.router_maps import routers as routers
    from loopscope.figures.series_panels import series as series
    from loopscope.figures.series_steps import of_steps as of_steps
    from loopscope.figures.series_steps import steps_of as steps_of
    from loopscope.figures.spectra import spectrum as spectrum
    from loopscope.figures.step_lines import steps as steps
    from loopscope.figures.style import Figure as Figure
    from loopscope.figures.ticks import every as every
    from loopscope.figures.token_grid import lens_tokens as lens_tokens
    from loopscope.figures.training_lines import training as training
    from loopscope.figures.update_bars import update as update

__all__ = [
    "DrawReport", "attention_drift", "cka", "draw_all", "early_exit", "effect", "fig1", "layers",
    "lens", "lens_tokens", "loss_per_loop", "mass_effect", "orbit", "orbit_path", "plan", "probe",
    "rank", "routers", "save", "series", "spectrum", "steps", "training", "update",
]  # fmt: skip

__getattr__, _offered, _names = lazy(__name__)


def __dir__() -> list[str]:
    return __all__

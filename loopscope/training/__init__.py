"""Training: the paper's recipe at any size, resumable, every variant on identical batches."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.training.batches import TrainingData
    from loopscope.training.callback import LoopCallback
    from loopscope.training.monitor import Monitor
    from loopscope.training.recipe import (
        PlanOptions,
        TrainConfig,
        TrainOptions,
        plan_training,
        variant_config,
    )
    from loopscope.training.trainer import StepReport, evaluate, train_model
    from loopscope.training.variants import train_variants

_HOMES = {
    "LoopCallback": "callback",
    "Monitor": "monitor",
    "PlanOptions": "recipe",
    "StepReport": "trainer",
    "TrainConfig": "recipe",
    "TrainOptions": "recipe",
    "TrainingData": "batches",
    "evaluate": "trainer",
    "plan_training": "recipe",
    "train_model": "trainer",
    "train_variants": "variants",
    "variant_config": "recipe",
}

__all__ = [
    "LoopCallback",
    "Monitor",
    "PlanOptions",
    "StepReport",
    "TrainConfig",
    "TrainOptions",
    "TrainingData",
    "evaluate",
    "plan_training",
    "train_model",
    "train_variants",
    "variant_config",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)

"""Training: the paper's recipe at any size, resumable, every variant on identical batches."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.training.batches import TrainingData as TrainingData
    from loopscope.training.callback import LoopCallback as LoopCallback
    from loopscope.training.monitor import Monitor as Monitor
    from loopscope.training.recipe import PlanOptions as PlanOptions
    from loopscope.training.recipe import TrainConfig as TrainConfig
    from loopscope.training.recipe import TrainOptions as TrainOptions
    from loopscope.training.recipe import plan_training as plan_training
    from loopscope.training.recipe import variant_config as variant_config
    from loopscope.training.runs import read_runs as read_runs
    from loopscope.training.trainer import StepReport as StepReport
    from loopscope.training.trainer import evaluate as evaluate
    from loopscope.training.trainer import train_model as train_model
    from loopscope.training.variants import train_variants as train_variants

__getattr__, __dir__, __all__ = lazy(__name__)

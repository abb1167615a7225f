"""LoopCallback: a monitor in the Trainer of Hugging Face's transformers."""

import math
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from loopscope.training.monitor import Monitor


class LoopCallback(TrainerCallback):
    """Logs the measures of loop collapse where a Trainer logs its loss.

    Before the first step, every `monitor.every` steps and after the last one, the main process
    measures and calls `trainer.log`: numbers such as `loop/skew` go into `log_history` and to every
    logger (TensorBoard, W&B …) that the Trainer reports to. A sign that is NaN is left out.

    A callback is not given the trainer that calls it, so it is added afterwards:

        trainer.add_callback(LoopCallback(trainer, Monitor(probe, every=100)))

    Attributes:
        trainer: The Trainer.
        monitor: What measures.
    """

    def __init__(self, trainer: Trainer, monitor: Monitor) -> None:
        """Tie a monitor to a trainer; add the callback to it afterwards.

        Args:
            trainer: Its log gets the signs.
            monitor: What measures.
        """
        self.trainer, self.monitor = trainer, monitor

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget rows of steps that a resumed training takes again, or of another training.

        Args:
            args: The Trainer's arguments.
            state: Where the training stands.
            control: What the Trainer is about to do.
            **kwargs: What else it passes on; not used.
        """
        if state.is_world_process_zero:
            self.monitor.resume(state.global_step or -1)

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the untrained model; all loggers are ready by now.

        Args:
            args: The Trainer's arguments.
            state: Where the training stands.
            control: What the Trainer is about to do.
            **kwargs: What else it passes on; not used.
        """
        if state.global_step == 0:
            self._measure(state, control)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure when it is due, and after the last step.

        Args:
            args: The Trainer's arguments.
            state: Where the training stands.
            control: What the Trainer is about to do.
            **kwargs: What else it passes on; not used.
        """
        if self.monitor.due(state.global_step) or state.global_step >= state.max_steps:
            self._measure(state, control)

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure once more where the training stops before its last step.

        Args:
            args: The Trainer's arguments.
            state: Where the training stands.
            control: What the Trainer is about to do.
            **kwargs: What else it passes on; not used.
        """
        if control.should_training_stop:
            self._measure(state, control)

    def _measure(self, state: TrainerState, control: TrainerControl) -> None:
        rows, step = self.monitor.rows, state.global_step
        if not state.is_world_process_zero or (rows and rows[-1]["step"] == step):
            return
        values = self.monitor.measure(self.trainer.model, step)
        pending = control.should_log  # which a call of log takes for done
        self.trainer.log({f"loop/{k}": v for k, v in values.items() if not math.isnan(v)})
        control.should_log = pending

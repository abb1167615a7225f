"""One process, or one of several that `accelerate launch` started."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from loopscope.devices import parse_device
from loopscope.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Which of the processes this is, and how they work together.

    Attributes:
        rank: Number of this process, from 0; only process 0 writes results.
        count: How many there are.
        device: Where this one computes.
        accelerator: accelerate's, when there are several.
    """

    rank: int
    count: int
    device: torch.device
    accelerator: Any = None

    @classmethod
    def join(
        cls, device: str | torch.device | None, *, patience: timedelta | None = None
    ) -> "Processes":
        """The processes of this launch; without a launcher there is one.

        Args:
            device: Where to compute; with several processes each takes its own device of that kind.
            patience: How long the processes wait for each other; torch's default when not given.

        Returns:
            This process, ready to work with the others.

        Raises:
            InputError: for an absent device, or a launch that does not copy models to processes.
        """
        place = parse_device(device)
        if launched() == 1:
            return cls(rank=0, count=1, device=place)
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        handlers = [] if patience is None else [InitProcessGroupKwargs(timeout=patience)]
        # The command says what is computed, not the launcher's configuration.
        accelerator = Accelerator(
            cpu=place.type == "cpu",
            mixed_precision="no",
            dynamo_backend="no",
            kwargs_handlers=handlers,
        )
        kind = str(accelerator.distributed_type.value)
        if kind not in ("MULTI_CPU", "MULTI_GPU"):
            raise InputError(
                f"accelerate was configured for {kind}; every process holds a model of its own "
                "(MULTI_GPU or MULTI_CPU): run `accelerate config` or give --multi_gpu."
            )
        return cls(
            rank=accelerator.process_index,
            count=accelerator.num_processes,
            device=accelerator.device,
            accelerator=accelerator,
        )

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def check(self, batch_size: int, accumulate: int) -> None:
        """Refuse a batch that the processes cannot share evenly.

        Args:
            batch_size: Windows per step, over all processes.
            accumulate: Parts each process cuts its share into.

        Raises:
            InputError: naming the three numbers.
        """
        if batch_size % (self.count * accumulate):
            raise InputError(
                f"a batch of {batch_size} windows cannot be shared by {self.count} processes in "
                f"{accumulate} parts each; give a multiple of {self.count * accumulate}."
            )

    def share(self, windows: Int64[Tensor, "batch pos"]) -> Int64[Tensor, "part pos"]:
        """This process's part of some windows.

        Args:
            windows: The same in every process.

        Returns:
            Consecutive rows; the processes' parts in order are all of them.
        """
        return windows.tensor_split(self.count)[self.rank]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to train: averages gradients over the processes.

        Args:
            model: The same in every process.

        Returns:
            The model itself when there is one process.
        """
        return model if self.accelerator is None else self.accelerator.prepare_model(model)

    def local(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Backward passes in here leave the averaging of gradients to a later one.

        Args:
            module: What `wrap` gave.

        Returns:
            A context; it does nothing when there is one process.
        """
        return nullcontext() if self.accelerator is None else self.accelerator.no_sync(module)

    def total(self, value: float) -> float:
        """Sum over the processes.

        Args:
            value: This process's.

        Returns:
            The sum, the same in every process.
        """
        if self.accelerator is None:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        return float(self.accelerator.reduce(tensor, "sum").item())

    def gather(self, value: Any) -> list[Any]:
        """What each process gives here, in their order.

        Args:
            value: This process's; anything that can be pickled.

        Returns:
            One value per process, the same in every process.
        """
        if self.accelerator is None:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


def is_main() -> bool:
    """Whether this process, of those that a launcher started, is the one that prints."""
    return int(os.environ.get("RANK", "0")) == 0


def launched() -> int:
    """How many processes the launcher started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))

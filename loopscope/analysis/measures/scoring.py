"""Scoring: the loss of each sample, of the model as it is and when the coda reads another state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from loopscope.errors import InputError
from loopscope.models import Hooked, Trajectory
from loopscope.probes import losses, read_out_losses

LossFunction = Callable[[Any, Any], Any]
"""(what the model returns, the batch that it was given) → a number for each sample."""


@runtime_checkable
class StateMaps(Protocol):
    """What is read of a state in the fitted reading (`measuring.map_fitting`)."""

    @property
    def refits(self) -> bool:
        """Whether the coda is fitted too, to every state, h(K) included.

        Otherwise a map brings h(t) to h(K), which is left as it is.
        """

    def losses(self, tokens: Tensor, h: Tensor, t: int, samples: slice) -> Sequence[Tensor]:
        """Give the loss of each sample when a coda reads h(t) by what was fitted on others.

        Args:
            tokens: The tokens, (batch, pos).
            h: h(t) of these samples, (batch, pos, d_model).
            t: Which state it is.
            samples: Their numbers.

        Returns:
            Nats per token, one number per sample.
        """

    def brought(self, h: Tensor, t: int, samples: slice) -> tuple[Tensor, Sequence[bool]]:
        """Bring h(t) to where the coda expects h(K), by what was fitted on others.

        Args:
            h: h(t) of these samples, (batch, pos, d_model).
            t: Which state it is.
            samples: Their numbers.

        Returns:
            The state, and whether anything was fitted for each sample.
        """


@runtime_checkable
class Scoring(Protocol):
    """Gives the losses of a batch."""

    def of_model(self, trajectory: Trajectory, inputs: Any) -> Sequence[Tensor]:
        """Give the loss of each sample.

        Args:
            trajectory: The batch's trajectory.
            inputs: What the model was given.

        Returns:
            One number per sample.
        """

    def of_state(
        self, model: Hooked, trajectory: Trajectory, inputs: Any, h: Tensor
    ) -> Sequence[Tensor]:
        """Give the loss of each sample when the coda reads a state in place of h(K).

        Args:
            model: The model.
            trajectory: The batch's trajectory.
            inputs: What the model was given.
            h: The state, (batch, pos, d_model).

        Returns:
            One number per sample.
        """

    def of_fitted(
        self,
        model: Hooked,
        maps: StateMaps,
        trajectory: Trajectory,
        inputs: Any,
        t: int,
        samples: slice,
    ) -> Sequence[Tensor]:
        """Give the loss of each sample when the coda reads h(t) by what was fitted on others.

        Args:
            model: The model.
            maps: What was fitted.
            trajectory: The batch's trajectory.
            inputs: What the model was given.
            t: Which state it is.
            samples: The numbers that `maps` has of the batch's samples.

        Returns:
            One number per sample.
        """


class NextTokens:
    """Mean next-token cross-entropy, in nats per token."""

    def of_model(self, trajectory: Trajectory, inputs: Any) -> Sequence[Tensor]:
        """Give the loss of each sample.

        Args:
            trajectory: The batch's trajectory.
            inputs: What the model was given.

        Returns:
            One number per sample.
        """
        logits, tokens = trajectory.logits, trajectory.tokens
        assert logits is not None and tokens is not None
        return losses(logits, tokens)

    def of_state(
        self, model: Hooked, trajectory: Trajectory, inputs: Any, h: Tensor
    ) -> Sequence[Tensor]:
        """Give the loss of each sample when the coda reads a state in place of h(K).

        Args:
            model: The model.
            trajectory: The batch's trajectory.
            inputs: What the model was given.
            h: The state, (batch, pos, d_model).

        Returns:
            One number per sample.
        """
        tokens = trajectory.tokens
        assert tokens is not None
        return read_out_losses(model, tokens, h)

    def of_fitted(
        self,
        model: Hooked,
        maps: StateMaps,
        trajectory: Trajectory,
        inputs: Any,
        t: int,
        samples: slice,
    ) -> Sequence[Tensor]:
        """Give the loss of each sample when the coda reads h(t) by what was fitted on others.

        Args:
            model: The model.
            maps: What was fitted.
            trajectory: The batch's trajectory.
            inputs: What the model was given.
            t: Which state it is.
            samples: The numbers that `maps` has of the batch's samples.

        Returns:
            One number per sample.
        """
        tokens = trajectory.tokens
        assert tokens is not None
        return maps.losses(tokens, trajectory.h[t], t, samples)


@dataclass(frozen=True)
class OwnLoss:
    """The loss that a user's function gives, in whatever unit.

    Attributes:
        function: The function.
    """

    function: LossFunction

    def of_model(self, trajectory: Trajectory, inputs: Any) -> Sequence[Tensor]:
        """Give the loss of each sample.

        Args:
            trajectory: The batch's trajectory.
            inputs: What the model was given.

        Returns:
            One number per sample.
        """
        return self.of_output(trajectory.output, inputs, len(trajectory.h_emb))

    @torch.no_grad()
    def of_output(self, output: Any, inputs: Any, count: int) -> list[Tensor]:
        """Give the loss of each sample from what a model returned.

        Args:
            output: What it returned.
            inputs: What it was given.
            count: Number of samples.

        Returns:
            One number per sample.

        Raises:
            InputError: for anything but one number per sample.
        """
        values = loss_values(self.function, output, inputs)
        if values.numel() != count or (values.ndim and len(values) != count):
            raise InputError(
                f"loss={name_of(self.function)} gave {tuple(values.shape)} numbers for {count} "
                "samples; return one number for each sample, (batch,), or one for a batch of one."
            )
        return list(values.reshape(-1))

    @torch.no_grad()
    def of_state(
        self, model: Hooked, trajectory: Trajectory, inputs: Any, h: Tensor
    ) -> Sequence[Tensor]:
        """Give the loss of each sample when the coda reads a state in place of h(K).

        Args:
            model: The model.
            trajectory: The batch's trajectory.
            inputs: What the model was given.
            h: The state, (batch, pos, d_model).

        Returns:
            One number per sample.
        """
        return self.of_output(output_of_state(model, inputs, h), inputs, len(h))

    def of_fitted(
        self,
        model: Hooked,
        maps: StateMaps,
        trajectory: Trajectory,
        inputs: Any,
        t: int,
        samples: slice,
    ) -> Sequence[Tensor]:
        """Give the loss of each sample when the coda reads h(t) by what was fitted on others.

        Args:
            model: The model.
            maps: What was fitted.
            trajectory: The batch's trajectory.
            inputs: What the model was given.
            t: Which state it is.
            samples: The numbers that `maps` has of the batch's samples.

        Returns:
            One number per sample.
        """
        brought, fitted = maps.brought(trajectory.h[t], t, samples)
        values = self.of_state(model, trajectory, inputs, brought)
        pairs = zip(values, fitted, strict=True)
        return [value if sound else torch.full_like(value, torch.nan) for value, sound in pairs]


def output_of_state(model: Hooked, inputs: Any, h: Tensor) -> Any:
    """Give what a model returns if h(K) were another state; it runs whole.

    Args:
        model: A model with a loop.
        inputs: What it takes.
        h: The state, (batch, pos, d_model).

    Returns:
        Its output, in its own form.
    """
    return model.run_with_hooks(
        inputs,
        fwd_hooks=[(model.coda_hook, lambda state, hook: h.to(state))],
        return_type=model.output_type,
    )


def loss_values(function: LossFunction, output: Any, inputs: Any) -> Tensor:
    """Call a user's loss.

    Args:
        function: The function.
        output: What the model returned.
        inputs: What it was given.

    Returns:
        Its numbers as a float64 tensor.

    Raises:
        InputError: where it fails, or gives no numbers.
    """
    try:
        value = function(output, inputs)
    except InputError:
        raise
    except Exception as error:  # somebody else's code
        raise InputError(
            f"loss={name_of(function)} fails ({type(error).__name__}: {error}); it is called with "
            "what the model returns and the batch that it was given, and returns one number for "
            "each sample."
        ) from error
    try:
        values = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
        if values.is_complex():
            raise TypeError("complex numbers")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"loss={name_of(function)} gave {type(value).__name__} ({error}); return a tensor with "
            "one number for each sample."
        ) from error
    return values.cpu().to(torch.float64)


def name_of(function: LossFunction) -> str:
    """Call a function in text.

    Args:
        function: Anything that can be called.

    Returns:
        Its name, or its class.
    """
    return str(getattr(function, "__name__", type(function).__name__))


__all__ = [
    "LossFunction", "NextTokens", "OwnLoss", "Scoring", "loss_values", "name_of",
    "output_of_state",
]  # fmt: skip

"""Running: one forward pass of the original, with functions at some of its tensors."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from warnings import warn

import torch.nn.functional as F
from torch import Tensor, nn

from loopscope.errors import InputError
from loopscope.models.hooks import Point
from loopscope.models.loops import LoopMap, Port, Step, example_shape
from loopscope.models.wrapped.addresses import PATTERN
from loopscope.models.wrapped.inputs import Arguments, Inputs
from loopscope.models.wrapped.loop_count import Setting, as_arguments
from loopscope.models.wrapped.run_context import (
    controlled,
    eager_attention,
    not_nested,
    only_read,
    uncompiled,
    without_checkpointing,
)
from loopscope.models.wrapped.shape import WrappedConfig
from loopscope.models.wrapped.taps import Schedule, Tap, get, tapped

NO_LOGITS = "the model returns no logits for each token on this input"
SEES_AHEAD = "the model looks at later tokens, so it predicts no next token"


class Running:
    """How a wrapped model runs its original."""

    module: nn.Module
    map: LoopMap
    config: WrappedConfig
    inputs: Inputs
    name: str | None
    seed: int | None
    settings: tuple[Setting, ...]
    logits_at: tuple[Step, ...] | None
    plan: Schedule
    ports: dict[str, Port]
    _live: dict[str, Point]
    _originals: dict[str, nn.Module]
    _as_tokens: Callable[..., Tensor]

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Arguments of the original's forward for those of a call.

        Args:
            args: A call's positional arguments; text and lists of ids are read as tokens.
            kwargs: Its keyword arguments.

        Returns:
            Positional and keyword arguments.
        """
        single = len(args) == 1 and not isinstance(args[0], Mapping | tuple)
        if single and (self.inputs.tokens is not None or not isinstance(args[0], Tensor)):
            args = (self._read_tokens(args[0]),)
        return self.inputs.complete(args, kwargs, as_arguments(self.settings))

    def _read_tokens(self, tokens: Any) -> Tensor:
        try:
            return self._as_tokens(tokens)
        except InputError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{type(tokens).__name__} cannot be read as token ids ({error}); give integers "
                "(batch, pos), text, or the arguments of forward as a tuple or dict."
            ) from error

    def run(
        self, arguments: Arguments, taps: list[Tap], *, eager: bool = False
    ) -> tuple[Any, list[int]]:
        """One forward pass of the original with functions at some of its tensors.

        Args:
            arguments: Its arguments, from `prepare`.
            taps: Tensors and what to do with them.
            eager: Compute attention step by step, so that its pattern exists.

        Returns:
            What the original returns, and the numbers of the taps that were not reached.

        Raises:
            InputError: for more or fewer iterations than on the example, or a run within a hook.
        """
        args, kwargs = arguments
        with self._controlled(arguments), eager_attention(self.module, patterns=eager):
            if not taps:
                return self._call(args, kwargs), []
            with (
                uncompiled(),
                without_checkpointing(self.module),
                tapped(self._originals, taps, self.plan) as missed,
            ):
                output = self._call(args, kwargs)
            return output, missed

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original's forward; where it fails for want of what the example had, it says so."""
        why = self._why_it_may_fail(args, kwargs)
        if not why:
            return self.module(*args, **kwargs)
        try:
            return self.module(*args, **kwargs)
        except Exception as error:
            if isinstance(error, InputError) or _is_in_a_hook(error):
                raise
            raise InputError(
                f"{self.name!r} fails on this input ({type(error).__name__}: {error}). {why}"
            ) from error

    def _why_it_may_fail(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """What is wrong with some arguments by what is known of the model; empty where nothing."""
        if missing := self.inputs.missing(args, kwargs):
            return (
                f"The example had {', '.join(missing)} too: what belongs to the example's tokens "
                "is not passed on, so give all arguments as a dict."
            )
        longest, tokens = self.config.n_ctx, self.inputs.tokens_at_place(args, kwargs)
        if longest is None or tokens is None or tokens.shape[1] <= longest:
            return ""
        return f"It takes {longest} tokens, given {tokens.shape[1]}."

    def _run_live(self, arguments: Arguments, more: Mapping[Any, Tap]) -> tuple[Any, set[Any]]:
        """A forward pass with the hooks that it has, then further taps; what was not reached."""
        used = {name: point for name, point in self._live.items() if _used(point)}
        taps: list[Tap] = [
            (self.ports[name], only_read(point) if name.endswith(PATTERN) else point)
            for name, point in used.items()
        ]
        eager = any(name.endswith(PATTERN) for name in used)
        output, missed = self.run(arguments, [*taps, *more.values()], eager=eager)
        names = [*used, *more]
        if unseen := [names[n] for n in missed if n < len(used)]:
            rest = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
            warn(
                f"{self.name!r} did not call what {', '.join(unseen[:3])}{rest} belong to in that "
                "iteration on this input, so their hooks saw nothing.",
                stacklevel=4,
            )
        return output, {names[n] for n in missed}

    @contextmanager
    def _controlled(self, arguments: Arguments) -> Iterator[None]:
        """Number of iterations, random numbers, key-value cache and compilation as they must be."""
        seed: int | None = None
        shape: tuple[int | None, int | None] = (None, None)
        if self.map.random or self.module.training:
            seed = self.seed
            shape = example_shape(*arguments) if self.map.random else shape
        with (
            not_nested(self.module, str(self.name)),
            controlled(self.module, self.inputs, self.settings, seed, *shape),
        ):
            yield

    def logits_in(self, output: Any) -> Any:
        """The logits in what the original returned.

        Args:
            output: What it returned.

        Returns:
            The logits, (batch, pos, d_vocab); all of the output where there are none.
        """
        return output if self.logits_at is None else get(output, self.logits_at)

    def _loss(self, logits: Any, args: tuple, kwargs: dict) -> Tensor:
        if self.map.causal is None or not isinstance(logits, Tensor):
            raise InputError(f"there is no loss: {self.map.why_no_logits or NO_LOGITS}.")
        if not self.map.causal:
            raise InputError(f"there is no loss: {SEES_AHEAD}.")
        tokens = self.inputs.tokens_in(args, kwargs)
        if tokens.shape[1] < 2:
            raise InputError(f"a loss needs at least 2 tokens, given {tokens.shape[1]}.")
        targets = tokens[:, 1:].flatten().to(logits.device)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets)

    def read(
        self, arguments: Arguments, ports: Mapping[Any, Port]
    ) -> tuple[Any, dict[Any, Tensor]]:
        """One forward pass that keeps some tensors; permanent hooks run before.

        Args:
            arguments: Arguments, from `prepare`.
            ports: What to keep, under any keys.

        Returns:
            What the original returned, and the tensors by key; what this input does not reach is
            missing.
        """
        kept: dict[Any, Tensor] = {}

        def keep(key: Any) -> Callable[[Tensor], None]:
            if self.map.mutates:
                return lambda tensor: kept.__setitem__(key, tensor.detach().clone())
            return lambda tensor: kept.__setitem__(key, tensor.detach())

        output, _ = self._run_live(
            arguments, {key: (port, keep(key)) for key, port in ports.items()}
        )
        return output, kept


def _is_in_a_hook(error: BaseException) -> bool:
    """Whether an error was raised by a function that a user hooked in."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == tapped.__module__ for frame, _ in frames)


def _used(point: Point) -> bool:
    return bool(point.fwd_hooks or point.bwd_hooks)

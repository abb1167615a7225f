"""Running: one forward pass of the original, with functions at some of its tensors."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from warnings import warn

import torch.nn.functional as F
from torch import Tensor, nn

from loopscope.errors import InputError
from loopscope.models.hooks import Point
from loopscope.models.loops import LoopMap, Port, Step, example_shape
from loopscope.models.wrapped.addresses import PATTERN, Addresses
from loopscope.models.wrapped.direct_calls import same_shape, used
from loopscope.models.wrapped.inputs import Arguments, Inputs
from loopscope.models.wrapped.loop_count import Setting, as_arguments
from loopscope.models.wrapped.memory_slots import (
    Key,
    check_ports,
    look_at_slots,
    look_at_weights,
    made_states,
    mesh_slots,
    slot_ports,
)
from loopscope.models.wrapped.run_context import (
    controlled,
    eager_attention,
    not_nested,
    only_read,
    uncompiled,
    without_checkpointing,
)
from loopscope.models.wrapped.shape import WrappedConfig
from loopscope.models.wrapped.state_hooks import StateHooks
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
    names: Addresses
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
        self,
        arguments: Arguments,
        taps: list[Tap],
        *,
        eager: bool = False,
        during: AbstractContextManager[Any] | None = None,
    ) -> tuple[Any, list[int]]:
        """One forward pass of the original with functions at some of its tensors.

        Args:
            arguments: Its arguments, from `prepare`.
            taps: Tensors and what to do with them.
            eager: Compute attention step by step, so that its pattern exists.
            during: A further context of the forward pass.

        Returns:
            What the original returns, and the numbers of the taps that were not reached.

        Raises:
            InputError: for more or fewer iterations than on the example, or a run within a hook.
        """
        with self._controlled(arguments):
            return self._run_tapped(self.module, arguments, taps, eager=eager, during=during)

    def _run_tapped(
        self,
        call: Callable[..., Any],
        arguments: Arguments,
        taps: list[Tap],
        *,
        eager: bool,
        during: AbstractContextManager[Any] | None = None,
    ) -> tuple[Any, list[int]]:
        """What the original, or its forward, returns with functions at some of its tensors."""
        args, kwargs = arguments
        with eager_attention(self.module, patterns=eager):
            if not taps:
                return self._call(call, args, kwargs), []
            with (
                uncompiled(),
                without_checkpointing(self.module),
                tapped(self._originals, taps, self.plan) as missed,
                during or nullcontext(),
            ):
                output = self._call(call, args, kwargs)
            return output, missed

    def _call(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original's forward; where it fails for want of what the example had, it says so."""
        why = self._why_it_may_fail(args, kwargs)
        if not why:
            return call(*args, **kwargs)
        try:
            return call(*args, **kwargs)
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

    def _run_live(
        self,
        arguments: Arguments,
        more: Mapping[Any, Tap],
        kept: dict[Key, Tensor] | None = None,
        *,
        step: bool = False,
        run: Callable[..., tuple[Any, list[int]]] | None = None,
    ) -> tuple[Any, set[Any]]:
        """A forward pass with the hooks that it has, then further taps.

        Args:
            arguments: Arguments of the original's forward.
            more: Further taps by any keys.
            kept: Takes the states of a MeSH port as they were before hooks, if there are hooks.
            step: Whether it may be a step of a generation, where hooks must keep a tensor's shape.
            run: What makes the pass, if not `run`.

        Returns:
            What the original returned, and the names and keys that it did not reach.
        """
        points = {name: point for name, point in self._live.items() if used(point)}
        states = StateHooks(
            {name: self.names.states[name] for name in points if name in self.names.states}, points
        )
        slots = {name: t for name, t in self.names.slots.items() if name in points}
        checked = self.map.mesh_cycle and bool(points) and (bool(slots) or kept is not None)
        kept = {} if kept is None else kept
        first = self._keeping(kept, check_ports(self.map)) if checked else {}
        behind = self._keeping(kept, slot_ports(self.map)) if slots else {}
        taps = {
            name: self._tap(name, point, step=step)
            for name, point in points.items()
            if name in self.ports
        }
        every: list[Tap] = [*states.first(), *first.values()]
        offset = len(every)
        every += [*taps.values(), *more.values(), *behind.values(), *states.last()]
        eager = any(name.endswith(PATTERN) for name in points)
        output, missed = (run or self.run)(
            arguments, every, eager=eager, during=states if states.states else None
        )
        if checked:
            kept |= made_states(self.map, states.before)
        if slots:
            self._show_slots(slots, kept, complete=kept.keys() >= {*first, *behind})
        names = [*taps, *more]
        unreached = {names[n - offset] for n in missed if offset <= n < offset + len(names)}
        unseen = [name for name in taps if name in unreached]
        unseen += [name for n, name in enumerate(states.states) if n in missed]
        if unseen:
            rest = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
            warn(
                f"{self.name!r} did not call what {', '.join(unseen[:3])}{rest} belong to in that "
                "iteration on this input, so their hooks saw nothing.",
                stacklevel=4,
            )
        return output, unreached

    def _tap(self, name: str, point: Point, *, step: bool) -> Tap:
        """What shows the tensor of an address to its hooks."""
        if name.endswith(PATTERN):
            return self.ports[name], only_read(point)
        if name in self.names.weights:
            router, verified = self.names.weights[name], self.map.mesh_cycle
            return self.ports[name], look_at_weights(point, router, verified=verified)
        return self.ports[name], same_shape(point) if step else point

    def _keeping(self, kept: dict[Key, Tensor], ports: Mapping[Key, Port]) -> dict[Key, Tap]:
        """Taps that keep tensors, gradients and all."""

        def keep(key: Key) -> Callable[[Tensor], None]:
            copied = self.map.mutates
            return lambda x: kept.__setitem__(key, x.clone() if copied else x)

        return {key: (port, keep(key)) for key, port in ports.items()}

    def _show_slots(
        self, slots: Mapping[str, int], kept: Mapping[Key, Tensor], *, complete: bool
    ) -> None:
        """Show memory slots to their hooks, once the model has run."""
        memories = mesh_slots(self.map, kept) if complete else None
        if memories is None:
            warn(
                f"{', '.join(slots)}: there are no memory slots on this input, so their hooks saw "
                "nothing.",
                stacklevel=5,
            )
            return
        for name, t in slots.items():
            look_at_slots(self._live[name], memories[t + 1])

    @contextmanager
    def _controlled(self, arguments: Arguments) -> Iterator[None]:
        """Number of iterations, random numbers, key-value cache and compilation as they must be."""
        with (
            not_nested(self.module, str(self.name)),
            controlled(self.module, self.inputs, self.settings, *self._seeding(arguments)),
        ):
            yield

    def _seeding(self, arguments: Arguments) -> tuple[int | None, int | None, int | None]:
        """The seed of a forward pass, None where it draws nothing, and the shape of its tokens."""
        if not (self.map.random or self.module.training):
            return None, None, None
        return self.seed, *(example_shape(*arguments) if self.map.random else (None, None))

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
            arguments, {key: (port, keep(key)) for key, port in ports.items()}, kept
        )
        return output, kept


def _is_in_a_hook(error: BaseException) -> bool:
    """Whether an error was raised by a function that a user hooked in."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == tapped.__module__ for frame, _ in frames)

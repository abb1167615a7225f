"""Hooks at a state for all that reads it: the tensor is replaced where the model makes it."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from loopscope.errors import InputError
from loopscope.models.hooks import Point
from loopscope.models.loops import Port, Producer, made_by
from loopscope.models.wrapped.memory_slots import changed
from loopscope.models.wrapped.taps import Signal, Tap

_Awaited = dict[int, list[tuple[str, int | None]]]
"""Which torch function after an event → name of the state, and which result it is."""


class StateHooks(TorchFunctionMode):
    """Shows states to hooks where they are made, in one forward pass.

    A state made by a module's call is replaced in what that call gives. One that the model's own
    code makes between two calls (a sum, what is read of a memory) is the result of a torch
    function: those are counted from the last beginning or end of a call before it, as on the
    example. What enters the core must then be that tensor.

    Args:
        states: Name → where the state enters, and what makes it.
        points: Name → its hooks.

    Attributes:
        before: Name → the state as the model made it.
    """

    def __init__(
        self, states: Mapping[str, tuple[Port, Producer]], points: Mapping[str, Point]
    ) -> None:
        super().__init__()
        self.states, self.points = states, points
        self.made: dict[Producer, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self.awaited: _Awaited = {}
        self.count = 0

    def first(self) -> list[Tap]:
        """Taps that come before all others: is what enters the core what the hooks gave?"""
        return [(port, self._check(name)) for name, (port, _) in self.states.items()]

    def last(self) -> list[Tap]:
        """Taps that come after all others: modules that give a state, calls before functions."""
        taps: list[Tap] = []
        events: dict[Port, _Awaited] = {}
        for name, (_, producer) in self.states.items():
            if producer.function == 0:
                taps.append((producer.port, self._show(name)))
            else:
                awaited = events.setdefault(producer.port, {})
                awaited.setdefault(producer.function, []).append((name, producer.item))
        return taps + [(port, Signal(self._await(functions))) for port, functions in events.items()]

    def _show(self, name: str) -> Callable[[Tensor], Tensor]:
        def show(state: Tensor) -> Tensor:
            producer = self.states[name][1]  # that of an outer and an inner iteration, perhaps
            self.before[name] = state
            self.made[producer] = self.points[name](state)
            return self.made[producer]

        return show

    def _await(self, functions: _Awaited) -> Callable[[], None]:
        def start() -> None:
            self.awaited, self.count = dict(functions), 0

        return start

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.awaited or not made_by(result):
            return result
        self.count += 1
        for name, item in self.awaited.pop(self.count, ()):
            result = self._with(result, name, item)
        return result

    def _with(self, result: Any, name: str, item: int | None) -> Any:
        """A function's result with what the hooks made of the state in it."""
        tensors = dict(made_by(result))
        if item not in tensors:
            raise self._elsewhere(name)
        state = self._show(name)(tensors[item])
        if state is tensors[item]:
            return result
        if item is None:
            return state
        parts = [*result[:item], state, *result[item + 1 :]]
        return parts if isinstance(result, list) else tuple(parts)

    def _check(self, name: str) -> Callable[[Tensor], None]:
        def check(entering: Tensor) -> None:
            made = self.made.get(self.states[name][1])
            if made is None or changed(entering, made):
                raise self._elsewhere(name)

        return check

    def _elsewhere(self, name: str) -> InputError:
        plain = name.replace(".hook_state", ".hook_in")
        return InputError(
            f"{name}: on this input the model did not make this state where it did on the example, "
            f"or something changed it before it entered the core. Use {plain}, which is what the "
            "core is given, or wrap the model again with this input as example=."
        )

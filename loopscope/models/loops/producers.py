"""Producers: which module's call, or which torch function between calls, made a state."""

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from loopscope.models.loops.loop_map import Port, Producer, Step

_JOINS = {torch.cat, torch.concat, torch.concatenate}


def made_by(result: Any) -> list[tuple[int | None, Tensor]]:
    """The floating tensors that a torch function gave.

    Args:
        result: What it returned.

    Returns:
        Which of its results each is (None for a single one), and the tensor.
    """
    if isinstance(result, Tensor):
        return [(None, result)] if result.is_floating_point() else []
    if not isinstance(result, tuple | list):
        return []
    return [
        (i, part)
        for i, part in enumerate(result)
        if isinstance(part, Tensor) and part.is_floating_point()
    ]


@dataclass(eq=False)
class Made:
    """A tensor as it was when something made it.

    Attributes:
        tensor: The tensor, as long as the model keeps it.
        version: How often it had been changed in place.
        producer: What made it.
        inside: The calls that it was made in and that have not given it yet, outermost first.
        parts: Of tensors that were joined along the last axis: columns and what they were.
    """

    tensor: "weakref.ref[Tensor]"
    version: int
    producer: Producer
    inside: list[Any]
    parts: list[tuple[tuple[int, int], "Made | None"]] = field(default_factory=list)


class Makers:
    """Notes, while a forward pass is traced, what makes each tensor.

    Args:
        stack: The calls that have begun and not ended, kept by the tracer.
    """

    def __init__(self, stack: list[Any]) -> None:
        self.stack = stack
        self.known: dict[int, Made] = {}
        self.entering: dict[tuple[int, tuple[Step, ...]], Made] = {}
        self.event: Port | None = None
        self.count = 0

    def pause(self) -> None:
        """Note nothing until the call that begins or ends now is noted."""
        self.event = None

    def function(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note what a torch function gave.

        Args:
            func: The function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            result: What it returned.
        """
        if self.event is None or not (tensors := made_by(result)):
            return
        self.count += 1
        for item, tensor in tensors:
            if tensor.is_inference() or self.look_up(tensor) is not None:
                continue  # handed through, such as by a dropout that drops nothing
            producer = Producer(port=self.event, function=self.count, item=item)
            made = self._note(tensor, producer)
            if func in _JOINS:
                made.parts = self._parts(tensor, args, kwargs or {})

    def _note(self, tensor: Tensor, producer: Producer) -> Made:
        made = Made(weakref.ref(tensor), tensor._version, producer, list(self.stack))
        self.known[id(tensor)] = made
        return made

    def look_up(self, tensor: Tensor) -> Made | None:
        """What is known of a tensor, if nothing has changed it since.

        Args:
            tensor: The tensor.

        Returns:
            What made it; None where nobody saw.
        """
        made = self.known.get(id(tensor))
        if made is None or made.tensor() is not tensor or tensor.is_inference():
            return None
        return made if made.version == tensor._version else None

    def _parts(
        self, whole: Tensor, args: Any, kwargs: Any
    ) -> list[tuple[tuple[int, int], Made | None]]:
        parts = args[0] if args else kwargs.get("tensors")
        axis = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        if axis not in (-1, whole.ndim - 1) or not isinstance(parts, tuple | list):
            return []
        columns: list[tuple[tuple[int, int], Made | None]] = []
        start = 0
        for part in parts:
            end = start + part.shape[-1]
            made = self.look_up(part)
            columns.append(((start, end), made and replace(made)))
            start = end
        return columns

    def begin(self, call: Any) -> None:
        """Note what made a call's arguments; functions are counted anew from here.

        Args:
            call: The call.
        """
        for item in call.inputs:
            tensor = item.origin()
            made = None if tensor is None else self.look_up(tensor)
            if made is not None:  # as far as it came by now
                self.entering[call.index, item.where] = replace(made)
        self._restart(call, "in")

    def finish(self, call: Any) -> None:
        """Note which of a call's results were made in it; functions are counted anew from here.

        Args:
            call: The call.
        """
        for item in call.outputs:
            tensor = item.origin()
            if tensor is None or tensor.is_inference():
                continue
            where = Port(module=call.module, call=call.number, side="out", where=item.where)
            made = self.look_up(tensor)
            if made is None:  # by code that no torch function shows
                self._note(tensor, Producer(port=where))
            elif made.inside and made.inside[-1] is call:
                made.producer = Producer(port=where)
                made.inside.pop()
        self._restart(call, "out")

    def _restart(self, call: Any, side: Any) -> None:
        self.event = Port(module=call.module, call=call.number, side=side, where=())
        self.count = 0

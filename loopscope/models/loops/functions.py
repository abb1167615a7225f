"""Functions: the torch functions that a forward pass calls, and what they make of which tensors."""

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from loopscope.models.loops.producers import Makers

DEEPEST, MOST_WAYS = 8, 64
"""How many functions a tensor is followed back through, and how many ways at once."""

FORMS = frozenset({
    "detach", "to", "type", "type_as", "float", "half", "bfloat16", "double", "clone", "contiguous",
    "view", "reshape", "expand", "requires_grad_", "cpu", "cuda", "__get__",
})  # fmt: skip
"""Functions of one tensor that give the same values in another form."""

SUMS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "lerp", "cat", "stack"})
"""Functions that put several tensors together, be they states or constants."""

RECENT = 256
"""How many functions are remembered while a forward pass runs."""

Operand = tuple[tuple[str, int], ...]
"""The way from a tensor to one that it was made of: a function's name, which of its arguments, …"""


@dataclass(frozen=True, slots=True)
class Function:
    """One torch function that the model called.

    Attributes:
        tick: When: ticks are those of the module calls around it.
        name: Its name, such as `add`.
        arguments: Identities of its tensor arguments, in order.
        results: Identities of the tensors that it gave or changed.
    """

    tick: int
    name: str
    arguments: tuple[int, ...]
    results: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """A table in which rows were looked up.

    Attributes:
        name: Its name, where it is a parameter or a buffer of the model.
        rows, width: Its shape.
        ids: Shape of the numbers of the rows.
        tick: When.
    """

    name: str | None
    rows: int
    width: int
    ids: tuple[int, ...]
    tick: int


_VIEWS = (Tensor.T, Tensor.mT, Tensor.H, Tensor.mH, Tensor.data)
"""Attributes of a tensor that have its values."""


class FunctionLog(TorchFunctionMode):
    """Notes which matrices torch functions are given, what they make of which tensors, and when.

    Noted are look-ups in tables too. Every tensor noted is kept: no identity is given twice.
    """

    def __init__(self, names: dict[int, str], clock: list[int], makers: Makers) -> None:
        super().__init__()
        self.names, self.clock, self.makers = names, clock, makers
        self.seen: list[tuple[int, str]] = []
        self.lookups: list[Lookup] = []
        self.functions: list[Function] = []
        self.tensors: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, arguments, results, result = _called(func, args, kwargs or {})
        self.makers.function(func, args, kwargs, result)
        # .shape, .dtype, … use no values
        if name != "__get__" or any(getattr(func, "__self__", None) is view for view in _VIEWS):
            for part in arguments:
                if id(part) in self.names:
                    self.seen.append((self.clock[0], self.names[id(part)]))
        if name in ("embedding", "__getitem__", "index_select"):
            self._look(*args, *(kwargs or {}).values())
        if results:
            self.keep((*arguments, *results))
            self.functions.append(
                Function(
                    self.clock[0], name, tuple(map(id, arguments)),
                    tuple(dict.fromkeys(map(id, results))),
                )
            )  # fmt: skip
        return result

    def _look(self, *given: Any) -> None:
        """Note a look-up: a matrix and numbers of its rows."""
        tensors = [value for value in given if isinstance(value, Tensor)]
        ids = [t for t in tensors if not t.is_floating_point() and t.dtype != torch.bool]
        tables = [t for t in tensors if t.ndim == 2 and t is not ids[-1]] if ids else []
        if tables and ids[-1].ndim:
            name = self.names.get(id(tables[0]))
            rows, width = tables[0].shape
            self.lookups.append(
                Lookup(
                    name=name, rows=rows, width=width, ids=tuple(ids[-1].shape), tick=self.clock[0]
                )
            )  # fmt: skip

    def keep(self, tensors: Any) -> None:
        """Keep tensors under their identities.

        Args:
            tensors: The tensors.
        """
        self.tensors |= {id(tensor): tensor for tensor in tensors}


class RecentFunctions(TorchFunctionMode):
    """Notes the last torch functions of a forward pass with the tensors themselves.

    Args:
        reads: How often an operand will be asked for; after that nothing is noted or kept.
    """

    def __init__(self, reads: int) -> None:
        super().__init__()
        self.left = reads
        self.entries: deque[tuple[str, list[Tensor], list[Tensor]]] = deque(maxlen=RECENT)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.left == 0:
            return func(*args, **(kwargs or {}))
        name, arguments, results, result = _called(func, args, kwargs or {})
        if results:
            self.entries.append((name, arguments, results))
        return result

    def done(self) -> None:
        """Take note that an operand was read."""
        self.left -= 1
        if self.left == 0:
            self.entries.clear()

    def operand(self, tensor: Tensor, way: Operand) -> Tensor | None:
        """What a tensor was made of, by a way that `Making.way` gave.

        Args:
            tensor: A tensor of which the last functions are noted.
            way: The way.

        Returns:
            The tensor at its end; None where it was made otherwise.
        """
        latest = len(self.entries)
        for step, place in way:
            name, arguments = "", [tensor]
            while name == "" or (name != step and len(arguments) == 1 and name in FORMS):
                tensor, latest = arguments[0], latest - 1
                while latest >= 0 and not any(x is tensor for x in self.entries[latest][2]):
                    latest -= 1
                if latest < 0:
                    return None
                name, arguments, _ = self.entries[latest]
            if name != step or place >= len(arguments):
                return None
            tensor = arguments[place]
        return tensor


def _called(
    func: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[str, list[Tensor], list[Tensor], Any]:
    """Call a torch function: its name, its tensors, those that it gave or changed, its result."""
    name = getattr(func, "__name__", "")
    arguments = list(tensors_in((*args, *kwargs.values())))
    result = func(*args, **kwargs)
    results = list(tensors_in((result, kwargs.get("out"))))
    if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        changed = [*tensors_in(args[:1])]
        results += [*changed, *(x._base for x in changed if x._base is not None)]
    return name, arguments, results, result


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among a torch function's arguments or results, lists of them opened.

    Args:
        values: The arguments or results.

    Yields:
        The tensors, in order.
    """
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


class Making:
    """How tensors were made: each by the last function that gave or changed it.

    Args:
        functions: Torch functions, in order.
    """

    def __init__(self, functions: Sequence[Function]) -> None:
        self.functions = functions
        self.makers: dict[int, list[int]] = defaultdict(list)
        for number, function in enumerate(functions):
            for key in function.results:
                self.makers[key].append(number)

    def maker(self, key: int, before: int) -> int | None:
        """The function that made a tensor as it was at some time.

        Args:
            key: The tensor's identity.
            before: Number of the first function that came too late.

        Returns:
            The function's number; None where the tensor was there before.
        """
        return next((n for n in reversed(self.makers.get(key, ())) if n < before), None)

    def way(self, key: int, before: int, target: Any, ends: Any = ()) -> Operand | None:
        """How a tensor was made of another: the shortest way, other forms of one tensor aside.

        Args:
            key: The tensor's identity.
            before: Number of the first function that came after it was used.
            target: Identities of what is sought.
            ends: Identities of tensors that are not looked behind.

        Returns:
            The way; empty where the tensor is what is sought, None where no way leads there.
        """
        reached: list[tuple[Operand, int, int]] = [((), key, before)]
        for _ in range(DEEPEST):
            further: list[tuple[Operand, int, int]] = []
            for way, place, latest in reached:
                if place in target:
                    return way
                number = None if place in ends else self.maker(place, latest)
                if number is None:
                    continue
                name, arguments = self.functions[number].name, self.functions[number].arguments
                further += [
                    (way if self.is_form(number) else (*way, (name, i)), argument, number)
                    for i, argument in enumerate(arguments)
                ]
            reached = further[:MOST_WAYS]
        return None

    def unmixed(self, key: int, before: int) -> set[int]:
        """What a tensor is another form of (detached, cast, viewed), itself among it.

        Args:
            key: The tensor's identity.
            before: Number of the first function that came too late.

        Returns:
            Identities.
        """
        forms = {key}
        number = self.maker(key, before)
        while number is not None and self.is_form(number):
            [key], before = self.functions[number].arguments, number
            forms.add(key)
            number = self.maker(key, before)
        return forms

    def is_form(self, number: int) -> bool:
        """Whether a function gives the values that it is given, in another form.

        Args:
            number: The function's number.

        Returns:
            True where it does.
        """
        function = self.functions[number]
        return len(function.arguments) == 1 and function.name in FORMS

    def source(
        self, key: int, before: int, ends: Any, constant: Callable[[int], bool]
    ) -> int | None:
        """What a tensor was made of alone, constants aside: a norm's, a factor's argument.

        Args:
            key: The tensor's identity.
            before: Number of the first function that came after it was used.
            ends: Identities of what is sought.
            constant: Tells of an identity whether it is a constant.

        Returns:
            Identity of the one among the ends; None where it was made of several tensors, or of
            none of the ends.
        """
        return self._source(key, before, ends, constant, {}, 2 * DEEPEST)

    def _source(
        self,
        key: int,
        before: int,
        ends: Any,
        constant: Callable[[int], bool],
        known: dict[tuple[int, int], int | None],
        depth: int,
    ) -> int | None:
        if key in ends:
            return key
        number = self.maker(key, before)
        if number is None or depth == 0:
            return None
        if (key, number) not in known:
            function = self.functions[number]
            others = {x for x in function.arguments if not constant(x)}
            sources: set[int | None] = {None}
            if not (function.name in SUMS and len(function.arguments) > 1):
                sources = {
                    self._source(x, number, ends, constant, known, depth - 1) for x in others
                }
            known[key, number] = sources.pop() if len(sources) == 1 else None
        return known[key, number]

    def follow(self, key: int, before: int, way: Operand, ends: Any = ()) -> int | None:
        """What a tensor was made of, by a way that another was made.

        Args:
            key: The tensor's identity.
            before: Number of the first function that came after it was used.
            way: The way.
            ends: Identities of tensors that are not looked behind.

        Returns:
            Identity of what stands at its end; None where it was made otherwise.
        """
        for name, place in way:
            number = self.maker(key, before)
            while number is not None and key not in ends and self.is_form(number):
                [key], before = self.functions[number].arguments, number
                number = self.maker(key, before)
            if number is None or key in ends or self.functions[number].name != name:
                return None
            if place >= len(self.functions[number].arguments):
                return None
            key, before = self.functions[number].arguments[place], number
        return key

    def count_before(self, tick: int) -> int:
        """How many functions came before a tick of the trace.

        Args:
            tick: The tick.

        Returns:
            The number of the first function that came later.
        """
        return bisect_left(self.functions, tick, key=lambda f: f.tick)

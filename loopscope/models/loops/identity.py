"""Identity: which modules are the same thing, and what they weigh."""

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import nn

from loopscope.models.loops.matrices import is_packed, weights_in
from loopscope.models.loops.tracing import Call, CallTensor

TIED = 0.5
"""Modules of one class that share at least this part of their matrices count as the same."""


@dataclass(frozen=True)
class Identity:
    """What is known of a model's modules before any loop is sought.

    Attributes:
        modules: Canonical name to module.
        symbol: Canonical name to the name of the first module that shares its parameters (its own
            where none does).
        weight: Elements of the matrices in a module, embeddings aside.
    """

    modules: dict[str, nn.Module]
    symbol: dict[str, str]
    weight: dict[str, int]

    @classmethod
    def of(cls, modules: dict[str, nn.Module]) -> "Identity":
        """Look at every module once.

        Args:
            modules: Canonical name to module, as `named_modules` gives them.

        Returns:
            The identity.
        """
        parts = {id(module): _matrices(module) for module in modules.values()}
        held = {
            name: {key: n for part in module.modules() for key, n in parts[id(part)].items()}
            for name, module in modules.items()
        }
        weight = {name: sum(sizes.values()) for name, sizes in held.items()}
        return cls(modules, _tied(modules, held, weight), weight)

    def is_leaf(self, name: str) -> bool:
        """Whether a module has no modules in it.

        Args:
            name: The module's canonical name.

        Returns:
            True where it has none.
        """
        module = self.modules[name]
        return next(module.children(), None) is None or is_packed(module)

    def has_parameters(self, name: str) -> bool:
        """Whether a module holds any parameter, or a matrix that is none (quantised).

        Args:
            name: The module's canonical name.

        Returns:
            True where it does, itself or in its parts.
        """
        return self.weight[name] > 0 or next(self.modules[name].parameters(), None) is not None

    def is_embedding(self, name: str) -> bool:
        """Whether a module is a lookup table.

        Args:
            name: The module's canonical name.

        Returns:
            True where it is an embedding or an embedding bag.
        """
        return isinstance(self.modules[name], nn.Embedding | nn.EmbeddingBag)

    def pattern(self, name: str) -> tuple[str, type]:
        """What members of one list have in common: the name without numbers, and the class.

        Args:
            name: The module's canonical name.

        Returns:
            The name of the first module with its parameters, `*` for each number, and the class.
        """
        parts = ("*" if part.isdigit() else part for part in self.symbol[name].split("."))
        return ".".join(parts).rstrip("0123456789"), type(self.modules[name])


def _matrices(part: nn.Module) -> dict[Hashable, int]:
    """Matrices that a module itself holds, embeddings aside: key to number of elements."""
    if isinstance(part, nn.Embedding | nn.EmbeddingBag):
        return {}
    return {weight.key: weight.size for weight in weights_in(part)}


def _tied(
    modules: dict[str, nn.Module], held: dict[str, dict[Hashable, int]], weight: dict[str, int]
) -> dict[str, str]:
    """For each module the first one that shares most of its matrices and does not contain it."""
    holders: dict[Hashable, list[str]] = defaultdict(list)
    for name, sizes in held.items():
        for key in sizes:
            holders[key].append(name)
    inside = {name: {id(part) for part in modules[name].modules()} for name in modules}
    first = {name: name for name in modules}
    seen: set[tuple[str, str]] = set()
    for names in holders.values():
        by_class: dict[type, list[str]] = defaultdict(list)
        for name in names:
            by_class[type(modules[name])].append(name)
        for alike in by_class.values():
            for a, b in combinations(alike, 2):
                if (a, b) in seen:
                    continue
                seen.add((a, b))
                if id(modules[a]) in inside[b] or id(modules[b]) in inside[a]:
                    continue
                common = sum(held[a][key] for key in held[a].keys() & held[b].keys())
                if common >= TIED * max(weight[a], weight[b]):
                    first[b] = min(first[b], first[a], key=list(modules).index)
    return first


class Streams:
    """Which tensors of a call are the stream: floating, (batch, pos, width).

    Args:
        batch: Size of the example's batch axis; None fits any.
        pos: Number of its positions; None fits any.
    """

    def __init__(self, batch: int | None, pos: int | None) -> None:
        self.batch, self.pos = batch, pos

    def is_stream(self, item: CallTensor) -> bool:
        """Whether a tensor is (batch, pos, width) of the example.

        Args:
            item: The tensor.

        Returns:
            True where it is; a width of one does not count.
        """
        shape = item.tensor.shape
        if len(shape) != 3 or shape[-1] < 2:
            return False
        return self.batch in (None, shape[0]) and self.pos in (None, shape[1])

    def is_part(self, item: CallTensor) -> bool:
        """Whether a tensor is (batch, some positions, width): a stream, or some of its tokens.

        Args:
            item: The tensor.

        Returns:
            True where it is.
        """
        return item.tensor.ndim == 3 and self.batch in (None, item.tensor.shape[0])

    def entering(self, call: Call) -> list[CallTensor]:
        """The streams among a call's arguments, in order; masks and rotary tables are smaller.

        Args:
            call: The call.

        Returns:
            The streams; empty where it is given none.
        """
        return [item for item in call.inputs if self.is_stream(item)]

    def leaving(self, call: Call) -> CallTensor | None:
        """The stream that a call returns: by name where it has names, else the first.

        Args:
            call: The call.

        Returns:
            The stream; None where it returns none.
        """
        streams = [item for item in call.outputs if self.is_stream(item)]
        for name in ("last_hidden_state", "hidden_states", "logits"):
            for stream in streams:
                if stream.where and stream.where[-1] == name:
                    return stream
        return streams[0] if streams else None


def example_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, int | None]:
    """(batch, pos) of the first integer tensor given, else of the first floating one.

    Args:
        args: Positional arguments of a model's forward.
        kwargs: Keyword arguments.

    Returns:
        The two sizes; (None, None) where no tensor has two axes.
    """
    values = [*args, *kwargs.values()]
    tensors = [v for v in values if hasattr(v, "is_floating_point") and v.ndim >= 2]
    tensors.sort(key=lambda v: v.is_floating_point())
    if not tensors:
        return None, None
    return int(tensors[0].shape[0]), int(tensors[0].shape[1])

"""Samples that are no windows of tokens: items, each what forward takes for one sample."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from loopscope.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Items:
    """Samples of any kind, without a batch axis: tensors, or tuples, dicts and dataclasses of them.

    Attributes:
        items: One of each sample.
        source: Where they came from.
        sha256: Hash of their values: equal only for equal items.
        options: How many were asked for, where not all are taken.
        documents: The document of each; empty where nothing tells.
    """

    items: Sequence[Any]
    source: str
    sha256: str
    options: dict[str, Any] = field(default_factory=dict)
    documents: tuple[str | None, ...] = ()

    tokens = None

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"Items: {len(self)} samples from {self.source}"

    @property
    def provenance(self) -> dict[str, Any]:
        """What to record beside every table measured on these samples."""
        facts = {"source": self.source, "sha256": self.sha256, "samples": len(self)}
        return {**facts, **self.options}

    @cached_property
    def keys(self) -> list[bytes]:
        """Something of each item that is equal for equal ones."""
        return [_digest(item) for item in self.items]

    @cached_property
    def kinds(self) -> list[Any]:
        """The form, types and shapes of each item: what is alike can be stacked."""
        return [_kind(item) for item in self.items]

    def batch(self, numbers: range) -> Any:
        """Stack some of the items.

        Args:
            numbers: Which; of one form and shape.

        Returns:
            The same form, each tensor with a batch axis in front (`default_collate`).
        """
        return stacked([self.items[i] for i in numbers])

    def chosen(self, numbers: Sequence[int]) -> "Items":
        """Give some of the items.

        Args:
            numbers: Which.

        Returns:
            Their own set.
        """
        documents = tuple(self.documents[i] for i in numbers) if self.documents else ()
        return replace(self, items=[self.items[i] for i in numbers], documents=documents)


def are_items(samples: Any) -> bool:
    """Tell whether samples are items, one by one, rather than windows of tokens.

    Args:
        samples: What the user gave.

    Returns:
        Whether it is `Items`, a list or tuple, or a data set with a length.
    """
    if isinstance(samples, Items | list | tuple):
        return True
    other = isinstance(samples, Tensor | np.ndarray | str | bytes | Mapping)
    listed = hasattr(samples, "__getitem__") and hasattr(samples, "__len__")
    return listed and not other and not hasattr(samples, "tokens")


def read_items(samples: Any, most: int | None = None) -> Items:
    """Take the items of a list or data set.

    Args:
        samples: A list or tuple of items, or a data set with a length.
        most: The most to take, the first ones; None for all.

    Returns:
        The items, with the `documents` that the samples may have.

    Raises:
        InputError: for no items, items without a tensor, or another number of documents.
    """
    if isinstance(samples, Items):
        return samples if most is None or most >= len(samples) else _first(samples, most)
    items = [samples[i] for i in range(len(samples))]
    if not items:
        raise InputError("there are zero samples; give at least one.")
    for number, item in enumerate(items):
        if not any(isinstance(leaf, Tensor | np.ndarray) for leaf in leaves(item)):
            raise InputError(
                f"sample {number} has no tensor in it ({type(item).__name__}). Items are what the "
                "model's forward takes for one sample: a tensor without the batch axis, or a "
                "tuple or dict of such. Windows of tokens are one integer tensor (samples × "
                "tokens)."
            )
    documents = tuple(getattr(samples, "documents", None) or ())
    if documents and len(documents) != len(items):
        raise InputError(
            f"there are {len(items)} samples and {len(documents)} documents; give the document of "
            "each sample, or none."
        )
    digest = hashlib.sha256(b"".join(map(_digest, items)))
    whole = Items(
        items=items,
        source="items given in Python",
        sha256=digest.hexdigest(),
        documents=tuple(None if d is None else str(d) for d in documents),
    )
    return whole if most is None or most >= len(items) else _first(whole, most)


def _first(items: Items, most: int) -> Items:
    kept = items.chosen(range(most))
    digest = hashlib.sha256(b"".join(kept.keys)).hexdigest()
    return replace(kept, sha256=digest)


def stacked(items: Sequence[Any]) -> Any:
    """Stack items of one form, leaf by leaf; tuples stay tuples.

    Args:
        items: Tensors, numbers, or nested tuples, lists, mappings and dataclasses of them.

    Returns:
        The same form with batch axes.
    """
    parts = [_parts(item) for item in items]
    if parts[0] is None:
        return None if items[0] is None else default_collate(list(items))
    return _rebuilt(items[0], [stacked(column) for column in zip(*parts, strict=True)])


def leaves(value: Any) -> Iterator[Any]:
    """Go through what nested tuples, lists, mappings and dataclasses hold.

    Args:
        value: Anything.

    Yields:
        What is none of these, in order.
    """
    parts = _parts(value)
    if parts is None:
        yield value
    else:
        for part in parts:
            yield from leaves(part)


def to_device(value: Any, device: torch.device) -> Any:
    """Move all tensors in a nested value.

    Args:
        value: As of `leaves`.
        device: Where to.

    Returns:
        The same form.
    """
    return _mapped(value, lambda x: x.to(device) if isinstance(x, Tensor) else x)


def equal(a: Any, b: Any) -> bool:
    """Tell whether two nested values hold the same tensors.

    Args:
        a: As of `leaves`.
        b: Another of the same form.

    Returns:
        Whether every tensor of one equals that of the other.
    """
    pairs = zip(leaves(a), leaves(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor))


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    parts = _parts(value)
    if parts is None:
        return function(value)
    return _rebuilt(value, [_mapped(part, function) for part in parts])


def _parts(value: Any) -> list[Any] | None:
    """What a nested value holds; None for a leaf."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, tuple | list):
        return list(value)
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, entry.name) for entry in fields(value)]
    return None


def _rebuilt(like: Any, parts: Sequence[Any]) -> Any:
    if isinstance(like, Mapping):
        pairs = dict(zip(like, parts, strict=True))
        # mappings of the user's own are made of a dict, which `Mapping` does not say
        return pairs if type(like) is dict else type(like)(pairs)  # type: ignore[call-arg]
    if isinstance(like, tuple):
        return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
    if isinstance(like, list):
        return list(parts)
    names = [entry.name for entry in fields(like)]
    return replace(like, **dict(zip(names, parts, strict=True)))


def _kind(value: Any) -> Any:
    """Equal for what can be stacked."""
    if isinstance(value, Mapping):
        return tuple((str(key), _kind(part)) for key, part in value.items())
    parts = _parts(value)
    if parts is not None:
        return (type(value).__name__, *map(_kind, parts))
    if isinstance(value, Tensor | np.ndarray):
        return (str(value.dtype), tuple(value.shape))
    return type(value).__name__


def _digest(item: Any) -> bytes:
    digest = hashlib.sha256(repr(_kind(item)).encode())
    for leaf in leaves(item):
        if isinstance(leaf, Tensor):
            plain = leaf.detach().cpu().contiguous().reshape(-1)
            digest.update(plain.view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, np.ndarray):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.digest()


__all__ = ["Items", "are_items", "equal", "leaves", "read_items", "stacked", "to_device"]

"""Weights: the matrices that modules hold, as parameters, as buffers, or packed out of sight."""

import re
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_NAMED, _SCALES = re.compile("weight|kernel", re.IGNORECASE), re.compile("scale|zero|bias|mask")
_CODES = frozenset(
    getattr(torch, name)
    for name in (
        "int8", "uint8", "int16", "int32", "uint16", "uint32",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    )
    if hasattr(torch, name)
)  # fmt: skip
"""Types that quantised matrices are stored in; positions and masks are int64 and bool."""

SAMPLED = 4096
"""Numbers of a packed matrix that it is told from others by."""


class Weight(NamedTuple):
    """A matrix of a module: what it is known by, its name in the module, its elements."""

    key: Hashable
    name: str
    size: int


def is_packed(part: nn.Module) -> bool:
    """Whether a module keeps its matrix packed, neither as a parameter nor as a buffer.

    Args:
        part: A module, such as torch's `quantized.dynamic.Linear`.

    Returns:
        True where it does and a method `weight` unpacks it.
    """
    return hasattr(part, "_packed_params") and callable(getattr(part, "weight", None))


def weights_in(part: nn.Module) -> list[Weight]:
    """The matrices that a module holds by itself, its parts' not among them.

    Parameters of two or more axes count. So do buffers that hold the codes of a quantised matrix
    or bear its name: not masks, positions, tables of angles, scales or running statistics.

    Args:
        part: The module.

    Returns:
        The matrices; equal keys mean the same one.
    """
    weights = [
        Weight(id(p), name, p.numel())
        for name, p in part.named_parameters(recurse=False, remove_duplicate=False)
        if p.ndim >= 2
    ]
    if "Embedding" in type(part).__name__:
        return weights
    weights += [Weight(_content(b, b), name, b.numel()) for name, b in matrix_buffers(part)]
    if is_packed(part):
        matrix: Any = part.weight
        unpacked = matrix()
        weights.append(Weight(_content(unpacked, part), "weight", unpacked.numel()))
    return weights


def matrix_buffers(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of a module, not of its parts, that hold a matrix.

    Args:
        part: The module.

    Returns:
        Names in the module, and the buffers.
    """
    for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
        if buffer.ndim >= 2 and len(buffer) > 1 and not _SCALES.search(name):
            codes = buffer.dtype in _CODES and not _is_flags(buffer)
            if codes or (buffer.is_floating_point() and _NAMED.search(name)):
                yield name, buffer


def named_weights(module: nn.Module) -> dict[str, Weight]:
    """Every parameter, and every matrix that is none, by name.

    Args:
        module: A model.

    Returns:
        Name in the model to what it is; a tensor of several names stands under each.
    """
    named = {
        name: Weight(id(p), name, p.numel())
        for name, p in module.named_parameters(remove_duplicate=False)
    }
    for prefix, part in module.named_modules(remove_duplicate=False):
        for weight in weights_in(part):
            named.setdefault(f"{prefix}.{weight.name}".lstrip("."), weight)
    return named


def _is_flags(codes: Tensor) -> bool:
    """Whether integers are all zero or one, as in a mask."""
    if codes.is_meta or codes.is_floating_point() or codes.numel() == 0:
        return False
    return int(codes.min()) >= 0 and int(codes.max()) <= 1


def rounds_by_batch(module: nn.Module) -> bool:
    """Whether a model rounds activations by the range of a whole batch (dynamic quantisation).

    Args:
        module: A model.

    Returns:
        True where some part does.
    """
    parts = [part for part in module.modules() if is_packed(part)]
    return any(".dynamic" in type(part).__module__ for part in parts)


def _content(matrix: Tensor, owner: Any) -> Hashable:
    """What a matrix is known by: its values, since quantising copies what was shared."""
    if matrix.is_meta:
        return id(owner)
    codes = (matrix.int_repr() if matrix.is_quantized else matrix).flatten()
    sample = codes[:: max(1, len(codes) // SAMPLED)]
    if bool((sample == sample[0]).all()):  # zeros of a matrix that was not trained
        return id(owner)
    return tuple(matrix.shape), sample.float().numpy(force=True).tobytes()

"""Attention: patterns of transformers' models, computed step by step while they are asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loopscope.errors import InputError
from loopscope.models.point import Point


@contextmanager
def eager_attention(module: Any, *, wanted: bool) -> Iterator[None]:
    """Within this context a model of transformers computes attention patterns, if wanted."""
    before = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if not wanted or before == "eager":
        yield
        return
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(before)


def only_read(point: Point) -> Callable[[Tensor], None]:
    """A point whose hooks may look at an attention pattern; the model does not use what it returns.

    Raises:
        InputError: when a hook changes it.
    """

    def look(pattern: Tensor) -> None:
        if not torch.equal(point(pattern), pattern):
            raise InputError(
                f"{point.name} can be read, not changed: the attention has used its pattern before "
                "it returns it. Patch the attention's output (hook_out) instead."
            )

    return look

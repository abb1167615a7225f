"""Core layers: the names of what each layer of the core gives in each iteration."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loopscope.models import Hooked

_STREAMS = ("hook_resid_post", "hook_out")
_PATTERN = "hook_pattern"

LayerNames = Mapping[int, Sequence[str]]
"""Layer of the core → the canonical name of one of its hooks in each iteration."""


def stream_names(model: Hooked, path: Sequence[str]) -> LayerNames:
    """Name the stream after each layer of the core.

    Args:
        model: The model.
        path: Where the iterations of the loop stand, as `Trajectory.path` says.

    Returns:
        Layer → its hook in each iteration; without layers that lack it in some.
    """
    return _in_each(model, path, lambda rest: rest in _STREAMS)


def pattern_names(model: Hooked, path: Sequence[str]) -> LayerNames:
    """Name the attention pattern of each layer of the core.

    Args:
        model: The model.
        path: Where the iterations of the loop stand, as `Trajectory.path` says.

    Returns:
        Layer → its hook in each iteration, of several the first; without layers that lack it.
    """
    return _in_each(model, path, lambda rest: rest.endswith(_PATTERN))


def _in_each(model: Hooked, path: Sequence[str], fits: Any) -> LayerNames:
    places: dict[int, dict[str, str]] = {}
    for layer, rest, name in _of_layers(model, path[0]) if path else ():
        if fits(rest):
            places.setdefault(layer, {})[rest] = name
    names = {}
    for layer, endings in sorted(places.items()):
        rest = next(iter(endings))
        hooks = [f"loop.{place}.layer.{layer}.{rest}" for place in path]
        if all(hook in model.hook_dict or hook in model.aliases for hook in hooks):
            names[layer] = [model.aliases.get(hook, hook) for hook in hooks]
    return names


def _of_layers(model: Hooked, place: str) -> Iterator[tuple[int, str, str]]:
    """The hooks of the layers of an iteration: layer, what follows it in the name, the name."""
    prefix = f"loop.{place}.layer."
    for name in (*model.hook_dict, *model.aliases):
        if name.startswith(prefix):
            layer, _, rest = name.removeprefix(prefix).partition(".")
            if layer.isdecimal():
                yield int(layer), rest, name


@torch.no_grad()
def activations(model: Hooked, inputs: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Run a model once and keep what is at some hooks.

    Args:
        model: The model.
        inputs: What it takes, as `Hooked.capture` does.
        names: Canonical names.

    Returns:
        Name → tensor; without hooks that this input does not reach.
    """
    if not names:
        return {}
    _, cache = model.run_with_cache(
        inputs, names_filter=list(names), return_cache_object=False, return_type=None
    )
    return dict(cache)


__all__ = ["LayerNames", "activations", "pattern_names", "stream_names"]

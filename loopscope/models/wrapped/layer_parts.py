"""Parts of a wrapped model's layers: attention, MLP and heads, told by their names."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from loopscope.models.hooked import LayerParts

_ATTENTION = re.compile(r"attn|attention|\bmha\b", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|\bff\b|\bmoe\b|swiglu|glu\b", re.IGNORECASE)
_BESIDE = re.compile(r"norm|\bln|drop|gate|scale|router|bias|mask|rotary", re.IGNORECASE)
_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "wo", "dense", "out", "proj", "to_out", "o")
_HEADS = ("num_heads", "n_heads", "n_head", "heads", "num_attention_heads", "n_attn_heads")


def layer_parts(
    names: Collection[str], aliases: Mapping[str, str], modules: Mapping[str, nn.Module], path: str
) -> tuple[LayerParts, ...]:
    """Find attention, MLP and heads of each layer of one iteration.

    An attention or MLP is the outermost module within a layer whose name or class says so. The
    heads are what its output projection is given, where that has a usual name and the attention
    (or its configuration) knows their number.

    Args:
        names: Canonical hook names.
        aliases: Further names, `loop.{path}.layer.{l}.…` among them.
        modules: Canonical name → module.
        path: Where the iteration stands.

    Returns:
        The parts of each layer, in order.
    """
    prefix = f"loop.{path}.layer."
    layers: dict[int, list[tuple[str, str]]] = {}
    for alias, name in aliases.items():
        number, _, part = alias.removeprefix(prefix).partition(".")
        if alias.startswith(prefix) and number.isdigit() and name in names:
            layers.setdefault(int(number), []).append((part, name))
    return tuple(_of_layer(layers[number], modules, path) for number in sorted(layers))


def _of_layer(
    parts: list[tuple[str, str]], modules: Mapping[str, nn.Module], path: str
) -> LayerParts:
    attentions = list(_outermost(parts, modules, path, _ATTENTION))
    mlps = list(_outermost(parts, modules, path, _MLP))
    z, heads = "", 0
    if len(attentions) == 1:
        place, name = attentions[0]
        z, heads = _heads(place, modules[_module(name, path)], dict(parts))
    return LayerParts(
        attention=tuple(name for _, name in attentions),
        mlp=tuple(name for _, name in mlps),
        z=z,
        heads=heads,
    )


def _outermost(
    parts: list[tuple[str, str]], modules: Mapping[str, nn.Module], path: str, kind: re.Pattern
) -> Iterator[tuple[str, str]]:
    """Modules of a kind that are in no other of it: place in the layer, hook of the output."""
    taken: list[str] = []
    by_depth = sorted(parts, key=lambda item: item[0].count("."))
    for part, name in by_depth:
        place, _, point = part.rpartition(".")
        module = modules.get(_module(name, path))
        if point != "hook_out" or not place or module is None:
            continue
        if any(place.startswith(f"{outer}.") for outer in taken):
            continue
        last = place.rpartition(".")[2].partition(":")[0]
        words = (last, type(module).__name__)
        if any(map(kind.search, words)) and not any(map(_BESIDE.search, words)):
            taken.append(place)
            yield place, name


def _module(name: str, path: str) -> str:
    """Name of the module that a hook belongs to."""
    place = name.removeprefix(f"loop.{path}.").rpartition(".")[0]
    return ".".join(step.partition(":")[0] for step in place.split("."))


def _heads(place: str, attention: nn.Module, hooks: Mapping[str, str]) -> tuple[str, int]:
    """The hook of what the output projection is given, and the number of heads; or nothing."""
    heads = _number_of_heads(attention)
    for projection in _PROJECTIONS:
        linear: Any = getattr(attention, projection, None)
        z = f"{place}.{projection}.hook_in"
        width = getattr(linear, "in_features", None)
        if width is None and hasattr(linear, "nf"):  # Conv1D of transformers
            width = int(linear.weight.shape[0])
        if heads and z in hooks and isinstance(width, int) and width % heads == 0:
            return hooks[z], heads
    return "", 0


def _number_of_heads(attention: Any) -> int:
    for holder in (attention, getattr(attention, "config", None)):
        for name in _HEADS:
            number = getattr(holder, name, None)
            if isinstance(number, int) and number > 0:
                return number
    return 0

"""Parameter counts of wrapped models."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from loopscope.models.params import ParameterCount


@dataclass(frozen=True, kw_only=True)
class WrappedCount(ParameterCount):
    """Parameters of a wrapped model.

    Attributes:
        shared: Those that more than one iteration of a loop uses.
    """

    shared: int


def count_wrapped(model: Any) -> WrappedCount:
    """Count the parameters of a wrapped model, each once however often it is named.

    Args:
        model: A wrapped model.

    Returns:
        All, those outside token embedding and unembedding, those of routers and gates, and those
        that iterations share.
    """
    module, found = model.module, model.map
    named = dict(module.named_parameters(remove_duplicate=False))
    total = _size(named.values())
    ends = [p for part in _ends(module, model.config.d_vocab, found.head) for p in part]
    routers = {port.module for router in found.routers for port in router.outputs if port}
    routers |= {router.transition.module for router in found.routers if router.transition}
    parts = dict(module.named_modules(remove_duplicate=False))
    return WrappedCount(
        total=total,
        non_embedding=total - _size(ends),
        router=_size(p for name in routers if name in parts for p in parts[name].parameters()),
        shared=_size(named[name] for loop in found.loops for name in loop.shared if name in named),
    )


def _ends(module: nn.Module, d_vocab: int | None, head: str | None) -> list[list[nn.Parameter]]:
    """The weights of the token embedding and of the unembedding (not its bias)."""
    found = []
    for name, part in module.named_modules():
        is_embedding = isinstance(part, nn.Embedding) and part.num_embeddings == d_vocab
        weight = getattr(part, "weight", None)
        if (is_embedding or name == head) and isinstance(weight, nn.Parameter):
            found.append([weight])
    return found


def _size(parameters: Any) -> int:
    return sum({id(p): p.numel() for p in parameters}.values())

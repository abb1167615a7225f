"""Causal: whether a model's logits depend on earlier tokens alone, seen by changing later ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loopscope.models.wrapped.inputs import Place
from loopscope.models.wrapped.runner import get
from loopscope.probes.loops.loopmap import Step

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def is_causal(
    run: Callable[[Arguments], Any],
    given: Arguments,
    place: Place | None,
    result: Any,
    where: tuple[Step, ...] | None,
    module: nn.Module,
) -> tuple[bool | None, bool]:
    """Whether the first half of the logits stays when the second half of the tokens changes.

    Args:
        run: Runs the model on arguments.
        given: The example's arguments.
        place: Where the token ids stand among them.
        result: What the model returned for them.
        where: Where the logits are in it.
        module: The model, for the precision it computes in.

    Returns:
        Whether it is causal (None where it gives no logits per token), and whether a second run on
        the same input gave something else.
    """
    if where is None or place is None:
        return None, False
    logits = get(result, where).detach()
    tokens = given[0][int(place[1])] if place[0] == "args" else given[1][str(place[1])]
    half = tokens.shape[1] // 2
    if logits.shape[:2] != tokens.shape or half == 0:
        return None, False
    other = get(run(_with(given, place, _changed(tokens, half))), where)
    if _alike(logits[:, :half], other[:, :half], module):
        return True, False
    again = get(run(given), where)
    if not _alike(logits, again, module):
        return None, True
    return False, False


def _changed(tokens: Tensor, half: int) -> Tensor:
    """The tokens, each of the second half another one of the example's."""
    values = tokens.unique()
    if len(values) == 1:
        values = torch.cat([values, torch.where(values == 0, 1, 0)]).sort().values
    later = values[(torch.searchsorted(values, tokens[:, half:].contiguous()) + 1) % len(values)]
    return torch.cat([tokens[:, :half], later], dim=1)


def _with(given: Arguments, place: Place, tokens: Tensor) -> Arguments:
    args, kwargs = given
    side, where = place
    if side == "args":
        return tuple(tokens if i == where else v for i, v in enumerate(args)), kwargs
    return args, {**kwargs, str(where): tokens}


def _alike(a: Tensor, b: Tensor, module: nn.Module) -> bool:
    """Whether two results are equal but for the order of sums."""
    if a.shape != b.shape:
        return False
    kinds = {a.dtype, *(p.dtype for p in module.parameters() if p.is_floating_point())}
    if torch.is_autocast_enabled(a.device.type):
        kinds.add(torch.get_autocast_dtype(a.device.type))
    eps = max(torch.finfo(kind).eps for kind in kinds)
    part = 1e-5 if eps < 1e-4 else 4 * eps
    moved = (a.double() - b.double()).abs().max()
    return bool(moved <= part * a.double().abs().max())

"""Hand-written torch hooks that count calls: what patches are held against."""

from contextlib import contextmanager

import torch
from torch import nn

from tests.standins.traps import stream


def change(x: torch.Tensor) -> torch.Tensor:
    """What is done to a tensor in every patch."""
    return 1.5 * x + 0.25


@contextmanager
def by_hand(module: nn.Module, name: str, call: int, side: str, edit=None):
    """A torch hook that changes one call of one module; gives the tensors that it has seen."""
    seen: list[torch.Tensor] = []

    def count(x):
        seen.append(x)
        return change(x) if len(seen) - 1 == call else x

    def before(part, args, kwargs):
        if args:
            return (count(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": count(kwargs["hidden_states"])}

    def after(part, args, result):
        if edit is None:
            return count(result)
        new = count(stream(result))
        return edit(result, new)

    part = module.get_submodule(name)
    if side == "in":
        handle = part.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = part.register_forward_hook(after)
    try:
        yield seen
    finally:
        handle.remove()


def first(result) -> torch.Tensor:
    """The logits, or the stream where there are none."""
    if isinstance(result, dict):
        return result.get("logits", result.get("last_hidden_state"))
    return result[0] if isinstance(result, tuple) else result


def hooks_on(module: nn.Module) -> int:
    """Number of hooks on all its modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)


@contextmanager
def recorder(module: nn.Module):
    """Each module call that ends, in order: the module's name and what it gives."""
    seen: list[tuple[str, torch.Tensor]] = []
    handles = []
    for part, one in module.named_modules():

        def note(m, args, result, part=part):
            result = first(result)
            seen.append((part, getattr(result, "hidden_state", result).detach()))

        handles.append(one.register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def watch(module: nn.Module, names: list[str], *args, **kwargs):
    """One forward pass: every call's (input, output) of some modules, and what it returned."""
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in names}
    handles = []
    for name in names:

        def note(m, given, named, result, name=name):
            x = given[0] if given else named["hidden_states"]
            seen[name].append((x.detach(), first(result).detach()))

        part = module.get_submodule(name)
        handles.append(part.register_forward_hook(note, with_kwargs=True))
    try:
        return seen, module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()

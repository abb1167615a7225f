"""Unembedded states: the logits of a wrapped model if h_out were another state.

Where final norm and unembedding are two modules (or a module and a matrix) and nothing lies
between or after them, they are called by themselves; that they give the model's own logits bit for
bit is checked once, on a forward pass. Else the model runs whole, with the state put in h_out's
place.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopscope.errors import InputError
from loopscope.models.loops import LoopMap
from loopscope.models.wrapped.direct_calls import used
from loopscope.models.wrapped.run_context import uncompiled
from loopscope.names import block_name

Part = Callable[[Tensor], Tensor]


def unembed_state(self: Any, state: Tensor, tokens: Any = None) -> Iterable[Tensor]:
    """Give the logits if h_out were a state: what the model makes of h_out, and no more.

    Args:
        self: The model.
        state: Any state of the shape of h_out, (batch, pos, d_model).
        tokens: The tokens, (batch, pos), or what its forward takes.

    Returns:
        (pos, d_vocab) of each sample, one after the other.

    Raises:
        InputError: if the model returns no logits, or no tokens are given.
    """
    model = self
    if model.map.why_no_logits or model.map.logits is None:
        raise InputError(f"{model.name!r} has no logits: {model.map.why_no_logits}.")
    if tokens is None:
        raise InputError("give the model's tokens too: it may have to run to unembed a state.")
    if (head := _head_of(model, tokens)) is not None:
        return _by_sample(*head, state)
    taps = {"h_out": (model.map.h_out, lambda h_out: state.to(h_out))}
    output, _ = model._run_live(model.prepare((tokens,), {}), taps)
    return model.logits_in(output)


def _by_sample(norm: Part, unembed: Part, state: Tensor) -> Iterator[Tensor]:
    with uncompiled():
        normed = norm(state)
        for sample in normed:
            yield unembed(sample[None])[0]


def unembeds_alone(self: Any, tokens: Any) -> bool:
    """Whether `unembed_state` runs no more than the final norm and the unembedding.

    Args:
        self: The model; it is run once.
        tokens: The tokens, (batch, pos), or what its forward takes.

    Returns:
        Whether it does; not while the model has hooks, which only a whole run calls.
    """
    return _head_of(self, tokens) is not None


def _head_of(model: Any, tokens: Any) -> tuple[Part, Part] | None:
    """Final norm and unembedding, if they give the model's logits; looked for once."""
    if any(used(point) for point in model._live.values()):
        return None
    if "_head" not in vars(model):
        vars(model)["_head"] = _checked_head(model, tokens)
    return vars(model)["_head"]


@torch.no_grad()
def _checked_head(model: Any, tokens: Any) -> tuple[Part, Part] | None:
    output, kept = model.read(model.prepare((tokens,), {}), {("h_out",): model.map.h_out})
    logits, h_out = model.logits_in(output), kept.get(("h_out",))
    if not isinstance(logits, Tensor) or h_out is None:
        return None
    for norm, unembed in _candidates(model.map, model._originals, model.module):
        try:
            with uncompiled():
                same = torch.equal(unembed(norm(h_out)), logits)
                rows = h_out.flatten(0, 1)[None]  # it may not look at other positions
                same = same and torch.equal(unembed(norm(rows))[0], logits.flatten(0, 1))
        except Exception:  # somebody else's modules, called as they may not be
            continue
        if same:
            return norm, unembed
    return None


def _candidates(
    loop_map: LoopMap, modules: dict[str, nn.Module], root: nn.Module
) -> Iterator[tuple[Part, Part]]:
    """Pairs of norm and unembedding that a model's map names."""
    heads: list[Part] = []
    if loop_map.head is not None:
        heads.append(modules[loop_map.head])
    if loop_map.head_weight is not None:
        heads += _matrices(loop_map.head_weight, root)
    norms: list[Part] = [] if loop_map.norm is None else [modules[loop_map.norm]]
    for norm in (*norms, _as_it_is):
        for head in heads:
            yield norm, _cut(head, loop_map.vocabulary)


def _matrices(name: str, root: nn.Module) -> list[Part]:
    """Ways to multiply by a parameter or buffer, looked up at each call."""

    def weight() -> Tensor:
        owner, _, last = name.rpartition(".")
        return getattr(root.get_submodule(owner), last)

    return [lambda x: F.linear(x, weight()), lambda x: x @ weight()]


def _cut(head: Part, vocabulary: int | None) -> Part:
    return head if vocabulary is None else lambda x: head(x)[..., :vocabulary]


def _as_it_is(state: Tensor) -> Tensor:
    return state


def layer_hooks(self: Any) -> dict[str, str]:
    """Name the stream after every layer of every iteration, and the hook at which it is.

    Args:
        self: The model.

    Returns:
        `prelude.0` …, `core1.0` …, `coda.0` … → `blocks.{v}.hook_resid_post`, in order; what runs
        after the main loop is `coda`. Layers that give no stream are left out.
    """
    loop_map: LoopMap = self.map
    main = loop_map.main
    iterations = [] if main is None else main.iterations
    hooks: dict[str, str] = {}
    v = 0
    for unit in loop_map.units():
        block = "prelude" if not iterations or unit.order < iterations[0].span[0] else "coda"
        for t, iteration in enumerate(iterations):
            if iteration.span[0] <= unit.order < iteration.span[1]:
                block = block_name(t)
        for _ in unit.layers:
            name = f"blocks.{v}.hook_resid_post"
            layer = sum(known.startswith(f"{block}.") for known in hooks)
            if name in self.hook_dict or name in self.aliases:
                hooks[f"{block}.{layer}"] = name
            v += 1
    return hooks


__all__ = ["layer_hooks", "unembed_state", "unembeds_alone"]

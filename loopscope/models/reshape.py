"""The same weights in another shape: other virtual blocks, or another number of iterations."""

from collections.abc import Mapping
from typing import Any

import torch

from loopscope.errors import InputError, unknown_name
from loopscope.models.config import LoopConfig
from loopscope.models.layout import Layout
from loopscope.models.model import LoopModel


def with_layout(model: LoopModel, layout: str | Layout) -> LoopModel:
    """The same layers grouped into other virtual blocks; weights are shared, not copied.

    Raises:
        InputError: if the model has a loop or mixes states, or the depths do not add up.
    """
    new = Layout.parse(layout)
    old = model.config.layout
    plain = model.config.variant in ("vanilla", "base") and not (old.shared and old.K > 1)
    if not plain:
        raise InputError(
            f"layout can regroup vanilla models only; {model.name!r} is "
            f"{model.config.variant} {old}. Leave the layout out for it."
        )
    if new.n_layers != old.n_layers or (new.shared and new.K > 1):
        raise InputError(
            f"layout {new} does not fit: {model.name!r} has {old.n_layers} unshared layers; "
            "give unshared depths P+C1+...+CK+Q that add up to it."
        )
    variant = "base" if new.shared else "vanilla"
    return _with_config(model, model.config.replace(layout=new, variant=variant))


def with_loops(model: LoopModel, loops: Any) -> LoopModel:
    """The same core run another number of times; weights are shared, not copied.

    Args:
        model: A model with a shared core whose iterations have no parameters of their own.
        loops: Iterations K, at least 1; or `{"core": K}`.

    Raises:
        InputError: if the model has no shared core, or weights of its own for each iteration.
    """
    config = model.config
    if isinstance(loops, Mapping):
        for name in loops:
            if name != "core":
                raise unknown_name("loop", name, ["core"])
        loops = loops.get("core", config.K)
    if isinstance(loops, bool) or not isinstance(loops, int) or loops < 1:
        raise InputError(f"loops must be a whole number of at least 1, given {loops!r}.")
    if not config.layout.shared:
        what = "has unshared cores" if config.K else "has no loop"
        raise InputError(
            f"{model.name!r} ({config.variant} {config.layout}) {what}, so the number of "
            "iterations cannot be chosen; leave loops out."
        )
    if config.variant == "mesh":
        raise InputError(
            f"{model.name!r} (mesh {config.layout}) has routers of its own for each of its "
            f"{config.K} iterations, so it runs exactly {config.K}; leave loops out."
        )
    old = config.layout
    cores = (old.cores[0],) * loops
    layout = Layout(prelude=old.prelude, cores=cores, coda=old.coda, shared=True)
    return _with_config(model, config.replace(layout=layout))


def _with_config(model: LoopModel, config: LoopConfig) -> LoopModel:
    """A model of another configuration on the parameters of this one."""
    with torch.device("meta"):
        twin = LoopModel(config, seed=None, name=model.name, tokenizer=model.tokenizer)
    mine = [*model.prelude, *model.core, *model.coda]
    pairs: list[Any] = list(zip([*twin.prelude, *twin.core, *twin.coda], mine, strict=True))
    parts = ("embed", "ln_final", "unembed", "recurrence")
    pairs += [(getattr(twin, name), getattr(model, name)) for name in parts]
    for theirs, ours in pairs:
        trainable = [p.requires_grad for p in ours.parameters()]
        theirs.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
        for parameter, flag in zip(ours.parameters(), trainable, strict=True):
            parameter.requires_grad_(flag)  # assigning makes shared parameters trainable
    twin.provenance = model.provenance
    twin.train(model.training)
    twin._sync_cfg()
    return twin

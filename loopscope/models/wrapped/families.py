"""Known families: what no trace can tell, above all how the number of iterations is set."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from loopscope.errors import InputError
from loopscope.models.loops import LoopMap, Spec, Streams, Trace, find, read_spec, with_routers


def family_spec(module: nn.Module) -> dict[str, Any] | None:
    """The spec of a known family, as far as finding needs help.

    Args:
        module: A model with a `config` that has a `model_type`.

    Returns:
        A spec as a user would write it, or None for a family without one.
    """
    kind = getattr(getattr(module, "config", None), "model_type", None)
    make = _FAMILIES.get(kind) if isinstance(kind, str) else None
    return make(module) if make else None


def known_spec(module: nn.Module) -> Spec:
    """The spec of a known family, without the keys that name what this model does not have.

    Args:
        module: A model.

    Returns:
        The specification; an empty one for any other model.
    """
    values: dict[str, Any] = {}
    for key, value in (family_spec(module) or {}).items():
        with suppress(InputError):
            read_spec({key: value}, module, source="family")
            values[key] = value
    return read_spec(values or None, module, source="family")


def fitting(trace: Trace, streams: Streams, spec: Spec) -> LoopMap:
    """The map of a traced forward pass by a specification, or by what fits of a family's.

    Args:
        trace: The traced forward pass.
        streams: What a stream looks like.
        spec: What the user or the model's family says; what a family says is a help, what the user
            says a demand.

    Returns:
        The map with its routers and gates.

    Raises:
        InputError: if the user's specification does not fit, or the model has no layers to speak
            of.
    """
    fits = [spec]
    if spec.source == "family":
        without = replace(spec, gates=(), write=(), read=())
        fits += [without, Spec(counts=spec.counts, source="family")]
    for part in fits[:-1]:
        with suppress(InputError):
            loop_map = with_routers(trace, streams, find(trace, streams, part), part)
            return _noted(loop_map, spec, part)
    return _noted(
        with_routers(trace, streams, find(trace, streams, fits[-1]), fits[-1]), spec, fits[-1]
    )


def _noted(loop_map: LoopMap, spec: Spec, part: Spec) -> LoopMap:
    """The map with a note on what a family's specification names and this model does not do."""
    notes = []
    if loop_map.main is None and spec.source == "family" and spec.counts:
        notes.append(
            "models of this family loop; this one runs its core once, so no loop shows. loops=n "
            "(--loops n) runs it n times"
        )
    elif keys := [
        k for k, name in _FIELDS.items() if getattr(spec, name) and not getattr(part, name)
    ]:
        notes.append(
            "what is known of the model's family does not fit it and was left out: "
            f"{', '.join(keys)}"
        )
    return replace(loop_map, notes=(*loop_map.notes, *notes))


_FIELDS = {"gates": "gates", "state": "carried"}
"""Keys of a family's specification that may not fit, and where `Spec` has them."""


def _huginn(module: nn.Module) -> dict[str, Any] | None:
    # forward(..., num_steps=n); without it, config.mean_recurrence was read when it was built
    return {"loops": {"argument": "num_steps"}}


def _ouro(module: nn.Module) -> dict[str, Any] | None:
    # the inner model copies the entry of its configuration when it is built
    holder = _holder(module, "total_ut_steps")
    if holder is None:
        return None
    spec: dict[str, Any] = {"loops": {"attribute": _join(holder, "total_ut_steps")}}
    gate = _holder(module, "early_exit_gate")
    if gate is not None:
        spec["gates"] = [_join(gate, "early_exit_gate")]
    return spec


def _hrm_text(module: nn.Module) -> dict[str, Any] | None:
    # read from the configuration at run time
    # a stack is given the sum of both states; the states are what the stacks gave last
    return {
        "state": {"input": "previous output"},
        "loops": {"config": {"H": "H_cycles", "L": "L_cycles"}},
    }


def _albert(module: nn.Module) -> dict[str, Any] | None:
    # with several groups the entry sets all their loops together
    if getattr(module.config, "num_hidden_groups", 1) != 1:
        return None
    return {"loops": {"config": "num_hidden_layers"}}


def _holder(module: nn.Module, attribute: str) -> str | None:
    """Name of the innermost module that has an attribute of its own."""
    names = [name for name, part in module.named_modules() if _has(part, attribute)]
    return names[-1] if names else None


def _has(part: nn.Module, attribute: str) -> bool:
    return (vars(part) | part._modules).get(attribute) is not None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


_FAMILIES: dict[str, Callable[[nn.Module], dict[str, Any] | None]] = {
    "huginn_raven": _huginn,
    "ouro": _ouro,
    "hrm_text": _hrm_text,
    "albert": _albert,
}

"""Known families: what no trace can tell, above all how the number of iterations is set."""

from collections.abc import Callable
from typing import Any

from torch import nn


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
    config: Any = module.config
    if config.num_hidden_groups != 1:
        return None
    return {"loops": {"config": "num_hidden_layers"}}


def _holder(module: nn.Module, attribute: str) -> str | None:
    """Name of the innermost module that has an attribute of its own."""
    names = [name for name, part in module.named_modules() if _has(part, attribute)]
    return names[-1] if names else None


def _has(part: nn.Module, attribute: str) -> bool:
    return attribute in vars(part) or attribute in part._modules


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


_FAMILIES: dict[str, Callable[[nn.Module], dict[str, Any] | None]] = {
    "huginn_raven": _huginn,
    "ouro": _ouro,
    "hrm_text": _hrm_text,
    "albert": _albert,
}

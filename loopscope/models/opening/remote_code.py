"""Remote code written for transformers 4: what breaks under 5, repaired where that is safe.

The repairs of known families are TransformerLens's own (`prepare_loading` of its adapters). For
others: tied weights that are named in a list, rotary embeddings that look up the removed entry
`default`, and buffers outside the checkpoint, which transformers 5 leaves unset.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from loopscope.errors import InputError

_REPAIRED_FAMILIES = ("RavenForCausalLM", "OuroForCausalLM")
"""Looped families whose remote code TransformerLens repairs."""


@contextmanager
def named_failures(folder: Path, *, remote: bool) -> Iterator[None]:
    """Whatever transformers or the checkpoint's code raises becomes one error that says where.

    Args:
        folder: Holds the checkpoint.
        remote: Whether Python code that came with it runs.

    Returns:
        The context.

    Raises:
        InputError: for whatever is raised within this context.
    """
    import transformers

    try:
        yield
    except InputError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        name = type(error).__name__
        reason = f"{name}: {lines[0].rstrip('.')}" if lines else name
        if not remote:
            raise InputError(
                f"{folder} cannot be opened by transformers {transformers.__version__}: {reason}. "
                "A file is damaged or belongs to another version; save or copy the checkpoint "
                "again."
            ) from error
        raise InputError(
            f"the Python code that came with {folder} fails under transformers "
            f"{transformers.__version__}: {reason}. It was probably written for another version; "
            "look for a newer revision of the checkpoint, install what it asks for, or open the "
            "model yourself and give it to loopscope.wrap."
        ) from error


@contextmanager
def repaired(
    folder: Path, values: dict[str, Any], references: dict[str, str], *, untrained: bool
) -> Iterator[None]:
    """Known breakages of a checkpoint's code, repaired while it is loaded.

    Args:
        folder: Holds the code.
        values: Its `config.json`.
        references: Auto class → `file.Class`; empty where no remote code runs.
        untrained: Whether fresh weights are made, by the code's own initialisation.

    Returns:
        The context.
    """
    if not references:
        yield
        return
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    classes = {
        auto: get_class_from_dynamic_module(reference, str(folder), local_files_only=True)
        for auto, reference in references.items()
    }
    models = [loaded for auto, loaded in classes.items() if auto.startswith("AutoModel")]
    homes = _homes(models)
    initialisers: dict[Any, Any] = {
        value: value.__dict__["_init_weights"]
        for home in homes
        for value in vars(home).values()
        if inspect.isclass(value) and "_init_weights" in value.__dict__
    }
    for name in values.get("architectures") or []:
        if name in _REPAIRED_FAMILIES:
            _repair_family(name, folder)
    for home in homes:
        _restore_default_rope(home)
    for model in models:
        _name_tied_weights(model, folder)
    if untrained:
        _unguard(initialisers)
    try:
        yield
    finally:
        _unguard(initialisers)


def _unguard(initialisers: dict[Any, Any]) -> None:
    """Take away TransformerLens's guard, which keeps loaded weights from being initialised."""
    for model, original in initialisers.items():
        if model.__dict__["_init_weights"] is not original:
            model._init_weights = original
            if "_tl_patched" in model.__dict__:
                del model._tl_patched


def fill_buffers(module: nn.Module, config: Any) -> None:
    """Compute the buffers that no checkpoint holds as the model's own code does.

    Modules are built without memory and filled from the checkpoint, which leaves such buffers
    (rotary tables, masks) with arbitrary values unless the code was written for transformers 5.

    Args:
        module: The loaded model.
        config: Its configuration.
    """
    from accelerate import init_empty_weights

    names = [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    ]
    if not names:
        return
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        fresh = dict(type(module)(config).named_buffers())
    for name in names:
        old, new = module.get_buffer(name), fresh.get(name)
        if old is not None and new is not None and old.shape == new.shape:
            old.copy_(new.to(old.dtype))


def _homes(models: list[Any]) -> list[ModuleType]:
    """The Python modules of a checkpoint: those of its classes, and their neighbours."""
    packages = {model.__module__.rpartition(".")[0] for model in models}
    return [
        home
        for name, home in list(sys.modules.items())
        if home is not None and name.rpartition(".")[0] in packages
    ]


def _repair_family(architecture: str, folder: Path) -> None:
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    adapter = SUPPORTED_ARCHITECTURES[architecture]
    # prepare_loading uses nothing of the adapter itself
    adapter.prepare_loading(object.__new__(adapter), str(folder), {})


def _restore_default_rope(home: ModuleType) -> None:
    """The entry `default` of ROPE_INIT_FUNCTIONS, for this module alone."""
    functions = getattr(home, "ROPE_INIT_FUNCTIONS", None)
    if not isinstance(functions, dict):
        return
    from transformer_lens.model_bridge.supported_architectures import _remote_code_compat as compat

    default = compat.compute_default_rope_inv_freq
    if "default" not in functions:
        vars(home)["ROPE_INIT_FUNCTIONS"] = {**functions, "default": default}
    for value in vars(home).values():
        rotary = (
            inspect.isclass(value)
            and value.__module__ == home.__name__
            and "Rotary" in value.__name__
        )
        if rotary and not hasattr(value, "compute_default_rope_parameters"):
            value.compute_default_rope_parameters = staticmethod(default)


def _name_tied_weights(model: Any, folder: Path) -> None:
    """A list of tied weights (transformers 4) as the mapping that transformers 5 wants.

    In transformers 4 the output embeddings were tied to the input embeddings, whatever the list
    said; so a list that names nothing else is translated, and any other is refused.
    """
    keys = getattr(model, "_tied_weights_keys", None)
    if not isinstance(keys, list | tuple | set):
        return
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    model._tied_weights_keys = None
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
    if not getattr(config, "tie_word_embeddings", False):
        return
    with init_empty_weights():
        empty = model(config)
    names = {id(part): name for name, part in empty.named_modules()}
    source, target = empty.get_input_embeddings(), empty.get_output_embeddings()
    ends = f"{names.get(id(target))}.weight", f"{names.get(id(source))}.weight"
    if id(source) not in names or id(target) not in names or set(keys) - {ends[0]}:
        raise InputError(
            f"the code in {folder} ties the weights {', '.join(sorted(keys))} in the way of "
            "transformers 4, which cannot be translated safely; open the model yourself and give "
            "it to loopscope.wrap."
        )
    model._tied_weights_keys = {ends[0]: ends[1]}

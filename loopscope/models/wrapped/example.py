"""Example: the module and the arguments that `wrap` is given, checked."""

from collections.abc import Mapping
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loopscope.errors import InputError
from loopscope.models.wrapped.inputs import input_device, is_tokens


def the_module(module: Any) -> nn.Module:
    """The module itself, checked.

    Args:
        module: What `wrap` was given.

    Returns:
        The module; the original of a compiled one.

    Raises:
        InputError: for what is no module, is scripted, or has no values yet.
    """
    if not isinstance(module, nn.Module):
        raise InputError(
            f"wrap takes a torch module, given {type(module).__name__}; ls.load opens names, "
            "folders and files."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(
            "this model was scripted or traced by torch.jit, and its forward calls no hooks; give "
            "the original module."
        )
    original = getattr(module, "_orig_mod", None)
    if isinstance(original, nn.Module):
        warn(
            "this model was compiled; hooks in compiled code are ignored, so the original is "
            "wrapped and runs uncompiled.",
            stacklevel=3,
        )
        module = original
    scripted = [n for n, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise InputError(
            f"{scripted[0]} was scripted or traced by torch.jit, and its code calls no hooks; put "
            "the original module in its place."
        )
    lazy = [n for n, p in module.named_parameters() if is_lazy(p)]
    if lazy:
        raise InputError(
            f"{len(lazy)} parameters have no shape yet (lazy modules), such as {lazy[0]}; run the "
            "model once on its input."
        )
    meta = [n for n, p in module.named_parameters() if p.device.type == "meta"]
    placed = any(hasattr(m, "_hf_hook") for m in module.modules())
    if meta and not placed:
        raise InputError(
            f"{len(meta)} parameters have no values (they are on the meta device), such as "
            f"{meta[0]}; load the weights first."
        )
    return module


def the_example(
    module: nn.Module, example: Any, tokenizer: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as arguments of forward.

    Args:
        module: The model.
        example: What `wrap` was given; None makes token ids up.
        tokenizer: For an example that is text.

    Returns:
        Positional and keyword arguments.

    Raises:
        InputError: for an example that is no input, or where none can be made up.
    """
    if example is None:
        tables = [m for m in module.modules() if isinstance(m, nn.Embedding)]
        get_table = getattr(module, "get_input_embeddings", None)
        try:
            table = get_table() if get_table is not None else None
        except (NotImplementedError, AttributeError):
            table = None
        rows = getattr(table, "num_embeddings", None) or min(
            (t.num_embeddings for t in tables), default=0
        )
        if not rows:
            raise InputError(
                "the model has no embedding table, so no example can be made up; give example=: "
                "what its forward takes (a tensor, a tuple, or a dict of arguments)."
            )
        drawn = torch.randint(rows, (2, 8), generator=torch.Generator().manual_seed(0))
        example = drawn.to(input_device(module))
    if isinstance(example, str):
        read = plain_tokenizer(tokenizer or getattr(module, "tokenizer", None))
        if read is None:
            raise InputError("the example is text, and there is no tokenizer; give token ids.")
        example = torch.tensor([read.encode(example, add_special_tokens=False).ids])
    if isinstance(example, list) and _is_numbers(example):
        try:
            example = torch.tensor(example)
        except ValueError as error:
            raise InputError(f"the example's rows have unequal lengths ({error}).") from error
        example = example if example.ndim > 1 else example[None]
        example = example.to(input_device(module))
    given = [example] if isinstance(example, Tensor) else example
    if isinstance(given, Mapping):
        given = list(given.values())
    if isinstance(given, tuple | list) and any(
        isinstance(v, Tensor) and v.numel() == 0 for v in given
    ):
        raise InputError("the example is empty; give at least one sample with one token.")
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    if not isinstance(example, Tensor):
        raise InputError(
            "example must be a tensor, a tuple of positional arguments or a dict of keyword "
            f"arguments, given {type(example).__name__}."
        )
    if is_tokens(example):  # two samples: one cannot be told from what is made for all
        example = example[:2] if len(example) > 1 else example.repeat(2, 1)
    return (example,), {}


def _is_numbers(value: Any) -> bool:
    """Whether a value is a number, or lists of numbers."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_numbers, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def plain_tokenizer(tokenizer: Any) -> Any:
    """A `tokenizers.Tokenizer`, from itself or from a fast tokenizer of transformers."""
    return getattr(tokenizer, "backend_tokenizer", tokenizer)

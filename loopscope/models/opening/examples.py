"""Examples: what a foreign model's forward is given, from a file."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopscope.errors import InputError

SUFFIXES = (".npy", ".pt", ".pth")


def read_example(example: Any) -> Any:
    """An example as `wrap` takes it.

    Args:
        example: A `Path` to a `.npy` file (an array) or a `.pt` file (a tensor, a tuple of
            arguments, or a dict of them); anything else is taken as it is.

    Returns:
        The example.

    Raises:
        InputError: for a file of another kind, or one that cannot be read.
    """
    if not isinstance(example, Path):
        return example
    path = example.expanduser()
    if path.suffix not in SUFFIXES or not path.is_file():
        state = "is no file" if not path.is_file() else "is of another kind"
        raise InputError(
            f"the example {example} {state}; give .npy (an array) or .pt (what torch.save wrote of "
            "a tensor, a tuple or a dict of arguments)."
        )
    try:
        if path.suffix == ".npy":
            array = torch.from_numpy(np.load(path, allow_pickle=False))
            kind = torch.get_default_dtype() if array.is_floating_point() else torch.int64
            return array if array.dtype == torch.bool else array.to(kind)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes of it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"the example {example} cannot be read ({reason}); give an array of numbers (.npy), or "
            "tensors, numbers and texts in tuples and dicts (.pt)."
        ) from error


__all__ = ["read_example"]

"""Devices, floating types and seeds, as a user names them."""

import torch

from loopscope.errors import InputError, unknown_name

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Read a floating type from its name.

    Args:
        dtype: A key of `DTYPES`, or the type itself.

    Returns:
        The torch type.

    Raises:
        UnknownNameError: for any other name.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    return DTYPES[name]


def check_seed(seed: int) -> int:
    """Refuse a seed that numpy's or torch's generators do not take.

    Args:
        seed: The seed.

    Returns:
        The same seed.

    Raises:
        InputError: outside 0 … 2⁶³ − 1.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must lie in 0 … 2**63 - 1, given {seed}.")
    return seed


def parse_device(device: str | torch.device | None) -> torch.device:
    """Read a device that is present here.

    Args:
        device: `cpu`, `cuda`, `cuda:0`, `mps`, …; the CPU when None.

    Returns:
        The device.

    Raises:
        InputError: for an unknown device or one this machine lacks.
    """
    present = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        present.append("mps")
    try:
        parsed = torch.device("cpu" if device is None else device)
    except RuntimeError as err:
        raise InputError(f"unknown device {device!r}; present here: {', '.join(present)}.") from err
    accepted = [*present, *({"cuda"} if torch.cuda.is_available() else ())]
    if str(parsed) not in accepted:
        raise InputError(f"device {str(device)!r} is absent; present here: {', '.join(present)}.")
    return parsed

"""The state of an unfinished training: written whole, checked when read, two kept."""

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loopscope.errors import InputError
from loopscope.files import whole_file

VERSION = 1
KEPT = 2
"""States on disk: the newest, and the one before in case the newest is damaged."""


@dataclass(kw_only=True)
class State:
    """Where a training stands after `step` updates.

    Attributes:
        step: Updates done; the next batch is this one's (batches depend on the step alone).
        model: Weights, float32.
        optimizer: AdamW's moments and counters.
        rows: The log so far.
        losses: Losses since the log's last row.
        seconds: Time spent in steps.
        since: The same at the log's last row.
        resumed: Steps at which the training was resumed before.
        random: States of torch's generators.
    """

    step: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    rows: list[dict[str, Any]]
    losses: list[float]
    seconds: float
    since: float
    resumed: list[int]
    random: dict[str, Any] = field(default_factory=dict)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put weights, moments and random states back.

        Args:
            model: Gets the weights.
            optimizer: Gets the moments; of the same parameters.
        """
        model.load_state_dict(self.model)
        optimizer.load_state_dict(self.optimizer)
        torch.set_rng_state(self.random["cpu"])
        if self.random["cuda"] and torch.cuda.device_count() == len(self.random["cuda"]):
            torch.cuda.set_rng_state_all(self.random["cuda"])


def save_state(state: State, folder: Path, *, cuda: bool = False) -> Path:
    """Write `state-<step>.pt`, whole or not at all, and remove all but the two newest.

    Args:
        state: What to write; its random states are taken here.
        folder: Where to.
        cuda: Take the random states of the GPUs too.

    Returns:
        The file.

    Raises:
        InputError: The disk is full or the folder cannot be written to; older states stay.
    """
    state.random = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda else [],
    }
    target = folder / f"state-{state.step:06d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as part, part.open("wb") as file:
            torch.save({"version": VERSION, **vars(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        for old in _files(folder)[KEPT:]:
            old.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into RuntimeError
        if not isinstance(error, OSError) and not isinstance(error.__context__, OSError):
            raise
        reason = _reason(error)
        raise InputError(
            f"cannot save the state of the training at step {state.step} in {folder}: {reason}. "
            "States saved before are kept; make room and give the same command to go on."
        ) from error
    return target


def drop_damaged(folder: Path, tell: Callable[[str], Any]) -> None:
    """Remove what a killed process left half-written; set states aside that do not read.

    Args:
        folder: Where the states are.
        tell: Given a sentence for each state that is renamed to `….damaged`.

    Raises:
        InputError: A state cannot be read for a reason that may pass, such as a missing right.
    """
    for part in folder.glob(".*.tmp"):
        part.unlink(missing_ok=True)
    for path in _files(folder):
        if (broken := _damage(path)) is not None:
            tell(f"{path} is damaged ({broken}) and set aside; the state before it is used.")
            path.rename(path.with_name(f"{path.name}.damaged"))


def _damage(path: Path) -> str | None:
    """What is wrong with a state, if anything."""
    try:
        with zipfile.ZipFile(path) as records:  # what torch.save writes, a CRC for each record
            if (record := records.testzip()) is not None:
                return f"checksum of {record}"
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({_reason(error)}); nothing was changed, try again."
        ) from error
    except Exception as error:  # a damaged file can raise anything
        return _reason(error)
    return None


def load_state(folder: Path) -> State | None:
    """Read the newest state into the CPU's memory.

    Args:
        folder: Where the states are.

    Returns:
        The state, or None when there is none.

    Raises:
        InputError: It cannot be read, or another version of loopscope wrote it.
    """
    if not (files := _files(folder)):
        return None
    try:
        values = torch.load(files[0], map_location="cpu", weights_only=True)
        version = values.pop("version")
        if version != VERSION:
            raise InputError(
                f"{files[0]} has version {version}, this loopscope reads {VERSION}; go on with the "
                "loopscope that began the training, or train into another folder."
            )
        return State(**values)
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{files[0]} cannot be read ({_reason(error)}); remove it to go on from the one before."
        ) from error


def _files(folder: Path) -> list[Path]:
    """States, the newest first."""
    files = [p for p in folder.glob("state-*.pt") if p.stem.removeprefix("state-").isdigit()]
    return sorted(files, key=lambda p: int(p.stem.removeprefix("state-")), reverse=True)


def _reason(error: BaseException) -> str:
    # torch's writer hides the operating system's error behind one of its own
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error).splitlines()[0] if str(error) else type(error).__name__

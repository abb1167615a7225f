"""The folder of one training: new, unfinished, finished, or somebody else's."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loopscope.errors import InputError
from loopscope.files import prepare, write_text
from loopscope.models.native import LoopModel, checkpoint
from loopscope.training.logs import MONITOR, RECIPE
from loopscope.training.recipe import TrainConfig
from loopscope.training.state import drop_damaged

LOCK, STATES = "run.lock", "resume"


class RunFolder:
    """Where one training writes.

    While it runs: `run.json` (the recipe), `run.lock`, `log.csv`, `resume/` (states) and, where
    asked for, `monitor.csv`, `step-000500/` and the like. When it is finished: a checkpoint with
    `log.csv`, `monitor.csv` and the step checkpoints.

    Attributes:
        path: The folder.
        states: Folder of the states to resume from.
        record: Recipe and text, as written and compared.
    """

    def __init__(self, path: Path, config: TrainConfig, data: dict[str, Any]) -> None:
        self.path, self.states = path, path / STATES
        self.record = {"training": config.to_dict(), "data": data}

    def step_folder(self, step: int) -> Path:
        """Where the step checkpoint of a step is.

        Args:
            step: Updates done.

        Returns:
            The folder, whether it exists or not.
        """
        return self.path / f"step-{step:06d}"

    @property
    def finished(self) -> bool:
        """Whether the training came to its end."""
        return (self.path / "config.json").exists()

    def check(self) -> None:
        """Refuse a folder that is neither new nor this training's.

        Raises:
            InputError: saying what it is, or which settings differ.
        """
        if not self.path.exists() or self._is_new():
            return
        file = self.path / ("provenance.json" if self.finished else RECIPE)
        before = checkpoint.read_json(file) if file.exists() else {}
        if not isinstance(before.get("training"), dict):
            raise InputError(
                f"{self.path} exists already and is no training of loopscope; choose another "
                "folder or remove it."
            )
        differ = _differences(before, self.record)
        if differ and (self.finished or self._has_weights()):
            raise InputError(
                f"{self.path} holds a training with other settings ({'; '.join(differ)}); give "
                "those to go on with it, choose another folder, or remove this one."
            )

    def _is_new(self) -> bool:
        if not self.path.is_dir():
            return False
        names = {path.name for path in self.path.iterdir()}
        return all(n == LOCK or (n.startswith(f".{RECIPE}.") and n.endswith(".tmp")) for n in names)

    def _has_weights(self) -> bool:
        """Whether anything was saved that another training would lose."""
        steps = {path.name for path in self.path.glob("step-*")} - {self.step_folder(0).name}
        return bool(steps) or any(self.states.glob("state-*.pt*"))

    @contextmanager
    def claimed(self, tell: Callable[[str], Any]) -> Iterator[None]:
        """Hold the folder, checked and rid of what a killed process left half-written.

        Args:
            tell: Given a sentence for each damaged state that is set aside.

        Returns:
            A context that holds the folder.

        Raises:
            InputError: as `check`, or if another process trains in it, or it cannot be made.
        """
        self.check()
        prepare(self.path)
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"another process is training in {self.path}; wait for it or choose another folder."
            ) from None
        try:
            self.check()
            self._drop_parts()
            if self.finished:
                self._clean()
            else:
                self._begin(tell)
            yield
        finally:
            if self.finished:
                (self.path / LOCK).unlink(missing_ok=True)
            lock.release()

    def finish(self, model: LoopModel, *, half: bool) -> None:
        """Make the folder a checkpoint and remove what only resuming needed.

        Args:
            model: The trained model, with its provenance.
            half: Store the weights in float16.
        """
        checkpoint.save_into(model, self.path, provenance=model.provenance, half=half)
        self._clean()

    def _drop_parts(self) -> None:
        for pattern in (".*.tmp", ".checkpoint.*", ".step-*"):
            for part in self.path.glob(pattern):
                shutil.rmtree(part) if part.is_dir() else part.unlink()

    def _begin(self, tell: Callable[[str], Any]) -> None:
        """Record the recipe; what is left of other settings goes, and so do damaged states."""
        file = self.path / RECIPE
        if file.exists() and _differences(checkpoint.read_json(file), self.record):
            shutil.rmtree(self.step_folder(0), ignore_errors=True)
            (self.path / MONITOR).unlink(missing_ok=True)
        drop_damaged(self.states, tell)
        write_text(json.dumps(self.record, indent=2) + "\n", file)

    def _clean(self) -> None:
        shutil.rmtree(self.states, ignore_errors=True)
        (self.path / RECIPE).unlink(missing_ok=True)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that differ, in words; the device may, and what an older version did not record."""
    usual = {field.name: field.default for field in fields(TrainConfig)}
    old, new = _flat(before["training"]), _flat(now["training"])
    differences = []
    for name in sorted({*old, *new} - {"device"}):
        recorded, asked = old.get(name, usual.get(name)), new.get(name)
        if recorded != asked:
            differences.append(f"{name.removeprefix('model.')} {recorded} there, {asked} given")
    texts = [record.get("data", {}) for record in (before, now)]
    if texts[0].get("sha256") != texts[1].get("sha256"):
        differences.append("another text")
    if len({text.get("tokenizer_sha256", "") for text in texts} - {""}) > 1:
        differences.append("another tokenizer")
    return differences


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

"""The trainer: the paper's recipe (MeSH, Appendix B) at any size, resumable at any moment.

Every variant sees the same batches: what a step trains on depends on the text, the data seed and
the step alone.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from loopscope.errors import InputError
from loopscope.models.native import LoopModel, checkpoint
from loopscope.processes import Processes
from loopscope.provenance import versions
from loopscope.training.batches import TrainingData
from loopscope.training.folder import RunFolder
from loopscope.training.logs import LOG, MONITOR, Log
from loopscope.training.monitor import Monitor
from loopscope.training.recipe import TrainConfig
from loopscope.training.state import State, load_state, save_state

PROBE = 8  # held-out windows that the monitor measures
Loss = Callable[[nn.Module, Int64[Tensor, "batch pos"], str], Float[Tensor, " target"]]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What the trainer tells after each step (losses in nats per token).

    Attributes:
        step: Updates done.
        steps: Updates planned.
        tokens: Tokens trained on so far.
        loss: Mean training loss since the log's last row.
        val_loss: Validation loss, where this step has one.
        lr: Learning rate of this step.
        tokens_per_s: Tokens per second since the log's last row.
    """

    step: int
    steps: int
    tokens: int
    loss: float
    val_loss: float | None
    lr: float
    tokens_per_s: float


def train_model(
    config: TrainConfig,
    data: TrainingData,
    out: str | Path,
    *,
    progress: Callable[[StepReport], None] | None = None,
    tell: Callable[[str], Any] = warnings.warn,
    provenance: dict[str, Any] | None = None,
    half: bool = False,
    keep_every: int | None = None,
    monitor_every: int = 0,
    save_seconds: float = 60.0,
) -> LoopModel:
    """Train one model into a folder: a checkpoint with its tokenizer, `log.csv`, `provenance.json`.

    Killed at any moment, the same call goes on from the last saved state and ends as it would have:
    on a CPU, with as many threads and at most two processes, bit for bit. A folder whose training
    is finished is loaded and returned.

    Args:
        config: Recipe and model.
        data: Text, the same object for every variant.
        out: Folder to write; new, empty, or an unfinished training of the same recipe.
        progress: Called after every step.
        tell: Given a sentence when a training is resumed or a damaged state passed over.
        provenance: More to record in `provenance.json`.
        half: Store the weights in float16.
        keep_every: Keep `step-000000`, and a step checkpoint every so many steps and at the end.
        monitor_every: Write the measures of loop collapse into `monitor.csv` every so many steps,
            taken on a few held-out windows; 0 for never, as without a loop.
        save_seconds: Save the state for resuming when so many seconds have passed.

    Returns:
        The trained model, in evaluation mode, with its tokenizer.

    Raises:
        InputError: The folder is another training's or cannot be made, the vocabulary or the text
            do not fit the configuration, the disk is full, or the loss or the gradient became NaN
            or infinite (the message names the step; the last sound weights are kept).
    """
    _check(config, data, keep_every, monitor_every)
    processes = Processes.join(config.device)
    processes.check(config.batch_size, config.accumulate)
    run = RunFolder(Path(out).expanduser(), config, data.fingerprint)
    with run.claimed(tell) if processes.main else nullcontext():
        processes.wait()  # process 0 has checked the folder
        if run.finished:
            return checkpoint.load_checkpoint(run.path).to(processes.device)
        model = LoopModel(config.model, seed=config.seed, name=run.path.name)
        model.tokenizer = data.tokenizer
        model.to(processes.device)
        trainer = _Trainer(model, config, data, run, processes, half, keep_every, save_seconds)
        if monitor_every and config.model.K and processes.main:
            probe = data.validation(PROBE, config.seq_len)[:, :-1]
            trainer.monitor = Monitor(probe, every=monitor_every, out=run.path / MONITOR)
        trainer.resume(tell)
        for report in trainer.steps():
            if progress is not None:
                progress(report)
        model.eval()
        model.provenance = trainer.provenance(provenance or {})
        if processes.main:
            run.finish(model, half=half)
        processes.wait()
    return model


def _check(
    config: TrainConfig, data: TrainingData, keep_every: int | None, monitor_every: int
) -> None:
    """Refuse what cannot be trained, before anything is written."""
    if keep_every is not None and keep_every < 1:
        raise InputError(f"keep_every must be at least 1, given {keep_every}.")
    if monitor_every < 0:
        raise InputError(f"monitor_every must be 0 (never) or more, given {monitor_every}.")
    data.check(config.seq_len)
    if data.tokenizer.get_vocab_size() > config.model.d_vocab:
        raise InputError(
            f"the tokenizer has {data.tokenizer.get_vocab_size()} ids but the model's d_vocab is "
            f"{config.model.d_vocab}; make d_vocab as large."
        )


class _Trainer:
    """One training in one process."""

    def __init__(
        self,
        model: LoopModel,
        config: TrainConfig,
        data: TrainingData,
        run: RunFolder,
        processes: Processes,
        half: bool,
        keep_every: int | None,
        save_seconds: float,
    ) -> None:
        self.model, self.config, self.data = model, config, data
        self.run, self.processes = run, processes
        self.half, self.keep_every, self.save_seconds = half, keep_every, save_seconds
        self.net = processes.wrap(model)
        self.optimizer = make_optimizer(model, config)
        self.loss: Loss = token_losses
        if config.compile:
            torch.compiler.reset()  # what other models compiled counts against this one's limit
            self.loss = torch.compile(token_losses)
        self.step, self.seconds, self.since = 0, 0.0, 0.0
        self.losses: list[float] = []
        self.resumed: list[int] = []
        self.log: Log | None = None
        self.monitor: Monitor | None = None

    def resume(self, tell: Callable[[str], Any]) -> None:
        """Go to the newest saved state, if there is one."""
        state = load_state(self.run.states)
        rows: list[dict[str, Any]] = []
        if state is not None:
            state.restore(self.model, self.optimizer)
            self.step, self.losses = state.step, state.losses
            self.seconds, self.since = state.seconds, state.since
            self.resumed, rows = [*state.resumed, state.step], state.rows
        if self.processes.total(float(self.step)) != self.step * self.processes.count:
            raise InputError(
                f"the processes found different states in {self.run.path}; all of them must see "
                "the same folder, on a file system that the machines share."
            )
        self.processes.wait()  # all have read before anything is written
        if self.processes.main:
            if state is not None:
                tell(f"{self.run.path.name} goes on from step {self.step} of {self.config.steps}.")
            self.log = Log(self.run.path / LOG, rows)
            if self.monitor is not None:
                self.monitor.resume(self.step)

    def steps(self) -> Iterator[StepReport]:
        """Train to the end, a step at a time."""
        config = self.config
        heldout = self.data.validation(config.eval_windows, config.seq_len)
        began, saved = self.step, time.monotonic()
        if self.step == 0:
            self._keep()
            self._measure()
        while self.step < config.steps:
            start = time.perf_counter()
            lr, loss = config.lr_at(self.step), self._backward()
            self.seconds += time.perf_counter() - start
            # The gradient is sound, so these weights are: the time to save them.
            if self.step > began and time.monotonic() - saved >= self.save_seconds:
                self._save()
                saved = time.monotonic()
            self._update(lr)
            self.losses.append(loss)
            report = self._report(lr, self._validation_loss(heldout))
            self._add_row(report)
            self._keep()
            self._measure()
            yield report

    def _backward(self) -> float:
        """Gradient of this step's mean loss, clipped; the loss over all processes."""
        config = self.config
        batch = self.data.batch(
            self.step, batch_size=config.batch_size, seq_len=config.seq_len, seed=config.data_seed
        )
        self.net.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        parts = self.processes.share(batch).chunk(config.accumulate)
        for part in parts[:-1]:
            with self.processes.local(self.net):
                total += self._part(part)
        total += self._part(parts[-1])
        loss = self.processes.total(total) / self.processes.count
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip).item()
        if not math.isfinite(loss):
            self._stop(f"loss became {loss}", self.step + 1)
        if not math.isfinite(norm):
            self._stop(f"norm of the gradient became {norm}", self.step + 1)
        return loss

    def _part(self, windows: Int64[Tensor, "batch pos"]) -> float:
        loss = self.loss(self.net, windows.to(self.processes.device), self.config.dtype).mean()
        loss = loss / self.config.accumulate
        loss.backward()
        return loss.item()

    def _update(self, lr: float) -> None:
        """Take the optimiser's step."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.seconds += time.perf_counter() - start
        self.step += 1

    def _validation_loss(self, heldout: Int64[Tensor, "batch pos"]) -> float | None:
        """The validation loss, nats per token, where this step has one."""
        if self.step != self.config.steps and self.step % self.config.eval_every:
            return None
        share = self.processes.share(heldout)
        size = max(1, self.config.batch_size // (self.processes.count * self.config.accumulate))
        part = _summed(self.model, share, size, self.config.dtype) if len(share) else 0.0
        loss = self.processes.total(part) / (heldout.shape[0] * (heldout.shape[1] - 1))
        if not math.isfinite(loss):
            self._stop(f"validation loss became {loss}", self.step)
        return loss

    def _report(self, lr: float, val_loss: float | None) -> StepReport:
        count = len(self.losses)
        return StepReport(
            step=self.step,
            steps=self.config.steps,
            tokens=self.step * self._tokens_per_step,
            loss=sum(self.losses) / count,
            val_loss=val_loss,
            lr=lr,
            tokens_per_s=count * self._tokens_per_step / (self.seconds - self.since),
        )

    def _add_row(self, report: StepReport) -> None:
        """Log the step where that is due; the next row's means begin after it."""
        last = self.step == self.config.steps
        if last or report.val_loss is not None or self.step % self.config.log_every == 0:
            if self.log is not None:
                self.log.add({**asdict(report), "train_loss": report.loss})
            self.losses, self.since = [], self.seconds

    def _stop(self, what: str, step: int) -> NoReturn:
        """End a training that has gone wrong, with the last sound weights on disk."""
        kept = "no state had been saved before"
        if (state := load_state(self.run.states)) is not None:
            if self.processes.main:
                self.model.load_state_dict(state.model)
                self.step = state.step
                self._write_step()
            kept = f"the last sound weights are in {self.run.step_folder(state.step)}"
        self.processes.wait()  # a process that leaves takes the others along
        raise InputError(
            f"the {what} at step {step}; {kept}. Lower the learning rate (given {self.config.lr}) "
            "or check the text, and train into another folder."
        )

    def _save(self) -> None:
        if self.processes.main and self.log is not None:
            state = State(
                step=self.step,
                model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                rows=self.log.rows,
                losses=self.losses,
                seconds=self.seconds,
                since=self.since,
                resumed=self.resumed,
            )
            save_state(state, self.run.states, cuda=self.processes.device.type == "cuda")

    def _keep(self) -> None:
        if self.keep_every is None or not self.processes.main:
            return
        if self.step % self.keep_every == 0 or self.step == self.config.steps:
            self._write_step()

    def _write_step(self) -> None:
        tokens = self.step * self._tokens_per_step
        provenance = {**self.run.record, "step": self.step, "tokens": tokens}
        folder = self.run.step_folder(self.step)
        checkpoint.save(self.model, folder, provenance=provenance, half=self.half, overwrite=True)

    def _measure(self) -> None:
        monitor = self.monitor
        if monitor is None or not (monitor.due(self.step) or self.step == self.config.steps):
            return
        place = self.processes.device.type
        with torch.autocast(place, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            monitor.measure(self.model, self.step)

    @property
    def _tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.seq_len

    def provenance(self, more: dict[str, Any]) -> dict[str, Any]:
        """What the finished checkpoint says about itself."""
        config = self.config
        rows = self.log.rows if self.log is not None else []
        return {
            **more,
            **self.run.record,
            "tokens": config.tokens,
            "epochs": config.steps * config.batch_size / self.data.windows(config.seq_len),
            "val_loss": rows[-1]["val_loss"] if rows else None,
            "seconds": round(self.seconds, 1),
            "threads": torch.get_num_threads(),
            "processes": self.processes.count,
            "resumed": self.resumed,
            **({} if self.monitor is None else {"monitor": self.monitor.provenance}),
            "versions": versions(),
        }


@torch.no_grad()
def evaluate(
    model: LoopModel,
    windows: Int64[Tensor, "batch pos"],
    *,
    batch_size: int = 32,
    dtype: str = "float32",
) -> float:
    """Mean next-token cross-entropy.

    Args:
        model: The model.
        windows: Ids; the last of each window is a target only.
        batch_size: Windows at once.
        dtype: `float32`, or `bfloat16` autocast.

    Returns:
        Nats per token.
    """
    total = _summed(model, windows, batch_size, dtype)
    return total / (windows.shape[0] * (windows.shape[1] - 1))


@torch.no_grad()
def _summed(
    model: LoopModel, windows: Int64[Tensor, "batch pos"], batch_size: int, dtype: str
) -> float:
    training, device = model.training, next(model.parameters()).device
    model.eval()
    parts = windows.split(batch_size)
    losses = [token_losses(model, part.to(device), dtype).cpu().double().sum() for part in parts]
    model.train(training)
    return float(sum(losses))


def token_losses(
    model: nn.Module, windows: Int64[Tensor, "batch pos"], dtype: str
) -> Float[Tensor, " target"]:
    """Cross-entropy of each predicted token.

    Args:
        model: Tokens to logits.
        windows: Ids on the model's device; the last of each window is a target only.
        dtype: `float32`, or `bfloat16` autocast.

    Returns:
        Nats, batch · (pos − 1) of them.
    """
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none")


def make_optimizer(model: LoopModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; matrices are decayed, biases, norms and scalars are not.

    Args:
        model: Its parameters are optimised.
        config: Learning rate, betas and weight decay.

    Returns:
        The optimiser, in two groups: what is decayed, and what is not.
    """
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter in model.parameters():
        groups[parameter.ndim >= 2].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": config.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        fused=True,
    )

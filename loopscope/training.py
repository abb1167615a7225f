"""The trainer: the paper's recipe (MeSH, Appendix B) at any size.

Every variant sees the same batches: what a step trains on depends on the text, the data seed and
the step alone.
"""

import csv
import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from loopscope import __version__
from loopscope.batches import TrainingData
from loopscope.errors import InputError, unknown_name
from loopscope.models import checkpoint
from loopscope.models.config import LoopConfig
from loopscope.models.load import parse_device
from loopscope.models.model import LoopModel
from loopscope.output import prepare

DTYPES = ("float32", "bfloat16")
_PACKAGES = ("torch", "tokenizers", "numpy")
LOG_COLUMNS = ("step", "tokens", "train_loss", "val_loss", "lr", "tokens_per_s")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train one model; defaults are the paper's recipe at small size.

    Attributes:
        model: What to train; its vocabulary must be the tokenizer's.
        steps: Optimiser steps.
        batch_size: Windows per step.
        seq_len: Tokens per window, T.
        lr: Peak learning rate; linear warm-up, then cosine decay to `lr_floor` of it.
        warmup: Share of the steps that warm up.
        weight_decay: Of AdamW, on matrices; biases and norms are not decayed (as Pythia).
        grad_clip: Largest norm of the gradient.
        seed: Of the initial weights.
        data_seed: Of the order of the windows.
        device: Where to train.
        dtype: `float32`, or `bfloat16` autocast with float32 weights.
        accumulate: Parts each batch is cut into, one forward and backward pass each.
        compile: Compile the model with `torch.compile`.
        log_every: Steps between rows of the log.
        eval_every: Steps between validation losses (the last step always has one).
        eval_windows: Held-out windows the validation loss is taken over.
    """

    model: LoopConfig
    steps: int
    batch_size: int = 32
    seq_len: int = 256
    lr: float = 2e-3
    lr_floor: float = 0.1
    warmup: float = 0.01
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    seed: int = 0
    data_seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    accumulate: int = 1
    compile: bool = False
    log_every: int = 10
    eval_every: int = 100
    eval_windows: int = 64

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "log_every", "eval_every", "eval_windows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, given {getattr(self, name)}.")
        for name in ("lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be positive, given {getattr(self, name)}.")
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)

    @property
    def tokens(self) -> int:
        """Tokens trained on in all steps."""
        return self.steps * self.batch_size * self.seq_len

    def lr_at(self, step: int) -> float:
        """Learning rate of `step` (0 … steps − 1): linear warm-up, cosine down to the floor."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        done = (step - warm + 1) / max(1, self.steps - warm)
        return self.lr * (self.lr_floor + (1 - self.lr_floor) * (1 + math.cos(math.pi * done)) / 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**values, "model": self.model.to_dict(), "betas": list(self.betas)}


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What the trainer tells after each step (losses in nats per token)."""

    step: int
    steps: int
    tokens: int
    loss: float
    val_loss: float | None
    lr: float
    tokens_per_s: float


def train(
    config: TrainConfig,
    data: TrainingData,
    out: str | Path,
    *,
    progress: Callable[[StepReport], None] | None = None,
    provenance: dict[str, Any] | None = None,
    half: bool = False,
) -> LoopModel:
    """Train one model and write it as a checkpoint folder with its tokenizer and `log.csv`.

    Args:
        config: Recipe and model.
        data: Text, the same object for every variant.
        out: Folder to write, all at once at the end; must not exist.
        progress: Called after every step.
        provenance: More to record in `provenance.json`.
        half: Store the weights in float16.

    Returns:
        The trained model, in evaluation mode, with its tokenizer.

    Raises:
        InputError: The folder exists or cannot be made, the vocabulary or the text do not fit the
            configuration, or the loss became NaN or infinite (the message names the step).
    """
    out = Path(out)
    _check_target(out)
    data.check(config.seq_len)
    if data.tokenizer.get_vocab_size() > config.model.d_vocab:
        raise InputError(
            f"the tokenizer has {data.tokenizer.get_vocab_size()} ids but the model's d_vocab is "
            f"{config.model.d_vocab}; make d_vocab as large."
        )
    model = LoopModel(config.model, seed=config.seed, name=out.name, tokenizer=data.tokenizer)
    model.to(parse_device(config.device))
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    for report in _steps(model, config, data, rows):
        if progress is not None:
            progress(report)
    model.eval()
    told = {
        **(provenance or {}),
        "training": config.to_dict(),
        "tokens": config.tokens,
        "epochs": config.steps * config.batch_size / data.windows(config.seq_len),
        "data": data.provenance,
        "val_loss": rows[-1]["val_loss"],
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {
            "loopscope": __version__,
            "python": python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
    }
    model.provenance = told
    log = io.StringIO()
    writer = csv.DictWriter(log, LOG_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    checkpoint.save(model, out, half=half, log=log.getvalue())
    return model


def _check_target(out: Path) -> None:
    if out.exists():
        raise InputError(f"{out} exists already; choose another folder or remove it.")
    prepare(out.parent)


def _steps(
    model: LoopModel, config: TrainConfig, data: TrainingData, rows: list[dict[str, Any]]
) -> Iterator[StepReport]:
    optimizer = _optimizer(model, config)
    held = data.validation(config.eval_windows, config.seq_len)
    losses: list[float] = []
    spent = since = 0.0
    for step in range(config.steps):
        began = time.perf_counter()
        lr = config.lr_at(step)
        batch = data.batch(
            step, batch_size=config.batch_size, seq_len=config.seq_len, seed=config.data_seed
        )
        losses.append(_update(model, optimizer, batch, lr, config))
        if not math.isfinite(losses[-1]):
            raise InputError(
                f"the loss became {losses[-1]} at step {step + 1}; nothing was saved. "
                f"Lower the learning rate (given {config.lr}) or check the text."
            )
        spent += time.perf_counter() - began
        done = step + 1
        last = done == config.steps
        val_loss = None
        if last or done % config.eval_every == 0:
            val_loss = evaluate(model, held, batch_size=config.batch_size, dtype=config.dtype)
        report = StepReport(
            step=done,
            steps=config.steps,
            tokens=done * config.batch_size * config.seq_len,
            loss=sum(losses) / len(losses),
            val_loss=val_loss,
            lr=lr,
            tokens_per_s=len(losses) * config.batch_size * config.seq_len / (spent - since),
        )
        if last or val_loss is not None or done % config.log_every == 0:
            row = asdict(report)
            rows.append({**{c: row[c] for c in LOG_COLUMNS if c in row}, "train_loss": row["loss"]})
            losses, since = [], spent
        yield report


def _update(
    model: LoopModel,
    optimizer: torch.optim.Optimizer,
    batch: Int64[Tensor, "batch pos"],
    lr: float,
    config: TrainConfig,
) -> float:
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = _loss(model, batch, config.dtype).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    optimizer.step()
    return loss.item()


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
    model.eval()
    parts = [_loss(model, part, dtype).double().sum() for part in windows.split(batch_size)]
    return float(sum(parts)) / (windows.shape[0] * (windows.shape[1] - 1))


def _loss(
    model: LoopModel, windows: Int64[Tensor, "batch pos"], dtype: str
) -> Float[Tensor, " target"]:
    device = next(model.parameters()).device
    windows = windows.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none")


def _optimizer(model: LoopModel, config: TrainConfig) -> torch.optim.Optimizer:
    # Matrices are decayed; biases, norms and scalars are not.
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

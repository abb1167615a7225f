"""The recipe: everything that decides what a training run computes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from loopscope.analysis import option, takes
from loopscope.errors import InputError, unknown_name
from loopscope.models.native import Layout, LoopConfig, parse_variant
from loopscope.names import MIN_TOKENS

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What `plan_training` takes: the recipe of several variants.

    Attributes:
        layout: Layout of the looped variants; `vanilla` unrolls it.
        tokens: Training tokens, rounded up to whole steps.
        d_model: Width D.
        n_heads: Heads; D / 32 when not given.
        vocab: Vocabulary of the byte-level BPE that is trained on the text.
        slots: Memory slots B of `mesh`; K + 3 when not given.
        seq_len: Tokens per window.
        batch_size: Windows per step, over all processes.
        accumulate: Parts each batch is cut into, so that it fits into memory.
        lr: Peak learning rate.
        seed: Of the initial weights and the order of batches.
        eval_every: Steps between validation losses.
        device: Where to train; None takes a GPU if there is one.
        dtype: `float32`, or `bfloat16` autocast.
        compile: Use `torch.compile`.
        warmup: Share of the steps that warm up.
        weight_decay: Of AdamW, on matrices.
        grad_clip: Largest norm of the gradient.
        lr_floor: Share of `lr` that is left at the end.
        betas: Of AdamW.
        log_every: Steps between rows of the log.
        eval_windows: Held-out windows the validation loss is taken over.
    """

    layout: str = option("1+2R3+1", "--layout", "Layout of the looped ones.")
    tokens: int = option(2_000_000, "--tokens", "Training tokens.")
    d_model: int = option(160, "--d-model", "Width D.")
    n_heads: int | None = option(None, "--heads", "Default: D/32.")
    vocab: int = option(2048, "--vocab", "Vocabulary of the tokenizer.")
    slots: int | None = option(None, "--slots", "Memory slots B of mesh (default: K + 3).")
    seq_len: int = option(256, "--seq-len", "Tokens per window.")
    batch_size: int = option(8, "--batch-size", "Windows per step, over all processes.")
    accumulate: int = option(1, "--accumulate", "Parts each batch is cut into, to save memory.")
    lr: float = option(3e-3, "--lr", "Peak learning rate.")
    seed: int = option(0, "--seed", "Weights and order of batches.")
    eval_every: int = option(100, "--eval-every", "Steps between validation losses.")
    device: str | None = option("cpu", "--device", "cpu, cuda, cuda:0, mps …")
    dtype: str = option("float32", "--dtype", f"{', '.join(DTYPES)}.")
    compile: bool = option(False, "--compile", "Use torch.compile.")
    warmup: float = option(0.01, "--warmup", "Share of the steps that warm up.")
    weight_decay: float = option(0.01, "--weight-decay", "Of AdamW, on matrices.")
    grad_clip: float = option(1.0, "--grad-clip", "Largest norm of the gradient.")
    lr_floor: float = option(0.1)
    betas: tuple[float, float] = option((0.9, 0.95))
    log_every: int = option(10)
    eval_windows: int = option(64)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(PlanOptions):
    """What `train_variants` and `loopscope train` take.

    Attributes:
        data: `.txt`, `.jsonl` or `.parquet` to train on; the running Python's standard library
            when not given.
        half: Store the weights in float16.
        keep_every: Keep a step checkpoint every so many steps.
        monitor_every: Write the measures of loop collapse every so many steps; 0 for never.
        save_seconds: Save the state for resuming when so many seconds have passed.
    """

    data: str | Path | None = option(
        None, "--data", ".txt, .jsonl or .parquet; default: the standard library.",
        typed=str | None,
    )  # fmt: skip
    half: bool = option(False, "--half", "Store weights in float16.")
    keep_every: int | None = option(
        None, "--keep-every", "Keep a checkpoint step-000500 … every so many steps."
    )
    monitor_every: int = option(
        0, "--monitor-every", "Steps between measures of loop collapse; 0: never."
    )
    save_seconds: float = option(60.0, "--save-seconds", "Seconds between states to resume from.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train one model; defaults are the paper's recipe (MeSH, Appendix B) at small size.

    Attributes:
        model: What to train; its vocabulary must be the tokenizer's.
        steps: Optimiser steps.
        batch_size: Windows per step, over all processes.
        seq_len: Tokens per window, T.
        lr: Peak learning rate; linear warm-up, then cosine decay to `lr_floor` of it.
        warmup: Share of the steps that warm up.
        weight_decay: Of AdamW, on matrices; biases and norms are not decayed (as Pythia).
        grad_clip: Largest norm of the gradient.
        seed: Of the initial weights.
        data_seed: Of the order of the windows.
        device: Where to train.
        dtype: `float32`, or `bfloat16` autocast with float32 weights.
        accumulate: Parts each process cuts its share of a batch into, one forward and backward
            pass each; for batches that do not fit into memory.
        compile: Compile forward and backward with `torch.compile`.
        log_every: Steps between rows of the log.
        eval_every: Steps between validation losses (the last step always has one).
        eval_windows: Held-out windows the validation loss is taken over.
    """

    model: LoopConfig
    steps: int
    batch_size: int = 32
    seq_len: int = PlanOptions.seq_len
    lr: float = 2e-3
    lr_floor: float = PlanOptions.lr_floor
    warmup: float = PlanOptions.warmup
    weight_decay: float = PlanOptions.weight_decay
    betas: tuple[float, float] = PlanOptions.betas
    grad_clip: float = PlanOptions.grad_clip
    seed: int = PlanOptions.seed
    data_seed: int = 0
    device: str = "cpu"
    dtype: str = PlanOptions.dtype
    accumulate: int = PlanOptions.accumulate
    compile: bool = PlanOptions.compile
    log_every: int = PlanOptions.log_every
    eval_every: int = PlanOptions.eval_every
    eval_windows: int = PlanOptions.eval_windows

    def __post_init__(self) -> None:
        counts = (
            "steps", "batch_size", "seq_len", "accumulate", "log_every", "eval_every",
            "eval_windows",
        )  # fmt: skip
        for name in counts:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, given {getattr(self, name)}.")
        for name in ("lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be positive, given {getattr(self, name)}.")
        for name in ("lr_floor", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a share, 0 … 1, given {getattr(self, name)}.")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must not be negative, given {self.weight_decay}.")
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        if self.batch_size % self.accumulate:
            raise InputError(
                f"a batch of {self.batch_size} windows cannot be cut into {self.accumulate} equal "
                "parts; accumulate must divide batch_size."
            )

    @property
    def tokens(self) -> int:
        """Tokens trained on in all steps."""
        return self.steps * self.batch_size * self.seq_len

    def lr_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, cosine down to the floor (MeSH, Appendix B).

        Args:
            step: Number of the step, 0 … steps − 1.

        Returns:
            The rate, at most `lr`.
        """
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        done = (step - warm + 1) / max(1, self.steps - warm)
        return self.lr * (self.lr_floor + (1 - self.lr_floor) * (1 + math.cos(math.pi * done)) / 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**values, "model": self.model.to_dict(), "betas": list(self.betas)}


def variant_config(variant: str, layout: str | Layout, **widths: Any) -> LoopConfig:
    """The configuration of one variant; `vanilla` gets the same compute without a loop.

    Args:
        variant: A variant name.
        layout: The layout of the looped variants.
        **widths: Further fields of `LoopConfig`.

    Returns:
        The configuration; that of `vanilla` has the layout unrolled.
    """
    parsed, name = Layout.parse(layout), parse_variant(variant)
    return LoopConfig(
        variant=name, layout=parsed.unshared if name == "vanilla" else parsed, **widths
    )


@takes(PlanOptions)
def plan_training(variants: Sequence[str] | str, **settings: Any) -> dict[str, TrainConfig]:
    """The recipe of each variant; only the recurrence differs between them.

    Args:
        variants: Names of variants; a string is split at commas.
        **settings: As `PlanOptions` describes them: `layout`, `tokens`, `d_model`, `n_heads`,
            `vocab`, `slots`, `seq_len`, `batch_size`, `accumulate`, `lr`, `seed`, `eval_every`,
            `device`, `dtype`, `compile`, `warmup`, `weight_decay`, `grad_clip`, `lr_floor`,
            `betas`, `log_every`, `eval_windows`.

    Returns:
        Variant → recipe, in the order given.

    Raises:
        InputError: for settings that cannot be, or a variant given twice.
    """
    from loopscope.devices import check_seed

    declared = {entry.name for entry in fields(PlanOptions)}
    further = {name: value for name, value in settings.items() if name not in declared}
    options = PlanOptions(**{name: settings[name] for name in settings.keys() - further})
    tokens, batch_size, seq_len = options.tokens, options.batch_size, options.seq_len
    if tokens < 1 or batch_size < 1 or seq_len < MIN_TOKENS:
        raise InputError(
            f"tokens and batch size must be at least 1 and seq_len at least "
            f"{MIN_TOKENS}, given {tokens}, "
            f"{batch_size}, {seq_len}."
        )
    check_seed(options.seed)
    names = _variant_names(variants, options.slots, further)
    options = replace(options, device=_device(options.device))
    return {name: _recipe(name, options, **further) for name in names}


def _device(device: str | None) -> str:
    """The device to train on, which must be present here."""
    import torch

    from loopscope.devices import parse_device

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return str(parse_device(device))


def _recipe(variant: str, options: PlanOptions, **further: Any) -> TrainConfig:
    """The recipe of one variant."""
    recipe = {entry.name for entry in fields(TrainConfig)}
    return TrainConfig(
        model=variant_config(
            variant,
            options.layout,
            d_model=options.d_model,
            n_heads=max(1, options.d_model // 32) if options.n_heads is None else options.n_heads,
            d_vocab=options.vocab,
            n_ctx=options.seq_len,
            slots=options.slots if variant == "mesh" else None,
        ),
        steps=-(-options.tokens // (options.batch_size * options.seq_len)),
        data_seed=options.seed,
        **{name: value for name, value in vars(options).items() if name in recipe},
        **further,
    )


def _variant_names(
    variants: Sequence[str] | str, slots: int | None, further: dict[str, Any]
) -> list[str]:
    """The variants' full names; refuses settings that do not exist or go with none of them."""
    if isinstance(variants, str):
        variants = variants.split(",")
    names = [parse_variant(variant) for variant in variants]
    if not names:
        raise InputError("no variant was given; name at least one, such as base,mesh.")
    if unknown := sorted(set(further) - set(TrainConfig.__dataclass_fields__)):
        raise unknown_name("setting", unknown[0], TrainConfig.__dataclass_fields__)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{','.join(variants)} names {', '.join(twice)} twice; name each once.")
    if slots is not None and "mesh" not in names:
        raise InputError(f"slots={slots} is for mesh only, given {', '.join(names)}.")
    return names

"""The recipe: everything that decides what a training run computes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loopscope.devices import check_seed, parse_device
from loopscope.errors import InputError, unknown_name
from loopscope.models.native.configuration import Layout, LoopConfig, parse_variant

DTYPES = ("float32", "bfloat16")


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


def plan_training(
    variants: Sequence[str] | str,
    *,
    layout: str = "1+2R3+1",
    tokens: int = 2_000_000,
    d_model: int = 160,
    n_heads: int | None = None,
    vocab: int = 2048,
    slots: int | None = None,
    seq_len: int = 256,
    batch_size: int = 8,
    accumulate: int = 1,
    lr: float = 3e-3,
    seed: int = 0,
    eval_every: int = 100,
    device: str | None = "cpu",
    dtype: str = "float32",
    compile: bool = False,
    **settings: Any,
) -> dict[str, TrainConfig]:
    """The recipe of each variant; only the recurrence differs between them.

    Args:
        variants: Names of variants; a string is split at commas.
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
        **settings: Further fields of `TrainConfig`: `warmup`, `weight_decay`, `grad_clip` …

    Returns:
        Variant → recipe, in the order given.

    Raises:
        InputError: for settings that cannot be, or a variant given twice.
    """
    if tokens < 1 or batch_size < 1 or seq_len < 4:
        raise InputError(
            f"tokens and batch size must be at least 1 and seq_len at least 4, given {tokens}, "
            f"{batch_size}, {seq_len}."
        )
    check_seed(seed)
    names = _variant_names(variants, slots, settings)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = str(parse_device(device))
    return {
        name: TrainConfig(
            model=variant_config(
                name,
                layout,
                d_model=d_model,
                n_heads=max(1, d_model // 32) if n_heads is None else n_heads,
                d_vocab=vocab,
                n_ctx=seq_len,
                slots=slots if name == "mesh" else None,
            ),
            steps=-(-tokens // (batch_size * seq_len)),
            batch_size=batch_size,
            seq_len=seq_len,
            lr=lr,
            seed=seed,
            data_seed=seed,
            device=place,
            dtype=dtype,
            accumulate=accumulate,
            compile=compile,
            eval_every=eval_every,
            **settings,
        )
        for name in names
    }


def _variant_names(
    variants: Sequence[str] | str, slots: int | None, settings: dict[str, Any]
) -> list[str]:
    """The variants' full names; refuses settings that do not exist or go with none of them."""
    if isinstance(variants, str):
        variants = variants.split(",")
    names = [parse_variant(variant) for variant in variants]
    if not names:
        raise InputError("no variant was given; name at least one, such as base,mesh.")
    if unknown := sorted(set(settings) - set(TrainConfig.__dataclass_fields__)):
        raise unknown_name("setting", unknown[0], TrainConfig.__dataclass_fields__)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{','.join(variants)} names {', '.join(twice)} twice; name each once.")
    if slots is not None and "mesh" not in names:
        raise InputError(f"slots={slots} is for mesh only, given {', '.join(names)}.")
    return names
